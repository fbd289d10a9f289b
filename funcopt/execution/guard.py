"""A cache whose key is what tensors are like: asked of all of them at once."""

from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import torch
from torch.autograd import forward_ad

from funcopt.types import Tensor

try:
    # What Dynamo's compiled code asks on entry, of all tensors in one call: the type,
    # shape, strides, dtype, device and requires_grad; whether one is lazy, a wrapper or
    # an inference tensor; and whether the same modes are in force and levels of
    # torch.func open. 0.07 µs a tensor.
    from torch._C._dynamo.guards import TensorGuards as _TensorGuards
except ImportError:  # a private helper: without it all is looked at anew
    _TensorGuards = None

# One loop may need several: its first step and its others, each in plain use, under
# autograd, and inside transforms of torch.func.
_MOST = 8

T = TypeVar("T")


class Known(Generic[T]):
    """A cache of what was worked out for tensors, and holds for others like them."""

    def __init__(self) -> None:
        self._all: tuple[tuple[_Guard, T], ...] = ()

    def get(self, tensors: Sequence[Any]) -> T | None:
        """What is known for tensors like these."""
        for guard, found in self._all:
            if guard.admits(tensors):
                return found
        return None

    def put(self, tensors: Sequence[Tensor], found: T) -> None:
        """Remember this for tensors like these; the oldest of many is forgotten."""
        if _TensorGuards is not None:
            self._all = ((_Guard(tensors), found), *self._all)[:_MOST]


class _Guard:
    """Whether tensors, and the modes in force, are like those it was made of.

    Grad mode matters where one of them requires grad. An open forward-mode level never
    passes: any tensor may be dual there.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        shapes: list[Any] = [list(x.shape) for x in tensors]
        strides: list[Any] = [list(x.stride()) for x in tensors]
        make: Any = _TensorGuards
        self._check = make(
            *tensors, dynamic_dims_sizes=shapes, dynamic_dims_strides=strides
        ).check
        self._count = len(tensors)
        self._asks = any(x.requires_grad for x in tensors)
        self._grad = torch.is_grad_enabled()

    def admits(self, tensors: Sequence[Any]) -> bool:
        return (
            len(tensors) == self._count
            and self._check(*tensors)
            and forward_ad._current_level < 0
            and not (self._asks and self._grad is not torch.is_grad_enabled())
        )
