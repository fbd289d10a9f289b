"""The pictures of a run: learning curve, one task, learned rates."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from fewshot.episodes import Batch, Tasks
from fewshot.evaluation import Estimate
from fewshot.nets import Params

INK, FAINT, ACCENT = "#1f2933", "#9aa5b1", "#0072b2"
WRONG = "#fbe3df"
# Okabe and Ito's colours, which colour-blind readers tell apart too. From the eighth
# class on they repeat; wrong images still show by their paper.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#1f2933")


def learning_curve(
    path: Path, history: Tensor, after: Estimate, ways: int, title: str
) -> None:
    """Loss and accuracy on training tasks, and the accuracy on unseen classes."""
    figure = Figure(figsize=(8, 5.2), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    end = len(history)
    window = max(1, end // 50)
    for axes, column in ((bottom, 0), (top, 1)):
        values = history[:, column].double() * (100 if column else 1)
        axes.plot(range(1, end + 1), values.numpy(), color=FAINT, lw=0.5, alpha=0.5)
        smooth = running_mean(values, window)
        label = f"training tasks (running mean of {window})"
        x = range(window, end + 1)
        axes.plot(x, smooth.numpy(), color=ACCENT, lw=1.8, label=label)
    top.errorbar(
        end,
        100 * after.mean,
        100 * after.margin,
        color=PALETTE[1],
        fmt="o",
        ms=5,
        capsize=4,
        clip_on=False,
        zorder=5,
        label=f"classes never seen: {after}",
    )
    top.axhline(100 / ways, color=FAINT, ls=":")
    top.text(0.003 * end, 100 / ways, "chance", va="bottom", color=FAINT)
    top.set(ylim=(0, 100), ylabel="accuracy after adaptation (%)")
    top.legend(loc="lower right", bbox_to_anchor=(1, 1 / ways), frameon=False)
    bottom.set(ylabel="meta-loss", xlabel="iteration", xlim=(0, end * 1.02))
    bottom.set_ylim(bottom=0)
    for axes in (top, bottom):
        plain(axes)
    top.set_title(title, loc="left", color=INK)
    figure.savefig(path, dpi=150)


def one_task(path: Path, task: Tasks, logits: tuple[Tensor, Tensor], title: str) -> None:
    """A task's images; a query image has the colour of the class it is taken for."""
    ways = int(task.support.y.max()) + 1
    shots, queries = (len(batch.y) // ways for batch in task)
    gap, head = 0.5, 0.8  # in images: between support and query, above a block
    width, height = shots + gap + queries, 2 * (head + ways)
    scale = min(0.55, 20 / height)  # inches for one image
    size = max(7, scale * width + 0.4), scale * height + 0.9  # the title needs seven
    figure = Figure(figsize=size)
    figure.set_layout_engine("constrained")
    axes = figure.subplots()
    for block, name in enumerate(("before adaptation", "after adaptation")):
        top = block * (head + ways) + head
        taken = logits[block].argmax(1)
        right = int((taken == task.query.y).sum())
        letters(axes, 0, top, task.support, task.support.y)
        letters(axes, shots + gap, top, task.query, taken)
        score = f"query {name}: {right} of {len(taken)} right"
        for x, words in ((0, "support"), (shots + gap, score)):
            axes.text(x, top - 0.15, words, va="bottom", color=INK, fontsize=11)
    axes.set(xlim=(-0.1, width + 0.1), ylim=(height, 0), aspect="equal")
    axes.axis("off")
    caption = "ink: the class an image is taken for; red paper: wrong"
    figure.suptitle(f"{title}\n{caption}", color=INK, fontsize=11)
    figure.savefig(path, dpi=130)


def letters(axes: Axes, left: float, top: float, batch: Batch, taken: Tensor) -> None:
    """A row of images for each class, down and right of a corner."""
    columns = int((batch.y == 0).sum())
    edge = 0.03
    for i, (image, label, guess) in enumerate(zip(batch.x, batch.y, taken, strict=True)):
        x, y = left + i % columns, top + i // columns
        paper = np.array(to_rgb("white" if label == guess else WRONG))
        ink = np.array(to_rgb(PALETTE[int(guess) % len(PALETTE)]))
        grey = image[0, ..., None].cpu().numpy()
        place = (x + edge, x + 1 - edge, y + 1 - edge, y + edge)
        axes.imshow(
            (1 - grey) * paper + grey * ink, extent=place, interpolation="bilinear"
        )
        frame = Rectangle((x + edge, y + edge), 1 - 2 * edge, 1 - 2 * edge)
        frame.set(facecolor="none", edgecolor="#e4e7eb", linewidth=0.6)
        axes.add_patch(frame)


def rates_per_step(path: Path, rates: Params, start: float, title: str) -> None:
    """LSLR: one row per leaf, one column per inner step."""
    names = list(rates)
    values = torch.stack([rates[name] for name in names]).cpu().double().numpy()
    steps = values.shape[1]
    figure = Figure(figsize=(2.9 + 0.85 * steps, 1.3 + 0.32 * len(names)))
    figure.set_layout_engine("constrained")
    axes = figure.subplots()
    # The colour says how far from the first value, the number says the value.
    far = float(abs(values - start).max()) or 1.0
    axes.imshow(values, cmap="RdBu_r", vmin=start - far, vmax=start + far, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        dark = abs(value - start) > 0.6 * far
        colour = "white" if dark else INK
        axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour)
    axes.set_xticks(range(steps), [str(step + 1) for step in range(steps)])
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("inner step")
    axes.set_title(title, loc="left", color=INK, fontsize=11)
    plain(axes)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    figure.savefig(path, dpi=150)


def rates_per_weight(path: Path, rates: Params, start: float, title: str) -> None:
    """Meta-SGD: how the rates of each leaf's weights are spread."""
    figure = Figure(figsize=(8, 1.7 + 0.32 * len(rates)), layout="constrained")
    axes = figure.subplots()
    rows = list(range(len(rates)))
    shares = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], dtype=torch.float64)
    flat = [leaf.flatten().cpu().double() for leaf in rates.values()]
    low, quarter, median, three_quarters, high = torch.stack(
        [leaf.quantile(shares) for leaf in flat], 1
    ).numpy()
    axes.hlines(rows, low, high, color=ACCENT, lw=1.2, label="5 to 95 %")
    axes.hlines(rows, quarter, three_quarters, color=ACCENT, lw=6, label="25 to 75 %")
    axes.plot(median, rows, "o", color="white", mec=ACCENT, ms=6, label="median")
    axes.axvline(start, color=PALETTE[1], ls="--", lw=1, label="at the start", zorder=0)
    axes.set_yticks(rows, list(rates))
    axes.invert_yaxis()
    axes.set_xlabel("learned rate")
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    axes.set_title(title, loc="left", color=INK, fontsize=11)
    plain(axes)
    figure.savefig(path, dpi=150)


def running_mean(values: Tensor, window: int) -> Tensor:
    """The mean of each ``window`` successive values: ``[n]`` to ``[n - window + 1]``."""
    return values.unfold(0, window, 1).mean(1)


def plain(axes: Axes) -> None:
    """No box around the data."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(colors=INK)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
