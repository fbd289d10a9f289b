"""A checkpoint on its way in: matched by names, looked at, and copied."""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch

from funcopt import tree
from funcopt.checks import SlotForm
from funcopt.errors import CheckpointError
from funcopt.torch_optim.flags import Flags
from funcopt.torch_optim.layout import StateLayout
from funcopt.types import Tensor

StateDict = dict[str, Any]
Groups = Sequence[Mapping[str, Any]]


def by_name(state_dict: StateDict) -> StateDict:
    """The same with the parameters' names in place of their numbers."""
    groups = state_dict["param_groups"]
    if not all("param_names" in group for group in groups):
        raise CheckpointError(
            "a checkpoint by name is of named parameters: make the optimizer of "
            "model.named_parameters()"
        )
    names = {
        number: name
        for group in groups
        for number, name in zip(group["params"], group["param_names"])
    }
    if len({*names.values()}) < len(names):
        raise CheckpointError("two parameters have the same name")
    return {
        **state_dict,
        "state": {names.get(k, k): state for k, state in state_dict["state"].items()},
        "param_groups": [
            {**group, "params": [names[i] for i in group["params"]]} for group in groups
        ],
    }


def fitted(
    state_dict: StateDict, groups: Groups, flags: Flags, layout: StateLayout, owner: str
) -> StateDict:
    """The checkpoint in the order of the optimizer's parameters, in tensors of its own.

    Raises:
        CheckpointError: it is of other parameters, or of another optimizer.
    """
    check_parts(state_dict, owner)
    saved = [_named(group) for group in state_dict["param_groups"]]
    if all("param_names" in group for group in (*saved, *groups)):
        saved = _matched(saved, groups, owner)
    state = {key: copied(value) for key, value in state_dict["state"].items()}
    if len(saved) == len(groups):  # torch finds the words for others
        for i, (found, group) in enumerate(zip(saved, groups)):
            _check_numbers(found, flags, group, f"{owner}, group {i}")
            for key, p in zip(found["params"], group["params"]):
                _check_state(state.get(key) or {}, p, found, flags, layout, owner, key)
    return {**state_dict, "state": state, "param_groups": saved}


def check_parts(state_dict: StateDict, owner: str) -> None:
    """It must be a checkpoint at all."""
    for key in ("state", "param_groups"):
        if not isinstance(state_dict, Mapping) or key not in state_dict:
            raise CheckpointError(f"a state_dict of {owner} has '{key}', this has none")


def _named(group: Mapping[str, Any]) -> dict[str, Any]:
    """With names, where the parameters are called by them."""
    if group["params"] and all(isinstance(key, str) for key in group["params"]):
        return {**group, "param_names": [*group["params"]]}
    return dict(group)


def _matched(saved: Groups, groups: Groups, owner: str) -> list[dict[str, Any]]:
    """Each group's saved one, its parameters in the group's order."""
    theirs = [name for group in saved for name in group["param_names"]]
    ours = [name for group in groups for name in group["param_names"]]
    missing = [name for name in ours if name not in {*theirs}]
    extra = [name for name in theirs if name not in {*ours}]
    if missing or extra:
        raise CheckpointError(
            f"the checkpoint is of other parameters than this {owner}: it lacks "
            f"{tree.some(missing) if missing else 'none'}, and has besides "
            f"{tree.some(extra) if extra else 'none'}. Rename them in its "
            "'param_names', or take these out to load by position"
        )
    if len({*ours}) < len(ours) or theirs == ours:
        return [dict(group) for group in saved]
    if len(saved) != len(groups):
        return [dict(group) for group in saved]
    made = []
    for i, group in enumerate(groups):
        wanted = {*group["param_names"]}
        found = next((g for g in saved if {*g["param_names"]} == wanted), None)
        if found is None:
            raise CheckpointError(
                f"no group of the checkpoint holds just the parameters of group {i}, "
                f"{tree.some(group['param_names'])}: make the groups as they were"
            )
        key = dict(zip(found["param_names"], found["params"]))
        names = [*group["param_names"]]
        params = [key[name] for name in names]
        made.append({**found, "params": params, "param_names": names})
    return made


