"""The fast path of steps of which no derivative is asked: an executor's."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from funcopt.execution.executor import (
    Column,
    Direct,
    Executor,
    Maker,
    PerTask,
    Rows,
    read_number,
)
from funcopt.execution.fast_path import FastPath, Settled
from funcopt.execution.guarded_cache import distinct
from funcopt.execution.levels import differentiating
from funcopt.execution.native import objects
from funcopt.execution.rule import Kinds, Rule
from funcopt.types import Tensor


class ExecutorPath(FastPath):
    """For steps of which no derivative is asked: by one executor.

    Where there are several rows of scalars, ``which`` gives the row of each leaf; without
    it each leaf has its own. ``elements`` are the hyperparameters that have a value per
    element. ``tasks`` is how many tasks a leaf's leading axis holds if a scalar has a
    value for each of them, else 0. ``copied`` are the gradients and elements that lie
    otherwise than their parameters: the shape and strides to copy them to, by the number
    of each among all tensors; unless all of a column have one number for each of so many
    leading entries, which are then ``tasks`` that share their scalars: ``spread`` are the
    numbers of those columns.
    """

    takes_tasks = True

    def __init__(
        self,
        executor: Executor,
        kinds: Kinds,
        params: Column,
        rule: Rule,
        which: Sequence[int] | None,
        elements: Sequence[Tensor],
        tasks: int,
        copied: Mapping[int, tuple[Sequence[int], tuple[int, ...]]],
        spread: Sequence[int] = (),
    ) -> None:
        super().__init__(rule, kinds, len(params))
        self._alike.put(*distinct(elements))
        self._copied = copied
        self._tasks = 0 if spread else tasks  #: whose scalars are their own
        self._direct = partial(executor.direct, tasks=tasks, spread=spread)
        self._shared = self._direct(params, [0] * len(params))
        self._make = Maker(params)
        self._which = which or range(len(params))
        self._own: Direct | None = None  # where not all leaves share their scalars

    def step(
        self, tensors: list[Tensor], rows: Rows, donate: bool
    ) -> Sequence[Column] | None:
        kinds = {type(x) for row in rows for x in row}
        if not kinds <= _NUMBERS:
            given = [x for row in rows for x in row if isinstance(x, Tensor)]
            if any(type(x) is not Tensor for x in given) or differentiating(given):
                return None
            rows = [[*map(read_number, row)] for row in rows]
        if (self._tasks or PerTask in kinds) and self._tasks != _tasks_of(rows):
            return None
        direct, count = self._shared, self._count
        if len(rows) > 1:
            if self._own is None:
                self._own = self._direct(tensors[count : 2 * count], self._which)
            direct = self._own
        return self._run(direct, tensors, rows, donate)

    def _run(
        self, direct: Direct, tensors: list[Tensor], rows: Rows, donate: bool
    ) -> Sequence[Column] | None:
        if donate:
            return self._in_place(direct, tensors, rows)
        out = self._rule.recycler.columns(self._make, self._written // self._count)
        tensors = self._as_parameters_lie(tensors)
        return direct(tensors, objects.load().addresses(tensors), rows, out)

    def _as_parameters_lie(self, tensors: list[Tensor]) -> list[Tensor]:
        """With copies of those whose strides or shapes are not their parameters'."""
        if not self._copied:
            return tensors
        alike = [*tensors]
        for i, look in self._copied.items():
            x = tensors[i]
            new = torch.empty_strided(*look, dtype=x.dtype, device=x.device)
            alike[i] = new.copy_(x)
        return alike

    def _in_place(
        self, direct: Direct, tensors: list[Tensor], rows: Rows
    ) -> Sequence[Column] | None:
        found = objects.load()
        addresses = found.addresses(tensors)
        if addresses != self._apart and not self.may_write(tensors, addresses):
            return None
        if self._copied:
            tensors = self._as_parameters_lie(tensors)
            addresses = found.addresses(tensors)
        columns = direct(tensors, addresses, rows, None)
        if columns is not None:
            found.written(tensors, self._count, self._count + self._written)
        return columns

    def settled(self, hyper: Sequence[dict[str, Any]], donate: bool) -> Settled | None:
        known, numbers = self._settled
        if hyper is not known or self._tasks or any(self._rule.scalar):
            return None
        if not {*map(type, numbers)} <= _NUMBERS:
            return None

        def step(tensors: list[Tensor], t: int) -> Sequence[Column] | None:
            return self._run(self._shared, tensors, [(t, *numbers)], donate)

        return step


_NUMBERS = {int, float}


def _tasks_of(rows: Rows) -> int:
    each = (len(x.values) for row in rows for x in row if type(x) is PerTask)
    return next(each, 0)
