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
        rule(g, p, *state, step=t, **values)
        if p.ndim and p.dtype not in _HALF
        else _promoted(rule, g, p, state, t, values)
        for g, p, t, values, *state in zip(grads, params, steps, hyper, *slots)
    ]


def _promoted(
    rule: RuleFunction,
    g: Tensor,
    p: Tensor,
    state: Sequence[Tensor],
    step: Any,
    hyper: dict[str, Any],
) -> tuple[Tensor, ...]:
    """The rule on a half or 0-d leaf.

    eps = 1e-8 is zero in float16, and 0 / 0 would follow: a half leaf is worked on in
    float32, as kernels do in their registers. A 0-d leaf would take part in type
    promotion as the float64 hyperparameters do: it is worked on as shape (1,).
    """
    half = p.dtype in _HALF
    leaf = [(x.float() if half else x).reshape(p.shape or (1,)) for x in (g, p, *state)]
    out = rule(*leaf, step=step, **hyper)
    return tuple(x.to(p.dtype).reshape(p.shape) for x in out)
