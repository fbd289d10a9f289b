"""Schedules made of schedules, and of functions."""

from collections.abc import Callable, Iterable, Sequence
from numbers import Real
from typing import Any

from funcopt.errors import HyperparameterError, HyperparameterTypeError
from funcopt.schedules._parts import (
    Count,
    Number,
    clipped,
    function,
    increasing,
    number,
    passed,
    schedule,
    where,
    whole,
)
from funcopt.schedules.schedule import Schedule
from funcopt.types import Tensor


def _parts_of(schedules: Iterable[Schedule | Number]) -> list[Any]:
    if isinstance(schedules, Schedule) or not isinstance(schedules, Iterable):
        raise HyperparameterTypeError(f"schedules takes a list, not {schedules!r}")
    parts = list(schedules)
    if not parts:
        raise HyperparameterError("schedules is empty; give one at least")
    for i, part in enumerate(parts):
        if not isinstance(part, Schedule):
            if not isinstance(part, Tensor | Real):
                raise HyperparameterTypeError(
                    f"schedules[{i}] must be a Schedule or a number, not {part!r}"
                )
            parts[i] = number(f"schedules[{i}]", part)
    return parts


def _at(part: Schedule | Number, count: Count) -> Number:
    return part(count) if isinstance(part, Schedule) else part


def _sequential(
    count: Count, schedules: list[Schedule | Number], milestones: list[int]
) -> Number:
    if not isinstance(count, Tensor):
        i = passed(count, milestones)
        return _at(schedules[i], count - milestones[i - 1] if i else count)
    # Each in its own bounds: past them it might grow to infinity.
    starts, value = [0, *milestones], None
    for i, part in enumerate(schedules):
        here = count - starts[i]
        last = i == len(milestones)
        here = clipped(here, 0, None if last else milestones[i] - starts[i])
        at = _at(part, here)
        value = at if value is None else where(count < starts[i], value, at)
    return value


def sequential(
    schedules: Sequence[Schedule | Number], milestones: Iterable[int]
) -> Schedule:
    r"""One schedule after another, each from its own beginning.

    .. math::
        v_t = \text{schedules}_i(t - m_i), \qquad m_i \le t < m_{i+1}

    with :math:`m_0 = 0` and ``milestones`` the others.

    Args:
        schedules: one at least; a number stands for itself.
        milestones: the steps at which the next begins: one fewer than schedules, ≥ 0,
            increasing.

    Returns:
        A `Schedule`.

    Raises:
        HyperparameterError: as many milestones as schedules, or any other wrong number of
            them; milestones that decrease.
        HyperparameterTypeError: something that is no schedule and no number.

    Source:
        ``torch.optim.lr_scheduler.SequentialLR``; optax's ``join_schedules``.

    Example:
        >>> import torch, funcopt as fo
        >>> warmup = fo.schedules.linear(0.4, start_factor=0.0, total_iters=2)
        >>> decay = fo.schedules.exponential(0.4, gamma=0.5)
        >>> lr = fo.schedules.sequential([warmup, decay], milestones=[2])
        >>> [lr(t) for t in range(5)]
        [0.0, 0.2, 0.4, 0.2, 0.1]
    """
    parts, steps = _parts_of(schedules), increasing("milestones", milestones)
    if len(steps) != len(parts) - 1:
        raise HyperparameterError(
            f"{len(parts)} schedules need {len(parts) - 1} milestones, not {len(steps)}"
        )
    return schedule(_sequential, schedules=parts, milestones=steps)


def _chained(count: Count, schedules: list[Schedule | Number]) -> Number:
    value = 1.0
    for part in schedules:
        value = value * _at(part, count)
    return value


def chained(schedules: Sequence[Schedule | Number]) -> Schedule:
    r"""The product of schedules.

    .. math::
        v_t = \prod_i \text{schedules}_i(t)

    Args:
        schedules: one at least, of which one has the value and the others are of 1.0; a
            number stands for itself.

    Returns:
        A `Schedule`.

    Raises:
        HyperparameterError: no schedule.
        HyperparameterTypeError: something that is no schedule and no number.

    Source:
        ``torch.optim.lr_scheduler.ChainedScheduler``, for schedulers that multiply.

    Example:
        >>> import torch, funcopt as fo
        >>> halved = fo.schedules.constant(1.0, factor=0.5, total_iters=2)
        >>> decay = fo.schedules.exponential(0.4, gamma=0.5)
        >>> lr = fo.schedules.chained([decay, halved])
        >>> [lr(t) for t in range(4)]
        [0.2, 0.1, 0.1, 0.05]
    """
    return schedule(_chained, schedules=_parts_of(schedules))


def _lambda(count: Count, value: Number, lr_lambda: Callable[[Any], Number]) -> Number:
    return value * lr_lambda(count)


def lambda_(value: Number, lr_lambda: Callable[[Any], Number]) -> Schedule:
    r"""The value times a function of the step.

    .. math::
        v_t = \text{value} \cdot \text{lr\_lambda}(t)

    Args:
        value: what is multiplied, ≥ 0.
        lr_lambda: count → factor, as the function of a `Schedule`.

    Returns:
        A `Schedule`.

    Raises:
        HyperparameterError, HyperparameterTypeError: a number out of its range, or none;
            what is no function.

    Source:
        ``torch.optim.lr_scheduler.LambdaLR``.

    Example:
        >>> import torch, funcopt as fo
        >>> lr = fo.schedules.lambda_(0.4, lambda t: 1 / (1 + t))
        >>> [lr(t) for t in range(4)]
        [0.4, 0.2, 0.13333333333333333, 0.1]
    """
    return schedule(
        _lambda, value=number("value", value), lr_lambda=function("lr_lambda", lr_lambda)
    )


def _multiplicative(
    count: Count, value: Number, lr_lambda: Callable[[int], Number], total_iters: int
) -> Number:
    if not isinstance(count, Tensor):
        for t in range(1, min(count, total_iters) + 1):
            value = value * lr_lambda(t)
        return value
    for t in range(1, total_iters + 1):
        value = value * where(count < t, 1.0, lr_lambda(t))
    return value


def multiplicative(
    value: Number, lr_lambda: Callable[[int], Number], total_iters: int
) -> Schedule:
    r"""Multiplied at every step by a function of it.

    .. math::
        v_t = \text{value} \cdot
            \prod_{k=1}^{\min(t, \text{total\_iters})} \text{lr\_lambda}(k)

    Args:
        value: the first value, ≥ 0.
        lr_lambda: step, from 1 → factor; it always gets an int.
        total_iters: the steps that multiply, ≥ 0; torch has no such bound, but a count
            that is a tensor (under vmap and ``torch.compile``) can bound no loop.

    Returns:
        A `Schedule`.

    Raises:
        HyperparameterError, HyperparameterTypeError: a number out of its range, or none;
            what is no function.

    Note:
        The product is made anew in every call, so a long one is slow: where there is a
        formula for it, `lambda_` is the better choice.

    Source:
        ``torch.optim.lr_scheduler.MultiplicativeLR``.

    Example:
        >>> import torch, funcopt as fo
        >>> lr = fo.schedules.multiplicative(0.4, lambda t: t / (1 + t), total_iters=3)
        >>> [round(lr(t), 4) for t in range(5)]
        [0.4, 0.2, 0.1333, 0.1, 0.1]
    """
    return schedule(
        _multiplicative,
        value=number("value", value),
        lr_lambda=function("lr_lambda", lr_lambda),
        total_iters=whole("total_iters", total_iters, low=0),
    )
