"""LARS: momentum whose step has a length in proportion to the parameter's."""

from functools import partial
from typing import Any

import torch

from funcopt.hyper import Hyper
from funcopt.optimizer import Optimizer, per_tensor
from funcopt.optimizers._parts import Number, coupled_decay, norm, where
from funcopt.types import HyperValue, Tensor


def rule(
    g: Tensor,
    p: Tensor,
    momentum_buffer: Tensor,
    *,
    step: Any,
    lr: Number,
    momentum: Number,
    weight_decay: Number,
    trust_coefficient: Number,
    maximize: bool,
    nesterov: bool,
) -> tuple[Tensor, ...]:
    del step  # the rate is in the buffer, which starts at 0
    g = -g if maximize else g
    (length, of_p), (own, of_g) = norm(p), norm(g)
    trust = of_p & of_g
    # g is divided, and not the length: (length / own) / own would leave the range.
    move = coupled_decay(g, p, weight_decay) / where(
        trust, own + weight_decay * length, 1.0
    )
    move = lr * where(trust, trust_coefficient * length, 1.0) * move
    momentum_buffer = momentum * momentum_buffer + move
    move = momentum * momentum_buffer + move if nesterov else momentum_buffer
    return p - move, momentum_buffer


def lars(
    lr: HyperValue = 1.0,
    momentum: HyperValue = 0.9,
    weight_decay: HyperValue = 0.0,
    trust_coefficient: HyperValue = 1e-3,
    *,
    nesterov: bool = False,
    maximize: bool = False,
) -> Optimizer:
    r"""LARS, layerwise adaptive rate scaling.

    .. math::
        \lambda_t &= \text{trust\_coefficient} \,
            \frac{\|p_{t-1}\|}{\|g_t\| + \text{weight\_decay} \, \|p_{t-1}\|} \\
        b_t &= \text{momentum} \cdot b_{t-1}
            + \text{lr} \, \lambda_t \, (g_t + \text{weight\_decay} \cdot p_{t-1}) \\
        p_t &= p_{t-1} - b_t

    Args:
        lr: the rate of all leaves, ≥ 0.
        momentum: factor of the buffer b, ≥ 0.
        weight_decay: factor of the L2 penalty, ≥ 0.
        trust_coefficient: the length of a step at ``lr`` 1, as a share of the
            parameter's, ≥ 0.
        nesterov: step by ``momentum`` · b plus the newest move, as in `sgd`.
        maximize: ascend.

    Returns:
        An `Optimizer`; state ``step, momentum_buffer``, of each parameter's shape and
        dtype.

    Raises:
        HyperparameterError: a number out of its range.

    Note:
        The rate is in the buffer: a change of ``lr`` acts on the moves to come. A norm is
        that of one leaf. Where ``p`` or ``g`` is 0, so that they have no ratio,
        :math:`\lambda` is 1. Biases and normalization layers are mostly left to `sgd`, by
        `partition`.

    Source:
        You, Gitman, Ginsburg, "Large batch training of convolutional networks", 2017,
        algorithm 1.

    Example:
        >>> import torch, funcopt as fo
        >>> opt = fo.lars(trust_coefficient=0.05)
        >>> p = torch.tensor([1.0, -0.2])
        >>> state = opt.init(p)
        >>> for _ in range(5):
        ...     p, state = opt.update(2 * p, state, p)      # the gradient of p²
        >>> p
        tensor([ 0.4172, -0.0834])
    """
    return per_tensor(
        partial(rule, maximize=maximize, nesterov=nesterov),
        name="lars",
        slots={"momentum_buffer": torch.zeros_like},
        hyper={
            "lr": Hyper(lr),
            "momentum": Hyper(momentum),
            "weight_decay": Hyper(weight_decay),
            "trust_coefficient": Hyper(trust_coefficient),
        },
        norms=True,
    )
