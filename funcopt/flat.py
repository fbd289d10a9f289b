"""Optimizers that see all leaves as one vector, and ask for the loss again."""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch

from funcopt import tree
from funcopt.checks import check_leaves, check_params, check_state
from funcopt.conditions import Number, alone
from funcopt.errors import (
    ExecutionError,
    HyperparameterError,
    HyperparameterTypeError,
    LeafError,
    StructureError,
)
from funcopt.execution import autocast, concrete, donation, own_dtype
from funcopt.hyper import Hyper
from funcopt.optimizer import Optimizer
from funcopt.select import ByName
from funcopt.stepping import one_vector, pages, vectors
from funcopt.stepping.per_leaf import Hypers
from funcopt.types import State, Tensor, Tree

#: a function of the vector of all parameters that gives the loss's gradient, and the loss
Slope = Callable[[Tensor], tuple[Tensor, Tensor]]
#: the rule of `flat`
FlatRule = Callable[..., tuple[Tensor, dict[str, Tensor]]]


def flat(
    rule: FlatRule,
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
            may write over slots, and return them. Hyperparameters are 0-d tensors,
            or floats where nobody follows what is computed.
        name: what messages call the optimizer.
        slots: the state from the vector of all parameters; shapes must not change.
        hyper: the hyperparameters, each one number for all leaves.
    """
    for key, declared in hyper.items():
        _check_one(key, declared.value, name)
    its = _Flat(rule, name, slots, hyper)
    public = {key: declared.value for key, declared in hyper.items()}
    return Optimizer(its.init, its.update, name, {**public, "loss_fn": None})


class _Flat:
    """``init`` and ``update`` of one rule on one vector."""

    def __init__(
        self,
        rule: FlatRule,
        name: str,
        slots: Callable[[Tensor], dict[str, Tensor]],
        hyper: Mapping[str, Hyper],
    ) -> None:
        self.rule = rule
        self.name = name
        self.slots = slots
        self.hypers = Hypers(hyper, name)

    def init(self, params: Tree) -> State:
        leaves, structure = tree.flatten(params)
        check_params(leaves, structure)
        x = one_vector.joined(leaves, leaves, one_vector.form_of(leaves, self.name))
        return {"step": vectors.first_steps(leaves), **self.slots(x)}

    def update(
        self,
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
                f"{self.name} evaluates the loss again: call update(grads, state, "
                "params, loss_fn=a function of params that gives the loss), not "
                f"{loss_fn!r}"
            )
        _check_given(value, execution, self.name)
        p, structure = tree.flatten(params)
        g = tree.flatten_like(structure, grads, "grads")
        live = [i for i, x in enumerate(g) if x is not None]
        check_leaves(g, p, {}, live, structure, {})
        like = one_vector.form_of(p, self.name)
        x = one_vector.joined(p, p, like)
        old = self._held(state, x, structure)
        if donate:
            donation.check(
                tree.present(g),
                [tree.present(p), [state["step"], *old.values()]],
                tree.leaves(overrides),
            )
        loss = _Loss(loss_fn, structure, g, p, x)
        values = self._values(overrides, state["step"], x, loss.alone)
        with own_dtype.keeping():  # which is about the loss
            found, kept = self.rule(
                loss.slope,
                loss(x) if value is None else value,
                one_vector.joined(g, p, like),
                x,
                old,
                one_vector.moving(g, p, like),
                donate=donate,
                **values,
            )
        stepped = [int(grad is not None) for grad in g]
        step = state["step"] + torch.tensor(stepped, device=state["step"].device)
        new = tree.unflatten(structure, loss.leaves(found))
        new_state = {"step": step, **kept}
        if donate:
            return donation.write_over((params, state), (new, new_state))
        return tree.map(torch.clone, new), new_state  # no parts of one another's memory

    def _held(self, state: State, x: Tensor, structure: tree.Structure) -> State:
        """The state's slots, if they are those of x."""
        expected = _slots_of(self.slots, x.shape[0], x.dtype)
        keys = ("step", *expected)
        check_state(state, keys, {"step": torch.int64}, structure, self.name)
        old = {slot: state[slot] for slot in expected}
        _check_slots(old, expected, self.name)
        return old

    def _values(
        self, overrides: Mapping[str, Any], steps: Tensor, x: Tensor, plain: bool
    ) -> dict[str, Number]:
        """The hyperparameters of this step, to which all leaves are one, too."""
        for key, override in overrides.items():
            _check_one(key, override, self.name)
        count: list[Any] = [1]
        if (overrides or self.hypers.varying) and steps.numel():
            count = concrete.scalars_of(steps.amax()[None] + 1)
        (row,) = self.hypers.per_leaf(overrides, tree.flatten(x)[1], [x], count)
        number = float if plain else x.new_tensor
        return {
            key: v.to(x) if isinstance(v, Tensor) else number(v) for key, v in row.items()
        }


@lru_cache(maxsize=256)
def _slots_of(
    slots: Callable[[Tensor], dict[str, Tensor]], size: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    """What the state of a vector looks like."""
    return slots(torch.empty(size, dtype=dtype, device="meta"))


class _Loss:
    """The loss as a function of the vector of all parameters.

    It is evaluated as torch.autocast chooses where this is made.
    """

    def __init__(
        self,
        loss_fn: Callable[[Tree], Tensor],
        structure: tree.Structure,
        grads: Sequence[Any],
        params: Sequence[Any],
        x: Tensor,
    ) -> None:
        self.loss_fn = loss_fn
        self.structure = structure
        self.grads = grads
        self.params = params
        self._autocast = autocast.chosen()
        self._live = [i for i, g in enumerate(grads) if g is not None]
        self.alone = alone(x) and not torch.is_inference_mode_enabled()
        self._pieces = one_vector.splitter(params, x.dtype, self.alone)

    def leaves(self, x: Tensor) -> list[Any]:
        """The leaves with a gradient as parts of x, and the others."""
        pieces = iter(self._pieces(x))
        new = [p if p is None else next(pieces) for p in self.params]
        rows = zip(new, self.params, self.grads)
        return [p if g is None else leaf for leaf, p, g in rows]

    def __call__(self, x: Tensor) -> Tensor:
        return self._of(self.leaves(x))

    def _of(self, leaves: list[Any]) -> Tensor:
        with autocast.choosing(self._autocast):
            return self.loss_fn(tree.unflatten(self.structure, leaves))

    def slope(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The loss's gradient, and its value."""
        if not self.alone:
            return self._transformed(x)
        # What nobody differentiates or watches autograd does alone, in half the time.
        leaves, slopes = self.leaves(x), [*self.grads]
        asked = [leaves[i].requires_grad_() for i in self._live]
        with torch.enable_grad():
            value = self._of(leaves)
        if value.ndim or not (asked and value.requires_grad):
            return self._transformed(x)  # which has the words for it
        found = torch.autograd.grad(value, asked, allow_unused=True)  # None is 0, too
        for i, slope in zip(self._live, found):
            slopes[i] = slope
        like = {"dtype": x.dtype, "device": x.device}
        memory = pages.large_like(x)
        g = one_vector.joined(slopes, self.params, like, memory, alone=True)
        return g, value.detach()

    def _transformed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        transformed: Any = torch.func.grad_and_value(self)
        return transformed(x)


def _check_given(value: Any, execution: str | None, name: str) -> None:
    if value is not None and not (isinstance(value, Tensor) and not value.ndim):
        given = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else value
        raise HyperparameterTypeError(
            f"{name}'s value is the loss at params, a 0-d tensor, not {given}"
        )
    if execution not in (None, "reference"):
        raise ExecutionError(
            f"{name} steps all leaves as one vector, which only execution='reference' "
            f"does, not {execution!r}"
        )


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
    several = isinstance(value, (Mapping, Sequence, ByName))
    if shape or several and not isinstance(value, str):
        given = f"a tensor of shape {tuple(shape)}" if shape else repr(value)
        raise HyperparameterError(
            f"{name} steps all leaves as one: {key} must be a float, a 0-d tensor or a "
            f"Schedule of them, not {given}"
        )
