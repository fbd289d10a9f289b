"""iMAML: adapt near θ for as long as it takes, and differentiate the minimum alone."""

from typing import Any

import torch

from funcopt import tree
from funcopt.errors import GradientLostError, HyperparameterError
from funcopt.inner.loss import loss_and_aux
from funcopt.inner.unroll import Unrolled, unroll
from funcopt.meta.dependence import moving_leaves
from funcopt.meta.families.family import Family, itself, judged, pair, squared_distance
from funcopt.meta.implicit import implicit
from funcopt.meta.problem import Problem, go_on
from funcopt.optimizer import Optimizer
from funcopt.types import LossFunction, Tensor, Tree


def imaml(
    loss_fn: LossFunction,
    inner: Optimizer,
    *,
    steps: int,
    strength: float = 2.0,
    iterations: int = 5,
    damping: float = 0.0,
    buffers: Tree = None,
    has_aux: bool = False,
) -> Family:
    r"""Adapt close to θ, and take the gradient by implicit differentiation.

    .. math::
        \phi^* = \arg\min_\phi L(\phi, \text{support}) + \tfrac\lambda2
        \lVert \phi - \theta \rVert^2, \qquad
        \nabla_\theta V = \big(I + \tfrac1\lambda \nabla^2 L(\phi^*,
        \text{support})\big)^{-1} \nabla L(\phi^*, \text{query})

    The way to the minimum does not matter: memory is that of one gradient in any number
    of steps, by any optimizer. Exact at the minimum, when conjugate gradients have
    converged. A leaf that ``inner`` leaves alone (`freeze`) is φ's as it is θ's.

    Args:
        loss_fn: as in `maml`; twice differentiable, as `implicit` needs it.
        inner: as in `maml`.
        steps: K ≥ 1, enough to come near the minimum; 16 in the paper.
        strength: λ > 0, of the proximal term; 2 in the paper.
        iterations: of conjugate gradients, ≥ 1; 5 in the paper.
        damping: added to the curvature, ≥ 0: for an adaptation that ends where the
            curvature is not positive.
        buffers: as in `maml`; those at the end of the adaptation count as constants.
        has_aux: as in `maml`.

    Returns:
        A `Family`, as of `maml`.

    Raises:
        GradientLostError: when a second derivative of ``task_loss`` is asked for: there
            are first ones only.
        HyperparameterError: a ``strength`` that is not positive; by ``task_loss``, what
            `implicit` refuses.
        Whatever `maml` raises.

    Source:
        Rajeswaran, Finn, Kakade, Levine, "Meta-learning with implicit gradients", 2019.

    Example:
        >>> import torch, funcopt as fo
        >>> def loss(p, target):                     # φ* = (θ + target) / 2, with λ = 1
        ...     return 0.5 * ((p - target) ** 2).sum()
        >>> family = fo.meta.imaml(loss, fo.sgd(lr=0.5), steps=1, strength=1.0)
        >>> tasks = torch.tensor([[1.0], [3.0]]), torch.tensor([[1.0], [3.0]])
        >>> fo.meta.value_and_grad(family.task_loss)(torch.zeros(1), tasks)
        (tensor(0.6250), tensor([-0.5000]))
    """
    if not strength > 0:
        raise HyperparameterError(f"strength must be positive, got {strength}")

    def near(params: Tree, batch: Tree, theta: Tree, **more: Tree) -> Any:
        loss, aux = loss_and_aux(loss_fn(params, batch, **more), has_aux, "loss_fn")
        pull = strength / 2 * squared_distance(params, theta)
        return (loss + pull, aux) if has_aux else loss + pull

    def adapt(theta: Tree, support: Tree, steps: int = steps) -> Unrolled:
        how: Any = {"steps": steps, "buffers": buffers, "has_aux": has_aux}
        return unroll(inner, near, theta, support, meta=theta, **how)

    def only_loss(out: Any) -> Tensor:
        return out[0] if has_aux else out

    def task_loss(theta: Tree, task: Tree) -> Any:
        support, query = pair(task)
        start = tree.detach(theta)

        def at(params: Tree, theta: Tree) -> Tree:
            """A leaf that stays where it starts is θ's, and is no unknown."""
            return tree.map(lambda p, q, m: p if m else q, params, theta, moving)

        def inner_loss(params: Tree, batch: Tree, theta: Tree, **more: Tree) -> Tensor:
            return only_loss(near(at(params, theta), batch, theta, **more))

        def outer_loss(params: Tree, batch: Tree, theta: Tree, **more: Tree) -> Tensor:
            return only_loss(loss_fn(at(params, theta), batch, **more))

        data: Any = {"batch": support, "outer_batch": query, "buffers": buffers}
        problem = Problem(inner, inner_loss, outer_loss, steps, start, **data)
        eta = {"meta": start}
        moving = moving_leaves(problem, eta, go_on(problem, eta, None))
        found = implicit(problem, eta, iterations=iterations, damping=damping)
        # The value, and a slope of zero height: its gradient by θ is what was found.
        slopes = tree.map(
            lambda p, at, g: ((_FirstOnly.apply(p) - at) * g).sum(),
            theta,
            start,
            found.grads["meta"],
        )
        value = found.value + sum(tree.present(slopes))
        if not has_aux:
            return value
        end = found.carry
        return value, judged(loss_fn, end["params"], query, end["buffers"])[1]

    return Family(itself, adapt, task_loss, itself)


class _FirstOnly(torch.autograd.Function):
    """A tensor as it is, of which no second derivative may be asked for."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        return _Constant.apply(cotangent, *ctx.saved_tensors)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Any:
        return _Constant.apply(tangent, *ctx.saved_tensors)


class _Constant(torch.autograd.Function):
    """A derivative that is not a function of the tensor it was taken by."""

    generate_vmap_rule = True

    @staticmethod
    def forward(derivative: Tensor, by: Tensor) -> Tensor:
        return derivative.view_as(derivative)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        raise GradientLostError(_NO_SECOND)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise GradientLostError(_NO_SECOND)


_NO_SECOND = (
    "imaml gives first derivatives only, and a second one was asked for: implicit "
    "differentiation keeps no graph. Use maml, or grads without a graph (detach)"
)
