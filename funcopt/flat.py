"""Optimizers that see all leaves as one vector, and ask for the loss again."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from funcopt import tree
from funcopt.checks import check_leaves, check_params, check_state
from funcopt.errors import (
    ExecutionError,
    HyperparameterError,
    HyperparameterTypeError,
    LeafError,
    StructureError,
)
from funcopt.execution import donation, levels
from funcopt.hyper import Hyper
from funcopt.optimizer import Optimizer
from funcopt.select import ByName
from funcopt.stepping.complex_leaves import parts
from funcopt.stepping.per_leaf import Hypers
from funcopt.types import State, Tensor, Tree

#: a function of the vector of all parameters that gives a 0-d loss
Loss = Callable[[Tensor], Tensor]


def everywhere(condition: Tensor) -> bool:
    """Whether it is seen to hold, for every task of a batch; False if nothing is seen."""
    found = levels.seen(condition)
    return found is not None and bool(found.all())


def decided(condition: Tensor) -> bool | None:
    """What a condition is for every task; None if they differ, or a look would take long.

    That is, on an accelerator, and where nothing is seen.
    """
    found = levels.seen(condition)
    if found is None or not found.is_cpu:
        return None
    return bool(found.all()) or (None if found.any() else False)


def where(condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``a`` where it holds, else ``b``: that very tensor, if all tasks agree."""
    known = decided(condition)
    return torch.where(condition, a, b) if known is None else a if known else b


def most(counts: Tensor, otherwise: int) -> int:
    """The largest number of all tasks; ``otherwise`` where none can be seen."""
    found = levels.seen(counts)
    return otherwise if found is None or not found.numel() else int(found.max())


def alone(x: Tensor) -> bool:
    """Whether neither autograd nor a transform nor a mode follows what is computed."""
    followed = torch.is_grad_enabled() or levels.inside() or levels.pushing()
    return not followed and levels.readable(x)


def slope_of(loss: Loss) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """A function of x that gives the loss's gradient there, and its value."""
    transformed: Any = torch.func.grad_and_value(loss)

    def slope(x: Tensor) -> tuple[Tensor, Tensor]:
        # What nobody differentiates or watches autograd does alone, in half the time.
        if not alone(x) or torch.is_inference_mode_enabled():
            return transformed(x)
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            value = loss(x)
            if value.ndim or not value.requires_grad:
                return transformed(x.detach())  # which has the words for it
            (g,) = torch.autograd.grad(value, x)
        return g, value.detach()

    return slope


def flat(
    rule: Callable[..., tuple[Tensor, dict[str, Tensor]]],
    *,
    name: str,
    slots: Callable[[Tensor], dict[str, Tensor]],
    hyper: Mapping[str, Hyper],
) -> Optimizer:
    """An Optimizer from a rule on one vector and its loss.

    Args:
        rule: ``rule(loss, g, x, slots, moves, **hyper) -> (x, slots)``, all values of
            x's dtype, the widest of the leaves' and float32 at least. ``moves`` is None
            or False for the elements of leaves without a gradient: there g is 0, and
            what the rule returns is not looked at. Hyperparameters are 0-d tensors.
        name: what messages call the optimizer.
        slots: the state from the vector of all parameters; shapes must not change.
        hyper: the hyperparameters, each one number for all leaves.
    """
    hypers = Hypers(hyper, name)
    for key, declared in hyper.items():
        _check_one(key, declared.value, name)

    def init(params: Tree) -> State:
        leaves, structure = tree.flatten(params)
        check_params(leaves, structure)
        x = _vector(leaves, leaves, _form(leaves, name))
        step = torch.zeros(len(leaves), dtype=torch.int64, device=x.device)
        return {"step": step, **slots(x)}

    def update(
        grads: Tree,
        state: State,
        params: Tree,
        *,
        loss_fn: Callable[[Tree], Tensor] | None = None,
        donate: bool = False,
        execution: str | None = None,
        **overrides: Any,
    ) -> tuple[Tree, State]:
        if not callable(loss_fn):
            raise HyperparameterTypeError(
                f"{name} evaluates the loss again: call update(grads, state, params, "
                f"loss_fn=a function of params that gives the loss), not {loss_fn!r}"
            )
        if execution not in (None, "reference"):
            raise ExecutionError(
                f"{name} steps all leaves as one vector, which only execution="
                f"'reference' does, not {execution!r}"
            )
        p, structure = tree.flatten(params)
        g = tree.flatten_like(structure, grads, "grads")
        live = [i for i, x in enumerate(g) if x is not None]
        check_leaves(g, p, {}, live, structure, {})
        like = _form(p, name)
        x = _vector(p, p, like)
        expected = slots(torch.empty_like(x, device="meta"))
        vectors = {"step": torch.int64}
        check_state(state, ("step", *expected), vectors, structure, name)
        old = {slot: state[slot] for slot in expected}
        _check_slots(old, expected, name)
        if donate:
            held = [leaf for leaf in p if leaf is not None]
            donation.check(
                [g[i] for i in live],
                [held, [state["step"], *old.values()]],
                tree.leaves(overrides),
            )
        for key, value in overrides.items():
            _check_one(key, value, name)
        count = state["step"].amax()[None] + 1 if p else torch.ones(1)
        # All leaves are one to the hyperparameters, too.
        (row,) = hypers.per_leaf(
            overrides, tree.flatten(x)[1], [x], levels.scalars_of(count)
        )
        values = {
            key: v.to(x) if isinstance(v, Tensor) else x.new_tensor(v)
            for key, v in row.items()
        }

        def merged(x: Tensor) -> Tree:
            """The tree whose leaves with a gradient are parts of x."""
            sizes = [parts(leaf).numel() for leaf in p if leaf is not None]
            pieces = iter(x.split(sizes))
            new = [leaf if leaf is None else _like(next(pieces), leaf) for leaf in p]
            chosen = [p[i] if g[i] is None else leaf for i, leaf in enumerate(new)]
            return tree.unflatten(structure, chosen)

        moves = None
        if len(live) < sum(leaf is not None for leaf in p):
            marks = [
                None if leaf is None else torch.full_like(parts(leaf), g[i] is not None)
                for i, leaf in enumerate(p)
            ]
            moves = _vector(marks, p, like) > 0
        found, kept = rule(
            lambda x: loss_fn(merged(x)), _vector(g, p, like), x, old, moves, **values
        )
        stepped = [int(grad is not None) for grad in g]
        step = state["step"] + torch.tensor(stepped, device=state["step"].device)
        new = tree.map(torch.clone, merged(found))  # no parts of one another's memory
        new_state = {"step": step, **kept}
        if donate:
            return donation.write_over((params, state), (new, new_state))
        return new, new_state

    public = {key: declared.value for key, declared in hyper.items()}
    return Optimizer(init, update, name, {**public, "loss_fn": None})


