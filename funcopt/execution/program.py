"""A rule as a short list of operations, from which every fast executor works.

Two kinds of value are told apart: a *stream* has an element for each of the leaf's, in
the leaf's dtype; a *scalar* is one float64 number for the whole leaf: the step, a
hyperparameter, and what follows from these alone. A kernel computes streams; scalars are
computed before it, so that 1 - β**t is as exact as in the reference. In a derivative a
stream is summed to a scalar, the gradient of a hyperparameter, and scalars follow from
it: a program may alternate between the two kinds.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TypeAlias

import torch

from funcopt.types import Tensor

#: a function of tensors, streams and scalars, that gives tensors
Function: TypeAlias = Callable[..., Sequence[Tensor]]


@dataclass(frozen=True)
class Op:
    """One operation; its arguments are numbers of earlier values."""

    name: str
    args: tuple[int, ...]
    stream: bool
    boolean: bool = False
    literal: float = 0.0  #: the value of a "const"


@dataclass(frozen=True)
class Pass:
    """One sweep over the leaf, and the scalars that must be there before it."""

    before: tuple[int, ...]  #: scalars to compute first, in order
    streams: tuple[int, ...]  #: streams to compute in the sweep, in order
    outputs: tuple[int, ...]  #: the streams among the program's outputs that it writes
    sums: tuple[int, ...]  #: scalars that are sums over the leaf of its streams


@dataclass(frozen=True)
class Program:
    """Operations in order; value i is input i, or operation ``i - len(inputs)``."""

    inputs: tuple[bool, ...]  #: for each input, whether it is a stream
    ops: tuple[Op, ...]
    outputs: tuple[int, ...]
    dtype: torch.dtype  #: that streams are computed in
    function: Function = field(compare=False, repr=False)  #: what was traced

    def op(self, value: int) -> Op:
        return self.ops[value - len(self.inputs)]

    def is_input(self, value: int) -> bool:
        return value < len(self.inputs)

    def is_stream(self, value: int) -> bool:
        return self.inputs[value] if self.is_input(value) else self.op(value).stream

    def is_literal(self, value: int) -> bool:
        return not self.is_input(value) and self.op(value).name == "const"

    def streams_read(self, sweep: Pass) -> tuple[int, ...]:
        """The input streams that a sweep reads, in the order of their first use."""
        used = [a for v in sweep.streams for a in self.op(v).args]
        used += [*sweep.outputs, *(self.op(s).args[0] for s in sweep.sums)]
        return tuple(
            i for i in dict.fromkeys(used) if self.is_input(i) and self.is_stream(i)
        )

    def scalars_read(self, sweep: Pass) -> tuple[int, ...]:
        """The scalars, literals aside, that its streams are computed from, likewise."""
        used = dict.fromkeys(a for v in sweep.streams for a in self.op(v).args)
        return tuple(a for a in used if not self.is_stream(a) and not self.is_literal(a))

    @cached_property
    def passes(self) -> tuple[Pass, ...]:
        """The sweeps that compute the program, and after the last the rest of scalars.

        A rule takes one. A value that follows from a sum over the leaf belongs to the
        next; streams of an earlier sweep that it needs are computed again, which costs
        less than to store them. All is written in the last sweep of streams: what an
        earlier one wrote in place, a later one could no longer read.
        """
        first = len(self.inputs)
        level = [0] * first
        for op in self.ops:
            below = max((level[a] for a in op.args), default=0)
            level.append(below + (op.name == "sum"))
        last = max((level[o] for o in self.outputs), default=0)
        streams = [o for o in self.outputs if self.is_stream(o)]
        written = max((level[o] for o in streams), default=0)
        passes = []
        for k in range(last + 1):
            values = range(first, len(level))
            outputs = tuple(streams if k == written else ())
            sums = tuple(
                v for v in values if level[v] == k + 1 and self.op(v).name == "sum"
            )
            needed = self._streams_for([*outputs, *(self.op(s).args[0] for s in sums)])
            before = tuple(
                v
                for v in values
                if level[v] == k and not self.is_stream(v) and self.op(v).name != "sum"
            )
            passes.append(Pass(before, needed, outputs, sums))
        return tuple(passes)

    def _streams_for(self, values: Iterable[int]) -> tuple[int, ...]:
        needed: set[int] = set()
        ahead = list(values)
        while ahead:
            v = ahead.pop()
            if v in needed or self.is_input(v) or not self.is_stream(v):
                continue
            needed.add(v)
            ahead.extend(self.op(v).args)
        return tuple(sorted(needed))

    def without_dead(self) -> "Program":
        """The program without what no output needs."""
        first, live = len(self.inputs), set(self.outputs)
        for value in range(first + len(self.ops) - 1, first - 1, -1):
            if value in live:
                live.update(self.op(value).args)
        number = {i: i for i in range(first)}
        ops: list[Op] = []
        for value in sorted(v for v in live if v >= first):
            op = self.op(value)
            number[value] = first + len(ops)
            args = tuple(number[a] for a in op.args)
            ops.append(replace(op, args=args))
        outputs = tuple(number[o] for o in self.outputs)
        return replace(self, ops=tuple(ops), outputs=outputs)
