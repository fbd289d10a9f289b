"""All leaves of a tree in a row, as one vector, and back."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from funcopt.errors import LeafError
from funcopt.stepping.complex_leaves import parts
from funcopt.types import Tensor


def form_of(leaves: Sequence[Any], name: str) -> dict[str, Any]:
    """The dtype and device of the vector of all leaves."""
    found = [leaf for leaf in leaves if leaf is not None]
    devices = {leaf.device for leaf in found} or {torch.device("cpu")}
    if len(devices) > 1:
        raise LeafError(
            f"{name} makes one vector of all parameters: they must be on one device, not "
            f"on {', '.join(sorted(map(str, devices)))}"
        )
    dtype = torch.float32
    for leaf in found:
        dtype = torch.promote_types(dtype, parts(leaf).dtype)
    return {"dtype": dtype, "device": devices.pop()}


def joined(
    leaves: Sequence[Any],
    params: Sequence[Any],
    like: Mapping[str, Any],
    out: Tensor | None = None,
    alone: bool = False,
) -> Tensor:
    """The leaves in a row, 0 for those that are None where params are not.

    ``out`` is where to write it, if anywhere. ``alone`` says that no derivative,
    transform or mode sees it: then a row of like leaves is made in half the time.
    """
    rows = [(x, p) for x, p in zip(leaves, params) if p is not None]
    if alone and out is None and len(rows) > 1:  # a single leaf it would not copy
        found = [x for x, _ in rows if x is not None and x.dtype is like["dtype"]]
        if len(found) == len(rows):
            return _flatten_dense_tensors(found)
    pieces = [
        torch.zeros(parts(p).numel(), **like) if x is None else _reals(x) for x, p in rows
    ]
    pieces = [x if x.ndim == 1 else x.reshape(-1) for x in pieces]
    pieces = [x if x.dtype is like["dtype"] else x.to(like["dtype"]) for x in pieces]
    return torch.cat(pieces, out=out) if pieces else torch.zeros(0, **like)


# A complex number cannot begin anywhere in memory, as its parts in the vector do: they
# are copied, and not viewed, for the sake of their gradients, too.


def _reals(leaf: Tensor) -> Tensor:
    return torch.stack([leaf.real, leaf.imag], -1) if leaf.is_complex() else leaf


def splitter(
    leaves: Sequence[Any], dtype: torch.dtype, alone: bool
) -> Callable[[Tensor], Sequence[Tensor]]:
    """What makes of a vector the parts that are the leaves', None left out.

    ``alone`` says that no derivative, transform or mode sees it: then in half the time.
    """
    found = [leaf for leaf in leaves if leaf is not None]
    if alone and all(leaf.dtype is dtype for leaf in found):
        return partial(_unflatten_dense_tensors, tensors=found)
    sizes = [parts(leaf).numel() for leaf in found]
    return lambda x: [*map(_leaf_of, x.split_with_sizes(sizes), found)]


def _leaf_of(piece: Tensor, leaf: Tensor) -> Tensor:
    """The part of the vector that is the leaf's, in its form."""
    if leaf.dtype is piece.dtype:
        return piece if leaf.ndim == 1 else piece.view(leaf.shape)
    piece = piece.view(parts(leaf).shape).to(parts(leaf).dtype)
    return torch.complex(*piece.unbind(-1)) if leaf.is_complex() else piece


def moving(
    grads: Sequence[Any], params: Sequence[Any], like: Mapping[str, Any]
) -> Tensor | None:
    """Which elements are of leaves with a gradient; None where all are."""
    if all(g is not None for g, p in zip(grads, params) if p is not None):
        return None
    marks = [
        None if p is None else torch.full_like(parts(p), g is not None)
        for g, p in zip(grads, params)
    ]
    return joined(marks, params, like) > 0
