"""Every optimizer arrives: at the minimum of four problems, within stated steps."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from row import Case, Row
from table import ROWS
from torch import Tensor
from trees import random_like

import funcopt as fo
from funcopt import tree
from funcopt.types import Tree

NEAR = 3e-2  #: of every number, as in optax's own tests


class Problem(NamedTuple):
    """Its gradient is written out: there are many steps."""

    start: Tree
    gradient: Callable[[Tree], Tree]
    minimum: Tree
    curvature: float  #: about the Hessian's diagonal
    lr: float
    steps: int


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def slope_of_rosenbrock(p: Tensor) -> Tensor:
    """Of (1 - x)² + 100·(y - x²)²."""
    x, y = p.flatten().tolist()
    climb = 200 * (y - x * x)
    return f64(2 * (x - 1) - 2 * x * climb, climb).reshape(p.shape)


POINT = f64(1, -1, 1)
SYMMETRIC = f64(2, 0.5, 0, 0.5, 1, -0.3, 0, -0.3, 1.5).reshape(3, 3)
MATRIX = random_like(torch.empty(3, 2).double(), 1)
LEAVES = {"a": [torch.empty(2), None, torch.empty(())], "frozen": torch.empty(3), "b": ()}
MIXED = random_like(LEAVES, 2)
FROZEN = {"a": False, "frozen": True, "b": ()}

PROBLEMS = {
    "parabola": Problem(
        f64(-1, 10, 1), lambda p: 2 * (p - POINT.view_as(p)), POINT, 2.0, 0.1, 1600
    ),
    "rosenbrock": Problem(f64(0, 0), slope_of_rosenbrock, f64(1, 1), 200.0, 0.03, 1000),
    "matrix": Problem(
        torch.zeros(3, 2).double(),
        lambda p: SYMMETRIC @ (p - MATRIX),
        MATRIX,
        1.5,
        0.1,
        600,
    ),
    "mixed": Problem(
        tree.map(lambda x: torch.full_like(x, 0.4), MIXED),
        lambda p: tree.map(lambda x, y: x - y.view_as(x), p, MIXED),
        MIXED | {"frozen": torch.full((3,), 0.4)},
        1.0,
        0.1,
        300,
    ),
}


SOME = [
    pytest.param(row, marks=() if row.name in ("sgd", "adamw") else pytest.mark.slow)
    for row in ROWS
]


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("row", SOME, ids=lambda row: row.name)
def test_it_arrives(row: Row, name: str):
    problem, own = PROBLEMS[name], row.arrives.get(name, row.arrives.get("", {}))
    if own is None:
        pytest.skip("it goes by signs, across a bent valley")
    own = {"lr": problem.lr, "steps": problem.steps, **own}
    steps, known = own.pop("steps"), row.factory().hyper
    if "weight_decay" in known:
        own["weight_decay"] = 0.0  # which would move the minimum
    data = {"hessian": problem.curvature, "noise": 0.0}
    data = {key: value for key, value in data.items() if key in known}
    opt = row.factory(**own)
    if name == "mixed":
        opt = fo.freeze(opt, FROZEN)
    params: Any = Case(row, row.combinations[0]).fit(problem.start)
    assert distance(params, problem.minimum) > 0.8
    state = opt.init(params)
    for _ in range(steps):
        params, state = opt.update(problem.gradient(params), state, params, **data)
    assert distance(opt.eval_params(state, params), problem.minimum) < NEAR


def distance(params: Tree, minimum: Tree) -> float:
    pairs = zip(tree.leaves(params), tree.leaves(minimum), strict=True)
    gaps = [(p.flatten() - q.flatten()).abs().max() for p, q in pairs if p is not None]
    return torch.stack([gap.double() for gap in gaps]).max().item()


def apart(p: Tree, minimum: Tree, by: Tensor | None = None) -> Tensor:
    """Half the sum of squares of what lies between, a matrix weighed ``by`` another."""
    pairs = zip(tree.leaves(p), tree.leaves(minimum), strict=True)
    gaps = [x - y for x, y in pairs if x is not None]
    sides = gaps if by is None else [by @ gap for gap in gaps]
    return sum(((x * y).sum() / 2 for x, y in zip(gaps, sides)), torch.zeros(()))


#: of the problems' gradients
LOSSES: dict[str, Callable[[Any], Tensor]] = {
    "parabola": lambda p: 2 * apart(p, POINT),
    "rosenbrock": lambda p: (1 - p[0]) ** 2 + 100 * (p[1] - p[0] ** 2) ** 2,
    "matrix": lambda p: apart(p, MATRIX, SYMMETRIC),
    "mixed": lambda p: apart(p, MIXED),
}


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_lbfgs_arrives(search: Any, name: str):
    problem, loss = PROBLEMS[name], LOSSES[name]
    opt = fo.lbfgs(lr=1.0 if search else 0.1, line_search_fn=search)
    if name == "mixed":
        opt = fo.freeze(opt, FROZEN)
    params: Any = problem.start
    state = opt.init(params)
    for _ in range(5 if search else 10):
        grads = problem.gradient(params)
        params, state = opt.update(grads, state, params, loss_fn=loss)
    assert distance(params, problem.minimum) < NEAR
