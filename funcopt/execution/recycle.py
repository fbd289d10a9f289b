"""Buffers of results that nobody holds any more, for the results of a later step.

A fresh buffer of many pages costs several times the step that fills it: the system hands
out each page on its first write; and of a small one, to make and free the tensor costs
as much as to fill it. A loop that keeps only the newest parameters and state frees with
each step what the step after the next needs.
"""

from dataclasses import dataclass, field
from threading import Lock

import torch

from funcopt.execution.executor import Maker
from funcopt.execution.native import objects
from funcopt.types import Tensor

# Calls after which results are let go: until then groups of a tree, and nets that step
# in turns, find their own.
_KEPT = 8

# Of so many axes a tensor holds its shape in itself, and the snapshot sees it.
_AXES = 5


@dataclass(eq=False)
class _Made:
    """The results of one call, and what they were like when nobody held them."""

    make: Maker
    tensors: list[Tensor]
    snapshot: bytes
    call: int = 0  #: when they were made, or written into last


@dataclass(eq=False)
class Recycler:
    """Makes tensors for outputs, out of those that it made the time before last.

    It holds the results of the last calls, two sets at most of each kind: in a loop, one
    beside the newest, which its caller holds.
    """

    _made: list[_Made] = field(default_factory=list)
    _calls: int = 0
    _lock: Lock = field(default_factory=Lock)

    def columns(self, make: Maker, count: int) -> list[list[Tensor]]:
        """``count`` columns of what ``make`` makes, their values undefined."""
        if not make.on_cpu or torch.is_inference_mode_enabled():
            return [make() for _ in range(count)]
        size = len(make.looks)
        made, found = self._take(make, count * size), objects.load()
        if made is not None and found.unheld(made.tensors, made.snapshot):
            tensors = made.tensors
        else:
            tensors = [x for _ in range(count) for x in make()]
            plain = all(len(shape) <= _AXES for shape, *_ in make.looks)
            snapshot = found.snapshot(tensors) if plain else None
            made = None if snapshot is None else _Made(make, tensors, snapshot)
        columns = [tensors[k : k + size] for k in range(0, len(tensors), size)]
        if made is not None:  # held by the columns, before another thread may see it
            with self._lock:
                made.call = self._calls
                self._made.append(made)
        return columns

    def _take(self, make: Maker, size: int) -> _Made | None:
        """The results of this kind of the call before last, which are no more kept."""
        with self._lock:
            self._calls += 1
            if self._made and self._made[0].call < self._calls - _KEPT:
                self._made = [x for x in self._made if x.call >= self._calls - _KEPT]
            mine = [
                x
                for x in self._made
                if len(x.tensors) == size
                and (x.make is make or x.make.looks == make.looks)
            ]
            if len(mine) < 2:
                return None
            self._made.remove(mine[0])
            return mine[0]
