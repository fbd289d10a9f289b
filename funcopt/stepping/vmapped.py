"""Inside vmap: the steps of all tasks as one step, of leaves with the tasks in front.

To an elementwise rule a task's axis is one more axis of the leaf. So the vmap is left for
as long as a step takes, which then goes the way of any other: looked at once for all
tasks, and by the fast path of the one before.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from funcopt import tree
from funcopt.errors import FuncoptError
from funcopt.execution import concrete, levels
from funcopt.execution.batched import TaskAxis
from funcopt.execution.executor import PerTask
from funcopt.stepping.per_leaf import LeafValues
from funcopt.types import State, Tensor, Tree


def step(
    update: Callable[..., tuple[Tree, State]],
    grads: Sequence[Tensor | None],
    params: Sequence[Tensor | None],
    slots: Mapping[str, Sequence[Tensor | None]],
    vectors: Mapping[str, Tensor],
    structure: tree.Structure,
    values: LeafValues,
) -> tuple[Tree, State] | None:
    """One step of each task, by an ``update`` of lists of stacked leaves.

    ``vectors`` are what the state holds for all leaves at once. None where a task has
    numbers of its own there, or hyperparameters that are more than a number; or if
    something does not fit, which is to be said in the words of one task.
    """
    tasks = TaskAxis()
    given = [grads, params, *slots.values()]
    columns = [[x if x is None else tasks.off(x) for x in column] for column in given]
    with tasks.together():
        shared: dict[str, Any] = {
            name: _shared(*tasks.off(x)) for name, x in vectors.items()
        }
        if any(x is None for x in shared.values()):
            return None
        counts = shared["step"].tolist()
    hyper = values(structure, params, [count + 1 for count in counts])
    rows = {id(row): row for row in hyper}
    own = any(_is_own(tasks, x) for row in rows.values() for x in row.values())
    if not own and all(x is None or x[1] is None for column in columns for x in column):
        return None  # no task has anything of its own
    if own:
        if len(vectors) > 1:  # those would come to be each task's own
            return None
        with tasks.together():
            rows = {key: _per_task(tasks, row) for key, row in rows.items()}
        hyper = [rows[id(row)] for row in hyper]
        if None in hyper:
            return None
    with tasks.together():
        g, p, *held = [[_stacked(x, tasks.size, own) for x in c] for c in columns]
        state: State = {**shared, **dict(zip(slots, held))}
        try:
            p, state = update(g, state, p, lambda *_: hyper)
        except FuncoptError:
            return None
        batched = {
            name: state[name].expand(tasks.size, -1).clone()
            for name, x in vectors.items()
            if _is_own(tasks, x)
        }
    for name, x in batched.items():
        state[name] = tasks.on(x)
    new = [p, *(state[name] for name in slots)]
    p, *trees = [
        tree.unflatten(
            structure,
            [old if g is None else tasks.on(x) for g, old, x in zip(grads, was, column)],
        )
        for was, column in zip(given[1:], new)
    ]
    return p, state | dict(zip(slots, trees))


def _is_own(tasks: TaskAxis, x: Any) -> bool:
    return isinstance(x, Tensor) and tasks.off(x)[1] is not None


def _per_task(tasks: TaskAxis, row: Mapping[str, Any]) -> dict[str, Any] | None:
    """The row with vectors for the tasks' own numbers, if these can be read."""
    found: dict[str, Any] = {}
    for name, x in row.items():
        value, axis = tasks.off(x) if isinstance(x, Tensor) else (x, None)
        if axis is not None:
            if value.ndim > 1 or levels.is_tracked(value) or not concrete.readable(value):
                return None
            value = PerTask(value)
        found[name] = value
    return found


def _shared(vector: Tensor, axis: int | None) -> Tensor | None:
    """The vector of every task, if it is the same and can be read."""
    if levels.is_tracked(vector) or not concrete.readable(vector):
        return None
    if axis is None:
        return vector
    table = vector.movedim(axis, 0)
    return table[0] if torch.equal(table, table[:1].expand_as(table)) else None


def _stacked(
    each: tuple[Tensor, int | None] | None, size: int, own: bool
) -> Tensor | None:
    """With the tasks in front; as often as there are tasks, if they share it."""
    if each is None:
        return None
    x, axis = each
    x = x.expand(size, *x.shape) if axis is None else x.movedim(axis, 0) if axis else x
    # What has numbers of its own is to be one piece of memory.
    return x.contiguous() if own else x
