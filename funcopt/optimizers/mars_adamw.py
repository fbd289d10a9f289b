"""MARS-AdamW: AdamW on gradients whose variance the previous gradient reduces."""

from functools import partial
from typing import Any

import torch

from funcopt.hyper import Hyper
from funcopt.optimizer import Optimizer, per_tensor
from funcopt.optimizers._parts import (
    Number,
    adam_step,
    average,
    average_of_squares,
    decoupled_decay,
    norm,
    where,
)
from funcopt.types import HyperValue, Tensor


def rule(
    g: Tensor,
    p: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    prev_grad: Tensor,
    *,
    step: Any,
    lr: Number,
    beta1: Number,
    beta2: Number,
    eps: Number,
    weight_decay: Number,
    gamma: Number,
    maximize: bool,
) -> tuple[Tensor, ...]:
    g = -g if maximize else g
    p = decoupled_decay(p, lr, weight_decay)
    c = g + gamma * beta1 / (1 - beta1) * (g - prev_grad)
    size, _ = norm(c)
    c = c / where(size > 1, size, 1.0)
    exp_avg = average(exp_avg, c, beta1)
    exp_avg_sq = average_of_squares(exp_avg_sq, c, beta2)
    p = p - adam_step(exp_avg, exp_avg_sq, step, lr, beta1, beta2, eps)
    return p, exp_avg, exp_avg_sq, g.clone()


def mars_adamw(
    lr: HyperValue = 3e-3,
    betas: tuple[HyperValue, HyperValue] = (0.95, 0.99),
    eps: HyperValue = 1e-8,
    weight_decay: HyperValue = 0.0,
    gamma: HyperValue = 0.025,
    *,
    maximize: bool = False,
) -> Optimizer:
    r"""MARS-AdamW, the approximate version: no gradient is taken twice.

    .. math::
        c_t &= g_t + \text{gamma} \, \frac{\beta_1}{1 - \beta_1} \,
            (g_t - \text{prev\_grad}_{t-1}), \qquad \text{prev\_grad}_t = g_t \\
        \tilde c_t &= c_t / \max(1, \|c_t\|) \\
        \text{exp\_avg}_t &= \beta_1 \, \text{exp\_avg}_{t-1}
            + (1 - \beta_1) \, \tilde c_t \\
        \text{exp\_avg\_sq}_t &= \beta_2 \, \text{exp\_avg\_sq}_{t-1}
            + (1 - \beta_2) \, \tilde c_t^2 \\
        p_t &= (1 - \text{lr} \cdot \text{weight\_decay}) \, p_{t-1} - \text{lr} \,
            \frac{\text{exp\_avg}_t / (1 - \beta_1^t)}
            {\sqrt{\text{exp\_avg\_sq}_t / (1 - \beta_2^t)} + \text{eps}}

    Args:
        lr: learning rate, ≥ 0.
        betas: decay rates of the two averages, each in [0, 1).
        eps: added to the root, ≥ 0.
        weight_decay: the share of ``lr`` by which a parameter shrinks, ≥ 0.
        gamma: how much of the variance reduction, ≥ 0; with 0 this is `adamw` on
            gradients clipped by each leaf's norm.
        maximize: ascend.

    Returns:
        An `Optimizer`; state ``step, exp_avg, exp_avg_sq, prev_grad``, of each
        parameter's shape and dtype.

    Raises:
        HyperparameterError: a number out of its range.

    Note:
        As in the authors' code the gradient before the first is 0. They leave vectors to
        AdamW, which `partition` does.

    Source:
        Yuan, Liu, Wu, Zhou, Gu, "MARS: unleashing the power of variance reduction for
        training large models", 2024, algorithm 2 with the approximate gradient of
        section 3.

    Example:
        >>> import torch, funcopt as fo
        >>> opt = fo.mars_adamw(lr=0.1)
        >>> p = torch.tensor([1.0, -0.2])
        >>> state = opt.init(p)
        >>> for _ in range(5):
        ...     p, state = opt.update(2 * p, state, p)      # the gradient of p²
        >>> p
        tensor([0.4999, 0.0525])
    """
    return per_tensor(
        partial(rule, maximize=maximize),
        name="mars_adamw",
        slots=dict.fromkeys(("exp_avg", "exp_avg_sq", "prev_grad"), torch.zeros_like),
        hyper={
            "lr": Hyper(lr),
            "betas": Hyper(betas, below=1.0, parts=("beta1", "beta2")),
            "eps": Hyper(eps),
            "weight_decay": Hyper(weight_decay),
            "gamma": Hyper(gamma),
        },
        norms=True,
    )
