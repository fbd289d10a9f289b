"""Buffers of results that nobody holds any more, for the results of a later step.

A fresh buffer of many pages costs several times the step that fills it: the system hands
out each page on its first write. A loop that keeps only the newest parameters and state
frees, with each step, what the step after the next needs.
"""

import sys
from collections import deque
from collections.abc import Sequence
from functools import cache

import torch

from funcopt.types import Tensor

_SMALLEST = 1 << 18  # bytes; the allocator keeps smaller blocks by itself


class Recycler:
    """Makes tensors for outputs, out of those that it made the time before last.

    It holds the large tensors of its last two calls: never more than one set beside
    those that the caller holds.
    """

    def __init__(self) -> None:
        self._made: deque[list[Tensor | None]] = deque()

    def columns(self, like: Sequence[Tensor], count: int) -> list[list[Tensor]]:
        """``count`` columns of tensors like the given ones, their values undefined."""
        large = [x.nbytes >= _SMALLEST and x.device.type == "cpu" for x in like]
        if not any(large) or not _can_tell():
            return [list(map(torch.empty_like, like)) for _ in range(count)]
        # popleft is one operation: another thread never gets the same tensors.
        old = self._made.popleft() if len(self._made) > 1 else []
        new: list[Tensor] = []
        for place in range(count * len(like)):
            i = place % len(like)
            x = old[place] if place < len(old) else None
            if x is not None:
                old[place] = None
                if _holders(x) == _nobody() and _is_as_made(x, like[i]):
                    torch.autograd.graph.increment_version(x)
                else:
                    x = None
            new.append(torch.empty_like(like[i]) if x is None else x)
        self._made.append(
            [x if large[k % len(like)] else None for k, x in enumerate(new)]
        )
        return [new[k : k + len(like)] for k in range(0, len(new), len(like))]


def _is_as_made(x: Tensor, like: Tensor) -> bool:
    """Whether no holder left a mark on it."""
    return (
        (x.shape, x.stride(), x.dtype) == (like.shape, like.stride(), like.dtype)
        and not x.requires_grad
        and not x.__dict__
    )


def _holders(x: Tensor) -> tuple[int, ...]:
    """How many hold the tensor and its memory.

    Views and NumPy arrays hold the memory, graphs and DLPack capsules the tensor in C++,
    everybody else the Python object of the one or of the other.
    """
    storage = x.untyped_storage()
    return (
        sys.getrefcount(x),
        x._use_count(),  # pyright: ignore[reportAttributeAccessIssue]
        sys.getrefcount(storage),
        torch._C._storage_Use_Count(storage._cdata),
    )


@cache
def _nobody() -> tuple[int, ...]:
    """What `_holders` says of a tensor that only its caller holds; () if it cannot."""
    if not getattr(sys, "_is_gil_enabled", lambda: True)():
        return ()  # counts are no truth there
    x = torch.empty(1)
    try:
        return _holders(x)
    except AttributeError:  # private helpers that a later torch may lack
        return ()


def _can_tell() -> bool:
    """Whether holders can be counted, and a tensor's version too."""
    return bool(_nobody()) and not torch.is_inference_mode_enabled()
