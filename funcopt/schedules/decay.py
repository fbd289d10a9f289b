"""Schedules that decay by a factor, or as a power of the steps that are left."""

from funcopt.schedules._parts import (
    Count,
    Number,
    clipped,
    number,
    positive,
    raised,
    schedule,
    times,
    where,
    whole,
)
from funcopt.schedules.schedule import Schedule


def _exponential(count: Count, value: Number, gamma: Number) -> Number:
    return value * times(gamma, count)


def exponential(value: Number, gamma: Number) -> Schedule:
    r"""Multiplied by a factor at every step.

    .. math::
        v_t = \text{value} \cdot \text{gamma}^t

    Args:
        value: the first value, ≥ 0.
        gamma: the factor, ≥ 0.

    Returns:
        A `Schedule`.

    Raises:
        HyperparameterError, HyperparameterTypeError: a number out of its range, or none.

    Source:
        ``torch.optim.lr_scheduler.ExponentialLR``.

    Example:
        >>> import torch, funcopt as fo
        >>> lr = fo.schedules.exponential(0.4, gamma=0.5)
        >>> [lr(t) for t in range(4)]
        [0.4, 0.2, 0.1, 0.05]
    """
    return schedule(
        _exponential, value=number("value", value), gamma=number("gamma", gamma)
    )


def _exponential_decay(
    count: Count,
    init_value: Number,
    transition_steps: int,
    decay_rate: Number,
    transition_begin: int,
    staircase: bool,
    end_value: Number | None,
) -> Number:
    gone = where(count > transition_begin, count - transition_begin, 0)
    share = gone // transition_steps if staircase else gone / transition_steps
    value = init_value * raised(decay_rate, share)
    if end_value is None:
        return value
    below = where(value < end_value, end_value, value)
    return where(decay_rate < 1, below, where(value > end_value, end_value, value))


def exponential_decay(
    init_value: Number,
    transition_steps: int,
    decay_rate: Number,
    transition_begin: int = 0,
    staircase: bool = False,
    end_value: Number | None = None,
) -> Schedule:
    r"""Multiplied by a factor over so many steps, bit by bit or all at once.

    .. math::
        v_t = \text{init\_value} \cdot \text{decay\_rate}^{s_t}, \qquad
        s_t = \frac{\max(t - \text{transition\_begin}, 0)}{\text{transition\_steps}}

    Args:
        init_value: the first value, ≥ 0.
        transition_steps: the steps in which the factor acts once, ≥ 1.
        decay_rate: the factor, over 0.
        transition_begin: the steps before the first change, ≥ 0.
        staircase: round the exponent :math:`s_t` down.
        end_value: the value at which to stay, ≥ 0; None for none.

    Returns:
        A `Schedule`.

    Raises:
        HyperparameterError, HyperparameterTypeError: a number out of its range, or none.

    Source:
        optax's ``exponential_decay``.

    Example:
        >>> import torch, funcopt as fo
        >>> lr = fo.schedules.exponential_decay(0.4, 2, 0.25, end_value=0.1)
        >>> [lr(t) for t in range(5)]
        [0.4, 0.2, 0.1, 0.1, 0.1]
    """
    return schedule(
        _exponential_decay,
        init_value=number("init_value", init_value),
        transition_steps=whole("transition_steps", transition_steps),
        decay_rate=positive("decay_rate", decay_rate),
        transition_begin=whole("transition_begin", transition_begin, low=0),
        staircase=staircase,
        end_value=None if end_value is None else number("end_value", end_value),
    )


def _polynomial(count: Count, value: Number, total_iters: int, power: Number) -> Number:
    return value * raised(1 - clipped(count, 0, total_iters) / total_iters, power)


def polynomial(value: Number, total_iters: int = 5, power: Number = 1.0) -> Schedule:
    r"""Down to 0 as a power of the steps that are left.

    .. math::
        v_t = \text{value} \cdot \Big( 1 -
            \frac{\min(t, \text{total\_iters})}{\text{total\_iters}} \Big)^\text{power}

    Args:
        value: the first value, ≥ 0.
        total_iters: the steps to 0, ≥ 1.
        power: the exponent, ≥ 0.

    Returns:
        A `Schedule`.

    Raises:
        HyperparameterError, HyperparameterTypeError: a number out of its range, or none.

    Source:
        ``torch.optim.lr_scheduler.PolynomialLR``.

    Example:
        >>> import torch, funcopt as fo
        >>> lr = fo.schedules.polynomial(0.4, total_iters=4, power=2)
        >>> [lr(t) for t in range(6)]
        [0.4, 0.225, 0.1, 0.025, 0.0, 0.0]
    """
    return schedule(
        _polynomial,
        value=number("value", value),
        total_iters=whole("total_iters", total_iters),
        power=number("power", power),
    )


def _polynomial_decay(
    count: Count,
    init_value: Number,
    end_value: Number,
    power: Number,
    transition_steps: int,
    transition_begin: int,
) -> Number:
    gone = clipped(count - transition_begin, 0, transition_steps) / transition_steps
    return end_value + (init_value - end_value) * raised(1 - gone, power)


def polynomial_decay(
    init_value: Number,
    end_value: Number,
    power: Number,
    transition_steps: int,
    transition_begin: int = 0,
) -> Schedule:
    r"""From one value to another as a power of the steps that are left; a line with 1.

    .. math::
        v_t &= \text{end\_value} + (\text{init\_value} - \text{end\_value})
            (1 - s_t)^\text{power} \\
        s_t &= \min\Big( \frac{\max(t - \text{transition\_begin}, 0)}
            {\text{transition\_steps}},\; 1 \Big)

    Args:
        init_value: the first value, ≥ 0.
        end_value: the last value, ≥ 0.
        power: the exponent, ≥ 0.
        transition_steps: the steps between the two, ≥ 1.
        transition_begin: the steps before the first change, ≥ 0.

    Returns:
        A `Schedule`.

    Raises:
        HyperparameterError, HyperparameterTypeError: a number out of its range, or none.

    Source:
        optax's ``polynomial_schedule``, and with power 1 ``linear_schedule``.

    Example:
        >>> import torch, funcopt as fo
        >>> lr = fo.schedules.polynomial_decay(0.0, 0.4, power=1, transition_steps=4)
        >>> [round(lr(t), 2) for t in range(6)]
        [0.0, 0.1, 0.2, 0.3, 0.4, 0.4]
    """
    return schedule(
        _polynomial_decay,
        init_value=number("init_value", init_value),
        end_value=number("end_value", end_value),
        power=number("power", power),
        transition_steps=whole("transition_steps", transition_steps),
        transition_begin=whole("transition_begin", transition_begin, low=0),
    )
