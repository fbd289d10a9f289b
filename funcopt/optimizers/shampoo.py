"""Shampoo: a gradient between inverse roots of the sums of its two products."""

from functools import partial
from typing import Any

import torch

from funcopt.errors import HyperparameterError
from funcopt.hyper import Hyper
from funcopt.optimizer import Optimizer, per_tensor
from funcopt.optimizers._matrices import inverse_root, renewed
from funcopt.optimizers._parts import Number, coupled_decay
from funcopt.types import HyperValue, Tensor


def rule(
    g: Tensor,
    p: Tensor,
    left: Tensor,
    right: Tensor,  # empty for a vector
    *roots: Tensor,  # of both, where they are not made anew at every step
    step: Any,
    lr: Number,
    weight_decay: Number,
    precondition_frequency: int,
    maximize: bool,
) -> tuple[Tensor, ...]:
    g = coupled_decay(-g if maximize else g, p, weight_decay)
    x = _as_matrix(g)
    left = left + x @ x.mT
    right = right + x.mT @ x if right.numel() else right
    power = 4 if p.ndim > 1 else 2
    held = roots or (None, None)
    roots = tuple(
        renewed(step, precondition_frequency, partial(inverse_root, sum_, power), root)
        if sum_.numel()
        else sum_
        for sum_, root in zip((left, right), held)
    )
    x = roots[0] @ x
    x = x @ roots[1] if p.ndim > 1 else x
    p = p - lr * x.reshape(p.shape)
    return p, left, right, *(roots if held[0] is not None else ())


def _as_matrix(x: Tensor) -> Tensor:
    """The first axis by the rest."""
    first = x.shape[0] if x.ndim else 1
    return x.reshape(first, x.numel() // max(first, 1))


def _left(p: Tensor, eps: float) -> Tensor:
    """In float32 at least: what is small beside a sum would be lost to it."""
    dtype = torch.promote_types(p.dtype, torch.float32)
    rows = p.shape[0] if p.ndim else 1
    return eps * torch.eye(rows, dtype=dtype, device=p.device)


def _right(p: Tensor, eps: float) -> Tensor:
    if p.ndim < 2:
        return p.new_zeros(0, dtype=torch.promote_types(p.dtype, torch.float32))
    return _left(_as_matrix(p).mT, eps)


def shampoo(
    lr: HyperValue = 0.1,
    eps: float = 1e-4,
    weight_decay: HyperValue = 0.0,
    precondition_frequency: int = 1,
    *,
    maximize: bool = False,
) -> Optimizer:
    r"""Shampoo.

    .. math::
        \text{left}_t &= \text{left}_{t-1} + g_t g_t^\top,
            \qquad \text{left}_0 = \text{eps} \cdot I \\
        \text{right}_t &= \text{right}_{t-1} + g_t^\top g_t,
            \qquad \text{right}_0 = \text{eps} \cdot I \\
        p_t &= p_{t-1} - \text{lr} \;
            \text{left}_t^{-1/4} \, g_t \, \text{right}_t^{-1/4}

    Args:
        lr: learning rate, ≥ 0.
        eps: what the sums start with, > 0.
        weight_decay: factor of the L2 penalty, ≥ 0.
        precondition_frequency: after how many steps the roots are made anew, ≥ 1.
        maximize: ascend.

    Returns:
        An `Optimizer`; state ``step, left, right``, and ``left_root, right_root`` where
        they are kept for more than a step: square matrices, in float32 where the
        parameter is half.

    Raises:
        HyperparameterError: a number out of its range.

    Note:
        A leaf of more than two axes is the matrix of its first by the others. A vector
        has one sum, ``left``, and its root of the power -1/2; the rest are empty. The
        derivative of the roots is that of an iteration of products, which is finite also
        where eigenvalues are equal; it costs many times what the roots do. The sums
        are as large as the squares of a leaf's sides: give vocabularies and the like to
        another optimizer, by `partition`.

    Source:
        Gupta, Koren, Singer, "Shampoo: preconditioned stochastic tensor optimization",
        2018, algorithm 1; the iteration: Iannazzo, "On the Newton method for the matrix
        pth root", 2006.

    Example:
        >>> import torch, funcopt as fo
        >>> opt = fo.shampoo(lr=0.5, eps=0.1)
        >>> p = torch.tensor([[1.0, -0.2]])
        >>> state = opt.init(p)
        >>> for _ in range(5):
        ...     p, state = opt.update(2 * p, state, p)      # the gradient of p²
        >>> p
        tensor([[ 0.0588, -0.0118]])
    """
    if not eps > 0 or precondition_frequency < 1:
        raise HyperparameterError(
            "shampoo takes eps > 0 and a precondition_frequency ≥ 1, got "
            f"{eps} and {precondition_frequency}"
        )
    slots = {"left": partial(_left, eps=eps), "right": partial(_right, eps=eps)}
    if precondition_frequency > 1:
        slots |= {"left_root": partial(_left, eps=1.0)}
        slots |= {"right_root": partial(_right, eps=1.0)}
    return per_tensor(
        partial(rule, precondition_frequency=precondition_frequency, maximize=maximize),
        name="shampoo",
        slots=slots,
        hyper={"lr": Hyper(lr), "weight_decay": Hyper(weight_decay)},
    )
