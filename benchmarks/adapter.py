"""``step()`` of funcopt.torch_optim against torch.optim's fastest, each class of torch's.

    python benchmarks/adapter.py               # a few minutes, one thread
    python benchmarks/adapter.py --only AdamW  # to measure anew, the rest is kept

Contenders are torch's for-loop, foreach and fused, where it has them; each class has a
process of its own. Also construction and ``state_dict`` of 1,000 parameters. Writes
``results/adapter.json``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import Parameter
from tqdm import tqdm

import measure
import report
from contestants.rules import RULES
from funcopt import torch_optim
from funcopt.torch_optim.generated import FACTORIES
from report.adapter import adapter_tables
from workloads import sizes

NAMES = [
    "SGD", "ASGD", "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "Muon",
    "NAdam", "RAdam", "RMSprop", "Rprop", "SparseAdam",
]  # fmt: skip
MANY = "1,000 parameters"
LARGE = "10 M"
HOW: dict[str, Any] = {"repeats": 15, "fill": 0.01}
LOOPED = ("Muon", "SparseAdam")  # which torch.optim has no other way for
IMPLEMENTATIONS = {
    "for-loop": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}


def transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(64, 4, 256, batch_first=True)
    return nn.TransformerEncoder(layer, 12, enable_nested_tensor=False)


SIZES: dict[str, Callable[[], sizes.Shapes]] = {
    "Omniglot": lambda: sizes.TREES["Omniglot net"],
    "MLP": lambda: [(32, 32), (32,)] * 5,
    "transformer": lambda: [tuple(p.shape) for p in transformer().parameters()],
    LARGE: lambda: sizes.TREES["10 M in 10"],
}


def stepper(library: Any, name: str, shapes: sizes.Shapes, **flags: Any) -> Any:
    """Steps of parameters that keep their gradients; None where torch has no such way."""
    rule = RULES[FACTORIES[name]]
    shapes = rule.fit(shapes)
    params = [*map(Parameter, sizes.tensors(shapes, seed=1))]
    grads = [1e-3 * g for g in sizes.tensors(shapes, seed=2)]
    for p, g in zip(params, rule.gradients(grads)):
        p.grad = g
    try:
        optimizer = getattr(library, name)(params, **flags)
        optimizer.step()
    except (TypeError, RuntimeError):
        return None
    return optimizer.step


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, help="measure on so many, print JSON")
    parser.add_argument("--part", help=f"what to measure then: a class, or {MANY}")
    parser.add_argument("--only", nargs="*", default=[], help="classes, and not all")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
        torch.manual_seed(0)
        print(json.dumps(many() if given.part == MANY else steps(given.part)))
        return
    found: list[dict[str, Any]] = []
    for name in tqdm(given.only or [*NAMES, MANY], unit="class"):
        found += measure.on_threads(__file__, (1,), ("--part", name))
    new = {(r["name"], r.get("size")) for r in found}
    kept = measure.load("adapter") or [] if given.only else []
    rest = [r for r in kept if (r["name"], r.get("size")) not in new]
    order = [*NAMES, MANY]
    measure.save("adapter", sorted([*rest, *found], key=lambda r: order.index(r["name"])))
    report.write()
    print(adapter_tables())


def steps(name: str) -> list[dict[str, Any]]:
    """One class on each net, the largest first: in a process that has freed nothing."""
    results = []
    for size in reversed(SIZES):
        shapes = SIZES[size]()
        calls = {"funcopt": stepper(torch_optim, name, shapes)}
        ways = {"for-loop": {}} if name in LOOPED else IMPLEMENTATIONS
        for way, flags in ways.items():
            calls[way] = stepper(torch.optim, name, shapes, **flags)
        calls = {way: call for way, call in calls.items() if call is not None}
        result = {"name": name, "size": size, "times": measure.interleaved(calls, **HOW)}
        if size == LARGE:
            measure.widen_heap()
            result["widened"] = measure.interleaved(calls, **HOW)
        results.insert(0, result)
    return results


def many() -> list[dict[str, Any]]:
    """Construction and ``state_dict`` of many parameters."""
    calls = {}
    for library, of in ((torch_optim, "funcopt"), (torch.optim, "torch")):
        params = [Parameter(torch.zeros(4)) for _ in range(1000)]
        optimizer = library.AdamW(params)
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        calls[f"construction, {of}"] = lambda lib=library, p=params: lib.AdamW(p)
        calls[f"state_dict, {of}"] = optimizer.state_dict
    return [{"name": MANY, "times": measure.interleaved(calls, **HOW)}]


if __name__ == "__main__":
    main()
