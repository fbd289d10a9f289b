"""What a step costs beside its arithmetic: `update`, pytrees, the import.

python benchmarks/overhead.py

Writes ``results/overhead.json`` and the tables of README.md. One thread.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
import timeit
from collections.abc import Callable
from itertools import chain
from typing import Any
from unittest import mock

import optree
import torch
from torch.utils import _pytree
from tqdm import tqdm

import funcopt as fo
import measure
import report
from funcopt.execution import dispatch, executor_choice
from funcopt.execution.guarded_cache import GuardedCache

OPTIMIZERS = {
    "sgd": fo.sgd(lr=0.1),
    "sgd, momentum": fo.sgd(lr=0.1, momentum=0.9),
    "adam": fo.adam(),
}


def main() -> None:
    torch.set_num_threads(1)
    result = {
        "update": {name: update_overhead(opt) for name, opt in OPTIMIZERS.items()},
        "scan": scan(fo.adam()),
        "pytree": {
            "18": pytrees({f"layer{i}.weight": torch.zeros(1) for i in range(18)}),
            "300 nested": pytrees(
                {
                    f"block{i}": {
                        f"layer{j}": {"weight": torch.zeros(1), "bias": torch.zeros(1)}
                        for j in range(5)
                    }
                    for i in range(30)
                }
            ),
        },
        "import_seconds": import_times(("torch", "torch, funcopt")),
    }
    measure.save("overhead", result)
    report.write()
    print(report.overhead_table())


def update_overhead(opt: fo.Optimizer) -> dict[str, dict[str, float]]:
    """Microseconds of ``update`` on 18 leaves of 8 numbers, pure and donated.

    Their arithmetic is a fraction of a microsecond: what is measured is flattening, the
    checks, the hyperparameters, the steps, pointers, results, and unflattening.
    """
    params, grads = leaves(), leaves()
    state = opt.init(params)
    return {
        "pure": microseconds(lambda: opt.update(grads, state, params)),
        "donated": microseconds(lambda: opt.update(grads, state, params, donate=True)),
    }


def scan(opt: fo.Optimizer) -> dict[str, dict[str, float]]:
    """Microseconds to choose the executor for 18 leaves of Adam, 72 tensors.

    ``anew`` looks at them from scratch; ``like the last`` asks whether they are like
    those of the step before.
    """
    seen: dict[str, Any] = {}
    step = dispatch.step

    def remember(leaves: Any, *arguments: Any) -> Any:
        found = step(leaves, *arguments)
        seen.update(leaves=leaves, path=found[1])
        return found

    params, grads = leaves(), leaves()
    state = opt.init(params)
    with mock.patch.object(dispatch, "step", remember):
        opt.update(grads, state, params)
    given, known = seen["leaves"], GuardedCache()
    tensors = [*given.grads, *given.params, *chain(*given.state), state["step"]]
    known.put(tensors, seen["path"])
    assert len(tensors) == 73 and known.get(tensors)
    return {
        "anew": microseconds(lambda: executor_choice.groups(given)),
        "like the last": microseconds(lambda: known.get(tensors)),
    }


def leaves() -> dict[str, torch.Tensor]:
    return {f"layer{i}.weight": torch.randn(8) for i in range(18)}


def pytrees(tree: Any) -> dict[str, dict[str, float]]:
    """Microseconds of each operation of optree and of torch's own pytree, best ones."""
    leaves, ours = optree.tree_flatten(tree, none_is_leaf=True)
    same = optree.tree_structure(tree, none_is_leaf=True)
    _, theirs = _pytree.tree_flatten(tree)
    like_theirs = _pytree.tree_structure(tree)
    libraries: dict[str, dict[str, Callable[[], Any]]] = {
        "optree": {
            "flatten": lambda: optree.tree_flatten(tree, none_is_leaf=True),
            "flatten_up_to": lambda: ours.flatten_up_to(tree),
            "unflatten": lambda: optree.tree_unflatten(ours, leaves),
            "compare": lambda: ours == same,
        },
        "torch": {
            "flatten": lambda: _pytree.tree_flatten(tree),
            "flatten_up_to": lambda: theirs.flatten_up_to(tree),
            "unflatten": lambda: _pytree.tree_unflatten(leaves, theirs),
            "compare": lambda: theirs == like_theirs,
        },
    }
    return {
        library: {name: microseconds(call)["best"] for name, call in calls.items()}
        for library, calls in libraries.items()
    }


def microseconds(call: Callable[[], Any]) -> dict[str, float]:
    """The best and the median of 25 samples of about 20 ms each."""
    timer = timeit.Timer(call)
    number = max(1, round(0.02 / (timer.timeit(20) / 20)))
    samples = [1e6 * s / number for s in timer.repeat(25, number)]
    return {"best": min(samples), "median": statistics.median(samples)}


def import_times(modules: tuple[str, ...], repeats: int = 7) -> dict[str, Any]:
    """Seconds that a fresh interpreter takes to import, in turn; files are cached."""
    samples: dict[str, list[float]] = {name: [] for name in modules}
    for turn in tqdm(range(repeats + 1), desc="import"):
        for name in modules:
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", f"import {name}"], check=True)
            if turn:  # the first warms the file cache
                samples[name].append(time.perf_counter() - start)
    return {name: measure.summary(values) for name, values in samples.items()}


if __name__ == "__main__":
    main()
