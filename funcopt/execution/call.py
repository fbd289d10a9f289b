"""A call of a rule, or of a derivative of it, on the leaves of one group."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeAlias

import torch

from funcopt.execution import layout, reference
from funcopt.execution.executor import Column, Executor
from funcopt.execution.rule import Kinds, Rule
from funcopt.execution.trace import Program
from funcopt.types import Tensor

#: makes a program ready for a dtype that leaves are stored in
Engine: TypeAlias = Callable[[Program, torch.dtype], Executor]

_MOST = 64  # forms kept that follow from one


@dataclass(frozen=True, eq=False)
class Form:
    """What calls have in common that differ in their numbers alone: worked out once.

    A call is of one flat list of tensors, which follows the inputs of the program: for a
    stream the tensors of all leaves, for a scalar those of the rows where it is a tensor.
    Its outputs are such a list, too. Derivatives have forms of their own: `vjp` takes
    this form's tensors and a cotangent for each output, `jvp` this form's tensors and as
    many tangents.
    """

    rule: Rule
    kinds: Kinds
    engine: Engine
    stored: torch.dtype  #: what leaves are kept in
    which: tuple[int, ...]  #: the row of each leaf
    given: tuple[tuple[bool, ...], ...]  #: of each row, which scalars are tensors
    tasks: int = 0  #: how many tasks a leaf's leading axis holds, if scalars are theirs
    what: str = "step"
    wanted: tuple[bool, ...] = ()  #: the inputs of ``of`` that `vjp` is to give
    of: "Form | None" = None  #: what this is a derivative of
    _derived: dict[Any, "Form"] = field(default_factory=dict)

    def vjp(self, wanted: tuple[bool, ...]) -> "Form":
        """The gradients of the tensors that are ``wanted``, and of those beside them."""
        return self._once(wanted, self._vjp)

    def _vjp(self, wanted: tuple[bool, ...]) -> "Form":
        asked = [False] * len(self.inputs)
        for (i, _), w in zip(self.places, wanted):
            asked[i] |= w
        more = (True,) * _scalars(self.outputs)
        return self._new(
            what="second_vjp" if self.of else "vjp",
            given=tuple((*row, *more) for row in self.given),
            wanted=tuple(asked),
            of=self,
        )

    def jvp(self) -> "Form":
        """The tangents of the outputs."""
        return self._once(
            "jvp",
            lambda what: self._new(
                what=what, given=tuple(row + row for row in self.given), of=self
            ),
        )

    def with_tasks(self, tasks: int) -> "Form":
        """The same on leaves whose leading axis is the task."""
        of = self.of and self.of.with_tasks(tasks)
        return self._once(("tasks", tasks), lambda _: self._new(tasks=tasks, of=of))

    def _new(self, **changes: Any) -> "Form":
        return replace(self, _derived={}, **changes)

    def _once(self, key: Any, make: Callable[[Any], "Form"]) -> "Form":
        if key not in self._derived:
            if len(self._derived) >= _MOST:
                self._derived.clear()
            self._derived[key] = make(key)
        return self._derived[key]

    @property
    def sums(self) -> bool:
        """Whether scalars come out that are summed over leaves."""
        return self.what in ("vjp", "second_vjp")

    @cached_property
    def inputs(self) -> tuple[bool, ...]:
        """For each input of the program, whether it is a stream."""
        if self.of is None:
            return self.rule.inputs(self.kinds)
        return (*self.of.inputs, *(self.of.outputs if self.sums else self.of.inputs))

    @cached_property
    def outputs(self) -> tuple[bool, ...]:
        """For each output of the program, whether it is a stream."""
        if not self.sums:
            return self.rule.outputs
        assert self.of is not None
        return tuple(s for s, w in zip(self.of.inputs, self.wanted) if w)

    @cached_property
    def places(self) -> list[tuple[int, int]]:
        """For each tensor of the list, its input and its leaf or row."""
        return list(_places(self.inputs, len(self.which), self.given))

    @cached_property
    def output_places(self) -> list[tuple[int, int]]:
        """For each tensor that comes out, the program's output and its leaf or row."""
        if not self.sums:
            every = tuple((True,) * _scalars(self.outputs) for _ in self.given)
            return list(_places(self.outputs, len(self.which), every))
        assert self.of is not None
        number = {i: k for k, i in enumerate(i for i, w in enumerate(self.wanted) if w)}
        return [(number[i], at) for i, at in self.of.places if i in number]

    @cached_property
    def output_rows(self) -> list[list[int]]:
        """For each output of the program the rows of which a scalar comes out."""
        return [
            [at for i, at in self.output_places if i == k] if not stream else []
            for k, stream in enumerate(self.outputs)
        ]

    @cached_property
    def input_streams(self) -> list[bool]:
        """For each tensor of the list, whether it is a leaf's."""
        return [self.inputs[i] for i, _ in self.places]

    @cached_property
    def output_streams(self) -> list[bool]:
        return [self.outputs[i] for i, _ in self.output_places]

    @cached_property
    def columns(self) -> list[slice]:
        """Where in the list the tensors of each input stream are."""
        starts = [k for k, (i, at) in enumerate(self.places) if self.inputs[i] and not at]
        return [slice(start, start + len(self.which)) for start in starts]

    @cached_property
    def scalars(self) -> list[tuple[int, int, int]]:
        """Of each scalar in the list: its place there, its row, its place in the row."""
        position = _positions(self.inputs)
        return [
            (k, row, position[i])
            for k, (i, row) in enumerate(self.places)
            if not self.inputs[i]
        ]

    @cached_property
    def program(self) -> Program:
        rule, dtype = self.rule, reference.computed(self.stored)
        if self.of is None:
            return rule.program(self.kinds, dtype)
        if self.what == "jvp":
            return rule.jvp(self.kinds, dtype)
        if self.what == "vjp":
            return rule.vjp(self.kinds, dtype, self.wanted)
        return rule.second_vjp(self.kinds, dtype, self.of.wanted, self.wanted)

    @cached_property
    def executor(self) -> Executor:
        """Raises UntraceableError or BuildError: there is none."""
        return self.rule.executor(self.engine, self.program, self.stored)

    def gather(self, outputs: Sequence[Tensor]) -> list[Column]:
        """The outputs of a step as columns: something for each leaf."""
        columns: list[list[Any]] = [[None] * len(self.which) for _ in self.outputs]
        for x, (i, at) in zip(outputs, self.output_places):
            if self.outputs[i]:
                columns[i][at] = x
            else:
                rows = zip(columns[i], self.which)
                columns[i] = [x if row == at else old for old, row in rows]
        return list(columns)


