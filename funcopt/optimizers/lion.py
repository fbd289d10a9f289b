"""Lion: steps by the sign of a momentum."""

from functools import partial
from typing import Any

import torch

from funcopt.hyper import Hyper
from funcopt.optimizer import Optimizer, elementwise
from funcopt.optimizers._parts import Number, average, decoupled_decay
from funcopt.types import HyperValue, Tensor


def rule(
    g: Tensor,
    p: Tensor,
    exp_avg: Tensor,
    *,
    step: Any,
    lr: Number,
    beta1: Number,
    beta2: Number,
    weight_decay: Number,
    maximize: bool,
) -> tuple[Tensor, ...]:
    del step  # a sign needs no correction of the average's size
    g = -g if maximize else g
    p = decoupled_decay(p, lr, weight_decay)
    p = p - lr * torch.sign(average(exp_avg, g, beta1))
    return p, average(exp_avg, g, beta2)


def lion(
    lr: HyperValue = 1e-4,
    betas: tuple[HyperValue, HyperValue] = (0.9, 0.99),
    weight_decay: HyperValue = 0.0,
    *,
    maximize: bool = False,
) -> Optimizer:
    r"""Lion, evolved sign momentum.

    .. math::
        g_t &= \nabla f(p_{t-1}) \\
        c_t &= \beta_1 \, \text{exp\_avg}_{t-1} + (1 - \beta_1) \, g_t \\
        p_t &= (1 - \text{lr} \cdot \text{weight\_decay}) \, p_{t-1}
            - \text{lr} \cdot \text{sign}(c_t) \\
        \text{exp\_avg}_t &= \beta_2 \, \text{exp\_avg}_{t-1} + (1 - \beta_2) \, g_t

    Args:
        lr: the size of every step, ≥ 0; three to ten times smaller than for `adamw`.
        betas: the share of the average in the step, and its decay rate, each in [0, 1).
        weight_decay: the share of ``lr`` by which a parameter shrinks, ≥ 0.
        maximize: ascend.

    Returns:
        An `Optimizer`; state ``step, exp_avg``, of each parameter's shape and dtype.

    Raises:
        HyperparameterError: a number out of its range.

    Note:
        A step depends on a sign alone: the derivative of the new parameter with respect
        to gradient, ``exp_avg`` and betas is 0. A meta-gradient reaches lr, weight_decay
        and the parameters.

    Source:
        Chen, Liang, Huang, Real, Wang, Liu, Pham, Dong, Luong, Hsieh, Lu, Le, "Symbolic
        discovery of optimization algorithms", 2023, algorithm 2.

    Example:
        >>> import torch, funcopt as fo
        >>> opt = fo.lion(lr=0.1, weight_decay=0.5)
        >>> p = torch.tensor([1.0, -0.2])
        >>> state = opt.init(p)
        >>> for _ in range(5):
        ...     p, state = opt.update(2 * p, state, p)      # the gradient of p²
        >>> p
        tensor([0.3213, 0.1077])
    """
    return elementwise(
        partial(rule, maximize=maximize),
        name="lion",
        slots={"exp_avg": torch.zeros_like},
        hyper={
            "lr": Hyper(lr),
            "betas": Hyper(betas, below=1.0, parts=("beta1", "beta2")),
            "weight_decay": Hyper(weight_decay),
        },
    )
