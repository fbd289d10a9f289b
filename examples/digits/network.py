"""A small convolutional network, and its parameters in groups."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from digits.data import Digits


class Network(nn.Module):
    """A backbone of two convolutions and a linear head."""

    def __init__(self, classes: int, dropout: float = 0.2) -> None:
        super().__init__()
        layers = {
            "conv1": nn.Conv2d(1, 16, 3, padding=1),
            "norm1": nn.GroupNorm(4, 16),
            "act1": nn.GELU(),
            "conv2": nn.Conv2d(16, 32, 3, stride=2, padding=1),
            "norm2": nn.GroupNorm(4, 32),
            "act2": nn.GELU(),
            "flat": nn.Flatten(),
            "dropout": nn.Dropout(dropout),
        }
        self.backbone = nn.Sequential(OrderedDict(layers))
        self.head = nn.Linear(512, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))


def decays(name: str) -> bool:
    """Weights decay; biases, and the scales of norms, do not."""
    return "norm" not in name and not name.endswith("bias")


def groups(
    net: nn.Module, lr: float, backbone: float = 1.0, weight_decay: float = 0.05
) -> list[dict[str, Any]]:
    """Four groups of named parameters: each part, with decay and without.

    The backbone's learning rate is ``backbone`` times the head's.
    """
    found = []
    for part, rate in ("backbone", lr * backbone), ("head", lr):
        mine = [(n, p) for n, p in net.named_parameters() if n.startswith(part)]
        for decaying, decay in (True, weight_decay), (False, 0.0):
            params = [(n, p) for n, p in mine if decays(n) is decaying]
            found.append({"params": params, "lr": rate, "weight_decay": decay})
    return found


def accuracy(net: nn.Module, data: Digits) -> float:
    """Without dropout; the mode of the network is left as it was."""
    before = net.training
    right = net.eval()(data.x).argmax(1) == data.y
    net.train(before)
    return right.float().mean().item()


def cross_entropy(net: nn.Module, data: Digits) -> Tensor:
    return F.cross_entropy(net(data.x), data.y)
