"""Adan: Nesterov momentum from the changes of the gradient, with adaptive rates."""

from functools import partial
from typing import Any

import torch

from funcopt.hyper import Hyper
from funcopt.optimizer import Optimizer, elementwise
from funcopt.optimizers._parts import (
    Number,
    average,
    average_of_squares,
    is_zero,
    root,
    where,
)
from funcopt.types import HyperValue, Tensor


def rule(
    g: Tensor,
    p: Tensor,
    exp_avg: Tensor,
    exp_avg_diff: Tensor,
    exp_avg_sq: Tensor,
    prev_grad: Tensor,
    *,
    step: Any,
    lr: Number,
    beta1: Number,
    beta2: Number,
    beta3: Number,
    eps: Number,
    weight_decay: Number,
    maximize: bool,
) -> tuple[Tensor, ...]:
    g = -g if maximize else g
    change = g - where(step > 1, prev_grad, g)  # before the first there was none
    ahead = g + beta2 * change
    exp_avg = average(exp_avg, g, beta1)
    exp_avg_diff = average(exp_avg_diff, change, beta2)
    exp_avg_sq = average_of_squares(exp_avg_sq, ahead, beta3)
    # The three corrections in the scalars, as in Adam's step.
    correction1, correction2 = 1 - beta1**step, 1 - beta2**step
    correction3 = (1 - beta3**step) ** 0.5
    move = exp_avg + beta2 * correction1 / correction2 * exp_avg_diff
    move = move / (root(exp_avg_sq) + eps * correction3)
    p = p - lr * correction3 / correction1 * move
    if not is_zero(weight_decay):
        p = p / (1 + lr * weight_decay)
    return p, exp_avg, exp_avg_diff, exp_avg_sq, g.clone()


def adan(
    lr: HyperValue = 1e-3,
    betas: tuple[HyperValue, HyperValue, HyperValue] = (0.98, 0.92, 0.99),
    eps: HyperValue = 1e-8,
    weight_decay: HyperValue = 0.0,
    *,
    maximize: bool = False,
) -> Optimizer:
    r"""Adan, adaptive Nesterov momentum.

    .. math::
        d_t &= g_t - \text{prev\_grad}_{t-1}, \qquad d_1 = 0, \qquad
            \text{prev\_grad}_t = g_t \\
        \text{exp\_avg}_t &= \beta_1 \, \text{exp\_avg}_{t-1} + (1 - \beta_1) \, g_t \\
        \text{exp\_avg\_diff}_t &= \beta_2 \, \text{exp\_avg\_diff}_{t-1}
            + (1 - \beta_2) \, d_t \\
        \text{exp\_avg\_sq}_t &= \beta_3 \, \text{exp\_avg\_sq}_{t-1}
            + (1 - \beta_3) \, (g_t + \beta_2 \, d_t)^2 \\
        m_t &= \frac{\text{exp\_avg}_t}{1 - \beta_1^t}
            + \beta_2 \, \frac{\text{exp\_avg\_diff}_t}{1 - \beta_2^t} \\
        p_t &= \frac{1}{1 + \text{lr} \cdot \text{weight\_decay}} \left( p_{t-1} -
            \frac{\text{lr} \cdot m_t}
            {\sqrt{\text{exp\_avg\_sq}_t / (1 - \beta_3^t)} + \text{eps}} \right)

    Args:
        lr: learning rate, ≥ 0.
        betas: decay rates of the averages of gradients, of their changes and of squares,
            each in [0, 1): one less the paper's, as in the authors' code.
        eps: added to the root, ≥ 0.
        weight_decay: factor of the L2 penalty, of which the step is proximal, ≥ 0.
        maximize: ascend.

    Returns:
        An `Optimizer`; state ``step, exp_avg, exp_avg_diff, exp_avg_sq, prev_grad``, of
        each parameter's shape and dtype.

    Raises:
        HyperparameterError: a number out of its range.

    Note:
        Where ``exp_avg_sq`` is 0 the derivative of the root is taken as 0; see `adam`.

    Source:
        Xie, Zhou, Li, Lin, Yan, "Adan: adaptive Nesterov momentum algorithm for faster
        optimizing deep models", 2022, algorithm 1, without restarts.

    Example:
        >>> import torch, funcopt as fo
        >>> opt = fo.adan(lr=0.1)
        >>> p = torch.tensor([1.0, -0.2])
        >>> state = opt.init(p)
        >>> for _ in range(5):
        ...     p, state = opt.update(2 * p, state, p)      # the gradient of p²
        >>> p
        tensor([0.5074, 0.0486])
    """
    slots = ("exp_avg", "exp_avg_diff", "exp_avg_sq", "prev_grad")
    return elementwise(
        partial(rule, maximize=maximize),
        name="adan",
        slots=dict.fromkeys(slots, torch.zeros_like),
        hyper={
            "lr": Hyper(lr),
            "betas": Hyper(betas, below=1.0, parts=("beta1", "beta2", "beta3")),
            "eps": Hyper(eps),
            "weight_decay": Hyper(weight_decay),
        },
    )
