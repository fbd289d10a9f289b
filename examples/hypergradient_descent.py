"""Tune the learning rate while the training runs: hypergradient descent on digits.

    python examples/hypergradient_descent.py              # under a minute on a CPU
    python examples/hypergradient_descent.py --rate 0.01 --models mlp

SGD, SGD with Nesterov momentum and Adam train a logistic regression and a network on the
digits of scikit-learn, from the rates of Baydin et al. (2018), which are far too small
here: once with the rate fixed, and once with a rate that follows the hypergradient of
every step (HD), which costs no further gradient. Prints a table beside the authors'
published losses on MNIST, of which the order can be compared and not the values; writes
``results.json`` and a picture to ``runs/hypergradient_descent``.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor
from tqdm import tqdm

import funcopt as fo
from style import COLOURS, FAINT, STYLE

Params = dict[str, Tensor]

BATCH, EARLY = 128, 0.2  # images of a step; after which part of a run to look first
WIDTHS = {"logistic regression": (64, 10), "mlp": (64, 100, 100, 10)}


class Rule(NamedTuple):
    """An optimizer, and how fast its rate follows the hypergradient (the paper's β)."""

    title: str
    opt: fo.Optimizer
    beta: float


RULES = (
    Rule("SGD", fo.sgd(), 1e-3),
    Rule("SGDN", fo.sgd(momentum=0.9, nesterov=True), 1e-3),
    Rule("Adam", fo.adam(), 1e-7),
)

# Validation losses on MNIST after one epoch and at the end (10 epochs; mlp: 100), from
# the authors' files: github.com/gbaydin/hypergradient-descent. Batch, first rate and β
# are those used here; their network has two layers of 1000.
PUBLISHED = {
    ("logistic regression", "SGD"): ((0.7690, 0.3737), (0.3158, 0.2878)),
    ("logistic regression", "SGDN"): ((0.3717, 0.2846), (0.2792, 0.2719)),
    ("logistic regression", "Adam"): ((0.2979, 0.2719), (0.2953, 0.2723)),
    ("mlp", "SGD"): ((1.9954, 0.1489), (0.3289, 0.0968)),
    ("mlp", "SGDN"): ((0.4149, 0.0614), (0.2089, 0.0599)),
}  # → (without, with HD)


class Digits(NamedTuple):
    """Images [n, 64] in [0, 1] and their labels [n]."""

    x: Tensor
    y: Tensor


def digits(generator: torch.Generator) -> tuple[Digits, Digits]:
    """1,400 to train on, 397 to validate on."""
    x, y = (torch.as_tensor(part) for part in load_digits(return_X_y=True))
    order = torch.randperm(len(y), generator=generator)
    data = Digits(x.float()[order] / 16, y[order])
    return Digits(*(part[:1400] for part in data)), Digits(*(p[1400:] for p in data))


def initial(widths: Sequence[int], generator: torch.Generator) -> Params:
    """As in ``torch.nn.Linear``."""
    params: Params = {}
    for layer, (inputs, outputs) in enumerate(zip(widths, widths[1:])):
        for name, shape in ("weight", (outputs, inputs)), ("bias", (outputs,)):
            unit = 2 * torch.rand(shape, generator=generator) - 1
            params[f"{name}{layer}"] = unit / inputs**0.5
    return params


def loss(params: Params, data: Digits) -> Tensor:
    """The mean cross-entropy; the layers are linear, with ReLU between."""
    x = data.x
    for layer in range(len(params) // 2):
        x = F.relu(x) if layer else x
        x = F.linear(x, params[f"weight{layer}"], params[f"bias{layer}"])
    return F.cross_entropy(x, data.y)


@dataclass
class Curve:
    """One training."""

    model: str
    rule: str
    tuned: bool  #: whether its rate followed the hypergradient
    steps: list[int]  #: where it was validated
    losses: list[float]  #: on the validation set
    rates: list[float]
    seconds: float

    @property
    def title(self) -> str:
        return self.rule + "-HD" * self.tuned

    @property
    def figures(self) -> tuple[float, float]:
        """The validation loss early in the run, and at its end."""
        early = next(i for i, k in enumerate(self.steps) if k >= EARLY * self.steps[-1])
        return self.losses[early], self.losses[-1]


def train(model: str, rule: Rule, tuned: bool, options: argparse.Namespace) -> Curve:
    """The same images in the same order for all; ``steps`` steps."""
    generator = torch.Generator().manual_seed(options.seed)
    training, validation = digits(generator)
    params = initial(WIDTHS[model], generator)
    rows = torch.randint(len(training.y), (options.steps, BATCH), generator=generator)
    problem = fo.meta.Problem(
        rule.opt,
        lambda params, rows: loss(params, Digits(*(part[rows] for part in training))),
        None,  # a rate is judged by the next step's loss
        steps=options.steps,
        params=params,
        batches=rows,
    )
    title = rule.title + "-HD" * tuned
    curve = Curve(model, rule.title, tuned, [0], [], [options.rate], 0.0)
    curve.losses.append(loss(params, validation).item())
    lr = torch.tensor(options.rate, dtype=torch.float64)
    carry, started = None, time.perf_counter()
    for k in tqdm(range(1, options.steps + 1), desc=f"{model}, {title}", leave=False):
        eta = {"hyper": {"lr": lr}}
        if tuned:
            found = fo.meta.hypergradient_descent(problem, eta, carry=carry)
            carry, lr = found.carry, lr - rule.beta * found.grads["hyper"]["lr"]
        else:
            carry = fo.meta.advance(problem, eta, 1, carry=carry)
        if k % max(options.steps // 60, 1) == 0 or k == options.steps:
            curve.steps.append(k)
            curve.losses.append(loss(carry["params"], validation).item())
            curve.rates.append(lr.item())
    curve.seconds = time.perf_counter() - started
    return curve


def table(curves: Sequence[Curve]) -> str:
    """Both figures of each training, and the published ones."""
    last = curves[0].steps[-1]
    rows = [
        f"| model | rule | loss after {EARLY * last:.0f} steps | after {last} "
        "| last rate | published, MNIST, epoch 1 | last epoch | seconds |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for curve in curves:
        early, late = curve.figures
        known = PUBLISHED.get((curve.model, curve.rule))
        first, end = known[curve.tuned] if known else ("–", "–")
        rows.append(
            f"| {curve.model} | {curve.title} | {early:.3f} | {late:.3f} "
            f"| {curve.rates[-1]:.5f} | {first} | {end} | {curve.seconds:.1f} |"
        )
    return "\n".join(rows)


def improved(curves: Sequence[Curve]) -> dict[str, Any]:
    """Whether HD lowered the two losses, here and as published."""
    found: dict[str, Any] = {}
    for fixed, tuned in zip(curves[::2], curves[1::2]):
        here = [b < a for a, b in zip(fixed.figures, tuned.figures)]
        known = PUBLISHED.get((fixed.model, fixed.rule))
        there = [b < a for a, b in zip(*known)] if known else None
        found[f"{fixed.model}, {fixed.rule}"] = {"here": here, "published": there}
    return found


def draw(path: Path, curves: Sequence[Curve]) -> None:
    """The losses above, the rates below; dotted without HD."""
    models = list(dict.fromkeys(curve.model for curve in curves))
    titles = [rule.title for rule in RULES]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(4.8 * len(models), 5.6), layout="constrained")
        grid = figure.subplots(2, len(models), sharex=True, squeeze=False)
        for (above, below), model in zip(grid.T, models):
            for curve in (c for c in curves if c.model == model):
                look: dict[str, Any] = {
                    "color": COLOURS[2 * titles.index(curve.rule)],
                    "linestyle": "-" if curve.tuned else ":",
                    "label": curve.title,
                }
                above.plot(curve.steps, curve.losses, **look)
                if curve.tuned:
                    below.plot(curve.steps, curve.rates, **look)
            below.axhline(curves[0].rates[0], color=FAINT, lw=0.8, ls=":")
            above.set(yscale="log", title=f"{model}: validation loss")
            negative = any(
                min(curve.rates) <= 0 for curve in curves
            )  # nothing forbids it
            below.set_yscale("symlog" if negative else "log")
            below.set(xlabel="step", title="learning rate (dotted: where all start)")
        handles = grid[0, 0].get_legend_handles_labels()
        figure.legend(*handles, ncols=6, loc="outside upper center")
        figure.savefig(path)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    torch.set_num_threads(1)  # small tensors; and the same numbers on every machine
    rules = RULES[:1] if options.quick else RULES
    curves = [
        train(model, rule, tuned, options)
        for model in options.models
        for rule in rules
        for tuned in (False, True)
    ]
    print(f"\n{table(curves)}\n")
    options.out.mkdir(parents=True, exist_ok=True)
    results = {
        "settings": {key: getattr(options, key) for key in ("rate", "steps", "seed")},
        "torch": torch.__version__,
        "improved_early_and_at_the_end": improved(curves),
        "trainings": [vars(curve) for curve in curves],
    }
    (options.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    draw(options.out / "hypergradient_descent.png", curves)
    print(f"results.json and hypergradient_descent.png are in {options.out}")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    summary = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(description=summary)
    add = parser.add_argument
    add("--models", nargs="+", choices=WIDTHS, default=list(WIDTHS))
    add("--steps", type=int, help="of each training (1500; with --quick 60)")
    add("--rate", type=float, default=1e-3, help="to start with (0.001, as published)")
    add("--quick", action="store_true", help="SGD alone, and few steps")
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=Path("runs/hypergradient_descent"))
    options = parser.parse_args(arguments)
    options.steps = options.steps or (60 if options.quick else 1500)
    if options.steps < 5 or not options.rate > 0:
        parser.error("--steps must be 5 or more, --rate positive")
    return options


if __name__ == "__main__":
    main()
