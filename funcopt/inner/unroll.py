"""Unroll: the inner loop of meta-learning, differentiable in everything it is given."""

from collections.abc import Mapping
from typing import Literal

from funcopt import tree
from funcopt.checks import check_count
from funcopt.errors import (
    HyperparameterError,
    HyperparameterTypeError,
    LeafError,
    StructureError,
)
from funcopt.inner import custom_vjp
from funcopt.inner.loop import Loop, Unrolled, is_absent
from funcopt.inner.per_step import HyperBySteps
from funcopt.inner.remat import rematerialized
from funcopt.inner.step import GradMode, Step
from funcopt.optimizer import Optimizer
from funcopt.types import HyperMapping, LossFunction, State, Tensor, Tree


def unroll(
    opt: Optimizer,
    loss_fn: LossFunction,
    params: Tree,
    batch: Tree = None,
    *,
    steps: int | None = None,
    batches: Tree = None,
    state: State | None = None,
    hyper: HyperMapping | None = None,
    meta: Tree = None,
    buffers: Tree = None,
    grad_mode: GradMode = "reverse",
    remat: Literal["step", "sqrt"] | int | None = None,
    window: int | None = None,
    has_aux: bool = False,
) -> Unrolled:
    r"""Make K steps of ``opt`` on ``loss_fn``, differentiable from end to start.

    .. math::
        (\theta_{k+1}, s_{k+1}) = \text{update}\big(
            \nabla_\theta L(\theta_k, \text{batch}_k, \text{meta}),\; s_k,\; \theta_k;\;
            \text{hyper}_k\big), \qquad k = 0 \dots K-1

    Nothing is changed in place. Differentiate what comes out by ``torch.func`` or by
    autograd, with respect to ``params``, ``state``, ``batch``, ``hyper`` and ``meta``.

    Args:
        opt: the inner optimizer.
        loss_fn: called as ``loss_fn(params, batch)``; with ``meta`` as a third argument
            where ``meta`` is given, and with the keyword ``buffers`` where buffers are.
            Returns a 0-d loss, or ``(loss, aux)`` with ``has_aux``.
        params: a tree of floating-point tensors, θ₀.
        batch: a tree that every step uses; needs ``steps``.
        steps: how many, K ≥ 0.
        batches: a tree of tensors [K, ...], entry k for step k. Not with ``batch``.
        state: where the optimizer starts; by default ``opt.init(params)``.
        hyper: hyperparameters of ``opt`` for these steps, as for ``opt.update``; a value
            marked by `per_step` holds one entry for each step.
        meta: a tree that the loss needs beside the parameters (loss weights, a learned
            loss, frozen features), so that its gradient is an explicit one.
        buffers: a tree of tensors, such as batch-norm statistics. Each step gets a copy,
            batched by vmap where params, batch or meta are; what ``loss_fn`` writes into
            the copy in place is carried to the next step. Yours do not change.
        grad_mode: how the inner gradient is differentiated. "reverse": by the graph of
            its backward pass, which is kept for every step. "mixed": when it is
            needed, from what it was made from; only parameters, state and gradient are
            kept, and the answer is the same. On accelerators by one forward-over-reverse
            pass, for which the inner loss needs forward derivatives; on a CPU the
            gradient is made again and its graph gone back through, which is faster there
            and as lean. Of attention use the MATH backend. "first_order" takes each
            gradient as a constant (FOMAML): cheap in memory, blind to everything that
            acts through the gradient; the losses then are values only.
        remat: what of the loop is kept for the way back, and what is made again. None
            keeps all steps. "step" keeps each step's parameters and state, and makes
            its graph again: one more forward pass. A number n keeps those of every
            n-th step, and goes over each n steps once more before that; "sqrt" is
            n = √K. The answer is the same to the bit where the same executor makes the
            steps, under ``grad`` of ``vmap`` to rounding. The peak is 2√K states and one
            step's graph. Random numbers of torch's own generators are drawn again as
            they were; any other source of them is found out by the steps' losses, and
            raises.
        window: cut the graph after every ``window`` steps (truncation): gradients of
            ``params`` and ``state`` reach back to the last cut only. ``losses`` keep the
            graph of their own windows; for memory that does not grow, call `unroll` once
            per window and `detach` what it gives.
        has_aux: ``loss_fn`` returns ``(loss, aux)``; aux is a tree of tensors.

    Returns:
        `Unrolled`: ``params, state, losses [K], aux [K, ...], buffers``; the last two
        are ``()`` where there are none, for ``torch.func`` takes no None from a function.

    Raises:
        StructureError: batch and batches both given, leading axes that differ from each
            other or from ``steps``, a loss that is not 0-d.
        HyperparameterError: ``steps``, ``window``, ``grad_mode`` or ``remat`` out of
            range.
        HyperparameterTypeError: a ``loss_fn`` that is no function, a ``hyper`` that is no
            mapping.
        LeafError: a buffer that is no tensor.
        GradientLostError: in "first_order" mode, when the loss follows a gradient to
            ``meta``, to ``batch`` or to a closed-over tensor: it would be lost without a
            word. In "mixed" mode and with ``remat``, when the loss closes over what
            a gradient is asked of: pass it as ``meta`` or ``batch``. Give `detach` of
            it to say that this is meant.
        ExecutionError: on the way back, in "mixed" mode, when the loss's gradient has
            no derivative; there and with ``remat``, when a step made again is not what
            it was.
        Whatever ``opt.update`` raises.

    Source:
        Maclaurin, Duvenaud, Adams, "Gradient-based hyperparameter optimization through
        reversible learning", 2015; Finn, Abbeel, Levine, "Model-agnostic meta-learning",
        2017 (also the first-order mode); Kemaev, Calian, Zintgraf, Farquhar,
        van Hasselt, "Scalable meta-learning via mixed-mode differentiation", 2025
        ("mixed"); Chen, Xu, Zhang, Guestrin, "Training deep nets with sublinear memory
        cost", 2016 (``remat``).

    Example:
        >>> import torch, funcopt as fo
        >>> def quadratic(p, target):
        ...     return 0.5 * ((p - target) ** 2).sum()
        >>> def outer(lr):                              # p₂ = 1 - (1 - lr)²
        ...     run = fo.unroll(fo.sgd(), quadratic, torch.zeros(1), torch.ones(1),
        ...                     steps=2, hyper={"lr": lr})
        ...     return run.params.sum()
        >>> torch.func.grad(outer)(torch.tensor(0.25))           # 2 (1 - lr)
        tensor(1.5000)
    """
    steps = number_of_steps(batch, batches, steps)
    buffers = None if is_absent(buffers) else buffers  # () as of an earlier run
    if not all(x is None or isinstance(x, Tensor) for x in tree.leaves(buffers)):
        raise LeafError(
            "buffers is a tree of tensors, as dict(module.named_buffers()), not "
            f"this {type(buffers).__name__}"
        )
    if window is not None:
        check_count("window", window)
    if hyper is not None and not isinstance(hyper, Mapping):
        raise HyperparameterTypeError(
            f"hyper is a dict of names and values, as {{'lr': 0.1}}, not {hyper!r}"
        )
    loop = Loop(
        Step(opt, loss_fn, has_aux, grad_mode),
        steps,
        HyperBySteps(hyper or {}, steps),
        batches is not None,
        window,
    )
    state = opt.init(params) if state is None else state
    carry = {"params": params, "state": state, "buffers": buffers}
    data = batch if batches is None else batches
    shared = {"batch": data, "hyper": loop.hyper.values, "meta": meta}
    segment = _segment(remat, steps, grad_mode)
    if segment and steps and custom_vjp.is_possible():
        run = rematerialized(loop, carry, shared, segment)
    else:
        run = loop.run(carry, shared)
    absent = {name: () for name in ("aux", "buffers") if is_absent(getattr(run, name))}
    return run._replace(**absent)


def _segment(remat: str | int | None, steps: int, grad_mode: str) -> int:
    """How many steps are made again at a time; 0 where none are."""
    if remat is None:
        return 0
    if remat not in ("step", "sqrt") and not (type(remat) is int and remat >= 1):
        raise HyperparameterError(
            f"remat is None, 'step', 'sqrt' or a whole number ≥ 1 of steps, not {remat!r}"
        )
    if grad_mode == "first_order":
        raise HyperparameterError(
            "remat spares the graph of the inner gradients, and grad_mode='first_order' "
            "has none; leave out remat"
        )
    if isinstance(remat, int):
        return remat
    return 1 if remat == "step" else max(1, round(steps**0.5))


def number_of_steps(batch: Tree, batches: Tree, steps: int | None) -> int:
    """How many there are, by ``steps`` and ``batches``; raises where they disagree."""
    if batches is None:
        if steps is None:
            raise StructureError("say how many steps: give steps=, or batches=")
        check_count("steps", steps, least=0)
        return steps
    if batch is not None:
        raise StructureError("give batch (every step's) or batches (one each), not both")
    length = tree.leading_axis(batches, "batches")
    if steps not in (None, length):
        raise StructureError(f"batches hold {length} steps, but steps={steps} was asked")
    return length
