"""MAML meta-steps: funcopt against higher and TorchOpt, time and memory.

    pip install -e ".[benchmarks]"
    python benchmarks/maml.py                  # five minutes on two cores
    python benchmarks/maml.py --report-only    # the tables again, from results/*.json

One run measures everything: the same network, tasks and inner loop for all three, their
losses and meta-gradients compared before the clock starts. Writes ``results/maml.json``
and ``results/environment.json``, and the tables of README.md.
"""

from __future__ import annotations

import argparse
import warnings
from typing import Any

import torch
from tqdm import tqdm

import measure
import report
from contestants.meta_steps import CONTENDERS, MetaStep
from workloads.problems import PROBLEMS, Problem

#: Largest difference of a loss or a meta-gradient leaf, relative to the leaf's largest
#: entry, in float32. TorchOpt's Adam comes near it: it takes 1 - β₂ᵗ in float32.
TOLERANCE = 1e-5


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--report-only", action="store_true", help="measure nothing")
    if not parser.parse_args().report_only:
        # higher and TorchOpt use names that torch has since deprecated.
        warnings.simplefilter("ignore")
        problems = [make() for make in PROBLEMS.values()]
        total = sum(len(CONTENDERS) * problem.repeats for problem in problems)
        with tqdm(total=total, unit="meta-step") as bar:
            results = [run(problem, bar) for problem in problems]
        measure.save("maml", results)
    report.write()
    print(report.maml_table())


def run(problem: Problem, bar: tqdm[Any]) -> dict[str, Any]:
    """Time, peak memory and agreement of all contenders on one problem."""
    bar.set_description(problem.name)
    torch.set_num_threads(problem.threads)
    steps = {name: make(problem) for name, make in CONTENDERS.items()}
    differences = agreement(steps)
    times = measure.interleaved(steps, repeats=problem.repeats, bar=bar)
    memory = {name: measure.peak_bytes(step) for name, step in steps.items()}
    return {
        "problem": problem.name,
        "tasks": problem.count,
        "inner_steps": problem.steps,
        "threads": problem.threads,
        "milliseconds": times,
        "peak_bytes": memory,
        "difference": differences,
    }


def agreement(steps: dict[str, MetaStep]) -> dict[str, float]:
    """How far each rival's loss and meta-gradient are from funcopt's; they must agree."""
    loss, grads = steps["funcopt"]()
    differences = {}
    for name, step in steps.items():
        if name == "funcopt":
            continue
        other_loss, other_grads = step()
        pairs = [(torch.tensor(loss), torch.tensor(other_loss)), *zip(grads, other_grads)]
        assert len(grads) == len(other_grads)
        difference = max(((a - b).abs().max() / a.abs().max()).item() for a, b in pairs)
        if not difference <= TOLERANCE:  # so that NaN fails, too
            raise AssertionError(f"{name} differs from funcopt by {difference:.1e}")
        differences[name] = difference
    return differences


if __name__ == "__main__":
    main()
