"""NAdam: Adam with Nesterov's momentum."""

from functools import partial
from typing import Any

import torch

from funcopt.hyper import Hyper
from funcopt.optimizer import Optimizer, elementwise
from funcopt.optimizers._parts import Number, average, average_of_squares, decayed, root
from funcopt.types import HyperValue, Tensor


def rule(
    g: Tensor,
    p: Tensor,
    mu_product: Number,  # a number for the whole leaf
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: Any,
    lr: Number,
    beta1: Number,
    beta2: Number,
    eps: Number,
    weight_decay: Number,
    momentum_decay: Number,
    maximize: bool,
    decoupled_weight_decay: bool,
) -> tuple[Any, ...]:
    g = -g if maximize else g
    g, p = decayed(g, p, lr, weight_decay, decoupled_weight_decay)
    mu = beta1 * (1 - 0.5 * 0.96 ** (step * momentum_decay))
    mu_next = beta1 * (1 - 0.5 * 0.96 ** ((step + 1) * momentum_decay))
    mu_product = mu_product * mu
    exp_avg = average(exp_avg, g, beta1)
    exp_avg_sq = average_of_squares(exp_avg_sq, g, beta2)
    denom = root(exp_avg_sq / (1 - beta2**step)) + eps
    p = p - lr * (1 - mu) / (1 - mu_product) * g / denom
    p = p - lr * mu_next / (1 - mu_product * mu_next) * exp_avg / denom
    return p, mu_product, exp_avg, exp_avg_sq


def nadam(
    lr: HyperValue = 2e-3,
    betas: tuple[HyperValue, HyperValue] = (0.9, 0.999),
    eps: HyperValue = 1e-8,
    weight_decay: HyperValue = 0.0,
    momentum_decay: HyperValue = 4e-3,
    decoupled_weight_decay: bool = False,
    *,
    maximize: bool = False,
) -> Optimizer:
    r"""NAdam; equal to ``torch.optim.NAdam``.

    .. math::
        g_t &= \nabla f(p_{t-1}) + \text{weight\_decay} \cdot p_{t-1} \\
        \mu_t &= \beta_1 \, (1 - \tfrac12 \, 0.96^{t \cdot \text{momentum\_decay}}),
            \qquad \text{mu\_product}_t = \mu_1 \mu_2 \cdots \mu_t \\
        \text{exp\_avg}_t &= \beta_1 \, \text{exp\_avg}_{t-1} + (1 - \beta_1) \, g_t \\
        \text{exp\_avg\_sq}_t &= \beta_2 \, \text{exp\_avg\_sq}_{t-1}
            + (1 - \beta_2) \, g_t^2 \\
        m_t &= \frac{1 - \mu_t}{1 - \text{mu\_product}_t} \, g_t
            + \frac{\mu_{t+1}}{1 - \text{mu\_product}_{t+1}} \, \text{exp\_avg}_t \\
        p_t &= p_{t-1} - \text{lr} \, \frac{m_t}
            {\sqrt{\text{exp\_avg\_sq}_t / (1 - \beta_2^t)} + \text{eps}}

    Args:
        lr: learning rate, ≥ 0.
        betas: decay rates of the two averages, each in [0, 1). The first is a float or a
            0-d tensor for each leaf: ``mu_product`` is one number.
        eps: added to the root, ≥ 0.
        weight_decay: factor of the L2 penalty, ≥ 0.
        momentum_decay: how fast the momentum rises from half of the first beta to all
            of it, ≥ 0; of one number for each leaf, too.
        decoupled_weight_decay: decay the parameter past the moments, as `adamw` does.
        maximize: ascend.

    Returns:
        An `Optimizer`; state ``step, mu_product`` (float64, one entry per leaf) and
        ``exp_avg, exp_avg_sq``, of each parameter's shape and dtype.

    Raises:
        HyperparameterError: a number out of its range, or by ``update``, where the first
            beta or ``momentum_decay`` has one value for each weight.

    Note:
        Where ``exp_avg_sq`` is 0 the derivative of the root is taken as 0; see `adam`.

    Source:
        Dozat, "Incorporating Nesterov momentum into Adam", 2016, algorithm 2.

    Example:
        >>> import torch, funcopt as fo
        >>> opt = fo.nadam(lr=0.1)
        >>> p = torch.tensor([1.0, -0.2])
        >>> state = opt.init(p)
        >>> for _ in range(5):
        ...     p, state = opt.update(2 * p, state, p)      # the gradient of p²
        >>> p
        tensor([0.6237, 0.0130])
    """
    return elementwise(
        partial(rule, maximize=maximize, decoupled_weight_decay=decoupled_weight_decay),
        name="nadam",
        slots={
            "mu_product": 1.0,
            "exp_avg": torch.zeros_like,
            "exp_avg_sq": torch.zeros_like,
        },
        hyper={
            "lr": Hyper(lr),
            "betas": Hyper(betas, below=1.0, parts=("beta1", "beta2"), scalar=(0,)),
            "eps": Hyper(eps),
            "weight_decay": Hyper(weight_decay),
            "momentum_decay": Hyper(momentum_decay, scalar=(0,)),
        },
    )
