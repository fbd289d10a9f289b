"""Meta-gradients at scale: compiled meta-steps, long inner loops, many hyperparameters.

    pip install -e ".[benchmarks]"
    python benchmarks/meta.py                  # eight minutes on two cores
    python benchmarks/meta.py --only compiled  # or loops, forward, logistic

Each part compares its numbers before the clock starts. Writes ``results/meta.json``,
and the tables of README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

import measure
import report
from contestants import hyper_steps, inner_loops
from contestants.meta_steps import CONTENDERS, with_funcopt
from maml import agreement
from report.meta import meta_tables
from workloads.problems import PROBLEMS

COMPILED = ("sinusoid-sgd", "sinusoid-adam", "conv4-1")
#: how a meta-step is made one graph; the first imports what all of them need
WAYS: dict[str, Any] = {"traced": "trace", "compiled": True}
STEPS = (1, 4, 16, 64)
#: Largest difference of a gradient of four Adam steps in float64, relative to a leaf's
#: largest entry: TorchOpt takes 1 - β₂ᵗ in float32.
TOLERANCE = 1e-4
OUTER_STEPS = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--compile", choices=PROBLEMS, help=argparse.SUPPRESS)
    parser.add_argument("--warm", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    # higher and TorchOpt use names that torch has since deprecated.
    warnings.simplefilter("ignore")
    if given.compile:  # in a process of its own, with a cache of its own
        print(json.dumps(first_call(given.compile, given.warm)))
        return
    results = measure.load("meta") or {}
    for name in tqdm(given.only, unit="part"):
        results[name] = PARTS[name]()
        measure.save("meta", results)
    report.write()
    print(meta_tables())


def compiled() -> list[dict[str, Any]]:
    """Each meta-step as it is, traced and compiled: a new process with an empty cache."""
    results = []
    for name in tqdm(COMPILED, desc="compiled", leave=False):
        with tempfile.TemporaryDirectory() as cache:
            places = {"TORCHINDUCTOR_CACHE_DIR": cache, "TMPDIR": cache}
            call = [sys.executable, __file__, "--compile", name]
            cold = _json_of(call, places)
            warm = _json_of([*call, "--warm"], places)
            again = {"again_seconds": warm["first_call_seconds"]}
            results.append({**cold, **again})
    return results


def _json_of(call: list[str], places: dict[str, str]) -> dict[str, Any]:
    environment = {**os.environ, **places}
    done = subprocess.run(call, stdout=subprocess.PIPE, check=True, env=environment)
    return json.loads(done.stdout)


def first_call(name: str, warm: bool) -> dict[str, Any]:
    """The seconds that compiling takes; and unless warm, the times of all contenders."""
    problem = PROBLEMS[name]()
    torch.set_num_threads(problem.threads)
    steps, seconds = {}, {}
    for way, compile in WAYS.items():
        if warm and compile is not True:
            continue
        steps[way] = with_funcopt(problem, compile=compile)
        start = time.perf_counter()
        steps[way]()
        seconds[way] = time.perf_counter() - start
    if warm:
        return {"first_call_seconds": seconds}
    steps |= {contender: make(problem) for contender, make in CONTENDERS.items()}
    return {
        "problem": problem.name,
        "threads": problem.threads,
        "first_call_seconds": seconds,
        "difference": agreement(steps),
        "milliseconds": measure.interleaved(steps, repeats=min(problem.repeats, 11)),
    }


def loops() -> list[dict[str, Any]]:
    """Bytes that wait for the backward pass, peak bytes and time, of K Adam steps."""
    torch.set_num_threads(2)
    results = []
    cases = [(network, steps) for network in inner_loops.NETWORKS for steps in STEPS]
    for network, steps in tqdm(cases, desc="loops", leave=False):

        def sides(network: str = network, steps: int = steps) -> Any:
            return inner_loops.contenders(inner_loops.loop(network, steps))

        calls = {n: partial(inner_loops.gradient, f) for n, f in sides().items()}
        times = measure.interleaved(calls, repeats=5 if steps < 64 else 3, fill=0.02)
        held = {n: measure.first_call_bytes(f)[0] for n, f in sides().items()}
        peaks = {
            n: measure.first_call_bytes(partial(inner_loops.gradient, f))[1]
            for n, f in sides().items()
        }
        results.append(
            {
                "network": network,
                "steps": steps,
                "difference": _differences_of_loops(network),
                "held_bytes": held,
                "peak_bytes": peaks,
                "milliseconds": times,
            }
        )
    return results


def _differences_of_loops(network: str) -> dict[str, float]:
    sides = inner_loops.contenders(inner_loops.loop(network, 4, torch.float64))
    expected = inner_loops.gradient(sides["reverse"])
    found = {
        name: measure.difference(inner_loops.gradient(forward), expected)
        for name, forward in sides.items()
        if name != "reverse"
    }
    if not max(found.values()) <= TOLERANCE:
        raise AssertionError(f"{network}: gradients differ, {found}")
    return found


def forward() -> list[dict[str, Any]]:
    """Peak bytes of forward mode, for trainings of 100 and 1,000 steps."""
    torch.set_num_threads(2)
    results = []
    for groups in tqdm((1, 10, 100), desc="forward", leave=False):
        peaks = {}
        for steps in (100, 1000):
            call = hyper_steps.forward_mode(groups, steps)
            peaks[steps] = measure.first_call_bytes(call)[1]
        start = time.perf_counter()
        hyper_steps.forward_mode(groups, 1000)()
        seconds = time.perf_counter() - start
        results.append(
            {"hyperparameters": groups, "peak_bytes": peaks, "seconds": seconds}
        )
    return results


def logistic() -> dict[str, Any]:
    """One outer step: a rate for each inner step, a penalty for each feature."""
    torch.set_num_threads(1)

    def sides(dtype: torch.dtype) -> dict[str, hyper_steps.OuterStep]:
        given = hyper_steps.data(dtype), hyper_steps.start_of(OUTER_STEPS, dtype)
        return {
            "funcopt": hyper_steps.with_funcopt(OUTER_STEPS, *given),
            **{
                way: hyper_steps.with_funcopt(OUTER_STEPS, *given, compile=compile)
                for way, compile in WAYS.items()
            },
            "by recomputation": hyper_steps.by_recomputation(OUTER_STEPS, *given),
        }

    steps = sides(torch.float32)
    exact = sides(torch.float64)["by recomputation"]()[1].values()
    difference = {n: measure.difference(f()[1].values(), exact) for n, f in steps.items()}
    assert max(difference.values()) <= TOLERANCE, difference
    return {
        "inner_steps": OUTER_STEPS,
        "difference": difference,
        "milliseconds": measure.interleaved(steps, repeats=11),
    }


PARTS: dict[str, Callable[[], Any]] = {
    "compiled": compiled,
    "loops": loops,
    "forward": forward,
    "logistic": logistic,
}

if __name__ == "__main__":
    main()
