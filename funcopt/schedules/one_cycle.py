"""One cycle: up to the largest rate, down to nearly nothing; momentum the other way."""

from typing import Literal

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

Strategy = Literal["cos", "linear"]


def _phases(
    count: Count,
    values: list[Number],
    total_steps: int,
    pct_start: Number,
    anneal_strategy: Strategy,
) -> Number:
    """From each value to the next: the first turns at the rise's end, the last at all's.

    With three phases the second is as long as the first.
    """
    count = clipped(count, 0, total_steps - 1)
    rise = pct_start * total_steps - 1
    ends = [rise, total_steps - 1]
    if len(values) == 4:
        ends.insert(1, 2 * rise)
    starts = [0.0, *ends[:-1]]
    result = values[-1]
    for i in reversed(range(len(ends))):
        length = ends[i] - starts[i]
        some = length > 0
        share = where(some, (count - starts[i]) / where(some, length, 1.0), 1.0)
        wave = half_cosine(share) if anneal_strategy == "cos" else 1 - share
        phase = values[i + 1] + (values[i] - values[i + 1]) * wave
        result = phase if i == len(ends) - 1 else where(count <= ends[i], phase, result)
    return result


def _one_cycle(
    count: Count,
    max_lr: Number,
    total_steps: int,
    pct_start: Number,
    anneal_strategy: Strategy,
    div_factor: Number,
    final_div_factor: Number,
    three_phase: bool,
) -> Number:
    first = max_lr / div_factor
    last = first / final_div_factor
    values = [first, max_lr, first, last] if three_phase else [first, max_lr, last]
    return _phases(count, values, total_steps, pct_start, anneal_strategy)


def one_cycle(
    max_lr: Number,
    total_steps: int,
    pct_start: Number = 0.3,
    anneal_strategy: Strategy = "cos",
    div_factor: Number = 25.0,
    final_div_factor: Number = 1e4,
    three_phase: bool = False,
) -> Schedule:
    r"""Up from a small rate to the largest, then down to nearly nothing.

    From a to b in a phase of n steps the value goes, after k of them,

    .. math::
        v = b + (a - b) \cdot \tfrac12 \Big( 1 + \cos \frac{\pi k}{n} \Big)
        \qquad \text{or} \qquad v = b + (a - b) \Big( 1 - \frac kn \Big)

    with the values :math:`\text{max\_lr} / \text{div\_factor}` first, then ``max_lr`` (in
    three phases the first again), then the first by ``final_div_factor``. The first phase
    ends at :math:`\text{pct\_start} \cdot \text{total\_steps} - 1`.

    Args:
        max_lr: the largest value, ≥ 0.
        total_steps: all steps, ≥ 1; after them the last value stays.
        pct_start: the share of the steps that rise, in [0, 1].
        anneal_strategy: "cos" or "linear".
        div_factor: how many times smaller the first value is, over 0.
        final_div_factor: how many times smaller than the first the last is, over 0.
        three_phase: fall as long as rising, to the first value, and then to the last.

    Returns:
        A `Schedule`; ``one_cycle_momentum`` is that of the momentum beside it.

    Raises:
        HyperparameterError, HyperparameterTypeError: a number out of its range, or none.

    Note:
        torch's ``epochs`` and ``steps_per_epoch`` are ``total_steps``, multiplied.

    Source:
        ``torch.optim.lr_scheduler.OneCycleLR``; Smith, Topin, "Super-convergence: very
        fast training of neural networks using large learning rates", 2017.

    Example:
        >>> import torch, funcopt as fo
        >>> lr = fo.schedules.one_cycle(1.0, total_steps=10, div_factor=4.0)
        >>> [round(lr(t), 4) for t in range(10)]
        [0.25, 0.625, 1.0, 0.9505, 0.8117, 0.6113, 0.3888, 0.1883, 0.0495, 0.0]
    """
    return schedule(
        _one_cycle,
        max_lr=number("max_lr", max_lr),
        total_steps=whole("total_steps", total_steps),
        pct_start=number("pct_start", pct_start, most=1.0),
        anneal_strategy=one_of("anneal_strategy", anneal_strategy, ("cos", "linear")),
        div_factor=positive("div_factor", div_factor),
        final_div_factor=positive("final_div_factor", final_div_factor),
        three_phase=three_phase,
    )


def _one_cycle_momentum(
    count: Count,
    total_steps: int,
    base_momentum: Number,
    max_momentum: Number,
    pct_start: Number,
    anneal_strategy: Strategy,
    three_phase: bool,
) -> Number:
    values = [max_momentum, base_momentum, max_momentum]
    if three_phase:
        values.append(max_momentum)
    return _phases(count, values, total_steps, pct_start, anneal_strategy)


def one_cycle_momentum(
    total_steps: int,
    base_momentum: Number = 0.85,
    max_momentum: Number = 0.95,
    pct_start: Number = 0.3,
    anneal_strategy: Strategy = "cos",
    three_phase: bool = False,
) -> Schedule:
    """The momentum (or first beta) beside `one_cycle`: least where the rate is largest.

    Args:
        total_steps: all steps, ≥ 1; after them the last value stays.
        base_momentum: the least value, in [0, 1].
        max_momentum: the first and the last value, in [0, 1].
        pct_start: the share of the steps that fall, in [0, 1].
        anneal_strategy: "cos" or "linear".
        three_phase: rise as long as falling, and then stay.

    Returns:
        A `Schedule`.

    Raises:
        HyperparameterError, HyperparameterTypeError: a number out of its range, or none.

    Source:
        ``torch.optim.lr_scheduler.OneCycleLR`` with ``cycle_momentum``.

    Example:
        >>> import torch, funcopt as fo
        >>> momentum = fo.schedules.one_cycle_momentum(total_steps=10)
        >>> [round(momentum(t), 3) for t in range(0, 10, 2)]
        [0.95, 0.85, 0.869, 0.911, 0.945]
    """
    return schedule(
        _one_cycle_momentum,
        total_steps=whole("total_steps", total_steps),
        base_momentum=number("base_momentum", base_momentum, most=1.0),
        max_momentum=number("max_momentum", max_momentum, most=1.0),
        pct_start=number("pct_start", pct_start, most=1.0),
        anneal_strategy=one_of("anneal_strategy", anneal_strategy, ("cos", "linear")),
        three_phase=three_phase,
    )
