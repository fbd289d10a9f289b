"""Adamax: Adam with the infinity norm for the root of the second moment."""

from functools import partial
from typing import Any

import torch

from funcopt.hyper import Hyper
from funcopt.optimizer import Optimizer, elementwise
from funcopt.optimizers._parts import Number, average, coupled_decay
from funcopt.types import HyperValue, Tensor


def rule(
    g: Tensor,
    p: Tensor,
    exp_avg: Tensor,
    exp_inf: Tensor,
    *,
    step: Any,
    lr: Number,
    beta1: Number,
    beta2: Number,
    eps: Number,
    weight_decay: Number,
    maximize: bool,
) -> tuple[Tensor, ...]:
    g = coupled_decay(-g if maximize else g, p, weight_decay)
    exp_avg = average(exp_avg, g, beta1)
    exp_inf = torch.maximum(beta2 * exp_inf, torch.abs(g) + eps)
    p = p - lr / (1 - beta1**step) * exp_avg / exp_inf
    return p, exp_avg, exp_inf


def adamax(
    lr: HyperValue = 2e-3,
    betas: tuple[HyperValue, HyperValue] = (0.9, 0.999),
    eps: HyperValue = 1e-8,
    weight_decay: HyperValue = 0.0,
    *,
    maximize: bool = False,
) -> Optimizer:
    r"""Adamax; equal to ``torch.optim.Adamax``.

    .. math::
        g_t &= \nabla f(p_{t-1}) + \text{weight\_decay} \cdot p_{t-1} \\
        \text{exp\_avg}_t &= \beta_1 \, \text{exp\_avg}_{t-1} + (1 - \beta_1) \, g_t \\
        \text{exp\_inf}_t &= \max(\beta_2 \, \text{exp\_inf}_{t-1},\;
            |g_t| + \text{eps}) \\
        p_t &= p_{t-1} - \text{lr} \,
            \frac{\text{exp\_avg}_t / (1 - \beta_1^t)}{\text{exp\_inf}_t}

    Args:
        lr: learning rate, ≥ 0.
        betas: decay rates of the average and of the norm, each in [0, 1).
        eps: added to the gradient's size within the maximum, ≥ 0.
        weight_decay: factor of the L2 penalty, ≥ 0.
        maximize: ascend.

    Returns:
        An `Optimizer`; state ``step, exp_avg, exp_inf``, of each parameter's shape and
        dtype.

    Raises:
        HyperparameterError: a number out of its range.

    Note:
        Where the two sides of the maximum are equal, each gets half of the derivative.

    Source:
        Kingma, Ba, "Adam: a method for stochastic optimization", 2015, algorithm 2; eps
        is torch's.

    Example:
        >>> import torch, funcopt as fo
        >>> opt = fo.adamax(lr=0.1)
        >>> p = torch.tensor([1.0, -0.2])
        >>> state = opt.init(p)
        >>> for _ in range(5):
        ...     p, state = opt.update(2 * p, state, p)      # the gradient of p²
        >>> p
        tensor([0.5516, 0.0758])
    """
    return elementwise(
        partial(rule, maximize=maximize),
        name="adamax",
        slots=dict.fromkeys(("exp_avg", "exp_inf"), torch.zeros_like),
        hyper={
            "lr": Hyper(lr),
            "betas": Hyper(betas, below=1.0, parts=("beta1", "beta2")),
            "eps": Hyper(eps),
            "weight_decay": Hyper(weight_decay),
        },
    )
