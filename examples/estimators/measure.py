"""What each estimator gives on a problem, how far that is off, and how long it took."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor

import funcopt as fo
from estimators.problems import Exact
from funcopt import tree

FLOOR = 1e-16  # an error below is none

Call = Callable[[Exact], Tensor]


class Point(NamedTuple):
    """One estimate: by what, with which setting, how right and how fast."""

    method: str
    setting: int  #: window, iterations or particles; 0 where there is none to choose
    slope: float  #: the mean of what was estimated
    error: float  #: relative, in the 2-norm
    seconds: float  #: the least of some repetitions


def measure(
    exact: Exact, method: str, setting: int, call: Call, repetitions: int = 3
) -> Point:
    seconds, found = [], exact.grads
    for _ in range(repetitions):
        begin = perf_counter()
        found = call(exact)
        seconds.append(perf_counter() - begin)
    off = torch.linalg.vector_norm(found - exact.grads)
    error = float(off / torch.linalg.vector_norm(exact.grads))
    slope = float(found.mean())
    return Point(method, setting, slope, max(error, FLOOR), min(seconds))


def whole(estimator: Callable[..., fo.meta.Estimate], exact: Exact, **how: Any) -> Tensor:
    return only(estimator(exact.problem, exact.eta, **how))


def last_steps(exact: Exact, estimator: Any, steps: int, **how: Any) -> Tensor:
    """The estimate of the last steps, all before them made without a derivative."""
    problem, eta = exact.problem, exact.eta
    carry = fo.meta.advance(problem, eta, problem.steps - steps)
    return only(estimator(problem, eta, carry=carry, **how))


def windows(
    exact: Exact, estimator: Any, window: int, seed: int | None = None, **how: Any
) -> Tensor:
    """Estimates of all windows of a training, as that of the whole objective."""
    problem, carry, total = exact.problem, None, torch.zeros(())
    if seed is not None:
        how["generator"] = torch.Generator().manual_seed(seed)
    for _ in range(0, problem.steps, window):
        found = estimator(problem, exact.eta, carry=carry, window=window, **how)
        carry, total = found.carry, total + only(found)
    return total * window / problem.steps if problem.objective == "mean" else total


def only(estimate: fo.meta.Estimate) -> Tensor:
    """The one tensor that eta holds."""
    (slope,) = tree.leaves(estimate.grads)
    return slope


def by_windows(seed: int, particles: int) -> Iterable[tuple[str, int, Call]]:
    """For influence balancing: the length of the window is what matters."""
    for window in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000):
        yield (
            "truncated",
            window,
            partial(windows, estimator=fo.meta.truncated, window=window),
        )
    for window in (10, 100):
        for name in ("pes", "es_single"):
            yield (
                name,
                window,
                partial(
                    windows,
                    estimator=getattr(fo.meta, name),
                    window=window,
                    seed=seed,
                    particles=particles,
                ),
            )
    yield "forward", 0, partial(whole, fo.meta.forward)


def of_a_rate(seed: int, steps: int) -> Iterable[tuple[str, int, Call]]:
    yield "reverse", 0, partial(whole, fo.meta.reverse)
    yield "forward", 0, partial(whole, fo.meta.forward)
    yield "first_order", 0, partial(whole, fo.meta.first_order)
    yield (
        "hypergradient_descent",
        0,
        partial(last_steps, estimator=fo.meta.hypergradient_descent, steps=1),
    )
    for window in lengths(steps):
        yield (
            "truncated",
            window,
            partial(last_steps, estimator=fo.meta.truncated, steps=window, window=window),
        )
        yield (
            "weight_update_implicit",
            window,
            partial(whole, fo.meta.weight_update_implicit, iterations=window),
        )
    for particles in (4, 16, 64, 256):
        for name in ("pes", "es_single"):
            yield (
                name,
                particles,
                partial(
                    windows,
                    estimator=getattr(fo.meta, name),
                    window=steps // 4,
                    seed=seed,
                    particles=particles,
                    sigma=0.01,
                ),
            )


def of_penalties(seed: int, steps: int) -> Iterable[tuple[str, int, Call]]:
    del seed  # nothing is drawn
    yield "reverse", 0, partial(whole, fo.meta.reverse)
    yield "implicit: identity", 0, partial(whole, fo.meta.implicit, solver="identity")
    for count in lengths(steps):
        yield (
            "truncated",
            count,
            partial(last_steps, estimator=fo.meta.truncated, steps=count, window=count),
        )
        yield (
            "implicit: neumann",
            count,
            partial(
                whole, fo.meta.implicit, solver="neumann", iterations=count, step_size=0.3
            ),
        )
    for count in (1, 2, 5, 10, 20):
        yield "implicit: cg", count, partial(whole, fo.meta.implicit, iterations=count)


def lengths(steps: int) -> list[int]:
    return [n for n in (1, 2, 5, 10, 20, 50, 100, 200, 500) if n < steps]
