"""What every executor of programs is called with."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import starmap
from typing import Any, TypeAlias

import torch

from funcopt.execution.program import Program
from funcopt.types import Tensor

try:
    # What Inductor's code makes its buffers by, in half the time of torch.empty_like.
    from torch._C._dynamo.guards import (
        _empty_strided_cpu,  # pyright: ignore[reportAttributeAccessIssue]
    )
except ImportError:  # a private helper
    _empty_strided_cpu = None

#: a tensor, or a number, for each leaf
Column: TypeAlias = Sequence[Any]
#: the scalars of leaves that share them, a row each
Rows: TypeAlias = Sequence[Sequence[Any]]
#: see `Executor.direct`
Direct: TypeAlias = Callable[
    [Sequence[Tensor], bytes, Rows, Sequence[Column] | None], Sequence[Column] | None
]
#: makes a program ready for a dtype that leaves are stored in
Engine: TypeAlias = Callable[[Program, torch.dtype], "Executor"]


@dataclass(frozen=True, eq=False)
class PerTask:
    """A scalar of each task's own, where the leading axis of leaves holds the tasks."""

    values: Tensor  #: float64, one for each task


class BuildError(Exception):
    """Why a program cannot be made ready, as a sentence."""


class Executor(ABC):
    """A program made ready for leaves that are stored in one dtype, on one device."""

    def __init__(self, program: Program, stored: torch.dtype) -> None:
        self.program = program
        self.stored = stored

    @abstractmethod
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

    def direct(
        self,
        like: Column,
        which: Sequence[int],
        pooled: bool = False,
        tasks: int = 0,
        spread: Sequence[int] = (),
    ) -> Direct:
        """A function that runs this on leaves like these, with all checks done before.

        With ``spread`` the tasks share their scalars, and the streams of these numbers
        hold one number for each task, in tensors that broadcast to the leaves.

        Its arguments: the tensors of all streams, one column after the other; their
        addresses; the rows, whose values went through `read_number` or are `PerTask`;
        and the columns to write to, None for in place, which is from the second stream
        on. It returns the outputs, or None, with nothing written, where only `__call__`
        can make this step. Of columns that are written in place the outputs may hold
        None, or lack them at the end.
        """
        count, written = len(like), sum(map(self.program.is_stream, self.program.outputs))
        own = 0 if spread else tasks

        def run(
            tensors: Sequence[Tensor],
            addresses: bytes,
            rows: Rows,
            out: Sequence[Column] | None,
        ) -> list[Column]:
            streams = [tensors[k : k + count] for k in range(0, len(tensors), count)]
            for k in spread:
                pairs = zip(streams[k], streams[1])
                streams[k] = [x.expand_as(p).contiguous() for x, p in pairs]
            out = streams[1 : 1 + written] if out is None else out
            rows = [[*map(as_vector, row)] for row in rows]
            return self(streams, rows, which, out=out, pooled=pooled, tasks=own)

        return run


def empty_like(column: Column) -> list[Tensor]:
    """New tensors like those of a column."""
    return list(map(torch.empty_like, column))


class Maker:
    """Makes columns of tensors as `empty_like` would, of one that is looked at once."""

    def __init__(self, like: Column) -> None:
        #: what tells whether two make the same: shapes, strides, dtypes
        self.looks = tuple((*_look(x), x.dtype) for x in like)
        self.on_cpu = all(x.is_cpu for x in like)
        self._device = like[0].device if like else None

    def __call__(self) -> list[Tensor]:
        if self.on_cpu and _empty_strided_cpu is not None:
            return [*starmap(_empty_strided_cpu, self.looks)]
        return [
            torch.empty_strided(size, stride, dtype=dtype, device=self._device)
            for size, stride, dtype in self.looks
        ]


def _look(x: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shape, and the strides that ``torch.empty_like`` would choose."""
    filled = x if x.is_contiguous() else torch.empty_like(x, device="meta")
    return tuple(x.shape), filled.stride()


def as_vector(value: Any) -> Any:
    """What `Executor.__call__` takes for a scalar that is each task's own."""
    return value.values if isinstance(value, PerTask) else value


def read_number(value: Any) -> Any:
    """A number where that costs no wait for a device: Python's are ten times as fast."""
    if isinstance(value, Tensor) and value.is_cpu and not value.ndim:
        return value.item()
    return value
