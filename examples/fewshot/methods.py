"""Six ways to learn to learn: families of ``fo.meta``, on images and their classes.

θ is what is meta-learned. A family's ``adapt`` learns one task from θ and a few images,
by plain gradient descent; the meta-loss of a task is what the adapted network makes of
other images of the same task.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

import funcopt as fo
from fewshot.episodes import Batch, Tasks
from fewshot.nets import Params

Apply: TypeAlias = Callable[[Params, Tensor], Tensor]
Theta: TypeAlias = dict[str, Any]  # the network's parameters, or more beside them


def method(name: str, apply: Apply, steps: int, lr: float) -> fo.meta.Family:
    """The family of that name; ``task_loss`` gives the accuracy beside the loss."""
    options = {"batches": partial(dealt, hands=steps)} if name == "reptile" else {}
    family = getattr(fo.meta, name)
    return family(loss_of(apply), fo.sgd(lr=lr), steps=steps, has_aux=True, **options)


METHODS = {
    name: partial(method, name)
    for name in ("maml", "fomaml", "anil", "metasgd", "lslr", "reptile")
}


def loss_of(apply: Apply) -> Callable[[Params, Batch], tuple[Tensor, Tensor]]:
    """The mean cross-entropy of a batch, and the accuracy."""

    def loss(params: Params, batch: Batch) -> tuple[Tensor, Tensor]:
        logits = apply(params, batch.x)
        return F.cross_entropy(logits, batch.y), accuracy(logits, batch.y)

    return loss


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
