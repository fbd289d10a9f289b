"""Optimizer: a rule on one leaf becomes two pure functions on trees."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, final

import torch

from funcopt import tree
from funcopt.checks import check_leaves, check_params, check_state
from funcopt.errors import HyperparameterError
from funcopt.execution import dispatch, levels
from funcopt.execution.lane import Lane
from funcopt.execution.leaves import Leaves
from funcopt.execution.rule import Rule
from funcopt.hyper import Hyper, Hypers
from funcopt.types import (
    HyperMapping,
    HyperValue,
    InitFunction,
    RuleFunction,
    SlotStart,
    State,
    Tensor,
    Tree,
    UpdateFunction,
)

_MOST_LANES = 64  # structures of params that one optimizer remembers


@final
@dataclass(frozen=True, eq=False)
class Optimizer:
    """Two pure functions on trees of tensors; a value without hidden state.

    ``init(params) -> state`` gives the state before the first step: a dict with
    ``"step"`` (int64, one entry per leaf) and for every slot a tree like ``params``, or
    a float64 vector where the slot is one number per leaf.

    ``update(grads, state, params, **hyper) -> (params, state)`` makes one step and
    changes none of its arguments. Both results have the structure, shapes, dtypes and
    devices of what came in. ``hyper`` replaces hyperparameters for this call. It is
    differentiable in everything, and works under every torch.func transform and under
    ``torch.compile``.

    Args:
        init: the first function.
        update: the second function.
        name: what the optimizer is called in messages.
        hyper: the hyperparameters that ``update`` takes, with the values they have.

    Raises:
        StructureError: a tree that does not fit params, a leaf of another shape.
        LeafError: a leaf that is no dense floating-point tensor, or a gradient of
            another dtype or device than its parameter.
        UnknownHyperparameterError, HyperparameterError, HyperparameterTypeError: by
            ``update``, for what ``hyper`` names.

    Source:
        The shape of the interface is optax's (DeepMind, 2020), except that parameters
        come out and not updates.

    Example:
        >>> import torch, funcopt as fo
        >>> opt = fo.sgd(lr=0.1)
        >>> init, update = opt
        >>> params = {"w": torch.tensor([1.0, 2.0])}
        >>> params, state = update({"w": torch.ones(2)}, init(params), params)
        >>> params["w"], state["step"]
        (tensor([0.9000, 1.9000]), tensor([1]))
    """

    init: InitFunction
    update: UpdateFunction
    name: str = "optimizer"
    hyper: Mapping[str, HyperValue] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Callable[..., Any]]:
        yield self.init
        yield self.update

    def __repr__(self) -> str:
        values = ", ".join(f"{name}={value!r}" for name, value in self.hyper.items())
        return f"{self.name}({values})"


def elementwise(
    rule: RuleFunction,
    *,
    name: str,
    slots: Mapping[str, SlotStart],
    hyper: Mapping[str, Hyper],
) -> Optimizer:
    """An Optimizer from a rule that treats every element of a leaf alike.

    Args:
        rule: ``rule(g, p, *slots, step, **hyper) -> (p, *slots)``, plain arithmetic on
            one leaf: no in-place operation, no ``.item()``, no ``if`` on a tensor.
            ``step`` counts from 1 and is an int or a 0-d float64 tensor. Hyperparameters
            are floats, 0-d float64 tensors, or tensors that broadcast to the leaf.
            float16 and bfloat16 leaves reach it as float32.
        name: what messages call the optimizer.
        slots: the names of the state, in the rule's order, with what makes the first
            value from a parameter (``torch.zeros_like``). A number in its place makes it
            a scalar slot: one number per leaf, kept as a float64 vector, which the rule
            gets and returns as a float or a 0-d float64 tensor.
        hyper: the hyperparameters, under their public names.

    Returns:
        The optimizer.

    Raises:
        HyperparameterError, HyperparameterTypeError: a value that may not be.

    Source:
        funcopt.

    Example:
        >>> import torch, funcopt as fo
        >>> from funcopt.hyper import Hyper
        >>> def signum(g, p, exp_avg, *, step, lr, beta):
        ...     exp_avg = beta * exp_avg + (1 - beta) * g
        ...     return p - lr * torch.sign(exp_avg), exp_avg
        >>> opt = fo.elementwise(
        ...     signum, name="signum", slots={"exp_avg": torch.zeros_like},
        ...     hyper={"lr": Hyper(0.1), "beta": Hyper(0.9, below=1.0)})
        >>> p = torch.tensor([1.0, -1.0])
        >>> opt.update(p, opt.init(p), p)[0]
        tensor([ 0.9000, -0.9000])
    """
    return _from_rule(rule, name, slots, hyper)


def per_tensor(
    rule: RuleFunction,
    *,
    name: str,
    slots: Mapping[str, SlotStart],
    hyper: Mapping[str, Hyper],
    norms: bool = False,
) -> Optimizer:
    """An Optimizer from a rule that needs its leaf whole: a norm, a matrix product.

    The same as `elementwise` in every argument but one; no executor may split such a
    leaf, join it with others, or write the rule as an elementwise kernel.

    Args:
        rule: as in `elementwise`.
        name: as in `elementwise`.
        slots: as in `elementwise`.
        hyper: as in `elementwise`.
        norms: that the rule sees its leaf whole only in sums and norms over all of it
            (``x.sum()``, ``torch.linalg.vector_norm(x)``), and does the same whatever
            its shape. Kernels then run a plain step: a sweep of the leaf for the sums,
            added in float64, and a sweep for what follows from them.

    Returns:
        The optimizer.

    Raises:
        HyperparameterError, HyperparameterTypeError: a value that may not be.

    Source:
        funcopt.

    Example:
        >>> import torch, funcopt as fo
        >>> from funcopt.hyper import Hyper
        >>> def normalized(g, p, *, step, lr):
        ...     return (p - lr * g / torch.linalg.vector_norm(g),)
        >>> opt = fo.per_tensor(
        ...     normalized, name="normalized", slots={}, hyper={"lr": Hyper(1.0)})
        >>> p = torch.tensor([3.0, 4.0])
        >>> opt.update(p, opt.init(p), p)[0]
        tensor([2.4000, 3.2000])
    """
    return _from_rule(rule, name, slots, hyper, elementwise=False, norms=norms)


def _from_rule(
    rule: RuleFunction,
    name: str,
    slots: Mapping[str, SlotStart],
    hyper: Mapping[str, Hyper],
    elementwise: bool = True,
    norms: bool = False,
) -> Optimizer:
    hypers = Hypers(hyper, name)
    keys = ("step", *slots)
    scalar = {slot: not callable(first) for slot, first in slots.items()}
    trees_of = [slot for slot in slots if not scalar[slot]]
    lanes: dict[tree.Structure, Lane] = {}
    made = Rule(
        rule,
        name,
        tuple(scalar.values()),
        tuple(hypers.arguments),
        elementwise,
        norms,
    )
    vectors = {"step": torch.int64} | {s: torch.float64 for s in slots if scalar[s]}

    def init(params: Tree) -> State:
        leaves, structure = tree.flatten(params)
        check_params(leaves, structure)
        state: State = {"step": _filled(leaves, 0, torch.int64)}
        for slot, first in slots.items():
            if callable(first):
                values = [None if p is None else first(p.detach()) for p in leaves]
                state[slot] = tree.unflatten(structure, values)
            else:
                state[slot] = _filled(leaves, first, torch.float64)
        return state

    def again(
        lane: Lane,
        structure: tree.Structure,
        grads: Tree,
        state: State,
        params: Tree,
        p: list[Any],
        donate: bool,
        overrides: HyperMapping,
    ) -> tuple[Tree, State] | None:
        """A step like an earlier one, by the way that one took; None if it is not."""
        try:
            streams = [structure.flatten_up_to(grads), p]
            streams += [structure.flatten_up_to(state[slot]) for slot in trees_of]
            held = [state[key] for key in vectors]
        except (KeyError, TypeError, ValueError):
            return None  # where the words for it are found
        if len(state) != len(keys) or not lane.admits([*chain(*streams), *held]):
            return None
        steps, *numbers = [vector.tolist() for vector in held]
        steps = [step + 1 for step in steps]
        values = hypers.per_leaf(overrides, structure, p, steps)
        columns = lane.run(streams, [*numbers, steps], values, donate)
        if columns is None:
            return None
        if donate:
            state["step"].add_(1)
        else:
            params = tree.unflatten(structure, columns[0])
            new_state: State = {"step": state["step"] + 1}
        for slot, column in zip(slots, columns[1:]):
            if donate and scalar[slot]:
                state[slot].copy_(torch.tensor(column, dtype=torch.float64))
            elif not donate:
                new_state[slot] = (
                    torch.tensor(column, dtype=torch.float64)
                    if scalar[slot]
                    else tree.unflatten(structure, column)
                )
        return params, state if donate else new_state

    def update(
        grads: Tree,
        state: State,
        params: Tree,
        *,
        donate: bool = False,
        execution: str | None = None,
        **overrides: HyperValue,
    ) -> tuple[Tree, State]:
        p, structure = tree.flatten(params)
        compiling = torch.compiler.is_compiling()
        known = None if compiling or execution else lanes.get(structure)
        if known is not None and dispatch.is_free():
            done = again(known, structure, grads, state, params, p, donate, overrides)
            if done is not None:
                return done
        g = tree.flatten_like(structure, grads, "grads")
        check_state(state, keys, vectors, structure, name)
        trees = {
            slot: tree.flatten_like(structure, state[slot], f"state['{slot}']")
            for slot in trees_of
        }
        live = _live(g, p)
        check_leaves(g, p, trees, live, structure)
        old = {
            slot: levels.scalars_of(state[slot]) if scalar[slot] else trees[slot]
            for slot in slots
        }
        steps = _next_steps(state["step"], live)
        numbers = levels.scalars_of(steps)
        values = hypers.per_leaf(overrides, structure, p, numbers)
        leaves = Leaves(
            made,
            _pick(g, live),
            _pick(p, live),
            [_pick(column, live) for column in old.values()],
            _pick(numbers, live),
            _pick(values, live),
        )
        columns, lane = dispatch.step(
            leaves, execution, donate, [state[key] for key in vectors]
        )
        if lane is not None and live is None and len(lanes) < _MOST_LANES:
            lanes[structure] = lane
        new_params, *columns = _merge((p, *old.values()), columns, live)
        new_state: State = {"step": steps}
        for slot, column in zip(slots, columns):
            new_state[slot] = (
                _vector(column, state[slot], f"{name}'s '{slot}'", structure)
                if scalar[slot]
                else tree.unflatten(structure, column)
            )
        if donate:
            for key in vectors:
                state[key].copy_(new_state[key])
            return params, state
        return tree.unflatten(structure, new_params), new_state

    public = {key: declared.value for key, declared in hyper.items()}
    return Optimizer(init, update, name, public)


def _live(grads: Sequence[Any], params: Sequence[Any]) -> list[int] | None:
    """Which leaves have a gradient; None says all."""
    if all(g is not None for g in grads) and all(p is not None for p in params):
        return None
    return [i for i, g in enumerate(grads) if g is not None]


def _pick(column: Sequence[Any], live: list[int] | None) -> Sequence[Any]:
    return column if live is None else [column[i] for i in live]


def _merge(
    columns: Sequence[Sequence[Any]],
    new: Sequence[Sequence[Any]],
    live: list[int] | None,
) -> Sequence[Sequence[Any]]:
    """The columns with the live leaves' new values in them."""
    if live is None:
        return new
    merged = [list(column) for column in columns]
    for column, values in zip(merged, new):
        for i, value in zip(live, values):
            column[i] = value
    return merged


