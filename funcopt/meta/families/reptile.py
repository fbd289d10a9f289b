"""Reptile: move to where the tasks' own training ends."""

from collections.abc import Callable
from typing import Any

import torch

from funcopt import tree
from funcopt.errors import StructureError
from funcopt.inner.unroll import Unrolled, unroll
from funcopt.meta.families.family import Family, itself, judged, pair, squared_distance
from funcopt.optimizer import Optimizer
from funcopt.types import LossFunction, Tensor, Tree


def reptile(
    loss_fn: LossFunction,
    inner: Optimizer,
    *,
    steps: int,
    batches: Callable[[Tree], Tree] | None = None,
    **options: Any,
) -> Family:
    r"""Move θ towards the end of each task's training; no meta-loss is differentiated.

    .. math::
        g = \theta - \theta_K, \qquad \text{the gradient of } \tfrac12
        \lVert \theta - \theta_K \rVert^2 \text{ with } \theta_K \text{ held fixed}

    That half square is what ``task_loss`` gives, so that `value_and_grad` and an outer
    optimizer serve as for every family; the paper's θ ← θ + ε(θ_K - θ) is
    ``fo.sgd(lr=ε)``. Training sees all of a task's data: there is no query loss.

    Args:
        loss_fn: as in `maml`.
        inner: as in `maml`; Adam with β₁ = 0 in the paper.
        steps: K ≥ 0.
        batches: from a task to a tree [K, ...] of its minibatches. By default each step
            takes all that the task holds, support and query joined along their first
            axes.
        options: as in `maml`. With ``has_aux`` aux is of the query after adaptation to
            the support alone, as in every family (which costs a second inner loop).

    Returns:
        A `Family`, as of `maml`.

    Raises:
        StructureError: by ``task_loss``, for a support and a query that cannot be joined.
        Whatever `maml` raises.

    Source:
        Nichol, Achiam, Schulman, "On first-order meta-learning algorithms", 2018.

    Example:
        >>> import torch, funcopt as fo
        >>> def loss(p, target):
        ...     return ((p - target) ** 2).mean()
        >>> family = fo.meta.reptile(loss, fo.sgd(lr=0.25), steps=1)
        >>> tasks = torch.tensor([[1.0], [3.0]]), torch.tensor([[1.0], [3.0]])
        >>> fo.meta.value_and_grad(family.task_loss)(torch.zeros(1), tasks)
        (tensor(0.6250), tensor([-1.]))
    """

    def adapt(theta: Tree, support: Tree, steps: int = steps) -> Unrolled:
        return unroll(inner, loss_fn, theta, support, steps=steps, **options)

    def task_loss(theta: Tree, task: Tree) -> Any:
        support, query = pair(task)
        start = tree.detach(theta)
        if batches is None:
            run = adapt(start, _joined(support, query))
        else:
            dealt = batches(task)
            run = unroll(inner, loss_fn, start, batches=dealt, steps=steps, **options)
        loss = squared_distance(theta, run.params) / 2
        if not options.get("has_aux"):
            return loss
        run = adapt(start, support)
        return loss, judged(loss_fn, run.params, query, run.buffers)[1]

    return Family(itself, adapt, task_loss, itself)


def _joined(support: Tree, query: Tree) -> Tree:
    """All the data of a task, along their first axes."""
    ours, structure = tree.flatten(support)
    theirs = tree.flatten_like(structure, query, "query", like="support")
    for i, (a, b) in enumerate(zip(ours, theirs)):
        if not _fit(a, b):
            raise StructureError(
                "reptile joins support and query along their first axes, but "
                f"'{tree.paths(structure)[i]}' is {_form(a)} in support and {_form(b)} "
                "in query; give batches=, a function from a task to its minibatches"
            )
    rows = [a if a is None else torch.cat([a, b]) for a, b in zip(ours, theirs)]
    return tree.unflatten(structure, rows)


def _fit(a: Any, b: Any) -> bool:
    """Whether both are rows of one kind, or missing."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return a is b is None
    return a.ndim == b.ndim > 0 and a.shape[1:] == b.shape[1:]


def _form(leaf: Any) -> str:
    """What it is, in words."""
    return str([*leaf.shape]) if isinstance(leaf, Tensor) else repr(leaf)
