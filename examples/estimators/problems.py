"""Three bilevel problems of which the meta-gradient is known in closed form."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

import funcopt as fo
from funcopt.hyper import Hyper

SIZE = 20  # parameters of the quadratics


class Exact(NamedTuple):
    """A problem, the point at which it is looked at, and what is right there."""

    problem: fo.meta.Problem
    eta: dict[str, Any]
    grads: Tensor


def f64(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def influence_balancing(steps: int) -> Exact:
    """s' = A s + θ (1 x 10, -1 x 13), with the loss ½ (s¹ - 1)² after every step.

    At first θ does good, later it does harm. The derivative is that of the mean loss.
    """
    size = 23
    shift = torch.diag(torch.full((size - 1,), 0.5, dtype=torch.float64), 1)
    transition = 0.5 * torch.eye(size, dtype=torch.float64) + shift
    push = torch.cat([torch.ones(10), -torch.ones(13)]).double()

    def rule(g: Tensor, s: Tensor, *, step: Any, theta: Tensor) -> tuple[Tensor]:
        return (transition @ s + theta * push,)

    def loss(s: Tensor, _: Any) -> Tensor:
        return 0.5 * (s[0] - 1) ** 2

    system = fo.per_tensor(rule, name="system", slots={}, hyper={"theta": Hyper(0.5)})
    theta, start = torch.tensor(0.5, dtype=torch.float64), torch.ones(size).double()
    problem = fo.meta.Problem(system, loss, loss, steps, start, objective="mean")
    # s moves linearly with θ: its derivative is a system of the same kind.
    slope, total, s = torch.zeros_like(start), torch.zeros(()).double(), start
    for _ in range(steps):
        s, slope = transition @ s + theta * push, transition @ slope + push
        total = total + (s[0] - 1) * slope[0]
    return Exact(problem, {"hyper": {"theta": theta}}, total / steps)


def learned_rate(steps: int) -> Exact:
    """The learning rate of gradient descent on a quadratic of condition 10."""
    curvature = torch.logspace(-1, 0, SIZE, dtype=torch.float64)
    rate, start = torch.tensor(0.1, dtype=torch.float64), f64(SIZE, seed=1)

    def loss(x: Tensor, _: Any) -> Tensor:
        return 0.5 * (curvature * x**2).sum()

    kept = 1 - rate * curvature
    slope = -steps * curvature**2 * kept ** (2 * steps - 1) * start**2
    problem = fo.meta.Problem(fo.sgd(), loss, loss, steps, start)
    return Exact(problem, {"hyper": {"lr": rate}}, slope.sum())


def learned_penalties(steps: int) -> Exact:
    """A penalty for each weight of a ridge regression, judged on other data."""
    x, y = f64(60, SIZE, seed=2), f64(60, seed=3)
    x_valid, y_valid = f64(60, SIZE, seed=4), f64(60, seed=5)
    truth = f64(SIZE, seed=6)
    y, y_valid = y + x @ truth, y_valid + x_valid @ truth
    penalties = torch.full((SIZE,), 0.1, dtype=torch.float64)

    def loss(w: Tensor, _: Any, penalties: Tensor) -> Tensor:
        return 0.5 * ((x @ w - y) ** 2).mean() + 0.5 * (penalties * w**2).sum()

    def judge(w: Tensor, _: Any, penalties: Tensor) -> Tensor:
        return 0.5 * ((x_valid @ w - y_valid) ** 2).mean()

    hessian = x.T @ x / 60 + penalties.diag()
    minimum = torch.linalg.solve(hessian, x.T @ y / 60)
    slope = x_valid.T @ (x_valid @ minimum - y_valid) / 60
    exact = -torch.linalg.solve(hessian, slope) * minimum
    start = torch.zeros(SIZE, dtype=torch.float64)
    problem = fo.meta.Problem(fo.sgd(lr=0.3), loss, judge, steps, start)
    return Exact(problem, {"meta": penalties}, exact)
