"""The stacked executor: leaves that are alike as one, for rules that need a leaf whole.

Where a step is matrix products, a batch of them costs less than one after another. The
rule is still written on one leaf: what takes a stack as it is, is called once with it,
and what does not is called so by ``torch.vmap``.
"""

from collections.abc import Sequence
from typing import Any

import torch

from funcopt.execution import donation, reference
from funcopt.execution.executor import Column
from funcopt.execution.leaves import Leaves, identity, put
from funcopt.types import Tensor

#: elements of a leaf up to which a stack is faster, where the rule does not say: on a CPU
#: larger ones, one by one, stay in its caches; elsewhere it is a guess
_MOST, _MOST_ELSEWHERE = 1 << 14, 1 << 20
#: elements of a stack, on a CPU: its temporaries, too, are to stay in a cache
_STACK = 1 << 17
#: of one with a leaf for each thread: a product of half matrices is made by one thread
#: alone, those of a stack by all, in half the time on two
_LARGEST = 1 << 23
#: leaves of a stack from which it is worth it: to stack costs as much as a few
_FEWEST = 3


def refuses(leaves: Leaves, forced: bool) -> str | None:
    """Why there is nothing to stack, as a sentence, or None.

    Two leaves will do where it is ``forced``.
    """
    if leaves.rule.elementwise or leaves.rule.norms or leaves.rule.sums:
        return "only leaves of a rule that needs each whole are stacked"
    fewest = 2 if forced else _FEWEST
    if all(len(which) < 2 for which in _stacks(leaves, fewest)):
        return f"no {fewest} small leaves are alike in shape, hyperparameters and step"
    return None


def step(leaves: Leaves, apart: bool = True) -> list[Column]:
    """The columns ``p, *slots``, as by the reference.

    Unless ``apart`` they may be views of one tensor, for leaves that are alike.
    """
    columns: list[list[Any]] = [[None] * len(leaves.params) for _ in leaves.rule.outputs]
    stacks = _stacks(leaves, _FEWEST)
    if all(len(which) < 2 for which in stacks):
        stacks = _stacks(leaves, 2)  # it was forced
    for which in stacks:
        some = leaves.pick(which)
        made = _together(some, apart) if len(which) > 1 else reference.step(some)
        put(columns, which, made)
    return list(columns)


def _stacks(leaves: Leaves, fewest: int) -> list[list[int]]:
    """The numbers of the leaves that are alike, and so are their slots, in stacks.

    Fewer than ``fewest`` are apart, unless there is no place for more in a stack.
    """
    params, found = leaves.params, {}
    values = {
        key: tuple(map(identity, values.values()))
        for key, values in leaves.distinct_hyper.items()
    }
    alike = [values[id(hyper)] for hyper in leaves.hyper]
    numbers = [map(identity, column) for column in leaves.numbers]
    for i, key in enumerate(zip((p.shape for p in params), alike, *numbers)):
        found.setdefault(key, []).append(i)
    made: list[list[int]] = []
    for which in found.values():
        each = _places(params[which[0]], leaves.rule.stacks, len(which))
        for i in range(0, len(which), each):
            some = which[i : i + each]
            made += [some] if len(some) >= min(fewest, each) else [[j] for j in some]
    return made


def _places(p: Tensor, most: int, count: int) -> int:
    """How many of ``count`` leaves like this one a stack has place for."""
    size = max(p.numel(), 1)
    if not p.ndim or size > ((most or _MOST) if p.is_cpu else _MOST_ELSEWHERE):
        return 1
    if not p.is_cpu:
        return count
    return max(_STACK // size, min(torch.get_num_threads(), _LARGEST // size), 1)


def _together(leaves: Leaves, apart: bool) -> Sequence[Column]:
    """One call of the rule for leaves that are alike."""
    rule, steps, hyper = leaves.rule, leaves.steps[:1], leaves.hyper[:1]
    streams = [leaves.grads, leaves.params, *leaves.state]

    def one(g: Tensor, p: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        given = iter(state)
        slots = [
            column[:1] if scalar else [next(given)]
            for column, scalar in zip(leaves.slots, rule.scalar)
        ]
        columns = reference.step(Leaves(rule, [g], [p], slots, steps, hyper))
        # vmap returns no numbers
        return tuple(
            x
            if isinstance(x, Tensor)
            else torch.scalar_tensor(x, dtype=torch.float64, device="cpu")
            for (x,) in columns
        )

    stacks = [*map(_stack, streams)]
    if rule.stacks:
        with donation.running(given=donation.is_plain() or None):  # they are copies
            made = one(*stacks)
    else:
        with donation.running(None):  # which vmap follows
            made = torch.vmap(one)(*stacks)
    if not apart:
        given = leaves.params, *leaves.slots
        return [x.unbind() if x.numel() else old for x, old in zip(made, given)]
    # A leaf keeps no memory alive but its own, and may be written over in place.
    return [[x.clone() for x in column.unbind()] for column in made]


def _stack(column: Column) -> Tensor:
    x: Tensor = column[0]
    if x.numel() or not donation.is_plain():
        return torch.stack([*column])
    return x.new_empty((len(column), *x.shape))  # of a slot that they have no use for
