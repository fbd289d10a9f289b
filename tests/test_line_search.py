"""The search by itself, against torch's, on losses that are made to meet every case.

Each loss is a table of few numbers, by no rule: conditions are met, missed and tied (a
loss that is the bound, or that of the point before; a slope of exactly the bound, or 0).
"""

import math
from collections.abc import Callable
from itertools import product
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.lbfgs import _cubic_interpolate, _strong_wolfe

from funcopt.optimizers import _line_search
from funcopt.optimizers._line_search import Point

MOST = 12  # trials


class Line:
    """A loss along a line, with what a search is given."""

    def __init__(self, seed: int) -> None:
        self.seed, draw = seed, Random(seed)
        self.slope = -draw.choice([1.0, 4.0, 1e4])
        self.width = draw.choice([0.25, 1.0, 2.0])
        self.t = draw.choice([1 / 64, 0.5, 1.0, 3.0, 40.0])
        self.most = draw.choice([0, 1, 2, 3, 5, MOST, MOST])
        self.tolerance = draw.choice([1e-9, 1e-9, 0.125, 0.5, 1.0])
        self.likely = draw.choice([0.2, 0.5, 0.8])  # that a point is steep and low
        self.asked = draw.random() > 0.05

    def __call__(self, t: float) -> tuple[float, float]:
        """The loss and the slope at a distance; 0 and ``slope`` at 0."""
        if t == 0:
            return 0.0, self.slope
        draw = Random(self.seed * 1000003 + round(64 * t))
        if draw.random() < self.likely:
            return draw.choice([t, 1.0]) * self.slope, draw.choice(
                [1, 2, 0.95]
            ) * self.slope
        bound = 1e-4 * t * self.slope
        losses = [
            bound,
            bound,
            0.5 * bound,
            2 * bound,
            0.1 * self.slope,
            self.slope,
            0.0,
            -self.slope,
        ]
        slopes = [-0.9, 0.9, 0.0, 0.0, 0.5, -0.5, 1.0, -2.0, -1.0]
        return draw.choice(losses), draw.choice(slopes) * self.slope


class Script(Line):
    """What is evaluated gives these numbers in turn, wherever it is."""

    def __init__(self, slope: float, t: float, *rows: tuple[float, float]) -> None:
        super().__init__(0)
        self.slope, self.t, self.rows = slope, t, rows
        self.width, self.most, self.tolerance = 1.0, MOST, 1e-9
        self.places: list[float] = []

    def __call__(self, t: float) -> tuple[float, float]:
        if t == 0 and not self.places:
            return 0.0, self.slope
        self.places.append(t)
        return self.rows[min(len(self.places), len(self.rows)) - 1]


