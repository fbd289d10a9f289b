"""Adagrad: rates that fall with the squares of all gradients so far."""

from functools import partial
from typing import Any

from funcopt.hyper import Hyper
from funcopt.optimizer import Optimizer, from_spec
from funcopt.optimizers._parts import Number, coupled_decay, filled, root
from funcopt.spec import Spec
from funcopt.types import HyperValue, Tensor


def rule(
    g: Tensor,
    p: Tensor,
    total: Tensor,
    *,
    step: Any,
    lr: Number,
    lr_decay: Number,
    weight_decay: Number,
    eps: Number,
    maximize: bool,
) -> tuple[Tensor, ...]:
    g = coupled_decay(-g if maximize else g, p, weight_decay)
    total = total + g * g
    rate = lr / (1 + (step - 1) * lr_decay)
    return p - rate * g / (root(total) + eps), total


def adagrad(
    lr: HyperValue = 1e-2,
    lr_decay: HyperValue = 0.0,
    weight_decay: HyperValue = 0.0,
    initial_accumulator_value: float = 0.0,
    eps: HyperValue = 1e-10,
    *,
    maximize: bool = False,
) -> Optimizer:
    r"""Adagrad; equal to ``torch.optim.Adagrad``.

    .. math::
        g_t &= \nabla f(p_{t-1}) + \text{weight\_decay} \cdot p_{t-1} \\
        \text{sum}_t &= \text{sum}_{t-1} + g_t^2 \\
        p_t &= p_{t-1} - \frac{\text{lr}}{1 + (t - 1) \, \text{lr\_decay}} \,
            \frac{g_t}{\sqrt{\text{sum}_t} + \text{eps}}

    Args:
        lr: learning rate, ≥ 0.
        lr_decay: how fast the learning rate itself falls, ≥ 0.
        weight_decay: factor of the L2 penalty, ≥ 0.
        initial_accumulator_value: what ``sum`` starts from, a number ≥ 0; fixed when the
            optimizer is made.
        eps: added to the root, ≥ 0.
        maximize: ascend.

    Returns:
        An `Optimizer`; state ``step, sum``, of each parameter's shape and dtype.

    Raises:
        HyperparameterError: a number out of its range.

    Note:
        Where ``sum`` is 0 the derivative of the root is taken as 0; see `adam`.

    Source:
        Duchi, Hazan, Singer, "Adaptive subgradient methods for online learning and
        stochastic optimization", 2011, with diagonal matrices; ``lr_decay`` is torch's.

    Example:
        >>> import torch, funcopt as fo
        >>> opt = fo.adagrad(lr=0.1)
        >>> p = torch.tensor([1.0, -0.2])
        >>> state = opt.init(p)
        >>> for _ in range(5):
        ...     p, state = opt.update(2 * p, state, p)      # the gradient of p²
        >>> p
        tensor([ 0.6977, -0.0102])
    """
    start = filled("initial_accumulator_value", initial_accumulator_value)
    return from_spec(
        Spec(
            partial(rule, maximize=maximize),
            "adagrad",
            {"sum": start},
            {
                "lr": Hyper(lr),
                "lr_decay": Hyper(lr_decay),
                "weight_decay": Hyper(weight_decay),
                "eps": Hyper(eps),
            },
            sparse="rows",
        )
    )
