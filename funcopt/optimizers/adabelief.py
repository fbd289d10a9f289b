"""AdaBelief: Adam with the spread of gradients for their size."""

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
    exp_avg_var: Tensor,
    *,
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
    surprise = g - exp_avg
    exp_avg_var = average_of_squares(exp_avg_var, surprise, beta2) + eps
    p = p - adam_step(exp_avg, exp_avg_var, step, lr, beta1, beta2, eps)
    return p, exp_avg, exp_avg_var


def adabelief(
    lr: HyperValue = 1e-3,
    betas: tuple[HyperValue, HyperValue] = (0.9, 0.999),
    eps: HyperValue = 1e-16,
    weight_decay: HyperValue = 0.0,
    *,
    maximize: bool = False,
) -> Optimizer:
    r"""AdaBelief: long steps where gradients are as expected.

    .. math::
        \text{exp\_avg}_t &= \beta_1 \, \text{exp\_avg}_{t-1} + (1 - \beta_1) \, g_t \\
        \text{exp\_avg\_var}_t &= \beta_2 \, \text{exp\_avg\_var}_{t-1}
            + (1 - \beta_2) \, (g_t - \text{exp\_avg}_t)^2 + \text{eps} \\
        p_t &= (1 - \text{lr} \cdot \text{weight\_decay}) \, p_{t-1} - \text{lr} \,
            \frac{\text{exp\_avg}_t / (1 - \beta_1^t)}
            {\sqrt{\text{exp\_avg\_var}_t / (1 - \beta_2^t)} + \text{eps}}

    Args:
        lr: learning rate, ≥ 0.
        betas: decay rates of the two averages, each in [0, 1).
        eps: added to the average of squares at every step, and to its root, ≥ 0.
        weight_decay: the share of ``lr`` by which a parameter shrinks, ≥ 0.
        maximize: ascend.

    Returns:
        An `Optimizer`; state ``step, exp_avg, exp_avg_var``, of each parameter's shape
        and dtype.

    Raises:
        HyperparameterError: a number out of its range.

    Note:
        The authors' package rectifies its steps as `radam` does unless told otherwise;
        their algorithm, and this one, does not.

    Source:
        Zhuang, Tang, Ding, Tatikonda, Dvornek, Papademetris, Duncan, "AdaBelief
        optimizer: adapting stepsizes by the belief in observed gradients", 2020,
        algorithm 2.

    Example:
        >>> import torch, funcopt as fo
        >>> opt = fo.adabelief(lr=0.1)
        >>> p = torch.tensor([1.0, -0.2])
        >>> state = opt.init(p)
        >>> for _ in range(5):
        ...     p, state = opt.update(2 * p, state, p)      # the gradient of p²
        >>> p
        tensor([0.4045, 0.1162])
    """
    return elementwise(
        partial(rule, maximize=maximize),
        name="adabelief",
        slots=dict.fromkeys(("exp_avg", "exp_avg_var"), torch.zeros_like),
        hyper={
            "lr": Hyper(lr),
            "betas": Hyper(betas, below=1.0, parts=("beta1", "beta2")),
            "eps": Hyper(eps),
            "weight_decay": Hyper(weight_decay),
        },
    )
