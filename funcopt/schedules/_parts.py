"""What schedules share: checked parameters, and arithmetic on numbers of any kind."""

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from numbers import Real
from typing import Any

import torch

from funcopt.errors import HyperparameterError, HyperparameterTypeError
from funcopt.schedules.schedule import Schedule
from funcopt.types import Tensor

Number = Any  # a float or a 0-d tensor
Count = Any  # an int or a 0-d float64 tensor, never negative


class Formula:
    """A function of the count with its parameters, which it takes in float64.

    They are cast anew in every call: the graph of one call is not another's.
    """

    __slots__ = ("function", "parameters")

    def __init__(self, function: Callable[..., Any], parameters: dict[str, Any]) -> None:
        self.function = function
        self.parameters = parameters

    def __call__(self, count: Count) -> Any:
        return self.function(count, **{k: _wide(v) for k, v in self.parameters.items()})

    def __repr__(self) -> str:
        values = ", ".join(f"{k}={v!r}" for k, v in self.parameters.items())
        return f"{self.function.__name__.strip('_')}({values})"


def schedule(function: Callable[..., Any], **parameters: Any) -> Schedule:
    """The Schedule whose value is ``function(count, **parameters)``."""
    return Schedule(Formula(function, parameters))


def _wide(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to(torch.float64)
    return [_wide(v) for v in value] if isinstance(value, list) else value


# Parameters ----------------------------------------------------------------------------


def number(name: str, value: Number, most: float = math.inf) -> Number:
    """A float in [0, most], or a tensor, whose value is not looked at."""
    if isinstance(value, Tensor):
        return value
    if not isinstance(value, Real) or isinstance(value, bool):
        raise HyperparameterTypeError(
            f"{name} takes a number or a 0-d tensor, not {value!r}"
        )
    value = float(value)
    if not (0 <= value <= most and math.isfinite(value)):
        upper = f"{most:g}]" if most < math.inf else "inf)"
        raise HyperparameterError(f"{name} must be in [0, {upper}, got {value}")
    return value


def positive(name: str, value: Number) -> Number:
    """A float over 0, or a tensor."""
    value = number(name, value)
    if isinstance(value, float) and value == 0:
        raise HyperparameterError(f"{name} must be over 0, got {value}")
    return value


def whole(name: str, value: int, low: int = 1) -> int:
    """An int that is at least ``low``."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise HyperparameterTypeError(f"{name} takes a whole number, not {value!r}")
    if value < low:
        raise HyperparameterError(f"{name} must be at least {low}, got {value}")
    return value


def increasing(name: str, values: Iterable[int]) -> list[int]:
    """Ints that are not negative, none below the one before."""
    if not isinstance(values, Iterable):
        raise HyperparameterTypeError(f"{name} takes whole numbers, not {values!r}")
    listed = [whole(f"{name}[{i}]", v, low=0) for i, v in enumerate(values)]
    if listed != sorted(listed):
        raise HyperparameterError(f"{name} must increase, got {listed}")
    return listed


def one_of(name: str, value: str, known: Sequence[str]) -> str:
    """``value``, if it is one of those known."""
    if value not in known:
        raise HyperparameterError(f"{name} is one of {', '.join(known)}, not {value!r}")
    return value


def function(name: str, value: Callable[..., Any]) -> Callable[..., Any]:
    """Something that can be called."""
    if not callable(value) or isinstance(value, Schedule):
        raise HyperparameterTypeError(f"{name} takes a function, not {value!r}")
    return value


# Arithmetic: of ints and floats a float, exactly as Python's; of tensors a float64 tensor


def where(condition: Any, a: Number, b: Number) -> Number:
    """``a`` where ``condition`` holds, else ``b``. Both must have finite derivatives."""
    if isinstance(condition, bool):
        return a if condition else b
    return torch.where(condition, _tensor(a, condition), _tensor(b, condition))


def _tensor(value: Number, like: Tensor) -> Tensor:
    if isinstance(value, Tensor):
        return value.to(torch.float64)
    return torch.scalar_tensor(value, dtype=torch.float64, device=like.device)


def clipped(count: Count, low: int, high: int | None) -> Count:
    """The count, held in [low, high]."""
    if isinstance(count, Tensor):
        return count.clamp(low, high)
    return max(count, low) if high is None else min(max(count, low), high)


def passed(count: Count, boundaries: Sequence[int]) -> Count:
    """How many of the boundaries, in order, the count has reached."""
    if isinstance(count, Tensor):
        rows = torch.tensor(boundaries, dtype=torch.float64, device=count.device)
        return (count >= rows).sum().to(torch.float64)
    return bisect_right(boundaries, count)


def half_cosine(fraction: Number) -> Number:
    """From 1 at 0 to 0 at 1, as half a wave of the cosine."""
    angle = math.pi * fraction
    return (1 + (torch.cos(angle) if isinstance(angle, Tensor) else math.cos(angle))) / 2


def raised(base: Number, exponent: Number) -> Number:
    """base^exponent for numbers ≥ 0; where the base is 0, with derivative 0."""
    some = base > 0
    return where(some, where(some, base, 1.0) ** exponent, where(exponent == 0, 1.0, 0.0))


def times(factor: Number, count: Count) -> Number:
    """factor^count for a whole count ≥ 0, with finite derivatives at factor 0, too."""
    some = count > 0
    return where(some, factor ** where(some, count, 1), 1.0)
