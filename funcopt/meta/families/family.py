"""What the families of meta-learning have in common: a start, an inner loop, a loss."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from funcopt import select, tree
from funcopt.errors import HyperparameterTypeError, StructureError
from funcopt.inner.loop import is_absent
from funcopt.inner.loss import called
from funcopt.inner.unroll import Unrolled
from funcopt.types import LossFunction, Tensor, Tree

Adapt = Callable[..., Unrolled]


class Family(NamedTuple):
    """What is learned across tasks (θ), and how a task is learned from it."""

    init: Callable[[Tree], Tree]  #: a network's fresh parameters → θ
    adapt: Adapt  #: ``(theta, support, steps=K)`` → `Unrolled`, differentiable
    task_loss: Callable[..., Any]  #: ``(theta, (support, query))`` → what θ is judged by
    params: Callable[[Tree], Tree]  #: θ → the parameters of the unadapted network


def itself(params: Tree) -> Tree:
    """θ is the network's parameters, where nothing else is learned."""
    return params


def learned(
    adapt: Adapt,
    loss_fn: LossFunction,
    init: Callable[[Tree], Tree] = itself,
    params: Callable[[Tree], Tree] = itself,
) -> Family:
    """The family whose meta-loss is the query loss after adaptation to the support."""

    def task_loss(theta: Tree, task: Tree) -> Any:
        support, query = pair(task)
        run = adapt(theta, support)
        return judged(loss_fn, run.params, query, run.buffers)

    return Family(init, adapt, task_loss, params)


def judged(loss_fn: LossFunction, params: Tree, query: Tree, buffers: Tree) -> Any:
    """The loss, or (loss, aux), of what was learned on data of its own."""
    buffers = None if is_absent(buffers) else buffers
    return called(loss_fn, params, query, None, buffers)[0]


def pair(task: Tree) -> tuple[Tree, Tree]:
    """A task's support and query set."""
    if isinstance(task, Mapping) and task.keys() == {"support", "query"}:
        return task["support"], task["query"]
    if isinstance(task, tuple | list) and len(task) == 2:
        return task[0], task[1]
    raise StructureError(
        "a task is a pair (support, query), or a dict with these two keys, not "
        f"{list(task) if isinstance(task, Mapping) else type(task).__name__}"
    )


def split(params: Tree, part: str) -> tuple[Tree, Tree]:
    """The leaves whose path the glob fits, and the others; ``None`` for what is not."""
    if not isinstance(part, str):
        raise HyperparameterTypeError(f"adapted is a glob, as 'head*', not {part!r}")
    leaves, structure = tree.flatten(params)
    chosen = select.by_name({part: True}, default=False)
    inside = select.per_leaf(chosen, structure, "adapted")
    one, other = (
        tree.unflatten(
            structure, [x if i is which else None for x, i in zip(leaves, inside)]
        )
        for which in (True, False)
    )
    return one, other


def merged(one: Tree, other: Tree) -> Tree:
    """The two parts of a `split` as one tree again."""
    leaves, structure = tree.flatten(one)
    rest = tree.flatten_like(structure, other, "other")
    return tree.unflatten(
        structure, [y if x is None else x for x, y in zip(leaves, rest)]
    )


def squared_distance(one: Tree, other: Tree) -> Tensor:
    """‖one - other‖², over all leaves."""
    squares = tree.map(lambda x, y: (x - y).square().sum(), one, other)
    return torch.stack(tree.present(squares)).sum()
