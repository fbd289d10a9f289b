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
    slots: Sequence[Sequence[Any]],
    steps: Sequence[Any],
    hyper: Sequence[dict[str, Any]],
    scalar: Sequence[bool],
) -> list[tuple[Any, ...]]:
    """One row ``(p, *slots)`` per leaf: what the rule makes of that leaf.

    ``slots[s][i]`` is slot s of leaf i, ``steps[i]`` its update number (from 1; an int,
    or a 0-d float64 tensor), ``hyper[i]`` the rule's keyword arguments. ``scalar[s]``
    tells whether slot s is a number per leaf (a float, or a 0-d float64 tensor).
    """
    return [
        rule(g, p, *state, step=t, **values)
        if p.ndim and p.dtype not in _HALF
        else _promoted(rule, g, p, state, t, values, scalar)
        for g, p, t, values, *state in zip(grads, params, steps, hyper, *slots)
    ]


def _promoted(
    rule: RuleFunction,
    g: Tensor,
    p: Tensor,
    state: Sequence[Any],
    step: Any,
    hyper: dict[str, Any],
    scalar: Sequence[bool],
) -> tuple[Any, ...]:
    """The rule on a half or 0-d leaf.

    eps = 1e-8 is zero in float16, and 0 / 0 would follow: a half leaf is worked on in
    float32, as kernels do in their registers. A 0-d leaf would take part in type
    promotion as the float64 hyperparameters do: it is worked on as shape (1,).
    """
    dtype = torch.float32 if p.dtype in _HALF else p.dtype
    shape = p.shape or (1,)
    given = zip((g, p, *state), (False, False, *scalar))
    wide = [x if kept else x.to(dtype).reshape(shape) for x, kept in given]
    out = zip(rule(*wide, step=step, **hyper), (False, *scalar))
    return tuple(x if kept else x.to(p.dtype).reshape(p.shape) for x, kept in out)