def _form(leaves: Sequence[Any], name: str) -> dict[str, Any]:
    """The dtype and device of the vector of all leaves."""
    found = [leaf for leaf in leaves if leaf is not None]
    devices = {leaf.device for leaf in found} or {torch.device("cpu")}
    if len(devices) > 1:
        raise LeafError(
            f"{name} makes one vector of all parameters: they must be on one device, not "
            f"on {', '.join(sorted(map(str, devices)))}"
        )
    dtype = torch.float32
    for leaf in found:
        dtype = torch.promote_types(dtype, parts(leaf).dtype)
    return {"dtype": dtype, "device": devices.pop()}


def _vector(
    leaves: Sequence[Any], params: Sequence[Any], like: Mapping[str, Any]
) -> Tensor:
    """The leaves in a row, 0 for those that are None where params are not."""
    pieces = [
        torch.zeros(parts(p).numel(), **like)
        if x is None
        else _reals(x).reshape(-1).to(like["dtype"])
        for x, p in zip(leaves, params)
        if p is not None
    ]
    return torch.cat(pieces) if pieces else torch.zeros(0, **like)


# A complex number cannot begin anywhere in memory, as its parts in the vector do: they
# are copied, and not viewed, for the sake of their gradients, too.


def _reals(leaf: Tensor) -> Tensor:
    return torch.stack([leaf.real, leaf.imag], -1) if leaf.is_complex() else leaf


def _like(piece: Tensor, leaf: Tensor) -> Tensor:
    """The part of the vector that is the leaf's, in its form."""
    piece = piece.view(parts(leaf).shape).to(parts(leaf).dtype)
    return torch.complex(*piece.unbind(-1)) if leaf.is_complex() else piece


def _check_slots(
    slots: Mapping[str, Tensor], expected: Mapping[str, Tensor], name: str
) -> None:
    for slot, like in expected.items():
        found = slots[slot]
        if not isinstance(found, Tensor) or found.dtype is not like.dtype:
            kind = found.dtype if isinstance(found, Tensor) else type(found).__name__
            raise LeafError(
                f"{name}'s state['{slot}'] is {kind}, it must be {like.dtype}"
            )
        if found.shape != like.shape:
            raise StructureError(
                f"{name}'s state['{slot}'] has shape {tuple(found.shape)}, for these "
                f"parameters it must be {tuple(like.shape)}: this state is another "
                "tree's, or was made with other arguments; use opt.init(params)"
            )


def _check_one(key: str, value: Any, name: str) -> None:
    """It must be one number for all leaves; of what range, is seen elsewhere."""
    shape = value.shape if isinstance(value, Tensor) else ()
    if shape or isinstance(value, (Mapping, Sequence, ByName)):
        given = f"a tensor of shape {tuple(shape)}" if shape else repr(value)
        raise HyperparameterError(
            f"{name} steps all leaves as one: {key} must be a float, a 0-d tensor or a "
            f"Schedule of them, not {given}"
        )
