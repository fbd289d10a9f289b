"""A complex leaf steps as the pairs of real numbers it consists of: no rule knows of it.

As in torch.optim, real and imaginary parts go their own ways: an average of squares holds
re² + i·im², not |g|².
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from funcopt.errors import ExecutionError
from funcopt.types import Tensor


def among(params: Sequence[Tensor | None]) -> list[bool]:
    """Which parameters are complex; [] if none is."""
    found = [p is not None and p.is_complex() for p in params]
    return found if True in found else []


def parts(x: Any) -> Any:
    """A complex tensor as real with a last axis of two, in the same memory."""
    if not isinstance(x, Tensor) or not x.is_complex():
        return x
    return torch.view_as_real(x.resolve_conj())  # gradients come lazily conjugated


def joined(x: Tensor) -> Tensor:
    """The complex tensor of which ``x`` are the parts."""
    *strides, last = x.stride()
    if last != 1 or any(stride % 2 for stride in strides):
        x = x.clone(memory_format=torch.contiguous_format)  # `contiguous` may be a no-op
    return torch.view_as_complex(x)


def rejoined(column: Sequence[Any], were_complex: Sequence[bool]) -> Sequence[Any]:
    """The column, with those leaves complex again that were `among` the parameters."""
    if not were_complex:
        return column
    return [joined(x) if was else x for x, was in zip(column, were_complex)]


def slot(first: Callable[[Tensor], Tensor], p: Tensor) -> Tensor:
    """What a slot holds that starts as ``first`` of a parameter."""
    return joined(first(parts(p))) if p.is_complex() else first(p)


def check_writable(columns: Sequence[Sequence[Any]]) -> None:
    """Raises where the parts of a tensor would not be in its own memory."""
    if any(isinstance(x, Tensor) and x.is_conj() for column in columns for x in column):
        raise ExecutionError(
            "donate=True: a tensor that is conjugated lazily cannot be written over; "
            "give .resolve_conj()"
        )
