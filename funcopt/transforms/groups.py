"""torch.optim's param groups as a tree and hyperparameter trees."""

from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any

import torch

from funcopt import tree
from funcopt.errors import HyperparameterError, LeafError
from funcopt.types import HyperValue, Tensor, Tree


def from_param_groups(
    groups: Iterable[Mapping[str, Any]], **defaults: HyperValue
) -> tuple[list[Tree], dict[str, HyperValue]]:
    """Split torch-style group dicts into a parameter tree and hyperparameter trees.

    Args:
        groups: dicts as ``torch.optim`` takes them: ``"params"`` holds tensors, or
            (name, tensor) pairs; every other key is a hyperparameter of that group.
        defaults: hyperparameters of the groups that do not name them, as the keyword
            arguments of a ``torch.optim`` constructor.

    Returns:
        ``(params, hyper)``: params is a list with one entry per group, a list of tensors
        or a dict by name; hyper maps each name to a list with one value per group (for
        ``betas`` a pair of lists), to be given to a factory: ``fo.adamw(**hyper)``. A
        flag that all groups share stays a bool.

    Raises:
        HyperparameterError: a group without "params"; a parameter or a name given twice;
            a hyperparameter that some groups lack and no default gives; a list of values
            where a tuple is meant, or tuples in which the groups differ in length; a
            flag that differs between groups (use `partition`).
        LeafError: a group that is no dict, a parameter that is no tensor.

    Source:
        The groups of ``torch.optim``.

    Example:
        >>> import torch, funcopt as fo
        >>> body, head = torch.ones(1), torch.ones(1)
        >>> params, hyper = fo.from_param_groups(
        ...     [{"params": [body]}, {"params": [head], "lr": 0.5}], lr=0.25)
        >>> hyper
        {'lr': [0.25, 0.5]}
        >>> opt = fo.sgd(**hyper)
        >>> opt.update(params, opt.init(params), params)[0]
        [[tensor([0.7500])], [tensor([0.5000])]]
    """
    listed = [_as_dict(group, i) for i, group in enumerate(groups)]
    params = [_group_params(group, i) for i, group in enumerate(listed)]
    _refuse_shared(params)
    names = dict.fromkeys([*defaults, *(name for group in listed for name in group)])
    hyper = {}
    for name in names:
        values = []
        for i, group in enumerate(listed):
            if name not in group and name not in defaults:
                raise HyperparameterError(
                    f"group {i} does not set '{name}', which another group sets; give "
                    f"the value for the rest: from_param_groups(groups, {name}=...)"
                )
            values.append(group.get(name, defaults.get(name)))
        hyper[name] = _transpose(name, values)
    return params, hyper


def _as_dict(group: Any, index: int) -> dict[str, Any]:
    if not isinstance(group, Mapping):
        raise LeafError(
            f"group {index} is {type(group).__name__}, not a dict with 'params'; for one "
            'group of parameters write [{"params": parameters}]'
        )
    return dict(group)


def _group_params(group: dict[str, Any], index: int) -> Tree:
    if "params" not in group:
        raise HyperparameterError(f"group {index} has no 'params', only {sorted(group)}")
    found = group.pop("params")
    members: list[Any] = [found] if isinstance(found, Tensor) else list(found)
    named = bool(members) and all(isinstance(member, tuple) for member in members)
    for member in [value for _, value in members] if named else members:
        if not isinstance(member, Tensor):
            raise LeafError(
                f"group {index} holds {type(member).__name__} among its params; give "
                "tensors, or (name, tensor) pairs"
            )
    if not named:
        return members
    names = [name for name, _ in members]
    if len(set(names)) < len(names):
        twice = tree.some(
            [name for name in dict.fromkeys(names) if names.count(name) > 1]
        )
        raise HyperparameterError(f"group {index} gives the name {twice} more than once")
    return dict(members)


def _refuse_shared(params: list[Tree]) -> None:
    """Two places would step the one tensor twice, each with its own hyperparameters."""
    where: dict[int, int] = {}
    for i, group in enumerate(params):
        for leaf in tree.leaves(group):
            if id(leaf) in where:
                raise HyperparameterError(
                    f"a parameter of shape {tuple(leaf.shape)} stands in group "
                    f"{where[id(leaf)]} and again in group {i}; name it once"
                )
            where[id(leaf)] = i


def _transpose(name: str, values: list[Any]) -> HyperValue:
    if all(_is_number(v) and v == values[0] for v in values):
        return values[0]  # a number that chooses a formula may be one of them
    if any(
        value is None or isinstance(value, bool | str | torch.dtype) for value in values
    ):
        first = values[0]
        if not all(x is first or isinstance(x, str) and x == first for x in values):
            raise HyperparameterError(
                f"the flag '{name}' differs between groups ({values}); it chooses the "
                "formula: use fo.partition with one optimizer for each"
            )
        return values[0]
    lengths = {len(x) if isinstance(x, tuple) else None for x in values}
    if len(lengths) > 1 or any(isinstance(x, list) for x in values):
        raise HyperparameterError(
            f"'{name}' of the groups is {values}: give each the same number of values, "
            "several as a tuple, (0.9, 0.999), and not as a list; one for each parameter "
            "of a group as a dict by their names"
        )
    if lengths == {None}:
        return values
    return tuple(list(column) for column in zip(*values))


def _is_number(value: Any) -> bool:
    """Whether it is one, or a tuple of some, which may have gaps."""
    if isinstance(value, tuple):
        return all(part is None or isinstance(part, Real) for part in value)
    return isinstance(value, Real)
