"""Schedules by boundaries, each with a factor for all that follows."""

from collections.abc import Mapping
from typing import Literal

from funcopt.errors import HyperparameterError, HyperparameterTypeError
from funcopt.schedules._parts import (
    Count,
    Number,
    clipped,
    half_cosine,
    number,
    one_of,
    positive,
    schedule,
    where,
    whole,
)
from funcopt.schedules.schedule import Schedule


def _sorted(boundaries_and_scales: Mapping[int, Number]) -> tuple[list, list]:
    """The boundaries in order, and their factors."""
    if not isinstance(boundaries_and_scales, Mapping):
        raise HyperparameterTypeError(
            f"boundaries_and_scales takes a dict, not {boundaries_and_scales!r}"
        )
    for boundary in boundaries_and_scales:
        whole("a boundary", boundary, low=0)
    boundaries = sorted(boundaries_and_scales)
    scales = [number(f"the scale at {b}", boundaries_and_scales[b]) for b in boundaries]
    return boundaries, scales


def _piecewise_constant(
    count: Count, init_value: Number, boundaries: list[int], scales: list[Number]
) -> Number:
    value = init_value
    for boundary, scale in zip(boundaries, scales):
        value = value * where(count < boundary, 1.0, scale)
    return value


def piecewise_constant(
    init_value: Number, boundaries_and_scales: Mapping[int, Number]
) -> Schedule:
    r"""Multiplied by a factor of its own at each boundary.

    .. math::
        v_t = \text{init\_value} \cdot \prod_{b \le t} \text{scale}_b

    Args:
        init_value: the first value, ≥ 0.
        boundaries_and_scales: step ≥ 0 → factor ≥ 0.

    Returns:
        A `Schedule`.

    Raises:
        HyperparameterError, HyperparameterTypeError: a number out of its range, or none.

    Source:
        optax's ``piecewise_constant_schedule``.

    Example:
        >>> import torch, funcopt as fo
        >>> lr = fo.schedules.piecewise_constant(0.4, {2: 0.5, 3: 0.25})
        >>> [lr(t) for t in range(5)]
        [0.4, 0.4, 0.2, 0.05, 0.05]
    """
    boundaries, scales = _sorted(boundaries_and_scales)
    return schedule(
        _piecewise_constant,
        init_value=number("init_value", init_value),
        boundaries=boundaries,
        scales=scales,
    )


def _piecewise_interpolate(
    count: Count,
    init_value: Number,
    boundaries: list[int],
    scales: list[Number],
    interpolate_type: str,
) -> Number:
    value, start = init_value, 0
    for end, scale in zip(boundaries, scales):
        gone = clipped(count - start, 0, end - start) / (end - start) if end else 1.0
        left = half_cosine(gone) if interpolate_type == "cosine" else 1 - gone
        value = value * (scale + (1 - scale) * left)
        start = end
    return value


def piecewise_interpolate(
    init_value: Number,
    boundaries_and_scales: Mapping[int, Number],
    interpolate_type: Literal["linear", "cosine"] = "linear",
) -> Schedule:
    r"""From value to value, each reached at its boundary, on lines or on waves.

    .. math::
        v_t = a + (b - a) \, s_t \qquad \text{or} \qquad
        v_t = b + (a - b) \cdot \tfrac12 ( 1 + \cos \pi s_t ), \qquad
        s_t = \frac{t - t_a}{t_b - t_a}

    between the boundaries :math:`t_a` and :math:`t_b`, where the value at :math:`t_b` is
    :math:`b = a \cdot \text{scale}_{t_b}`.

    Args:
        init_value: the first value, ≥ 0.
        boundaries_and_scales: step ≥ 0 → factor ≥ 0 reached there.
        interpolate_type: "linear" or "cosine".

    Returns:
        A `Schedule`.

    Raises:
        HyperparameterError, HyperparameterTypeError: a number out of its range, or none.

    Source:
        optax's ``piecewise_interpolate_schedule``.

    Example:
        >>> import torch, funcopt as fo
        >>> lr = fo.schedules.piecewise_interpolate(0.1, {2: 4.0, 6: 0.5})
        >>> [round(lr(t), 2) for t in range(8)]
        [0.1, 0.25, 0.4, 0.35, 0.3, 0.25, 0.2, 0.2]
    """
    boundaries, scales = _sorted(boundaries_and_scales)
    return schedule(
        _piecewise_interpolate,
        init_value=number("init_value", init_value),
        boundaries=boundaries,
        scales=scales,
        interpolate_type=one_of(
            "interpolate_type", interpolate_type, ("linear", "cosine")
        ),
    )


