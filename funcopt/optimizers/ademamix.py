"""AdEMAMix: Adam with a second, slow average of the gradients."""

from functools import partial
from typing import Any

import torch

from funcopt.hyper import Hyper
from funcopt.optimizer import Optimizer, elementwise
from funcopt.optimizers._parts import (
    Number,
    average,
    average_of_squares,
    decoupled_decay,
    exp,
    log,
    root,
    where,
)
from funcopt.types import HyperValue, Tensor


def rule(
    g: Tensor,
    p: Tensor,
    exp_avg: Tensor,
    exp_avg_slow: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: Any,
    lr: Number,
    beta1: Number,
    beta2: Number,
    beta3: Number,
    alpha: Number,
    eps: Number,
    weight_decay: Number,
    alpha_warmup: int | None,
    beta3_warmup: int | None,
    maximize: bool,
) -> tuple[Tensor, ...]:
    if alpha_warmup:
        alpha = where(step < alpha_warmup, step / alpha_warmup, 1.0) * alpha
    if beta3_warmup:
        done = where(step < beta3_warmup, step / beta3_warmup, 1.0)
        fast, slow = 1 / log(beta1), 1 / log(beta3)  # half-lives, but for a factor
        rising = exp(1 / ((1 - done) * fast + done * slow))
        beta3 = where(step < beta3_warmup, rising, beta3)
    g = -g if maximize else g
    p = decoupled_decay(p, lr, weight_decay)
    exp_avg = average(exp_avg, g, beta1)
    exp_avg_slow = average(exp_avg_slow, g, beta3)
    exp_avg_sq = average_of_squares(exp_avg_sq, g, beta2)
    # The corrections of the two that have one in the scalars, as in Adam's step.
    correction1, correction2 = 1 - beta1**step, (1 - beta2**step) ** 0.5
    move = exp_avg + alpha * correction1 * exp_avg_slow
    move = move / (root(exp_avg_sq) + eps * correction2)
    p = p - lr * correction2 / correction1 * move
    return p, exp_avg, exp_avg_slow, exp_avg_sq


def ademamix(
    lr: HyperValue = 1e-3,
    betas: tuple[HyperValue, HyperValue, HyperValue] = (0.9, 0.999, 0.9999),
    alpha: HyperValue = 2.0,
    eps: HyperValue = 1e-8,
    weight_decay: HyperValue = 0.0,
    alpha_warmup: int | None = None,
    beta3_warmup: int | None = None,
    *,
    maximize: bool = False,
) -> Optimizer:
    r"""AdEMAMix: a fast average and a slow one.

    .. math::
        \text{exp\_avg}_t &= \beta_1 \, \text{exp\_avg}_{t-1} + (1 - \beta_1) \, g_t \\
        \text{exp\_avg\_slow}_t &= \beta_3 \, \text{exp\_avg\_slow}_{t-1}
            + (1 - \beta_3) \, g_t \\
        \text{exp\_avg\_sq}_t &= \beta_2 \, \text{exp\_avg\_sq}_{t-1}
            + (1 - \beta_2) \, g_t^2 \\
        p_t &= (1 - \text{lr} \cdot \text{weight\_decay}) \, p_{t-1} - \text{lr} \,
            \frac{\text{exp\_avg}_t / (1 - \beta_1^t)
                + \alpha \, \text{exp\_avg\_slow}_t}
            {\sqrt{\text{exp\_avg\_sq}_t / (1 - \beta_2^t)} + \text{eps}}

    and in the T steps of a warm-up

    .. math::
        \alpha_t = \frac{t}{T} \, \alpha, \qquad
        \frac{1}{\ln \beta_{3,t}} = \Big(1 - \frac{t}{T}\Big) \frac{1}{\ln \beta_1}
            + \frac{t}{T} \, \frac{1}{\ln \beta_3}

    Args:
        lr: learning rate, ≥ 0.
        betas: decay rates of the fast average, of the squares and of the slow average,
            each in [0, 1).
        alpha: the weight of the slow average, ≥ 0.
        eps: added to the root, ≥ 0.
        weight_decay: the share of ``lr`` by which a parameter shrinks, ≥ 0.
        alpha_warmup: the steps in which ``alpha`` rises from 0; none if None or 0.
        beta3_warmup: the steps in which the slow average slows down from the fast one's
            rate; none if None or 0.
        maximize: ascend.

    Returns:
        An `Optimizer`; state ``step, exp_avg, exp_avg_slow, exp_avg_sq``, of each
        parameter's shape and dtype.

    Raises:
        HyperparameterError: a number out of its range.

    Note:
        Where ``exp_avg_sq`` is 0 the derivative of the root is taken as 0; see `adam`.

    Source:
        Pagliardini, Ablin, Grangier, "The AdEMAMix optimizer: better, faster, older",
        2024, algorithm 1; alpha as in the authors' code.

    Example:
        >>> import torch, funcopt as fo
        >>> opt = fo.ademamix(lr=0.1, alpha_warmup=10, beta3_warmup=10)
        >>> p = torch.tensor([1.0, -0.2])
        >>> state = opt.init(p)
        >>> for _ in range(5):
        ...     p, state = opt.update(2 * p, state, p)      # the gradient of p²
        >>> p
        tensor([0.5074, 0.1174])
    """
    slots = ("exp_avg", "exp_avg_slow", "exp_avg_sq")
    warmups = {"alpha_warmup": alpha_warmup, "beta3_warmup": beta3_warmup}
    return elementwise(
        partial(rule, **warmups, maximize=maximize),
        name="ademamix",
        slots=dict.fromkeys(slots, torch.zeros_like),
        hyper={
            "lr": Hyper(lr),
            "betas": Hyper(betas, below=1.0, parts=("beta1", "beta2", "beta3")),
            "alpha": Hyper(alpha),
            "eps": Hyper(eps),
            "weight_decay": Hyper(weight_decay),
        },
    )
