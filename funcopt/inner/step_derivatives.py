"""``step = update ∘ grad``: its vjp and jvp, and those of the update alone."""

from collections.abc import Sequence
from typing import Any

from funcopt.derivatives import Pullback, Trees, jvp, vjp
from funcopt.inner.step import GradMode, Step, Stepped
from funcopt.optimizer import Optimizer, check_optimizer
from funcopt.types import HyperMapping, LossFunction, State, Tree


def step_vjp(
    opt: Optimizer,
    loss_fn: LossFunction,
    params: Tree,
    state: State,
    batch: Tree = None,
    *,
    hyper: HyperMapping | None = None,
    meta: Tree = None,
    buffers: Tree = None,
    has_aux: bool = False,
    grad_mode: GradMode = "reverse",
    wrt: Sequence[str] | None = None,
) -> tuple[Stepped, Pullback]:
    r"""One inner step, and what takes cotangents back through it.

    .. math::
        (\theta', s') = \text{update}(\nabla_\theta L(\theta, \eta, x), s, \theta; h),
        \qquad (a, b) \mapsto
        \left(a \frac{\partial \theta'}{\partial \cdot}
        + b \frac{\partial s'}{\partial \cdot}\right)
        \text{ for } \theta, s, x, h, \eta

    Args:
        opt: the inner optimizer.
        loss_fn: as in `unroll`.
        params: a tree of floating-point tensors, θ.
        state: the optimizer's state, s.
        batch: what the loss gets as its batch, x.
        hyper: hyperparameters of ``opt`` for this step, h. Give a tensor where a
            derivative is wanted: a float has none.
        meta: what the loss gets beside parameters and batch, η.
        buffers: as in `unroll`.
        has_aux: ``loss_fn`` returns ``(loss, aux)``.
        grad_mode: how the inner gradient is differentiated, as in `unroll`.
        wrt: which of ``params, state, batch, hyper, meta, buffers`` to give gradients
            of; None for all. Fewer cost less.

    Returns:
        ``(stepped, pullback)``. ``stepped`` has the fields ``params, state, loss, aux,
        buffers``; the loss is the one before the update. ``pullback(cotangents)`` takes
        a mapping from any of these names to trees, a missing name or a ``None`` leaf
        standing for zero, and gives a dict with a tree for each name of ``wrt``: of the
        input's structure, None where a leaf (a step count, a float) has no derivative.

    Raises:
        StructureError: cotangents that do not fit, a name that is none of these.
        Whatever `unroll` raises for the same arguments.

    Source:
        The adjoint of one step of Maclaurin, Duvenaud, Adams, "Gradient-based
        hyperparameter optimization through reversible learning", 2015.

    Example:
        >>> import torch, funcopt as fo
        >>> opt, p = fo.sgd(), torch.ones(1)
        >>> loss = lambda p, batch: 0.5 * (p**2).sum()
        >>> hyper = {"lr": torch.tensor(0.25)}
        >>> stepped, pullback = fo.meta.step_vjp(opt, loss, p, opt.init(p), hyper=hyper)
        >>> back = pullback({"params": torch.ones(1)})
        >>> back["params"], back["hyper"]                   # 1 - lr, -gradient
        (tensor([0.7500]), {'lr': tensor(-1.)})
    """
    step = Step(opt, loss_fn, has_aux, grad_mode)
    given = _inputs(params, state, batch, hyper, meta, buffers)
    out, pullback = vjp(lambda given: step(given)._asdict(), given, wrt)
    return Stepped(**out), pullback


