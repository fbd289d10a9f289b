"""What an optimizer is given must fit together, or a clear error says what does not."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch

from funcopt import tree
from funcopt.errors import (
    GradientLostError,
    HyperparameterError,
    HyperparameterTypeError,
    LeafError,
    StructureError,
)
from funcopt.execution import levels
from funcopt.types import State, Tensor, Tree

LeafForm: TypeAlias = tuple[Any, ...]  #: shape, dtype, device and layout


def check_count(name: str, value: Any, least: int = 1) -> None:
    """``value`` must be a whole number that is not less than ``least``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise HyperparameterError(
            f"{name} must be a whole number ≥ {least}, got {value!r}"
        )


def check_function(name: str, value: Any) -> None:
    """``value`` must be something that can be called."""
    if not callable(value):
        raise HyperparameterTypeError(f"{name} is a function, not {type(value).__name__}")


def check_generator(name: str, value: Any) -> None:
    """``value`` must be a generator: what it gives can be repeated."""
    if not isinstance(value, torch.Generator):
        raise HyperparameterTypeError(
            f"{name} draws from an explicit generator, torch.Generator().manual_seed(0), "
            f"not from {value!r}"
        )


def check_params(leaves: Sequence[Any], structure: tree.Structure) -> None:
    """Each leaf must be ``None`` or a dense tensor of floating-point numbers."""
    for i, leaf in enumerate(leaves):
        if leaf is None:
            continue
        if not isinstance(leaf, Tensor):
            way = "keep other data outside of params"
            if isinstance(leaf, torch.nn.Module):
                way = "a module's parameters are dict(module.named_parameters())"
            elif isinstance(leaf, Iterator):
                way = "make a list of what it gives, or a dict with names"
            raise LeafError(
                f"params['{tree.paths(structure)[i]}'] is {type(leaf).__name__}, not a "
                f"tensor; {way}"
            )
        continuous = leaf.is_floating_point() or leaf.is_complex()
        if not continuous or leaf.layout is not torch.strided or _is_odd(leaf):
            raise LeafError(
                f"params['{tree.paths(structure)[i]}'] is {leaf.dtype}, {_form(leaf)}; "
                "the rule takes dense floating-point leaves, of 16 bits at least. Put "
                "integer tensors with the buffers; a sparse leaf must be made dense"
            )


def _is_odd(leaf: Tensor) -> bool:
    """Whether torch has no arithmetic for it: a list of tensors, numbers of 8 bits."""
    return leaf.is_nested or leaf.dtype.itemsize < 2


def _form(leaf: Tensor) -> str:
    return "nested" if leaf.is_nested else str(leaf.layout)


def check_gradients(grads: Tree) -> None:
    """Each leaf must be ``None`` or a tensor; the optimizer looks at the rest."""
    leaves, structure = tree.flatten(grads)
    for i, leaf in enumerate(leaves):
        if leaf is not None and not isinstance(leaf, Tensor):
            raise _no_tensor(f"grads at '{tree.paths(structure)[i]}'", leaf)


def check_floats(values: Any, what: str) -> None:
    """Each leaf must be ``None`` or a tensor of floating-point numbers; one be there."""
    leaves, structure = tree.flatten(values)
    if all(leaf is None for leaf in leaves):
        raise StructureError(f"{what} has no tensor that a gradient could be by")
    for i, leaf in enumerate(leaves):
        if leaf is None:
            continue
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            kind = leaf.dtype if isinstance(leaf, Tensor) else type(leaf).__name__
            raise LeafError(
                f"{what}['{tree.paths(structure)[i]}'] is {kind}; the meta-gradient "
                "needs floating-point tensors: put everything else with the tasks, or "
                "close over it"
            )


def check_real(leaves: Sequence[Any], structure: tree.Structure, name: str) -> None:
    """No leaf may be complex: a sum over it is not that of its parts."""
    for i, leaf in enumerate(leaves):
        if leaf is not None and leaf.is_complex():
            raise LeafError(
                f"params['{tree.paths(structure)[i]}'] is {leaf.dtype}, and {name} takes "
                "real leaves: it looks at a leaf as a whole, not at every number for "
                "itself. Give complex leaves to another optimizer, by fo.partition"
            )


def check_matrices(leaves: Sequence[Any], structure: tree.Structure, name: str) -> None:
    """Each leaf must have two axes."""
    for i, leaf in enumerate(leaves):
        if leaf is not None and leaf.ndim != 2:
            raise StructureError(
                f"{name} takes matrices, but params['{tree.paths(structure)[i]}'] has "
                f"shape {tuple(leaf.shape)}; give it to another optimizer, by "
                "fo.partition({'matrices': ..., 'others': ...}, labels)"
            )


