"""Draw every schedule: ``python docs/draw_schedules.py`` writes docs/schedules.svg."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from funcopt import Schedule, schedules

STEPS, COLUMNS = 60, 4
RATE, MOMENTUM, INK, FAINT = "#3B6FB6", "#E07B39", "#33373D", "#8A8F98"
STYLE: dict[Any, Any] = {
    "font.size": 8,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 8.5,
    "axes.titlelocation": "left",
    "xtick.color": INK,
    "ytick.color": INK,
    "svg.fonttype": "none",
    "svg.hashsalt": "funcopt",  # the same file from the same numbers
}
# Those with jumps: a line between two steps would be a slope.
STAIRS = (
    "constant",
    "step",
    "multistep",
    "piecewise_constant",
    "chained",
    "reduce_on_plateau",
)
S = schedules
CYCLIC = partial(S.cyclic, 0.1, 1.0, step_size_up=8)
GROUPS: dict[str, dict[str, Schedule]] = {
    "torch.optim.lr_scheduler": {
        "constant": S.constant(1.0, total_iters=20),
        "linear": S.linear(1.0, start_factor=0.1, total_iters=40),
        "step": S.step(1.0, step_size=12, gamma=0.6),
        "multistep": S.multistep(1.0, milestones=[10, 20, 45], gamma=0.5),
        "exponential": S.exponential(1.0, gamma=0.95),
        "polynomial": S.polynomial(1.0, total_iters=50, power=2.0),
        "cosine_annealing": S.cosine_annealing(1.0, T_max=30),
        "cosine_warm_restarts": S.cosine_warm_restarts(1.0, T_0=8, T_mult=2),
        "one_cycle": S.one_cycle(1.0, total_steps=STEPS),
        "one_cycle, three_phase": S.one_cycle(
            1.0, STEPS, anneal_strategy="linear", div_factor=5.0, three_phase=True
        ),
        "cyclic, triangular": CYCLIC(),
        "cyclic, triangular2": CYCLIC(mode="triangular2"),
        "cyclic, exp_range": CYCLIC(mode="exp_range", gamma=0.96),
        "lambda_": S.lambda_(1.0, lambda t: 1 / (1 + t / 10)),
        "multiplicative": S.multiplicative(1.0, lambda t: 1 - 0.5 / t, STEPS),
        "chained": S.chained([S.exponential(1.0, 0.97), S.constant(1.0, 0.4, 15)]),
        "one_cycle_momentum": S.one_cycle_momentum(STEPS, base_momentum=0.5),
        "cyclic_momentum": S.cyclic_momentum(0.5, 0.95, step_size_up=8),
        "sequential": S.sequential(
            [S.linear(1.0, 0.0, total_iters=10), 1.0, S.cosine_decay(1.0, 30)], [10, 25]
        ),
    },
    "optax": {
        "polynomial_decay": S.polynomial_decay(1.0, 0.2, 3.0, 40, transition_begin=10),
        "exponential_decay": S.exponential_decay(1.0, 12, 0.5, end_value=0.1),
        "exponential_decay, staircase": S.exponential_decay(1.0, 12, 0.5, staircase=True),
        "cosine_decay": S.cosine_decay(1.0, 45, alpha=0.15),
        "piecewise_constant": S.piecewise_constant(0.5, {12: 2.0, 30: 0.3, 45: 0.3}),
        "piecewise_interpolate": S.piecewise_interpolate(
            0.2, {12: 5.0, 30: 0.3, 50: 0.3}
        ),
        "piecewise_interpolate, cosine": S.piecewise_interpolate(
            0.2, {12: 5.0, 30: 0.3, 50: 0.3}, "cosine"
        ),
        "linear_one_cycle": S.linear_one_cycle(1.0, 55, div_factor=5.0),
        "cosine_one_cycle": S.cosine_one_cycle(1.0, 55, div_factor=5.0),
        "warmup_constant": S.warmup_constant(0.0, 1.0, 15),
        "warmup_cosine_decay": S.warmup_cosine_decay(0.0, 1.0, 10, 55),
        "warmup_exponential_decay": S.warmup_exponential_decay(0.0, 1.0, 10, 15, 0.4),
    },
}


def plateau() -> tuple[list[float], list[float]]:
    """A loss that falls in three stages, and the value that follows it."""
    noise = 0.01 * torch.randn(STEPS, generator=torch.Generator().manual_seed(0))
    loss = [0.8 * 0.6 ** min(t // 24, 2) + 0.2 * 0.8 ** (t % 24) for t in range(STEPS)]
    loss = [max(a + b.item(), 0.0) for a, b in zip(loss, noise)]
    follower = S.reduce_on_plateau(1.0, factor=0.5, patience=6, threshold=0.02)
    state, values = follower.init(), []
    for metric in loss:
        value, state = follower.update(metric, state)
        values.append(value.item())
    return loss, values


def panel(axes: Axes, name: str, values: list[float], colour: str) -> None:
    jumps = name.startswith(STAIRS) or name.endswith("staircase")
    axes.plot(values, color=colour, lw=1.4, drawstyle="steps-post" if jumps else None)
    axes.set_title(name, family="monospace")


def draw(path: Path) -> None:
    """All of them as small multiples, in the order of the page."""
    count = sum(map(len, GROUPS.values())) + 1
    rows = -(-count // COLUMNS)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10, 1.35 * rows), layout="constrained")
        grid = figure.subplots(rows, COLUMNS, sharex=True, sharey=True).flatten()
        panels = iter(grid)
        for group in GROUPS.values():
            for name, schedule in group.items():
                colour = MOMENTUM if "momentum" in name else RATE
                values = [float(schedule(t)) for t in range(STEPS)]
                panel(next(panels), name, values, colour)
                if name == "sequential":  # the last of torch's
                    axes = next(panels)
                    loss, values = plateau()
                    axes.plot(loss, color=FAINT, lw=0.8, label="metric")
                    axes.legend(frameon=False, fontsize=7, loc="upper right")
                    panel(axes, "reduce_on_plateau", values, RATE)
        for axes in panels:
            axes.set_axis_off()
        grid[0].set(
            xlim=(0, STEPS - 1), ylim=(0, 1.08), xticks=(0, 30, 59), yticks=(0, 1)
        )
        figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    draw(Path(__file__).with_name("schedules.svg"))
