"""Adam: adaptive moment estimation."""

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
    decayed,
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
    decoupled_weight_decay: bool,
) -> tuple[Tensor, ...]:
    g = -g if maximize else g
    g, p = decayed(g, p, lr, weight_decay, decoupled_weight_decay)
    exp_avg = average(exp_avg, g, beta1)
    exp_avg_sq = average_of_squares(exp_avg_sq, g, beta2)
    max_exp_avg_sq = tuple(torch.maximum(x, exp_avg_sq) for x in max_exp_avg_sq)
    (second,) = max_exp_avg_sq or (exp_avg_sq,)
    p = p - adam_step(exp_avg, second, step, lr, beta1, beta2, eps)
    return p, exp_avg, exp_avg_sq, *max_exp_avg_sq


def adam(
    lr: HyperValue = 1e-3,
    betas: tuple[HyperValue, HyperValue] = (0.9, 0.999),
    eps: HyperValue = 1e-8,
    weight_decay: HyperValue = 0.0,
    amsgrad: bool = False,
    *,
    maximize: bool = False,
    decoupled_weight_decay: bool = False,
) -> Optimizer:
    r"""Adam; equal to ``torch.optim.Adam``.

    .. math::
        g_t &= \nabla f(p_{t-1}) + \text{weight\_decay} \cdot p_{t-1} \\
        \text{exp\_avg}_t &= \beta_1 \, \text{exp\_avg}_{t-1} + (1 - \beta_1) \, g_t \\
        \text{exp\_avg\_sq}_t &= \beta_2 \, \text{exp\_avg\_sq}_{t-1}
            + (1 - \beta_2) \, g_t^2 \\
        p_t &= p_{t-1} - \text{lr} \, \frac{\text{exp\_avg}_t / (1 - \beta_1^t)}
            {\sqrt{\text{exp\_avg\_sq}_t / (1 - \beta_2^t)} + \text{eps}}

    Args:
        lr: learning rate, ≥ 0.
        betas: decay rates of the two averages, each in [0, 1).
        eps: added to the root, ≥ 0.
        weight_decay: factor of the L2 penalty, ≥ 0.
        amsgrad: divide by the root of the largest ``exp_avg_sq`` so far.
        maximize: ascend.
        decoupled_weight_decay: decay the parameter past the moments, as `adamw` does.

    Returns:
        An `Optimizer`; state ``step, exp_avg, exp_avg_sq``, and with amsgrad
        ``max_exp_avg_sq``, of each parameter's shape and dtype.

    Raises:
        HyperparameterError: a number out of its range.

    Note:
        Where ``exp_avg_sq`` is 0 the derivative of the root is taken as 0, so that a
        dead unit does not turn the meta-gradient into NaN; the step itself is Adam's.

    Source:
        Kingma, Ba, "Adam: a method for stochastic optimization", 2015, algorithm 1;
        Reddi, Kale, Kumar, "On the convergence of Adam and beyond", 2018 (amsgrad, here
        as in torch on the uncorrected average).

    Example:
        >>> import torch, funcopt as fo
        >>> opt = fo.adam(lr=0.1)
        >>> p = torch.tensor([1.0, -0.2])
        >>> state = opt.init(p)
        >>> for _ in range(5):
        ...     p, state = opt.update(2 * p, state, p)      # the gradient of p²
        >>> p
        tensor([0.5080, 0.1171])
    """
    return elementwise(
        partial(rule, maximize=maximize, decoupled_weight_decay=decoupled_weight_decay),
        name="adam",
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


def amsgrad(
    lr: HyperValue = 1e-3,
    betas: tuple[HyperValue, HyperValue] = (0.9, 0.999),
    eps: HyperValue = 1e-8,
    weight_decay: HyperValue = 0.0,
    *,
    maximize: bool = False,
    decoupled_weight_decay: bool = False,
) -> Optimizer:
    r"""AMSGrad: `adam` with ``amsgrad=True``.

    .. math::
        \text{max\_exp\_avg\_sq}_t = \max(\text{max\_exp\_avg\_sq}_{t-1},
            \text{exp\_avg\_sq}_t)

    stands under the root in place of exp_avg_sq; all else is as in `adam`.

    Args:
        lr: learning rate, ≥ 0.
        betas: decay rates of the two averages, each in [0, 1).
        eps: added to the root, ≥ 0.
        weight_decay: factor of the L2 penalty, ≥ 0.
        maximize: ascend.
        decoupled_weight_decay: decay the parameter past the moments.

    Returns:
        An `Optimizer`; state ``step, exp_avg, exp_avg_sq, max_exp_avg_sq``.

    Raises:
        HyperparameterError: a number out of its range.

    Source:
        Reddi, Kale, Kumar, "On the convergence of Adam and beyond", 2018, algorithm 2,
        with Adam's bias corrections.

    Example:
        >>> import torch, funcopt as fo
        >>> opt = fo.amsgrad(lr=0.1)
        >>> p = torch.tensor([1.0, -0.2])
        >>> state = opt.init(p)
        >>> for _ in range(5):
        ...     p, state = opt.update(2 * p, state, p)      # the gradient of p²
        >>> p
        tensor([0.5080, 0.1171])
    """
    return adam(
        lr,
        betas,
        eps,
        weight_decay,
        amsgrad=True,
        maximize=maximize,
        decoupled_weight_decay=decoupled_weight_decay,
    )
