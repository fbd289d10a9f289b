"""The fast path of a step whose leaves go several ways: no decay, or another dtype."""

from collections.abc import Callable, Sequence
from typing import Any

from funcopt.execution.executor import Column
from funcopt.execution.fast_path import FastPath
from funcopt.execution.leaves import Leaves, put
from funcopt.execution.levels import differentiating
from funcopt.execution.native import objects
from funcopt.execution.rule import Rule
from funcopt.types import Tensor


class GroupPaths(FastPath):
    """A fast path for each group of leaves.

    Args:
        rule: that is run.
        parts: the numbers of the leaves of each group, and its path.
        in_place: the long way of leaves that are to be written over.
    """

    def __init__(
        self,
        rule: Rule,
        parts: Sequence[tuple[Sequence[int], FastPath]],
        in_place: Callable[[Leaves], tuple[Sequence[Column], FastPath | None]],
    ) -> None:
        super().__init__(rule, parts[0][1].kinds, sum(len(which) for which, _ in parts))
        self._parts, self._in_place = parts, in_place
        #: the last hyperparameters of all leaves, and of each part's
        self._hyper: tuple[Any, list[list[dict[str, Any]]]] = None, []

    def run(
        self,
        tensors: list[Tensor],
        numbers: Sequence[list[Any]],
        hyper: Sequence[dict[str, Any]],
        donate: bool,
    ) -> Sequence[Column] | None:
        if donate:  # what is refused has to be before the first part is written
            given = [x for row in hyper for x in row.values()]
            if differentiating(given):
                return None
            if not self.may_write(tensors, objects.load().addresses(tensors)):
                return None
            if not self.may_read(tensors, {id(row): row for row in hyper}.values()):
                return None
        known, hypers = self._hyper
        if hyper is not known:
            hypers = [[hyper[i] for i in which] for which, _ in self._parts]
            if not any(isinstance(x, Tensor) for row in hyper for x in row.values()):
                self._hyper = hyper, hypers  # tensors may have graphs, and are not kept
        made: list[list[Any]] = [[None] * self._count for _ in self._rule.outputs]
        written = False
        for (which, path), values in zip(self._parts, hypers):
            starts = range(0, len(tensors), self._count)
            some = [tensors[k + i] for k in starts for i in which]
            own = [[column[i] for i in which] for column in numbers]
            columns = path.run(some, own, values, donate)
            if columns is None and written:
                columns, _ = self._in_place(path.leaves(some, own, values))
            if columns is None:
                return None
            written = donate
            put(made, which, columns)
        return made
