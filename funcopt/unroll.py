"""Unroll: the inner loop of meta-learning, differentiable in everything it is given."""

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, Literal, NamedTuple, final

import torch

from funcopt import tree
from funcopt.errors import GradientLostError, HyperparameterError, StructureError
from funcopt.execution.levels import is_tracked
from funcopt.listed import Listed
from funcopt.optimizer import Optimizer
from funcopt.types import HyperMapping, LossFunction, State, Tensor, Tree


class Unrolled(NamedTuple):
    """What `unroll` gives: the end of the inner loop, and a record of the way."""

    params: Tree  #: parameters after the last step
    state: State  #: the optimizer's state after the last step
    losses: Tensor  #: [steps], each step's loss before its update
    aux: Tree  #: each step's auxiliary output, stacked along a leading [steps]
    buffers: Tree  #: buffers after the last step


@final
class PerStep:
    """A hyperparameter tree with a leading step axis; made by `per_step`."""

    __slots__ = ("values",)

    def __init__(self, values: Tree) -> None:
        self.values = values

    def __repr__(self) -> str:
        return f"per_step({self.values!r})"


def per_step(values: Tree) -> PerStep:
    """Mark a hyperparameter of `unroll` as one value for each step (LSLR).

    Args:
        values: a tensor, or a tree of tensors that is a prefix of params, each of shape
            [steps, ...]: entry k is the value in step k, 0-d or broadcasting to a leaf.

    Returns:
        The marked tree, for ``unroll(..., hyper={name: per_step(values)})``.

    Raises:
        StructureError: in `unroll`, when a leading axis is not the number of steps.

    Source:
        Antoniou, Edwards, Storkey, "How to train your MAML", 2019 (per-layer per-step
        learning rates).

    Example:
        >>> import torch, funcopt as fo
        >>> rates = torch.tensor([0.5, 0.25])
        >>> fo.unroll(fo.sgd(), lambda p, batch: p.sum(), torch.zeros(1), steps=2,
        ...           hyper={"lr": fo.per_step(rates)}).params
        tensor([-0.7500])
    """
    return PerStep(values)


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
    grad_mode: Literal["reverse", "first_order"] = "reverse",
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
        grad_mode: "reverse" is exact. "first_order" takes each gradient as a constant
            (FOMAML): cheap in memory, blind to everything that acts through the
            gradient; the losses then are values only.
        window: cut the graph after every ``window`` steps (truncation): gradients of
            ``params`` and ``state`` reach back to the last cut only. ``losses`` keep the
            graph of their own windows; for memory that does not grow, call `unroll` once
            per window and `detach` what it gives.
        has_aux: ``loss_fn`` returns ``(loss, aux)``; aux is a tree of tensors.

    Returns:
        `Unrolled`: ``params, state, losses [K], aux [K, ...], buffers``.

    Raises:
        StructureError: batch and batches both given, leading axes that differ from each
            other or from ``steps``, a loss that is not 0-d.
        HyperparameterError: ``steps``, ``window`` or ``grad_mode`` out of range.
        GradientLostError: in "first_order" mode, when the loss follows a gradient to
            ``meta``, to ``batch`` or to a closed-over tensor: it would be lost without a
            word. Give `detach` of it to say that this is meant.
        Whatever ``opt.update`` raises.

    Source:
        Maclaurin, Duvenaud, Adams, "Gradient-based hyperparameter optimization through
        reversible learning", 2015; Finn, Abbeel, Levine, "Model-agnostic meta-learning",
        2017 (also the first-order mode).

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
    steps = _number_of_steps(batch, batches, steps)
    if window is not None and not (isinstance(window, int) and window >= 1):
        raise HyperparameterError(f"window must be a whole number ≥ 1, got {window}")
    if grad_mode not in ("reverse", "first_order"):
        raise HyperparameterError(
            f"grad_mode is 'reverse' or 'first_order', not {grad_mode!r}"
        )
    hyper_at = _hyper_by_step(hyper or {}, steps)
    inner = _InnerLoss(loss_fn, meta, has_aux)
    state = opt.init(params) if state is None else state
    losses: list[Tensor] = []
    auxes: list[Tree] = []
    for k in range(steps):
        if window is not None and k % window == 0 and k:
            params, state, buffers = tree.detach((params, state, buffers))
        data = batch if batches is None else tree.map(itemgetter(k), batches)
        at = params if grad_mode == "reverse" else tree.detach(params)
        grads, (loss, aux, buffers) = inner.grad(at, data, buffers)
        if grad_mode == "first_order":
            _refuse_lost_gradients(grads)
        params, state = opt.update(grads, state, params, **hyper_at(k))
        losses.append(loss)
        auxes.append(aux)
    stacked = (
        torch.stack(losses) if losses else torch.zeros(0)
    )  # no loss: no dtype to follow
    aux = tree.map(lambda *rows: torch.stack(rows), *auxes) if auxes else None
    return Unrolled(params, state, stacked, aux, buffers)


