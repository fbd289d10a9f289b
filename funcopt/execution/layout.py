"""How leaves lie in memory: kernels walk it, so that all of a leaf must lie alike."""

from collections.abc import Sequence

import torch

from funcopt.types import Tensor

_is_contiguous = Tensor.is_contiguous


def alike(columns: Sequence[Sequence[Tensor]]) -> list[Sequence[Tensor]]:
    """The columns, with copies where the tensors of a leaf differ in strides.

    A parameter that fills its memory sets the order of its leaf, be it contiguous,
    channels-last or transposed; one with gaps or overlaps is made contiguous. The first
    column holds gradients, the second parameters.
    """
    if all(all(map(_is_contiguous, column)) for column in columns):
        return list(columns)
    made = [list(column) for column in columns]
    for i, leaf in enumerate(zip(*columns)):
        if all(map(_is_contiguous, leaf)):
            continue
        model = torch.empty_like(leaf[1])  # keeps the strides of what fills its memory
        for column, x in zip(made, leaf):
            if x.stride() != model.stride() or x._is_zerotensor():
                column[i] = torch.empty_like(model).copy_(x)
    return list(made)


def overlap(columns: Sequence[Sequence[Tensor]]) -> bool:
    """Whether two of the tensors share memory."""
    spans = sorted(
        (x.data_ptr(), x.data_ptr() + _extent(x)) for c in columns for x in c if x.numel()
    )
    return any(end > begin for (_, end), (begin, _) in zip(spans, spans[1:]))


def folded(columns: Sequence[Sequence[Tensor]]) -> bool:
    """Whether an element of a tensor stands for several, as after ``expand``."""
    return any(
        stride == 0 and n > 1
        for c in columns
        for x in c
        for n, stride in zip(x.shape, x.stride())
    )


def _extent(x: Tensor) -> int:
    """The bytes from the first element to behind the last."""
    reach = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride()))
    return (reach + 1) * x.element_size()
