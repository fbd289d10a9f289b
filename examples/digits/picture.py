"""What `training_loop.py` has seen, in one picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from digits import adversaries, sweep
from digits.data import Digits
from digits.training import MAX_NORM, Curves
from style import COLOURS, FAINT, STYLE

BLUE, TEAL, ORANGE, PURPLE = COLOURS[:4]
PALE = "#C3C8CF"


class Shown(NamedTuple):
    whole: Curves
    killed: Curves
    resumed: Curves
    saved_at: int
    tuned: dict[str, list[Curves]]
    remembered: dict[str, float]  #: mean accuracy on digits as they are, in per cent
    points: Sequence[sweep.Point]
    real: Digits
    generator: nn.Module


def save(path: Path, shown: Shown) -> None:
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(11, 6.6), layout="constrained")
        (upper,), (lower,) = figure.subfigures(2, 1, squeeze=False, hspace=0.05)
        resumed, norms, rates = upper.subplots(1, 3, width_ratios=[4, 3, 3])
        killed_and_resumed(resumed, shown)
        clipped(norms, shown.whole)
        rates_of_groups(rates, [*shown.tuned.values()][-1][0])
        left, middle, right = lower.subplots(1, 3, width_ratios=[3.2, 3.4, 3.4])
        fine_tuned(left, shown)
        swept(middle, shown.points)
        drawn(right, shown.real, shown.generator)
        figure.savefig(path)


def killed_and_resumed(axes: Axes, shown: Shown) -> None:
    """The lost steps are made again, as they were."""
    saved, killed = shown.saved_at, len(shown.killed.losses)
    steps = range(1, len(shown.whole.losses) + 1)
    axes.plot(steps, shown.whole.losses, color=PALE, lw=4, label="never killed")
    axes.plot(steps[:killed], shown.killed.losses, color=BLUE, lw=1.1, label="killed")
    axes.plot(
        steps[saved:], shown.resumed.losses[saved:], color=ORANGE, lw=1.1, label="resumed"
    )
    axes.axvline(saved, color=FAINT, lw=0.8, ls=":")
    axes.axvline(killed, color=FAINT, lw=0.8, ls=":")
    low, high = 0.7 * min(shown.whole.losses), 1.3 * max(shown.whole.losses)
    for x, word, side in (saved, "saved ", "right"), (killed, " killed", "left"):
        axes.text(x, high, word, color=FAINT, ha=side, va="top", size=8)
    axes.set(yscale="log", ylim=(low, high), xlabel="step")
    axes.set(title="training loss: killed, and resumed to the bit")
    axes.legend(loc="lower left")


def clipped(axes: Axes, curves: Curves) -> None:
    steps = range(1, len(curves.norms) + 1)
    axes.plot(steps, curves.norms, color=BLUE, lw=1)
    axes.axhline(MAX_NORM, color=ORANGE, lw=1)
    over = [max(norm, MAX_NORM) for norm in curves.norms]
    axes.fill_between(steps, MAX_NORM, over, color=ORANGE, alpha=0.3, lw=0)
    axes.text(len(over), MAX_NORM * 1.06, "clipped to", color=ORANGE, ha="right", size=8)
    axes.set(title="norm of the gradient", xlabel="step", ylim=(0, None))


def rates_of_groups(axes: Axes, curves: Curves) -> None:
    backbone, _, head, _ = zip(*curves.rates)
    steps = range(1, len(head) + 1)
    for rates, colour, word in (head, PURPLE, "head"), (backbone, TEAL, "backbone"):
        axes.plot(steps, rates, color=colour)
        peak = max(rates)
        axes.text(1.1 * (rates.index(peak) + 1), 1.15 * peak, word, color=colour, size=8)
    axes.set(yscale="log", ylim=(max(head) / 1e4, 2 * max(head)), xlabel="step")
    axes.set(title="rates of two groups, one scheduler")


def fine_tuned(axes: Axes, shown: Shown) -> None:
    """The mean over seeds and its range; at the side, what is left of what it knew."""
    for (way, runs), colour in zip(shown.tuned.items(), (FAINT, TEAL, PURPLE)):
        found = 100 * torch.tensor([run.accuracies for run in runs])
        steps = runs[0].tested
        axes.plot(steps, found.mean(0).tolist(), color=colour, label=way)
        low, high = found.amin(0).tolist(), found.amax(0).tolist()
        axes.fill_between(steps, low, high, color=colour, alpha=0.12, lw=0)
        end = 1.05 * steps[-1]
        axes.plot([end], [shown.remembered[way]], color=colour, marker="D", ms=6, lw=0)
    axes.plot(
        [], [], color=FAINT, marker="D", ms=5, lw=0, label="on unmirrored, at the end"
    )
    axes.set(
        title="mirror images, from thirty: accuracy, %", xlabel="step", ylim=(0, 100)
    )
    axes.legend(loc="lower center")


def swept(axes: Axes, points: Sequence[sweep.Point]) -> None:
    """Each optimizer's curve, and its best rate; what diverged is at the top."""
    names = [*dict.fromkeys(p.optimizer for p in points)]
    top = 2 * sweep.CHANCE
    for name, colour in zip(names, COLOURS):
        mine = [p for p in points if p.optimizer == name]
        losses = [min(p.loss, top) for p in mine]
        axes.plot([p.lr for p in mine], losses, color=colour, marker=".", label=name)
        found = sweep.best(mine)[name]
        axes.plot([found.lr], [found.loss], color=colour, marker="o", ms=6)
    axes.axhline(sweep.CHANCE, color=FAINT, lw=0.8, ls=":")
    axes.text(
        min(p.lr for p in points), sweep.CHANCE * 1.05, "chance", color=FAINT, size=8
    )
    axes.set(xscale="log", yscale="log", xlabel="learning rate", ylim=(0.02, top))
    axes.set(title="a sweep of rates: test loss")
    axes.legend(loc="lower center", ncols=2)


def drawn(axes: Axes, real: Digits, generator: nn.Module) -> None:
    """A real digit of each class above, drawn ones below."""
    labels = torch.arange(10)
    first = torch.stack([real.x[real.y == label][0] for label in labels.tolist()])
    rows = [first, *(adversaries.draw(generator, labels, seed) for seed in range(1, 6))]
    edge = 1  # of white between them, and more of it below the real ones
    tiles = [nn.functional.pad(row.view(10, 8, 8), [edge] * 4) for row in rows]
    lines = [torch.cat([*tile], 1) for tile in tiles]
    sheet = torch.cat([lines[0], torch.zeros(3, lines[0].shape[1]), *lines[1:]])
    axes.imshow(sheet.numpy(), cmap="gray_r", vmin=0, vmax=1)
    axes.set(title="digits: real ones (top), and drawn by a generator", xticks=())
    axes.set_yticks(())
    for spine in axes.spines.values():
        spine.set_visible(False)


def picture_of(axes: Axes, image: Tensor) -> None:
    axes.imshow(image.view(8, 8).numpy(), cmap="gray_r", vmin=0, vmax=1)
    axes.set(xticks=(), yticks=())
    for spine in axes.spines.values():
        spine.set(visible=True, color=PALE)
