"""Fast paths for steps like an earlier one, whose decisions still hold."""

from array import array
from collections.abc import Callable, Mapping, Sequence
from operator import ne
from typing import Any, TypeAlias

import torch

from funcopt.execution import fused_autograd, layout, reference
from funcopt.execution.call_signature import CallSignature
from funcopt.execution.executor import (
    Column,
    Direct,
    Executor,
    PerTask,
    Rows,
    maker,
    read_number,
)
from funcopt.execution.guarded_cache import GuardedCache
from funcopt.execution.leaves import Leaves
from funcopt.execution.levels import differentiating
from funcopt.execution.native import objects
from funcopt.execution.rule import Kinds, Rule
from funcopt.execution.rule_call import RuleCall
from funcopt.types import Tensor

#: makes a step in place, from tensors and the count of it; see `FastPath.settled`
Settled: TypeAlias = Callable[[list[Tensor], int], bool]


class FastPath:
    """A way for all leaves of a step, while tensors stay alike (`GuardedCache`).

    Args:
        rule: that is run.
        kinds: of the hyperparameters, which all leaves share.
        count: of the leaves.
    """

    takes_tasks = False  #: whether numbers may be `PerTask`

    def __init__(self, rule: Rule, kinds: Kinds, count: int) -> None:
        self._rule, self._count = rule, count
        self.kinds = kinds
        self._names = rule.scalars(kinds)
        self._elements = rule.streams(kinds)  # hyperparameters with a value for each
        self._fixed = [name for name in rule.hyper if name not in self._elements]
        #: of the values in ``_elements``: that they are as they were
        self._alike: GuardedCache[bool] = GuardedCache()
        #: hyperparameters, and their numbers as all leaves share them
        self._settled: tuple[Sequence[dict[str, Any]], list[Any]] = (), []
        self._written = count * sum(rule.outputs)
        #: addresses of which no two tensors overlap, and the bytes of each tensor
        self._apart = self._extents = b""

    def run(
        self,
        tensors: list[Tensor],
        numbers: Sequence[list[Any]],
        hyper: Sequence[dict[str, Any]],
        donate: bool,
    ) -> Sequence[Column] | None:
        """The columns ``p, *slots``; None where the step has to go the long way.

        ``tensors`` are gradients, parameters and slots, one column after the other;
        ``numbers`` are the columns of scalar slots, and last that of the steps.
        """
        settled, row = self._settled
        if hyper is not settled:
            each = {id(values): values for values in hyper}
            if self._elements:
                more = [values[name] for name in self._elements for values in hyper]
                if not self._alike.get(more):
                    return None
                tensors = tensors + more
                each = {tuple(id(v[name]) for name in self._fixed): v for v in hyper}
            kinds = self._rule.kinds
            if any(kinds(values) != self.kinds for values in each.values()):
                return None
            if not self.takes_tasks and any(
                type(x) is PerTask for values in each.values() for x in values.values()
            ):
                return None
            first, row = hyper[0], None
            if len(each) == 1:
                row = [*map(first.__getitem__, self._names)]
                if not any(isinstance(x, Tensor) for x in first.values()):
                    self._settled = hyper, row
        own = [column[0] for column in numbers]
        if row is None or any(map(ne, map(list.count, numbers, own), map(len, numbers))):
            names = self._names
            rows = [
                [*own, *map(values.__getitem__, names)]
                for values, *own in zip(hyper, *numbers)
            ]
        else:
            rows = [[*own, *row]]
        return self.step(tensors, rows, donate)

    def step(
        self, tensors: list[Tensor], rows: Rows, donate: bool
    ) -> Sequence[Column] | None:
        """The same, of rows of scalars: a single one is shared by all leaves.

        None, as here, of a fast path that takes no rows.
        """
        return None

    def settled(self, hyper: Sequence[dict[str, Any]]) -> Settled | None:
        """A function that makes steps in place after one by these hyperparameters.

        From the tensors, and the step of all leaves, to whether it could. None where
        more than these may change.
        """
        return None

    def leaves(
        self,
        tensors: list[Tensor],
        numbers: Sequence[list[Any]],
        hyper: Sequence[dict[str, Any]],
    ) -> Leaves:
        """What `run` is given, as what runs a rule leaf by leaf takes it."""
        starts = range(0, len(tensors), self._count)
        grads, params, *trees = [tensors[k : k + self._count] for k in starts]
        slots, scalars = iter(trees), iter(numbers)
        state = [next(scalars if scalar else slots) for scalar in self._rule.scalar]
        return Leaves(self._rule, grads, params, state, numbers[-1], hyper)

    def may_write(self, tensors: list[Tensor], addresses: bytes) -> bool:
        """Whether no two of the tensors share memory, where all are to be written."""
        if addresses == self._apart:
            return True
        if not self._extents:
            some = tensors[: self._count + self._written]
            if layout.folded([some[self._count :]]):
                return False
            self._extents = array("Q", map(layout.extent, some)).tobytes()
        if not objects.load().apart(addresses, self._extents):
            return False
        self._apart = addresses
        return True


