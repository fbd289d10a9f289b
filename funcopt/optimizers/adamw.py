"""AdamW: Adam with weight decay past the moments."""

from functools import partial
from typing import Any

import torch

from funcopt.hyper import Hyper
from funcopt.optimizer import Optimizer, elementwise
from funcopt.optimizers._parts import (
    Number,
    adam_step,
    average,
    average_of_squares,
    decoupled_decay,
)
from funcopt.types import HyperValue, Tensor


def rule(
    g: Tensor,
    p: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *max_exp_avg_sq: Tensor,  # one with amsgrad, else none
    step: Any,
    lr: Number,
    beta1: Number,
    beta2: Number,
    eps: Number,
    weight_decay: Number,
    maximize: bool,
) -> tuple[Tensor, ...]:
    g = -g if maximize else g
    p = decoupled_decay(p, lr, weight_decay)
    exp_avg = average(exp_avg, g, beta1)
    exp_avg_sq = average_of_squares(exp_avg_sq, g, beta2)
    max_exp_avg_sq = tuple(torch.maximum(x, exp_avg_sq) for x in max_exp_avg_sq)
    (second,) = max_exp_avg_sq or (exp_avg_sq,)
    p = p - adam_step(exp_avg, second, step, lr, beta1, beta2, eps)
    return p, exp_avg, exp_avg_sq, *max_exp_avg_sq


def adamw(
    lr: HyperValue = 1e-3,
    betas: tuple[HyperValue, HyperValue] = (0.9, 0.999),
    eps: HyperValue = 1e-8,
    weight_decay: HyperValue = 1e-2,
    amsgrad: bool = False,
    *,
    maximize: bool = False,
) -> Optimizer:
    r"""AdamW; equal to ``torch.optim.AdamW``.

    .. math::
        \text{exp\_avg}_t &= \beta_1 \, \text{exp\_avg}_{t-1} + (1 - \beta_1) \, g_t \\
        \text{exp\_avg\_sq}_t &= \beta_2 \, \text{exp\_avg\_sq}_{t-1}
            + (1 - \beta_2) \, g_t^2 \\
        p_t &= (1 - \text{lr} \cdot \text{weight\_decay}) \, p_{t-1} - \text{lr} \,
            \frac{\text{exp\_avg}_t / (1 - \beta_1^t)}
            {\sqrt{\text{exp\_avg\_sq}_t / (1 - \beta_2^t)} + \text{eps}}

    Args:
        lr: learning rate, ≥ 0.
        betas: decay rates of the two averages, each in [0, 1).
        eps: added to the root, ≥ 0.
        weight_decay: the share of ``lr`` by which a parameter shrinks, ≥ 0.
        amsgrad: divide by the root of the largest ``exp_avg_sq`` so far.
        maximize: ascend.

    Returns:
        An `Optimizer`; state ``step, exp_avg, exp_avg_sq``, and with amsgrad
        ``max_exp_avg_sq``, of each parameter's shape and dtype.

    Raises:
        HyperparameterError: a number out of its range.

    Note:
        Where ``exp_avg_sq`` is 0 the derivative of the root is taken as 0; see `adam`.

    Source:
        Loshchilov, Hutter, "Decoupled weight decay regularization", 2019, algorithm 2.

    Example:
        >>> import torch, funcopt as fo
        >>> opt = fo.adamw(lr=0.1, weight_decay=0.5)
        >>> p = torch.tensor([1.0, -0.2])
        >>> state = opt.init(p)
        >>> for _ in range(5):
        ...     p, state = opt.update(2 * p, state, p)      # the gradient of p²
        >>> p
        tensor([0.3353, 0.1045])
    """
    return elementwise(
        partial(rule, maximize=maximize),
        name="adamw",
        slots=dict.fromkeys(
            ("exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if amsgrad else [])),
            torch.zeros_like,
        ),
        hyper={
            "lr": Hyper(lr),
            "betas": Hyper(betas, below=1.0, parts=("beta1", "beta2")),
            "eps": Hyper(eps),
            "weight_decay": Hyper(weight_decay),
        },
    )
