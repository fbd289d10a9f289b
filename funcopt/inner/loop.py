"""The inner loop as a function of its carry and of what all its steps share."""

from collections.abc import Callable
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, NamedTuple

import torch

from funcopt import tree
from funcopt.derivatives import Trees, widened
from funcopt.execution.levels import is_tracked
from funcopt.inner.per_step import HyperBySteps
from funcopt.inner.step import Step, Stepped
from funcopt.types import State, Tensor, Tree


class Unrolled(NamedTuple):
    """What `unroll` gives: the end of the inner loop, and a record of the way."""

    params: Tree  #: parameters after the last step
    state: State  #: the optimizer's state after the last step
    losses: Tensor  #: [steps], each step's loss before its update
    aux: Tree  #: each step's auxiliary output, stacked along a leading [steps], or ()
    buffers: Tree  #: buffers after the last step, or ()


def is_absent(part: Tree) -> bool:
    """Whether it is the ``()`` or ``None`` of no aux, and of no buffers."""
    return part is None or isinstance(part, tuple) and not part


#: what a step gives to the next
CARRY = ("params", "state", "buffers")


def carried(stepped: Stepped) -> dict[str, Tree]:
    """What of a step the next one takes."""
    return {name: getattr(stepped, name) for name in CARRY}


@dataclass(frozen=True)
class Loop:
    """K steps. They share ``batch``, ``hyper`` and ``meta``: whole, or an entry each."""

    step: Step
    steps: int
    hyper: HyperBySteps
    batches: bool  #: whether ``batch`` holds an entry for each step
    window: int | None

    def given(self, carry: Trees, shared: Trees, k: int) -> dict[str, Tree]:
        """What step k depends on."""
        batch = shared["batch"]
        return {
            **carry,
            "batch": tree.map(itemgetter(k), batch) if self.batches else batch,
            "hyper": self.hyper.at(k, shared["hyper"]),
            "meta": shared["meta"],
        }

    def has_own_params(self, k: int) -> bool:
        """Whether the loss can reach step k's parameters as its argument only.

        A rule makes each leaf anew, and none of another's new value.
        """
        return k > 0 and self.step.by_rule

    def is_cut(self, k: int) -> bool:
        """Whether the graph ends before step k."""
        return self.window is not None and k > 0 and k % self.window == 0

    def cut(self, carry: Trees, k: int) -> Trees:
        """The carry as step k takes it: without a graph where that ends."""
        return tree.detach(dict(carry)) if self.is_cut(k) else carry

    def run(self, carry: Trees, shared: Trees) -> Unrolled:
        """All steps, one after another."""
        record = Record()
        use = uses(shared)
        for k in range(self.steps):
            given = self.given(self.cut(carry, k), use(), k)
            carry = record.add(self.step(given, self.has_own_params(k)))
        return Unrolled(
            carry["params"], carry["state"], *record.stacked(), carry["buffers"]
        )


def uses(shared: Tree) -> Callable[[], Tree]:
    """What gives each step a tree that all share.

    A view for each: autograd then adds up the gradients of one step before those of
    another, which is the order of remat: equal to the bit; and those of half precision
    in float32.
    """
    if not any(map(_is_tracked, tree.leaves(shared))):
        return lambda: shared
    wide = tree.map(lambda x: widened(x) if _is_tracked(x) else x, shared)
    return lambda: tree.map(_alias, shared, wide)


def _is_tracked(x: Any) -> bool:
    return isinstance(x, Tensor) and not torch.compiler.is_compiling() and is_tracked(x)


def _alias(x: Any, wide: Any) -> Any:
    if not _is_tracked(x):
        return x
    return x.view_as(x) if wide is x else wide.to(x.dtype)


class Record:
    """The losses and auxiliary outputs of the steps."""

    def __init__(self) -> None:
        self._losses: list[Tensor] = []
        self._auxes: list[Tree] = []

    def add(self, stepped: Stepped) -> dict[str, Tree]:
        """Note a step's loss and aux; the carry for the next step."""
        self._losses.append(stepped.loss)
        self._auxes.append(stepped.aux)
        return carried(stepped)

    def stacked(self) -> tuple[Tensor, Tree]:
        """The losses [K], and the tree of auxiliary outputs [K, ...]."""
        if not self._losses:
            return torch.zeros(0), None  # no loss: no dtype to follow
        aux = tree.map(lambda *rows: torch.stack(rows), *self._auxes)
        return torch.stack(self._losses), aux
