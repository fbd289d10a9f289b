"""Schedules that rise on a line before they do anything else."""

from funcopt.errors import HyperparameterError
from funcopt.schedules._parts import (
    Count,
    Number,
    clipped,
    half_cosine,
    number,
    raised,
    schedule,
    whole,
)
from funcopt.schedules.decay import exponential_decay, polynomial_decay
from funcopt.schedules.joined import sequential
from funcopt.schedules.schedule import Schedule


def _warmed_up(
    init_value: Number, peak_value: Number, warmup_steps: int, then: Schedule | Number
) -> Schedule:
    """``then``, after a rise on a line; at once if that takes no step."""
    steps = whole("warmup_steps", warmup_steps, low=0)
    init_value = number("init_value", init_value)
    rise = polynomial_decay(init_value, peak_value, 1.0, max(steps, 1))
    return sequential([rise, then], [steps])


def warmup_constant(
    init_value: Number, peak_value: Number, warmup_steps: int
) -> Schedule:
    r"""Up on a line, and there it stays.

    .. math::
        v_t = \text{init\_value} + (\text{peak\_value} - \text{init\_value})
            \frac{\min(t, \text{warmup\_steps})}{\text{warmup\_steps}}

    Args:
        init_value: the first value, ≥ 0.
        peak_value: the value that stays, ≥ 0.
        warmup_steps: the steps to it, ≥ 0.

    Returns:
        A `Schedule`.

    Raises:
        HyperparameterError, HyperparameterTypeError: a number out of its range, or none.

    Source:
        optax's ``warmup_constant_schedule``.

    Example:
        >>> import torch, funcopt as fo
        >>> lr = fo.schedules.warmup_constant(0.0, 0.4, warmup_steps=2)
        >>> [lr(t) for t in range(4)]
        [0.0, 0.2, 0.4, 0.4]
    """
    peak_value = number("peak_value", peak_value)
    return _warmed_up(init_value, peak_value, warmup_steps, peak_value)


def _cosine_to(
    count: Count,
    peak_value: Number,
    decay_steps: int,
    end_value: Number,
    exponent: Number,
) -> Number:
    wave = half_cosine(clipped(count, 0, decay_steps) / decay_steps)
    return end_value + (peak_value - end_value) * raised(wave, exponent)


def warmup_cosine_decay(
    init_value: Number,
    peak_value: Number,
    warmup_steps: int,
    decay_steps: int,
    end_value: Number = 0.0,
    exponent: Number = 1.0,
) -> Schedule:
    r"""Up on a line, then down by half a wave of the cosine, and there it stays.

    .. math::
        v_t &= \text{init\_value} + (\text{peak\_value} - \text{init\_value})
            \frac{t}{\text{warmup\_steps}} && t < \text{warmup\_steps} \\
        v_t &= \text{end\_value} + (\text{peak\_value} - \text{end\_value}) \, \bigg(
            \tfrac12 \Big( 1 + \cos \pi \frac{\min(t, \text{decay\_steps})
            - \text{warmup\_steps}} {\text{decay\_steps} - \text{warmup\_steps}} \Big)
            \bigg)^\text{exponent} && \text{else}

    Args:
        init_value: the first value, ≥ 0.
        peak_value: the largest value, ≥ 0.
        warmup_steps: the steps to it, ≥ 0.
        decay_steps: all steps to the last value, those of the warm-up among them; more
            than ``warmup_steps``.
        end_value: the last value, ≥ 0.
        exponent: bends the wave, ≥ 0.

    Returns:
        A `Schedule`.

    Raises:
        HyperparameterError, HyperparameterTypeError: a number out of its range, or none.

    Source:
        optax's ``warmup_cosine_decay_schedule``.

    Example:
        >>> import torch, funcopt as fo
        >>> lr = fo.schedules.warmup_cosine_decay(0.0, 0.4, 2, 6, end_value=0.2)
        >>> [round(lr(t), 4) for t in range(8)]
        [0.0, 0.2, 0.4, 0.3707, 0.3, 0.2293, 0.2, 0.2]
    """
    steps = whole("decay_steps", decay_steps) - whole("warmup_steps", warmup_steps, low=0)
    if steps < 1:
        raise HyperparameterError(
            f"decay_steps counts the warm-up's and must be over warmup_steps = "
            f"{warmup_steps}, got {decay_steps}"
        )
    fall = schedule(
        _cosine_to,
        peak_value=number("peak_value", peak_value),
        decay_steps=steps,
        end_value=number("end_value", end_value),
        exponent=number("exponent", exponent),
    )
    return _warmed_up(init_value, peak_value, warmup_steps, fall)


def warmup_exponential_decay(
    init_value: Number,
    peak_value: Number,
    warmup_steps: int,
    transition_steps: int,
    decay_rate: Number,
    transition_begin: int = 0,
    staircase: bool = False,
    end_value: Number | None = None,
) -> Schedule:
    r"""Up on a line, then down as ``exponential_decay``.

    .. math::
        v_t &= \text{init\_value} + (\text{peak\_value} - \text{init\_value})
            \frac{t}{\text{warmup\_steps}} && t < \text{warmup\_steps} \\
        v_t &= \text{peak\_value} \cdot \text{decay\_rate}^{
            \max(t - \text{warmup\_steps} - \text{transition\_begin}, 0) /
            \text{transition\_steps}} && \text{else}

    Args:
        init_value: the first value, ≥ 0.
        peak_value: the largest value, ≥ 0.
        warmup_steps: the steps to it, ≥ 0.
        transition_steps: the steps in which the factor acts once, ≥ 1.
        decay_rate: the factor, over 0.
        transition_begin: the steps at the peak, ≥ 0.
        staircase: round the exponent down.
        end_value: the value at which to stay, ≥ 0; None for none.

    Returns:
        A `Schedule`.

    Raises:
        HyperparameterError, HyperparameterTypeError: a number out of its range, or none.

    Source:
        optax's ``warmup_exponential_decay_schedule``.

    Example:
        >>> import torch, funcopt as fo
        >>> lr = fo.schedules.warmup_exponential_decay(0.0, 0.4, 2, 1, decay_rate=0.5)
        >>> [lr(t) for t in range(6)]
        [0.0, 0.2, 0.4, 0.2, 0.1, 0.05]
    """
    peak_value = number("peak_value", peak_value)
    fall = exponential_decay(
        peak_value, transition_steps, decay_rate, transition_begin, staircase, end_value
    )
    return _warmed_up(init_value, peak_value, warmup_steps, fall)
