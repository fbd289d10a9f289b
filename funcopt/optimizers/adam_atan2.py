"""Adam-atan2: Adam's quotient as an angle, which needs no eps."""

from functools import partial
from math import pi
from typing import Any

import torch

from funcopt.hyper import Hyper
from funcopt.optimizer import Optimizer, elementwise
from funcopt.optimizers._parts import (
    Number,
    average,
    average_of_squares,
    decoupled_decay,
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
    weight_decay: Number,
    a: Number,
    b: Number,
    maximize: bool,
) -> tuple[Tensor, ...]:
    g = -g if maximize else g
    p = decoupled_decay(p, lr, weight_decay)
    exp_avg = average(exp_avg, g, beta1)
    exp_avg_sq = average_of_squares(exp_avg_sq, g, beta2)
    # An angle is of a ratio: both corrections in the one scalar.
    scale = b * (1 - beta1**step) / (1 - beta2**step) ** 0.5
    some = exp_avg_sq > 0
    angle = torch.atan2(exp_avg, scale * root(where(some, exp_avg_sq, 1.0)))
    # Over 0 it is a right angle, or none, and has no derivative.
    angle = where(some, angle, pi / 2 * torch.sign(exp_avg))
    return p - lr * a * angle, exp_avg, exp_avg_sq


def adam_atan2(
    lr: HyperValue = 1e-4,
    betas: tuple[HyperValue, HyperValue] = (0.9, 0.99),
    weight_decay: HyperValue = 0.0,
    a: HyperValue = 1.27,
    b: HyperValue = 1.0,
    *,
    maximize: bool = False,
) -> Optimizer:
    r"""Adam-atan2, Adam without an eps.

    .. math::
        \text{exp\_avg}_t &= \beta_1 \, \text{exp\_avg}_{t-1} + (1 - \beta_1) \, g_t \\
        \text{exp\_avg\_sq}_t &= \beta_2 \, \text{exp\_avg\_sq}_{t-1}
            + (1 - \beta_2) \, g_t^2 \\
        p_t &= (1 - \text{lr} \cdot \text{weight\_decay}) \, p_{t-1} - \text{lr} \cdot a
            \cdot \text{atan2}\!\left( \frac{\text{exp\_avg}_t}{1 - \beta_1^t}, \;
            b \, \sqrt{\frac{\text{exp\_avg\_sq}_t}{1 - \beta_2^t}} \right)

    Args:
        lr: learning rate, ≥ 0.
        betas: decay rates of the two averages, each in [0, 1).
        weight_decay: the share of ``lr`` by which a parameter shrinks, ≥ 0.
        a: factor of the step, ≥ 0; 4/π would make the first step as long as Adam's.
        b: factor of the root, > 0; with b = a, short steps are as long as Adam's.
        maximize: ascend.

    Returns:
        An `Optimizer`; state ``step, exp_avg, exp_avg_sq``, of each parameter's shape
        and dtype.

    Raises:
        HyperparameterError: a number out of its range.

    Note:
        A step does not depend on the gradients' scale. Where ``exp_avg_sq`` is 0 the
        derivative by the moments is taken as 0.

    Source:
        Everett, Xiao, Wortsman, Alemi, Novak, Liu, Gur, Sohl-Dickstein, Kaelbling, Lee,
        Pennington, "Scaling exponents across parameterizations and optimizers", 2024,
        section 5; a and b as in adam-atan2-pytorch.

    Example:
        >>> import torch, funcopt as fo
        >>> opt = fo.adam_atan2(lr=0.1)
        >>> p = torch.tensor([1.0, -0.2])
        >>> state = opt.init(p)
        >>> for _ in range(5):
        ...     p, state = opt.update(2 * p, state, p)      # the gradient of p²
        >>> p
        tensor([0.5061, 0.1271])
    """
    return elementwise(
        partial(rule, maximize=maximize),
        name="adam_atan2",
        slots=dict.fromkeys(("exp_avg", "exp_avg_sq"), torch.zeros_like),
        hyper={
            "lr": Hyper(lr),
            "betas": Hyper(betas, below=1.0, parts=("beta1", "beta2")),
            "weight_decay": Hyper(weight_decay),
            "a": Hyper(a),
            "b": Hyper(b, over=True),
        },
    )
