"""Executors that compute scalars on the host: before each sweep, and after its sums."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch

from funcopt.execution import scalars
from funcopt.execution.executor import Column, Executor, Rows, read_number
from funcopt.execution.program import Program


class Sweeping(Executor):
    """Computes scalars itself, and leaves sweeps over streams to a subclass."""

    def __init__(self, program: Program, stored: torch.dtype) -> None:
        super().__init__(program, stored)
        first = range(len(program.inputs))
        self._streams = [i for i in first if program.inputs[i]]
        self._scalars = [i for i in first if not program.inputs[i]]
        self._before = [scalars.evaluator(program, sweep) for sweep in program.passes]

    def __call__(
        self,
        streams: Sequence[Column],
        rows: Rows,
        which: Sequence[int],
        *,
        out: Sequence[Column] | None = None,
        tasks: int = 0,
        pooled: bool = False,
    ) -> list[Column]:
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

    def _environment(self, rows: Rows) -> list[list[Any]]:
        """For each row a list with a place for every value, the input scalars there."""
        size = len(self.program.inputs) + len(self.program.ops)
        env = []
        for row in rows:
            values: list[Any] = [None] * size
            for i, value in zip(self._scalars, row):
                values[i] = read_number(value)
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
        return env, which
    each = [list(env[row]) for row in which]
    for name, column in zip(names, sums):
        for values, value in zip(each, column):
            values[name] = value
    return each, range(len(each))
