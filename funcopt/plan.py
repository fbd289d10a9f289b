"""Which executor runs a step, and why the faster ones do not."""

from collections.abc import Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any, final

import torch

from funcopt import tree
from funcopt.errors import HyperparameterTypeError
from funcopt.execution import executor_choice
from funcopt.execution.executor_choice import LeafGroup
from funcopt.optimizer import Optimizer, check_optimizer
from funcopt.types import Tensor, Tree


@final
@dataclass(frozen=True)
class Plan:
    """What runs each group of leaves of a step; as text, a line for each, and reasons."""

    groups: Sequence[LeafGroup]
    name: str  #: the optimizer's

    def __str__(self) -> str:
        return "\n".join(map(_lines, self.groups)) or (
            f"{self.name}: no rule was run: its update is its own, or no leaf (but "
            "frozen ones) has a gradient"
        )

    def __repr__(self) -> str:
        return str(self)


def plan(
    opt: Optimizer, params: Tree, grads: Tree = None, state: Any = None, **update: Any
) -> Plan:
    """What would run ``opt.update``, and why the faster executors would not.

    The step is made once to see (nothing that is given changes); inside a torch.func
    transform or with tensors that require grad it is the step of that situation.

    Args:
        opt: the Optimizer, of any kind.
        params: a tree of tensors.
        grads: a tree like params; zeros unless given.
        state: ``opt.init(params)`` unless given.
        update: further arguments of ``opt.update``: hyperparameters, ``execution``.

    Returns:
        A plan; print it.

    Raises:
        ExecutionError: the executor that ``execution`` names cannot run the step.
        HyperparameterTypeError: what an ``update`` of one's own needs is not given.
        StructureError, LeafError, HyperparameterError: as ``opt.update``.

    Source:
        funcopt.

    Example:
        >>> import torch, funcopt as fo
        >>> p = torch.ones(3, requires_grad=True)
        >>> print(fo.plan(fo.sgd(lr=0.1), {"w": p}))
        sgd: 1 leaf, 3 elements, float32 on cpu: reference
            not native: torch's own derivative of so short a rule is as fast here
            not foreach: a derivative is asked for, which foreach makes no faster
    """
    check_optimizer(opt, "plan")
    if grads is None:
        grads = tree.map(torch.zeros_like, params)
    state = opt.init(params) if state is None else state
    try:
        signature(opt.update).bind(grads, state, params, **update)
    except TypeError as error:
        raise HyperparameterTypeError(
            f"{opt.name}'s update cannot be called with (grads, state, params) and "
            f"{sorted(update) or 'no keyword'}: {error}; plan hands keywords on: "
            "fo.plan(opt, params, name=value)"
        ) from error
    with executor_choice.observed() as groups:
        opt.update(grads, state, params, **update)
    return Plan(groups, opt.name)


def _lines(group: LeafGroup) -> str:
    params: list[Tensor] = list(group.params)
    leaves = f"{len(params)} {'leaf' if len(params) == 1 else 'leaves'}"
    count = sum(p.numel() for p in params)
    first = params[0]
    what = f"{first.dtype} on {first.device}".removeprefix("torch.")
    chosen = group.choice
    how = f"{chosen.name}, with its derivative" if chosen.derivative else chosen.name
    lines = [f"{group.rule.name}: {leaves}, {count:,} elements, {what}: {how}"]
    lines += [f"    not {name}: {reason}" for name, reason in chosen.refused]
    return "\n".join(lines)
