"""Schedules that take a share of a value, or multiply it now and then."""

from collections.abc import Iterable

from funcopt.schedules._parts import (
    Count,
    Number,
    clipped,
    increasing,
    number,
    passed,
    schedule,
    times,
    where,
    whole,
)
from funcopt.schedules.schedule import Schedule


def _constant(count: Count, value: Number, factor: Number, total_iters: int) -> Number:
    return value * where(count < total_iters, factor, 1.0)


def constant(value: Number, factor: Number = 1.0 / 3, total_iters: int = 5) -> Schedule:
    r"""A share of the value for the first steps, then all of it.

    .. math::
        v_t = \text{value} \cdot \begin{cases}
            \text{factor} & t < \text{total\_iters} \\ 1 & \text{else} \end{cases}

    Args:
        value: what is reached, ≥ 0.
        factor: the share before that, in [0, 1].
        total_iters: the steps with that share, ≥ 0.

    Returns:
        A `Schedule`.

    Raises:
        HyperparameterError, HyperparameterTypeError: a number out of its range, or none.

    Source:
        ``torch.optim.lr_scheduler.ConstantLR``.

    Example:
        >>> import torch, funcopt as fo
        >>> lr = fo.schedules.constant(0.4, factor=0.25, total_iters=2)
        >>> [lr(t) for t in range(4)]
        [0.1, 0.1, 0.4, 0.4]
    """
    return schedule(
        _constant,
        value=number("value", value),
        factor=number("factor", factor, most=1.0),
        total_iters=whole("total_iters", total_iters, low=0),
    )


def _linear(
    count: Count,
    value: Number,
    start_factor: Number,
    end_factor: Number,
    total_iters: int,
) -> Number:
    share = clipped(count, 0, total_iters) / total_iters
    return value * (start_factor + (end_factor - start_factor) * share)


def linear(
    value: Number,
    start_factor: Number = 1.0 / 3,
    end_factor: Number = 1.0,
    total_iters: int = 5,
) -> Schedule:
    r"""From one share of the value to another on a line.

    .. math::
        v_t = \text{value} \cdot \Big( \text{start\_factor}
            + (\text{end\_factor} - \text{start\_factor})
            \frac{\min(t, \text{total\_iters})}{\text{total\_iters}} \Big)

    Args:
        value: what the factors are of, ≥ 0.
        start_factor: the share at first, in [0, 1]. (torch refuses 0, because it steps
            by quotients.)
        end_factor: the share at last, in [0, 1].
        total_iters: the steps between them, ≥ 1.

    Returns:
        A `Schedule`.

    Raises:
        HyperparameterError, HyperparameterTypeError: a number out of its range, or none.

    Source:
        ``torch.optim.lr_scheduler.LinearLR``.

    Example:
        >>> import torch, funcopt as fo
        >>> lr = fo.schedules.linear(0.4, start_factor=0.25, total_iters=3)
        >>> [round(lr(t), 2) for t in range(5)]
        [0.1, 0.2, 0.3, 0.4, 0.4]
    """
    return schedule(
        _linear,
        value=number("value", value),
        start_factor=number("start_factor", start_factor, most=1.0),
        end_factor=number("end_factor", end_factor, most=1.0),
        total_iters=whole("total_iters", total_iters),
    )


def _step(count: Count, value: Number, step_size: int, gamma: Number) -> Number:
    return value * times(gamma, count // step_size)


def step(value: Number, step_size: int, gamma: Number = 0.1) -> Schedule:
    r"""Multiplied by a factor every so many steps.

    .. math::
        v_t = \text{value} \cdot \text{gamma}^{\lfloor t / \text{step\_size} \rfloor}

    Args:
        value: the first value, ≥ 0.
        step_size: the steps between two falls, ≥ 1.
        gamma: the factor, ≥ 0.

    Returns:
        A `Schedule`.

    Raises:
        HyperparameterError, HyperparameterTypeError: a number out of its range, or none.

    Source:
        ``torch.optim.lr_scheduler.StepLR``.

    Example:
        >>> import torch, funcopt as fo
        >>> lr = fo.schedules.step(0.4, step_size=2, gamma=0.5)
        >>> [lr(t) for t in range(5)]
        [0.4, 0.4, 0.2, 0.2, 0.1]
    """
    return schedule(
        _step,
        value=number("value", value),
        step_size=whole("step_size", step_size),
        gamma=number("gamma", gamma),
    )


def _multistep(
    count: Count, value: Number, milestones: list[int], gamma: Number
) -> Number:
    return value * times(gamma, passed(count, milestones))


def multistep(value: Number, milestones: Iterable[int], gamma: Number = 0.1) -> Schedule:
    r"""Multiplied by a factor at each milestone.

    .. math::
        v_t = \text{value} \cdot \text{gamma}^{|\{m \in \text{milestones}: m \le t\}|}

    Args:
        value: the first value, ≥ 0.
        milestones: whole numbers ≥ 0 that increase; one that stands twice counts twice.
        gamma: the factor, ≥ 0.

    Returns:
        A `Schedule`.

    Raises:
        HyperparameterError, HyperparameterTypeError: a number out of its range, or none;
            milestones that decrease.

    Source:
        ``torch.optim.lr_scheduler.MultiStepLR``.

    Example:
        >>> import torch, funcopt as fo
        >>> lr = fo.schedules.multistep(0.4, milestones=[1, 4], gamma=0.5)
        >>> [lr(t) for t in range(6)]
        [0.4, 0.2, 0.2, 0.2, 0.1, 0.1]
    """
    return schedule(
        _multistep,
        value=number("value", value),
        milestones=increasing("milestones", milestones),
        gamma=number("gamma", gamma),
    )
