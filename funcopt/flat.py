"""Optimizers that see all leaves as one vector, and ask for the loss again."""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch

from funcopt import tree
from funcopt.checks import check_leaves, check_params, check_state
from funcopt.conditions import alone
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

#: a function of the vector of all parameters that gives the loss's gradient, and the loss
Slope = Callable[[Tensor], tuple[Tensor, Tensor]]


def flat(
    rule: Callable[..., tuple[Tensor, dict[str, Tensor]]],
    *,
    name: str,
    slots: Callable[[Tensor], dict[str, Tensor]],
    hyper: Mapping[str, Hyper],
) -> Optimizer:
    """An Optimizer from a rule on one vector and its loss.

    Args:
        rule: ``rule(slope, f, g, x, slots, moves, donate=..., **hyper) -> (x, slots)``,
            all values of x's dtype, the widest of the leaves' and float32 at least, but
            for the loss f. ``slope(x)`` gives the gradient and the loss of any x.
            ``moves`` is None or False for the elements of leaves without a gradient:
            there g is 0, and what the rule returns is not looked at. With ``donate`` it
            may write over slots, and return them. Hyperparameters are 0-d tensors.
        name: what messages call the optimizer.
        slots: the state from the vector of all parameters; shapes must not change.
        hyper: the hyperparameters, each one number for all leaves.
    """
    hypers = Hypers(hyper, name)
    for key, declared in hyper.items():
        _check_one(key, declared.value, name)

    @cache
    def form_of(size: int, dtype: torch.dtype) -> dict[str, Tensor]:
        return slots(torch.empty(size, dtype=dtype, device="meta"))

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
        value: Tensor | None = None,
        donate: bool = False,
        execution: str | None = None,
        **overrides: Any,
    ) -> tuple[Tree, State]:
        if not callable(loss_fn):
            raise HyperparameterTypeError(
                f"{name} evaluates the loss again: call update(grads, state, params, "
                f"loss_fn=a function of params that gives the loss), not {loss_fn!r}"
            )
        if value is not None and not (isinstance(value, Tensor) and not value.ndim):
            given = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else value
            raise HyperparameterTypeError(
                f"{name}'s value is the loss at params, a 0-d tensor, not {given}"
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
        held = [leaf for leaf in p if leaf is not None]
        like, sizes = _form(p, name), [parts(leaf).numel() for leaf in held]
        x = _vector(p, p, like)
        expected = form_of(x.shape[0], x.dtype)
        vectors = {"step": torch.int64}
        check_state(state, ("step", *expected), vectors, structure, name)
        old = {slot: state[slot] for slot in expected}
        _check_slots(old, expected, name)
        if donate:
            donation.check(
                [g[i] for i in live],
                [held, [state["step"], *old.values()]],
                tree.leaves(overrides),
            )
        for key, override in overrides.items():
            _check_one(key, override, name)
        count = state["step"].amax()[None] + 1 if p else torch.ones(1)
        # All leaves are one to the hyperparameters, too.
        (row,) = hypers.per_leaf(
            overrides, tree.flatten(x)[1], [x], levels.scalars_of(count)
        )
        values = {
            key: v.to(x) if isinstance(v, Tensor) else x.new_tensor(v)
            for key, v in row.items()
        }

        def leaves_of(x: Tensor) -> list[Any]:
            """The leaves with a gradient as parts of x, and the others."""
            pieces = iter(x.split(sizes))
            new = [leaf if leaf is None else _like(next(pieces), leaf) for leaf in p]
            return [p[i] if g[i] is None else leaf for i, leaf in enumerate(new)]

        def loss(x: Tensor) -> Tensor:
            return loss_fn(tree.unflatten(structure, leaves_of(x)))

        def slope(x: Tensor) -> tuple[Tensor, Tensor]:
            """The loss's gradient, and its value."""
            transformed: Any = torch.func.grad_and_value(loss)
            if not alone(x) or torch.is_inference_mode_enabled():
                return transformed(x)
            # What nobody differentiates or watches autograd does alone, in half the time.
            asked = x.detach().requires_grad_()
            with torch.enable_grad():
                value = loss(asked)
            if value.ndim or not value.requires_grad:
                return transformed(x)  # which has the words for it
            (slopes,) = torch.autograd.grad(value, asked, materialize_grads=True)
            return slopes, value.detach()

        moves = None
        if len(live) < sum(leaf is not None for leaf in p):
            marks = [
                None if leaf is None else torch.full_like(parts(leaf), g[i] is not None)
                for i, leaf in enumerate(p)
            ]
            moves = _vector(marks, p, like) > 0
        if value is None:
            value = loss(x)
        found, kept = rule(
            slope, value, _vector(g, p, like), x, old, moves, donate=donate, **values
        )
        stepped = [int(grad is not None) for grad in g]
        step = state["step"] + torch.tensor(stepped, device=state["step"].device)
        new = tree.unflatten(structure, leaves_of(found))
        new_state = {"step": step, **kept}
        if donate:
            return donation.write_over((params, state), (new, new_state))
        return tree.map(torch.clone, new), new_state  # no parts of one another's memory

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
        torch.zeros(parts(p).numel(), **like) if x is None else _reals(x).reshape(-1)
        for x, p in zip(leaves, params)
        if p is not None
    ]
    pieces = [x if x.dtype is like["dtype"] else x.to(like["dtype"]) for x in pieces]
    return torch.cat(pieces) if pieces else torch.zeros(0, **like)


# A complex number cannot begin anywhere in memory, as its parts in the vector do: they
# are copied, and not viewed, for the sake of their gradients, too.


def _reals(leaf: Tensor) -> Tensor:
    return torch.stack([leaf.real, leaf.imag], -1) if leaf.is_complex() else leaf


def _like(piece: Tensor, leaf: Tensor) -> Tensor:
    """The part of the vector that is the leaf's, in its form."""
    if leaf.dtype is piece.dtype:
        return piece.view(leaf.shape)
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
