"""Two habits of training loops, measured: zeros for gradients, and micro-batches."""

from __future__ import annotations

from copy import deepcopy

import torch

from digits.data import Digits
from digits.network import Network, cross_entropy, groups
from digits.training import distance
from funcopt import torch_optim as optim


def moved_while_frozen(data: Digits, *, set_to_none: bool, steps: int = 20) -> float:
    """How far a backbone goes in steps that give it no gradient.

    It trains for a step, so that there is momentum, and then is frozen. Without a
    gradient it stays; a gradient of zeros is one, and momentum and decay go on.
    """
    torch.manual_seed(0)
    net = Network(10)
    optimizer = optim.AdamW(groups(net, lr=1e-2))
    batch = data.rows(slice(32))
    cross_entropy(net, batch).backward()
    optimizer.step()
    net.backbone.requires_grad_(False)
    before = deepcopy(net.backbone)
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=set_to_none)
        cross_entropy(net, batch).backward()
        optimizer.step()
    return distance(net.backbone, before)


def accumulated_against_whole(data: Digits, *, parts: int = 4, steps: int = 10) -> float:
    """The largest difference of parameters after steps on the same images, in float64."""
    torch.manual_seed(0)
    first = Network(10, dropout=0.0).double()  # which would draw other masks
    nets = first, deepcopy(first)
    for net, count in zip(nets, (1, parts)):
        optimizer = optim.AdamW(groups(net, lr=4e-3))
        for step in range(steps):
            optimizer.zero_grad()
            rows = slice(32 * step, 32 * (step + 1))
            for micro in range(count):
                batch = Digits(*(part[rows].chunk(count)[micro] for part in data))
                batch = Digits(batch.x.double(), batch.y)
                (cross_entropy(net, batch) / count).backward()
            optimizer.step()
    return distance(*nets)
