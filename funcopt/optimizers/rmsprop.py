"""RMSprop: the gradient over the root of its mean square."""

from functools import partial
from typing import Any

import torch

from funcopt.hyper import Hyper
from funcopt.optimizer import Optimizer, elementwise
from funcopt.optimizers._parts import (
    Number,
    average,
    average_of_squares,
    coupled_decay,
    root,
    zero_everywhere,
)
from funcopt.types import HyperValue, Tensor


def rule(
    g: Tensor,
    p: Tensor,
    square_avg: Tensor,
    *rest: Tensor,  # grad_avg if centered, then momentum_buffer if there is momentum
    step: Any,
    lr: Number,
    alpha: Number,
    eps: Number,
    weight_decay: Number,
    momentum: Number | None = None,
    centered: bool,
    maximize: bool,
) -> tuple[Tensor, ...]:
    del step  # the average is not corrected for its start at zero
    g = coupled_decay(-g if maximize else g, p, weight_decay)
    second = square_avg = average_of_squares(square_avg, g, alpha)
    new: tuple[Tensor, ...] = ()
    if centered:
        grad_avg = average(rest[0], g, alpha)
        second = torch.addcmul(square_avg, -grad_avg, grad_avg)
        new = (grad_avg,)
    update = g / (root(second) + eps)
    if momentum is not None:
        update = momentum * rest[-1] + update
        new = (*new, update)
    return p - lr * update, square_avg, *new


def rmsprop(
    lr: HyperValue = 1e-2,
    alpha: HyperValue = 0.99,
    eps: HyperValue = 1e-8,
    weight_decay: HyperValue = 0.0,
    momentum: HyperValue = 0.0,
    centered: bool = False,
    *,
    maximize: bool = False,
) -> Optimizer:
    r"""RMSprop; equal to ``torch.optim.RMSprop``.

    .. math::
        g_t &= \nabla f(p_{t-1}) + \text{weight\_decay} \cdot p_{t-1} \\
        \text{square\_avg}_t &= \alpha \, \text{square\_avg}_{t-1}
            + (1 - \alpha) \, g_t^2 \\
        \text{grad\_avg}_t &= \alpha \, \text{grad\_avg}_{t-1}
            + (1 - \alpha) \, g_t \\
        v_t &= \text{square\_avg}_t - \text{grad\_avg}_t^2 \text{ if centered else }
            \text{square\_avg}_t \\
        \text{buf}_t &= \text{momentum} \cdot \text{buf}_{t-1}
            + \frac{g_t}{\sqrt{v_t} + \text{eps}} \\
        p_t &= p_{t-1} - \text{lr} \cdot \text{buf}_t

    Args:
        lr: learning rate, ≥ 0.
        alpha: decay rate of the averages, ≥ 0.
        eps: added to the root, ≥ 0.
        weight_decay: factor of the L2 penalty, ≥ 0.
        momentum: ≥ 0. With the number 0 (for every group) there is no
            ``momentum_buffer``, and ``update`` takes no momentum.
        centered: divide by an estimate of the standard deviation.
        maximize: ascend.

    Returns:
        An `Optimizer`; state ``step, square_avg``, ``grad_avg`` if centered, and
        ``momentum_buffer`` if momentum is not 0, of each parameter's shape and dtype.

    Raises:
        HyperparameterError: a number out of its range.

    Note:
        Where the mean square is 0 the derivative of the root is taken as 0; see `adam`.
        Rounding can make the centered one negative: it then counts as 0, where torch
        gives NaN.

    Source:
        Tieleman, Hinton, "Lecture 6.5: RMSprop", 2012; centered: Graves, "Generating
        sequences with recurrent neural networks", 2013, with torch's place for eps.

    Example:
        >>> import torch, funcopt as fo
        >>> opt = fo.rmsprop(lr=0.1, alpha=0.9)
        >>> p = torch.tensor([1.0, -0.2])
        >>> state = opt.init(p)
        >>> for _ in range(5):
        ...     p, state = opt.update(2 * p, state, p)      # the gradient of p²
        >>> p
        tensor([0.1998, 0.0072])
    """
    slots = ["square_avg"]
    hyper = {
        "lr": Hyper(lr),
        "alpha": Hyper(alpha),
        "eps": Hyper(eps),
        "weight_decay": Hyper(weight_decay),
    }
    if centered:
        slots.append("grad_avg")
    if not zero_everywhere(momentum):
        slots.append("momentum_buffer")
        hyper["momentum"] = Hyper(momentum)
    return elementwise(
        partial(rule, centered=centered, maximize=maximize),
        name="rmsprop",
        slots=dict.fromkeys(slots, torch.zeros_like),
        hyper=hyper,
    )
