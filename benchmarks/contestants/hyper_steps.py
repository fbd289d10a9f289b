"""Hypergradients: forward mode of long trainings, and an outer step of learned rates."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import funcopt as fo

FEATURES, CLASSES, EXAMPLES = 100, 5, 100
START = {"lr": 0.2, "l2": -4.0}

Data = Mapping[str, Tensor]


def data(dtype: torch.dtype = torch.float32) -> Data:
    """A softmax regression that only the first half of the features has to do with."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    truth = random(FEATURES, CLASSES)
    truth[FEATURES // 2 :] = 0
    x, query_x = random(EXAMPLES, FEATURES), random(EXAMPLES, FEATURES)
    noise = [3 * random(EXAMPLES, CLASSES) for _ in range(2)]
    y, query_y = ((z @ truth + n).argmax(-1) for z, n in zip((x, query_x), noise))
    return {"x": x, "y": y, "query_x": query_x, "query_y": query_y}


def inner(w: Tensor, given: Data, l2: Tensor) -> Tensor:
    """Cross entropy and penalties; ``l2`` holds logarithms, one for a group of rows."""
    decay = l2.exp().repeat_interleave(FEATURES // len(l2)).unsqueeze(1)
    return F.cross_entropy(given["x"] @ w, given["y"]) + 0.5 * (decay * w * w).sum()


def outer(w: Tensor, given: Data, l2: Any = None) -> Tensor:
    return F.cross_entropy(given["query_x"] @ w, given["query_y"])


def forward_mode(groups: int, steps: int) -> Callable[[], Any]:
    """The exact derivative by as many penalties, carried along with the training."""
    given = data()
    problem = fo.meta.Problem(
        fo.sgd(lr=START["lr"], momentum=0.9),
        inner,
        outer,
        steps=steps,
        params=torch.zeros(FEATURES, CLASSES),
        batch=given,
        outer_batch=given,
    )
    eta = {"meta": torch.full((groups,), START["l2"])}
    return lambda: fo.meta.forward(problem, eta)


# One outer step of a rate for each step and a penalty for each feature ------------------


def start_of(steps: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {
        "lr": torch.full((steps,), START["lr"], dtype=dtype),
        "l2": torch.full((FEATURES,), START["l2"], dtype=dtype),
    }


OuterStep = Callable[[], tuple[Tensor, dict[str, Tensor]]]


def with_funcopt(
    steps: int, given: Data, eta: dict[str, Tensor], *, compile: bool = False
) -> OuterStep:
    opt = fo.sgd()
    zero = given["x"].new_zeros(FEATURES, CLASSES)
    task = {name: values.unsqueeze(0) for name, values in given.items()}

    def task_loss(eta: Any, given: Any) -> Tensor:
        hyper = {"lr": fo.per_step(eta["lr"])}
        run = fo.unroll(opt, inner, zero, given, steps=steps, hyper=hyper, meta=eta["l2"])
        return outer(run.params, given)

    value_and_grad = fo.meta.value_and_grad(task_loss, compile=compile)
    return lambda: value_and_grad(eta, task)


def by_recomputation(steps: int, given: Data, eta: dict[str, Tensor]) -> OuterStep:
    """As hypertorch's `reverse`: keep the iterates, and go back through one step each."""

    def step(w: Tensor, lr: Tensor, l2: Tensor) -> Tensor:
        return w - lr * torch.autograd.grad(inner(w, given, l2), w, create_graph=True)[0]

    def outer_step() -> tuple[Tensor, dict[str, Tensor]]:
        lrs = [x.detach().requires_grad_() for x in eta["lr"]]
        l2 = eta["l2"].detach().requires_grad_()
        iterates = [given["x"].new_zeros(FEATURES, CLASSES)]
        for lr in lrs:
            w = iterates[-1].requires_grad_()
            iterates.append(step(w, lr, l2).detach())
        last = iterates[-1].requires_grad_()
        value = outer(last, given)
        (cotangent,) = torch.autograd.grad(value, last)
        total, rates = torch.zeros_like(l2), []
        for w, lr in zip(reversed(iterates[:-1]), reversed(lrs)):
            w = w.detach().requires_grad_()
            cotangent, rate, penalty = torch.autograd.grad(
                step(w, lr, l2), (w, lr, l2), cotangent
            )
            rates.append(rate)
            total += penalty
        return value.detach(), {"lr": torch.stack(rates[::-1]), "l2": total}

    return outer_step
