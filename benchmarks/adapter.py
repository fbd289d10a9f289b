"""``step()`` of funcopt.torch_optim against torch.optim's fastest, each class of torch's.

    python benchmarks/adapter.py               # a few minutes, one thread
    python benchmarks/adapter.py --only AdamW SGD --skip "10 M"

Contenders are torch's for-loop, foreach and fused, where it has them. Also construction
and ``state_dict`` of 1,000 parameters. Writes ``results/adapter.json``.
"""

from __future__ import annotations

import argparse
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
from workloads import sizes

NAMES = [
    "SGD", "ASGD", "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "Muon",
    "NAdam", "RAdam", "RMSprop", "Rprop", "SparseAdam",
]  # fmt: skip
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
    "10 M": lambda: sizes.TREES["10 M in 10"],
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
    parser.add_argument("--only", nargs="*", default=NAMES)
    parser.add_argument("--skip", nargs="*", default=[], help="sizes")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--fill", type=float, default=0.01, help="seconds of a sample")
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    results = []
    cases = [(n, s) for n in given.only for s in SIZES if s not in given.skip]
    for name, size in tqdm(cases):
        shapes = SIZES[size]()
        calls = {"funcopt": stepper(torch_optim, name, shapes)}
        ways = {"for-loop": {}} if name in LOOPED else IMPLEMENTATIONS
        for way, flags in ways.items():
            calls[way] = stepper(torch.optim, name, shapes, **flags)
        calls = {way: call for way, call in calls.items() if call is not None}
        times = measure.interleaved(calls, repeats=given.repeats, fill=given.fill)
        best = min(
            (way for way in times if way != "funcopt"), key=lambda w: times[w]["min"]
        )
        ratio = times[best]["min"] / times["funcopt"]["min"]
        tqdm.write(
            f"{name:10} {size:12} {1e3 * times['funcopt']['min']:9.1f} µs, "
            f"{ratio:5.2f} × faster than torch's {best}"
        )
        results.append({"name": name, "size": size, "times": times, "ratio": ratio})
    many = [torch.Size([4])] * 1000
    calls = {}
    for library, of in ((torch_optim, "funcopt"), (torch.optim, "torch")):
        params = [Parameter(torch.zeros(shape)) for shape in many]
        optimizer = library.AdamW(params)
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        calls[f"construction, {of}"] = lambda lib=library, p=params: lib.AdamW(p)
        calls[f"state_dict, {of}"] = optimizer.state_dict
    times = measure.interleaved(calls, repeats=given.repeats, fill=given.fill)
    for what in ("construction", "state_dict"):
        share = times[f"{what}, funcopt"]["min"] / times[f"{what}, torch"]["min"]
        tqdm.write(f"{what} of 1,000 parameters: {share:.2f} of torch's time")
    results.append({"name": "1,000 parameters", "times": times})
    if not given.skip and given.only == NAMES:
        measure.save("adapter", results)
        report.write()


if __name__ == "__main__":
    main()
