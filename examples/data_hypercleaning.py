"""Clean a data set by learning a weight for each example: half of the labels are wrong.

    python examples/data_hypercleaning.py                  # under a minute on a CPU
    python examples/data_hypercleaning.py --corrupted 0.8 --iterations 150

Half of the digits that a softmax regression trains on got a label that is not theirs. The
weight of each example in the training loss is learned by exact reverse mode through the
whole training, such that the trained model does well on a few clean digits (Franceschi et
al., 2017): the weights of wrong labels go to zero. Prints the accuracy on test digits
beside training on all, and on only the right ones; writes ``results.json`` and a picture
to ``runs/data_hypercleaning``.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
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

INNER, OUTER_RATE = fo.sgd(lr=1.0), 0.3


class Digits(NamedTuple):
    """Images [n, 64] in [0, 1] and their labels [n]."""

    x: Tensor
    y: Tensor


class Split(NamedTuple):
    """What is given, and what is not: which labels are wrong, and the test set."""

    training: Digits
    clean: Digits
    test: Digits
    wrong: Tensor  #: [n] bool: a label of ``training`` that was replaced
    truth: Tensor  #: [n]: the labels as they were


def split(corrupted: float, seed: int) -> Split:
    """500 digits to train on, 300 clean ones, 997 to test on."""
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.as_tensor(part) for part in load_digits(return_X_y=True))
    order = torch.randperm(len(y), generator=generator)
    x, y = x.float()[order] / 16, y[order]
    wrong = torch.arange(500) < 500 * corrupted  # the order is a random one
    other = (y[:500] + torch.randint(1, 10, (500,), generator=generator)) % 10
    training = Digits(x[:500], torch.where(wrong, other, y[:500]))
    clean, test = Digits(x[500:800], y[500:800]), Digits(x[800:], y[800:])
    return Split(training, clean, test, wrong, y[:500])


def logits(params: Params, x: Tensor) -> Tensor:
    return x @ params["weight"] + params["bias"]


def weighted_loss(params: Params, data: Digits, meta: Params) -> Tensor:
    """The training loss: each example counts by its weight in [0, 1]."""
    each = F.cross_entropy(logits(params, data.x), data.y, reduction="none")
    return (meta["weights"] * each).mean()


def loss(params: Params, data: Digits, meta: Any = None) -> Tensor:
    """What the trained model is judged by."""
    return F.cross_entropy(logits(params, data.x), data.y)


def accuracy(params: Params, data: Digits) -> float:
    return (logits(params, data.x).argmax(1) == data.y).float().mean().item()


def training_on(data: Digits, clean: Digits, steps: int) -> fo.meta.Problem:
    """Training from zero by gradient descent; its weights are the logits of eta."""
    return fo.meta.Problem(
        INNER,
        weighted_loss,
        loss,
        steps=steps,
        params={"weight": torch.zeros(64, 10), "bias": torch.zeros(10)},
        batch=data,
        outer_batch=clean,
        constrain=fo.meta.constrained({"meta": {"weights": fo.meta.sigmoid()}}),
    )


def trained(problem: fo.meta.Problem, weights: Tensor) -> Params:
    """The parameters after training with those weights."""
    eta = {"meta": {"weights": weights.clamp(1e-6, 1 - 1e-6)}}
    free = fo.meta.sigmoid().inverse(eta["meta"]["weights"])
    return fo.meta.advance(problem, {"meta": {"weights": free}}, problem.steps)["params"]


class Learned(NamedTuple):
    """The weights, and what was seen on the way to them."""

    weights: Tensor  #: [n]
    losses: list[float]  #: on the clean digits, of each iteration
    accuracies: list[float]  #: on the test digits, of each iteration
    seconds: float


def learn(data: Split, options: argparse.Namespace) -> Learned:
    problem = training_on(data.training, data.clean, options.steps)
    eta = {"meta": {"weights": torch.zeros(500)}}  # each example counts half
    outer = fo.adam(lr=OUTER_RATE)
    state, losses, accuracies = outer.init(eta), [], []
    started = time.perf_counter()
    for _ in tqdm(range(options.iterations), desc="learning weights"):
        found = fo.meta.reverse(problem, eta)
        losses.append(found.value.item())
        accuracies.append(accuracy(found.carry["params"], data.test))
        eta, state = outer.update(found.grads, state, eta)
    seconds = time.perf_counter() - started
    weights = torch.sigmoid(eta["meta"]["weights"])
    return Learned(weights, losses, accuracies, seconds)


def report(data: Split, learned: Learned, options: argparse.Namespace) -> dict[str, Any]:
    """Which labels are suspected, and how good training is without them."""
    suspected = learned.weights < 0.5
    hits = int((suspected & data.wrong).sum())
    both = Digits(*(torch.cat(parts) for parts in zip(data.training, data.clean)))
    extra = torch.ones(len(data.clean.y))  # retrained with the clean digits, as published
    problem = training_on(both, data.clean, options.steps)
    weights = {
        "all labels": torch.ones(500),
        "learned weights": learned.weights,
        "right labels only": (~data.wrong).float(),
    }
    return {
        "f1": 2 * hits / max(int(suspected.sum() + data.wrong.sum()), 1),
        "precision": hits / max(int(suspected.sum()), 1),
        "recall": hits / max(int(data.wrong.sum()), 1),
        "test_accuracy": {
            name: accuracy(trained(problem, torch.cat([w, extra])), data.test)
            for name, w in weights.items()
        },
    }


def draw(path: Path, data: Split, learned: Learned, found: dict[str, Any]) -> None:
    """The weights, the way there, and the digits that got the least of them."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(11, 3.4), layout="constrained")
        ((left, middle, right),) = figure.subfigures(
            1, 3, squeeze=False, width_ratios=[3, 3, 3.4]
        )
        axes = left.subplots()
        parts = [
            learned.weights[~data.wrong].tolist(),
            learned.weights[data.wrong].tolist(),
        ]
        labels = ["the right label", "a wrong label"]
        axes.hist(
            parts, bins=20, range=(0, 1), color=[COLOURS[0], COLOURS[2]], label=labels
        )
        axes.set(title="learned weights of examples with", xlabel="weight")
        axes.set(ylabel="examples")
        axes.legend(loc="upper center")

        axes = middle.subplots()
        axes.plot([100 * a for a in learned.accuracies], color=COLOURS[0])
        axes.set(title="test accuracy while weights are learned, %", xlabel="iteration")

        right.suptitle("the smallest weights: label given (true)", size=9.5)
        for axes, i in zip(right.subplots(3, 5).flat, learned.weights.argsort().tolist()):
            axes.imshow(data.training.x[i].view(8, 8).numpy(), cmap="gray_r")
            axes.set_title(f"{int(data.training.y[i])} ({int(data.truth[i])})", size=8)
            axes.set(xticks=(), yticks=())
            for spine in axes.spines.values():
                spine.set(visible=True, color=FAINT)
        figure.savefig(path)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    torch.set_num_threads(1)  # small tensors; and the same numbers on every machine
    data = split(options.corrupted, options.seed)
    learned = learn(data, options)
    found = report(data, learned, options)
    print("\n| trained on | test accuracy |\n| --- | --- |")
    for name, value in found["test_accuracy"].items():
        print(f"| {name} | {100 * value:.1f} % |")
    print(f"\nWrong labels found: F1 {found['f1']:.3f} ({learned.seconds:.0f} s)")
    options.out.mkdir(parents=True, exist_ok=True)
    asked = ("corrupted", "steps", "iterations", "seed")
    results = {
        "settings": {key: getattr(options, key) for key in asked},
        "torch": torch.__version__,
        **found,
        "losses": learned.losses,
        "accuracies": learned.accuracies,
        "seconds": learned.seconds,
    }
    (options.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    draw(options.out / "data_hypercleaning.png", data, learned, found)
    print(f"results.json and data_hypercleaning.png are in {options.out}")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    summary = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(description=summary)
    add = parser.add_argument
    add("--corrupted", type=float, default=0.5, help="part of the labels (0.5)")
    add("--steps", type=int, help="of a training (100; with --quick 10)")
    add("--iterations", type=int, help="of learning weights (80; with --quick 10)")
    add("--quick", action="store_true", help="short trainings, and few of them")
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=Path("runs/data_hypercleaning"))
    options = parser.parse_args(arguments)
    options.steps = options.steps or (10 if options.quick else 100)
    options.iterations = options.iterations or (10 if options.quick else 80)
    if min(options.steps, options.iterations) < 1 or not 0 <= options.corrupted <= 1:
        parser.error("--steps and --iterations: 1 or more; --corrupted: from 0 to 1")
    return options


if __name__ == "__main__":
    main()
