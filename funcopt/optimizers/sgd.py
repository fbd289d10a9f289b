"""SGD: stochastic gradient descent, with momentum."""

from functools import partial
from typing import Any

import torch

from funcopt.errors import HyperparameterError
from funcopt.hyper import Hyper
from funcopt.optimizer import Optimizer, from_spec
from funcopt.optimizers._parts import (
    Number,
    coupled_decay,
    is_zero,
    where,
    zero_everywhere,
)
from funcopt.spec import Spec
from funcopt.types import HyperValue, Tensor


def rule(
    g: Tensor,
    p: Tensor,
    *,
    step: Any,
    lr: Number,
    weight_decay: Number,
    maximize: bool,
) -> tuple[Tensor, ...]:
    del step  # plain descent does not count
    g = coupled_decay(-g if maximize else g, p, weight_decay)
    return (p - lr * g,)


def momentum_rule(
    g: Tensor,
    p: Tensor,
    buf: Tensor,
    *,
    step: Any,
    lr: Number,
    weight_decay: Number,
    momentum: Number,
    dampening: Number,
    nesterov: bool,
    maximize: bool,
) -> tuple[Tensor, ...]:
    g = coupled_decay(-g if maximize else g, p, weight_decay)
    # torch dampens neither a leaf's first step nor one without momentum.
    dampening = 0.0 if is_zero(momentum) else where(step > 1, dampening, 0.0)
    buf = momentum * buf + (1 - dampening) * g
    g = g + momentum * buf if nesterov else buf
    return p - lr * g, buf


def sgd(
    lr: HyperValue = 1e-3,
    momentum: HyperValue = 0.0,
    dampening: HyperValue = 0.0,
    weight_decay: HyperValue = 0.0,
    nesterov: bool = False,
    *,
    maximize: bool = False,
) -> Optimizer:
    r"""Stochastic gradient descent; equal to ``torch.optim.SGD``.

    .. math::
        g_t &= \nabla f(p_{t-1}) + \text{weight\_decay} \cdot p_{t-1} \\
        \text{buf}_t &= \text{momentum} \cdot \text{buf}_{t-1}
            + (1 - \text{dampening}) \cdot g_t, \qquad \text{buf}_1 = g_1 \\
        p_t &= p_{t-1} - \text{lr} \cdot
            (g_t + \text{momentum} \cdot \text{buf}_t \text{ if nesterov else }
            \text{buf}_t)

    Args:
        lr: learning rate, ≥ 0.
        momentum: ≥ 0. With the number 0 (for every group) there is no
            ``momentum_buffer``, and ``update`` takes no momentum or dampening.
        dampening: any number; a leaf's first step is not dampened.
        weight_decay: factor of the L2 penalty, ≥ 0.
        nesterov: look ahead along the momentum; needs momentum and no dampening.
        maximize: ascend.

    Returns:
        An `Optimizer`; state ``step``, and ``momentum_buffer`` if momentum is not 0, of
        each parameter's shape and dtype.

    Raises:
        HyperparameterError: a number out of its range, or nesterov without momentum.

    Source:
        Sutskever, Martens, Dahl, Hinton, "On the importance of initialization and
        momentum in deep learning", 2013; the first step is torch's.

    Example:
        >>> import torch, funcopt as fo
        >>> opt = fo.sgd(lr=0.1, momentum=0.9)
        >>> p = torch.tensor([1.0])
        >>> state = opt.init(p)
        >>> for _ in range(5):
        ...     p, state = opt.update(2 * p, state, p)      # the gradient of p²
        >>> p, state["momentum_buffer"]
        (tensor([-0.5804]), tensor([2.7182]))
    """
    common = {"lr": Hyper(lr), "weight_decay": Hyper(weight_decay)}
    if nesterov and (zero_everywhere(momentum) or not zero_everywhere(dampening)):
        raise HyperparameterError(
            f"nesterov needs momentum > 0 and dampening = 0, got momentum={momentum}, "
            f"dampening={dampening}"
        )
    if zero_everywhere(momentum):
        return from_spec(
            Spec(partial(rule, maximize=maximize), "sgd", {}, common, sparse="rows")
        )
    return from_spec(
        Spec(
            partial(momentum_rule, nesterov=nesterov, maximize=maximize),
            "sgd",
            {"momentum_buffer": torch.zeros_like},
            {
                **common,
                "momentum": Hyper(momentum),
                "dampening": Hyper(dampening, low=float("-inf")),
            },
            sparse="dense",
        )
    )
