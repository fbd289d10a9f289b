"""A sparse gradient steps the entries that it names, by the rule of whole leaves."""

from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any, TypeAlias

import torch

from funcopt import tree
from funcopt.errors import HyperparameterError, LeafError, StructureError
from funcopt.execution import donation
from funcopt.types import State, Tensor, Tree

At: TypeAlias = tuple[Tensor, ...] | None  #: which entries; None is all of a leaf


def are_among(grads: Sequence[Any]) -> bool:
    """Whether a gradient is sparse."""
    return any(isinstance(g, Tensor) and g.layout is torch.sparse_coo for g in grads)


def dense(grads: Sequence[Any]) -> list[Any]:
    """The gradients, none of them sparse."""
    return [g.to_dense() if are_among([g]) else g for g in grads]


def numbers(g: Tensor) -> Tensor:
    """The numbers that a gradient holds: of a sparse one, those that are not left out."""
    return g.coalesce().values() if are_among([g]) else g


def check_all(grads: Sequence[Any], structure: tree.Structure, name: str) -> None:
    """Each gradient must be sparse."""
    for i, g in enumerate(grads):
        if g is not None and not are_among([g]):
            raise LeafError(
                f"grads at '{tree.paths(structure)[i]}' is dense, and {name} takes "
                "sparse ones (torch.sparse_coo, as nn.Embedding(sparse=True) gives); "
                "give dense ones to fo.adam, by fo.partition"
            )


def check(
    grads: Sequence[Any],
    params: Sequence[Any],
    structure: tree.Structure,
    hyper: Sequence[Mapping[str, Any]],
) -> list[Any]:
    """The gradients coalesced; raises unless they fit their parameters."""
    rows = {id(values): values for g, values in zip(grads, hyper) if are_among([g])}
    for values in rows.values():
        for name, value in values.items():
            if isinstance(value, Tensor) and value.ndim:
                raise HyperparameterError(
                    f"{name} has a value for each element, and a sparse gradient is of "
                    "some: give a number for a leaf, or .to_dense()"
                )
        decay = values.get("weight_decay", 0.0)
        if not isinstance(decay, Real) or decay != 0:
            raise HyperparameterError(
                "weight_decay moves every number of a leaf and a sparse gradient only "
                "some: leave it out, or give .to_dense()"
            )
    found = list(grads)
    for i, (g, p) in enumerate(zip(grads, params)):
        if not are_among([g]) or not isinstance(p, Tensor):
            continue  # others are looked at with the slots
        if g.shape != p.shape:
            raise StructureError(
                f"grads at '{tree.paths(structure)[i]}' has shape {tuple(g.shape)}, its "
                f"parameter {tuple(p.shape)}"
            )
        if (g.dtype, g.device) != (p.dtype, p.device) or not g.sparse_dim():
            raise LeafError(
                f"grads at '{tree.paths(structure)[i]}' is {g.dtype} on {g.device} with "
                f"{g.sparse_dim()} sparse axes, its parameter is {p.dtype} on "
                f"{p.device}; cast, move or give .to_dense()"
            )
        found[i] = g.coalesce()
    return found


def step(
    update: Callable[..., tuple[Tree, State]],
    grads: Sequence[Any],
    params: Sequence[Any],
    state: State,
    slots: Mapping[str, Sequence[Any]],
    structure: tree.Structure,
    hyper: Sequence[Mapping[str, Any]],
    given: Mapping[str, Any],
) -> tuple[Tree, State]:
    """One step, ``given`` being how: an ``update`` of the entries that gradients name.

    They are given to it as if they were the leaves.
    """
    donate = given["donate"]
    at = [g.indices().unbind() if are_among([g]) else None for g in grads]
    values = [g if i is None else g.values() for g, i in zip(grads, at)]
    if donate:
        columns = [[x for x in c if x is not None] for c in (params, *slots.values())]
        columns.append([x for name, x in state.items() if name not in slots])
        others = [x for row in hyper for x in row.values()]
        donation.check([g for g in values if g is not None], columns, others)

    def few(column: Sequence[Any]) -> Tree:
        picked = [x if i is None else _entries(x, i) for x, i in zip(column, at)]
        return tree.unflatten(structure, picked)

    some = {**state, **{slot: few(column) for slot, column in slots.items()}}
    p, new = update(tree.unflatten(structure, values), some, few(params), **given)

    def put(column: Sequence[Any], made: Tree) -> Tree:
        write = _written if donate else _replaced
        return tree.unflatten(structure, write(column, tree.leaves(made), at))

    new_slots = {slot: put(column, new[slot]) for slot, column in slots.items()}
    return put(params, p), state if donate else {**new, **new_slots}


def _entries(x: Tensor, at: tuple[Tensor, ...]) -> Tensor:
    # Whole rows by what copies them whole, in a third of the time.
    return x.index_select(0, *at) if len(at) == 1 else x[at]


def _replaced(old: Sequence[Any], new: Sequence[Any], at: Sequence[At]) -> list[Any]:
    return [y if i is None else x.index_put(i, y) for x, y, i in zip(old, new, at)]


def _written(old: Sequence[Any], new: Sequence[Any], at: Sequence[At]) -> list[Any]:
    with torch.no_grad():
        for x, y, i in zip(old, new, at):
            if i is not None:  # others were written in place
                x.index_put_(i, y)
    return list(old)