def _filled(leaves: Sequence[Any], value: float, dtype: torch.dtype) -> Tensor:
    """A vector with ``value`` for each leaf."""
    devices = {p.device for p in leaves if p is not None}
    device = devices.pop() if len(devices) == 1 else torch.device("cpu")
    return torch.full((len(leaves),), value, dtype=dtype, device=device)


def _vector(
    column: Sequence[Any], old: Tensor, what: str, structure: tree.Structure
) -> Tensor:
    """The numbers of a scalar slot, floats or 0-d tensors, as the next ``old``."""
    like = {"dtype": torch.float64, "device": old.device}
    if all(isinstance(x, float) for x in column):
        return torch.tensor(column, **like)
    for i, x in enumerate(column):
        if isinstance(x, Tensor) and x.ndim:
            raise HyperparameterError(
                f"{what} is one number per leaf, but at '{tree.paths(structure)[i]}' it "
                f"would have shape {tuple(x.shape)}: the hyperparameters that it is made "
                "of must be floats or 0-d tensors"
            )
    return torch.stack([torch.as_tensor(x, **like) for x in column])


def _next_steps(steps: Tensor, live: list[int] | None) -> Tensor:
    """Steps count per leaf: a leaf without a gradient does not step."""
    if live is None:
        return steps + 1
    mask = [0] * steps.shape[0]
    for i in live:
        mask[i] = 1
    return steps + torch.tensor(mask, device=steps.device)
