"""Fast paths for steps like an earlier one, whose decisions still hold."""

from array import array
from collections.abc import Callable, Iterable, Sequence
from operator import is_, ne
from typing import Any, TypeAlias

from funcopt.execution import fused_autograd, layout, reference
from funcopt.execution.call_signature import CallSignature
from funcopt.execution.executor import Column, PerTask, Rows
from funcopt.execution.guarded_cache import GuardedCache, distinct
from funcopt.execution.leaves import Leaves
from funcopt.execution.levels import differentiating
from funcopt.execution.native import objects
from funcopt.execution.rule import Kinds, Rule
from funcopt.execution.rule_call import RuleCall
from funcopt.types import Tensor

#: makes a step from tensors and the count of it; see `FastPath.settled`
Settled: TypeAlias = Callable[[list[Tensor], int], Sequence[Column] | None]


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
        #: of the values in ``_elements``: which of them are one, as they were
        self._alike: GuardedCache[list[int]] = GuardedCache()
        #: hyperparameters, and their numbers as all leaves share them
        self._settled: tuple[Sequence[dict[str, Any]], list[Any]] = (), []
        self._written = count * sum(rule.outputs)
        #: addresses of which no two tensors overlap, and the bytes of each tensor
        self._apart = self._extents = b""
        #: the bytes of what is written; spans that do not overlap, of these and of what
        #: is read of hyperparameters
        self._sizes, self._unread = array("Q"), (b"", b"")

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
            if donate and not self.may_read(tensors, each.values()):
                return None
            if self._elements:
                more = [values[name] for name in self._elements for values in hyper]
                some, which = distinct(more)
                if self._alike.get(some) != which:
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

    def settled(self, hyper: Sequence[dict[str, Any]], donate: bool) -> Settled | None:
        """A function that makes steps like one by these hyperparameters.

        From the tensors, and the step of all leaves, to what `run` gives. None where
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

    def may_read(self, tensors: list[Tensor], hyper: Iterable[dict[str, Any]]) -> bool:
        """Whether no hyperparameter is in memory that is to be written."""
        given = [x for values in hyper for x in values.values() if isinstance(x, Tensor)]
        if not given:
            return True
        given, _ = distinct(given)
        some = tensors[self._count : self._count + self._written]
        if not self._sizes:
            self._sizes = array("Q", map(layout.extent, some))
        found, sizes = objects.load(), self._sizes + array("Q", map(layout.extent, given))
        spans = found.addresses(some, given), sizes.tobytes()
        if spans == self._unread:
            return True
        if not found.apart(*spans):
            return False
        self._unread = spans
        return True


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
    """For steps that autograd records: by kernels, for the derivative too.

    ``rows`` are the first call's, ``elements`` the hyperparameters of it that have a
    value for each element.
    """

    def __init__(
        self, signature: CallSignature, rows: Rows, elements: Sequence[Tensor]
    ) -> None:
        super().__init__(signature.rule, signature.kinds, len(signature.which))
        self._signature = signature
        self._firsts = [signature.which.index(row) for row in range(len(rows))]
        self._scalars: GuardedCache[list[int]] = GuardedCache()
        given = [x for row in rows for x in row if isinstance(x, Tensor)]
        self._scalars.put(*distinct(given))
        self._alike.put(*distinct(elements))

    def step(
        self, tensors: list[Tensor], rows: Rows, donate: bool
    ) -> Sequence[Column] | None:
        signature = self._signature
        if donate:
            return None
        if len(rows) > 1:  # one for each leaf
            every, rows = rows, [rows[i] for i in self._firsts]
            if len(rows) < self._count and not all(
                all(map(is_, row, rows[owner]))
                for row, owner in zip(every, signature.which)
            ):
                return None
        if len(rows) != len(self._firsts):
            return None
        given = [x for row in rows for x in row if isinstance(x, Tensor)]
        numbers = tuple(
            tuple(None if isinstance(x, Tensor) else x for x in row) for row in rows
        )
        asked = tuple(tuple(x is None for x in row) for row in numbers)
        some, which = distinct(given)
        if asked != signature.given or self._scalars.get(some) != which:
            return None
        call = RuleCall(signature, numbers)
        columns = [
            tensors[k : k + self._count] for k in range(0, len(tensors), self._count)
        ]
        arranged = signature.arranged(columns, rows)
        return signature.gather(fused_autograd.record(call, arranged))