@dataclass(frozen=True, eq=False)
class Call:
    """A form, and the scalars that are numbers: None for one that is a tensor."""

    form: Form
    rows: tuple[tuple[Any, ...], ...]

    def vjp(self, wanted: Sequence[bool]) -> "Call":
        """See `Form.vjp`."""
        form = self.form.vjp(tuple(wanted))
        more = (None,) * _scalars(self.form.outputs)
        return Call(form, tuple(row + more for row in self.rows))

    def jvp(self) -> "Call":
        """See `Form.jvp`: a number has the tangent 0."""
        rows = tuple(
            (*row, *(None if value is None else 0.0 for value in row))
            for row in self.rows
        )
        return Call(self.form.jvp(), rows)

    def with_tasks(self, tasks: int) -> "Call":
        """See `Form.with_tasks`."""
        return replace(self, form=self.form.with_tasks(tasks))

    def execute(self, tensors: Sequence[Tensor], recycle: bool = False) -> list[Tensor]:
        """The outputs, by the engine. Nothing is recorded for a derivative.

        ``recycle`` old buffers only where no graph will hold the new ones.
        """
        form = self.form
        streams = [tensors[column] for column in form.columns]
        device = streams[0][0].device
        out = None
        if recycle:
            out = form.rule.recycler.columns(streams[1], sum(form.outputs))
        with torch.no_grad():
            found = form.executor(
                layout.alike(streams),
                self._rows(tensors),
                form.which,
                out=out,
                tasks=form.tasks,
                pooled=True,
            )
        outputs: list[Tensor] = []
        for column, stream, rows in zip(found, form.outputs, form.output_rows):
            outputs += (
                column if stream else [self._as_tensor(column[r], device) for r in rows]
            )
        return outputs

    def _as_tensor(self, value: Any, device: torch.device) -> Tensor:
        if not isinstance(value, Tensor):
            value = _float64(value, device)
        tasks = self.form.tasks
        if tasks and not value.ndim:
            return value.expand(tasks).clone()  # forward mode writes into it
        return value

    def plain(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The outputs by torch's own operations, which any transform follows."""
        form = self.form
        if form.of is None:
            return self._step(tensors)
        # The first scalars of each row are those of what this is a derivative of.
        of = Call(form.of, tuple(row[: _scalars(form.of.inputs)] for row in self.rows))
        count = len(form.of.places)
        given, more = tensors[:count], tensors[count:]
        if form.what == "jvp":
            # Not torch.func.jvp: this may already be inside of forward mode.
            pulled: Any = torch.func.vjp(of.plain, *given)
            outputs, pull = pulled
            anything = tuple(map(torch.ones_like, outputs))
            return torch.func.vjp(lambda *u: pull(u), *anything)[1](more)
        found = torch.func.vjp(of.plain, *given)[1](more)
        return tuple(g for g, (i, _) in zip(found, form.of.places) if form.wanted[i])

    def _step(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        form, rows = self.form, self._rows(tensors)
        streams = [tensors[column] for column in form.columns]
        on_leaf = reference.on_leaf(form.rule.flat(form.kinds), form.inputs)

        def function(*inputs: Any) -> tuple[Tensor, ...]:
            # Tensors alone: vmap takes no number, which a scalar slot may be.
            return tuple(
                x if isinstance(x, Tensor) else _float64(x, inputs[1].device)
                for x in on_leaf(*inputs)
            )

        made: list[Sequence[Any]] = []
        for leaf, row in enumerate(form.which):
            columns, scalars = iter(streams), iter(rows[row])
            inputs = [next(columns)[leaf] if s else next(scalars) for s in form.inputs]
            step = function
            if form.tasks:
                axes = tuple(
                    0 if isinstance(x, Tensor) and x.ndim else None for x in inputs
                )
                step = torch.vmap(function, in_dims=axes)
            made.append(step(*inputs))
        first = {row: leaf for leaf, row in reversed(list(enumerate(form.which)))}
        return tuple(
            made[at if form.outputs[i] else first[at]][i] for i, at in form.output_places
        )

    def _rows(self, tensors: Sequence[Tensor]) -> list[list[Any]]:
        """The rows with the tensors in them."""
        rows = [list(row) for row in self.rows]
        for k, row, place in self.form.scalars:
            rows[row][place] = tensors[k]
        return rows


def _float64(value: float, device: torch.device) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, device=device)


def _positions(streams: Sequence[bool]) -> list[int]:
    """For each input, how many scalars stand before it."""
    positions, count = [], 0
    for stream in streams:
        positions.append(count)
        count += not stream
    return positions


def _places(
    streams: Sequence[bool], leaves: int, given: Sequence[Sequence[bool]]
) -> Iterator[tuple[int, int]]:
    for i, (stream, k) in enumerate(zip(streams, _positions(streams))):
        if stream:
            yield from ((i, leaf) for leaf in range(leaves))
        else:
            yield from ((i, r) for r, row in enumerate(given) if row[k])


def _scalars(streams: Sequence[bool]) -> int:
    """How many are scalars."""
    return sum(not stream for stream in streams)
