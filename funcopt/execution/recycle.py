"""Buffers of results that nobody holds any more, for the results of a later step.

A fresh buffer of many pages costs several times the step that fills it: the system hands
out each page on its first write; and of a small one, to make and free the tensor costs
as much as to fill it. A loop that keeps only the newest parameters and state frees with
each step what the step after the next needs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from threading import Lock

import torch

from funcopt.execution.executor import empty_like
from funcopt.execution.guarded_cache import GuardedCache
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

    key: object
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
    _keys: GuardedCache[object] = field(default_factory=GuardedCache)
    _lock: Lock = field(default_factory=Lock)

    def columns(
        self,
        like: Sequence[Tensor],
        count: int,
        make: Callable[[], list[Tensor]] | None = None,
        key: object = None,
    ) -> list[list[Tensor]]:
        """``count`` columns of tensors like the given ones, their values undefined.

        ``make`` makes a new column, `empty_like` by default. A ``key`` stands for what
        ``like`` and ``count`` are, if the caller knows that these are always the same.
        """
        make, size = make or partial(empty_like, like), len(like)
        key = key or self._key(like)
        if key is None or torch.is_inference_mode_enabled() or not like[0].is_cpu:
            return [make() for _ in range(count)]
        made, found = self._take(key), objects.load()
        if (
            made is None
            or len(made.tensors) != count * size
            or not found.unheld(made.tensors, made.snapshot)
        ):
            tensors = [x for _ in range(count) for x in make()]
            plain = all(x.ndim <= _AXES for x in like)
            snapshot = found.snapshot(tensors) if plain else None
            made = None if snapshot is None else _Made(key, tensors, snapshot)
        else:
            tensors = made.tensors
        columns = [tensors[k : k + size] for k in range(0, len(tensors), size)]
        if made is not None:  # held by the columns, before another thread may see it
            with self._lock:
                made.call = self._calls
                self._made.append(made)
        return columns

    def _key(self, like: Sequence[Tensor]) -> object | None:
        """None of tensors that the guards know no second time, as where one is twice."""
        key = self._keys.get(like)
        if key is None:
            self._keys.put(like, object())
            key = self._keys.get(like)
        return key

    def _take(self, key: object) -> _Made | None:
        """The results of this kind of the call before last, which are no more kept."""
        with self._lock:
            self._calls += 1
            if self._made and self._made[0].call < self._calls - _KEPT:
                self._made = [x for x in self._made if x.call >= self._calls - _KEPT]
            mine = [x for x in self._made if x.key is key]
            if len(mine) < 2:
                return None
            self._made.remove(mine[0])
            return mine[0]
