"""Schedules that follow half a wave of the cosine, once or again and again."""

from funcopt.schedules._parts import (
    Count,
    Number,
    clipped,
    half_cosine,
    number,
    passed,
    raised,
    schedule,
    whole,
)
from funcopt.schedules.schedule import Schedule

_FARTHEST = 2**53  # past it a float64 count is not exact


def _cosine_annealing(count: Count, value: Number, T_max: int, eta_min: Number) -> Number:
    return eta_min + (value - eta_min) * half_cosine(count / T_max)


def cosine_annealing(value: Number, T_max: int, eta_min: Number = 0.0) -> Schedule:
    r"""Down to a least value by half a wave of the cosine, and up again by the next.

    .. math::
        v_t = \text{eta\_min} + \tfrac12 (\text{value} - \text{eta\_min})
            \Big( 1 + \cos \frac{\pi t}{\text{T\_max}} \Big)

    Args:
        value: the first value, ≥ 0.
        T_max: the steps to the least value, ≥ 1.
        eta_min: the least value, ≥ 0.

    Returns:
        A `Schedule`.

    Raises:
        HyperparameterError, HyperparameterTypeError: a number out of its range, or none.

    Note:
        After ``T_max`` steps it rises again, as in torch; ``cosine_decay`` stays.

    Source:
        ``torch.optim.lr_scheduler.CosineAnnealingLR``; Loshchilov, Hutter, "SGDR:
        stochastic gradient descent with warm restarts", 2017, equation 5.

    Example:
        >>> import torch, funcopt as fo
        >>> lr = fo.schedules.cosine_annealing(0.4, T_max=4, eta_min=0.2)
        >>> [round(lr(t), 4) for t in range(6)]
        [0.4, 0.3707, 0.3, 0.2293, 0.2, 0.2293]
    """
    return schedule(
        _cosine_annealing,
        value=number("value", value),
        T_max=whole("T_max", T_max),
        eta_min=number("eta_min", eta_min),
    )


def _cosine_warm_restarts(
    count: Count,
    value: Number,
    T_0: int,
    T_mult: int,
    eta_min: Number,
) -> Number:
    if T_mult == 1:
        start, length = T_0 * (count // T_0), T_0
    else:
        runs = passed(count, _restarts(T_0, T_mult))
        start, length = T_0 * (T_mult**runs - 1) / (T_mult - 1), T_0 * T_mult**runs
    return eta_min + (value - eta_min) * half_cosine((count - start) / length)


def _restarts(T_0: int, T_mult: int) -> list[int]:
    """The counts at which a run begins anew; a logarithm would round them."""
    restarts, length = [T_0], T_0
    while restarts[-1] < _FARTHEST:
        length *= T_mult
        restarts.append(restarts[-1] + length)
    return restarts


def cosine_warm_restarts(
    value: Number, T_0: int, T_mult: int = 1, eta_min: Number = 0.0
) -> Schedule:
    r"""Down by half a wave of the cosine, then from the top again, more slowly each time.

    .. math::
        v_t = \text{eta\_min} + \tfrac12 (\text{value} - \text{eta\_min})
            \Big( 1 + \cos \frac{\pi \, T_\text{cur}}{T_i} \Big), \qquad
        T_i = \text{T\_0} \cdot \text{T\_mult}^i

    with :math:`T_\text{cur}` the steps since the restart number :math:`i`.

    Args:
        value: the value at every restart, ≥ 0.
        T_0: the steps to the first restart, ≥ 1.
        T_mult: how many times longer each run is than the one before, a whole number ≥ 1.
        eta_min: the least value, ≥ 0.

    Returns:
        A `Schedule`.

    Raises:
        HyperparameterError, HyperparameterTypeError: a number out of its range, or none.

    Source:
        ``torch.optim.lr_scheduler.CosineAnnealingWarmRestarts``; Loshchilov, Hutter,
        "SGDR: stochastic gradient descent with warm restarts", 2017.

    Example:
        >>> import torch, funcopt as fo
        >>> lr = fo.schedules.cosine_warm_restarts(0.4, T_0=2, T_mult=2)
        >>> [round(lr(t), 4) for t in range(7)]
        [0.4, 0.2, 0.4, 0.3414, 0.2, 0.0586, 0.4]
    """
    return schedule(
        _cosine_warm_restarts,
        value=number("value", value),
        T_0=whole("T_0", T_0),
        T_mult=whole("T_mult", T_mult),
        eta_min=number("eta_min", eta_min),
    )


def _cosine_decay(
    count: Count, init_value: Number, decay_steps: int, alpha: Number, exponent: Number
) -> Number:
    wave = half_cosine(clipped(count, 0, decay_steps) / decay_steps)
    return init_value * (alpha + (1 - alpha) * raised(wave, exponent))


def cosine_decay(
    init_value: Number, decay_steps: int, alpha: Number = 0.0, exponent: Number = 1.0
) -> Schedule:
    r"""Down to a share of the value by half a wave of the cosine, and there it stays.

    .. math::
        v_t = \text{init\_value} \, \big( \text{alpha} + (1 - \text{alpha}) \,
            c_t^\text{exponent} \big), \qquad
        c_t = \tfrac12 \Big( 1 + \cos \frac{\pi \min(t, \text{decay\_steps})}
            {\text{decay\_steps}} \Big)

    Args:
        init_value: the first value, ≥ 0.
        decay_steps: the steps to the last value, ≥ 1.
        alpha: the last value as a share of the first, ≥ 0.
        exponent: bends the wave, ≥ 0.

    Returns:
        A `Schedule`.

    Raises:
        HyperparameterError, HyperparameterTypeError: a number out of its range, or none.

    Source:
        optax's ``cosine_decay_schedule``.

    Example:
        >>> import torch, funcopt as fo
        >>> lr = fo.schedules.cosine_decay(0.4, decay_steps=4, alpha=0.5)
        >>> [round(lr(t), 4) for t in range(6)]
        [0.4, 0.3707, 0.3, 0.2293, 0.2, 0.2]
    """
    return schedule(
        _cosine_decay,
        init_value=number("init_value", init_value),
        decay_steps=whole("decay_steps", decay_steps),
        alpha=number("alpha", alpha),
        exponent=number("exponent", exponent),
    )
