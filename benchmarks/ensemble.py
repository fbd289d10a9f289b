"""32 tasks at once: `update` under vmap, or on stacks, against vmap of the plain rule.

    python benchmarks/ensemble.py          # a minute or three on two cores

AdamW on stacked trees, with one learning rate for all tasks and with one for each. Every
contender must agree with float64, task by task, before its clock starts. Writes
``results/ensemble.json``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import funcopt as fo
import measure
import report
from workloads import sizes

TASKS = 32
REPEATS = 31
#: Largest difference from float64, relative to the leaf's largest change.
TOLERANCE = 1e-4
SIZES = ("small MLP", "Omniglot net")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, help="measure on so many, print JSON")
    threads = parser.parse_args().threads
    if threads:
        torch.set_num_threads(threads)
        cells = [(tree, own) for tree in SIZES for own in (False, True)]
        with torch.no_grad():
            results = [case(*cell, threads) for cell in tqdm(cells, desc="ensemble")]
        print(json.dumps(results))
        return
    measure.save("ensemble", measure.on_threads(__file__))
    report.write()
    print(report.ensemble_table())


def case(tree: str, own: bool, threads: int) -> dict[str, Any]:
    """Times and agreement on one tree; ``own`` gives each task a learning rate."""
    opt = fo.adamw()
    params = [0.01 * p for p in sizes.tensors(sizes.TREES[tree], seed=1, tasks=TASKS)]
    grads = sizes.tensors(sizes.TREES[tree], seed=2, tasks=TASKS)
    lr: Any = torch.logspace(-4, -2, TASKS, dtype=torch.float64) if own else 1e-3

    def step(g: Any, s: Any, p: Any, lr: Any, by: str | None = None) -> Any:
        return opt.update(g, s, p, lr=lr, execution=by)

    dims = (0, 0, 0, 0 if own else None)
    update, ours = torch.func.vmap(step, dims), fo.func.vmap(step, dims)
    plain = torch.func.vmap(partial(step, by="reference"), dims)
    state = torch.func.vmap(opt.init)(params)
    params, state = update(grads, state, params, lr)  # the next finds no moment at zero
    stacked_state = {**state, "step": state["step"][0]}
    stacked_lr = [lr.float().view(-1, *[1] * (p.ndim - 1)) for p in params] if own else lr

    calls: dict[str, Callable[[], Any]] = {
        "torch.func.vmap(update)": lambda: update(grads, state, params, lr),
        "fo.func.vmap(update)": lambda: ours(grads, state, params, lr),
        "update on stacked trees": lambda: opt.update(
            grads, stacked_state, params, lr=stacked_lr
        ),
        "vmap of the plain rule": lambda: plain(grads, state, params, lr),
    }
    exact = task_by_task(opt, grads, state, params, lr)
    changes = [new - old for old, new in zip(params, exact)]
    assert all((c != 0).double().mean() > 0.99 for c in changes), "parameters stand still"
    differences = {}
    for name, call in calls.items():
        moved = [new.double() - old for old, new in zip(params, call()[0])]
        differences[name] = measure.difference(moved, changes)
        if not differences[name] <= TOLERANCE:  # so that NaN fails, too
            raise AssertionError(f"{name} differs by {differences[name]:.1e}: {tree}")
    return {
        "tree": tree,
        "rates": "one for each task" if own else "shared",
        "threads": threads,
        "milliseconds": measure.interleaved(calls, repeats=REPEATS, fill=0.03),
        "difference": differences,
    }


def task_by_task(opt: fo.Optimizer, grads: Any, state: Any, params: Any, lr: Any) -> Any:
    """The new parameters by the plain rule in float64, one task after the other."""
    found = []
    for i in range(TASKS):
        g, p = [[x[i].double() for x in column] for column in (grads, params)]
        s = {
            name: slot[i] if name == "step" else [x[i].double() for x in slot]
            for name, slot in state.items()
        }
        rate = lr[i] if isinstance(lr, Tensor) else lr
        found.append(opt.update(g, s, p, lr=rate, execution="reference")[0])
    return [torch.stack(column) for column in zip(*found)]


if __name__ == "__main__":
    main()
