"""Meta-training, one whole iteration at a time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import funcopt as fo
from fewshot.episodes import Episodes
from fewshot.methods import Theta
from funcopt import tree

# Iteration s counts in the average like s^(TAIL - 1): mostly the last fifth of a run,
# however long that turns out to be.
TAIL = 10


class Progress(NamedTuple):
    """All that the next iteration depends on, and the record of those made."""

    iteration: int  #: how many were made
    seconds: float  #: spent on them
    theta: Theta  #: θ after the last
    average: Theta  #: θ averaged over iterations, late ones most; the result
    state: dict[str, Any]  #: of the outer optimizer
    random: Tensor  #: state of the generator that draws the tasks
    history: Tensor  #: [iterations, 2]: mean loss and accuracy on each one's tasks


def beginning(theta: Theta, outer: fo.Optimizer, tasks: torch.Generator) -> Progress:
    """Before the first iteration."""
    random, history = tasks.get_state(), torch.zeros(0, 2)
    return Progress(0, 0.0, theta, theta, outer.init(theta), random, history)


def iterations(
    method: fo.meta.Family,
    outer: fo.Optimizer,
    episodes: Episodes,
    meta_batch: int,
    progress: Progress,
) -> Iterator[Progress]:
    """Goes on from ``progress`` without end.

    Each Progress is a new value and no earlier one changes: an interrupt may strike
    anywhere, and the last one that came out is whole. It depends on the iteration's
    number and on nothing that a clock says, so a resumed run repeats the uninterrupted
    one bit for bit, also where time limits it. That is why the learning rate is constant:
    to be at zero when the time is up, a decay has to watch the clock. Averaging θ does
    what the decay is for (Polyak, Juditsky, 1992; the weights: Shamir, Zhang, 2013).
    """
    # "auto" loops over convolutions this wide; with strides they are faster batched.
    gradient = fo.meta.value_and_grad(method.task_loss, tasks="vmap", has_aux=True)
    episodes.generator.set_state(progress.random)
    while True:
        began = time.perf_counter()
        tasks = episodes.sample(meta_batch)
        (loss, accuracies), grads = gradient(progress.theta, tasks)
        theta, state = outer.update(grads, progress.state, progress.theta)
        weight = TAIL / (progress.iteration + TAIL)
        row = torch.stack([loss, accuracies.mean()]).cpu()
        progress = Progress(
            iteration=progress.iteration + 1,
            seconds=progress.seconds + time.perf_counter() - began,
            theta=theta,
            average=tree.map(partial(torch.lerp, weight=weight), progress.average, theta),
            state=state,
            random=episodes.generator.get_state(),
            history=torch.cat([progress.history, row[None]]),
        )
        yield progress
