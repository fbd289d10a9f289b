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
from funcopt.stepping.step_cache import StepCache
from funcopt.types import State, Tensor, Tree


def again(
    cache: StepCache, grads: Tree, state: State, params: Tree, values: LeafValues
) -> tuple[tree.Structure, Sequence[Any], Tensor] | None:
    """What `step` does, of trees whose tensors are like those of an earlier one.

    The structure, columns and steps; None where nothing is known of such trees, where
    leaves rest or have numbers in the state, or within another transform.
    """
    found = cache.find(grads, state, params)
    if found is None or not found[0].is_plain or levels.depth() > 1:
        return None
    entry, given = found
    tasks = TaskAxis()
    *pairs, steps = map(tasks.off, given)
    with tasks.together():
        shared = _shared(*steps)
        if shared is None:
            return None
        counts = shared.tolist()
    leaves = given[entry.count : 2 * entry.count]
    hyper = _hyper(tasks, values, entry.structure, leaves, counts)
    if hyper is None:
        return None
    own = _are_own(hyper)
    if not own and all(axis is None for _, axis in pairs):
        return None
    with tasks.together():
        stacked = [_stacked(x, tasks.size, own) for x in pairs]
        done = cache.run(entry, [*stacked, shared], lambda *_: hyper, donate=False)
        if done is None:
            return None
        structure, columns, new = done
        new = new if steps[1] is None else _each(new, tasks)
    columns = [[*map(tasks.on, column)] for column in columns]
    return structure, columns, new if steps[1] is None else tasks.on(new)


def step(
    update: Callable[..., tuple[Tree, State]],
    grads: Sequence[Tensor | None],
    params: Sequence[Tensor | None],
    slots: Mapping[str, Sequence[Tensor | None]],
    vectors: Mapping[str, Tensor],
    structure: tree.Structure,
    values: LeafValues,
) -> tuple[Tree, State] | None:
    """One step of each task, by an ``update`` of trees of stacked leaves.

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
    hyper = _hyper(tasks, values, structure, params, counts)
    if hyper is None:
        return None
    own = _are_own(hyper)
    if own and len(vectors) > 1:  # those would come to be each task's own
        return None
    if not own and all(x is None or x[1] is None for column in columns for x in column):
        return None  # no task has anything of its own
    with tasks.together():
        g, p, *held = [
            tree.unflatten(structure, [_stacked(x, tasks.size, own) for x in column])
            for column in columns
        ]
        state: State = {**shared, **dict(zip(slots, held))}
        try:
            p, state = update(g, state, p, lambda *_: hyper)
        except FuncoptError:
            return None
        batched = {
            name: _each(state[name], tasks)
            for name, x in vectors.items()
            if _is_own(tasks, x)
        }
    for name, x in batched.items():
        state[name] = tasks.on(x)
    new = map(tree.leaves, (p, *(state[name] for name in slots)))
    p, *trees = [
        tree.unflatten(
            structure,
            [old if g is None else tasks.on(x) for g, old, x in zip(grads, was, column)],
        )
        for was, column in zip(given[1:], new)
    ]
    return p, state | dict(zip(slots, trees))


def _hyper(
    tasks: TaskAxis,
    values: LeafValues,
    structure: tree.Structure,
    params: Sequence[Tensor | None],
    counts: Sequence[int],
) -> Sequence[dict[str, Any]] | None:
    """The hyperparameters of all tasks, `PerTask` where they are each one's own.

    None if those are more than a number, or cannot be read; or if a vmap within this one
    has made them its tasks' own, who are many times as many here.
    """
    hyper = values(structure, params, [count + 1 for count in counts])
    if _are_own(hyper):
        return None
    rows = {id(row): row for row in hyper}
    if not any(_is_own(tasks, x) for row in rows.values() for x in row.values()):
        return hyper
    with tasks.together():
        found = {key: _per_task(tasks, row) for key, row in rows.items()}
    spread = [row for row in map(found.get, map(id, hyper)) if row is not None]
    return spread if len(spread) == len(hyper) else None


def _are_own(hyper: Sequence[Mapping[str, Any]]) -> bool:
    return any(isinstance(x, PerTask) for row in hyper for x in row.values())


def _is_own(tasks: TaskAxis, x: Any) -> bool:
    return isinstance(x, Tensor) and tasks.off(x)[1] is not None


def _per_task(tasks: TaskAxis, row: Mapping[str, Any]) -> dict[str, Any] | None:
    """The row with vectors for the tasks' own numbers, if these can be read."""
    found: dict[str, Any] = {}
    for name, x in row.items():
        value, axis = tasks.off(x) if isinstance(x, Tensor) else (x, None)
        if axis is not None:
            if (
                value.ndim > 1
                or levels.may_be_tracked(value)
                or not concrete.readable(value)
            ):
                return None
            value = PerTask(value)
        found[name] = value
    return found


def _shared(vector: Tensor, axis: int | None) -> Tensor | None:
    """The vector of every task, if it is the same and can be read."""
    if levels.may_be_tracked(vector) or not concrete.readable(vector):
        return None
    if axis is None:
        return vector
    table = vector.movedim(axis, 0)
    return table[0] if torch.equal(table, table[:1].expand_as(table)) else None


def _each(vector: Tensor, tasks: TaskAxis) -> Tensor:
    """The vector once for each task, in memory of its own."""
    return vector.expand(tasks.size, -1).clone()


def _stacked(each: tuple[Tensor, int | None] | None, size: int, own: bool) -> Any:
    """With the tasks in front; as often as there are tasks, if they share it."""
    if each is None:
        return None
    x, axis = each
    x = x.expand(size, *x.shape) if axis is None else x.movedim(axis, 0) if axis else x
    # What has numbers of its own is to be one piece of memory.
    return x.contiguous() if own else x