def step_jvp(
    opt: Optimizer,
    loss_fn: LossFunction,
    params: Tree,
    state: State,
    batch: Tree = None,
    *,
    tangents: Trees,
    hyper: HyperMapping | None = None,
    meta: Tree = None,
    buffers: Tree = None,
    has_aux: bool = False,
) -> tuple[Stepped, dict[str, Tree]]:
    r"""One inner step, and its derivative along tangents of what it depends on.

    .. math::
        \dot\theta' = \frac{\partial \theta'}{\partial \theta} \dot\theta
        + \frac{\partial \theta'}{\partial s} \dot s
        + \frac{\partial \theta'}{\partial h} \dot h + \dots

    No graph is built: memory is that of one step, however many are made. For many
    tangents at once, vmap over ``tangents``.

    Args:
        opt: the inner optimizer.
        loss_fn: as in `unroll`.
        params: a tree of floating-point tensors.
        state: the optimizer's state.
        batch: what the loss gets as its batch.
        tangents: a mapping from any of ``params, state, batch, hyper, meta, buffers`` to
            trees of tangents; a missing name or a ``None`` leaf stands for zero.
        hyper: hyperparameters of ``opt`` for this step.
        meta: what the loss gets beside parameters and batch.
        buffers: as in `unroll`.
        has_aux: ``loss_fn`` returns ``(loss, aux)``.

    Returns:
        ``(stepped, tangents)``: as of `step_vjp`; and the tangents of ``params, state,
        loss, aux, buffers``, by these names, None where a leaf has none.

    Raises:
        StructureError: tangents that do not fit, a name that is none of these.
        ExecutionError: an operation of the loss has no forward derivative.
        Whatever `unroll` raises for the same arguments.

    Source:
        Franceschi, Donini, Frasconi, Pontil, "Forward and reverse gradient-based
        hyperparameter optimization", 2017, algorithm 2.

    Example:
        >>> import torch, funcopt as fo
        >>> opt, p = fo.sgd(), torch.ones(1)
        >>> loss = lambda p, batch: 0.5 * (p**2).sum()
        >>> stepped, along = fo.meta.step_jvp(
        ...     opt, loss, p, opt.init(p), hyper={"lr": torch.tensor(0.25)},
        ...     tangents={"hyper": {"lr": torch.tensor(1.0)}})
        >>> stepped.params, along["params"]
        (tensor([0.7500]), tensor([-1.]))
    """
    step = Step(opt, loss_fn, has_aux)
    given = _inputs(params, state, batch, hyper, meta, buffers)
    out, along = jvp(lambda given: step(given)._asdict(), given, tangents)
    return Stepped(**out), along


def update_vjp(
    opt: Optimizer,
    grads: Tree,
    state: State,
    params: Tree,
    *,
    hyper: HyperMapping | None = None,
    **more: Any,
) -> tuple[tuple[Tree, State], Pullback]:
    r"""``opt.update``, and what takes cotangents back through it.

    .. math::
        (\theta', s') = \text{update}(g, s, \theta; h), \qquad (a, b) \mapsto
        \left(a \frac{\partial \theta'}{\partial \cdot}
        + b \frac{\partial s'}{\partial \cdot}\right)
        \text{ for } g, s, \theta, h

    No model takes part: for most rules this is elementwise arithmetic.

    Args:
        opt: the optimizer.
        grads: as for ``opt.update``.
        state: as for ``opt.update``.
        params: as for ``opt.update``.
        hyper: hyperparameters for this step; tensors where derivatives are wanted.
        more: what else ``opt.update`` takes (``loss_fn`` for `lbfgs` and `sam`).

    Returns:
        ``((params, state), pullback)``. ``pullback(cotangents)`` takes a mapping from
        ``params`` and ``state`` to trees, a missing name or a ``None`` leaf standing for
        zero, and gives a dict with trees for ``grads, state, params, hyper``.

    Raises:
        StructureError: cotangents that do not fit.
        Whatever ``opt.update`` raises.

    Source:
        Stage (i) of mixed-mode differentiation: Kemaev, Calian, Zintgraf, Farquhar, van
        Hasselt, "Scalable meta-learning via mixed-mode differentiation", 2025.

    Example:
        >>> import torch, funcopt as fo
        >>> opt, p = fo.sgd(lr=0.25), torch.ones(1)
        >>> (new, state), pullback = fo.meta.update_vjp(opt, 2 * p, opt.init(p), p)
        >>> pullback({"params": torch.ones(1)})["grads"]
        tensor([-0.2500])
    """
    check_optimizer(opt, "update_vjp")

    def update(given: Trees) -> Trees:
        params, state = opt.update(
            given["grads"], given["state"], given["params"], **given["hyper"], **more
        )
        return {"params": params, "state": state}

    given = {"grads": grads, "state": state, "params": params, "hyper": dict(hyper or {})}
    out, pullback = vjp(update, given)
    return (out["params"], out["state"]), pullback


def _inputs(
    params: Tree,
    state: State,
    batch: Tree,
    hyper: HyperMapping | None,
    meta: Tree,
    buffers: Tree,
) -> dict[str, Tree]:
    return {
        "params": params,
        "state": state,
        "batch": batch,
        "hyper": dict(hyper or {}),
        "meta": meta,
        "buffers": buffers,
    }
