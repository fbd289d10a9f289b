"""Few-shot regression of sine waves: MAML, Meta-SGD and LSLR side by side.

    python examples/maml_sinusoid.py                        # about two minutes on a CPU
    python examples/maml_sinusoid.py --shots 10 --methods maml:2 lslr:2 --minutes 1

Meta-trains each method on the same stream of tasks, evaluates all on the same held-out
waves, also with more inner steps than they were trained for, and prints a table beside
the published figures. Writes ``results.json`` and a picture to ``runs/sinusoid``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from sinusoid import methods, picture, report, waves
from sinusoid.training import INNER_LR, Budget, evaluate, train

ITERATIONS = 5000


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    # The tensors are tiny: sharing one among threads costs more than it gains, and one
    # thread adds in one order, so that a seed gives the same numbers on any machine
    # of its kind.
    torch.set_num_threads(1)
    share = options.minutes and 60 * options.minutes / len(options.methods)
    budget = Budget(options.iterations, share)
    generator = torch.Generator().manual_seed(10**9 + options.seed)
    held_out = waves.sample(options.tasks, options.shots, 100, generator)
    outcomes = [train(m, options.shots, options.seed, budget) for m in options.methods]
    errors = [evaluate(outcome, held_out, report.STEPS) for outcome in outcomes]
    print(f"\n{report.table(outcomes, errors, options.shots)}\n")

    options.out.mkdir(parents=True, exist_ok=True)
    asked = ("shots", "iterations", "minutes", "tasks", "seed")
    settings = {key: getattr(options, key) for key in asked}
    results = report.record(outcomes, errors, settings)
    (options.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    picture.save(options.out / "sinusoid.png", outcomes, errors, held_out)
    print(f"results.json and sinusoid.png are in {options.out}")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    summary = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(description=summary)
    add = parser.add_argument
    add(
        "--methods",
        nargs="+",
        type=method,
        metavar="NAME[:STEPS]",
        default=[method(name) for name in ("maml", "maml:3", "metasgd", "lslr")],
        help="maml, metasgd (1 inner step each) or lslr (3); maml:5 trains with 5",
    )
    add("--shots", type=at_least(1), default=5, help="points to learn from (5)")
    add("--iterations", type=at_least(1), help=f"for each method ({ITERATIONS})")
    add("--minutes", type=minutes, help="for all methods together, in equal shares")
    add("--tasks", type=at_least(2), default=2000, help="held-out waves (2000)")
    add("--seed", type=at_least(0), default=0)
    add("--out", type=Path, default=Path("runs/sinusoid"))
    options = parser.parse_args(arguments)
    if options.iterations is None and options.minutes is None:
        options.iterations = ITERATIONS
    return options


def method(name: str) -> methods.Method:
    """``maml``, or with the number of inner steps to train with: ``maml:3``."""
    kind, colon, steps = name.partition(":")
    if kind not in methods.TITLES:
        known = ", ".join(methods.TITLES)
        raise argparse.ArgumentTypeError(f"no method '{kind}', only {known}")
    if not colon:
        return methods.Method(kind, INNER_LR, methods.STEPS[kind])
    if not steps.isdecimal() or not 1 <= int(steps) <= report.STEPS:
        raise argparse.ArgumentTypeError(
            f"'{name}': after the colon stands a number of steps, 1 to {report.STEPS}"
        )
    return methods.Method(kind, INNER_LR, int(steps))


def at_least(low: int):
    def integer(text: str) -> int:
        if not text.isdecimal() or int(text) < low:
            raise argparse.ArgumentTypeError(f"'{text}' is not an integer from {low} up")
        return int(text)

    return integer


def minutes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"'{text}' is not a positive number of minutes")
    return value


if __name__ == "__main__":
    main()
