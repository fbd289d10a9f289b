"""One call of a rule, or of a derivative of it, on the leaves of one group."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
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


@dataclass(frozen=True, eq=False)
class Call:
    """What is computed of one flat list of tensors.

    The list follows the inputs of the program: for a stream the tensors of all leaves,
    for a scalar those of the rows where it is a tensor. Where it is a number it stands in
    ``rows``. The outputs are such a list, too. Derivatives are calls of their own: `vjp`
    takes this call's tensors and a cotangent for each output, `jvp` this call's tensors
    and as many tangents.
    """

    rule: Rule
    kinds: Kinds
    engine: Engine
    stored: torch.dtype  #: what leaves are kept in
    leaves: int
    which: Sequence[int]  #: the row of each leaf
    rows: tuple[tuple[Any, ...], ...]  #: the scalars of each row, None for a tensor
    tasks: int = 0  #: how many tasks a leaf's leading axis holds, if scalars are theirs
    what: str = "step"
    wanted: tuple[bool, ...] = ()  #: the inputs of ``of`` that `vjp` is to give
    of: "Call | None" = None  #: what this is a derivative of

    @staticmethod
    def gather(
        rule: Rule,
        kinds: Kinds,
        engine: Engine,
        streams: Sequence[Column],
        rows: Sequence[Sequence[Any]],
        which: Sequence[int],
    ) -> "tuple[Call, list[Tensor]]":
        """The call of a step, and the flat list of its tensors."""
        columns, numbers = iter(streams), [list(row) for row in rows]
        tensors: list[Tensor] = []
        k = 0
        for stream in rule.inputs(kinds):
            if stream:
                tensors += next(columns)
                continue
            for row in numbers:
                if isinstance(row[k], Tensor):
                    tensors.append(row[k])
                    row[k] = None
            k += 1
        stored = streams[0][0].dtype
        fixed = tuple(map(tuple, numbers))
        return Call(rule, kinds, engine, stored, len(which), which, fixed), tensors

    def columns(self, outputs: Sequence[Tensor]) -> list[Column]:
        """The outputs of a step as columns: something for each leaf."""
        columns: list[list[Any]] = [[None] * self.leaves for _ in self.outputs]
        for x, (i, at) in zip(outputs, self.output_places):
            places = (
                [at]
                if self.outputs[i]
                else [j for j, r in enumerate(self.which) if r == at]
            )
            for place in places:
                columns[i][place] = x
        return list(columns)

    def vjp(self, wanted: Sequence[bool]) -> "Call":
        """The gradients of the tensors that are ``wanted``, and of those beside them."""
        asked = [False] * len(self.inputs)
        for (i, _), w in zip(self.places, wanted):
            asked[i] |= w
        return replace(
            self,
            what="second_vjp" if self.of else "vjp",
            rows=tuple((*row, *[None] * self._count(self.outputs)) for row in self.rows),
            wanted=tuple(asked),
            of=self,
        )

    def jvp(self) -> "Call":
        """The tangents of the outputs."""
        zero = [[0.0 if v is not None else None for v in row] for row in self.rows]
        return replace(
            self,
            what="jvp",
            rows=tuple((*row, *added) for row, added in zip(self.rows, zero)),
            of=self,
        )

    @cached_property
    def program(self) -> Program:
        rule = self.rule
        dtype = reference.computed(self.stored)
        if self.what == "step":
            return rule.program(self.kinds, dtype)
        if self.what == "jvp":
            return rule.jvp(self.kinds, dtype)
        if self.what == "vjp":
            return rule.vjp(self.kinds, dtype, self.wanted)
        assert self.of is not None
        return rule.second_vjp(self.kinds, dtype, self.of.wanted, self.wanted)

    @cached_property
    def inputs(self) -> tuple[bool, ...]:
        """For each input of the program, whether it is a stream."""
        if self.of is None:
            return self.rule.inputs(self.kinds)
        return (*self.of.inputs, *(self.of.outputs if self.sums else self.of.inputs))

    @property
    def sums(self) -> bool:
        """Whether scalars come out that are summed over leaves."""
        return self.what in ("vjp", "second_vjp")

    @cached_property
    def places(self) -> list[tuple[int, int]]:
        """For each tensor of the list, its input and its leaf or row."""
        return list(_places(self.inputs, self.leaves, self.rows))

    @cached_property
    def output_places(self) -> list[tuple[int, int]]:
        """For each tensor that comes out, the program's output and its leaf or row."""
        if not self.sums:
            free = tuple((None,) * self._count(self.outputs) for _ in self.rows)
            return list(_places(self.outputs, self.leaves, free))
        assert self.of is not None
        number = {i: k for k, i in enumerate(i for i, w in enumerate(self.wanted) if w)}
        return [(number[i], at) for i, at in self.of.places if i in number]

    @cached_property
    def outputs(self) -> tuple[bool, ...]:
        """For each output of the program, whether it is a stream."""
        if not self.sums:
            return self.rule.outputs
        assert self.of is not None
        return tuple(s for s, w in zip(self.of.inputs, self.wanted) if w)

    @property
    def input_streams(self) -> list[bool]:
        """For each tensor of the list, whether it is a leaf's."""
        return [self.inputs[i] for i, _ in self.places]

    @property
    def output_streams(self) -> list[bool]:
        return [self.outputs[i] for i, _ in self.output_places]

    def executor(self) -> Executor:
        return self.rule.executor(self.engine, self.program, self.stored)

    def execute(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The outputs, by the engine. Nothing is recorded for a derivative."""
        columns, rows = self._split(tensors)
        streams = [c for c, stream in zip(columns, self.inputs) if stream]
        with torch.no_grad():
            found = self.executor()(
                layout.alike([[x.detach() for x in c] for c in streams]),
                rows,
                self.which,
                tasks=self.tasks,
                pooled=True,
            )
        device = streams[0][0].device
        return [self._as_tensor(found[i][at], device) for i, at in self.output_places]

    def _as_tensor(self, value: Any, device: torch.device) -> Tensor:
        if not isinstance(value, Tensor):
            value = torch.tensor(value, dtype=torch.float64, device=device)
        return value.expand(self.tasks) if self.tasks and not value.ndim else value

    def plain(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The outputs by torch's own operations, which any transform follows."""
        if self.of is None:
            return self._step(tensors)
        count = len(self.of.places)
        given, more = tensors[:count], tensors[count:]
        if self.what == "jvp":
            # Not torch.func.jvp: this may already be inside of forward mode.
            outputs, pull = torch.func.vjp(self.of.plain, *given)
            anything = tuple(map(torch.ones_like, outputs))
            return torch.func.vjp(lambda *u: pull(u), *anything)[1](more)
        found = torch.func.vjp(self.of.plain, *given)[1](more)
        return tuple(g for g, (i, _) in zip(found, self.of.places) if self.wanted[i])

    def _step(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        columns, rows = self._split(tensors)
        scalars = iter(range(self._count(self.inputs)))
        sources = [c if s else next(scalars) for c, s in zip(columns, self.inputs)]
        function = reference.on_leaf(self.rule.flat(self.kinds), self.inputs)
        made: list[Sequence[Any]] = []
        for leaf, row in enumerate(self.which):
            inputs = [rows[row][x] if isinstance(x, int) else x[leaf] for x in sources]
            step = function
            if self.tasks:
                axes = tuple(
                    0 if isinstance(x, Tensor) and x.ndim else None for x in inputs
                )
                step = torch.vmap(function, in_dims=axes)
            made.append(step(*inputs))
        first = {row: leaf for leaf, row in reversed(list(enumerate(self.which)))}
        return tuple(
            torch.as_tensor(made[at if self.outputs[i] else first[at]][i])
            for i, at in self.output_places
        )

    def _split(
        self, tensors: Sequence[Tensor]
    ) -> tuple[list[list[Tensor]], list[list[Any]]]:
        """The tensors of each stream (none for a scalar), and the full rows."""
        columns: list[list[Tensor]] = [[] for _ in self.inputs]
        rows = [list(row) for row in self.rows]
        position = _positions(self.inputs)
        for x, (i, at) in zip(tensors, self.places):
            if self.inputs[i]:
                columns[i].append(x)
            else:
                rows[at][position[i]] = x
        return columns, rows

    @staticmethod
    def _count(streams: Sequence[bool]) -> int:
        """How many are scalars."""
        return sum(not stream for stream in streams)


def _positions(streams: Sequence[bool]) -> list[int]:
    """For each input, how many scalars stand before it."""
    positions, count = [], 0
    for stream in streams:
        positions.append(count)
        count += not stream
    return positions


def _places(
    streams: Sequence[bool], leaves: int, rows: Sequence[Sequence[Any]]
) -> Iterator[tuple[int, int]]:
    for i, (stream, k) in enumerate(zip(streams, _positions(streams))):
        if stream:
            yield from ((i, leaf) for leaf in range(leaves))
        else:
            yield from ((i, r) for r, row in enumerate(rows) if row[k] is None)
