"""MAML, Meta-SGD and LSLR: one inner loop, and three answers to "at which rate?".

θ holds what is meta-learned: ``params``, the weights from which a task is learned, and
for two of the methods ``lr``, the rates at which. Both get their gradient through the
inner loop; no method needs more than to say what its rates are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

import funcopt as fo
from sinusoid.waves import Points, Wave

Params: TypeAlias = dict[str, Tensor]
Theta: TypeAlias = dict[str, Any]

WIDTHS = 1, 40, 40, 1
LAYERS = range(1, len(WIDTHS))


class Method(NamedTuple):
    """What is learned beside the weights, and what it means for the inner loop."""

    title: str
    steps: int  #: how many inner steps the method is trained with
    start: Callable[[Params], Theta]  #: θ before training, of a fresh network
    rates: Callable[[Theta, int], Any]  #: θ and a number of steps → sgd's ``lr``


def maml(lr: float, steps: int = 1) -> Method:
    """One fixed rate; only the weights are learned (Finn et al., 2017)."""

    def start(params: Params) -> Theta:
        return {"params": params}

    return Method("MAML", steps, start, lambda theta, k: lr)


def metasgd(lr: float, steps: int = 1) -> Method:
    """Each weight learns a rate of its own (Li et al., 2017)."""

    def start(params: Params) -> Theta:
        rates = {name: torch.full_like(p, lr) for name, p in params.items()}
        return {"params": params, "lr": rates}

    return Method("Meta-SGD", steps, start, lambda theta, k: theta["lr"])


def lslr(lr: float, steps: int = 3) -> Method:
    """Each leaf learns a rate for every step (MAML++, Antoniou et al., 2019)."""

    def start(params: Params) -> Theta:
        rates = {name: p.new_full([steps], lr) for name, p in params.items()}
        return {"params": params, "lr": rates}

    def rates(theta: Theta, k: int) -> Any:
        row = torch.arange(k).clamp(max=steps - 1)  # past the last: the last again
        return fo.per_step({name: rate[row] for name, rate in theta["lr"].items()})

    return Method("LSLR", steps, start, rates)


METHODS: dict[str, Callable[..., Method]] = {
    "maml": maml,
    "metasgd": metasgd,
    "lslr": lslr,
}


def task_loss(method: Method, theta: Theta, task: Wave) -> Tensor:
    """The meta-loss: learn from the support points, then judge the query points."""
    run = fo.unroll(
        fo.sgd(),
        mse,
        theta["params"],
        task.support,
        steps=method.steps,
        hyper={"lr": method.rates(theta, method.steps)},
    )
    return mse(run.params, task.query)


def predictions(
    method: Method, theta: Theta, support: Points, x: Tensor, steps: int
) -> Tensor:
    """What the network says at ``x`` after 0, 1, ..., ``steps`` steps on one task.

    ``x`` is [points, 1], the result [steps + 1, points, 1].
    """

    def loss(params: Params, batch: Points) -> tuple[Tensor, Tensor]:
        return mse(params, batch), network(params, x)

    # A step's aux is of the weights before it: one step more shows those after the last.
    return fo.unroll(
        fo.sgd(),
        loss,
        theta["params"],
        support,
        steps=steps + 1,
        hyper={"lr": method.rates(theta, steps + 1)},
        has_aux=True,
    ).aux


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
