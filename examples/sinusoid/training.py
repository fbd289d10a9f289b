"""Meta-training on waves, and evaluation on waves never seen."""

from __future__ import annotations

import math
import time
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor
from torch.nn.utils import get_total_norm
from tqdm import tqdm

import funcopt as fo
from sinusoid import methods, waves
from sinusoid.methods import Method, Theta

INNER_LR = 0.01  # MAML's rate, and where the learned ones start
META_BATCH = 25  # tasks in one meta-gradient
QUERIES = 10  # points of a task that judge the adapted network
OUTER_LR = {"params": 3e-3, "lr": 1e-3}  # Adam's; both fall to 0 along a cosine
MAX_NORM = 10.0  # of the meta-gradient, which is huge where a task nearly diverges


class Budget(NamedTuple):
    """How long to train a method; the limit that is reached first counts."""

    iterations: int | None
    seconds: float | None = None

    def spent(self, iterations: int, seconds: float) -> float:
        """The fraction that is used up, 1 at the end."""
        by_iterations = iterations / self.iterations if self.iterations else 0.0
        by_time = seconds / self.seconds if self.seconds else 0.0
        return min(max(by_iterations, by_time), 1.0)


class Outcome(NamedTuple):
    """A method after meta-training."""

    method: Method
    theta: Theta
    losses: list[float]  #: the meta-loss of each iteration
    skipped: int  #: iterations that made no step: the meta-gradient was not finite
    seconds: float


def train(method: Method, shots: int, seed: int, budget: Budget) -> Outcome:
    """Meta-trains; for one seed, all methods meet the same weights and tasks."""
    generator = torch.Generator().manual_seed(seed)
    family = methods.family(method, methods.mse)
    theta = family.init(methods.initial(generator))
    outer = fo.adam()
    state = outer.init(theta)
    meta_loss = fo.meta.value_and_grad(family.task_loss, compile="trace")
    losses: list[float] = []
    skipped, seconds, started = 0, 0.0, time.perf_counter()
    with tqdm(desc=method.title, total=budget.iterations) as bar:
        while (spent := budget.spent(len(losses), seconds)) < 1:
            tasks = waves.sample(META_BATCH, shots, QUERIES, generator)
            loss, grads = meta_loss(theta, tasks)
            norm = total_norm(grads)
            if norm.isfinite():
                grads = scaled(grads, (MAX_NORM / norm).clamp(max=1))
                anneal = (1 + math.cos(math.pi * spent)) / 2
                lr = {
                    part: anneal * OUTER_LR.get(part, OUTER_LR["params"])
                    for part in theta
                }
                theta, state = outer.update(grads, state, theta, lr=lr)
            else:
                skipped += 1
            losses.append(loss.item())
            seconds = time.perf_counter() - started
            bar.update()
            if len(losses) % 100 == 0:
                bar.set_postfix_str(f"MSE {torch.tensor(losses[-100:]).median():.2f}")
    return Outcome(method, theta, losses, skipped, seconds)


def predict(outcome: Outcome, tasks: waves.Wave, x: Tensor, steps: int) -> Tensor:
    """Predictions at x [tasks, points, 1] after 0, 1, ... ``steps`` inner steps.

    Returns [tasks, steps + 1, points, 1].
    """

    def one(support: waves.Points, x: Tensor) -> Tensor:
        return methods.predictions(outcome.method, outcome.theta, support, x, steps)

    return torch.func.vmap(one)(tasks.support, x)


def evaluate(outcome: Outcome, tasks: waves.Wave, steps: int) -> Tensor:
    """Mean squared errors [tasks, steps + 1] at the query points."""
    y = predict(outcome, tasks, tasks.query.x, steps)
    return (y - tasks.query.y[:, None]).square().mean((2, 3))


def total_norm(grads: Any) -> Tensor:
    return get_total_norm(optree.tree_leaves(grads))


def scaled(grads: Any, factor: Tensor) -> Any:
    return optree.tree_map(lambda g: g * factor, grads)
