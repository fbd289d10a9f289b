"""Truncated backpropagation: back through a window of the steps."""

from typing import Literal

import torch

from funcopt.checks import check_count, check_generator
from funcopt.errors import HyperparameterError
from funcopt.meta.estimate import Estimate, check_eta
from funcopt.meta.problem import Carry, Problem
from funcopt.meta.reverse_mode import back
from funcopt.types import Tree


def truncated(
    problem: Problem,
    eta: Tree,
    *,
    carry: Carry | None = None,
    window: int,
    grad_mode: Literal["reverse", "mixed"] = "reverse",
) -> Estimate:
    r"""The derivative of the next few steps alone; what lies before is constant.

    .. math:: \text{grads} = \frac{\partial V(\theta_{t+W}(\theta_t, \eta))}
        {\partial \eta}, \qquad \theta_t \text{ held fixed}

    Biased: a setting is judged by what it does within ``window`` steps. Rates come out
    too small, and even a sign may be wrong (:ref:`short-horizon bias
    <short-horizon-bias>`). The bias fades geometrically with the window where the step
    contracts.

    A window is a number for this call: pass one that grows for a schedule, one drawn by
    `random_window` for random windows, and a carry from `advance` for staggered starts,
    or for the last W of K steps.

    Args:
        problem: a `Problem`; its objective is that of the window's steps.
        eta: a dict with any of "init", "hyper", "meta": see `Problem`.
        carry: where the window begins; None, or a carry at the end, is the start.
        window: how many steps W ≥ 1; at the end there may be fewer left.
        grad_mode: as for `unroll`.

    Returns:
        An `Estimate`; diagnostics: ``losses`` [W], the inner losses before each update.

    Raises:
        HyperparameterError: a window below 1.
        MetaParameterError: eta of other keys, or "init" beside a carry.
        Whatever else `reverse` raises.

    Source:
        Williams, Peng, "An efficient gradient-based algorithm for on-line training of
        recurrent network trajectories", 1990; Shaban, Cheng, Hatch, Boots, "Truncated
        back-propagation for bilevel optimization", 2019; the bias: Wu, Ren, Liao, Grosse,
        "Understanding short-horizon bias in stochastic meta-optimization", 2018.

    Example:
        >>> import torch, funcopt as fo
        >>> problem = fo.meta.Problem(
        ...     fo.sgd(), lambda p, _: 0.5 * p**2, lambda p, _: 0.5 * p**2, steps=4,
        ...     params=torch.tensor(1.0))
        >>> eta, carry = {"hyper": {"lr": torch.tensor(0.5)}}, None
        >>> for _ in range(2):
        ...     estimate = fo.meta.truncated(problem, eta, carry=carry, window=2)
        ...     carry = estimate.carry
        >>> estimate.grads["hyper"]["lr"], carry["step"]      # half of what reverse gives
        (tensor(-0.0156), 4)
    """
    check_eta("truncated", problem, eta, carry)
    return back(problem, eta, carry, window, grad_mode=grad_mode)


def random_window(low: int, high: int, *, generator: torch.Generator) -> int:
    r"""A window's length, its logarithm uniform: short ones often, long ones at times.

    Args:
        low: the least, ≥ 1.
        high: the largest, ≥ ``low``.
        generator: what it is drawn from.

    Returns:
        A whole number in [low, high], for ``truncated(window=)``.

    Raises:
        HyperparameterError: not whole numbers with 1 ≤ low ≤ high.
        HyperparameterTypeError: no generator.

    Source:
        Metz, Maheswaranathan, Nixon, Freeman, Sohl-Dickstein, "Understanding and
        correcting pathologies in the training of learned optimizers", 2019.

    Example:
        >>> import torch, funcopt as fo
        >>> generator = torch.Generator().manual_seed(0)
        >>> [fo.meta.random_window(1, 100, generator=generator) for _ in range(6)]
        [87, 26, 8, 70, 19, 38]
    """
    check_generator("random_window", generator)
    check_count("low", low)
    check_count("high", high)
    if low > high:
        raise HyperparameterError(f"a window needs 1 ≤ low ≤ high, got {low} and {high}")
    u = torch.rand((), generator=generator, dtype=torch.float64).item()
    return min(high, int(low * ((high + 1) / low) ** u))
