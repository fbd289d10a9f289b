"""The comparison in one picture: fitted waves above, numbers below."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from sinusoid.methods import LAYERS
from sinusoid.report import label, mean_and_interval
from sinusoid.training import INNER_LR, Outcome, predict
from sinusoid.waves import DOMAIN, Points, Wave
from style import COLOURS, INK, STYLE

SHOWN = 4  # waves
WORST = 4.0  # errors above this leave the picture
TRUTH = "#C3C8CF"


def save(
    path: Path, outcomes: Sequence[Outcome], errors: Sequence[Tensor], tasks: Wave
) -> None:
    """Draws some waves fitted by each method; training, more steps, learned rates."""
    with mpl.rc_context(STYLE):
        heights = [1.6 * len(outcomes) + 0.6, 3.0]
        figure = Figure(figsize=(10, sum(heights)), layout="constrained")
        (upper,), (lower,) = figure.subfigures(
            2, 1, squeeze=False, height_ratios=heights, hspace=0.04
        )
        waves = small_to_large(tasks)
        grid = upper.subplots(
            len(outcomes), len(waves.query.x), sharex=True, sharey="col", squeeze=False
        )
        for row, outcome, colour in zip(grid, outcomes, cycle(COLOURS)):
            fitted_waves(row, outcome, waves, colour)
        legend = upper.legend(*grid[0, 0].get_legend_handles_labels(), ncols=4)
        for line in legend.get_lines()[1:3]:
            line.set_color(INK)
        for axes, panel in zip(lower.subplots(1, 3), (curves, more_steps, rates)):
            panel(axes, outcomes, errors)
        figure.savefig(path)


def small_to_large(tasks: Wave) -> Wave:
    """A few of the tasks, at even distances when ordered by amplitude."""
    order = tasks.query.y.std(1).flatten().argsort()
    shown = min(SHOWN, len(order))
    pick = order[(torch.arange(shown) + 0.5).div(shown).mul(len(order)).long()]
    return Wave(*(Points(part.x[pick], part.y[pick]) for part in tasks))


def fitted_waves(row: Sequence[Axes], outcome: Outcome, tasks: Wave, colour: str) -> None:
    """A method on each wave: before, on the way, and after its last inner step."""
    order = tasks.query.x.argsort(1)
    x, truth = (part.gather(1, order) for part in tasks.query)
    steps = outcome.method.steps
    y = predict(outcome, tasks, x, steps)
    for i, axes in enumerate(row):
        axes.plot(x[i], truth[i], color=TRUTH, lw=4, label="the wave")
        axes.plot(x[i], y[i, 0], color=colour, lw=1, ls=":", label="before")
        for k in range(1, steps):
            axes.plot(x[i], y[i, k], color=colour, lw=0.8, alpha=0.2 + 0.3 * k / steps)
        axes.plot(x[i], y[i, steps], color=colour, lw=1.8, label="after its last step")
        support = tasks.support
        axes.plot(
            support.x[i], support.y[i], "o", ms=4.5, mfc="white", mec=INK, label="given"
        )
        axes.set(xlim=DOMAIN, xticks=(-5, 0, 5))
        reach = max(1.35 * truth[i].abs().max().item(), 2.6)  # the start reaches 2
        axes.set_ylim(-reach, reach)
    row[0].set_title(label(outcome.method), color=colour, weight="bold")


def curves(axes: Axes, outcomes: Sequence[Outcome], errors: Sequence[Tensor]) -> None:
    """The meta-loss while training, smoothed by medians of 2 % of the iterations."""
    for outcome, colour in zip(outcomes, cycle(COLOURS)):
        losses = torch.tensor(outcome.losses)
        bins = losses.split(max(len(losses) // 50, 1))
        ends = torch.tensor([len(part) for part in bins]).cumsum(0)
        axes.plot(ends, [part.median() for part in bins], color=colour, lw=1.4)
    axes.set(title="Meta-training", xlabel="iteration", ylim=(0, WORST))
    axes.set_ylabel("mean squared error")


def more_steps(axes: Axes, outcomes: Sequence[Outcome], errors: Sequence[Tensor]) -> None:
    """The error on held-out waves, up to the trained number of steps and beyond."""
    for outcome, error, colour in zip(outcomes, errors, cycle(COLOURS)):
        mean, half = torch.tensor(
            [mean_and_interval(e) for e in error.unbind(1)], dtype=torch.float64
        ).T
        steps, trained = torch.arange(len(mean)), outcome.method.steps
        calm = half < mean  # elsewhere a few diverging tasks make the mean
        low, high = mean - half, mean + half
        axes.fill_between(steps, low, high, where=calm, color=colour, alpha=0.2, lw=0)
        axes.plot(steps, mean, color=colour, lw=1.4, label=label(outcome.method))
        axes.plot(trained, mean[trained], "o", color=colour, ms=5)
    axes.set(title="Held-out waves (dot: as trained)", xlabel="inner steps")
    axes.set_ylim(0, WORST)
    axes.legend()


def rates(axes: Axes, outcomes: Sequence[Outcome], errors: Sequence[Tensor]) -> None:
    """The learned rates: Meta-SGD's of each weight, LSLR's of each leaf and step."""
    generator = torch.Generator().manual_seed(0)
    for outcome, colour in zip(outcomes, cycle(COLOURS)):
        for row, (name, rate) in enumerate(outcome.theta.get("lr", {}).items()):
            values = rate.flatten()
            if rate.shape != outcome.theta["params"][name].shape:
                x = row + torch.linspace(-0.3, 0.3, len(values))
                axes.plot(x, values, "o-", color=colour, ms=4, lw=1, zorder=3)
            else:
                x = row + 0.6 * torch.rand(len(values), generator=generator) - 0.3
                axes.plot(x, values, ".", color=colour, ms=3, alpha=0.5, mew=0)
    axes.axhline(INNER_LR, color=COLOURS[0], lw=1, zorder=0)
    leaves = [f"{kind}{layer}" for layer in LAYERS for kind in ("W", "b")]
    axes.set_xticks(range(len(leaves)), leaves)
    axes.set_yscale("symlog", linthresh=INNER_LR)
    axes.set_title("Learned rates (line: MAML's)")
