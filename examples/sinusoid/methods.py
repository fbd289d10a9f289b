"""The network, and the families of ``fo.meta`` that meta-train it.

θ is what is meta-learned: the weights from which a task is learned, and for two of the
methods, under ``lr`` beside ``params``, the rates at which.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

import funcopt as fo
from sinusoid.waves import Points

Params: TypeAlias = dict[str, Tensor]
Theta: TypeAlias = dict[str, Any]
LossFunction: TypeAlias = Callable[..., Any]

WIDTHS = 1, 40, 40, 1
LAYERS = range(1, len(WIDTHS))


class Method(NamedTuple):
    """One of the families, and how many inner steps it is trained with."""

    family: str  #: its name in ``fo.meta``
    lr: float  #: of the inner steps, or where learned rates start from
    steps: int

    @property
    def title(self) -> str:
        return TITLES[self.family]


TITLES = {"maml": "MAML", "metasgd": "Meta-SGD", "lslr": "LSLR"}
STEPS = {"maml": 1, "metasgd": 1, "lslr": 3}


def family(method: Method, loss: LossFunction, **options: Any) -> fo.meta.Family:
    """The inner loop on that loss, by plain gradient descent."""
    inner = fo.sgd(lr=method.lr)
    return getattr(fo.meta, method.family)(loss, inner, steps=method.steps, **options)


def predictions(
    method: Method, theta: Theta, support: Points, x: Tensor, steps: int
) -> Tensor:
    """What the network says at ``x`` after 0, 1, ..., ``steps`` steps on one task.

    ``x`` is [points, 1], the result [steps + 1, points, 1].
    """

    def loss(params: Params, batch: Points) -> tuple[Tensor, Tensor]:
        return mse(params, batch), network(params, x)

    # A step's aux is of the weights before it: one step more shows those after the last.
    watched = family(method, loss, has_aux=True)
    return fo.meta.adapt(watched, theta, support, steps=steps + 1).aux


def network(params: Params, x: Tensor) -> Tensor:
    """A fully connected ReLU network: [points, 1] → [points, 1]."""
    for layer in LAYERS:
        x = F.relu(x) if layer > 1 else x
        x = F.linear(x, params[f"weight{layer}"], params[f"bias{layer}"])
    return x


def mse(params: Params, points: Points) -> Tensor:
    """The mean squared error of the network on some points."""
    return F.mse_loss(network(params, points.x), points.y)


def initial(generator: torch.Generator) -> Params:
    """Fresh weights and biases, uniform on ±1/√inputs as in ``torch.nn.Linear``."""
    params: Params = {}
    for layer, inputs, outputs in zip(LAYERS, WIDTHS, WIDTHS[1:]):
        for name, shape in ("weight", (outputs, inputs)), ("bias", (outputs,)):
            unit = 2 * torch.rand(shape, generator=generator) - 1
            params[f"{name}{layer}"] = unit / inputs**0.5
    return params
