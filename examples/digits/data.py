"""scikit-learn's digits: 1,797 images of 8 × 8."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import Tensor


class Digits(NamedTuple):
    """Images [n, 1, 8, 8] in [0, 1] and their labels [n]."""

    x: Tensor
    y: Tensor

    def rows(self, which: Tensor | slice) -> Digits:
        return Digits(self.x[which], self.y[which])


def load(seed: int, training: int = 1400) -> tuple[Digits, Digits]:
    """In a random order, some to train on and the others to test on."""
    x, y = (torch.as_tensor(part) for part in load_digits(return_X_y=True))
    order = torch.randperm(len(y), generator=seeded(seed))
    data = Digits(x.float().view(-1, 1, 8, 8)[order] / 16, y[order])
    return data.rows(slice(training)), data.rows(slice(training, None))


def only(data: Digits, classes: Sequence[int]) -> Digits:
    """Those of some classes, which are called 0, 1, ... in their order."""
    which = torch.isin(data.y, torch.tensor(classes))
    labels = torch.searchsorted(torch.tensor(sorted(classes)), data.y[which])
    return Digits(data.x[which], labels)


def first_of_each(data: Digits, count: int) -> Digits:
    """The first ``count`` of every class."""
    rows = [(data.y == label).nonzero()[:count, 0] for label in data.y.unique()]
    return data.rows(torch.cat(rows))


def mirrored(data: Digits) -> Digits:
    return Digits(data.x.flip(3), data.y)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
