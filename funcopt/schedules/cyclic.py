"""Cycles without end: up and down on two lines, higher or lower each time."""

from collections.abc import Callable
from typing import Any, Literal

from funcopt.schedules._parts import (
    Count,
    Number,
    function,
    number,
    one_of,
    schedule,
    times,
    where,
    whole,
)
from funcopt.schedules.schedule import Schedule

Mode = Literal["triangular", "triangular2", "exp_range"]
MODES = ("triangular", "triangular2", "exp_range")


def _cyclic(
    count: Count,
    low: Number,
    high: Number,
    step_size_up: int,
    step_size_down: int,
    mode: Mode,
    gamma: Number,
    scale_fn: Callable[[Any], Number] | None,
    scale_mode: str,
    falls: bool,
) -> Number:
    """From low to high and back, or from high to low and back if it falls first."""
    total = step_size_up + step_size_down
    cycle = count // total  # counted from 0
    place = count - cycle * total
    up = place <= step_size_up
    height = where(up, place / step_size_up, (total - place) / step_size_down)
    if scale_fn is not None:
        height = height * scale_fn(cycle + 1 if scale_mode == "cycle" else count)
    elif mode == "triangular2":
        height = height * times(0.5, cycle)
    elif mode == "exp_range":
        height = height * times(gamma, count)
    height = (high - low) * height
    return high - height if falls else low + height


def _schedule(
    low: Number,
    high: Number,
    step_size_up: int,
    step_size_down: int | None,
    mode: Mode,
    gamma: Number,
    scale_fn: Callable[[Any], Number] | None,
    scale_mode: str,
    falls: bool,
) -> Schedule:
    step_size_up = whole("step_size_up", step_size_up)
    if step_size_down is None:
        step_size_down = step_size_up
    return schedule(
        _cyclic,
        low=low,
        high=high,
        step_size_up=step_size_up,
        step_size_down=whole("step_size_down", step_size_down),
        mode=one_of("mode", mode, MODES),
        gamma=number("gamma", gamma),
        scale_fn=None if scale_fn is None else function("scale_fn", scale_fn),
        scale_mode=one_of("scale_mode", scale_mode, ("cycle", "iterations")),
        falls=falls,
    )


def cyclic(
    base_lr: Number,
    max_lr: Number,
    step_size_up: int = 2000,
    step_size_down: int | None = None,
    mode: Mode = "triangular",
    gamma: Number = 1.0,
    scale_fn: Callable[[Any], Number] | None = None,
    scale_mode: Literal["cycle", "iterations"] = "cycle",
) -> Schedule:
    r"""Up from the base to the maximum and down again, in cycles.

    .. math::
        v_t = \text{base\_lr} + (\text{max\_lr} - \text{base\_lr}) \, h_t \, s_t

    where :math:`h_t` goes from 0 to 1 on a line in ``step_size_up`` steps and back in
    ``step_size_down``, and :math:`s_t` is 1 ("triangular"), a half to the power of the
    cycles done ("triangular2") or :math:`\text{gamma}^t` ("exp_range").

    Args:
        base_lr: the least value, ≥ 0.
        max_lr: the largest value of the first cycle, ≥ 0.
        step_size_up: the steps upwards, ≥ 1.
        step_size_down: the steps downwards, ≥ 1; None for as many.
        mode: "triangular", "triangular2" or "exp_range".
        gamma: the factor of each step in "exp_range", ≥ 0.
        scale_fn: :math:`s_t` as a function of its own; then ``mode`` is not read.
        scale_mode: whether ``scale_fn`` gets the number of the cycle, from 1 ("cycle"),
            or the count ("iterations").

    Returns:
        A `Schedule`; ``cyclic_momentum`` is that of the momentum beside it.

    Raises:
        HyperparameterError, HyperparameterTypeError: a number out of its range, or none.

    Source:
        ``torch.optim.lr_scheduler.CyclicLR``; Smith, "Cyclical learning rates for
        training neural networks", 2015.

    Example:
        >>> import torch, funcopt as fo
        >>> lr = fo.schedules.cyclic(0.0, 0.4, step_size_up=2, mode="triangular2")
        >>> [lr(t) for t in range(8)]
        [0.0, 0.2, 0.4, 0.2, 0.0, 0.1, 0.2, 0.1]
    """
    return _schedule(
        number("base_lr", base_lr),
        number("max_lr", max_lr),
        step_size_up,
        step_size_down,
        mode,
        gamma,
        scale_fn,
        scale_mode,
        falls=False,
    )


def cyclic_momentum(
    base_momentum: Number = 0.8,
    max_momentum: Number = 0.9,
    step_size_up: int = 2000,
    step_size_down: int | None = None,
    mode: Mode = "triangular",
    gamma: Number = 1.0,
    scale_fn: Callable[[Any], Number] | None = None,
    scale_mode: Literal["cycle", "iterations"] = "cycle",
) -> Schedule:
    """The momentum (or first beta) beside `cyclic`: least where the rate is largest.

    Args:
        base_momentum: the least value of the first cycle, in [0, 1].
        max_momentum: the largest value, in [0, 1].
        step_size_up: the steps downwards (the rate's upwards), ≥ 1.
        step_size_down: the steps upwards, ≥ 1; None for as many.
        mode: "triangular", "triangular2" or "exp_range".
        gamma: the factor of each step in "exp_range", ≥ 0.
        scale_fn: the scale as a function of its own; then ``mode`` is not read.
        scale_mode: whether ``scale_fn`` gets the number of the cycle, from 1 ("cycle"),
            or the count ("iterations").

    Returns:
        A `Schedule`.

    Raises:
        HyperparameterError, HyperparameterTypeError: a number out of its range, or none.

    Source:
        ``torch.optim.lr_scheduler.CyclicLR`` with ``cycle_momentum``.

    Example:
        >>> import torch, funcopt as fo
        >>> momentum = fo.schedules.cyclic_momentum(step_size_up=2)
        >>> [round(momentum(t), 2) for t in range(5)]
        [0.9, 0.85, 0.8, 0.85, 0.9]
    """
    return _schedule(
        number("base_momentum", base_momentum, most=1.0),
        number("max_momentum", max_momentum, most=1.0),
        step_size_up,
        step_size_down,
        mode,
        gamma,
        scale_fn,
        scale_mode,
        falls=True,
    )
