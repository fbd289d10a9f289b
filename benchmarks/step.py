"""One step of an optimizer against torch.optim, optax and TorchOpt.

    pip install -e ".[benchmarks]"
    python benchmarks/step.py          # ten minutes on two cores

On one thread and on two, each in a process of its own that is pinned to as many cores.
Every contender starts from the same parameters and gradients, and what it has come to
after `CHECKED` steps must agree with float64 before its clock starts. Writes
``results/step.json`` and the tables of README.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import measure
import report
import sizes
import steppers
from steppers import RULES, Stepper
from targets import DONATED, FUSED, LARGE, PURE

REPEATS = 31
CHECKED = 7  # steps: past the fifth, where RAdam begins to rectify
#: Largest difference from float64, relative to the leaf's largest change in those steps.
TOLERANCE = 1e-4

MAKERS: dict[str, Callable[..., Stepper]] = {
    DONATED: partial(steppers.ours, donate=True),
    PURE: steppers.ours,
    FUSED: partial(steppers.torch_optim, fused=True),
    "torch, foreach": partial(steppers.torch_optim, foreach=True),
    "optax, jit": steppers.optax,
    "TorchOpt": steppers.torchopt,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, help="measure on so many, print JSON")
    threads = parser.parse_args().threads
    if threads:
        torch.set_num_threads(threads)
        print(json.dumps(measured(threads)))
        return
    measure.save("step", measure.on_threads(__file__))
    report.write()
    print(report.step_tables())


def measured(threads: int) -> list[dict[str, Any]]:
    """All cases on so many threads."""
    results = []
    cases = [("adamw", tree) for tree in sizes.TREES]
    cases += [(rule, LARGE) for rule in RULES if rule != "adamw"]
    for rule, tree in tqdm(cases, desc=f"step, {threads} threads"):
        with torch.no_grad():
            times, differences = case(rule, tree)
        results.append(
            {
                "rule": rule,
                "tree": tree,
                "threads": threads,
                "milliseconds": times,
                "difference": differences,
                "bytes": RULES[rule].bytes * sizes.size(sizes.TREES[tree]),
            }
        )
    return results


def contenders(rule: str, tree: str) -> list[str]:
    """Who runs: beyond small trees the slow ones do not, and some rules few have."""
    names = [name for name in MAKERS if name not in ("TorchOpt", "optax, jit")]
    if rule != "adamw":
        return [name for name in names if name != FUSED]
    if tree == "10 M in 2,500":
        return names
    if find_spec("optax"):  # which not every Python has
        names.append("optax, jit")
    return names if tree == LARGE else [*names, "TorchOpt"]


def case(rule: str, tree: str) -> tuple[dict[str, measure.Times], dict[str, float]]:
    """Times of every contender, and how far each is from float64."""
    shapes = sizes.TREES[tree]
    params = [0.01 * p for p in sizes.tensors(shapes, seed=1)]
    grads = sizes.tensors(shapes, seed=2)
    changes = changed(steppers.exact(rule, params, grads), params)
    assert all((c != 0).double().mean() > 0.99 for c in changes), "parameters stand still"
    made, differences = {}, {}
    for name in contenders(rule, tree):
        made[name] = MAKERS[name](rule, params, grads)
        differences[name] = measure.difference(changed(made[name], params), changes)
        if not differences[name] <= TOLERANCE:  # so that NaN fails, too
            raise AssertionError(f"{name} differs by {differences[name]:.1e}: {rule}")
    if rule != "adamw":  # in the same run, for the time per byte
        made["AdamW, donated"] = steppers.ours("adamw", params, grads, donate=True)
    calls = {name: stepper.step for name, stepper in made.items()}
    return measure.interleaved(calls, repeats=REPEATS, fill=0.03), differences


def changed(stepper: Stepper, params: list[Tensor]) -> list[Tensor]:
    """By how much `CHECKED` steps change the parameters."""
    for _ in range(CHECKED):
        stepper.step()
    return [new.double() - old for old, new in zip(params, stepper.params())]


if __name__ == "__main__":
    main()
