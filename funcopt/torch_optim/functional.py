"""Groups and ``state[p]`` as an Optimizer, a tree and a functional state, and back."""

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch

from funcopt import tree
from funcopt.errors import StructureError
from funcopt.optimizer import Optimizer
from funcopt.spec import Spec
from funcopt.stepping import complex_leaves, vectors
from funcopt.torch_optim import checkpoint
from funcopt.torch_optim.flags import Flags
from funcopt.torch_optim.layout import StateLayout
from funcopt.transforms.partition import partition
from funcopt.types import State, Tensor, Tree

Groups = Sequence[Mapping[str, Any]]
States = Mapping[Tensor, dict[str, Any]]


def extract(
    groups: Groups, states: States, flags: Flags, layout: StateLayout
) -> tuple[Optimizer, Tree, State]:
    """An Optimizer, and copies of the parameters and of their state.

    The tree has an entry for each group: a list, or a dict of named parameters.
    """
    keys = [flags.key(group) for group in groups]
    kinds = [*dict.fromkeys(keys)]
    optimizers = {str(i): _optimizer(key, groups, flags) for i, key in enumerate(kinds)}
    params = [_tree(group) for group in groups]
    labels = [str(kinds.index(key)) for key in keys]
    made = {
        label: _state(opt, label, labels, groups, params, states, layout)
        for label, opt in optimizers.items()
    }
    params = tree.map(_copy, params)
    if len(kinds) == 1:
        return optimizers["0"], params, made["0"]
    return partition(optimizers, labels), params, made


def restore(
    params: Tree,
    state: State,
    groups: Groups,
    states: MutableMapping[Tensor, dict[str, Any]],
    flags: Flags,
    layout: StateLayout,
) -> None:
    """Write what `extract` gave, or what steps made of it, over parameters and state."""
    keys = [flags.key(group) for group in groups]
    kinds = [*dict.fromkeys(keys)]
    structure = tree.flatten([_tree(group) for group in groups])[1]
    new = tree.flatten_like(structure, params, "params")
    each = {"0": state} if len(kinds) == 1 else state
    columns: dict[Any, dict[str, list[Any]]] = {}
    for label, key in enumerate(kinds):
        spec = flags.stepper(key).spec
        columns[key] = slot_columns(each.get(str(label), {}), spec, structure)
    rows = []
    for i, (group, p) in enumerate(_places(groups)):
        key = flags.key(group)
        spec, found = flags.stepper(key).spec, columns[key]
        values = {slot: column[i] for slot, column in found.items()}
        check_fits(tree.paths(structure)[i], new[i], p, spec, values)
        rows.append((group, p, new[i], spec, values))
    with torch.no_grad():
        for group, p, value, spec, values in rows:
            p.copy_(value)
            write(states, p, group, spec, layout, values)


def check_fits(
    path: str, value: Any, p: Tensor, spec: Spec, values: Mapping[str, Any]
) -> None:
    """Whether this can be written over a parameter and its state."""
    given = {"params": (value, p.shape)}
    for slot, first in spec.slots.items():
        if callable(first):
            given[f"state['{slot}']"] = values[slot], checkpoint.shape_of(first, p)
    for what, (found, shape) in given.items():
        if not isinstance(found, Tensor):
            raise StructureError(
                f"{what} at '{path}' is {type(found).__name__}, not a tensor"
            )
        if found.shape != shape:
            raise StructureError(
                f"{what} at '{path}' has shape {tuple(found.shape)}, and for a parameter "
                f"of shape {tuple(p.shape)} it must be {tuple(shape)}"
            )


def slot_columns(
    state: State, spec: Spec, structure: tree.Structure
) -> dict[str, list[Any]]:
    """The step and the slots, for each leaf."""
    if {*state} != {"step", *spec.slots}:
        raise StructureError(
            f"the state holds {tree.some([*state])}, and {spec.name} keeps "
            f"{tree.some(['step', *spec.slots])}: it is another optimizer's"
        )
    for slot in ("step", *spec.slots):
        vector = slot == "step" or not callable(spec.slots[slot])
        if vector and len(state[slot]) != structure.num_leaves:
            raise StructureError(
                f"state['{slot}'] has {len(state[slot])} numbers, and there are "
                f"{structure.num_leaves} parameters"
            )
    return {
        slot: tree.flatten_like(structure, value, f"state['{slot}']")
        if slot != "step" and callable(spec.slots[slot])
        else value.tolist()
        for slot, value in state.items()
    }


