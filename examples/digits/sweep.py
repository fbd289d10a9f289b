"""A sweep of learning rates: every optimizer has the same loop, and its own best rate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from digits.data import Digits, seeded
from funcopt import torch_optim as optim

OPTIMIZERS = {
    "SGD, momentum 0.9": (optim.SGD, {"momentum": 0.9}),
    "AdamW": (optim.AdamW, {}),
    "Lion": (optim.Lion, {}),
    "LAMB": (optim.LAMB, {}),
}
CHANCE = 2.302585  # the cross-entropy of a guess among ten


class Point(NamedTuple):
    """A training."""

    optimizer: str
    lr: float
    loss: float  #: on the test digits, at the end; infinite where it diverged


def sweep(
    training: Digits, test: Digits, rates: Sequence[float], *, steps: int, seed: int
) -> list[Point]:
    """A small network at each rate, from the same weights on the same batches."""
    found = []
    pairs = [(name, lr) for name in OPTIMIZERS for lr in rates]
    for name, lr in tqdm(pairs, desc="sweep of rates", leave=False):
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Flatten(),
            nn.Linear(64, 64),
            nn.LayerNorm(64),
            nn.GELU(),
            nn.Linear(64, 10),
        )
        cls, more = OPTIMIZERS[name]
        optimizer = cls(net.parameters(), lr=lr, **more)
        rows = torch.randint(len(training.y), (steps, 64), generator=seeded(seed))
        for each in rows:
            optimizer.zero_grad()
            F.cross_entropy(net(training.x[each]), training.y[each]).backward()
            optimizer.step()
        with torch.no_grad():
            loss = F.cross_entropy(net(test.x), test.y).item()
        found.append(Point(name, lr, loss if loss == loss else float("inf")))
    return found


def best(points: Sequence[Point]) -> dict[str, Point]:
    """Of each optimizer."""
    return {
        name: min((p for p in points if p.optimizer == name), key=lambda p: p.loss)
        for name in dict.fromkeys(p.optimizer for p in points)
    }
