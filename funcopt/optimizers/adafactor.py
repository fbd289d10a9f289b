"""Adafactor: Adam's second moment of a matrix from those of its rows and columns."""

from functools import partial
from typing import Any

import torch

from funcopt.hyper import Hyper
from funcopt.optimizer import Optimizer, per_tensor
from funcopt.optimizers._parts import (
    Number,
    decoupled_decay,
    known,
    larger,
    length,
    minus,
    spare,
    sqrt,
    towards,
    where,
)
from funcopt.types import HyperValue, Tensor


def rule(
    g: Tensor,
    p: Tensor,
    row_var: Tensor,  # empty for a vector,
    col_var: Tensor,
    variance: Tensor,  # and this one for a matrix
    *,
    step: Any,
    lr: Number,
    beta2_decay: Number,
    eps1: Number | None = None,
    eps2: Number,
    d: Number,
    weight_decay: Number,
    maximize: bool,
) -> tuple[Tensor, ...]:
    factored = variance.ndim < p.ndim
    axes = tuple(range((variance if factored else row_var).ndim - 1, p.ndim))
    over = spare(p, row_var, col_var, variance)
    g = -g if maximize else g
    limits = torch.finfo(p.dtype)
    least = limits.eps if eps1 is None else eps1
    rate = 1 / step**0.5
    alpha = larger(_root_mean_square(p, axes), eps2) * where(lr >= rate, rate, lr)
    weight = step**beta2_decay
    squares = g * g
    bound = larger(least**2, limits.tiny)
    if factored:
        row_var = towards(row_var, _mean(squares, -1), weight, **over(row_var))
        col_var = towards(col_var, _mean(squares, -2), weight, **over(col_var))
        share = row_var / _clamped(_mean(row_var, -2), least)
        # A root for each row and each column, not for each element; of nothing so small
        # that the derivative, a cube, is no number: there the bound is long reached.
        roots = [_inverse_root(x, limits.tiny ** (2 / 3)) for x in (share, col_var)]
        scale = torch.mul(*roots, **over(squares))
        scale = _clamped(scale, None, bound**-0.5, **over(scale))
    else:
        variance = towards(variance, squares, weight, **over(variance))
        scale = _inverse_root(variance, bound, **over(squares))
    u = torch.mul(scale, g, **over(scale))
    size = larger(_root_mean_square(u, axes) / d, 1.0)
    p = decoupled_decay(p, lr, weight_decay, **over(p))
    return minus(p, u, alpha / size, over), row_var, col_var, variance


def _inverse_root(x: Tensor, least: Number, **out: Any) -> Tensor:
    """1/√x, of ``least`` where x is less."""
    x = _clamped(x, least, **out)
    return torch.rsqrt(x, **out)


def _clamped(x: Tensor, least: Number, most: Number = None, **out: Any) -> Tensor:
    """Within bounds: `larger`, in a tenth of the time on many elements."""
    bounds = [b.to(x.dtype) if isinstance(b, Tensor) else b for b in (least, most)]
    return torch.clamp(x, *bounds, **out)


def _mean(x: Tensor, axis: int) -> Tensor:
    return x.sum(axis, keepdim=True) / max(x.shape[axis], 1)


def _root_mean_square(x: Tensor, axes: tuple[int, ...]) -> Number:
    """Of a leaf; of each of a stack, whose leaves have only these axes."""
    count = max(x.shape[axes[0] :].numel(), 1)
    if len(axes) < x.ndim:
        return length(x, axes) / count**0.5
    flat = x.reshape(-1)
    return sqrt(known(flat @ flat) / count)


def _row_var(p: Tensor) -> Tensor:
    return p.new_zeros((*p.shape[:-1], 1) if p.ndim > 1 else 0)


def _col_var(p: Tensor) -> Tensor:
    return p.new_zeros((*p.shape[:-2], 1, p.shape[-1]) if p.ndim > 1 else 0)


def _variance(p: Tensor) -> Tensor:
    return p.new_zeros(0) if p.ndim > 1 else torch.zeros_like(p)


def adafactor(
    lr: HyperValue = 1e-2,
    beta2_decay: HyperValue = -0.8,
    eps: tuple[HyperValue | None, HyperValue] = (None, 1e-3),
    d: HyperValue = 1.0,
    weight_decay: HyperValue = 0.0,
    *,
    maximize: bool = False,
) -> Optimizer:
    r"""Adafactor; equal to ``torch.optim.Adafactor``.

    .. math::
        \alpha_t &= \max(\epsilon_2, \text{RMS}(p_{t-1})) \min(\text{lr}, 1/\sqrt t),
            \qquad w_t = t^{\text{beta2\_decay}} \\
        \text{row\_var}_t &= (1 - w_t) \, \text{row\_var}_{t-1}
            + w_t \, \text{mean}_{columns} (g_t^2) \\
        \text{col\_var}_t &= (1 - w_t) \, \text{col\_var}_{t-1}
            + w_t \, \text{mean}_{rows} (g_t^2) \\
        u_t &= g_t \Big/ \sqrt{\max\Big(\epsilon_1^2, \frac{\text{row\_var}_t \,
            \text{col\_var}_t}{\max(\epsilon_1, \text{mean}(\text{row\_var}_t))}\Big)} \\
        p_t &= (1 - \text{lr} \cdot \text{weight\_decay}) \, p_{t-1}
            - \alpha_t \, u_t / \max(1, \text{RMS}(u_t) / d)

    Args:
        lr: the largest rate relative to the size of the parameter, ≥ 0.
        beta2_decay: power of the step at which the averages lengthen, ≤ 0.
        eps: :math:`\epsilon_1`, ≥ 0, the least root mean square of a gradient, None for
            the machine epsilon of the dtype that the leaf is worked on in (float32 where
            it is half); and :math:`\epsilon_2`, ≥ 0, the least size of a parameter.
        d: the size to which a move is clipped, ≥ 1.
        weight_decay: the share of ``lr`` by which a parameter shrinks, ≥ 0.
        maximize: ascend.

    Returns:
        An `Optimizer`; state ``step, row_var, col_var, variance``: the first two of a
        leaf of two and more axes, with 1 in place of the last axis and of the one before
        it; ``variance``, of the parameter's shape, of others, where it is the estimate.
        What a leaf has no use for is an empty tensor.

    Raises:
        HyperparameterError: a number out of its range.

    Note:
        Where a bound is reached, and at norms of 0, the derivative is that of the bound.

    Source:
        Shazeer, Stern, "Adafactor: adaptive learning rates with sublinear memory cost",
        2018, algorithms 4 and 5, without momentum.

    Example:
        >>> import torch, funcopt as fo
        >>> opt = fo.adafactor(lr=0.1)
        >>> p = torch.tensor([[1.0, -0.5]])
        >>> state = opt.init(p)
        >>> for _ in range(5):
        ...     p, state = opt.update(2 * p, state, p)      # the gradient of p²
        >>> p
        tensor([[ 0.6887, -0.2129]])
    """
    return per_tensor(
        partial(rule, maximize=maximize),
        name="adafactor",
        slots={"row_var": _row_var, "col_var": _col_var, "variance": _variance},
        hyper={
            "lr": Hyper(lr),
            "beta2_decay": Hyper(beta2_decay, low=float("-inf"), most=0.0, scalar=(0,)),
            "eps": Hyper(eps, parts=("eps1", "eps2"), optional=(0,)),
            "d": Hyper(d, low=1.0),
            "weight_decay": Hyper(weight_decay),
        },
        stacks=1 << 13,
    )
