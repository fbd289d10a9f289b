"""How leaves lie in memory: kernels need all tensors of a leaf in the same strides."""

from bisect import bisect_left
from collections.abc import Iterable, Sequence

import torch
from torch._subclasses import FakeTensor

from funcopt.types import Tensor

# Elements of a leaf in one task, on average, that are worth a call of a kernel.
_FEW = 64


def alike(columns: Sequence[Sequence[Tensor]]) -> list[Sequence[Tensor]]:
    """The columns, with copies where the tensors of a leaf differ in strides.

    A column without any is the one that was given.

    A parameter that fills its memory sets the order of its leaf, be it contiguous,
    channels-last or transposed; one with gaps or overlaps is made contiguous. The first
    column holds gradients, the second parameters.
    """
    tensors = [x for column in columns for x in column]
    if (
        all(map(Tensor.is_contiguous, tensors))
        and not any(map(Tensor.is_neg, tensors))
        and not any(map(Tensor._is_zerotensor, tensors))
    ):
        return list(columns)
    copies: dict[int, list[Tensor]] = {}
    for i, leaf in enumerate(zip(*columns)):
        if all(x.is_contiguous() and not is_lazy(x) for x in leaf):
            continue
        model = torch.empty_like(leaf[1])  # keeps the strides of what fills its memory
        for k, x in enumerate(leaf):
            if x.stride() != model.stride() or is_lazy(x):
                copies.setdefault(k, list(columns[k]))[i] = torch.empty_strided(
                    x.shape, model.stride(), dtype=x.dtype, device=x.device
                ).copy_(x)
    return [copies.get(k, column) for k, column in enumerate(columns)]


def spread(
    columns: Sequence[Sequence[Tensor]], params: Sequence[Tensor]
) -> tuple[int, list[int]]:
    """How many leading entries the leaves have, and which columns a number for each.

    The columns hold what broadcasts to the leaves. There is none where leaves differ in
    the axis, or are short.
    """
    number = params[0].shape[0] if params[0].ndim else 0
    if number * len(params) * _FEW > sum(map(Tensor.numel, params)):
        return 0, []
    if not all(p.shape[:1] == (number,) and p.is_contiguous() for p in params):
        return 0, []
    found = [
        k
        for k, column in enumerate(columns)
        if all(
            x.numel() == number and x.shape[:1] == (number,) and x.ndim == p.ndim
            for x, p in zip(column, params)
        )
        and all(x.is_contiguous() and not is_lazy(x) for x in column)
    ]
    return (number, found) if found else (0, [])


def is_lazy(x: Tensor) -> bool:
    """Whether the memory does not hold the values: torch's own zeros and negatives."""
    return x.is_neg() or x._is_zerotensor()


def overlap(columns: Sequence[Sequence[Tensor]]) -> bool:
    """Whether two of the tensors share memory."""
    spans = _spans(columns)
    return any(end > begin for (_, end), (begin, _) in zip(spans, spans[1:]))


def meets(some: Iterable[Tensor], columns: Sequence[Sequence[Tensor]]) -> bool:
    """Whether one of some tensors shares memory with the columns, whose are apart."""
    spans = _spans(columns)
    for x in some:
        before = bisect_left(spans, (x.data_ptr() + extent(x),))
        if before and spans[before - 1][1] > x.data_ptr() and x.numel():
            return True
    return False


def _spans(columns: Sequence[Sequence[Tensor]]) -> list[tuple[int, int]]:
    """Where in memory the tensors begin and end, in order; not those without any."""
    return sorted(
        (x.data_ptr(), x.data_ptr() + size)
        for column in columns
        for x in column
        if (size := extent(x))
    )


def folded(columns: Sequence[Sequence[Tensor]]) -> bool:
    """Whether an element of a tensor may stand for several, as after ``expand``."""
    return any(not x.is_contiguous() and _folds(x) for c in columns for x in c)


def _folds(x: Tensor) -> bool:
    reach = 0
    for stride, n in sorted((s, n) for s, n in zip(x.stride(), x.shape) if n > 1):
        if stride <= reach:
            return True
        reach += (n - 1) * stride
    return False


def extent(x: Tensor) -> int:
    """The bytes from the first element to behind the last; none of what has no values."""
    if x.is_meta or isinstance(x, FakeTensor):
        return 0
    if x.is_contiguous() or not x.numel():
        return x.nbytes
    reach = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride()))
    return (reach + 1) * x.element_size()
