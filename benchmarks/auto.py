"""Is it faster to batch the tasks or to loop over them? What the rule of `auto` rests on.

    python benchmarks/auto.py
    python benchmarks/auto.py --rule-only      # the rule anew, on the times of before

Times both paths of ``fo.meta.value_and_grad`` on convolutional nets of several widths and
on MLPs, for 2 to 32 tasks and 1 and 5 inner steps. Writes ``results/auto.json`` and the
table of README.md. Ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

import torch
from tqdm import tqdm

import measure
import report
from contestants.meta_steps import with_funcopt
from funcopt.meta.tasks import choose
from workloads.problems import Problem, mlp_classifier, omniglot, sinusoid

TASKS = (2, 3, 4, 8, 32)
STEPS = (1, 5)
FILTERS = (8, 16, 32, 48, 64, 96)
POOL_FILTERS = (16, 32, 64)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rule-only", action="store_true", help="measure nothing")
    rule_only = parser.parse_args().rule_only
    if rule_only:
        # The rule may have changed since: apply the present one to the times measured.
        chosen = {(net, p.count): choose(p.theta, p.count) for net, p in networks()}
        results = measure.load("auto")
        for cell in results:
            cell["chosen"] = chosen[cell["net"], cell["tasks"]]
    else:
        cells = [(*cell, steps) for cell in networks() for steps in STEPS]
        results = [measured(*cell) for cell in tqdm(cells, unit="cell", smoothing=0)]
    measure.save("auto", results, measured=not rule_only)
    report.write()
    print(report.auto_table())


def networks() -> list[tuple[str, Problem]]:
    """Each network with each number of tasks."""
    found: list[tuple[str, Problem]] = []
    for tasks in TASKS:
        found += [("MLP 1-40-40-1", sinusoid("sgd", tasks=tasks))]
        found += [("MLP 784-256-128-64-64-5", mlp_classifier(1, tasks=tasks))]
        for filters in FILTERS:
            problem = omniglot(1, filters=filters, tasks=tasks)
            found += [(f"conv-4, {filters} filters", problem)]
        if tasks < 32:  # four times the work each
            for filters in POOL_FILTERS:
                problem = omniglot(1, filters=filters, tasks=tasks, pool=True)
                found += [(f"conv-4 with pooling, {filters} filters", problem)]
    return found


def measured(name: str, problem: Problem, steps: int) -> dict[str, Any]:
    """Milliseconds of each path on one cell, and the path that the rule chooses."""
    problem = dataclasses.replace(problem, steps=steps)
    torch.set_num_threads(problem.threads)
    times = measure.interleaved(
        {
            "vmap": with_funcopt(problem, tasks="vmap"),
            "loop": with_funcopt(problem, tasks="loop"),
        },
        repeats=5,
    )
    return {
        "net": name,
        "steps": steps,
        "tasks": problem.count,
        "threads": problem.threads,
        "milliseconds": times,
        "chosen": choose(problem.theta, problem.count),
    }


if __name__ == "__main__":
    main()
