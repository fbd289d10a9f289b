"""Three panels: what windows do to a derivative, and how fast errors fall."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from estimators.measure import Point
from style import FAINT, INK, STYLE

COLOURS = {
    "reverse": "#33373D",
    "forward": "#8A8F98",
    "truncated": "#3B6FB6",
    "first_order": "#A89A2E",
    "hypergradient_descent": "#C44E6B",
    "weight_update_implicit": "#8E5EA2",
    "pes": "#E07B39",
    "es_single": "#4FA3A5",
    "implicit: cg": "#E07B39",
    "implicit: neumann": "#8E5EA2",
    "implicit: identity": "#C44E6B",
}


def save(
    path: Path,
    balancing: Sequence[Point],
    truth: float,
    rate: Sequence[Point],
    penalties: Sequence[Point],
) -> None:
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(13, 5.4), layout="constrained")
        first, second, third = figure.subplots(1, 3)
        signs(first, balancing, truth)
        errors(second, rate, "A learned rate")
        errors(third, penalties, "Learned penalties of a ridge regression")
        figure.savefig(path)


def signs(axes: Axes, points: Sequence[Point], truth: float) -> None:
    """The derivative against the length of the windows."""
    axes.axhline(0, color=FAINT, linewidth=0.6)
    axes.axhline(truth, color=INK, linewidth=1.0, linestyle=":")
    axes.annotate("the truth", (1, truth), (0, 3), textcoords="offset points")
    for method, some in grouped(points).items():
        if not some[0].setting:
            continue
        x, y = [p.setting for p in some], [p.slope for p in some]
        line, colour = "-" if method == "truncated" else "none", COLOURS[method]
        axes.plot(
            x, y, linestyle=line, marker="o", markersize=5, color=colour, label=method
        )
    axes.set(
        xscale="log",
        xlabel="steps of a window",
        ylabel="derivative of the mean loss",
        title="Influence balancing: short windows mislead",
    )
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3)


def errors(axes: Axes, points: Sequence[Point], title: str) -> None:
    """The error against the setting, the times beside the names.

    An estimator that leaves nothing to choose is a level.
    """
    for method, some in grouped(points).items():
        colour, label = COLOURS[method], f"{method}, {milliseconds(some)}"
        x, y = [p.setting for p in some], [p.error for p in some]
        if len(some) > 1:
            size = 8 if method == "truncated" else 4  # a line may lie on it
            axes.plot(x, y, marker="o", markersize=size, color=colour, label=label)
        else:
            axes.axhline(y[0], linestyle="--", linewidth=1.2, color=colour, label=label)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="steps looked back, products, or pairs of particles",
        ylabel="relative error",
        title=title,
    )
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)


def milliseconds(points: Sequence[Point]) -> str:
    times = [1000 * p.seconds for p in points]
    low, high = f"{min(times):.0f}", f"{max(times):.0f}"
    return f"{low} ms" if low == high else f"{low}-{high} ms"


def grouped(points: Sequence[Point]) -> dict[str, list[Point]]:
    found: dict[str, list[Point]] = {}
    for point in points:
        found.setdefault(point.method, []).append(point)
    return found
