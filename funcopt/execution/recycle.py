"""Buffers of results that nobody holds any more, for the results of a later step.

A fresh buffer of many pages costs several times the step that fills it: the system hands
out each page on its first write; and of a small one, to make and free the tensor costs
as much as to fill it. A loop that keeps only the newest parameters and state frees with
each step what the step after the next needs.
"""

import sys
from collections import deque
from collections.abc import Callable, Sequence
from functools import cache, cached_property, partial
from operator import attrgetter
from typing import Any
from weakref import getweakrefcount

import torch

from funcopt.execution.executor import empty_like
from funcopt.execution.guarded_cache import GuardedCache
from funcopt.types import Tensor

_SMALLEST = 1 << 21  # bytes: less is freed and made again faster than it is looked at

_data_ptr, _nbytes = Tensor.data_ptr, torch.UntypedStorage.nbytes
_attributes, _grad = attrgetter("__dict__"), attrgetter("grad")


class Recycler:
    """Makes tensors for outputs, out of those that it made the time before last.

    It holds the tensors of its last two calls: never more than one set beside those that
    the caller holds.
    """

    def __init__(self) -> None:
        self._made: deque[_Set] = deque(maxlen=2)
        #: by what results are to be like: a guard of new ones, and the bytes of each
        self._new: GuardedCache[GuardedCache[list[int]]] = GuardedCache()

    def columns(
        self,
        like: Sequence[Tensor],
        count: int,
        make: Callable[[], list[Tensor]] | None = None,
    ) -> list[list[Tensor]]:
        """``count`` columns of tensors like the given ones, their values undefined.

        ``make`` makes a new column, `empty_like` by default.
        """
        make = make or partial(empty_like, like)
        size = count * sum([x.nbytes for x in like])
        if size < _SMALLEST or not like[0].is_cpu or not _can_tell():
            return [make() for _ in range(count)]
        new = self._new.get(like)
        old = self._oldest()
        if new is not None and old is not None and old.is_free(new):
            made = old  # at the version it had: nobody is left to ask for that
        else:
            made = _Set([x for _ in range(count) for x in make()])
        if new is None:
            new = GuardedCache()
            new.put(made.tensors, [x.nbytes for x in made.tensors])
            self._new.put(like, new)
        size, tensors = len(like), made.tensors
        columns = [tensors[k : k + size] for k in range(0, len(tensors), size)]
        # Held by the columns, before another thread may come upon it.
        self._made.append(made)
        return columns

    def _oldest(self) -> "_Set | None":
        if len(self._made) < 2:
            return None
        try:
            # One operation: another thread never gets the same tensors.
            return self._made.popleft()
        except IndexError:  # other threads were faster
            return None


class _Set:
    """The results of one call, and what tells that nobody holds any of them."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self.tensors = tensors

    @cached_property
    def _memory(self) -> tuple[list[torch.UntypedStorage], list[int], list[int]]:
        storages = [x.untyped_storage() for x in self.tensors]
        return storages, [s._cdata for s in storages], [*map(_data_ptr, self.tensors)]

    def is_free(self, new: GuardedCache[list[int]]) -> bool:
        """Whether all may be written over: nobody holds one, or left a mark on it."""
        tensors, nobody = self.tensors, _nobody()
        if set(map(sys.getrefcount, tensors)) != nobody[0]:
            return False  # found fast: some loops keep all results
        storages, handles, addresses = self._memory
        return (
            _holders(tensors, storages, handles) == nobody
            and not any(map(getweakrefcount, tensors))
            and new.get(tensors) == [*map(_nbytes, storages)]
            and [*map(_data_ptr, tensors)] == addresses
            and not any(map(_attributes, tensors))
            and set(map(_grad, tensors)) == {None}
        )


def _holders(
    tensors: Sequence[Tensor],
    storages: Sequence[torch.UntypedStorage],
    handles: Sequence[int],
) -> tuple[set[int], ...]:
    """How many hold the tensors and their memory.

    Views and NumPy arrays hold the memory, graphs and DLPack capsules the tensor in C++,
    everybody else the Python object of the one or of the other.
    """
    use_count: Any = Tensor._use_count  # pyright: ignore[reportAttributeAccessIssue]
    return (
        set(map(sys.getrefcount, tensors)),
        set(map(use_count, tensors)),
        set(map(sys.getrefcount, storages)),
        set(map(torch._C._storage_Use_Count, handles)),
    )


@cache
def _nobody() -> tuple[set[int], ...]:
    """What `_holders` says of tensors that only a list holds; () if it cannot."""
    if not getattr(sys, "_is_gil_enabled", lambda: True)():
        return ()  # another thread may change a count while it is read
    tensors = [torch.empty(1, device="cpu")]
    storages = [tensors[0].untyped_storage()]
    try:
        return _holders(tensors, storages, [storages[0]._cdata])
    except AttributeError:  # private helpers that a later torch may lack
        return ()


def _can_tell() -> bool:
    """Whether holders can be counted, and all tensors are of one kind."""
    return bool(_nobody()) and not torch.is_inference_mode_enabled()
