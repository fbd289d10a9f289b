"""The reference executor: call the rule on each leaf. The definition of correct."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from funcopt.execution import donation, levels
from funcopt.execution.executor import Column
from funcopt.execution.leaves import Leaves
from funcopt.types import HALF, Tensor


def step(leaves: Leaves) -> list[Column]:
    """The columns ``p, *slots``, or of sums: what the rule makes of each leaf."""
    rule, given = leaves.rule, donation.is_given()
    function, inputs = rule.function, (True, True, *(not s for s in rule.scalar))
    dual = levels.in_forward_mode()
    rows = [
        _apart(function(g, p, *state, step=t, **values), (g, p, *state), given)
        if p.ndim and p.dtype not in HALF and not dual
        else on_any_leaf(function, inputs, rule.outputs, (g, p, *state), step=t, **values)
        for g, p, t, values, *state in zip(
            leaves.grads, leaves.params, leaves.steps, leaves.hyper, *leaves.slots
        )
    ]
    return list(zip(*rows))


def _apart(
    outputs: Sequence[Any], inputs: Sequence[Any], given: bool = False
) -> Sequence[Any]:
    """The outputs, none of them an input: states are not to share memory.

    Where parameter and state are ``given`` away, each may be what comes of it.
    """
    return [
        x.clone()
        if isinstance(x, Tensor)
        and any(x is y for k, y in enumerate(inputs) if not given or k != i)
        else x
        for i, x in enumerate(outputs, 1)
    ]


def computed(stored: torch.dtype) -> torch.dtype:
    """The dtype that a leaf is worked on in."""
    return torch.float32 if stored in HALF else stored


def on_any_leaf(
    function: Callable[..., Any],
    inputs: Sequence[bool],
    outputs: Sequence[bool],
    given: Sequence[Any],
    /,  # hyperparameters may have these names
    **hyper: Any,
) -> tuple[Any, ...]:
    """What a rule makes of a leaf, be it half, 0-d, or in forward mode.

    ``inputs`` and ``outputs`` say which are the leaf's tensors; others are scalars.

    eps = 1e-8 is zero in float16, and 0 / 0 would follow: a half leaf is worked on in
    float32, as kernels do in their registers. A 0-d leaf would take part in type
    promotion as the float64 hyperparameters do: it is worked on as shape (1,). So may
    the tangent of any leaf.
    """
    wide = [
        _formed(x, computed(x.dtype), x.shape or (1,)) if stream else x
        for x, stream in zip(given, inputs)
    ]
    made = _apart(function(*wide, **hyper), wide)
    if not any(outputs):
        return tuple(made)  # sums
    # A slot has the form that it had; so has a parameter.
    return tuple(
        _formed(x, old.dtype, old.shape) if stream else x
        for x, old, stream in zip(made, given[1:], outputs)
    )


def _formed(x: Tensor, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    return levels.with_alike_tangent(x.to(dtype).reshape(shape))