def check_no_graph(tensors: Sequence[Any], what: str, which: str) -> None:
    """No derivative may be asked of ``what``; ``which`` tensors it would follow."""
    if not levels.differentiating(tensors):
        return
    why = f"{which} requires grad"
    if levels.inside() or levels.in_forward_mode():
        why = "a transform of torch.func or a forward-mode level is open"
    raise GradientLostError(
        f"{what} gives results without a graph, but {why}. Call it under "
        "torch.no_grad(), or detach the tensor"
    )


class SlotForm:
    """What a slot is like that starts as ``first(p)``, as a function of p."""

    def __init__(self, first: Callable[[Tensor], Tensor]) -> None:
        self.first = first
        self.known: dict[Any, Any] = {}

    def __call__(self, p: Tensor) -> LeafForm:
        key = p.shape, p.dtype
        if not all(type(n) is int for n in p.shape):  # a tracer's: they have no hash
            found = self._look(p)
        elif (found := self.known.get(key)) is None:
            found = self.known[key] = self._look(p)
        return *found, p.device, torch.strided

    def _look(self, p: Tensor) -> tuple[Any, ...]:
        made = self.first(torch.empty(p.shape, dtype=p.dtype, device="meta"))
        return made.shape, made.dtype


def check_keys(state: State, keys: Collection[str], name: str) -> None:
    """The state must have what this optimizer keeps."""
    if not isinstance(state, Mapping) or state.keys() != set(keys):
        found = sorted(state) if isinstance(state, Mapping) else type(state).__name__
        raise StructureError(
            f"{name} keeps the state {sorted(keys)}, but was given {found}: this state "
            "is another optimizer's (or was made with other flags); use opt.init(params)"
        )


def check_state(
    state: State,
    keys: Sequence[str],
    vectors: Mapping[str, torch.dtype],
    structure: tree.Structure,
    name: str,
) -> None:
    """The slots must be this optimizer's, its vectors as long as params has leaves."""
    check_keys(state, keys, name)
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
    forms: Mapping[str, SlotForm],
) -> None:
    """Each gradient and each slot must look like its parameter, or have its form."""
    try:
        if _all_alike(params, grads, slots, live, forms):
            return
    except (AttributeError, RuntimeError):
        pass  # something is no tensor, or a nested one, of no shape: named below
    check_params(params, structure)
    paths = tree.paths(structure)
    columns = [("grads", grads, None)]
    columns += [(f"state['{n}']", slot, forms.get(n)) for n, slot in slots.items()]
    for what, column, form in columns:
        for i in range(len(params)) if live is None else live:
            _check_leaf(f"{what} at '{paths[i]}'", column[i], params[i], form)


def _all_alike(
    params: Sequence[Any],
    grads: Sequence[Any],
    named: Mapping[str, Sequence[Any]],
    live: list[int] | None,
    forms: Mapping[str, SlotForm],
) -> bool:
    """The quick look of every step: it decides, and `check_leaves` finds the words."""
    slots: Sequence[Sequence[Any]] = [*named.values()]
    if live is not None:
        params, grads, *slots = [[c[i] for i in live] for c in (params, grads, *slots)]
    expected = _describe(params)
    # Slots that look like params have passed init: no integers, and dense.
    if not slots and not all(
        (dtype.is_floating_point or dtype.is_complex)
        and dtype.itemsize > 1
        and layout is torch.strided
        for _, dtype, _, layout in expected
    ):
        return False
    if forms:
        for form, column in zip(forms.values(), slots):
            if _describe(column) != [form(p) for p in params]:
                return False
        slots = ()
    return all(_describe(column) == expected for column in (grads, *slots))


def _check_leaf(where: str, found: Any, p: Any, form: SlotForm | None) -> None:
    if p is None:
        raise StructureError(f"{where} is given, but params has None there")
    if not isinstance(found, Tensor):
        raise _no_tensor(where, found)
    if found.is_nested:
        raise LeafError(f"{where} is nested; give a dense tensor like its parameter")
    shape, dtype, device, _ = form(p) if form else _describe([p])[0]
    if found.shape != shape:
        it = f"must have {tuple(shape)} for a parameter of" if form else "its parameter"
        raise StructureError(
            f"{where} has shape {tuple(found.shape)}, {it} {tuple(p.shape)}"
        )
    if found.layout is not torch.strided:
        raise LeafError(f"{where} is sparse ({found.layout}); give .to_dense()")
    if (found.dtype, found.device) != (dtype, device):
        it = "must be" if form else "its parameter is"
        raise LeafError(
            f"{where} is {found.dtype} on {found.device}, {it} {dtype} on {device}; cast "
            "or move it first"
        )


def _no_tensor(where: str, found: Any) -> LeafError:
    return LeafError(f"{where} is {type(found).__name__}, not a tensor")


def _describe(leaves: Sequence[Tensor]) -> list[LeafForm]:
    return [(x.shape, x.dtype, x.device, x.layout) for x in leaves]
