"""ADOPT: Adam that divides a gradient by the second moment of those before it."""

from functools import partial
from typing import Any

import torch

from funcopt.hyper import Hyper
from funcopt.optimizer import Optimizer, elementwise
from funcopt.optimizers._parts import Number, between, decayed, root, towards, where
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
    clip: bool,
    maximize: bool,
    decoupled_weight_decay: bool,
) -> tuple[Tensor, ...]:
    # The first gradient is the first second moment, and nothing else.
    lr = where(step > 1, lr, 0.0)
    weight1 = where(step > 1, 1 - beta1, 0.0)
    weight2 = where(step > 1, 1 - beta2, 1.0)
    g = -g if maximize else g
    g, p = decayed(g, p, lr, weight_decay, decoupled_weight_decay)
    denom = root(exp_avg_sq)
    normed = g / where(denom > eps, denom, eps)
    if clip:
        bound = (step - 1) ** 0.25
        normed = between(normed, -bound, bound)
    exp_avg = towards(exp_avg, normed, weight1)
    return p - lr * exp_avg, exp_avg, towards(exp_avg_sq, g * g, weight2)


def adopt(
    lr: HyperValue = 1e-3,
    betas: tuple[HyperValue, HyperValue] = (0.9, 0.9999),
    eps: HyperValue = 1e-6,
    weight_decay: HyperValue = 0.0,
    clip: bool = True,
    *,
    maximize: bool = False,
    decoupled_weight_decay: bool = False,
) -> Optimizer:
    r"""ADOPT, which converges with any second beta.

    .. math::
        g_t &= \nabla f(p_{t-1}) + \text{weight\_decay} \cdot p_{t-1} \\
        n_t &= \frac{g_t}{\max(\sqrt{\text{exp\_avg\_sq}_{t-1}}, \text{eps})}
            \text{, if clip within } \pm (t - 1)^{1/4} \\
        \text{exp\_avg}_t &= \beta_1 \, \text{exp\_avg}_{t-1} + (1 - \beta_1) \, n_t \\
        p_t &= p_{t-1} - \text{lr} \cdot \text{exp\_avg}_t \\
        \text{exp\_avg\_sq}_t &= \beta_2 \, \text{exp\_avg\_sq}_{t-1}
            + (1 - \beta_2) \, g_t^2 \\
        \text{but } p_1 &= p_0, \quad \text{exp\_avg}_1 = 0, \quad
            \text{exp\_avg\_sq}_1 = g_1^2

    Args:
        lr: learning rate, ≥ 0.
        betas: decay rates of the two averages, each in [0, 1).
        eps: the least divisor, ≥ 0.
        weight_decay: factor of the L2 penalty, ≥ 0.
        clip: bound what is averaged, ever less.
        maximize: ascend.
        decoupled_weight_decay: decay the parameter past the moments, as `adamw` does.

    Returns:
        An `Optimizer`; state ``step, exp_avg, exp_avg_sq``, of each parameter's shape
        and dtype.

    Raises:
        HyperparameterError: a number out of its range.

    Note:
        A leaf's first step does not move it. Where the divisor is ``eps``, or the
        quotient is clipped, it has no derivative by what came before.

    Source:
        Taniguchi, Harada, Minegishi, Oshima, Jeong, Nagahara, Iiyama, Suzuki, Iwasawa,
        Matsuo, "ADOPT: modified Adam can converge with any β₂ with the optimal rate",
        2024, algorithm 2, and the authors' clipping.

    Example:
        >>> import torch, funcopt as fo
        >>> opt = fo.adopt(lr=0.1)
        >>> p = torch.tensor([1.0, -0.2])
        >>> state = opt.init(p)
        >>> for _ in range(5):
        ...     p, state = opt.update(2 * p, state, p)      # the gradient of p²
        >>> p
        tensor([ 0.9109, -0.1163])
    """
    return elementwise(
        partial(
            rule,
            clip=clip,
            maximize=maximize,
            decoupled_weight_decay=decoupled_weight_decay,
        ),
        name="adopt",
        slots=dict.fromkeys(("exp_avg", "exp_avg_sq"), torch.zeros_like),
        hyper={
            "lr": Hyper(lr),
            "betas": Hyper(betas, below=1.0, parts=("beta1", "beta2")),
            "eps": Hyper(eps),
            "weight_decay": Hyper(weight_decay),
        },
    )
