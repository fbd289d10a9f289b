"""The reference executor: call the rule on each leaf. The definition of correct."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from funcopt.execution import donation
from funcopt.execution.leaves import Leaves
from funcopt.execution.rule import Rule
from funcopt.types import Tensor

_HALF = (torch.float16, torch.bfloat16)


def step(
    rule: Rule,
    grads: Sequence[Tensor],
    params: Sequence[Tensor],
    slots: Sequence[Sequence[Any]],
    steps: Sequence[Any],
    hyper: Sequence[dict[str, Any]],
) -> list[Sequence[Any]]:
    """The columns ``p, *slots``, or of sums: what the rule makes of each leaf.

    ``slots[s][i]`` is slot s of leaf i, ``steps[i]`` its update number (from 1; an int,
    or a 0-d float64 tensor), ``hyper[i]`` the rule's keyword arguments.
    """
    function, inputs = rule.function, (True, True, *(not s for s in rule.scalar))
    given = donation.is_given()
    rows = [
        _apart(function(g, p, *state, step=t, **values), (g, p, *state), given)
        if p.ndim and p.dtype not in _HALF
        else _promoted(
            function, inputs, rule.outputs, (g, p, *state), {"step": t, **values}
        )
        for g, p, t, values, *state in zip(grads, params, steps, hyper, *slots)
    ]
    return list(zip(*rows))


def of_leaves(leaves: Leaves) -> list[Sequence[Any]]:
    """`step` of a whole step's leaves."""
    return step(
        leaves.rule,
        leaves.grads,
        leaves.params,
        leaves.slots,
        leaves.steps,
        leaves.hyper,
    )


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
    return torch.float32 if stored in _HALF else stored


def on_leaf(
    function: Callable[..., Any], inputs: Sequence[bool], outputs: Sequence[bool]
) -> Callable[..., Any]:
    """A function of a leaf's tensors (True) and scalars, for a leaf of any kind."""

    def promoted(*given: Any) -> Sequence[Any]:
        return _promoted(function, inputs, outputs, given, {})

    return promoted


def _promoted(
    function: Callable[..., Any],
    inputs: Sequence[bool],
    outputs: Sequence[bool],
    given: Sequence[Any],
    hyper: dict[str, Any],
) -> tuple[Any, ...]:
    """The rule on a half or 0-d leaf.

    eps = 1e-8 is zero in float16, and 0 / 0 would follow: a half leaf is worked on in
    float32, as kernels do in their registers. A 0-d leaf would take part in type
    promotion as the float64 hyperparameters do: it is worked on as shape (1,).
    """
    wide = [
        x.to(computed(x.dtype)).reshape(x.shape or (1,)) if stream else x
        for x, stream in zip(given, inputs)
    ]
    made = _apart(function(*wide, **hyper), wide)
    if not any(outputs):
        return tuple(made)  # sums
    # A slot has the form that it had; so has a parameter.
    return tuple(
        x.to(old.dtype).reshape(old.shape) if stream else x
        for x, old, stream in zip(made, given[1:], outputs)
    )
