"""Learn a schedule of learning rates: over the whole training, or window by window.

    python examples/learned_lr_schedule.py                # under two minutes on a CPU
    python examples/learned_lr_schedule.py --windows 5 20 --steps 200

The training is SGD with momentum on the noisy quadratic, where large steps win in the
long run and small ones at once. Forward mode carries the derivative of the *last* loss
through all steps, in memory that does not depend on their number; truncated reverse mode
sees each window alone, learns rates that fall at once, and ends far above: the
short-horizon bias of Wu, Ren, Liao and Grosse (2018). Writes ``results.json`` and a
picture to ``runs/learned_lr_schedule``.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

import funcopt as fo
from style import COLOURS, FAINT, STYLE

DIMENSIONS, REPLICAS = 20, 16
CURVATURES = torch.logspace(0, -2, DIMENSIONS)
FIRST_RATE, OUTER_RATE, MOMENTUM = 0.02, 0.1, 0.9


def inner_loss(params: Tensor, shift: Tensor) -> Tensor:
    """½ Σ hᵢ (θᵢ - cᵢ)², with a new c in each step; params [replicas, dimensions]."""
    return 0.5 * (CURVATURES * (params - shift).square()).sum()


def outer_loss(params: Tensor, _: Any) -> Tensor:
    """The loss without the noise, the mean of the replicas."""
    return 0.5 * (CURVATURES * params.square()).sum(-1).mean()


def rates(knots: Tensor, steps: int) -> Tensor:
    """The rate of each step: between knots, the logarithm is linear."""
    at = torch.linspace(0, len(knots) - 1, steps)
    left = at.long().clamp(max=len(knots) - 2)
    return torch.lerp(knots[left], knots[left + 1], at - left).exp()


def problem(steps: int, seed: int) -> fo.meta.Problem:
    """One training, of starts and noise of its own."""
    generator = torch.Generator().manual_seed(seed)
    shape = REPLICAS, DIMENSIONS
    spread = CURVATURES.rsqrt()  # of starts, and of minima: twice as near

    def constrain(eta: Any) -> Any:
        return {"hyper": {"lr": fo.per_step(rates(eta["hyper"]["lr"], steps))}}

    return fo.meta.Problem(
        fo.sgd(momentum=MOMENTUM),
        inner_loss,
        outer_loss,
        steps,
        params=spread * torch.randn(*shape, generator=generator),
        batches=0.5 * spread * torch.randn(steps, *shape, generator=generator),
        constrain=constrain,
    )


def hypergradient(training: fo.meta.Problem, eta: Any, window: int | None) -> Any:
    """By forward mode over all steps; or the sum over windows, each blind to the rest."""
    if window is None:
        return fo.meta.forward(training, eta).grads
    total, carry = torch.zeros_like(eta["hyper"]["lr"]), None
    while carry is None or carry["step"] < training.steps:
        estimate = fo.meta.truncated(training, eta, carry=carry, window=window)
        total, carry = total + estimate.grads["hyper"]["lr"], estimate.carry
    return {"hyper": {"lr": total}}


@dataclass
class Learned:
    """A schedule, and what it does to trainings that it was not learned on."""

    title: str
    rates: Tensor  #: [steps]
    losses: Tensor  #: [steps + 1], before the first step and after each
    seconds: float


def learn(window: int | None, options: argparse.Namespace) -> Learned:
    eta: Any = {"hyper": {"lr": torch.full((options.knots,), math.log(FIRST_RATE))}}
    outer = fo.adam(lr=OUTER_RATE)
    state, started = outer.init(eta), time.perf_counter()
    title = "all steps, forward mode" if window is None else f"windows of {window}"
    for i in tqdm(range(options.iterations), desc=title):
        training = problem(options.steps, seed=options.seed * 10**6 + i)
        grads = hypergradient(training, eta, window)
        eta, state = outer.update(grads, state, eta)
    seconds = time.perf_counter() - started
    return Learned(title, *judged(eta, options), seconds)


def judged(eta: Any, options: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """The rates, and the loss along trainings with them, on noise never seen."""
    runs = []
    for i in range(options.trainings):
        training = problem(options.steps, seed=10**9 + options.seed * 10**6 + i)
        carry = fo.meta.advance(training, eta, 0)
        losses = [outer_loss(carry["params"], None)]
        for _ in range(options.steps):
            carry = fo.meta.advance(training, eta, 1, carry=carry)
            losses.append(outer_loss(carry["params"], None))
        runs.append(torch.stack(losses))
    return rates(eta["hyper"]["lr"], options.steps), torch.stack(runs).mean(0)


def table(learned: Sequence[Learned]) -> str:
    rows = [
        "| learned over | first rate | middle | last | loss at the end | seconds |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for each in learned:
        first, middle, last = (
            float(each.rates[i]) for i in (0, len(each.rates) // 2, -1)
        )
        rows.append(
            f"| {each.title} | {first:.3f} | {middle:.3f} | {last:.3f} "
            f"| {float(each.losses[-1]):.4f} | {each.seconds:.1f} |"
        )
    return "\n".join(rows)


def draw(path: Path, learned: Sequence[Learned]) -> None:
    """What was learned, and what it is good for."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9.5, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        for each, colour in zip(learned, cycle(COLOURS)):
            left.plot(each.rates.numpy(), color=colour, label=each.title)
            end = f"{float(each.losses[-1]):.3f} at the end"
            right.plot(each.losses.numpy(), color=colour, label=end)
        left.axhline(FIRST_RATE, color=FAINT, linewidth=0.6, linestyle=":")
        left.annotate("before learning", (0, FIRST_RATE), xytext=(0, 3),
                      textcoords="offset points", color=FAINT)  # fmt: skip
        left.set(yscale="log", xlabel="step", title="learned learning rates")
        right.set(yscale="log", xlabel="step", title="loss of trainings never seen")
        left.legend()
        right.legend()
        figure.savefig(path)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    torch.set_num_threads(1)  # tiny tensors; and the same numbers on every machine
    learned = [learn(window, options) for window in (None, *options.windows)]
    print(f"\n{table(learned)}\n")
    options.out.mkdir(parents=True, exist_ok=True)
    asked = ("steps", "iterations", "windows", "knots", "trainings", "seed")
    results = {
        "settings": {key: getattr(options, key) for key in asked},
        "torch": torch.__version__,
        "schedules": [
            {
                "title": each.title,
                "rates": each.rates.tolist(),
                "losses": each.losses.tolist(),
                "seconds": each.seconds,
            }
            for each in learned
        ],
    }
    (options.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    draw(options.out / "learned_lr_schedule.png", learned)
    print(f"results.json and learned_lr_schedule.png are in {options.out}")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    summary = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(description=summary)
    add = parser.add_argument
    add("--steps", type=int, default=100, help="of one training (100)")
    add("--iterations", type=int, default=80, help="of learning, one training each (80)")
    add("--windows", type=int, nargs="*", default=[1, 10], help="to truncate to (1 10)")
    add("--knots", type=int, default=9, help="numbers that make a schedule (9)")
    add("--trainings", type=int, default=10, help="to judge by, 16 replicas each (10)")
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=Path("runs/learned_lr_schedule"))
    options = parser.parse_args(arguments)
    if min(options.steps, options.knots, *options.windows) < 1 or options.knots < 2:
        parser.error("--steps and --windows must be 1 or more, --knots 2 or more")
    return options


if __name__ == "__main__":
    main()
