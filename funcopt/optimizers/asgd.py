"""ASGD: stochastic gradient descent that also averages its iterates."""

from functools import partial
from math import inf
from typing import Any

import torch

from funcopt.hyper import Hyper
from funcopt.optimizer import Optimizer, from_spec
from funcopt.optimizers._parts import Number, coupled_decay, towards, where
from funcopt.spec import Spec
from funcopt.types import HyperValue, Tensor


def rule(
    g: Tensor,
    p: Tensor,
    eta: Number,  # a number for the whole leaf, as mu is
    mu: Number,
    ax: Tensor,
    *,
    step: Any,
    lr: Number,
    lambd: Number,
    alpha: Number,
    t0: Number,
    weight_decay: Number,
    maximize: bool,
) -> tuple[Any, ...]:
    g = coupled_decay(-g if maximize else g, p, weight_decay)
    eta = where(step > 1, eta, lr)  # the step before has left it; the first takes lr
    p = p * (1 - lambd * eta) - eta * g
    # While mu is 1, ax becomes p whatever it was: a nan, too, is left behind.
    start = where(mu < 1, ax, where(abs(ax) < inf, ax, p))
    ax = towards(start, p, mu)
    eta = lr / (1 + lambd * lr * step) ** alpha
    mu = 1 / where(step - t0 > 1, step - t0, 1.0)
    return p, eta, mu, ax


def evaluated(
    p: Tensor, eta: Number, mu: Number, ax: Tensor, *, step: Any, **_: Any
) -> Tensor:
    return where(step > 0, ax, p)


def asgd(
    lr: HyperValue = 1e-2,
    lambd: HyperValue = 1e-4,
    alpha: HyperValue = 0.75,
    t0: HyperValue = 1e6,
    weight_decay: HyperValue = 0.0,
    *,
    maximize: bool = False,
) -> Optimizer:
    r"""Averaged stochastic gradient descent; equal to ``torch.optim.ASGD``.

    .. math::
        g_t &= \nabla f(p_{t-1}) + \text{weight\_decay} \cdot p_{t-1} \\
        p_t &= (1 - \text{lambd} \cdot \eta_{t-1}) \, p_{t-1} - \eta_{t-1} \, g_t \\
        \text{ax}_t &= \text{ax}_{t-1} + \mu_{t-1} (p_t - \text{ax}_{t-1}) \\
        \eta_t &= \frac{\text{lr}}{(1 + \text{lambd} \cdot \text{lr} \cdot t)^\alpha},
            \qquad \eta_0 = \text{lr} \\
        \mu_t &= 1 / \max(1, t - t_0), \qquad \mu_0 = 1

    Args:
        lr: learning rate, ≥ 0: a float or a 0-d tensor for each leaf, as all that
            ``eta`` and ``mu`` are made of (all but weight_decay).
        lambd: how fast the parameter decays and the learning rate falls, any number.
        alpha: power of the fall, any number.
        t0: the step after which iterates are averaged, any number; before it ``ax`` is
            the parameter.
        weight_decay: factor of the L2 penalty, ≥ 0.
        maximize: ascend.

    Returns:
        An `Optimizer`; state ``step, eta, mu`` (the last two float64, one entry per
        leaf) and ``ax``, the averaged parameter, of each parameter's shape and dtype.

    Raises:
        HyperparameterError: a number out of its range, or by ``update``, where a
            hyperparameter that must be one number per leaf has one for each weight.

    Note:
        As in torch, ``eta`` is made in the step before the one that uses it: but for the
        first step, a schedule of ``lr`` acts one step late.

    Source:
        Polyak, Juditsky, "Acceleration of stochastic approximation by averaging", 1992;
        the fall of the learning rate: Bottou's sgd, as in torch.

    Example:
        >>> import torch, funcopt as fo
        >>> opt = fo.asgd(lr=0.1, t0=0)
        >>> p = torch.tensor([1.0, -0.2])
        >>> state = opt.init(p)
        >>> for _ in range(5):
        ...     p, state = opt.update(2 * p, state, p)      # the gradient of p²
        >>> opt.eval_params(state, p)                   # the average, which is ax
        tensor([ 0.4723, -0.0945])
    """
    spec = Spec(
        partial(rule, maximize=maximize),
        name="asgd",
        slots={"eta": 0.0, "mu": 1.0, "ax": torch.zeros_like},
        hyper={
            "lr": Hyper(lr, scalar=(0,)),
            "lambd": Hyper(lambd, low=-inf, scalar=(0,)),
            "alpha": Hyper(alpha, low=-inf, scalar=(0,)),
            "t0": Hyper(t0, low=-inf, scalar=(0,)),
            "weight_decay": Hyper(weight_decay),
        },
        evaluated=evaluated,
    )
    return from_spec(spec)
