"""NovoGrad: momentum of gradients that are each divided by a norm, a number per leaf."""

from functools import partial
from typing import Any

import torch

from funcopt.hyper import Hyper
from funcopt.optimizer import Optimizer, per_tensor
from funcopt.optimizers._parts import Number, coupled_decay, where
from funcopt.types import HyperValue, Tensor

_TINY = torch.finfo(torch.float64).tiny


def rule(
    g: Tensor,
    p: Tensor,
    exp_avg: Tensor,
    exp_avg_norm_sq: Number,
    *,
    step: Any,
    lr: Number,
    beta1: Number,
    beta2: Number,
    eps: Number,
    weight_decay: Number,
    maximize: bool,
) -> tuple[Any, ...]:
    g = -g if maximize else g
    square = (g * g).sum(dtype=torch.float64)
    beta2 = where(step > 1, beta2, 0.0)  # the first square is the average itself
    exp_avg_norm_sq = beta2 * exp_avg_norm_sq + (1 - beta2) * square
    # As `root` does: eps swallows the tiny number that stands for 0.
    size = where(exp_avg_norm_sq > _TINY, exp_avg_norm_sq, _TINY) ** 0.5 + eps
    exp_avg = beta1 * exp_avg + coupled_decay(g / size, p, weight_decay)
    return p - lr * exp_avg, exp_avg, exp_avg_norm_sq


def novograd(
    lr: HyperValue = 1e-3,
    betas: tuple[HyperValue, HyperValue] = (0.95, 0.98),
    eps: HyperValue = 1e-8,
    weight_decay: HyperValue = 0.0,
    *,
    maximize: bool = False,
) -> Optimizer:
    r"""NovoGrad.

    .. math::
        \text{exp\_avg\_norm\_sq}_t &= \beta_2 \, \text{exp\_avg\_norm\_sq}_{t-1}
            + (1 - \beta_2) \, \|g_t\|^2,
            \qquad \text{exp\_avg\_norm\_sq}_1 = \|g_1\|^2 \\
        \text{exp\_avg}_t &= \beta_1 \, \text{exp\_avg}_{t-1}
            + \frac{g_t}{\sqrt{\text{exp\_avg\_norm\_sq}_t} + \text{eps}}
            + \text{weight\_decay} \cdot p_{t-1} \\
        p_t &= p_{t-1} - \text{lr} \cdot \text{exp\_avg}_t

    Args:
        lr: learning rate, ≥ 0.
        betas: the factor of the momentum, and the decay rate of the mean square: a float
            or a 0-d tensor for each leaf; each in [0, 1).
        eps: added to the root, ≥ 0.
        weight_decay: the share of the parameter in the momentum, ≥ 0.
        maximize: ascend.

    Returns:
        An `Optimizer`; state ``step, exp_avg``, of each parameter's shape and dtype, and
        ``exp_avg_norm_sq`` (float64, one entry per leaf).

    Raises:
        HyperparameterError: a number out of its range, or by ``update``, a second beta
            with an entry for each weight.

    Note:
        The momentum is a sum, not an average: at ``betas[0]`` 0.95 a step is up to twenty
        times ``lr`` long. Where all gradients have been 0 the derivative of the root is
        taken as 0.

    Source:
        Ginsburg, Castonguay, Hrinchuk, Kuchaiev, Lavrukhin, Leary, Li, Nguyen, Zhang,
        Cohen, "Training deep networks with stochastic normalized gradients", 2019,
        algorithm 1.

    Example:
        >>> import torch, funcopt as fo
        >>> opt = fo.novograd(lr=0.05)
        >>> p = torch.tensor([1.0, -0.2])
        >>> state = opt.init(p)
        >>> for _ in range(5):
        ...     p, state = opt.update(2 * p, state, p)      # the gradient of p²
        >>> p, state["exp_avg_norm_sq"]
        (tensor([ 0.3864, -0.0773]), tensor([4.0365], dtype=torch.float64))
    """
    return per_tensor(
        partial(rule, maximize=maximize),
        name="novograd",
        slots={"exp_avg": torch.zeros_like, "exp_avg_norm_sq": 0.0},
        hyper={
            "lr": Hyper(lr),
            "betas": Hyper(betas, below=1.0, parts=("beta1", "beta2"), scalar=(1,)),
            "eps": Hyper(eps),
            "weight_decay": Hyper(weight_decay),
        },
        norms=True,
    )
