"""A line search by the strong Wolfe conditions; each task of a batch stops on its own."""

from collections.abc import Callable
from math import inf
from typing import NamedTuple, cast

import torch

from funcopt.conditions import Condition, Number, decided, everywhere, no, where
from funcopt.types import Tensor

_DECREASE = 1e-4  # c₁ of Nocedal and Wright
_CURVATURE = 0.9  # c₂


class Point(NamedTuple):
    """A place on the line: its distance, the loss, the gradient, and that along d."""

    t: Number
    loss: Number
    g: Tensor
    slope: Number


def pick(condition: Condition, a: Point, b: Point) -> Point:
    """``a`` where the condition holds, else ``b``."""
    known = decided(condition)
    if known is not None or a is b:
        return a if known else b
    return Point(*(torch.where(cast(Tensor, condition), x, y) for x, y in zip(a, b)))


def strong_wolfe(
    at: Callable[[Number], Point],
    start: Point,
    t: Number,
    width: Number,
    tolerance_change: Number,
    most: Number,
    limit: int,
    running: Condition,
) -> tuple[Point, Number]:
    """A point that is lower and flatter than ``start``, and how often ``at`` was used.

    Where neither is found, it is the lowest end of the interval that was left.

    Args:
        at: evaluates the loss at a distance.
        start: the point at distance 0.
        t: the first distance to try.
        width: of the direction, its largest element in magnitude.
        tolerance_change: an interval that moves no parameter further is not divided.
        most: how many trials may follow the first one.
        limit: a number that ``most`` never exceeds.
        running: who takes part; who does not gets ``start`` and 0.
    """
    tried = running + 0
    new = at(where(running, t, 0 * t))
    previous = first = second = start  # the interval's ends, as torch orders them
    low_first, zooming, doubtful = True, False, False
    for turn in range(limit + 1):
        spent = turn >= most
        high_loss = new.loss > start.loss + _DECREASE * new.t * start.slope
        flat = abs(new.slope) <= -_CURVATURE * start.slope

        # Those that look for an interval: the trial may be its far end.
        seeking = running & no(zooming)
        above = high_loss | (new.loss >= previous.loss) if turn > 1 else high_loss
        found = seeking & no(above) & flat
        closed = seeking & no(spent) & no(found) & (above | (new.slope >= 0))

        # Those that have one: the trial replaces one of its ends.
        low, high = pick(low_first, first, second), pick(low_first, second, first)
        zoom = running & zooming
        worse = high_loss | (new.loss >= low.loss)
        beyond = new.slope * (high.t - low.t) >= 0
        found = found | (zoom & no(worse) & flat)
        high = pick(worse, new, pick(beyond, low, high))
        low = pick(worse, low, new)
        first, second = (
            pick(zoom, pick(low_first, low, high), first),
            pick(zoom, pick(low_first, high, low), second),
        )

        ended = seeking & (found | spent)
        first = pick(closed, previous, pick(ended, pick(found, new, start), first))
        second = pick(closed | ended, new, second)
        ordered = closed | ended | zoom
        low_first = where(ordered, first.loss <= second.loss, low_first)
        zooming = zooming | closed

        narrow = zooming & (abs(second.t - first.t) * width < tolerance_change)
        running = running & no(found | spent | narrow)
        if turn == limit or everywhere(no(running)):
            break

        t = new.t
        if not everywhere(zooming):
            t = _cubic(previous, new, t + 0.01 * (t - previous.t), t * 10)
        if not everywhere(no(zooming)):
            near, doubtful = _inside(first, second, doubtful)
            t = where(zooming, near, t)
        previous = new
        new = at(where(running, t, new.t))
        tried = tried + running
    return pick(low_first, first, second), tried


def _inside(first: Point, second: Point, doubtful: Condition) -> tuple[Number, Condition]:
    """Where to divide an interval, and whether that came too close to an end.

    If it does so a second time, or is an end itself, it is moved a tenth of the interval
    away from there.
    """
    least, most = _sorted(first.t, second.t)
    t = _cubic(first, second, least, most)
    margin = 0.1 * (most - least)
    close = (_sorted(most - t, t - least)[0]) < margin
    moved = close & (doubtful | (t >= most) | (t <= least))
    away = where(abs(t - most) < abs(t - least), most - margin, least + margin)
    return where(moved, away, t), close & no(moved)


def _sorted(a: Number, b: Number) -> tuple[Number, Number]:
    return where(b < a, b, a), where(b > a, b, a)


def _cubic(a: Point, b: Point, least: Number, most: Number) -> Number:
    """The minimum of the cubic through both points, within bounds.

    Where there is no minimum, and where torch has NaN (0 by 0), the middle of the bounds;
    where it is infinitely far, as of a straight line, a bound.
    """
    swapped = a.t > b.t
    a, b = pick(swapped, b, a), pick(swapped, a, b)
    apart = b.t - a.t
    there = apart > 0
    d1 = a.slope + b.slope - 3 * (a.loss - b.loss) / where(there, -apart, 1.0)
    squared = d1 * d1 - a.slope * b.slope
    real = squared > 0
    d2 = where(real, where(real, squared, 1.0) ** 0.5, 0.0)
    below = b.slope - a.slope + 2 * d2
    there = there & (squared >= 0)
    above = b.slope + d2 - d1
    endless = there & (below == 0) & (above != 0)
    there = there & (below != 0)
    ratio = above / where(there, below, 1.0)
    t = b.t - apart * ratio
    t = where(least > t, least, t)
    t = where(most < t, most, t)
    t = where(there & (abs(ratio) < inf), t, (least + most) / 2)
    return where(endless, where(above > 0, least, most), t)
