"""A cache whose key is what tensors are like, and what is in force around them."""

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeAlias, TypeVar

import torch
from torch.autograd import forward_ad

from funcopt.execution.native import objects
from funcopt.types import Tensor

try:
    # What Dynamo's compiled code asks on entry, of all tensors in one call: the type,
    # shape, strides, dtype, device and requires_grad; whether one is lazy, a wrapper or
    # an inference tensor; and whether the same modes are in force and levels of
    # torch.func open. 0.1 µs a tensor.
    from torch._C._dynamo.guards import TensorGuards as _TensorGuards
except ImportError:  # a private helper: without it all is looked at anew
    _TensorGuards = None

# One loop may need several: its first step and its others, each in plain use, under
# autograd, and inside transforms of torch.func.
_MOST = 8

#: whether tensors, as many as are known, are like those
Alike: TypeAlias = Callable[[list[Any]], bool]

T = TypeVar("T")


class GuardedCache(Generic[T]):
    """A cache of what was worked out for tensors, and holds for others like them.

    Within an open forward-mode level any tensor may be dual, and nothing is known; unless
    tensors are looked at as ``memory`` alone, their derivatives followed elsewhere.
    """

    def __init__(self, memory: bool = False) -> None:
        self._memory = memory
        #: how many tensors, what compares others, grad mode if it matters, inference mode
        #: (guards take its tensors, outside of it, for any others within), what is known
        self._all: tuple[tuple[int, Alike, bool | None, bool, T], ...] = ()

    def get(self, tensors: list[Any]) -> T | None:
        """What is known for tensors like these, with the modes in force as they were.

        Grad mode matters where one of them requires grad.
        """
        for count, alike, grad, inference, found in self._all:
            if (
                count == len(tensors)
                and inference is torch.is_inference_mode_enabled()
                and (grad is None or grad is torch.is_grad_enabled())
                and (forward_ad._current_level < 0 or self._memory)
                and alike(tensors)
            ):
                return found
        return None

    def put(self, tensors: list[Tensor], found: T) -> None:
        """Remember this for tensors like these; the oldest of many is forgotten."""
        if _TensorGuards is None or forward_ad._current_level >= 0 and not self._memory:
            return
        asks = any(x.requires_grad for x in tensors)
        grad = torch.is_grad_enabled() if asks else None
        inference = torch.is_inference_mode_enabled()
        new = len(tensors), _like(tensors), grad, inference, found
        self._all = (new, *self._all)[:_MOST]


def _like(tensors: list[Tensor]) -> Alike:
    """What tells of as many others whether each is like its own of these."""
    likeness = objects.load().likeness(tensors)
    if likeness is None:
        guards = _guards(tensors)
        return lambda others: guards(*others)
    # In C in a fifth of the time. What is in force shows in one tensor of each kind.
    keys = {torch._C._dispatch_keys(x).raw_repr(): i for i, x in enumerate(tensors)}
    some, like = [*keys.values()], objects.load().like
    guards = _guards([tensors[i] for i in some])
    return lambda others: like(others, likeness) and guards(*[others[i] for i in some])


def _guards(tensors: Sequence[Tensor]) -> Callable[..., bool]:
    make: Any = _TensorGuards
    return make(
        *tensors,
        dynamic_dims_sizes=[list(x.shape) for x in tensors],
        dynamic_dims_strides=[list(x.stride()) for x in tensors],
    ).check


def distinct(tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[int]]:
    """Each tensor once, and which of these each one is: guards know none given twice."""
    places: dict[int, int] = {}
    which = [places.setdefault(id(x), len(places)) for x in tensors]
    return [*{id(x): x for x in tensors}.values()], which