class _InnerLoss:
    """The loss of one step as a pure function, and its gradient."""

    def __init__(self, loss_fn: LossFunction, meta: Tree, has_aux: bool) -> None:
        self.loss_fn = loss_fn
        self.extra = () if meta is None else (meta,)
        self.has_aux = has_aux

    def grad(self, params: Tree, batch: Tree, buffers: Tree) -> tuple[Tree, tuple]:
        """∇L, and beside it the loss, aux and the buffers after."""
        listed = Listed(lambda at: self._call(at, batch, buffers), params)
        grads, out = listed.grad(*listed.inputs)
        return listed.like_first(grads), listed.rebuild(out)

    def _call(
        self, params: Tree, batch: Tree, buffers: Tree
    ) -> tuple[Tensor, Tree, Tree]:
        keywords = {}
        if buffers is not None:
            # Adding a zero made of the data copies the buffers, and batches the copy in
            # every vmap that batches the data: batch norm writes into it in place.
            zero = _zero_of(tree.leaves((params, batch, self.extra)))
            buffers = tree.map(lambda b: b + zero.to(b.dtype), buffers)
            keywords["buffers"] = buffers
        out = self.loss_fn(params, batch, *self.extra, **keywords)
        if self.has_aux and not (isinstance(out, tuple) and len(out) == 2):
            raise StructureError(
                f"with has_aux=True loss_fn must return (loss, aux), got {_kind(out)}"
            )
        loss, aux = out if self.has_aux else (out, None)
        if not isinstance(loss, Tensor) or loss.ndim:
            raise StructureError(
                f"loss_fn must return a 0-d tensor, got {_kind(loss)}; take the mean, "
                "and set has_aux=True if it returns (loss, aux)"
            )
        return loss, aux, buffers


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return type(value).__name__


def _zero_of(leaves: Sequence[Any]) -> Tensor:
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    zero = torch.zeros((), device=tensors[0].device)
    for tensor in tensors:
        zero = zero + tensor.detach().new_zeros((), dtype=zero.dtype)
    return zero


def _number_of_steps(batch: Tree, batches: Tree, steps: int | None) -> int:
    if batches is None:
        if steps is None:
            raise StructureError("say how many steps: give steps=, or batches=")
        if steps < 0:
            raise HyperparameterError(f"steps must be at least 0, got {steps}")
        return steps
    if batch is not None:
        raise StructureError("give batch (every step's) or batches (one each), not both")
    length = tree.leading_axis(batches, "batches")
    if steps not in (None, length):
        raise StructureError(f"batches hold {length} steps, but steps={steps} was asked")
    return length


def _hyper_by_step(hyper: HyperMapping, steps: int) -> Callable[[int], dict[str, Any]]:
    """The hyperparameters as a function of the step, `per_step` values resolved."""
    for name, value in hyper.items():
        for marked in tree.leaves(value):
            if isinstance(marked, PerStep):
                length = tree.leading_axis(marked.values, f"per_step {name}")
                if length != steps:
                    raise StructureError(
                        f"hyper['{name}'] holds values for {length} steps, the loop "
                        f"makes {steps}"
                    )

    def at(k: int) -> dict[str, Any]:
        def entry(value: Any) -> Any:
            if isinstance(value, PerStep):
                return tree.map(itemgetter(k), value.values)
            return value

        return tree.map(entry, dict(hyper))

    return at


def _refuse_lost_gradients(grads: Tree) -> None:
    # The parameters were detached, so whatever the gradient still follows is elsewhere.
    if any(is_tracked(g) for g in tree.leaves(grads) if g is not None):
        raise GradientLostError(
            "the inner loss depends on meta, batch or a closed-over tensor that requires "
            "grad; grad_mode='first_order' would drop that gradient. Use "
            "grad_mode='reverse', or pass fo.detach(...) of it"
        )
