"""Rprop: steps by the sign of the gradient, of a size that each weight finds itself."""

from functools import partial
from math import inf
from numbers import Real
from typing import Any

import torch

from funcopt import tree
from funcopt.errors import HyperparameterError
from funcopt.hyper import Hyper
from funcopt.optimizer import Optimizer, elementwise
from funcopt.optimizers._parts import Number, between, where
from funcopt.types import HyperValue, Tensor


def rule(
    g: Tensor,
    p: Tensor,
    prev: Tensor,
    step_size: Tensor,
    *,
    step: Any,
    lr: Number,
    etaminus: Number,
    etaplus: Number,
    step_size_min: Number,
    step_size_max: Number,
    maximize: bool,
) -> tuple[Tensor, ...]:
    g = -g if maximize else g
    agreement = g * prev
    size = step_size + where(step > 1, 0.0, lr)  # before the first step it is 0
    size = where(
        agreement > 0, size * etaplus, where(agreement < 0, size * etaminus, size)
    )
    size = between(size, step_size_min, step_size_max)
    g = where(agreement < 0, 0.0, g)  # no step, and nothing for the next to disagree with
    return p - torch.sign(g) * size, g, size


def rprop(
    lr: HyperValue = 1e-2,
    etas: tuple[HyperValue, HyperValue] = (0.5, 1.2),
    step_sizes: tuple[HyperValue, HyperValue] = (1e-6, 50),
    *,
    maximize: bool = False,
) -> Optimizer:
    r"""Resilient backpropagation; equal to ``torch.optim.Rprop``.

    .. math::
        g_t &= \nabla f(p_{t-1}), \text{ but } 0 \text{ where }
            \nabla f(p_{t-1}) \cdot \text{prev}_{t-1} < 0 \\
        \text{step\_size}_t &= \text{step\_size}_{t-1} \cdot \begin{cases}
            \text{etaplus} & \nabla f(p_{t-1}) \cdot \text{prev}_{t-1} > 0 \\
            \text{etaminus} & \nabla f(p_{t-1}) \cdot \text{prev}_{t-1} < 0 \\
            1 & \text{else} \end{cases}
            \text{, within step\_sizes} \\
        p_t &= p_{t-1} - \text{sign}(g_t) \cdot \text{step\_size}_t \\
        \text{prev}_t &= g_t

    Args:
        lr: the step size at the start, ≥ 0; read at a leaf's first step only.
        etas: factors of the step size, (etaminus, etaplus) with 0 < etaminus < 1 <
            etaplus.
        step_sizes: the least and the largest step size, each ≥ 0.
        maximize: ascend.

    Returns:
        An `Optimizer`; state ``step, prev, step_size``, of each parameter's shape and
        dtype.

    Raises:
        HyperparameterError: a number out of its range.

    Note:
        A step depends on the signs of gradients alone: its derivative with respect to
        them is 0. A meta-gradient reaches lr, etas, step_sizes and the parameters.

    Source:
        Riedmiller, Braun, "A direct adaptive method for faster backpropagation learning:
        the RPROP algorithm", 1993, without backtracking; as in torch.

    Example:
        >>> import torch, funcopt as fo
        >>> opt = fo.rprop(lr=0.1)
        >>> p = torch.tensor([1.0, -0.2])
        >>> state = opt.init(p)
        >>> for _ in range(5):
        ...     p, state = opt.update(2 * p, state, p)      # the gradient of p²
        >>> p
        tensor([ 0.2558, -0.0400])
    """
    opt = elementwise(
        partial(rule, maximize=maximize),
        name="rprop",
        slots=dict.fromkeys(("prev", "step_size"), torch.zeros_like),
        hyper={
            "lr": Hyper(lr),
            "etas": Hyper(etas, parts=("etaminus", "etaplus")),
            "step_sizes": Hyper(step_sizes, parts=("step_size_min", "step_size_max")),
        },
    )
    _check_etas(etas)
    return opt


def _check_etas(etas: Any) -> None:
    """Refuse a number that would let the wrong one of the two make steps longer."""
    for value, (low, high) in zip(etas, ((0.0, 1.0), (1.0, inf))):
        for eta in tree.leaves(value):
            if isinstance(eta, Real) and not low < float(eta) < high:
                raise HyperparameterError(
                    f"etas must be (etaminus, etaplus), 0 < etaminus < 1 < etaplus; got "
                    f"{etas!r}"
                )
