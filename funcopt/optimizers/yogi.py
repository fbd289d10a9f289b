"""Yogi: Adam whose second moment changes by no more than it is told, also downwards."""

from functools import partial
from typing import Any

import torch

from funcopt.hyper import Hyper
from funcopt.optimizer import Optimizer, elementwise
from funcopt.optimizers._parts import (
    Number,
    adam_step,
    average,
    decoupled_decay,
    filled,
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
) -> tuple[Tensor, ...]:
    g = -g if maximize else g
    p = decoupled_decay(p, lr, weight_decay)
    exp_avg = average(exp_avg, g, beta1)
    square = g * g
    exp_avg_sq = exp_avg_sq - (1 - beta2) * torch.sign(exp_avg_sq - square) * square
    p = p - adam_step(exp_avg, exp_avg_sq, step, lr, beta1, beta2, eps)
    return p, exp_avg, exp_avg_sq


def yogi(
    lr: HyperValue = 1e-2,
    betas: tuple[HyperValue, HyperValue] = (0.9, 0.999),
    eps: HyperValue = 1e-3,
    weight_decay: HyperValue = 0.0,
    initial_accumulator_value: float = 1e-6,
    *,
    maximize: bool = False,
) -> Optimizer:
    r"""Yogi: Adam with an additive second moment.

    .. math::
        \text{exp\_avg}_t &= \beta_1 \, \text{exp\_avg}_{t-1} + (1 - \beta_1) \, g_t \\
        \text{exp\_avg\_sq}_t &= \text{exp\_avg\_sq}_{t-1} - (1 - \beta_2) \,
            \text{sign}(\text{exp\_avg\_sq}_{t-1} - g_t^2) \, g_t^2 \\
        p_t &= (1 - \text{lr} \cdot \text{weight\_decay}) \, p_{t-1} - \text{lr} \,
            \frac{\text{exp\_avg}_t / (1 - \beta_1^t)}
            {\sqrt{\text{exp\_avg\_sq}_t / (1 - \beta_2^t)} + \text{eps}}

    Args:
        lr: learning rate, ≥ 0.
        betas: decay rate of the average, and how slowly the second moment changes, each
            in [0, 1).
        eps: added to the root, ≥ 0.
        weight_decay: the share of ``lr`` by which a parameter shrinks, ≥ 0.
        initial_accumulator_value: what ``exp_avg_sq`` starts from, a number ≥ 0; fixed
            when the optimizer is made.
        maximize: ascend.

    Returns:
        An `Optimizer`; state ``step, exp_avg, exp_avg_sq``, of each parameter's shape
        and dtype.

    Raises:
        HyperparameterError: a number out of its range.

    Note:
        The algorithm does not correct the averages for their start; as in the published
        implementations, this does, as in `adam`. Where ``exp_avg_sq`` is 0 the
        derivative of the root is taken as 0; see `adam`.

    Source:
        Zaheer, Reddi, Sachan, Kale, Kumar, "Adaptive methods for nonconvex
        optimization", 2018, algorithm 2.

    Example:
        >>> import torch, funcopt as fo
        >>> opt = fo.yogi(lr=0.1)
        >>> p = torch.tensor([1.0, -0.2])
        >>> state = opt.init(p)
        >>> for _ in range(5):
        ...     p, state = opt.update(2 * p, state, p)      # the gradient of p²
        >>> p
        tensor([0.5085, 0.1168])
    """
    start = filled("initial_accumulator_value", initial_accumulator_value)
    return elementwise(
        partial(rule, maximize=maximize),
        name="yogi",
        slots={"exp_avg": torch.zeros_like, "exp_avg_sq": start},
        hyper={
            "lr": Hyper(lr),
            "betas": Hyper(betas, below=1.0, parts=("beta1", "beta2")),
            "eps": Hyper(eps),
            "weight_decay": Hyper(weight_decay),
        },
    )
