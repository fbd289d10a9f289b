"""What executors of programs have in common: scalars before each sweep, sums after it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch

from funcopt.execution import scalars
from funcopt.execution.trace import Program
from funcopt.types import Tensor

#: a tensor, or a number, for each leaf
Column: TypeAlias = Sequence[Any]

Direct: TypeAlias = Callable[
    [Sequence[Column], list[int], list[Any], Sequence[Column]], Sequence[Column] | None
]


class Executor(ABC):
    """A program made ready for leaves that are stored in one dtype, on one device."""

    def __init__(self, program: Program, stored: torch.dtype) -> None:
        self.program = program
        self.stored = stored
        first = range(len(program.inputs))
        self._streams = [i for i in first if program.inputs[i]]
        self._scalars = [i for i in first if not program.inputs[i]]
        self._before = [scalars.evaluator(program, sweep) for sweep in program.passes]

    def __call__(
        self,
        streams: Sequence[Column],
        rows: Sequence[Sequence[Any]],
        which: Sequence[int],
        *,
        out: Sequence[Column] | None = None,
        tasks: int = 0,
        pooled: bool = False,
    ) -> list[Column]:
        """The program's outputs, a column each.

        Args:
            streams: for each input stream a column of leaves. A leaf's tensors are dense
                and of equal strides.
            rows: values of the input scalars, a row for all the leaves that share them.
                A value is a number, a 0-d tensor, or a vector with an entry per task.
            which: the row of each leaf.
            out: for each output stream the tensors to write to; they may be inputs.
            tasks: how many tasks a leaf's leading axis holds if scalars or sums are
                theirs alone; else 0, and the axis is one like the others.
            pooled: sum over the leaves of a row. Right for derivatives, which are linear
                in their sums; output scalars then have an entry per row, not per leaf.
        """
        program, env = self.program, self._environment(rows)
        columns = dict(zip(self._streams, streams))
        written = iter(out or ())
        for k, sweep in enumerate(program.passes):
            for values in env:
                self._before[k](values)
            if not sweep.outputs and not sweep.sums:
                continue
            targets = [next(written) for _ in sweep.outputs] if out is not None else None
            made, sums = self._sweep(k, columns, env, which, targets, tasks)
            columns.update(zip(sweep.outputs, made))
            if sums:
                env, which = _with_sums(env, which, sweep.sums, sums, pooled)
        return [
            columns[value]
            if program.is_stream(value)
            else [
                values[value]
                for values in (env if pooled else map(env.__getitem__, which))
            ]
            for value in program.outputs
        ]

    def direct(self, like: Column) -> Direct:
        """The shortest way to run a step of one row on leaves that are like these.

        What comes out takes the streams, the addresses of their tensors, the row, and
        the tensors to write to. It gives the outputs, or None: for `__call__` to do.
        """
        which = [0] * len(like)

        def run(
            streams: Sequence[Column],
            addresses: list[int],
            row: list[Any],
            out: Sequence[Column],
        ) -> list[Column]:
            return self(streams, [row], which, out=out)

        return run

    @abstractmethod
    def _sweep(
        self,
        k: int,
        columns: dict[int, Column],
        env: Sequence[list[Any]],
        which: Sequence[int],
        out: Sequence[Column] | None,
        tasks: int,
    ) -> tuple[Sequence[Column], Sequence[Column]]:
        """The outputs and the sums of sweep ``k``, a column each."""

    def _environment(self, rows: Sequence[Sequence[Any]]) -> list[list[Any]]:
        """For each row a list with a place for every value, the input scalars there."""
        size = len(self.program.inputs) + len(self.program.ops)
        env = []
        for row in rows:
            values: list[Any] = [None] * size
            for i, value in zip(self._scalars, row):
                values[i] = _read(value)
            env.append(values)
        return env


def _with_sums(
    env: Sequence[list[Any]],
    which: Sequence[int],
    names: Sequence[int],
    sums: Sequence[Column],
    pooled: bool,
) -> tuple[list[list[Any]], Sequence[int]]:
    """The environments with a sweep's sums in them, one for each leaf unless pooled."""
    if pooled:
        env = [list(values) for values in env]
        for name, column in zip(names, sums):
            for values in env:
                values[name] = 0.0
            for row, value in zip(which, column):
                env[row][name] = env[row][name] + value
        return list(env), which
    each = [list(env[row]) for row in which]
    for name, column in zip(names, sums):
        for values, value in zip(each, column):
            values[name] = value
    return each, range(len(each))


def _read(value: Any) -> Any:
    """A number where that costs no wait for a device: Python's are ten times as fast."""
    if isinstance(value, Tensor) and not value.ndim and value.device.type == "cpu":
        return value.item()
    return value


def empty_like(column: Column) -> list[Tensor]:
    """New tensors like those of a column."""
    return list(map(torch.empty_like, column))
