"""Optimizer: a rule on one leaf becomes two pure functions on trees."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, final

import torch

from funcopt.errors import HyperparameterTypeError
from funcopt.hyper import Hyper
from funcopt.spec import Spec, Totals
from funcopt.stepping.stepper import Stepper
from funcopt.types import (
    HyperValue,
    InitFunction,
    RuleFunction,
    SlotStart,
    State,
    Tree,
    UpdateFunction,
)


def _themselves(state: State, params: Tree, **hyper: HyperValue) -> Tree:
    return params


@final
@dataclass(frozen=True, eq=False)
class Optimizer:
    """Two pure functions on trees of tensors; a value without hidden state.

    ``init(params) -> state`` gives the state before the first step: a dict with
    ``"step"`` (int64, one entry per leaf, on the CPU) and for every slot a tree like
    ``params``, or a float64 vector where the slot is one number per leaf.

    ``update(grads, state, params, **hyper) -> (params, state)`` makes one step and
    changes none of its arguments. Both results have the structure, shapes, dtypes and
    devices of what came in. ``hyper`` replaces hyperparameters for this call. It is
    differentiable in everything, and works under every torch.func transform and under
    ``torch.compile``.

    Args:
        init: the first function.
        update: the second function. One of your own also takes the keywords ``donate``
            and ``execution``, which it may ignore: `partition` and the like hand them on.
        name: what the optimizer is called in messages.
        hyper: what ``update`` takes as keywords, with the values they have: the
            hyperparameters; and ``loss_fn``, None, where it wants a function of params
            that gives the loss.
        spec: the rule it steps by, if it is one.
        eval_params: ``eval_params(state, params, **hyper)``: what to evaluate a model
            with, a tree like params. An average where the optimizer keeps one (`ema`,
            `lookahead`, `schedule_free_sgd`, `asgd`), else params themselves. ``hyper``
            is what ``update`` was given in place of the optimizer's own values.

    Raises:
        StructureError: a tree that does not fit params, a leaf of another shape.
        LeafError: a leaf that is no dense floating-point or complex tensor, a complex one
            for a rule that takes its leaf whole, or a gradient of another dtype or device
            than its parameter.
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
    spec: Spec | None = None
    eval_params: Callable[..., Tree] = _themselves

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
    totals: Totals | None = None,
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
        totals: sums over the whole tree that the rule needs, by the names under which
            it gets them (0-d float64 tensors): functions of the rule's own arguments
            that give a 0-d sum over their leaf. They cost a sweep of what they read.

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
    return from_spec(Spec(rule, name, slots, hyper, totals=(totals,) if totals else ()))


def per_tensor(
    rule: RuleFunction,
    *,
    name: str,
    slots: Mapping[str, SlotStart],
    hyper: Mapping[str, Hyper],
    norms: bool = False,
    matrices: bool = False,
    stacks: int = 0,
) -> Optimizer:
    """An Optimizer from a rule that needs its leaf whole: a norm, a matrix product.

    No executor may split such a leaf, or write the rule as an elementwise kernel. Leaves
    that are alike in all but their numbers are stacked, and the rule is called once for
    them, under ``torch.vmap`` unless it takes a stack as it is.

    Args:
        rule: as in `elementwise`.
        name: as in `elementwise`.
        slots: as in `elementwise`; but what a slot holds may be of any shape and dtype,
            as long as the parameter's shape and dtype determine it. A leaf that has no
            use for a slot holds an empty tensor.
        hyper: as in `elementwise`.
        norms: that the rule sees its leaf whole only in sums and norms over all of it
            (``x.sum()``, ``torch.linalg.vector_norm(x)``), and does the same whatever
            its shape. Kernels then run a plain step: a sweep of the leaf for the sums,
            added in float64, and a sweep for what follows from them. Slots are then as
            in `elementwise`.
        matrices: that a leaf must have two axes; ``init`` raises for others.
        stacks: not 0 says that the rule, given all tensors with one more axis in front,
            steps each leaf along it as if alone, as ``torch.matmul`` and its kin do.
            That takes a fraction of what ``torch.vmap`` takes. The number is that of
            elements up to which leaves are faster so than one by one, on a CPU.

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
    return from_spec(Spec(rule, name, slots, hyper, False, norms, matrices, stacks))


def from_spec(spec: Spec) -> Optimizer:
    """The Optimizer that steps by one rule."""
    stepper = Stepper(spec)
    public = {key: declared.value for key, declared in spec.hyper.items()}
    return Optimizer(
        stepper.init, stepper.update, spec.name, public, spec, stepper.eval_params
    )


def check_optimizer(given: Any, taker: str) -> None:
    """``given`` must be an Optimizer, for ``taker`` to make use of it."""
    if isinstance(given, Optimizer):
        return
    way = "; what fo.sgd(lr=0.1) gives is one"
    if isinstance(given, torch.optim.Optimizer):
        way = "; fo.from_torch makes one of it"
    elif callable(given):
        way = f"; call it: fo.{getattr(given, '__name__', 'sgd')}(...)"
    raise HyperparameterTypeError(f"{taker} takes an Optimizer, not {given!r}{way}")
