"""The parameter trees that steps are timed on: shapes, and tensors to fill them."""

from __future__ import annotations

from itertools import pairwise
from typing import TypeAlias

import torch
from torch import Tensor

Shapes: TypeAlias = list[tuple[int, ...]]

_CONV = [(64, 1, 3, 3), (64,), *[(64, 64, 3, 3), (64,)] * 3]
_NORM = [(64,)] * 8

TREES: dict[str, Shapes] = {
    # conv-4 with 64 filters, biases and batch norm's weights; 20 ways: 113,236 parameters
    "Omniglot net": [*_CONV, *_NORM, (20, 64), (20,)],
    # MLP 1-40-40-1: 1,761 parameters
    "small MLP": [(40, 1), (40,), (40, 40), (40,), (1, 40), (1,)],
    # MLP 784-256-128-64-64-20: 246,740 parameters
    "MLP": [
        shape
        for n, m in pairwise((784, 256, 128, 64, 64, 20))
        for shape in ((m, n), (m,))
    ],
    "300 × 4,096": [(64, 64)] * 300,
    "10 M in 10": [(1000, 1000)] * 10,
    "10 M in 2,500": [(4000,)] * 2500,
}


def tensors(shapes: Shapes, *, seed: int, tasks: int = 0) -> list[Tensor]:
    """Standard normal float32 tensors, with an axis of ``tasks`` in front if any."""
    generator = torch.Generator().manual_seed(seed)
    front = (tasks,) if tasks else ()
    return [torch.randn(*front, *shape, generator=generator) for shape in shapes]


def size(shapes: Shapes) -> int:
    """How many parameters there are."""
    return sum(torch.Size(shape).numel() for shape in shapes)
