"""The networks, each as a module for the rivals and as a function for funcopt.

Module and function make the same operations in the same order. A function of named
parameters spares ``torch.func.functional_call``, which costs 0.1 ms a call here.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import torch.nn.functional as F
from torch import Tensor, nn

Apply: TypeAlias = Callable[[Mapping[str, Tensor], Tensor], Tensor]


def mlp(width: int = 40) -> tuple[nn.Module, Apply]:
    """Linear layers 1 to width to width to 1, with ReLU between them."""
    net = nn.Sequential(
        OrderedDict(
            linear1=nn.Linear(1, width),
            relu1=nn.ReLU(),
            linear2=nn.Linear(width, width),
            relu2=nn.ReLU(),
            head=nn.Linear(width, 1),
        )
    )

    def apply(p: Mapping[str, Tensor], x: Tensor) -> Tensor:
        x = F.relu(F.linear(x, p["linear1.weight"], p["linear1.bias"]))
        x = F.relu(F.linear(x, p["linear2.weight"], p["linear2.bias"]))
        return F.linear(x, p["head.weight"], p["head.bias"])

    return net, apply


def mlp_classifier(
    widths: Sequence[int] = (784, 256, 128, 64, 64), *, ways: int = 5
) -> tuple[nn.Module, Apply]:
    """Linear layers, each with affine batch norm and ReLU; a linear head."""
    layers: dict[str, nn.Module] = {"flatten": nn.Flatten()}
    for i, (inputs, outputs) in enumerate(zip(widths, widths[1:]), 1):
        layers[f"linear{i}"] = nn.Linear(inputs, outputs, bias=False)
        layers[f"norm{i}"] = nn.BatchNorm1d(outputs, 1e-3, track_running_stats=False)
        layers[f"relu{i}"] = nn.ReLU()
    layers["head"] = nn.Linear(widths[-1], ways)

    def apply(p: Mapping[str, Tensor], x: Tensor) -> Tensor:
        x = x.flatten(1)
        for i in range(1, len(widths)):
            x = F.linear(x, p[f"linear{i}.weight"])
            weight, bias = p[f"norm{i}.weight"], p[f"norm{i}.bias"]
            x = F.relu(F.batch_norm(x, None, None, weight, bias, training=True, eps=1e-3))
        return F.linear(x, p["head.weight"], p["head.bias"])

    return nn.Sequential(OrderedDict(layers)), apply


def conv4(filters: int, *, ways: int = 5, pool: bool = False) -> tuple[nn.Module, Apply]:
    """Four blocks of 3 × 3 convolution, affine batch norm and ReLU; mean; a linear head.

    Each block halves the image by its stride or, with ``pool``, by max pooling. Batch
    norm always uses the statistics of the batch at hand.
    """
    stride = 1 if pool else 2
    layers: dict[str, nn.Module] = {}
    for i, channels in enumerate((1, filters, filters, filters), 1):
        layers[f"conv{i}"] = nn.Conv2d(
            channels, filters, 3, stride=stride, padding=1, bias=False
        )
        layers[f"norm{i}"] = nn.BatchNorm2d(filters, 1e-3, track_running_stats=False)
        layers[f"relu{i}"] = nn.ReLU()
        if pool:
            layers[f"pool{i}"] = nn.MaxPool2d(2)
    layers["mean"] = nn.AdaptiveAvgPool2d(1)
    layers["flatten"] = nn.Flatten()
    layers["head"] = nn.Linear(filters, ways)

    def apply(p: Mapping[str, Tensor], x: Tensor) -> Tensor:
        for i in range(1, 5):
            x = F.conv2d(x, p[f"conv{i}.weight"], stride=stride, padding=1)
            weight, bias = p[f"norm{i}.weight"], p[f"norm{i}.bias"]
            x = F.batch_norm(x, None, None, weight, bias, training=True, eps=1e-3)
            x = F.relu(x)
            if pool:
                x = F.max_pool2d(x, 2)
        x = F.adaptive_avg_pool2d(x, 1).flatten(1)
        return F.linear(x, p["head.weight"], p["head.bias"])

    return nn.Sequential(OrderedDict(layers)), apply
