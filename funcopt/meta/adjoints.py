"""The adjoint of an inner loop, measured and clipped on the way back."""

import math
from typing import Any

import torch

from funcopt.derivatives import SmoothLeaves
from funcopt.errors import HyperparameterError, UnknownHyperparameterError
from funcopt.execution import levels
from funcopt.optimizer import Optimizer, check_optimizer
from funcopt.types import HyperValue, State, Tensor, Tree


def clip_adjoint(opt: Optimizer, max_norm: float = math.inf) -> Optimizer:
    r"""An optimizer whose steps limit the adjoint that goes back through them.

    Forward nothing changes. Backward, with :math:`\bar c` the cotangents of a step's
    parameters and state, all leaves together,

    .. math::
        \bar c \leftarrow \bar c \, \min(1, \tau / \lVert \bar c \rVert_2)

    and 0 where the norm is not finite. A clipped hypergradient is not exact, but it stays
    bounded where a long or chaotic inner loop makes the exact one explode.

    Args:
        opt: the inner optimizer.
        max_norm: τ > 0; infinite where the norms alone are wanted: then the adjoint is
            left as it is.

    Returns:
        An Optimizer with the state of ``opt`` and one hyperparameter more,
        ``adjoint_norm``. Its value has no effect. The gradient by it is
        :math:`\lVert \bar c \rVert_2` before clipping: give
        ``{"adjoint_norm": per_step(torch.zeros(steps))}`` as ``hyper`` of `unroll`, and
        the gradient by these zeros is the norm of the adjoint after each step.

    Raises:
        HyperparameterError: a number out of its range.
        UnknownHyperparameterError: ``opt`` has an ``adjoint_norm`` already.

    Source:
        Micaelli, Storkey, "Gradient-based hyperparameter optimization over long
        horizons", 2021 (clipped hypergradients); Pascanu, Mikolov, Bengio, "On the
        difficulty of training recurrent neural networks", 2013.

    Example:
        >>> import torch, funcopt as fo
        >>> opt = fo.meta.clip_adjoint(fo.sgd(lr=1.0), max_norm=8.0)
        >>> def outer(norms):                           # each step doubles: p - g = 2 p
        ...     run = fo.unroll(opt, lambda p, _: -0.5 * (p**2).sum(), torch.ones(1),
        ...                     steps=5, hyper={"adjoint_norm": fo.per_step(norms)})
        ...     return run.params.sum()
        >>> torch.func.grad(outer)(torch.zeros(5))
        tensor([16.,  8.,  4.,  2.,  1.])
    """
    check_optimizer(opt, "clip_adjoint")
    if not max_norm > 0:
        raise HyperparameterError(f"max_norm must be above 0, got {max_norm}")
    if "adjoint_norm" in opt.hyper:
        raise UnknownHyperparameterError(f"{opt.name} has its adjoints clipped already")

    def update(
        grads: Tree,
        state: State,
        params: Tree,
        *,
        adjoint_norm: HyperValue = 0.0,
        **given: Any,
    ) -> tuple[Tree, State]:
        params, state = opt.update(grads, state, params, **given)
        carry = {"params": params, "state": state}
        layout = SmoothLeaves(carry)
        values, others = layout.split(carry)
        probe = torch.as_tensor(adjoint_norm, dtype=torch.float64)
        guarded = layout.filled(_Guard.apply(max_norm, probe, *values), others)
        return guarded["params"], guarded["state"]

    hyper = {**opt.hyper, "adjoint_norm": 0.0}
    name = f"clip_adjoint({opt.name})"
    return Optimizer(opt.init, update, name, hyper, eval_params=opt.eval_params)


class _Guard(torch.autograd.Function):
    """The values as they are; on the way back their cotangents, clipped together.

    The probe has no part in the values: as its gradient goes back the norm that the
    cotangents had before.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(most: float, probe: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        return tuple(levels.of_each_task([x.view_as(x) for x in values], [probe]))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.most = inputs[0]

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
        squares = [c.abs().double().square().sum() for c in cotangents]
        norm_sq = torch.stack(squares).sum()
        norm = torch.where(norm_sq > 0, norm_sq, 1.0).sqrt() * (norm_sq > 0)
        if ctx.most == math.inf:
            return None, norm, *cotangents
        scale = torch.where(norm > ctx.most, ctx.most / norm, 1.0)
        seen = [
            torch.where(norm.isfinite(), c * scale.to(c.real.dtype), 0.0)
            for c in cotangents
        ]
        return None, norm, *seen

    @staticmethod
    def jvp(ctx: Any, _: None, probe: Any, *tangents: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.view_as(t) for t in tangents)
