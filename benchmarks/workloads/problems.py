"""The meta-learning problems that are timed: a network, its tasks, the inner loop."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workloads import nets


@dataclass(frozen=True)
class Problem:
    """One MAML meta-step: adapt to each task's support set, differentiate the query loss.

    ``tasks`` holds ``x, y`` (support) and ``query_x, query_y``, each with a leading task
    axis. ``repeats`` meta-steps are timed on ``threads`` threads.
    """

    name: str
    net: nn.Module
    apply: nets.Apply
    loss: Callable[[Tensor, Tensor], Tensor]
    tasks: dict[str, Tensor]
    inner: Literal["sgd", "adam"]
    lr: float
    options: dict[str, float]
    steps: int
    threads: int
    repeats: int

    @property
    def count(self) -> int:
        return len(self.tasks["x"])

    @property
    def theta(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self.net.named_parameters()}


def sinusoid(inner: Literal["sgd", "adam"], *, tasks: int = 25, seed: int = 8) -> Problem:
    """MLP 1-40-40-1, 25 sinusoids, 10 + 10 points, 5 steps (Finn et al., 2017).

    The tensors are so small that a second thread would only wait.
    """
    torch.manual_seed(seed)  # for the network, which takes no generator
    generator = torch.Generator().manual_seed(seed)
    net, apply = nets.mlp()
    _awake(net)
    amplitude = 0.1 + 4.9 * torch.rand(tasks, 1, 1, generator=generator)
    phase = math.pi * torch.rand(tasks, 1, 1, generator=generator)
    x = 10 * torch.rand(tasks, 20, 1, generator=generator) - 5
    y = amplitude * torch.sin(x - phase)
    return Problem(
        name=f"sinusoid MLP, {inner}, 5 steps",
        net=net,
        apply=apply,
        loss=F.mse_loss,
        tasks=_split(x, y, support=10),
        inner=inner,
        lr=0.01,
        options={"eps": EPS} if inner == "adam" else {},
        steps=5,
        threads=1,
        repeats=25,
    )


def omniglot(
    steps: int,
    *,
    filters: int = 64,
    tasks: int = 8,
    pool: bool = False,
    seed: int = 3,
) -> Problem:
    """Conv-4, 5-way 1-shot with 15 queries, inner SGD; the images are noise."""
    torch.manual_seed(seed)
    net, apply = nets.conv4(filters, pool=pool)
    name = f"conv-4, {filters} filters, {steps} step{'s' * (steps > 1)}"
    return _few_shot(name, net, apply, steps, tasks, seed)


def mlp_classifier(steps: int, *, tasks: int = 8, seed: int = 3) -> Problem:
    """MLP 784-256-128-64-64-5 with batch norm on the same noise."""
    torch.manual_seed(seed)
    net, apply = nets.mlp_classifier()
    return _few_shot(f"MLP classifier, {steps}", net, apply, steps, tasks, seed)


def _few_shot(
    name: str, net: nn.Module, apply: nets.Apply, steps: int, tasks: int, seed: int
) -> Problem:
    queries = 15
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(5).repeat(1 + queries).expand(tasks, -1)
    classes = torch.randn(tasks, 5, 1, 28, 28, generator=generator)
    images = classes.repeat(1, 1 + queries, 1, 1, 1)
    images = images + torch.randn(images.shape, generator=generator)
    return Problem(
        name=name,
        net=net,
        apply=apply,
        loss=F.cross_entropy,
        tasks=_split(images, labels, support=5),  # the first five: one of each class
        inner="sgd",
        lr=0.1,
        options={},
        steps=steps,
        threads=2,
        repeats=11,
    )


#: higher adds ε before the bias correction, TorchOpt and funcopt after it. The numbers
#: are to be equal, so ε is too small to count.
EPS = 1e-15

#: What `maml.py` measures.
PROBLEMS: dict[str, Callable[[], Problem]] = {
    "sinusoid-sgd": lambda: sinusoid("sgd"),
    "sinusoid-adam": lambda: sinusoid("adam"),
    "conv4-1": lambda: omniglot(1),
    "conv4-5": lambda: omniglot(5),
}


def _awake(net: nn.Module) -> None:
    """Biases by which every unit answers to some point of every task.

    A unit that answers to none has gradient 0 exactly, where TorchOpt's Adam gives NaN.
    """
    weight, bias = (net.get_parameter(f"linear1.{name}") for name in ("weight", "bias"))
    kinks = torch.linspace(-1.0, 1.0, len(bias))
    with torch.no_grad():
        bias.copy_(-weight[:, 0] * kinks)
        net.get_parameter("linear2.bias").fill_(4.0)


def _split(x: Tensor, y: Tensor, *, support: int) -> dict[str, Tensor]:
    return {
        "x": x[:, :support].contiguous(),
        "y": y[:, :support].contiguous(),
        "query_x": x[:, support:].contiguous(),
        "query_y": y[:, support:].contiguous(),
    }