def _one_cycle(
    count: Count,
    peak_value: Number,
    boundaries: list[int],
    div_factor: Number,
    final_div_factor: Number,
    interpolate_type: str,
) -> Number:
    up, down = div_factor, 1 / div_factor
    scales = [up, down, 1 / final_div_factor]
    if interpolate_type == "cosine":
        scales = [up, down / final_div_factor]
    first = peak_value / div_factor
    return _piecewise_interpolate(count, first, boundaries, scales, interpolate_type)


def linear_one_cycle(
    peak_value: Number,
    transition_steps: int,
    pct_start: float = 0.3,
    pct_final: float = 0.85,
    div_factor: Number = 25.0,
    final_div_factor: Number = 1e4,
) -> Schedule:
    r"""Up, down and out, on three lines that turn at whole steps.

    .. math::
        \tfrac{\text{peak\_value}}{\text{div\_factor}} \to \text{peak\_value} \to
        \tfrac{\text{peak\_value}}{\text{div\_factor}} \to
        \tfrac{\text{peak\_value}}{\text{div\_factor} \cdot \text{final\_div\_factor}}

    reached at ``pct_start``, at ``pct_final`` and at all of ``transition_steps``, rounded
    down.

    Args:
        peak_value: the largest value, ≥ 0.
        transition_steps: all steps, ≥ 1, and enough for one in each phase.
        pct_start: the share of the steps that rise.
        pct_final: the share of the steps that rise and fall.
        div_factor: how many times smaller the first value is, over 0.
        final_div_factor: how many times smaller than the first the last is, over 0.

    Returns:
        A `Schedule`.

    Raises:
        HyperparameterError, HyperparameterTypeError: a number out of its range, or none;
            shares that do not increase.

    Source:
        optax's ``linear_onecycle_schedule``. (``one_cycle`` is torch's, which ends a step
        earlier and turns between steps.)

    Example:
        >>> import torch, funcopt as fo
        >>> lr = fo.schedules.linear_one_cycle(1.0, 10, 0.3, 0.8, div_factor=4.0)
        >>> [round(lr(t), 2) for t in range(0, 12, 2)]
        [0.25, 0.75, 0.85, 0.55, 0.25, 0.0]
    """
    steps = whole("transition_steps", transition_steps)
    return schedule(
        _one_cycle,
        peak_value=number("peak_value", peak_value),
        boundaries=_turns(steps, pct_start=pct_start, pct_final=pct_final),
        div_factor=positive("div_factor", div_factor),
        final_div_factor=positive("final_div_factor", final_div_factor),
        interpolate_type="linear",
    )


def cosine_one_cycle(
    peak_value: Number,
    transition_steps: int,
    pct_start: float = 0.3,
    div_factor: Number = 25.0,
    final_div_factor: Number = 1e4,
) -> Schedule:
    r"""Up and all the way down, on half waves of the cosine that turn at whole steps.

    .. math::
        \tfrac{\text{peak\_value}}{\text{div\_factor}} \to \text{peak\_value} \to
        \tfrac{\text{peak\_value}}{\text{div\_factor}^2 \cdot \text{final\_div\_factor}}

    Args:
        peak_value: the largest value, ≥ 0.
        transition_steps: all steps, ≥ 1.
        pct_start: the share of the steps that rise.
        div_factor: how many times smaller the first value is, over 0.
        final_div_factor: how many times smaller the last is, over 0.

    Returns:
        A `Schedule`.

    Raises:
        HyperparameterError, HyperparameterTypeError: a number out of its range, or none.

    Source:
        optax's ``cosine_onecycle_schedule``. (``one_cycle`` is torch's, which ends a step
        earlier and turns between steps.)

    Example:
        >>> import torch, funcopt as fo
        >>> lr = fo.schedules.cosine_one_cycle(1.0, 10, 0.2, div_factor=4.0)
        >>> [round(lr(t), 2) for t in range(0, 12, 2)]
        [0.25, 1.0, 0.85, 0.5, 0.15, 0.0]
    """
    steps = whole("transition_steps", transition_steps)
    return schedule(
        _one_cycle,
        peak_value=number("peak_value", peak_value),
        boundaries=_turns(steps, pct_start=pct_start),
        div_factor=positive("div_factor", div_factor),
        final_div_factor=positive("final_div_factor", final_div_factor),
        interpolate_type="cosine",
    )


def _turns(steps: int, **shares: float) -> list[int]:
    """The whole steps at which the shares are reached, and the last step."""
    for name, share in shares.items():
        if not isinstance(number(name, share, most=1.0), float):
            raise HyperparameterTypeError(f"{name} is rounded: it takes a float")
    turns = [int(share * steps) for share in shares.values()] + [steps]
    if any(a >= b for a, b in zip(turns, turns[1:])):
        raise HyperparameterError(
            f"{', '.join(shares)} leave no step for a phase: it would turn at {turns}"
        )
    return turns
