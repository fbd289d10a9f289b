"""RAdam: Adam that steps by the first moment alone until the second can be trusted."""

from functools import partial
from typing import Any

import torch

from funcopt.hyper import Hyper
from funcopt.optimizer import Optimizer, elementwise
from funcopt.optimizers._parts import (
    Number,
    average,
    average_of_squares,
    decayed,
    root,
    where,
)
from funcopt.types import HyperValue, Tensor


def rule(
    g: Tensor,
    p: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: Any,
    lr: Number,
    beta1: Number,
    beta2: Number,
    eps: Number,
    weight_decay: Number,
    maximize: bool,
    decoupled_weight_decay: bool,
) -> tuple[Tensor, ...]:
    g = -g if maximize else g
    g, p = decayed(g, p, lr, weight_decay, decoupled_weight_decay)
    exp_avg = average(exp_avg, g, beta1)
    exp_avg_sq = average_of_squares(exp_avg_sq, g, beta2)
    bias_correction2 = 1 - beta2**step
    rho_inf = 2 / (1 - beta2) - 1
    rho = rho_inf - 2 * step * beta2**step / bias_correction2
    rectified = rho > 5
    # Where it is not, equal lengths make the rectification 1, and its derivative 0: with
    # the true ones it may be the root of a negative number.
    rho_inf = where(rectified, rho_inf, 6.0)
    rho = where(rectified, rho, 6.0)
    rectification = (
        (rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)
    ) ** 0.5
    scale = rectification * where(rectified, bias_correction2, 1.0) ** 0.5
    denom = where(rectified, root(exp_avg_sq) + eps, 1.0)
    p = p - lr / (1 - beta1**step) * scale * (exp_avg / denom)
    return p, exp_avg, exp_avg_sq


def radam(
    lr: HyperValue = 1e-3,
    betas: tuple[HyperValue, HyperValue] = (0.9, 0.999),
    eps: HyperValue = 1e-8,
    weight_decay: HyperValue = 0.0,
    decoupled_weight_decay: bool = False,
    *,
    maximize: bool = False,
) -> Optimizer:
    r"""RAdam, Adam with a rectified variance; equal to ``torch.optim.RAdam``.

    .. math::
        g_t &= \nabla f(p_{t-1}) + \text{weight\_decay} \cdot p_{t-1} \\
        \text{exp\_avg}_t &= \beta_1 \, \text{exp\_avg}_{t-1} + (1 - \beta_1) \, g_t \\
        \text{exp\_avg\_sq}_t &= \beta_2 \, \text{exp\_avg\_sq}_{t-1}
            + (1 - \beta_2) \, g_t^2 \\
        \rho_\infty &= 2 / (1 - \beta_2) - 1, \qquad
            \rho_t = \rho_\infty - 2 t \beta_2^t / (1 - \beta_2^t) \\
        s_t &= \sqrt{\frac{(\rho_t - 4)(\rho_t - 2) \, \rho_\infty}
            {(\rho_\infty - 4)(\rho_\infty - 2) \, \rho_t}} \;
            \frac{\sqrt{1 - \beta_2^t}}{\sqrt{\text{exp\_avg\_sq}_t} + \text{eps}}
            \text{ if } \rho_t > 5 \text{ else } 1 \\
        p_t &= p_{t-1} - \text{lr} \,
            \frac{\text{exp\_avg}_t}{1 - \beta_1^t} \, s_t

    Args:
        lr: learning rate, ≥ 0.
        betas: decay rates of the two averages, each in [0, 1). With the second at most
            2/3 no step is ever divided by a root.
        eps: added to the root, before the correction of its bias, ≥ 0.
        weight_decay: factor of the L2 penalty, ≥ 0.
        decoupled_weight_decay: decay the parameter past the moments, as `adamw` does.
        maximize: ascend.

    Returns:
        An `Optimizer`; state ``step, exp_avg, exp_avg_sq``, of each parameter's shape
        and dtype.

    Raises:
        HyperparameterError: a number out of its range.

    Note:
        The steps before rectification, five or more, are as long as ``exp_avg``: ``lr``
        means there what it means for `sgd`. Where ``exp_avg_sq`` is 0 the derivative of
        the root is taken as 0; see `adam`.

    Source:
        Liu, Jiang, He, Chen, Liu, Gao, Han, "On the variance of the adaptive learning
        rate and beyond", 2020, algorithm 2; the threshold 5 (theirs: 4) is torch's.

    Example:
        >>> import torch, funcopt as fo
        >>> opt = fo.radam(lr=0.1)
        >>> p = torch.tensor([1.0, -0.2])
        >>> state = opt.init(p)
        >>> for _ in range(5):
        ...     p, state = opt.update(2 * p, state, p)      # the gradient of p²
        >>> p
        tensor([ 0.2016, -0.0403])
    """
    return elementwise(
        partial(rule, maximize=maximize, decoupled_weight_decay=decoupled_weight_decay),
        name="radam",
        slots=dict.fromkeys(("exp_avg", "exp_avg_sq"), torch.zeros_like),
        hyper={
            "lr": Hyper(lr),
            "betas": Hyper(betas, below=1.0, parts=("beta1", "beta2")),
            "eps": Hyper(eps),
            "weight_decay": Hyper(weight_decay),
        },
    )
