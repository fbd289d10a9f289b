"""Six ways to learn to learn, each a few lines on funcopt's parts.

θ is what is meta-learned. ``adapt`` learns one task from θ and a few images, by plain
gradient descent; the meta-loss of a task is what the adapted network makes of other
images of the same task.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

import funcopt as fo
from fewshot.episodes import Batch, Tasks
from fewshot.nets import Params

Apply: TypeAlias = Callable[[Params, Tensor], Tensor]
Theta: TypeAlias = dict[str, Any]  # the network's parameters, or more beside them


class Method(NamedTuple):
    """What is learned across tasks, and how a task is learned from it."""

    start: Callable[[Params], Theta]  #: θ before meta-training, of a fresh network
    adapt: Callable[[Theta, Batch], Params]  #: θ and one task's support → its network
    task_loss: Callable[[Theta, Tasks], tuple[Tensor, Tensor]]  #: → loss, accuracy
    params: Callable[[Theta], Params] = lambda theta: theta  #: the unadapted network


def maml(apply: Apply, steps: int, lr: float) -> Method:
    """θ is where gradient descent starts; its gradient is exact (Finn et al., 2017)."""
    inner = fo.sgd(lr=lr)

    def adapt(theta: Theta, support: Batch) -> Params:
        return fo.unroll(inner, loss_of(apply), theta, support, steps=steps).params

    return Method(as_it_is, adapt, after(adapt, apply))


def fomaml(apply: Apply, steps: int, lr: float) -> Method:
    """MAML without second derivatives (Finn et al., 2017, section 5.2)."""
    inner = fo.sgd(lr=lr)

    def adapt(theta: Theta, support: Batch) -> Params:
        return fo.unroll(
            inner,
            loss_of(apply),
            theta,
            support,
            steps=steps,
            grad_mode="first_order",  # each inner gradient counts as a constant
        ).params

    return Method(as_it_is, adapt, after(adapt, apply))


def anil(apply: Apply, steps: int, lr: float) -> Method:
    """Almost no inner loop: only the last layer adapts (Raghu et al., 2020)."""
    inner = fo.sgd(lr=lr)

    def loss(head: Params, batch: Batch, body: Params) -> Tensor:
        return loss_of(apply)(body | head, batch)

    def adapt(theta: Theta, support: Batch) -> Params:
        head = {name: p for name, p in theta.items() if name.startswith("head.")}
        body = {name: p for name, p in theta.items() if name not in head}
        # meta=: no step changes the body, but the meta-gradient reaches it.
        run = fo.unroll(inner, loss, head, support, steps=steps, meta=body)
        return body | run.params

    return Method(as_it_is, adapt, after(adapt, apply))


def metasgd(apply: Apply, steps: int, lr: float) -> Method:
    """Every weight also learns its own learning rate (Li et al., 2017)."""
    inner = fo.sgd()

    def start(params: Params) -> Theta:
        rates = {name: torch.full_like(p, lr) for name, p in params.items()}
        return {"params": params, "rates": rates}

    def adapt(theta: Theta, support: Batch) -> Params:
        return fo.unroll(
            inner,
            loss_of(apply),
            theta["params"],
            support,
            steps=steps,
            hyper={"lr": theta["rates"]},
        ).params

    return Method(start, adapt, after(adapt, apply), network)


def lslr(apply: Apply, steps: int, lr: float) -> Method:
    """A learned rate for each leaf and each step (MAML++, Antoniou et al., 2019)."""
    inner = fo.sgd()

    def start(params: Params) -> Theta:
        rates = {name: p.new_full([steps], lr) for name, p in params.items()}
        return {"params": params, "rates": rates}

    def adapt(theta: Theta, support: Batch) -> Params:
        return fo.unroll(
            inner,
            loss_of(apply),
            theta["params"],
            support,
            steps=steps,
            hyper={"lr": fo.per_step(theta["rates"])},
        ).params

    return Method(start, adapt, after(adapt, apply), network)


def reptile(apply: Apply, steps: int, lr: float) -> Method:
    """θ moves to where the tasks' own training ends (Nichol et al., 2018).

    That training takes a part of all images of a task at each step, the query images
    too: there is no query loss to differentiate.
    """
    inner = fo.sgd(lr=lr)

    def adapt(theta: Theta, support: Batch) -> Params:
        return fo.unroll(inner, loss_of(apply), theta, support, steps=steps).params

    def task_loss(theta: Theta, task: Tasks) -> tuple[Tensor, Tensor]:
        start, parts = fo.detach(theta), dealt(task, steps)
        end = fo.unroll(inner, loss_of(apply), start, batches=parts).params
        # With its end held fixed, the gradient of ½‖θ - θ_K‖² is Reptile's θ - θ_K.
        squares = [(theta[name] - end[name]).square().sum() for name in theta]
        logits = apply(adapt(start, task.support), task.query.x)
        return torch.stack(squares).sum() / 2, accuracy(logits, task.query.y)

    return Method(as_it_is, adapt, task_loss)


METHODS = {f.__name__: f for f in (maml, fomaml, anil, metasgd, lslr, reptile)}


def loss_of(apply: Apply) -> Callable[[Params, Batch], Tensor]:
    """The mean cross-entropy of a batch."""
    return lambda params, batch: F.cross_entropy(apply(params, batch.x), batch.y)


def after(
    adapt: Callable[[Theta, Batch], Params], apply: Apply
) -> Callable[[Theta, Tasks], tuple[Tensor, Tensor]]:
    """The meta-loss: adapt to the support images, then judge the query images."""

    def task_loss(theta: Theta, task: Tasks) -> tuple[Tensor, Tensor]:
        logits = apply(adapt(theta, task.support), task.query.x)
        return F.cross_entropy(logits, task.query.y), accuracy(logits, task.query.y)

    return task_loss


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """The fraction of images whose largest logit is the label's."""
    return (logits.argmax(-1) == labels).to(logits.dtype).mean()


def dealt(task: Tasks, hands: int) -> Batch:
    """All images of a task, class by class, in turns to ``hands`` batches, stacked."""
    x, y = (torch.cat(parts) for parts in zip(*task, strict=True))
    share = math.ceil(len(y) / hands)  # where it does not come out even, some twice
    turns = torch.arange(share * hands, device=y.device).view(share, hands).T % len(y)
    order = y.argsort(stable=True)[turns]
    return Batch(x[order], y[order])


def as_it_is(params: Params) -> Theta:
    return params


def network(theta: Theta) -> Params:
    return theta["params"]
