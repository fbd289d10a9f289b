"""Muon: momentum of a matrix, orthogonalized."""

from functools import partial
from math import inf
from typing import Any

import torch

from funcopt.errors import HyperparameterError
from funcopt.hyper import Hyper
from funcopt.optimizer import Optimizer, per_tensor
from funcopt.optimizers._matrices import orthogonalized
from funcopt.optimizers._parts import (
    Number,
    average,
    decoupled_decay,
    minus,
    spare,
    towards,
)
from funcopt.types import HyperValue, Tensor


def rule(
    g: Tensor,
    p: Tensor,
    momentum_buffer: Tensor,
    *,
    step: Any,
    lr: Number,
    weight_decay: Number,
    momentum: Number,
    nesterov: bool,
    ns_coefficients: tuple[float, float, float],
    eps: float,
    ns_steps: int,
    adjust_lr_fn: str | None,
    maximize: bool,
    ns_dtype: torch.dtype | None,
) -> tuple[Tensor, ...]:
    del step  # an orthogonal step has no size to correct
    over = spare(p, momentum_buffer)
    g = -g if maximize else g
    momentum_buffer = average(momentum_buffer, g, momentum, **over(momentum_buffer))
    move = towards(g, momentum_buffer, momentum) if nesterov else momentum_buffer
    out = over(move) if nesterov else {}  # the buffer stays what it is
    how = ns_coefficients, ns_steps, eps, ns_dtype or move.dtype
    move = orthogonalized(move, *how, **out)
    rows, columns = p.shape[-2:]
    if adjust_lr_fn == "match_rms_adamw":
        ratio = 0.2 * max(rows, columns) ** 0.5
    else:
        ratio = max(1.0, rows / max(columns, 1)) ** 0.5
    p = decoupled_decay(p, lr, weight_decay, **over(p))
    return minus(p, move, lr * ratio, over), momentum_buffer


def muon(
    lr: HyperValue = 1e-3,
    weight_decay: HyperValue = 0.1,
    momentum: HyperValue = 0.95,
    nesterov: bool = True,
    ns_coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315),
    eps: float = 1e-7,
    ns_steps: int = 5,
    adjust_lr_fn: str | None = None,
    *,
    maximize: bool = False,
    ns_dtype: torch.dtype | None = torch.bfloat16,
) -> Optimizer:
    r"""Muon, momentum orthogonalized by Newton-Schulz; equal to ``torch.optim.Muon``.

    .. math::
        b_t &= \text{momentum} \cdot b_{t-1} + (1 - \text{momentum}) \, g_t \\
        X_0 &= u_t / \max(\|u_t\|, \text{eps}), \qquad
            u_t = \text{momentum} \cdot b_t + (1 - \text{momentum}) \, g_t \\
        X_k &= a X_{k-1} + (b \, A + c \, A^2) X_{k-1},
            \qquad A = X_{k-1} X_{k-1}^\top, \quad k = 1 \dots \text{ns\_steps} \\
        p_t &= (1 - \text{lr} \cdot \text{weight\_decay}) \, p_{t-1}
            - \text{lr} \, \sqrt{\max(1, \text{rows} / \text{columns})} \, X_k

    Args:
        lr: learning rate, ≥ 0.
        weight_decay: the share of ``lr`` by which a parameter shrinks, ≥ 0.
        momentum: decay rate of the average b, ≥ 0.
        nesterov: orthogonalize u; else :math:`b_t`.
        ns_coefficients: a, b and c, any numbers.
        eps: the least divisor, ≥ 0.
        ns_steps: how often to iterate, 0 to 99.
        adjust_lr_fn: "original" (also None), or "match_rms_adamw" for the factor
            :math:`0.2 \sqrt{\max(\text{rows}, \text{columns})}` in place of the root.
        maximize: ascend.
        ns_dtype: what the iteration runs in; None is the leaf's own dtype, or float32
            where that is half.

    Returns:
        An `Optimizer` of matrices; state ``step, momentum_buffer``, of each parameter's
        shape and dtype.

    Raises:
        HyperparameterError: a number out of its range, an ``adjust_lr_fn`` of no name.
        StructureError: by ``init``, a leaf that has not two axes. Give biases and the
            like to another optimizer by `partition`.

    Note:
        The iteration runs in bfloat16 whatever the leaf is, as in torch; its derivative
        is that of the same iteration in the leaf's dtype (under ``torch.compile``, of
        bfloat16's operations). Small leaves of one shape, and as many large ones as there
        are threads, are stacked and iterated at once, which may round bfloat16 otherwise
        than one after another (``execution="reference"``); and small products are made
        in float32 and rounded, which is what bfloat16's are, but for the order of a sum.

    Source:
        Jordan, Jin, Boza, You, Cesista, Newhouse, Bernstein, "Muon: an optimizer for
        hidden layers in neural networks", 2024; "match_rms_adamw": Liu and others, "Muon
        is scalable for LLM training", 2025.

    Example:
        >>> import torch, funcopt as fo
        >>> opt = fo.muon(lr=0.1)
        >>> p = torch.tensor([[1.0, -0.2]])
        >>> state = opt.init(p)
        >>> for _ in range(5):
        ...     p, state = opt.update(2 * p, state, p)      # the gradient of p²
        >>> p
        tensor([[ 0.6213, -0.1244]])
    """
    if adjust_lr_fn not in (None, "original", "match_rms_adamw"):
        raise HyperparameterError(
            f"adjust_lr_fn is 'original' or 'match_rms_adamw', not {adjust_lr_fn!r}"
        )
    if len(ns_coefficients) != 3 or not 0 <= ns_steps < 100 or not 0 <= eps < inf:
        raise HyperparameterError(
            "muon takes three ns_coefficients, ns_steps in [0, 100) and eps ≥ 0, got "
            f"{ns_coefficients}, {ns_steps} and {eps}"
        )
    return per_tensor(
        partial(
            rule,
            nesterov=nesterov,
            ns_coefficients=ns_coefficients,
            eps=eps,
            ns_steps=ns_steps,
            adjust_lr_fn=adjust_lr_fn,
            maximize=maximize,
            ns_dtype=ns_dtype,
        ),
        name="muon",
        slots={"momentum_buffer": torch.zeros_like},
        hyper={
            "lr": Hyper(lr),
            "weight_decay": Hyper(weight_decay),
            "momentum": Hyper(momentum),
        },
        matrices=True,
        stacks=1 << (22 if ns_dtype is torch.bfloat16 else 16),
    )
