"""LAMB: Adam's direction, at a length in proportion to the parameter's."""

from functools import partial
from typing import Any

import torch

from funcopt.hyper import Hyper
from funcopt.optimizer import Optimizer, per_tensor
from funcopt.optimizers._parts import (
    Number,
    adam_step,
    average,
    average_of_squares,
    coupled_decay,
    norm,
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
) -> tuple[Tensor, ...]:
    g = -g if maximize else g
    exp_avg = average(exp_avg, g, beta1)
    exp_avg_sq = average_of_squares(exp_avg_sq, g, beta2)
    u = adam_step(exp_avg, exp_avg_sq, step, 1.0, beta1, beta2, eps)
    u = coupled_decay(u, p, weight_decay)
    (length, of_p), (own, of_u) = norm(p), norm(u)
    trust = of_p & of_u
    # u is divided, and not the length: (length / own) / own would leave the range.
    direction = u / where(trust, own, 1.0)
    return p - lr * where(trust, length, 1.0) * direction, exp_avg, exp_avg_sq


def lamb(
    lr: HyperValue = 1e-3,
    betas: tuple[HyperValue, HyperValue] = (0.9, 0.999),
    eps: HyperValue = 1e-6,
    weight_decay: HyperValue = 0.01,
    *,
    maximize: bool = False,
) -> Optimizer:
    r"""LAMB, layerwise adaptive moments for batch training.

    .. math::
        \text{exp\_avg}_t &= \beta_1 \, \text{exp\_avg}_{t-1} + (1 - \beta_1) \, g_t \\
        \text{exp\_avg\_sq}_t &= \beta_2 \, \text{exp\_avg\_sq}_{t-1}
            + (1 - \beta_2) \, g_t^2 \\
        u_t &= \frac{\text{exp\_avg}_t / (1 - \beta_1^t)}
            {\sqrt{\text{exp\_avg\_sq}_t / (1 - \beta_2^t)} + \text{eps}}
            + \text{weight\_decay} \cdot p_{t-1} \\
        p_t &= p_{t-1} - \text{lr} \, \frac{\|p_{t-1}\|}{\|u_t\|} \, u_t

    Args:
        lr: the length of a step as a share of the parameter's, ≥ 0.
        betas: decay rates of the two averages, each in [0, 1).
        eps: added to the root, ≥ 0.
        weight_decay: the share of the parameter in ``u``, ≥ 0.
        maximize: ascend.

    Returns:
        An `Optimizer`; state ``step, exp_avg, exp_avg_sq``, of each parameter's shape
        and dtype.

    Raises:
        HyperparameterError: a number out of its range.

    Note:
        A norm is that of one leaf. Where ``p`` or ``u`` is 0, so that they have no
        ratio, the step is ``lr * u``; the derivative takes the norm as constant there.

    Source:
        You, Li, Reddi, Hseu, Kumar, Bhojanapalli, Song, Demmel, Keutzer, Hsieh, "Large
        batch optimization for deep learning: training BERT in 76 minutes", 2020,
        algorithm 2, with φ(z) = z.

    Example:
        >>> import torch, funcopt as fo
        >>> opt = fo.lamb(lr=0.1)
        >>> p = torch.tensor([1.0, -0.2])
        >>> state = opt.init(p)
        >>> for _ in range(5):
        ...     p, state = opt.update(2 * p, state, p)      # the gradient of p²
        >>> p
        tensor([0.6670, 0.0758])
    """
    return per_tensor(
        partial(rule, maximize=maximize),
        name="lamb",
        slots=dict.fromkeys(("exp_avg", "exp_avg_sq"), torch.zeros_like),
        hyper={
            "lr": Hyper(lr),
            "betas": Hyper(betas, below=1.0, parts=("beta1", "beta2")),
            "eps": Hyper(eps),
            "weight_decay": Hyper(weight_decay),
        },
        norms=True,
    )