class ExecutorPath(FastPath):
    """For steps of which no derivative is asked: by one executor.

    Where there are several rows of scalars, ``which`` gives the row of each leaf; without
    it each leaf has its own. ``elements`` are the hyperparameters that have a value per
    element. ``tasks`` is how many tasks a leaf's leading axis holds if a scalar has a
    value for each of them, else 0. ``strides`` are those that gradients are copied to,
    by their numbers.
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
        strides: Mapping[int, tuple[int, ...]],
    ) -> None:
        super().__init__(rule, kinds, len(params))
        self._alike.put(elements, True)
        self._strides = strides
        self._executor, self._tasks = executor, tasks
        self._shared = executor.direct(params, [0] * len(params), tasks=tasks)
        self._make = maker(params)
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
                params, direct = tensors[count : 2 * count], self._executor.direct
                self._own = direct(params, self._which, tasks=self._tasks)
            direct = self._own
        if donate:
            return self._in_place(direct, tensors, rows)
        params, written = tensors[count : 2 * count], self._written // count
        out = self._rule.recycler.columns(params, written, self._make)
        tensors = self._as_parameters_lie(tensors)
        return direct(tensors, objects.load().addresses(tensors), rows, out)

    def _as_parameters_lie(self, tensors: list[Tensor]) -> list[Tensor]:
        """With copies of the gradients whose strides are not their parameters'."""
        if not self._strides:
            return tensors
        copied = [*tensors]
        for i, stride in self._strides.items():
            x = tensors[i]
            new = torch.empty_strided(x.shape, stride, dtype=x.dtype, device=x.device)
            copied[i] = new.copy_(x)
        return copied

    def _in_place(
        self, direct: Direct, tensors: list[Tensor], rows: Rows
    ) -> Sequence[Column] | None:
        found = objects.load()
        addresses = found.addresses(tensors)
        if addresses != self._apart and not self.may_write(tensors, addresses):
            return None
        if self._strides:
            tensors = self._as_parameters_lie(tensors)
            addresses = found.addresses(tensors)
        columns = direct(tensors, addresses, rows, None)
        if columns is not None:
            found.written(tensors, self._count, self._count + self._written)
        return columns

    def settled(self, hyper: Sequence[dict[str, Any]]) -> Settled | None:
        known, numbers = self._settled
        if hyper is not known or self._tasks or any(self._rule.scalar):
            return None
        if not {*map(type, numbers)} <= _NUMBERS:
            return None

        def step(tensors: list[Tensor], t: int) -> bool:
            return self._in_place(self._shared, tensors, [(t, *numbers)]) is not None

        return step


class WholePath(FastPath):
    """For rules that need each leaf whole, by torch's own operations.

    ``run_leaves`` gives the columns, in the old tensors if it is told to donate.
    """

    def __init__(
        self,
        rule: Rule,
        kinds: Kinds,
        count: int,
        run_leaves: Callable[[Leaves, bool], Sequence[Column]],
        which: Sequence[int] | None,
    ) -> None:
        super().__init__(rule, kinds, count)
        self._run, self._which = run_leaves, which
        self._zeros = {
            name: 0.0 for name, kind in zip(rule.hyper, kinds) if kind == "zero"
        }

    def step(
        self, tensors: list[Tensor], rows: Rows, donate: bool
    ) -> Sequence[Column] | None:
        given = [x for row in rows for x in row if isinstance(x, Tensor)]
        if any(type(x) is not Tensor for x in given) or differentiating(given):
            return None
        if donate and not self.may_write(tensors, objects.load().addresses(tensors)):
            return None
        owners: Sequence[int] = [0] * self._count
        if len(rows) > 1:
            owners = self._which or range(self._count)
        count = 1 + sum(self._rule.scalar)
        numbers = [[rows[row][k] for row in owners] for k in range(count)]
        each = [self._zeros | dict(zip(self._names, row[count:])) for row in rows]
        hyper = [each[row] for row in owners]
        return self._run(self.leaves(tensors, numbers, hyper), donate)


class ReferencePath(FastPath):
    """For steps that torch differentiates or batches, operation by operation."""

    def run(
        self,
        tensors: list[Tensor],
        numbers: Sequence[list[Any]],
        hyper: Sequence[dict[str, Any]],
        donate: bool,
    ) -> Sequence[Column] | None:
        leaves = self.leaves(tensors, numbers, hyper)
        return None if donate or leaves.tasks else reference.step(leaves)


class AutogradPath(FastPath):
    """For steps that autograd records: by kernels, for the derivative too."""

    def __init__(self, signature: CallSignature, row: Sequence[Any]) -> None:
        super().__init__(signature.rule, signature.kinds, len(signature.which))
        self._signature = signature
        self._hyper: GuardedCache[CallSignature] = GuardedCache()
        self._hyper.put([x for x in row if isinstance(x, Tensor)], signature)

    def step(
        self, tensors: list[Tensor], rows: Rows, donate: bool
    ) -> Sequence[Column] | None:
        row, *others = rows
        if others:
            return None
        given = [x for x in row if isinstance(x, Tensor)]
        numbers = tuple(None if isinstance(x, Tensor) else x for x in row)
        alike = tuple(x is None for x in numbers) == self._signature.given[0]
        signature = self._hyper.get(given) if alike and not donate else None
        if signature is None:
            return None
        call = RuleCall(signature, (numbers,))
        return signature.gather(fused_autograd.record(call, [*tensors, *given]))


_NUMBERS = {int, float}


def _tasks_of(rows: Rows) -> int:
    each = (len(x.values) for row in rows for x in row if type(x) is PerTask)
    return next(each, 0)
