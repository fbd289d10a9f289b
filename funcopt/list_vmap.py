"""torch.func.vmap of functions of lists, without torch's walks over trees.

These, in Python, are most of what vmap adds to a small step.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import torch
import torch._C._functorch as _functorch  # pyright: ignore[reportMissingImports]
import torch._functorch.vmap as _torch_vmap

from funcopt import tree
from funcopt.types import Tensor

#: what a function under vmap may do with random numbers, as in torch
Randomness: TypeAlias = Literal["error", "different", "same"]
#: the axis of a list's tensors, or of each of them; None where there is none
Axes: TypeAlias = int | None | Sequence[int | None]


#: what torch's own is made of, where this torch has it
try:
    _PARTS: Any = (
        _torch_vmap.lazy_load_decompositions,  # pyright: ignore[reportPrivateImportUsage]
        _functorch._vmap_increment_nesting,
        _functorch._vmap_decrement_nesting,
        _functorch._add_batch_dim,
        _functorch._remove_batch_dim,
    )
except AttributeError:
    _PARTS = None


def list_vmap(
    function: Callable[..., Any],
    in_dims: int | Sequence[Axes] = 0,
    *,
    randomness: Randomness = "error",
    chunk_size: int | None = None,
) -> Callable[..., Any]:
    """``torch.func.vmap`` of a function of lists of tensors, to lists (of lists) of them.

    Chunks, a compiler, another torch and what does not fit are left to torch, and so are
    its words for it.
    """

    def batched(*lists: Sequence[Any]) -> Any:
        whole = chunk_size is None and not torch.compiler.is_compiling()
        axes = _axes(in_dims, lists) if _PARTS and whole else None
        size = axes and _size(lists, axes)
        if not axes or not size:
            dims = in_dims if isinstance(in_dims, int) else tuple(in_dims)
            return torch.func.vmap(
                function, dims, randomness=randomness, chunk_size=chunk_size
            )(*lists)
        load, begin, end, on, off = _PARTS
        load()
        level = begin(size, randomness)
        try:
            given = [
                [x if axis is None else on(x, axis, level) for x, axis in zip(*pair)]
                for pair in zip(lists, axes)
            ]
            outputs, structure = tree.flatten(function(*given))
            if not all(isinstance(x, Tensor) for x in outputs):
                raise ValueError("a function under vmap is to return tensors alone")
            return tree.unflatten(structure, [off(x, level, size, 0) for x in outputs])
        finally:
            end()

    return batched


def _axes(
    in_dims: int | Sequence[Axes], lists: Sequence[Sequence[Any]]
) -> list[list[int | None]] | None:
    """Each tensor's, not below 0; None if one does not fit."""
    dims = [in_dims] * len(lists) if isinstance(in_dims, int) else in_dims
    if len(dims) != len(lists):
        return None
    found: list[list[int | None]] = []
    for axes, tensors in zip(dims, lists):
        each = [axes] * len(tensors) if axes is None or isinstance(axes, int) else axes
        if len(each) != len(tensors):
            return None
        found.append([])
        for x, axis in zip(tensors, each):
            if axis is not None:
                if not isinstance(x, Tensor) or not -x.ndim <= axis < x.ndim:
                    return None
                axis %= x.ndim
            found[-1].append(axis)
    return found


def _size(
    lists: Sequence[Sequence[Any]], axes: Sequence[Sequence[int | None]]
) -> int | None:
    """How many entries the axes have, if it is as many in all."""
    sizes = {
        x.shape[axis]
        for pair in zip(lists, axes)
        for x, axis in zip(*pair)
        if axis is not None
    }
    return sizes.pop() if len(sizes) == 1 else None
