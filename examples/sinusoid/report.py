"""What the comparison found: a table beside the published figures, and results.json."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sinusoid.methods import Method
from sinusoid.training import INNER_LR, MAX_NORM, META_BATCH, OUTER_LR, QUERIES, Outcome

COLUMNS = 0, 1, 2, 3, 5, 10  # inner steps
STEPS = max(COLUMNS)

# Mean squared error by (method, steps, shots) in Li et al., "Meta-SGD", 2017, table 1.
# Both figures are second-hand, as other authors quote them; the other settings of that
# table are left out, because we could not confirm them.
PUBLISHED = {("MAML", 1, 5): "1.13 ± 0.18", ("Meta-SGD", 1, 5): "0.90 ± 0.16"}

NOTES = f"""\
Mean squared error, with its 95 % interval, on held-out waves after 0 to {STEPS} steps.
[ ] marks the number of steps that the method was trained with. Beyond it nothing keeps
    learned rates in check, and they may diverge; LSLR goes on with its last step's.
  † after one step. Second-hand: Li et al., 2017, table 1, as other authors quote it.
    There: 60,000 iterations of 4 tasks; 100 held-out tasks.
    Here: the iterations above, of {META_BATCH} tasks, each with {QUERIES} query points;
    Adam at {OUTER_LR["params"]:g}, at {OUTER_LR["lr"]:g} for learned rates, decaying
    to 0; meta-gradients clipped to norm {MAX_NORM:g}."""


def table(outcomes: Sequence[Outcome], errors: Sequence[Tensor], shots: int) -> str:
    """The table in Markdown, with notes; ``errors`` as `training.evaluate` gives them."""
    head = [f"{shots}-shot", *map(str, COLUMNS), "published", "iterations", "time"]
    head[1] += " steps"
    rows = [head, ["-" * len(cell) for cell in head]]
    for outcome, error in zip(outcomes, errors):
        method = outcome.method
        figures = [figure(error[:, k], k == method.steps) for k in COLUMNS]
        known = PUBLISHED.get((method.title, method.steps, shots))
        rows.append(
            [
                label(method),
                *figures,
                f"{known} †" if known else "",
                f"{len(outcome.losses):,}",
                f"{outcome.seconds:.0f} s",
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = (" | ".join(cell.ljust(w) for cell, w in zip(row, widths)) for row in rows)
    return "\n".join(f"| {line} |" for line in lines) + f"\n\n{NOTES}"


def label(method: Method) -> str:
    return f"{method.title}, {method.steps} step{'s' * (method.steps > 1)}"


def figure(errors: Tensor, trained: bool) -> str:
    mean, half = mean_and_interval(errors)
    if math.isnan(mean):
        text = "diverges"
    elif mean >= 100:
        text = f"{mean:.0e}"
    else:
        text = f"{mean:.2f} ± {half:.2f}"
    return f"[{text}]" if trained else text


def mean_and_interval(errors: Tensor) -> tuple[float, float]:
    """The mean over tasks and the half width of its 95 % interval; NaN if not finite."""
    errors = errors.double()
    mean, half = errors.mean().item(), 1.96 * errors.std().item() / len(errors) ** 0.5
    return (
        (mean, half)
        if math.isfinite(mean) and math.isfinite(half)
        else (math.nan, math.nan)
    )


def record(
    outcomes: Sequence[Outcome], errors: Sequence[Tensor], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """All of it for results.json; errors that are not finite are null there."""

    def row(outcome: Outcome, error: Tensor) -> dict[str, Any]:
        title, steps = outcome.method.title, outcome.method.steps
        figures = [mean_and_interval(e) for e in error.unbind(1)]
        return {
            "method": title,
            "trained_steps": steps,
            "iterations": len(outcome.losses),
            "skipped_iterations": outcome.skipped,
            "seconds": round(outcome.seconds, 1),
            "mse_after_steps": [number(mean) for mean, _ in figures],
            "interval_95": [number(half) for _, half in figures],
            "published_second_hand": PUBLISHED.get((title, steps, settings["shots"])),
        }

    return {
        "settings": {
            **settings,
            "inner_lr": INNER_LR,
            "outer_lr": OUTER_LR,
            "meta_batch": META_BATCH,
            "queries": QUERIES,
            "clipped_to_norm": MAX_NORM,
        },
        "environment": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "machine": platform.machine(),
            "threads": torch.get_num_threads(),
        },
        "methods": [row(*pair) for pair in zip(outcomes, errors)],
    }


def number(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON has no NaN
