"""Differentiable AdamW against autograd through an optimizer written tensor by tensor.

    python benchmarks/unroll.py          # three minutes on two cores

Five unrolled steps, forward and backward, with gradients to the learning rate, both
betas, eps, the weight decay, and every gradient that came in. Both sides must agree with
the plain one in float64 before the clock starts. Bytes are those of the distinct tensors
that autograd saves, as its hooks see them. Writes ``results/unroll.json``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from tqdm import tqdm

import funcopt as fo
import measure
import report
from report.targets import UNROLL
from workloads import sizes

STEPS = 5
REPEATS = 31
#: Largest difference of a gradient from float64, relative to its greatest entry.
TOLERANCE = 1e-4
HYPER = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.99, "eps": 1e-3, "weight_decay": 1e-2}

#: parameters, the gradients of each step, hyperparameters → the last parameters
Unroll: TypeAlias = Callable[
    [list[Tensor], list[list[Tensor]], dict[str, Tensor]], list[Tensor]
]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, help="measure on so many, print JSON")
    threads = parser.parse_args().threads
    if threads:
        torch.set_num_threads(threads)
        print(json.dumps([case(tree, threads) for tree in tqdm(UNROLL, desc="unroll")]))
        return
    measure.save("unroll", measure.on_threads(__file__))
    report.write()
    print(report.unroll_table())


def ours(
    params: list[Tensor], grads: list[list[Tensor]], hyper: dict[str, Tensor]
) -> list[Tensor]:
    """funcopt's AdamW."""
    values: dict[str, Any] = {k: v for k, v in hyper.items() if k not in _BETAS}
    values["betas"] = tuple(hyper[name] for name in _BETAS)
    state = OPTIMIZER.init(params)
    for g in grads:
        params, state = OPTIMIZER.update(g, state, params, **values)
    return params


def plain(
    params: list[Tensor], grads: list[list[Tensor]], hyper: dict[str, Tensor]
) -> list[Tensor]:
    """A list comprehension for each line of the algorithm, as TorchOpt and higher do."""
    lr, beta1, beta2, eps, decay = hyper.values()
    means = [torch.zeros_like(p) for p in params]
    squares = [torch.zeros_like(p) for p in params]
    for t, gradients in enumerate(grads, 1):
        means = [beta1 * m + (1 - beta1) * g for m, g in zip(means, gradients)]
        squares = [beta2 * v + (1 - beta2) * g * g for v, g in zip(squares, gradients)]
        steps = [
            (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + eps)
            for m, v in zip(means, squares)
        ]
        params = [p - lr * (u + decay * p) for p, u in zip(params, steps)]
    return params


OPTIMIZER = fo.adamw()
_BETAS = ("beta1", "beta2")
SIDES: dict[str, Unroll] = {"funcopt": ours, "per tensor": plain}


def case(tree: str, threads: int) -> dict[str, Any]:
    """Times, bytes and agreement of both sides on one tree."""
    given = inputs(tree, torch.float32)
    expected = gradients(plain, *inputs(tree, torch.float64))
    assert all(g.abs().max() > 0 for g in expected), "a gradient is zero"
    differences = {}
    for name, side in SIDES.items():
        differences[name] = measure.difference(gradients(side, *given), expected)
        if not differences[name] <= TOLERANCE:
            raise AssertionError(f"{name} differs by {differences[name]:.1e}: {tree}")
    return {
        "tree": tree,
        "threads": threads,
        "milliseconds": measure.interleaved(
            {
                name: lambda side=side: gradients(side, *given)
                for name, side in SIDES.items()
            },
            repeats=REPEATS,
        ),
        "saved_bytes": {name: saved(side, *given) for name, side in SIDES.items()},
        "difference": differences,
    }


def inputs(
    tree: str, dtype: torch.dtype
) -> tuple[list[Tensor], list[list[Tensor]], dict[str, Tensor], list[Tensor]]:
    """Parameters, five lists of gradients, hyperparameters, and the loss's weights.

    What the outcome is differentiated by is a leaf of autograd's. ε and 1 - β₂ are large
    enough for their derivatives to be told from rounding: that of β₂ is the difference
    of two terms in 1 / (1 - β₂), of the moment and of its bias correction.
    """
    shapes = sizes.TREES[tree]

    def made(seed: int, asked: bool) -> list[Tensor]:
        found = sizes.tensors(shapes, seed=seed)
        return [x.to(dtype).requires_grad_(asked) for x in found]

    hyper = {
        name: torch.tensor(value, dtype=torch.float64, requires_grad=True)
        for name, value in HYPER.items()
    }
    grads = [made(seed, True) for seed in range(2, 2 + STEPS)]
    return made(1, False), grads, hyper, made(99, False)


def gradients(
    unroll: Unroll,
    params: list[Tensor],
    grads: list[list[Tensor]],
    hyper: dict[str, Tensor],
    weights: list[Tensor],
) -> list[Tensor]:
    """Of a weighted sum of the last parameters, by all hyperparameters and gradients."""
    last = unroll(params, grads, hyper)
    asked = [*hyper.values(), *(g for step in grads for g in step)]
    return list(torch.autograd.grad(last, asked, weights))


def saved(unroll: Unroll, *given: Any) -> int:
    """The bytes of the distinct storages that autograd saves for the backward pass."""
    storages: dict[int, torch.UntypedStorage] = {}  # alive, so that no address recurs

    def pack(x: Tensor) -> Tensor:
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    params, grads, hyper, _ = given
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        last = unroll(params, grads, hyper)
    del last
    return sum(storage.nbytes() for storage in storages.values())


if __name__ == "__main__":
    main()