SCRIPTS: dict[str, Callable[[], Script]] = {
    "least": lambda: Script(-1.0, 1.0, (1e30, 1e30), (1.0, 1.0), (-1.0, 0.0)),
    "most": lambda: Script(
        -1.0, 1.0, (-1.0, 2.0), (1e30, -1e30), (2.0, 1.0), (-2.0, 0.0)
    ),
    "a tenth": lambda: Script(-2.0, 10.0, (80.0, 18.0), (18.0, 38.0), (-9.0, 0.0)),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_ends_of_an_interval(name: str):
    """A minimum at an end itself; one that is exactly not too near."""
    theirs, ours = SCRIPTS[name](), SCRIPTS[name]()
    expected = by_torch(theirs)
    assert found([ours], [True]) == [expected]
    assert ours.places == theirs.places and len(ours.places) > 2


POINTS = [*product((-1.0, 0.0, 2.0), (-2.0, 0.0, 1.0), (-1.0, 0.0, 1.0, 2.0))]
BOUNDS = [(-0.5, 0.75), (2.5, 40.0), (-9.0, -3.0)]


def test_the_cubics_minimum_is_torchs():
    """Also of straight lines, that fall without end; where torch has 0/0, the middle."""
    pairs = [(a, b) for a, b in product(POINTS, POINTS) if a[0] != b[0]]
    cases = [(a, b, *bounds) for a, b in pairs for bounds in BOUNDS]
    a, b = (f64([case[i] for case in cases]).unbind(1) for i in (0, 1))
    low, high = f64([case[2:] for case in cases]).unbind(1)
    ours = _line_search._cubic(point(*a), point(*b), low, high)
    nowhere = 0
    for (a, b, *bounds), t in zip(cases, ours.tolist()):
        (x1, f1, g1), (x2, f2, g2) = (map(f64, point) for point in (a, b))
        expected = float(_cubic_interpolate(x1, f1, g1, x2, f2, g2, bounds=bounds))
        if expected != expected:
            nowhere, expected = nowhere + 1, sum(bounds) / 2
        assert abs(t - expected) <= 1e-12 * abs(expected), (a, b, bounds)
    assert nowhere


def point(t: Tensor, loss: Tensor, slope: Tensor) -> Point:
    return Point(t, loss, slope, slope)


@pytest.mark.parametrize(
    "a, b",
    [
        ((0.0, 0.0, -1.0), (0.0, 0.0, -1.0)),  # one place
        ((0.0, 0.0, -1.0), (0.0, 1.0, 2.0)),
        ((0.0, 0.0, 0.0), (1.0, 0.0, 0.0)),  # no slope
        ((0.0, 0.0, -1.0), (1.0, -1.0, -1.0)),  # a straight line
        ((0.0, 0.0, -1.0), (1.0, float("inf"), float("inf"))),
    ],
)
def test_the_derivative_of_a_division_is_finite(a: Any, b: Any):
    def divided(a: Tensor, b: Tensor) -> Tensor:
        return _line_search._cubic(point(*a), point(*b), a[0] - 1, a[0] + 3)

    value = divided(f64(a), f64(b))
    slopes = torch.func.grad(divided, (0, 1))(f64(a), f64(b))
    assert -1 <= value <= 3
    if torch.isfinite(f64(b)).all():
        assert all(slope.isfinite().all() for slope in slopes)
    else:
        assert value == 1


def by_torch(line: Line) -> tuple[float, float, float, int] | None:
    """Loss, slope, distance and evaluations; None where it divides by 0."""

    def at(x: Any, t: Any, d: Any) -> tuple[float, Tensor]:
        if not math.isfinite(t):
            raise ZeroDivisionError
        loss, slope = line(float(t))
        return loss, f64([slope / line.width])

    d, g = f64([line.width]), f64([line.slope / line.width])
    try:
        loss, g, t, tried = _strong_wolfe(
            at, None, line.t, d, 0.0, g, g.dot(d),
            tolerance_change=line.tolerance, max_ls=line.most,
        )  # fmt: skip
    except ZeroDivisionError:
        return None
    return float(loss), g.item() * line.width, float(t), tried


def f64(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def found(lines: list[Line], asked: list[bool]) -> list[tuple[float, ...]]:
    """The same for all of them at once, by ours."""

    moves, before = [0] * len(lines), [0.0] * len(lines)

    def at(t: Tensor) -> Point:
        for i, (place, used) in enumerate(zip(t.tolist(), asked)):
            assert used or place == 0  # nothing is evaluated for who does not ask
            assert math.isfinite(place)
            moves[i] += place != before[i]
            before[i] = place
        rows = [line(place) for line, place in zip(lines, t.tolist())]
        losses, slopes = map(f64, zip(*rows))
        return Point(t, losses, slopes.clone(), slopes)

    zero = torch.zeros(len(lines)).double()
    columns = zip(*[(x.t, x.width, x.tolerance) for x in lines])
    first, width, tolerance = map(f64, columns)
    most = torch.tensor([line.most for line in lines])
    end, tried = _line_search.strong_wolfe(
        at, at(zero), first, width, tolerance, most, MOST, torch.tensor(asked)
    )
    assert all(a <= b for a, b in zip(moves, tried.tolist()))  # who has stopped, stays
    return [*zip(*(x.tolist() for x in (end.loss, end.slope, end.t, tried)))]


def test_every_case_is_torchs():
    lines = [Line(seed) for seed in range(1500)]
    expected = [by_torch(line) for line in lines]
    known = [(line, end) for line, end in zip(lines, expected) if end is not None]
    lines = [line for line, _ in known]
    assert len(known) > 1000
    assert {end[-1] for _, end in known} == set(range(1, MOST + 2))
    asked = [line.asked for line in lines]
    for (line, end), (*ours, tried), used in zip(known, found(lines, asked), asked):
        loss, slope, t, count = end if used else (0.0, line.slope, 0.0, 0)
        size = max(1.0, abs(t)) * abs(line.slope)
        assert tried == count, line.seed
        for a, b in zip(ours, (loss, slope, t)):
            assert abs(a - b) <= 1e-12 * size, line.seed
