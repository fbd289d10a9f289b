"""A cached plan of the adapter's step, for as long as nothing but numbers changes."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from operator import attrgetter, is_, itemgetter
from typing import Any

import torch

from funcopt.execution import dispatch, executor_choice
from funcopt.execution.fast_path import FastPath
from funcopt.execution.guarded_cache import GuardedCache
from funcopt.execution.leaves import Leaves
from funcopt.execution.native import objects
from funcopt.torch_optim import flags
from funcopt.torch_optim.batch import Batch, Group, of_one_dtype, step
from funcopt.torch_optim.entries import Entries
from funcopt.torch_optim.flags import Flags
from funcopt.types import Tensor


class _Row:
    """A group's keyword arguments for the rule, made anew when its values change."""

    def __init__(self, batch: Batch, group: Group, known: Flags, kinds: Any) -> None:
        self.group, self._spec, self._known = group, batch.spec, known
        names = [name for name in (*known.static, *known.numbers) if name in group]
        self._read = itemgetter(*names, names[0])  # always a tuple
        self._names = (*names,)
        self._key, self._rule, self._kinds = known.key(group), batch.stepper.rule, kinds
        self._scalars = self._rule.scalars(kinds)
        self._seen: tuple[Any, ...] = ()
        self.row: dict[str, Any] = {}
        self._numbers: list[Any] = []
        self._tensors: dict[str, Tensor] = {}  #: which may be written to

    def get(self) -> list[Any] | None:
        """The scalars among the arguments; None if these are now of another kind."""
        values = self._read(self.group)
        if self._seen and (all(map(is_, values, self._seen)) or self._moved(values)):
            if self._tensors:
                self._update({k: flags.number(x, k) for k, x in self._tensors.items()})
            return self._numbers
        if self._known.key(self.group) != self._key:
            return None
        row = flags.row(self._spec, self.group)
        if self._rule.kinds(row) != self._kinds:
            return None
        self.row = {}
        self._update(row)
        self._seen = values if flags.fixed(self.group, self._names) else ()
        each = zip(self._names, values)
        self._tensors = {k: x for k, x in each if k in row and isinstance(x, Tensor)}
        return self._numbers

    def _update(self, some: dict[str, Any]) -> None:
        self.row = self.row | some
        self._numbers = [*map(self.row.__getitem__, self._scalars)]

    def _moved(self, values: tuple[Any, ...]) -> bool:
        """Whether no more than numbers differ, as a scheduler's; they are then known."""
        moved = {}
        for name, new, old in zip(self._names, values, self._seen):
            if new is not old:
                number = name in self._scalars and name not in self._tensors
                if not (number and new and type(new) is float):
                    return False
                moved[name] = new
        self._seen = values
        self._update(moved)
        return True


class _Part:
    """Parameters of a batch that one fast path steps, and how to read their scalars."""

    def __init__(self, batch: Batch, path: FastPath, known: Flags) -> None:
        self.batch, self._path = batch, path
        columns = batch.columns()
        self._owner = owner = leaves_of(batch).rows(path.kinds, apart=True)[1]
        self._firsts = [owner.index(row) for row in range(max(owner) + 1)]
        self._rows = [
            _Row(batch, batch.groups[i], known, path.kinds) for i in self._firsts
        ]
        self.fixed = [*batch.params]
        for slot in batch.stepper.trees:
            self.fixed += columns[slot]
        self._steps = Entries(batch.states, "step") if batch.layout.counts else None
        scalar, states = batch.stepper.scalar, batch.states
        self._scalars = {
            s: Entries(states, s) for s, is_number in scalar.items() if is_number
        }
        self._outputs = [*scalar]

    def rows(self) -> list[list[Any]] | None:
        """The rows of scalars.

        None if a value is of another kind now, or leaves that shared a row no longer do.
        """
        groups = [row.get() for row in self._rows]
        if None in groups:
            return None
        count = len(self.batch.params)
        numbers = [entries.read() for entries in self._scalars.values()]
        steps = [1] * count if self._steps is None else self._steps.read()
        if steps.count(steps[0]) == count:
            numbers.append([int(steps[0]) + 1] * count)
        else:
            numbers.append([int(t) + 1 for t in steps])
        for column in numbers:
            if column.count(column[0]) != count and column != [
                column[self._firsts[row]] for row in self._owner
            ]:
                return None
        return [
            [*[column[i] for column in numbers], *scalars]
            for i, scalars in zip(self._firsts, groups)
            if scalars is not None
        ]

    def run(self, grads: list[Tensor], rows: list[list[Any]]) -> None:
        """One update."""
        columns = self._path.step([*grads, *self.fixed], rows, donate=True)
        if columns is None:
            given = [self._rows[row].row for row in self._owner]
            batch = replace(self.batch, grads=grads, rows=given)
            step(batch, {}, differentiable=False)
            return
        if self._steps is not None:
            self._steps.count()
        for slot, column in zip(self._outputs, columns[1:]):
            if slot in self._scalars:
                self._scalars[slot].write(column)


