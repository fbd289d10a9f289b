"""What `finetune_then_differentiate.py` has found, in one picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from torch import Tensor

from digits.handover import Checked, LeftOut, Task
from digits.picture import PALE, picture_of
from style import COLOURS, FAINT, INK, STYLE

RIGHT, WRONG = COLOURS[0], COLOURS[2]
Curve = Sequence[tuple[int, float]]


class Shown(NamedTuple):
    task: Task
    slopes: Tensor  #: of the clean loss by the examples' weights
    losses: Tensor  #: of the examples
    checks: Sequence[Checked]
    left_out: Sequence[LeftOut]
    start: Curve
    curves: Mapping[str, Curve]
    steps: int


def save(path: Path, shown: Shown) -> None:
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(11, 6.8), layout="constrained")
        (upper,), (lower,) = figure.subfigures(2, 1, squeeze=False, hspace=0.05)
        left, right = upper.subplots(1, 2, width_ratios=[6, 4])
        ways(left, shown)
        predicted(right, shown.left_out)
        ((left, middle, right),) = lower.subfigures(
            1, 3, squeeze=False, width_ratios=[3.3, 3.3, 3.4]
        )
        slopes(left.subplots(), shown)
        differences(middle.subplots(), shown.checks)
        most_harmful(right, shown)
        figure.savefig(path)


def ways(axes: Axes, shown: Shown) -> None:
    """One way in, three out."""
    steps, values = zip(*shown.start)
    axes.plot(steps, [100 * v for v in values], color=INK)
    begin = steps[-1]
    axes.axvspan(begin, begin + shown.steps, color=PALE, alpha=0.35, lw=0)
    axes.text(
        begin + shown.steps / 2, 0.02, "differentiated", ha="center", color=FAINT, size=8,
        transform=axes.get_xaxis_transform(),
    )  # fmt: skip
    for (way, curve), colour in zip(shown.curves.items(), (FAINT, COLOURS[1], WRONG)):
        joined = [shown.start[-1], *curve] if curve[0] != shown.start[-1] else curve
        steps, values = zip(*joined)
        style = ":" if "only" in way else "-"
        axes.plot(steps, [100 * v for v in values], color=colour, ls=style, label=way)
    share = 100 * shown.task.wrong.double().mean()
    axes.set(
        title=f"test accuracy, %, trained on {share:.0f} % wrong labels", xlabel="step"
    )
    axes.legend(loc="center right")


def predicted(axes: Axes, left_out: Sequence[LeftOut]) -> None:
    """What the hypergradient says against what comes of it."""
    for wrong, colour, word in (
        (False, RIGHT, "right label"),
        (True, WRONG, "wrong label"),
    ):
        some = [each for each in left_out if each.wrong is wrong]
        axes.scatter(
            [1e3 * each.predicted for each in some],
            [1e3 * each.actual for each in some],
            s=16, color=colour, alpha=0.7, lw=0, label=word,
        )  # fmt: skip
    ends = [1e3 * each.predicted for each in left_out]
    axes.plot(
        [min(ends), max(ends)], [min(ends), max(ends)], color=FAINT, lw=0.8, zorder=0
    )
    axes.set(title="change of the clean loss without one example, ×10⁻³")
    axes.set(xlabel="predicted by its hypergradient", ylabel="trained without it")
    axes.legend(loc="upper left")


def slopes(axes: Axes, shown: Shown) -> None:
    """Both scores, for examples of both kinds."""
    for wrong, colour in (False, RIGHT), (True, WRONG):
        which = shown.task.wrong == wrong
        axes.scatter(
            shown.losses[which].tolist(), (1e3 * shown.slopes[which]).tolist(),
            s=12, color=colour, alpha=0.6, lw=0,
        )  # fmt: skip
    axes.axhline(0, color=FAINT, lw=0.8)
    axes.set(title="hypergradient of an example's weight, ×10⁻³")
    axes.set(xlabel="the example's training loss", xscale="log")


def differences(axes: Axes, checks: Sequence[Checked]) -> None:
    """Sizes over many decades, on the line where both are equal."""
    sizes = [abs(c.difference) for c in checks]
    low, high = 0.3 * min(sizes), 3 * max(sizes)
    axes.plot([low, high], [low, high], color=FAINT, lw=0.8, zorder=0)
    for start, colour, word in (
        ("weights", COLOURS[0], "an example's weight"),
        ("weight_decay", COLOURS[3], "a group's decay"),
        ("lr", COLOURS[1], "a group's rate"),
    ):
        some = [c for c in checks if c.name.startswith(start + "[")]
        axes.scatter(
            [abs(c.difference) for c in some], [abs(c.hypergradient) for c in some],
            s=22, color=colour, lw=0, label=word,
        )  # fmt: skip
    worst = max(c.error for c in checks)
    axes.text(
        0.97, 0.05, f"largest relative error {worst:.0e}", ha="right", color=FAINT,
        size=8,        transform=axes.transAxes,
    )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="|finite difference|")
    axes.set(title="|hypergradient|")
    axes.legend(loc="upper left")


def most_harmful(figure: SubFigure, shown: Shown) -> None:
    figure.suptitle("the most harmful examples: label given (true)", size=9.5)
    order = shown.slopes.argsort(descending=True).tolist()
    for axes, i in zip(figure.subplots(3, 5).flat, order):
        picture_of(axes, shown.task.training.x[i])
        given, true = int(shown.task.training.y[i]) + 5, int(shown.task.truth[i]) + 5
        colour = WRONG if given != true else RIGHT
        axes.set_title(f"{given} ({true})", size=8, color=colour)