def write(
    states: MutableMapping[Tensor, dict[str, Any]],
    p: Tensor,
    group: Mapping[str, Any],
    spec: Spec,
    layout: StateLayout,
    values: Mapping[str, Any],
) -> None:
    """The step and slots of one leaf as ``state[p]``, if there is such an entry yet."""
    steps = int(values["step"])
    if not (steps or layout.early) or not (layout.counts or spec.slots):
        states.pop(p, None)
        return
    entry = states[p] = {}
    layout.complete(entry, p, group, spec)
    for slot in spec.slots:
        if slot in entry and isinstance(values[slot], Tensor):
            entry[slot] = _copy(values[slot])
        elif slot in entry:
            entry[slot].fill_(values[slot])
    if layout.counts == "int":
        entry["step"] = steps
    elif layout.counts:
        entry["step"].fill_(steps)


def _places(groups: Groups) -> list[tuple[Mapping[str, Any], Tensor]]:
    """Each leaf's group and parameter, in the order of the tree."""
    pairs = [
        {name: (group, p) for name, p in _members(group)}
        if "param_names" in group
        else [(group, p) for p in group["params"]]
        for group in groups
    ]
    found = []
    for pair in pairs:
        found += [pair[key] for key in sorted(pair)] if isinstance(pair, dict) else pair
    return found


def _members(group: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    return zip(group["param_names"], group["params"])


def _tree(group: Mapping[str, Any]) -> Any:
    return dict(_members(group)) if "param_names" in group else [*group["params"]]


def _copy(p: Tensor) -> Tensor:
    return p.detach().clone()


def _optimizer(key: tuple[Any, ...], groups: Groups, flags: Flags) -> Optimizer:
    """What steps the groups of this key, with the numbers of each."""
    static = {name: value for name, value in key if name not in flags.numbers}
    mine = [flags.key(group) == key for group in groups]
    # Others' are not asked for, and might be of another formula: a momentum beside 0.
    first = groups[mine.index(True)]
    given = [group if own else first for group, own in zip(groups, mine)]
    numbers = {
        name: _spread([group[name] for group in given])
        for name in flags.numbers
        if name in groups[0]
    }
    return flags.factory(**static, **numbers)


def _spread(values: list[Any]) -> Any:
    """One value if all groups share it, else one for each; a tuple part by part."""
    if isinstance(values[0], (tuple, list)):
        return tuple(_spread([*column]) for column in zip(*values))
    values = [_copy(v) if isinstance(v, Tensor) else v for v in values]
    plain = not any(isinstance(v, Tensor) for v in values)
    return values[0] if len(values) == 1 or plain and len({*values}) == 1 else values


def _state(
    opt: Optimizer,
    label: str,
    labels: Sequence[str],
    groups: Groups,
    params: list[Any],
    states: States,
    layout: StateLayout,
) -> State:
    """The functional state of the groups with this label; other leaves are None."""
    spec = opt.spec
    assert spec is not None
    structure = tree.flatten(params)[1]
    of = {id(group): name for group, name in zip(groups, labels)}
    place = _places(groups)
    mine = [p if of[id(group)] == label else None for group, p in place]
    found = [{} if p is None else states.get(p) or {} for p in mine]
    steps = [layout.steps(entry, spec) for entry in found]
    device = vectors.device_of(mine)
    state: State = {"step": torch.tensor(steps, device="cpu")}
    for slot, first in spec.slots.items():
        column = []
        for p, entry in zip(mine, found):
            value = entry.get(slot)
            if not callable(first):
                column.append(first if value is None else float(value))
            elif p is None:
                column.append(None)
            elif value is None:
                column.append(complex_leaves.slot(first, p.detach()))
            else:
                column.append(checkpoint.copied(value))
        state[slot] = (
            tree.unflatten(structure, column)
            if callable(first)
            else torch.tensor(column, dtype=torch.float64, device=device)
        )
    return state
