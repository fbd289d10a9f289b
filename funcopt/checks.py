"""What an optimizer is given must fit together, or a clear error says what does not."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from funcopt import tree
from funcopt.errors import LeafError, StructureError
from funcopt.types import State, Tensor


def check_params(leaves: Sequence[Any], structure: tree.Structure) -> None:
    """Each leaf must be ``None`` or a dense tensor of real floating-point numbers."""
    for i, leaf in enumerate(leaves):
        if leaf is None:
            continue
        if not isinstance(leaf, Tensor):
            raise LeafError(
                f"params['{tree.paths(structure)[i]}'] is {type(leaf).__name__}, not a "
                "tensor; keep other data outside of params"
            )
        if not leaf.is_floating_point() or leaf.layout is not torch.strided:
            raise LeafError(
                f"params['{tree.paths(structure)[i]}'] is {leaf.dtype}, {leaf.layout}; "
                "the rule takes dense real floating-point leaves. Put integer tensors "
                "with the buffers; a sparse leaf must be made dense"
            )


def check_state(
    state: State,
    keys: Sequence[str],
    vectors: Mapping[str, torch.dtype],
    structure: tree.Structure,
    name: str,
) -> None:
    """The slots must be this optimizer's, its vectors as long as params has leaves."""
    if not isinstance(state, Mapping) or state.keys() != set(keys):
        found = sorted(state) if isinstance(state, Mapping) else type(state).__name__
        raise StructureError(
            f"{name} keeps the state {sorted(keys)}, but was given {found}: this state "
            "is another optimizer's (or was made with other flags); use opt.init(params)"
        )
    for key, dtype in vectors.items():
        found = state[key]
        if not isinstance(found, Tensor) or found.dtype is not dtype:
            kind = found.dtype if isinstance(found, Tensor) else type(found).__name__
            raise LeafError(
                f"state['{key}'] is {kind}; it holds a number for each leaf, in {dtype}"
            )
        if found.shape != (structure.num_leaves,):
            raise StructureError(
                f"state['{key}'] has shape {tuple(found.shape)}, params has "
                f"{structure.num_leaves} leaves: this state was made for another tree"
            )


def check_leaves(
    grads: Sequence[Any],
    params: Sequence[Any],
    slots: Mapping[str, Sequence[Any]],
    live: list[int] | None,
    structure: tree.Structure,
) -> None:
    """Each gradient and each slot must look like its parameter."""
    try:
        if _all_alike(params, grads, [*slots.values()], live):
            return
    except AttributeError:
        pass  # something is no tensor: named below
    check_params(params, structure)
    paths = tree.paths(structure)
    columns = {"grads": grads, **{f"state['{n}']": slot for n, slot in slots.items()}}
    for what, column in columns.items():
        for i in range(len(params)) if live is None else live:
            _check_leaf(f"{what} at '{paths[i]}'", column[i], params[i])


def _all_alike(
    params: Sequence[Any],
    grads: Sequence[Any],
    slots: Sequence[Sequence[Any]],
    live: list[int] | None,
) -> bool:
    """The quick look of every step: it decides, and `check_leaves` finds the words."""
    if live is not None:
        params, grads, *slots = [[c[i] for i in live] for c in (params, grads, *slots)]
    expected = _describe(params)
    # Slots that look like params have passed init: these are floats, and dense.
    if not slots and not all(
        dtype.is_floating_point and layout is torch.strided
        for _, dtype, _, layout in expected
    ):
        return False
    return all(_describe(column) == expected for column in (grads, *slots))


def _check_leaf(where: str, found: Any, p: Any) -> None:
    if p is None:
        raise StructureError(f"{where} is given, but params has None there")
    if not isinstance(found, Tensor):
        raise LeafError(f"{where} is {type(found).__name__}, not a tensor")
    if found.shape != p.shape:
        raise StructureError(
            f"{where} has shape {tuple(found.shape)}, its parameter {tuple(p.shape)}"
        )
    if found.layout is not torch.strided:
        raise LeafError(f"{where} is sparse ({found.layout}); give .to_dense()")
    if _describe([found]) != _describe([p]):
        raise LeafError(
            f"{where} is {found.dtype} on {found.device}, its parameter is {p.dtype} on "
            f"{p.device}; cast or move it first"
        )


def _describe(leaves: Sequence[Tensor]) -> list[tuple[Any, ...]]:
    return [(x.shape, x.dtype, x.device, x.layout) for x in leaves]
