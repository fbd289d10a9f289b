"""Numbers read out of tensors, where that waits for nothing and loses no derivative."""

from typing import Any

import torch
import torch._C._functorch as _functorch  # pyright: ignore[reportMissingImports]

from funcopt.execution import levels
from funcopt.types import Tensor


def readable(tensor: Tensor) -> bool:
    """Whether the values can be read without waiting for a device or breaking a graph.

    Not on an accelerator, not batched by vmap at any level, not while compiling or
    tracing, and not of a tensor subclass.
    """
    if torch.compiler.is_compiling() or tensor.device.type != "cpu":
        return False
    if torch._C._len_torch_dispatch_stack():
        return False
    while _functorch.is_functorch_wrapped_tensor(tensor):
        if _functorch.is_batchedtensor(tensor) or _functorch.is_functionaltensor(tensor):
            return False
        tensor = _functorch.get_unwrapped(tensor)
    return type(tensor) is Tensor


def scalars_of(vector: Tensor) -> list[Any]:
    """A vector of steps, or of a scalar slot, as one number for each leaf.

    Python's numbers where they can be read and no derivative is lost by that, else 0-d
    float64 tensors. With Python's the bias corrections are doubles, exactly as in
    torch.optim, and cost no op per leaf.
    """
    if torch.compiler.is_compiling() or levels.may_be_tracked(vector):
        return list(vector.to(torch.float64).unbind())
    if readable(vector):
        return vector.tolist()
    table = None
    if vector.shape[0] and _is_batch(vector):
        # Tasks that are equally old are the rule, and so are leaves: one look tells.
        table = _physical(vector).reshape(-1, vector.shape[0])
        if bool((table == table[0]).all()):
            return table[0].tolist()
    values = vector.to(torch.float64).unbind()
    if table is not None and bool((table == table[:, :1]).all()):
        return [values[0]] * len(values)
    return list(values)


def peek(tensor: Tensor) -> Tensor | None:
    """The values, of every task of a batch, to look at and not to compute with.

    An accelerator is waited for. None while compiling or tracing, and of a subclass.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return None
    found = _physical(tensor)
    return found if type(found) is Tensor and not found.is_meta else None


def _is_batch(tensor: Tensor) -> bool:
    """Whether vmap is all that keeps the values from being read."""
    if torch._C._len_torch_dispatch_stack():
        return False
    tensor = levels.bottom(tensor)
    return type(tensor) is Tensor and tensor.device.type == "cpu"


def _physical(tensor: Tensor) -> Tensor:
    """The tensor below every transform, the axes of its batches in front."""
    if not _functorch.is_functorch_wrapped_tensor(tensor):
        return tensor
    inner = _functorch.get_unwrapped(tensor)
    found = _physical(inner)
    if not _functorch.is_batchedtensor(tensor):
        return found
    return found.movedim(found.ndim - inner.ndim + _functorch.maybe_get_bdim(tensor), 0)
