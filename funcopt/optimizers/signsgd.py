"""signSGD and Signum: steps by the sign of a gradient, or of its average."""

from functools import partial
from typing import Any

import torch

from funcopt.hyper import Hyper
from funcopt.optimizer import Optimizer, elementwise
from funcopt.optimizers._parts import Number, average, decoupled_decay
from funcopt.types import HyperValue, Tensor


def rule(
    g: Tensor,
    p: Tensor,
    *,
    step: Any,
    lr: Number,
    weight_decay: Number,
    maximize: bool,
) -> tuple[Tensor, ...]:
    del step  # a sign has one size
    p = decoupled_decay(p, lr, weight_decay)
    return (p - lr * torch.sign(-g if maximize else g),)


def momentum_rule(
    g: Tensor,
    p: Tensor,
    exp_avg: Tensor,
    *,
    beta: Number,
    maximize: bool,
    **rest: Any,
) -> tuple[Tensor, ...]:
    exp_avg = average(exp_avg, -g if maximize else g, beta)
    return *rule(exp_avg, p, maximize=False, **rest), exp_avg


def signsgd(
    lr: HyperValue = 1e-4,
    weight_decay: HyperValue = 0.0,
    *,
    maximize: bool = False,
) -> Optimizer:
    r"""signSGD: descent by the sign of the gradient.

    .. math::
        g_t &= \nabla f(p_{t-1}) \\
        p_t &= (1 - \text{lr} \cdot \text{weight\_decay}) \, p_{t-1}
            - \text{lr} \cdot \text{sign}(g_t)

    Args:
        lr: the size of every step, ≥ 0.
        weight_decay: the share of ``lr`` by which a parameter shrinks, ≥ 0.
        maximize: ascend.

    Returns:
        An `Optimizer`; state ``step`` alone.

    Raises:
        HyperparameterError: a number out of its range.

    Note:
        The derivative of a step with respect to the gradient is 0. A meta-gradient
        reaches lr, weight_decay and the parameters.

    Source:
        Bernstein, Wang, Azizzadenesheli, Anandkumar, "signSGD: compressed optimisation
        for non-convex problems", 2018, algorithm 1 on one machine.

    Example:
        >>> import torch, funcopt as fo
        >>> opt = fo.signsgd(lr=0.1, weight_decay=0.5)
        >>> p = torch.tensor([1.0, -0.25])
        >>> state = opt.init(p)
        >>> for _ in range(5):
        ...     p, state = opt.update(2 * p, state, p)      # the gradient of p²
        >>> p
        tensor([0.3213, 0.0690])
    """
    return elementwise(
        partial(rule, maximize=maximize),
        name="signsgd",
        slots={},
        hyper={"lr": Hyper(lr), "weight_decay": Hyper(weight_decay)},
    )


def signum(
    lr: HyperValue = 1e-4,
    beta: HyperValue = 0.9,
    weight_decay: HyperValue = 0.0,
    *,
    maximize: bool = False,
) -> Optimizer:
    r"""Signum: descent by the sign of the gradient's average.

    .. math::
        \text{exp\_avg}_t &= \beta \, \text{exp\_avg}_{t-1}
            + (1 - \beta) \, \nabla f(p_{t-1}) \\
        p_t &= (1 - \text{lr} \cdot \text{weight\_decay}) \, p_{t-1}
            - \text{lr} \cdot \text{sign}(\text{exp\_avg}_t)

    Args:
        lr: the size of every step, ≥ 0.
        beta: decay rate of the average, in [0, 1); at 0 it is `signsgd`.
        weight_decay: the share of ``lr`` by which a parameter shrinks, ≥ 0.
        maximize: ascend.

    Returns:
        An `Optimizer`; state ``step, exp_avg``, of each parameter's shape and dtype.

    Raises:
        HyperparameterError: a number out of its range.

    Note:
        As of `signsgd`, the derivative with respect to gradient, ``exp_avg`` and beta
        is 0.

    Source:
        Bernstein, Wang, Azizzadenesheli, Anandkumar, "signSGD: compressed optimisation
        for non-convex problems", 2018, algorithm 2 (Signum).

    Example:
        >>> import torch, funcopt as fo
        >>> opt = fo.signum(lr=0.1)
        >>> p = torch.tensor([1.0, -0.25])
        >>> state = opt.init(p)
        >>> for _ in range(5):
        ...     p, state = opt.update(2 * p, state, p)      # the gradient of p²
        >>> p
        tensor([0.5000, 0.2500])
    """
    return elementwise(
        partial(momentum_rule, maximize=maximize),
        name="signum",
        slots={"exp_avg": torch.zeros_like},
        hyper={
            "lr": Hyper(lr),
            "beta": Hyper(beta, below=1.0),
            "weight_decay": Hyper(weight_decay),
        },
    )
