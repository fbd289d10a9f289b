"""How well θ learns tasks of classes never seen."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import vmap

import funcopt as fo
from fewshot.episodes import Episodes, Tasks
from fewshot.methods import Apply, Theta, accuracy


class Estimate(NamedTuple):
    """A mean over tasks and the half-width of its 95 % interval, in [0, 1]."""

    mean: float
    margin: float

    def __str__(self) -> str:
        return f"{100 * self.mean:.2f} % ± {100 * self.margin:.2f}"


def estimate(samples: Tensor) -> Estimate:
    """From independent samples ``[n]``, n ≥ 2, by the normal approximation."""
    margin = 1.96 * samples.std() / len(samples) ** 0.5
    return Estimate(float(samples.mean()), float(margin))


def evaluate(
    method: fo.meta.Family, apply: Apply, theta: Theta, episodes: Episodes, tasks: int
) -> tuple[Estimate, Estimate]:
    """The accuracy on query images before and after adaptation to the support images.

    Batch norm is transductive, as in Finn et al. (2017): it takes its statistics from
    all of a task's query images together.
    """

    def accuracies(task: Tasks) -> Tensor:
        both = predict(method, apply, theta, task)
        return torch.stack([accuracy(logits, task.query.y) for logits in both])

    together = 20  # tasks in one batch, to bound the memory
    sizes = [together] * (tasks // together) + [tasks % together] * (tasks % together > 0)
    results = torch.cat([vmap(accuracies)(episodes.sample(size)) for size in sizes])
    before, after = (estimate(column) for column in results.unbind(1))
    return before, after


def predict(
    method: fo.meta.Family, apply: Apply, theta: Theta, task: Tasks
) -> tuple[Tensor, Tensor]:
    """One task's query logits before and after adaptation."""
    adapted = fo.meta.adapt(method, theta, task.support).params
    return apply(method.params(theta), task.query.x), apply(adapted, task.query.x)
