"""One step of every optimizer against torch.optim, and AdamW against optax and TorchOpt.

    pip install -e ".[benchmarks]"
    python benchmarks/step.py                  # half an hour on two cores
    python benchmarks/step.py --only adamw     # rules to measure anew, the rest is kept

AdamW on one thread and on two, the registry on two; each thread count and rule in a
process of its own that is pinned to as many cores. Every contender starts from the same
parameters and gradients, and what it comes to after a few steps must agree with float64,
or nobody's time is kept. Writes ``results/step.json`` and the tables of README.md.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import measure
import report
from contestants import steppers
from contestants.rules import RULES, Rule
from contestants.steppers import Stepper
from report.step import step_tables
from report.targets import ADAMW, DONATED, LARGE, PURE, REGISTRY, STEP, TORCH
from workloads import sizes

REPEATS = 31
#: A first step that takes longer is not compared.
PATIENCE = 4.0
CHECKED = 7  # steps: past the fifth, where RAdam begins to rectify
#: Largest difference from float64, relative to the leaf's largest change in those steps;
#: for what works in bfloat16, after two.
TOLERANCE, COARSE = 3e-4, 5e-2

MAKERS: dict[str, Callable[..., Stepper]] = {
    DONATED: partial(steppers.ours, donate=True),
    PURE: steppers.ours,
    TORCH["fused"]: partial(steppers.torch_optim, fused=True),
    TORCH["foreach"]: partial(steppers.torch_optim, foreach=True),
    TORCH["for-loop"]: steppers.torch_optim,
    "optax, jit": steppers.optax,
    "TorchOpt": steppers.torchopt,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, help="measure on so many, print JSON")
    parser.add_argument("--part", help="what to measure then: AdamW, or a rule")
    parser.add_argument("--only", nargs="*", default=[], help="rules, and not all")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
        print(json.dumps(measured(given.part)))
        return
    rules = given.only or list(RULES)
    found: list[dict[str, Any]] = []
    if "adamw" in rules:
        found += measure.on_threads(__file__, more=("--part", ADAMW))
    for rule in tqdm(rules, unit="rule"):
        found += measure.on_threads(__file__, (2,), ("--part", rule))
    new = {_key(r) for r in found}
    kept = measure.load("step") or [] if given.only else []
    measure.save("step", [*(r for r in kept if _key(r) not in new), *found])
    report.write()
    print(step_tables())


def _key(result: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(result[name] for name in ("part", "rule", "tree", "threads"))


def measured(what: str) -> list[dict[str, Any]]:
    """AdamW on the trees that have targets; or one rule, on the largest tree first."""
    part, rule, trees = "registry", what, [*reversed(REGISTRY)]
    if what == ADAMW:
        part, rule, trees = ADAMW, "adamw", [*dict.fromkeys(t.tree for t in STEP)]
    results = []
    for tree in trees:
        try:
            with torch.no_grad():
                found = case(part, RULES[rule], tree)
        except AssertionError as error:  # who is wrong is not timed; the others are
            tqdm.write(f"{rule}, {tree}: {error}")
            found = {"error": str(error)}
        row = {"part": part, "rule": rule, "tree": tree}
        results.append({**row, "threads": torch.get_num_threads(), **found})
    return results


def contenders(part: str, rule: Rule, tree: str) -> list[str]:
    """Who runs: beyond small trees the slow ones do not, and few have some rules."""
    names = [DONATED, PURE, *(TORCH[name] for name in rule.implementations)]
    if part != ADAMW:
        return names
    names.remove(TORCH["for-loop"])
    if tree == "10 M in 2,500":
        return names
    if find_spec("optax"):  # which not every Python has
        names.append("optax, jit")
    return names if tree == LARGE else [*names, "TorchOpt"]


def case(part: str, rule: Rule, tree: str) -> dict[str, Any]:
    """Times of every contender, and how far each is from float64."""
    shapes = rule.fit(sizes.TREES[tree])
    params = [0.01 * p for p in sizes.tensors(shapes, seed=1)]
    grads = sizes.tensors(shapes, seed=2)
    found = {
        "bytes": rule.bytes(params),
        "size": sizes.size(shapes),
        "elementwise": rule.elementwise,
    }
    names = contenders(part, rule, tree)
    made = {DONATED: MAKERS[DONATED](rule, params, grads)}
    start = time.perf_counter()
    made[DONATED].step()
    first = time.perf_counter() - start
    if first > PATIENCE:
        return {**found, "seconds": first}
    for name in names:
        made.setdefault(name, MAKERS[name](rule, params, grads))
    how: dict[str, Any] = {"repeats": REPEATS, "fill": 0.03 if part == ADAMW else 0.01}
    if part != ADAMW:  # AdamW in the same run, for the time per byte
        adamw = RULES["adamw"]
        if rule is not adamw:
            made[ADAMW] = steppers.ours(adamw, params, grads, donate=True)
        found["bytes of AdamW"] = adamw.bytes(params)
    calls = {name: stepper.step for name, stepper in made.items()}
    # The clock first: what float64 frees changes how fast memory is had afterwards.
    found["milliseconds"] = measure.interleaved(calls, **how)
    if part != ADAMW and tree == LARGE:
        measure.widen_heap()
        found["widened"] = measure.interleaved(calls, **how)
    return {**found, "difference": differences(rule, tree, names, params, grads)}


def differences(
    rule: Rule, tree: str, names: list[str], params: list[Tensor], grads: list[Tensor]
) -> dict[str, float]:
    """How far each contender comes from float64.

    Raises:
        AssertionError: too far.
    """
    steps = 1 if rule.takes_loss else 2 if rule.rounds_coarsely else CHECKED
    coarse = rule.rounds_coarsely and not rule.amplifies
    tolerance = COARSE if coarse else TOLERANCE
    changes = changed(steppers.exact(rule, params, grads), params, steps)
    if not rule.sparse:
        moved = [(c != 0).double().mean() for c in changes]
        assert min(moved) > 0.99, "parameters stand still"
    if rule.amplifies:
        params, grads = ([x.double() for x in column] for column in (params, grads))
    found = {}
    for name in names:
        done = changed(MAKERS[name](rule, params, grads), params, steps)
        found[name] = difference = measure.difference(done, changes)
        if not difference <= tolerance:  # so that NaN fails, too
            raise AssertionError(f"{name} differs by {difference:.1e}: {rule}, {tree}")
    return found


def changed(stepper: Stepper, params: list[Tensor], steps: int) -> list[Tensor]:
    """By how much so many steps change the parameters."""
    for _ in range(steps):
        stepper.step()
    return [new.double() - old for old, new in zip(params, stepper.params())]


if __name__ == "__main__":
    main()
