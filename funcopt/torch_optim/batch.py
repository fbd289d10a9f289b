"""The adapter's step the long way: groups that share a rule, as one update of lists."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from typing import Any

import torch

from funcopt import tree
from funcopt.errors import ExecutionError, LeafError, StructureError
from funcopt.execution import layout, levels
from funcopt.normal import normal_like
from funcopt.spec import Spec
from funcopt.stepping import per_leaf
from funcopt.stepping.stepper import Stepper
from funcopt.torch_optim import flags, shards
from funcopt.torch_optim.flags import Flags
from funcopt.torch_optim.layout import StateLayout
from funcopt.types import Tensor

Group = dict[str, Any]


@dataclass
class Batch:
    """Parameters with gradients that one rule steps, and what is theirs: columns.

    ``rows`` are the rule's keyword arguments, one object for a group.
    """

    stepper: Stepper
    name: str
    layout: StateLayout
    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    states: list[dict[str, Any]] = field(default_factory=list)
    groups: list[Group] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)

    @property
    def spec(self) -> Spec:
        return self.stepper.spec

    def columns(self) -> dict[str, list[Any]]:
        """Of each slot, what the parameters hold; numbers as they are."""
        rows = [*zip(self.states, self.params)]
        # An empty tensor of its own for each that has none: guards see no tensor twice.
        return {
            slot: [s[slot] if slot in s else p.new_zeros(0) for s, p in rows]
            for slot in self.spec.slots
        }

    @property
    def drawn(self) -> list[str]:
        """The numbers that each step draws anew: noise that a group has not set."""
        wanted = [name for name, declared in self.spec.hyper.items() if declared.wanted]
        return [name for name in wanted if any(row[name] is None for row in self.rows)]

    def pick(self, which: Sequence[int]) -> "Batch":
        """Those of the given numbers."""

        def some(column: list[Any]) -> list[Any]:
            return [column[i] for i in which]

        return replace(
            self,
            params=some(self.params),
            grads=some(self.grads),
            states=some(self.states),
            groups=some(self.groups),
            rows=some(self.rows),
        )


def gather(
    groups: Sequence[Group],
    state: Mapping[Tensor, dict[str, Any]],
    known: Flags,
    layout: StateLayout,
    name: str,
) -> list[Batch]:
    """The parameters that have gradients, in a batch for each rule (`Flags.key`)."""
    found: dict[Any, Batch] = {}
    order: list[Batch] = []
    for group in groups:
        key = known.key(group)
        if key not in found:
            found[key] = Batch(known.stepper(key), name, layout)
        batch = found[key]
        row = flags.row(batch.spec, group)
        for p in group["params"]:
            if p.grad is None:
                continue
            _check(p, p.grad, state.get(p) or {}, group, batch.spec, name)
            batch.params.append(p)
            batch.grads.append(p.grad)
            batch.groups.append(group)
            batch.rows.append(row)
            order.append(batch)
    for batch in order:  # entries are made, in order, when all is known to be right
        p = batch.params[len(batch.states)]
        # torch.optim has none where there is nothing to be kept
        keeps = layout.counts or batch.spec.slots
        batch.states.append(state[p] if keeps else {})
    return [batch for batch in found.values() if batch.params]


def _check(
    p: Tensor, g: Tensor, state: Group, group: Group, spec: Spec, name: str
) -> None:
    """What torch.optim refuses by a RuntimeError, as soon as it comes to it."""
    sparse = g.layout is not torch.strided
    if sparse and not spec.sparse:
        raise ExecutionError(f"{name} does not support sparse gradients")
    if sparse and group.get("weight_decay", 0) != 0:
        raise ExecutionError(
            f"{name}: weight_decay option is not compatible with sparse gradients, which "
            "are of some numbers of a parameter where it moves all"
        )
    if not sparse and spec.sparse == "only":
        raise ExecutionError(
            f"{name} does not support dense gradients, please consider Adam instead"
        )
    if not (p.is_floating_point() or p.is_complex()):
        raise ExecutionError(f"{name} steps floating-point parameters, not {p.dtype}")
    if p.is_complex() and not spec.elementwise:
        raise ExecutionError(f"{name} does not support complex parameters")
    if g.shape != p.shape:
        raise ExecutionError(
            f"{name}: a gradient has shape {tuple(g.shape)}, and its parameter "
            f"{tuple(p.shape)}"
        )
    held = (x for x in state.values() if isinstance(x, Tensor))
    if not torch.is_inference_mode_enabled():
        if any(x.is_inference() for x in (p, *held)):
            raise ExecutionError(
                f"{name}: a parameter of shape {tuple(p.shape)} or its state was made in "
                "inference mode, and is not to be written to outside of it: clone it here"
            )


def step(
    batch: Batch, data: Mapping[str, Mapping[int, Any]], differentiable: bool
) -> None:
    """One update, written over parameters and state.

    ``data`` are values for this step alone: by name, a dict from a parameter's ``id``.
    """
    for which in _passes(batch):
        _step(batch.pick(which), data, differentiable)


def _passes(batch: Batch) -> Iterator[list[int]]:
    """Which parameters are stepped together, as a list for each of several updates.

    A parameter that a group names twice is stepped twice; what shares memory, as weights
    tied by their ``data``, one by one, so that each goes on from what the last has made.
    """
    which = [*range(len(batch.params))]
    together = batch.spec.totals or shards.are_among(batch.params)
    if not together and layout.overlap([_numbers(batch.grads), batch.params]):
        yield from ([i] for i in which)
        return
    while which:
        first = {id(batch.params[i]): i for i in reversed(which)}
        yield sorted(first.values())
        which = [i for i in which if first[id(batch.params[i])] != i]


def _numbers(grads: Sequence[Tensor]) -> list[Tensor]:
    return [g._values() if g.is_sparse else g for g in grads]


def _step(
    batch: Batch, data: Mapping[str, Mapping[int, Any]], differentiable: bool
) -> None:
    spec, stepper = batch.spec, batch.stepper
    steps = [batch.layout.steps(s, spec) for s in batch.states]
    with torch.inference_mode(False):  # whose tensors no step outside of it may write
        for state, p, group in zip(batch.states, batch.params, batch.groups):
            batch.layout.complete(state, p, group, spec)
    grads, own, columns = batch.grads, batch.params, batch.columns()
    split = shards.are_among(own)
    if split:
        shards.check(spec, own, columns)
    if split and shards.goes_by_parts(spec) and not differentiable:
        split = False
        grads = shards.here(grads, own)
        columns |= {slot: shards.here(columns[slot], own) for slot in stepper.trees}
        own = shards.here(own, own)
    names = stepper.trees
    leaves = [grads, own, *(columns[slot] for slot in names)]
    grads, params, *trees = given = of_one_dtype(leaves)
    if differentiable:  # whose graph may hold the old parameters: these are written over
        params = [p.clone() for p in params]
    # Views of one tensor may lie between each other: each is then written by itself.
    donate = (
        given is leaves
        and not differentiable
        and not split
        and not layout.overlap([_numbers(grads), params, *trees])
        and not layout.folded([params, *trees])
    )
    state = {"step": torch.tensor(steps, device="cpu")} | {
        slot: _vector(columns[slot], differentiable)
        for slot in columns
        if stepper.scalar[slot]
    }
    values = _values(batch, own, params, data)
    try:
        new_params, new = stepper.step(
            grads, state | dict(zip(names, trees)), params, values, donate
        )
    except (LeafError, StructureError) as error:  # of what torch raises a RuntimeError
        raise ExecutionError(f"{batch.name}: {error}") from error
    if not donate:
        for p, value in zip(own, new_params):
            shards.write_over(p, value)
    for slot, column in columns.items():
        for i, state in enumerate(batch.states):
            if stepper.scalar[slot]:
                state[slot].copy_(shards.whole(new[slot][i]))
            elif differentiable and slot in state:
                state[slot] = new[slot][i].to(column[i].dtype)
            elif not donate and slot in state:
                shards.write_over(column[i], new[slot][i])
    for state in batch.states:
        if batch.layout.counts:
            state["step"] += 1  # in place, where it is a tensor


def of_one_dtype(columns: list[list[Tensor]]) -> list[list[Tensor]]:
    """The columns; of a leaf that is of several dtypes, casts to the widest of them.

    As after ``model.to(dtype)`` between two steps: torch.optim's operations promote.
    """
    dtypes = [[x.dtype for x in column] for column in columns]
    if all(kinds == dtypes[0] for kinds in dtypes):
        return columns
    wide = [reduce(torch.promote_types, kinds) for kinds in zip(*dtypes)]
    return [[x.to(dtype) for x, dtype in zip(column, wide)] for column in columns]


def _vector(column: Sequence[Any], differentiable: bool) -> Tensor:
    if differentiable and any(map(levels.is_tracked, column)):
        return torch.stack([x.to(torch.float64) for x in column])
    numbers = [float(x) for x in column]
    return torch.tensor(numbers, dtype=torch.float64, device="cpu")


def _values(
    batch: Batch,
    own: list[Tensor],
    params: list[Tensor],
    data: Mapping[str, Mapping[int, Any]],
) -> Callable[..., Sequence[dict[str, Any]]]:
    """What gives each leaf its keyword arguments.

    ``own`` is what of the parameters is stepped, ``params`` that as the rule gets it.
    """
    rows: list[dict[str, Any]] = batch.rows
    given = {name: [found[id(p)] for p in batch.params] for name, found in data.items()}
    if own is not batch.params:
        given = {name: shards.here(x, batch.params) for name, x in given.items()}
    for name in batch.drawn:
        if name not in given:
            noise = normal_like(own, torch.default_generator)
            given[name] = [
                x if row[name] is None else row[name] for x, row in zip(noise, rows)
            ]
    structure = tree.flatten(params)[1]
    for name, found in given.items():
        values = per_leaf.column(name, found, structure, params)
        rows = [{**row, name: x} for row, x in zip(rows, values)]
    return partial(_given, rows)


def _given(rows: Sequence[dict[str, Any]], *_: Any) -> Sequence[dict[str, Any]]:
    return rows
