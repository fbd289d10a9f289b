"""Memory of many pages, which the system hands out on their first write."""

import math
import mmap
from collections.abc import Sequence
from contextlib import suppress

import torch

from funcopt.execution import concrete
from funcopt.types import Tensor

_LARGE = 1 << 20  # bytes


def zeros(shape: Sequence[int], like: Tensor) -> Tensor:
    """Zeros of the dtype and device of ``like``.

    Many are pages not yet handed out: what is not written takes neither memory nor time.
    """
    found = _fresh(shape, like)
    return like.new_zeros(shape) if found is None else found


def large_like(x: Tensor) -> Tensor | None:
    """What a result like x may be written to; None where a new one is as fast.

    The pages are huge ones, if the system has them, which it hands out a few at a time.
    """
    return _fresh(x.shape, x)


def _fresh(shape: Sequence[int], like: Tensor) -> Tensor | None:
    size = math.prod(shape) * like.element_size()
    if size < _LARGE or not concrete.readable(like) or not hasattr(mmap, "MAP_ANONYMOUS"):
        return None
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # of a system that has none
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=like.dtype).view(*shape)
