"""Draw every optimizer, and list it: ``python docs/draw_optimizers.py``, ten seconds.

Writes docs/optimizers.png, and the table of docs/optimizers.md from the registry.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import funcopt as fo
from funcopt import optimizers

HERE = Path(__file__).parent
STEPS, COLUMNS = 100, 7
RATES = [a * 10.0**b for b in range(-4, 2) for a in (1, 2, 5)]
START = torch.tensor([[-1.3, 1.1]], dtype=torch.float64)
LOW, HIGH = torch.tensor([[-1.7, -0.7], [1.7, 1.9]], dtype=torch.float64)
INK, FAINT = "#33373D", "#8A8F98"
#: what an optimizer goes by, and its colour
KINDS = {
    "elements": "#3B6FB6",
    "norms": "#4FA3A5",
    "sums": "#8E5EA2",
    "matrices": "#E07B39",
    "the loss": "#C44E6B",
}
STYLE: dict[Any, Any] = {
    "font.size": 7.5,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.linewidth": 0.6,
    "axes.titlesize": 8.5,
    "axes.titlelocation": "left",
    "savefig.dpi": 130,
}


def valley(p: Tensor, _: Any = None) -> Tensor:
    """Rosenbrock's function with a milder bend: its minimum is 0, at (1, 1)."""
    x, y = p.unbind(-1)
    return ((1 - x) ** 2 + 10 * (y - x * x) ** 2).sum()


def slope(p: Tensor) -> Tensor:
    x, y = p.unbind(-1)
    across = 20 * (y - x * x)
    return torch.stack([2 * (x - 1) - 2 * x * across, across], -1)


def kind(opt: fo.Optimizer) -> str:
    """What of the parameters a step looks at together."""
    if opt.spec is None:
        return "the loss"
    if opt.spec.totals:
        return "sums"
    if opt.spec.elementwise:
        return "elements"
    return "norms" if opt.spec.norms else "matrices"


# The picture --------------------------------------------------------------------------


def path(opt: fo.Optimizer, numbers: torch.Generator) -> list[Tensor]:
    """The points that are evaluated; it ends where they leave the picture."""
    p, state, points = START, opt.init(START), [START]
    for _ in range(STEPS):
        given: dict[str, Any] = {}
        if "hessian" in opt.hyper:  # its diagonal, where that is positive
            x, y = p.unbind(-1)
            curved = (2 - 40 * (y - x * x) + 80 * x * x).clamp(min=1)
            given["hessian"] = torch.stack([curved, torch.full_like(y, 20.0)], -1)
        if "noise" in opt.hyper:
            given["noise"] = fo.normal_like(p, numbers)
        if opt.spec is None:
            given["loss_fn"] = valley
        g = slope(p)
        if opt.spec is not None and opt.spec.sparse == "only":
            g = g.to_sparse()
        p, state = opt.update(g, state, p, **given)
        points.append(opt.eval_params(state, p))
        if not bool(((points[-1] > LOW) & (points[-1] < HIGH)).all()):
            break
    return points


def best(factory: Callable[..., fo.Optimizer]) -> tuple[list[Tensor], float]:
    """The path that ends lowest, and its rate."""
    rates = [1.0] if kind(factory()) in ("sums", "the loss") else RATES  # they need none
    runs = []
    for rate in rates:
        points = path(factory(lr=rate), torch.Generator().manual_seed(0))
        last = torch.stack([*map(valley, points[-10:])]).mean().item()
        runs.append((last if len(points) > STEPS else float("inf"), rate, points))
    _, rate, points = min(runs, key=lambda run: run[:2])
    return points, rate


def draw(to: Path) -> None:
    """All of them as small multiples, in the order of the alphabet."""
    names = optimizers.__all__
    rows = -(-len(names) // COLUMNS)
    x, y = (torch.linspace(*ends, 120) for ends in zip(LOW.tolist(), HIGH.tolist()))
    xs, ys = torch.meshgrid(x, y, indexing="xy")
    heights = ((1 - xs) ** 2 + 10 * (ys - xs * xs) ** 2).log10()
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10, 1.5 * rows), layout="constrained")
        grid = figure.subplots(rows, COLUMNS, sharex=True, sharey=True).flatten()
        for axes, name in zip(grid, tqdm(names)):
            factory = getattr(optimizers, name)
            points, rate = best(factory)
            colour = KINDS[kind(factory())]
            track = torch.cat(points)
            axes.contour(
                x, y, heights, levels=8, colors=FAINT, linewidths=0.35, alpha=0.6
            )
            axes.plot(*track.T, color=colour, lw=0.9, marker=".", ms=2.2)
            axes.plot(1, 1, marker="+", color=INK, ms=6, mew=0.9)
            axes.set_title(name, family="monospace", color=colour, pad=2)
            axes.text(
                -1.6, -0.6, f"lr {rate:g} · {valley(track[-1:]).item():.0e}", color=INK
            )
        for axes in grid[len(names) :]:
            axes.set_axis_off()
        (left, low), (right, high) = LOW.tolist(), HIGH.tolist()
        grid[0].set(xlim=(left, right), ylim=(low, high), xticks=(), yticks=())
        figure.savefig(to)
    with Image.open(to) as image:  # of few colours, a third of the bytes
        few = image.convert("RGB").quantize(255, Image.Quantize.MAXCOVERAGE)
        few.save(to, optimize=True)


# The table ----------------------------------------------------------------------------


def table() -> str:
    """A row for each of the registry."""
    header = ("optimizer", "", "state", "goes by", "takes", "checked against")
    rows = [header, ("---",) * len(header), *map(_row, optimizers.__all__)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _row(name: str) -> tuple[str, ...]:
    factory = getattr(optimizers, name)
    opt, summary = factory(), (inspect.getdoc(factory) or "").splitlines()[0]
    twin = re.search(r"; equal to ``(torch\.optim\.\w+)``", summary)
    what = re.sub(r"; equal to .*", "", summary).rstrip(".").replace("``", "`")
    takes = []
    if opt.spec is not None and opt.spec.elementwise:
        takes.append("complex")
    if opt.spec is not None and opt.spec.sparse:
        takes.append("sparse alone" if opt.spec.sparse == "only" else "sparse")
    record = HERE.parent / "tests" / "published" / f"{name}.json"
    against = "`torch.optim.Adam`"  # amsgrad's
    if twin is not None:
        against = f"`{twin[1]}`"
    elif record.exists():
        against = json.loads(record.read_text())["source"].split(": tests/")[0]
    return f"`{name}`", what, _state(opt), kind(opt), ", ".join(takes), against


def _state(opt: fo.Optimizer) -> str:
    """Numbers of state to each parameter, in a matrix of 64 × 64."""
    p = torch.zeros(64, 64)
    slots = {k: x for k, x in opt.init(p).items() if k != "step"}
    each = sum(x.numel() for x in slots.values()) / p.numel()
    return f"{each:.2g}" if each < 10 else f"{each:.0f}"


def fill(page: Path) -> None:
    marked = re.compile(r"(<!-- table -->\n).*(\n<!-- /table -->)", re.S)
    page.write_text(marked.sub(lambda m: m[1] + table() + m[2], page.read_text()))


if __name__ == "__main__":
    draw(HERE / "optimizers.png")
    fill(HERE / "optimizers.md")
