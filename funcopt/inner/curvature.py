"""Products of the inner loss's second derivatives with a vector, in one pass each."""

from collections.abc import Sequence
from contextlib import nullcontext

import torch

from funcopt import tree
from funcopt.derivatives import Trees, jvp, vjp
from funcopt.execution import levels
from funcopt.func.norms import exact_norms
from funcopt.inner.loss import InnerLoss
from funcopt.types import LossFunction, Tree


def hvp(
    loss_fn: LossFunction,
    params: Tree,
    vector: Tree,
    batch: Tree = None,
    *,
    meta: Tree = None,
    buffers: Tree = None,
    has_aux: bool = False,
) -> Tree:
    r"""The product of the inner loss's Hessian and a vector.

    .. math::
        \frac{\partial^2 L}{\partial \theta^2} v
        = \frac{d}{d\epsilon} \nabla_\theta L(\theta + \epsilon v) \Big|_{\epsilon = 0}

    One forward-over-reverse pass; no graph of second order is built.

    Args:
        loss_fn: as in `unroll`.
        params: a tree of floating-point tensors, θ.
        vector: a tree like params, v; a ``None`` leaf stands for zero.
        batch: what the loss gets as its batch.
        meta: what the loss gets beside parameters and batch.
        buffers: as in `unroll`.
        has_aux: ``loss_fn`` returns ``(loss, aux)``.

    Returns:
        A tree like params.

    Raises:
        StructureError: a vector that does not fit, a loss that is not 0-d.
        ExecutionError: an operation of the loss has no forward derivative.

    Source:
        Pearlmutter, "Fast exact multiplication by the Hessian", 1994.

    Example:
        >>> import torch, funcopt as fo
        >>> loss = lambda p, batch: (p**3).sum()
        >>> fo.meta.hvp(loss, torch.tensor([1.0, 2.0]), torch.tensor([1.0, 0.5]))
        tensor([6., 6.])
    """
    return mixed_vp(
        loss_fn,
        params,
        vector,
        batch,
        meta=meta,
        buffers=buffers,
        has_aux=has_aux,
        wrt=("params",),
    )["params"]


def mixed_vp(
    loss_fn: LossFunction,
    params: Tree,
    vector: Tree,
    batch: Tree = None,
    *,
    meta: Tree = None,
    buffers: Tree = None,
    has_aux: bool = False,
    wrt: Sequence[str] = ("batch", "meta", "buffers"),
) -> dict[str, Tree]:
    r"""A vector's product with the mixed second derivatives of the inner loss.

    .. math::
        v^\top \frac{\partial^2 L}{\partial \theta \, \partial \eta}
        = \frac{d}{d\epsilon} \nabla_\eta L(\theta + \epsilon v, \eta)
        \Big|_{\epsilon = 0}

    One forward-over-reverse pass; no graph of second order is built.

    Args:
        loss_fn: as in `unroll`.
        params: a tree of floating-point tensors, θ.
        vector: a tree like params, v; a ``None`` leaf stands for zero.
        batch: what the loss gets as its batch.
        meta: what the loss gets beside parameters and batch.
        buffers: as in `unroll`.
        has_aux: ``loss_fn`` returns ``(loss, aux)``.
        wrt: which of ``batch, meta, buffers`` are η (and ``params``, for the Hessian's
            product in the same pass).

    Returns:
        A dict with a tree for each name of ``wrt``, like the input; None where a leaf
        has no derivative.

    Raises:
        StructureError: a vector that does not fit, a name that is none of these.
        ExecutionError: an operation of the loss has no forward derivative.

    Source:
        Stage (ii) of mixed-mode differentiation: Kemaev, Calian, Zintgraf, Farquhar, van
        Hasselt, "Scalable meta-learning via mixed-mode differentiation", 2025.

    Example:
        >>> import torch, funcopt as fo
        >>> loss = lambda p, batch, meta: meta * (p**2).sum()
        >>> p, weight = torch.tensor([1.0, 2.0]), torch.tensor(3.0)
        >>> fo.meta.mixed_vp(loss, p, torch.ones(2), meta=weight)["meta"]
        tensor(6.)
    """
    loss = InnerLoss(loss_fn, has_aux)
    given = {"params": params, "batch": batch, "meta": meta, "buffers": buffers}

    def gradients(given: Trees) -> Trees:
        value, pullback = vjp(lambda at: {"loss": loss(**at)[0]}, given, wrt)
        return pullback({"loss": torch.ones_like(value["loss"])})

    # A third derivative of norm layers is one that torch has wrong.
    third = levels.derivative_outside(tree.leaves(given))
    with exact_norms() if third else nullcontext():
        return jvp(gradients, given, {"params": vector})[1]
