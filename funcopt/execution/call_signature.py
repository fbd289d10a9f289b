"""The signature of calls of a rule or of its derivative, and what follows from it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import compress, islice
from operator import itemgetter
from typing import Any, TypeVar

import torch

from funcopt.execution import reference
from funcopt.execution.executor import Column, Engine, Executor, Rows
from funcopt.execution.launch_cache import LaunchCache
from funcopt.execution.program import Program
from funcopt.execution.rule import Kinds, Rule
from funcopt.types import Tensor

_MOST = 64  # signatures kept that follow from one

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class CallSignature:
    """What calls share that differ in values alone.

    It is the rule, the dtype, the rows of the leaves, and which scalars are tensors. The
    tensors of a call are one flat list, in the order of the program's inputs: of a stream
    the tensors of all leaves, of a scalar those of the rows where it is a tensor. So are
    its outputs. A derivative has a signature of its own: `vjp` takes this one's tensors
    and a cotangent for each output, `jvp` this one's tensors and the tangents of those
    that may move.
    """

    rule: Rule
    kinds: Kinds
    engine: Engine
    stored: torch.dtype  #: what leaves are kept in
    which: tuple[int, ...]  #: the row of each leaf
    given: tuple[tuple[bool, ...], ...]  #: of each row, which scalars are tensors
    tasks: int = 0  #: how many tasks a leaf's leading axis holds, if scalars are theirs
    what: str = "step"
    #: the inputs of ``of`` of which `vjp` is to give gradients, `jvp` is given tangents
    wanted: tuple[bool, ...] = ()
    of: "CallSignature | None" = None  #: what this is a derivative of
    _derived: dict[Any, "CallSignature"] = field(default_factory=dict)

    def vjp(self, wanted: tuple[bool, ...]) -> "CallSignature":
        """The gradients of the tensors that are ``wanted``.

        And of all others of the same inputs: a program gives a whole input's or none.
        """
        return self._once(wanted, self._vjp)

    def _vjp(self, wanted: tuple[bool, ...]) -> "CallSignature":
        asked = [False] * len(self.inputs)
        for (i, _), w in zip(self.places, wanted):
            asked[i] |= w
        more = (True,) * scalars_in(self.outputs)
        return self._new(
            what="second_vjp" if self.of else "vjp",
            given=tuple((*row, *more) for row in self.given),
            wanted=tuple(asked),
            of=self._alone,
        )

    def jvp(self) -> "CallSignature":
        """The tangents of the outputs, by those of the inputs that are `moving`."""
        return self._once("jvp", self._jvp)

    def _jvp(self, what: str) -> "CallSignature":
        given = tuple(row + self.moving_scalars(row) for row in self.given)
        return self._new(what=what, given=given, wanted=self.moving, of=self._alone)

    def moving_scalars(self, row: Sequence[T]) -> tuple[T, ...]:
        """Of a row of scalars, those that may have a tangent."""
        moving = (m for m, stream in zip(self.moving, self.inputs) if not stream)
        return tuple(compress(row, moving))

    def with_tasks(self, tasks: int) -> "CallSignature":
        """The same on leaves whose leading axis is the task."""
        of = self.of and self.of.with_tasks(tasks)
        return self._once(("tasks", tasks), lambda _: self._new(tasks=tasks, of=of))

    @property
    def _alone(self) -> "CallSignature":
        """One that holds none of those that follow from it, and so not what holds it."""
        return self._new()

    def _new(self, **changes: Any) -> "CallSignature":
        return replace(self, _derived={}, **changes)

    def _once(self, key: Any, make: Callable[[Any], "CallSignature"]) -> "CallSignature":
        found = self._derived.get(key)
        if found is None:
            if len(self._derived) >= _MOST:
                self._derived.clear()
            found = self._derived[key] = make(key)
        return found  # another thread may have cleared them

    def arranged(self, streams: Sequence[Column], rows: Rows) -> list[Tensor]:
        """The tensors of a call, in the order of the inputs."""
        columns, scalars = iter(streams), iter(zip(*rows))
        tensors: list[Tensor] = []
        for stream in self.inputs:
            if stream:
                tensors += next(columns)
            else:
                tensors += [x for x in next(scalars) if isinstance(x, Tensor)]
        return tensors

    @property
    def sums(self) -> bool:
        """Whether scalars come out that are summed over leaves."""
        return self.what in ("vjp", "second_vjp")

    @cached_property
    def inputs(self) -> tuple[bool, ...]:
        """For each input of the program, whether it is a stream."""
        if self.of is None:
            return self.rule.inputs(self.kinds)
        if self.what == "jvp":
            return (*self.of.inputs, *compress(self.of.inputs, self.wanted))
        return (*self.of.inputs, *self.of.outputs)

    @cached_property
    def moving(self) -> tuple[bool, ...]:
        """For each input of a step, whether it may have a tangent.

        A number has none, nor the step. With a tangent of 0 their derivative would be
        computed, too: it may be infinite, and times 0 no number.
        """
        tensors = map(any, zip(*self.given))
        return tuple(
            stream or (next(tensors) and i != self.rule.step_place)
            for i, stream in enumerate(self.inputs)
        )

    @cached_property
    def outputs(self) -> tuple[bool, ...]:
        """For each output of the program, whether it is a stream."""
        if not self.sums:
            return self.rule.outputs
        assert self.of is not None
        return tuple(compress(self.of.inputs, self.wanted))

    @cached_property
    def places(self) -> list[tuple[int, int]]:
        """For each tensor of the list, its input and its leaf or row."""
        return list(_places(self.inputs, len(self.which), self.given))

    @cached_property
    def output_places(self) -> list[tuple[int, int]]:
        """For each tensor that comes out, the program's output and its leaf or row."""
        if not self.sums:
            every = tuple((True,) * scalars_in(self.outputs) for _ in self.given)
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

    def reached(self, cotangents: Sequence[Any]) -> list[bool]:
        """For each tensor of a step's list, whether what is not None comes down to it."""
        given = zip(self.output_places, cotangents)
        ends = [(self.outputs[k], at) for (k, at), c in given if c is not None]
        leaves = {at for stream, at in ends if stream}
        rows = {self.which[at] if stream else at for stream, at in ends}
        return [at in (leaves if self.inputs[i] else rows) for i, at in self.places]

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
            return rule.jvp(self.kinds, dtype, self.wanted)
        if self.what == "vjp":
            return rule.vjp(self.kinds, dtype, self.wanted)
        return rule.second_vjp(self.kinds, dtype, self.of.wanted, self.wanted)

    @cached_property
    def executor(self) -> Executor:
        """Raises UntraceableError or BuildError: there is none."""
        return self.rule.executor(self.engine, self.program, self.stored)

    @cached_property
    def launches(self) -> LaunchCache:
        """The cache of the way that earlier calls went."""
        return LaunchCache(sum(self.outputs))

    def gather(self, outputs: Sequence[Tensor]) -> list[Column]:
        """The outputs of a step as columns: something for each leaf."""
        columns: list[Column] = []
        rest = iter(outputs)
        for stream in self.outputs:
            if stream:
                columns.append([*islice(rest, len(self.which))])
            else:
                values = [*islice(rest, len(self.given))]
                columns.append([values[row] for row in self.which])
        return columns

    @cached_property
    def spread(self) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
        """Picks a gradient for each tensor of ``of`` from the outputs and a last None."""
        assert self.of is not None
        count = iter(range(len(self.output_places)))
        return itemgetter(
            *(next(count) if self.wanted[i] else -1 for i, _ in self.of.places)
        )


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


def scalars_in(streams: Sequence[bool]) -> int:
    """How many are scalars."""
    return sum(not stream for stream in streams)
