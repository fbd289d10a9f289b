"""Sophia-G: a momentum divided by the Hessian's diagonal, and clipped."""

from functools import partial
from math import inf
from typing import Any

import torch

from funcopt.hyper import Hyper
from funcopt.optimizer import Optimizer, elementwise
from funcopt.optimizers._parts import Number, average, decoupled_decay, where
from funcopt.types import HyperValue, Tensor


def rule(
    g: Tensor,
    p: Tensor,
    exp_avg: Tensor,
    exp_avg_hessian: Tensor,
    *,
    step: Any,
    lr: Number,
    beta1: Number,
    beta2: Number,
    rho: Number,
    eps: Number,
    weight_decay: Number,
    hessian: Number,
    maximize: bool,
) -> tuple[Tensor, ...]:
    del step  # the authors correct no average for its start at 0
    p = decoupled_decay(p, lr, weight_decay)
    exp_avg = average(exp_avg, -g if maximize else g, beta1)
    news = where(hessian < 0, 0.0, hessian - exp_avg_hessian)
    exp_avg_hessian = exp_avg_hessian + (1 - beta2) * news
    curvature = rho * exp_avg_hessian
    curvature = where(curvature < eps, eps, curvature)
    # Clipped before the division: a quotient that overflows has no derivative.
    p = p - lr * (exp_avg.clamp(-curvature, curvature) / curvature)
    return p, exp_avg, exp_avg_hessian


def sophia_g(
    lr: HyperValue = 1e-4,
    betas: tuple[HyperValue, HyperValue] = (0.965, 0.99),
    rho: HyperValue = 0.04,
    eps: HyperValue = 1e-12,
    weight_decay: HyperValue = 0.1,
    hessian: HyperValue = -1.0,
    *,
    maximize: bool = False,
) -> Optimizer:
    r"""Sophia-G, second-order clipped stochastic optimization; the Hessian is data.

    .. math::
        \text{exp\_avg}_t &= \beta_1 \, \text{exp\_avg}_{t-1}
            + (1 - \beta_1) \, \nabla f(p_{t-1}) \\
        \text{exp\_avg\_hessian}_t &= \begin{cases}
            \beta_2 \, \text{exp\_avg\_hessian}_{t-1} + (1 - \beta_2) \, \text{hessian}_t
                & \text{hessian}_t \geq 0 \\
            \text{exp\_avg\_hessian}_{t-1} & \text{else}
            \end{cases} \\
        p_t &= (1 - \text{lr} \cdot \text{weight\_decay}) \, p_{t-1}
            - \text{lr} \cdot \text{clip}\Bigl(\frac{\text{exp\_avg}_t}
            {\max(\rho \, \text{exp\_avg\_hessian}_t, \, \text{eps})}, \, 1\Bigr)

    Args:
        lr: the size of the largest step, ≥ 0.
        betas: decay rates of the two averages, each in [0, 1).
        rho: the smaller, the more is clipped, ≥ 0; the paper's γ.
        eps: the least that is divided by, ≥ 0.
        weight_decay: the share of ``lr`` by which a parameter shrinks, ≥ 0.
        hessian: an estimate of the Hessian's diagonal, a tree like the parameters given
            to ``update``; what is negative, as the default, says that there is none in
            this step.
        maximize: ascend.

    Returns:
        An `Optimizer`; state ``step, exp_avg, exp_avg_hessian``, of each parameter's
        shape and dtype.

    Raises:
        HyperparameterError: a number out of its range.

    Note:
        The Gauss-Newton-Bartlett estimate, every ten steps in the paper: draw labels
        from the model's own output, take the gradient g of the mean loss of a batch of
        n on them, and give n·g². It is never negative. Until the first one, and where a
        step is clipped, it is one of ``lr·sign(exp_avg)``, and its derivative 0. The
        authors' code adds 1e-15 to the denominator where the paper takes the maximum.

    Source:
        Liu, Li, Hall, Liang, Ma, "Sophia: a scalable stochastic second-order optimizer
        for language model pre-training", 2024, algorithm 3.

    Example:
        >>> import torch, funcopt as fo
        >>> opt = fo.sophia_g(lr=0.1, rho=0.5)
        >>> p = torch.tensor([1.0, -0.2])
        >>> state = opt.init(p)
        >>> for _ in range(5):
        ...     hessian = torch.full_like(p, 2.0)           # that of p²
        ...     p, state = opt.update(2 * p, state, p, hessian=hessian)
        >>> p
        tensor([0.4609, 0.1150])
    """
    return elementwise(
        partial(rule, maximize=maximize),
        name="sophia_g",
        slots=dict.fromkeys(("exp_avg", "exp_avg_hessian"), torch.zeros_like),
        hyper={
            "lr": Hyper(lr),
            "betas": Hyper(betas, below=1.0, parts=("beta1", "beta2")),
            "rho": Hyper(rho),
            "eps": Hyper(eps),
            "weight_decay": Hyper(weight_decay),
            "hessian": Hyper(hessian, low=-inf),
        },
    )
