"""Adadelta: steps in the units of the parameter, without a learning rate to tune."""

from functools import partial
from typing import Any

import torch

from funcopt.hyper import Hyper
from funcopt.optimizer import Optimizer, elementwise
from funcopt.optimizers._parts import Number, average_of_squares, coupled_decay, root
from funcopt.types import HyperValue, Tensor


def rule(
    g: Tensor,
    p: Tensor,
    square_avg: Tensor,
    acc_delta: Tensor,
    *,
    step: Any,
    lr: Number,
    rho: Number,
    eps: Number,
    weight_decay: Number,
    maximize: bool,
) -> tuple[Tensor, ...]:
    del step  # neither average is corrected for its start at zero
    g = coupled_decay(-g if maximize else g, p, weight_decay)
    square_avg = average_of_squares(square_avg, g, rho)
    delta = root(acc_delta + eps) / root(square_avg + eps) * g
    return p - lr * delta, square_avg, average_of_squares(acc_delta, delta, rho)


def adadelta(
    lr: HyperValue = 1.0,
    rho: HyperValue = 0.9,
    eps: HyperValue = 1e-6,
    weight_decay: HyperValue = 0.0,
    *,
    maximize: bool = False,
) -> Optimizer:
    r"""Adadelta; equal to ``torch.optim.Adadelta``.

    .. math::
        g_t &= \nabla f(p_{t-1}) + \text{weight\_decay} \cdot p_{t-1} \\
        \text{square\_avg}_t &= \rho \, \text{square\_avg}_{t-1} + (1 - \rho) \, g_t^2 \\
        \delta_t &= \frac{\sqrt{\text{acc\_delta}_{t-1} + \text{eps}}}
            {\sqrt{\text{square\_avg}_t + \text{eps}}} \, g_t \\
        \text{acc\_delta}_t &= \rho \, \text{acc\_delta}_{t-1}
            + (1 - \rho) \, \delta_t^2 \\
        p_t &= p_{t-1} - \text{lr} \cdot \delta_t

    Args:
        lr: factor of the step, ≥ 0.
        rho: decay rate of both averages, in [0, 1].
        eps: added under both roots, ≥ 0; what the first steps are made of.
        weight_decay: factor of the L2 penalty, ≥ 0.
        maximize: ascend.

    Returns:
        An `Optimizer`; state ``step, square_avg, acc_delta``, of each parameter's shape
        and dtype.

    Raises:
        HyperparameterError: a number out of its range.

    Source:
        Zeiler, "ADADELTA: an adaptive learning rate method", 2012, algorithm 1; ``lr``
        is torch's.

    Example:
        >>> import torch, funcopt as fo
        >>> opt = fo.adadelta(eps=0.01)
        >>> p = torch.tensor([1.0, -0.2])
        >>> state = opt.init(p)
        >>> for _ in range(5):
        ...     p, state = opt.update(2 * p, state, p)      # the gradient of p²
        >>> p
        tensor([0.0742, 0.0082])
    """
    return elementwise(
        partial(rule, maximize=maximize),
        name="adadelta",
        slots=dict.fromkeys(("square_avg", "acc_delta"), torch.zeros_like),
        hyper={
            "lr": Hyper(lr),
            "rho": Hyper(rho, most=1.0),
            "eps": Hyper(eps),
            "weight_decay": Hyper(weight_decay),
        },
    )
