"""Estimators of meta-gradients side by side, where the right answer is known.

    python examples/estimators_compared.py                 # under a minute on one core
    python examples/estimators_compared.py --steps 50 --particles 100

Three problems with meta-gradients in closed form: influence balancing, where windows get
the sign wrong; the rate of gradient descent on a quadratic; a penalty for each weight of
a ridge regression. Every estimator that can see the meta-parameter is run, with several
settings: its error, and its time. Writes ``results.json`` and a picture to
``runs/estimators``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from estimators import measure, picture, problems
from estimators.measure import Call, Point


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    torch.set_num_threads(1)  # the tensors are tiny
    balancing = problems.influence_balancing(10 * options.steps)
    rate = problems.learned_rate(options.steps)
    penalties = problems.learned_penalties(2 * options.steps)
    points = {
        "influence balancing": run(
            balancing,
            measure.by_windows(options.seed, options.particles),
            repetitions=1,  # the longest, and its times are not drawn
        ),
        "learned rate": run(rate, measure.of_a_rate(options.seed, options.steps)),
        "learned penalties": run(
            penalties, measure.of_penalties(options.seed, 2 * options.steps)
        ),
    }
    for title, some in points.items():
        print(f"\n{title}\n{table(some)}")

    options.out.mkdir(parents=True, exist_ok=True)
    rows = {title: [p._asdict() for p in some] for title, some in points.items()}
    record = {
        "steps": options.steps,
        "particles": options.particles,
        "seed": options.seed,
        "truth of influence balancing": float(balancing.grads),
        **rows,
    }
    (options.out / "results.json").write_text(json.dumps(record, indent=2) + "\n")
    some = tuple(points.values())
    picture.save(
        options.out / "estimators.png", some[0], float(balancing.grads), *some[1:]
    )
    print(f"\nresults.json and estimators.png are in {options.out}")


def run(
    exact: problems.Exact, calls: Iterable[tuple[str, int, Call]], repetitions: int = 3
) -> list[Point]:
    progress = tqdm(list(calls), unit="estimate", leave=False)
    points = []
    for method, setting, call in progress:
        progress.set_description(f"{method} {setting or ''}")
        if setting <= exact.problem.steps or method in ("pes", "es_single"):
            points.append(measure.measure(exact, method, setting, call, repetitions))
    return points


def table(points: Sequence[Point]) -> str:
    lines = [f"{'estimator':24}{'setting':>8}{'slope':>12}{'error':>10}{'ms':>9}"]
    lines += [
        f"{p.method:24}{p.setting or '':>8}{p.slope:12.4g}{p.error:10.1e}"
        f"{1000 * p.seconds:9.1f}"
        for p in points
    ]
    return "\n".join(lines)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    summary = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(description=summary)
    add = parser.add_argument
    add("--steps", type=at_least(8), default=100, help="of a training (100)")
    add("--particles", type=at_least(2), default=1000, help="pairs, for pes (1000)")
    add("--seed", type=at_least(0), default=0)
    add("--out", type=Path, default=Path("runs/estimators"))
    return parser.parse_args(arguments)


def at_least(low: int):
    def integer(text: str) -> int:
        if not text.isdecimal() or int(text) < low:
            raise argparse.ArgumentTypeError(f"'{text}' is not an integer from {low} up")
        return int(text)

    return integer


if __name__ == "__main__":
    main()