class CachedStep:
    """The plan of a step of all groups.

    It holds for as long as groups and parameters are the same objects, the same ones have
    gradients, and the state is in the tensors that the plan knows.
    """

    def __init__(
        self, groups: Sequence[Group], state: dict[Tensor, Any], parts: Sequence[_Part]
    ) -> None:
        self._parts = parts
        self._groups = [*groups]  # of which the rows are read
        self._live = [part.batch.params for part in parts]
        live = {id(p) for params in self._live for p in params}
        self._params = [p for group in groups for p in group["params"]]
        self._idle = [p for p in self._params if id(p) not in live]
        self._state = state
        self._held = _held(state)
        self._fixed = [x for part in parts for x in part.fixed]
        grads: list[Any] = [p.grad for params in self._live for p in params]
        self._alike: GuardedCache[bool] = GuardedCache()
        self._alike.put([*grads, *self._fixed], True)

    def fits(self, groups: Sequence[Group], state: dict[Tensor, Any]) -> bool:
        """Whether groups, parameters and state are the objects of the plan."""
        params, same = [*chain(*map(_params, groups))], objects.load().same
        return (
            state is self._state
            and same([*groups], self._groups)
            and same(params, self._params)
            and objects.load().holds(state, self._held)
        )

    def run(self, groups: Sequence[Group], state: dict[Tensor, Any]) -> bool:
        """Whether this was such a step; it is then done."""
        grads: list[Any] = [[*map(_grad, params)] for params in self._live]
        if (
            any(p.grad is not None for p in self._idle)
            or not executor_choice.is_free()
            or not self.fits(groups, state)
            or not self._alike.get([*chain(*grads), *self._fixed])
        ):
            return False
        rows = [part.rows() for part in self._parts]
        if None in rows:
            return False
        for part, gradients, scalars in zip(self._parts, grads, rows):
            assert scalars is not None
            part.run(gradients, scalars)
        return True


_params, _grad = itemgetter("params"), attrgetter("grad")


def _held(state: dict[Tensor, Any]) -> list[Any]:
    """What the state holds: each key, and the values of its entry."""
    return [x for p, entry in state.items() for x in (p, *entry.values())]


def leaves_of(batch: Batch) -> Leaves:
    """The batch as what an executor takes."""
    stepper, spec = batch.stepper, batch.spec
    slots = [
        [float(x) for x in column] if stepper.scalar[slot] else column
        for slot, column in batch.columns().items()
    ]
    steps = [batch.layout.steps(state, spec) + 1 for state in batch.states]
    return Leaves(stepper.rule, batch.grads, batch.params, slots, steps, batch.rows)


def cached(
    groups: Sequence[Group],
    state: dict[Tensor, Any],
    batches: Sequence[Batch],
    known: Flags,
) -> CachedStep | None:
    """A plan for steps like this one, which is done; None if there can be none."""
    parts = []
    for batch in batches:
        if not _simple(batch):
            return None
        paths = dispatch.fast_paths(leaves_of(batch))
        if paths is None:
            return None
        parts += [_Part(batch.pick(which), path, known) for which, path in paths]
    return CachedStep(groups, state, parts) if parts else None


def _simple(batch: Batch) -> bool:
    tensors = [*batch.grads, *batch.params]
    if any(x.layout is not torch.strided or x.is_complex() for x in tensors):
        return False
    if batch.layout.counts == "int" or batch.stepper.measures or batch.drawn:
        return False
    if len({*map(id, batch.params)}) < len(batch.params):
        return False
    columns = batch.columns()
    leaves = [batch.grads, batch.params, *(columns[slot] for slot in batch.stepper.trees)]
    if of_one_dtype(leaves) is not leaves:
        return False
    numbers = [k for k, scalar in batch.stepper.scalar.items() if scalar]
    columns = [[state[k] for state in batch.states] for k in numbers]
    if not all(x.is_cpu for column in columns for x in column):
        return False  # each would be waited for
    if batch.layout.counts:
        columns.append([state["step"] for state in batch.states])
    return all(map(_joinable, columns))


def _joinable(column: Sequence[Tensor]) -> bool:
    """Whether the numbers can be the entries of a vector, and stay what they are."""
    if any(type(x) is not Tensor or x.ndim for x in column):
        return False
    if any(x.is_cpu and x.is_shared() for x in column):
        return False  # with another process, which counts on
    return len({(x.dtype, x.device) for x in column}) == 1
