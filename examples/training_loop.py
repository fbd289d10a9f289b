"""The classic training loop on digits, with the optimizers of `funcopt.torch_optim`.

    python examples/training_loop.py                       # about a minute on a CPU
    python examples/training_loop.py --quick

What surrounds an optimizer in everyday work, all of it torch's own: groups by the names
of parameters (weights decay, biases and norms do not; the backbone learns slower than
the head), micro-batches whose gradients add up, clipping, a scheduler, checkpoints. A
training is killed and resumed, to the bit; the same loop runs on ``torch.optim``; a
network that knows the digits learns their mirror images from thirty of them; a
generator and a discriminator have an optimizer each; four optimizers meet a sweep of
learning rates. Prints tables; writes ``results.json`` and a picture to
``runs/training_loop``.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from digits import adversaries, data, gradients, picture, sweep
from digits.adversaries import Adversaries
from digits.data import Digits
from digits.network import Network, accuracy
from digits.training import Curves, Training, differing, distance
from funcopt import torch_optim as optim

#: how fast the backbone learns what is new, as a share of the head's rate
WAYS = {"from scratch": 1.0, "one rate for all": 1.0, "backbone at a tenth": 0.1}


class Resumed(NamedTuple):
    """A training, and the same again."""

    whole: Training
    killed: Training
    resumed: Training
    theirs: Training  #: on torch.optim
    saved_at: int
    seconds: float  #: of the whole one


def train_and_resume(
    training: Digits, test: Digits, options: argparse.Namespace
) -> Resumed:
    """Nothing but the file goes from the killed training to the one that resumes."""
    how: dict[str, Any] = {"steps": options.steps, "seed": options.seed}
    file = options.out / "checkpoint.pt"
    saved_at, killed_at = round(0.4 * options.steps), round(0.55 * options.steps)
    started = time.perf_counter()
    whole = Training(optim.AdamW, **how).run(training, test, title="whole")
    seconds = time.perf_counter() - started
    killed = Training(optim.AdamW, **how).run(
        training, test, until=killed_at, save_to=file, save_at=saved_at, title="killed"
    )
    other = Training(optim.AdamW, steps=options.steps, seed=options.seed + 1)
    resumed = other.load(file).run(training, test, title="resumed")
    theirs = Training(torch.optim.AdamW, **how).run(training, test, title="torch.optim")
    return Resumed(whole, killed, resumed, theirs, saved_at, seconds)


class Tuned(NamedTuple):
    """A network that has learned mirror images."""

    curves: Curves  #: tested on mirror images
    remembers: float  #: its accuracy on the digits as they are


def fine_tune(
    known: Network, training: Digits, test: Digits, options: argparse.Namespace
) -> dict[str, list[Tuned]]:
    """Mirror images, three of each digit, after the digits: a run for each seed."""
    found: dict[str, list[Tuned]] = {way: [] for way in WAYS}
    for seed in tqdm(range(options.seeds), desc="mirror images, seeds", leave=False):
        order = torch.randperm(len(training.y), generator=data.seeded(seed))
        few = data.mirrored(data.first_of_each(training.rows(order), 3))
        for way, share in WAYS.items():
            run = Training(
                optim.AdamW,
                steps=options.tuning,
                seed=seed,
                backbone=share,
                start_from=None if way == "from scratch" else known,
            )
            run.run(few, data.mirrored(test), every=2, title=way)
            found[way].append(Tuned(run.curves, accuracy(run.net, test)))
    return found


def mean_and_interval(values: Sequence[float]) -> tuple[float, float]:
    """In per cent; half of the 95 % interval of the mean."""
    each = 100 * torch.tensor(values)
    spread = each.std().item() if len(each) > 1 else math.nan
    return each.mean().item(), 1.96 * spread / len(each) ** 0.5


def tables(results: dict[str, Any]) -> str:
    loop, forms = results["loop"], results["zero_grad"]
    lines = [
        "| the classic loop, ten digits | |",
        "| --- | --- |",
        f"| test accuracy | {100 * loop['accuracy']:.1f} % |",
        f"| numbers that differ after kill and resume | {loop['differing']} "
        f"of {loop['numbers']:,} |",
        f"| largest difference to torch.optim.AdamW | {loop['to_torch']:.1e} |",
        f"| micro-batches against whole ones, float64 | {results['accumulated']:.1e} |",
        f"| a frozen layer moves, `zero_grad()` | {forms['none']:.3g} |",
        f"| ... `zero_grad(set_to_none=False)` | {forms['zeros']:.3g} |",
        f"| drawn digits that the classifier recognises "
        f"| {100 * results['recognised']:.1f} % |",
        "",
        "| mirror images, three of each digit | test accuracy | on digits as they are |",
        "| --- | --- | --- |",
        *(
            f"| {way} | {new[0]:.1f} ± {new[1]:.1f} % | {old[0]:.1f} ± {old[1]:.1f} % |"
            for way, (new, old) in results["fine_tuning"].items()
        ),
        "",
        "| optimizer | best rate | test loss |",
        "| --- | --- | --- |",
        *(
            f"| {name} | {point['lr']:.2g} | {point['loss']:.3f} |"
            for name, point in results["best_rates"].items()
        ),
    ]
    return "\n".join(lines)


def record(
    resumed: Resumed,
    tuned: dict[str, list[Tuned]],
    pair: Adversaries,
    points: Sequence[sweep.Point],
    training: Digits,
) -> dict[str, Any]:
    whole = resumed.whole
    numbers = sum(p.numel() for p in whole.net.parameters())
    return {
        "loop": {
            "accuracy": whole.curves.accuracies[-1],
            "differing": differing(whole, resumed.resumed),
            "numbers": 3 * numbers,  # each with two averages
            "to_torch": distance(whole.net, resumed.theirs.net),
            "losses": whole.curves.losses,
            "norms": whole.curves.norms,
            "seconds": resumed.seconds,
        },
        "zero_grad": {
            "none": gradients.moved_while_frozen(training, set_to_none=True),
            "zeros": gradients.moved_while_frozen(training, set_to_none=False),
        },
        "accumulated": gradients.accumulated_against_whole(training),
        "recognised": adversaries.recognised(whole.net, pair.generator),
        "fine_tuning": {
            way: (
                mean_and_interval([run.curves.accuracies[-1] for run in runs]),
                mean_and_interval([run.remembers for run in runs]),
            )
            for way, runs in tuned.items()
        },
        "best_rates": {name: p._asdict() for name, p in sweep.best(points).items()},
        "sweep": [point._asdict() for point in points],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    torch.set_num_threads(1)  # small tensors; and the same numbers on every machine
    options.out.mkdir(parents=True, exist_ok=True)
    training, test = data.load(options.seed)
    resumed = train_and_resume(training, test, options)
    tuned = fine_tune(resumed.whole.net, training, test, options)
    pair = adversaries.train(training, steps=options.rounds, seed=options.seed)
    exponents = torch.linspace(-4, 0.5, options.rates).tolist()
    points = sweep.sweep(
        training, test, [10**e for e in exponents], steps=options.steps, seed=options.seed
    )
    results = record(resumed, tuned, pair, points, training)
    print(f"\n{tables(results)}\n")
    asked = ("steps", "tuning", "seeds", "rounds", "rates", "seed")
    settings = {key: getattr(options, key) for key in asked}
    results = {"settings": settings, "torch": torch.__version__, **results}
    (options.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    picture.save(
        options.out / "training_loop.png",
        picture.Shown(
            resumed.whole.curves,
            resumed.killed.curves,
            resumed.resumed.curves,
            resumed.saved_at,
            {way: [run.curves for run in runs] for way, runs in tuned.items()},
            {way: rows[1][0] for way, rows in results["fine_tuning"].items()},
            points,
            training,
            pair.generator,
        ),
    )
    print(f"results.json and training_loop.png are in {options.out}")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    summary = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(description=summary)
    add = parser.add_argument
    add("--steps", type=int, help="of a training (200; with --quick 40)")
    add("--tuning", type=int, help="steps of fine-tuning (30; with --quick 10)")
    add("--seeds", type=int, help="of fine-tuning (10; with --quick 2)")
    add("--rounds", type=int, help="of the two adversaries (6000; with --quick 50)")
    add("--rates", type=int, help="of the sweep (10; with --quick 3)")
    add("--quick", action="store_true", help="short trainings, and few of them")
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=Path("runs/training_loop"))
    options = parser.parse_args(arguments)
    small = {"steps": 40, "tuning": 10, "seeds": 2, "rounds": 50, "rates": 3}
    usual = {"steps": 200, "tuning": 30, "seeds": 10, "rounds": 6000, "rates": 10}
    for name, value in (small if options.quick else usual).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.steps < 10 or min(getattr(options, name) for name in usual) < 1:
        parser.error(
            "--steps must be 10 or more; --tuning, --seeds, --rounds, --rates 1 or more"
        )
    return options


if __name__ == "__main__":
    main()