def copied(value: Any) -> Any:
    """In tensors of its own: two optimizers are not to step one state."""
    if isinstance(value, Tensor):  # SGD's of torch is sparse as the first gradient was
        value = value.detach()
        return value.clone() if value.layout is torch.strided else value.to_dense()
    if isinstance(value, dict):
        return {key: copied(entry) for key, entry in value.items()}
    return [*map(copied, value)] if isinstance(value, list) else value


def restore_dtypes(
    state_dict: StateDict, groups: Groups, states: Mapping[Tensor, Any], flags: Flags
) -> None:
    """Slots that are not of the parameter's dtype, in their own.

    Those that are one number are counted in float64, on the host: a sum of many steps
    would soon stand still in a parameter's bfloat16. So would a matrix's roots.
    """
    for saved, group in zip(state_dict["param_groups"], groups):
        spec = flags.stepper(flags.key(group)).spec
        for key, p in zip(saved["params"], group["params"]):
            entry = state_dict["state"].get(key) or {}
            for slot, first in spec.slots.items():
                if slot not in entry:
                    continue
                value = torch.as_tensor(entry[slot])
                if not callable(first):
                    states[p][slot] = value.to("cpu", torch.float64)
                elif states[p][slot].dtype is not (own := _dtype_of(first, p)):
                    states[p][slot] = value.to(p.device, own)


def _check_numbers(
    found: Mapping[str, Any], flags: Flags, group: Mapping[str, Any], owner: str
) -> None:
    # Later releases of torch have added flags that say yes or no.
    needed = [name for name in flags.static if type(group.get(name)) is not bool]
    wanted = (*flags.numbers, *needed)
    missing = [name for name in wanted if name in group and name not in found]
    if missing:
        raise CheckpointError(
            f"the checkpoint is another optimizer's: {owner}, steps by "
            f"{tree.some(missing)}, which it has not; it has {tree.some([*found])}"
        )


def _check_state(
    state: Mapping[str, Any],
    p: Tensor,
    group: Mapping[str, Any],
    flags: Flags,
    layout: StateLayout,
    owner: str,
    key: Any,
) -> None:
    if not state:
        return
    where = f"of parameter {key!r}"
    spec = flags.stepper(flags.key(group)).spec
    if layout.counts and "step" not in state:
        raise CheckpointError(
            f"the checkpoint is another optimizer's: {owner} counts steps, and the state "
            f"{where} has no 'step', only {tree.some([*state])}"
        )
    for slot, first in spec.slots.items():
        value = state.get(slot)
        shape = shape_of(first, p) if callable(first) else torch.Size([])
        if value is None:
            if layout.counts and (shape.numel() or not p.numel()):
                raise CheckpointError(
                    f"the checkpoint is another optimizer's: {owner} keeps '{slot}', and "
                    f"the state {where} has {tree.some([*state])}"
                )
        elif isinstance(value, Tensor) and value.shape != shape:
            raise CheckpointError(
                f"'{slot}' {where} has shape {tuple(value.shape)}, and for a parameter "
                f"of shape {tuple(p.shape)} it must be {tuple(shape)}"
            )


def shape_of(first: Callable[[Tensor], Tensor], p: Tensor) -> torch.Size:
    """Of a slot that starts as ``first(p)``."""
    shape = _form(first)(_real(p))[0]
    return shape[:-1] if p.is_complex() else shape


def _dtype_of(first: Callable[[Tensor], Tensor], p: Tensor) -> torch.dtype:
    """Of such a slot, where it is kept as the parameter is: complex of complex."""
    dtype = _form(first)(_real(p))[1]
    return dtype.to_complex() if p.is_complex() else dtype


_form = lru_cache(maxsize=None)(SlotForm)


def _real(p: Tensor) -> Tensor:
    return torch.view_as_real(p.detach().resolve_conj()) if p.is_complex() else p
