"""The reference executor: call the rule on each leaf. The definition of correct."""

from collections.abc import Sequence
from typing import Any

import torch

from funcopt.types import RuleFunction, Tensor

_HALF = (torch.float16, torch.bfloat16)


def step(
    rule: RuleFunction,
    grads: Sequence[Tensor],
    params: Sequence[Tensor],
    slots: Sequence[Sequence[Tensor]],
    steps: Sequence[Any],
    hyper: Sequence[dict[str, Any]],
) -> list[tuple[Tensor, ...]]:
    """One row ``(p, *slots)`` per leaf: what the rule makes of that leaf.

    ``slots[s][i]`` is slot s of leaf i, ``steps[i]`` its update number (from 1; an int,
    or a 0-d float64 tensor), ``hyper[i]`` the rule's keyword arguments.
    """
    return [
        _leaf(rule, g, p, state, t, values)
        for g, p, t, values, *state in zip(grads, params, steps, hyper, *slots)
    ]


def _leaf(
    rule: RuleFunction,
    g: Tensor,
    p: Tensor,
    state: Sequence[Tensor],
    step: Any,
    hyper: dict[str, Any],
) -> tuple[Tensor, ...]:
    arguments = (g, p, *state)
    dtype, shape = p.dtype, p.shape
    if dtype in _HALF:
        # eps = 1e-8 is zero in float16, and 0 / 0 would follow; kernels too hold half
        # leaves in float32 registers.
        arguments = tuple(x.float() for x in arguments)
    if not shape:
        # A 0-d leaf would take part in type promotion as hyperparameters (float64) do.
        arguments = tuple(x.reshape(1) for x in arguments)
    out = rule(*arguments, step=step, **hyper)
    return tuple(
        x if x.dtype == dtype and x.shape == shape else x.to(dtype).reshape(shape)
        for x in out
    )
