"""Between torch.optim's objects and funcopt's Optimizers, both ways."""

import functools
import inspect
from typing import Any

import torch

from funcopt import tree
from funcopt.errors import ExecutionError, HyperparameterTypeError
from funcopt.optimizer import Optimizer, check_optimizer
from funcopt.spec import Spec
from funcopt.stepping.per_leaf import Hypers
from funcopt.torch_optim import functional, lbfgs
from funcopt.torch_optim.adapter import Adapter
from funcopt.torch_optim.generated import FACTORIES, class_of
from funcopt.types import State, Tensor, Tree


def from_torch(
    optimizer: torch.optim.Optimizer,
) -> tuple[Optimizer, Tree, State]:
    """A running torch.optim optimizer as an Optimizer, its parameters and its state.

    Args:
        optimizer: one of ``torch.optim``'s, or of ``funcopt.torch_optim``'s.

    Returns:
        ``(opt, params, state)``. ``params`` is a list with an entry for each group, a
        list of its parameters or a dict of named ones; ``opt`` has a group's numbers for
        its leaves, and where groups differ in flags it is a `partition`. Tensors are
        copies, which require no gradient: what follows may be differentiated.

    Raises:
        HyperparameterTypeError: an optimizer of another class.
        HyperparameterError: a number out of the range that the factory allows.

    Source:
        funcopt.

    Example:
        >>> import torch, funcopt as fo
        >>> p = torch.nn.Parameter(torch.tensor([1.0, -0.2]))
        >>> running = torch.optim.Adam([p], lr=0.1)
        >>> p.square().sum().backward(); running.step()
        >>> opt, params, state = fo.from_torch(running)
        >>> loss = lambda lr: opt.update(params, state, params, lr=lr)[0][0][0].sum()
        >>> torch.func.grad(loss)(torch.tensor(0.1))
        tensor(-0.0859)
    """
    if isinstance(optimizer, Adapter):
        return optimizer.functional()
    if isinstance(optimizer, torch.optim.LBFGS):
        return lbfgs.functional(optimizer)
    cls = _like(optimizer)
    groups, states = optimizer.param_groups, optimizer.state
    return functional.extract(groups, states, cls.flags, cls.layout)


def _like(optimizer: torch.optim.Optimizer) -> type[Adapter]:
    """The class of ours that steps as this one does."""
    for cls in type(optimizer).__mro__:
        if cls.__module__.startswith("torch.optim") and cls.__name__ in FACTORIES:
            return class_of(cls.__name__)
    raise HyperparameterTypeError(
        f"from_torch takes an optimizer of torch.optim or funcopt.torch_optim, not "
        f"{type(optimizer).__name__}"
    )


def to_torch(
    opt: Optimizer, params: Tree, state: State | None = None
) -> tuple[torch.optim.Optimizer, Tree]:
    """An Optimizer as a stateful one of ``funcopt.torch_optim``, and its parameters.

    Args:
        opt: made by a factory of the registry, as `funcopt.adamw`.
        params: a tree of tensors; a leaf that is a ``torch.nn.Parameter`` is used as it
            is, others are copied into one.
        state: of ``opt``; a fresh one unless given.

    Returns:
        ``(optimizer, parameters)``: leaves with the same numbers are a group, and bear
        their paths for names; parameters is a tree like ``params``. A `Schedule` stays at
        the value of the next step.

    Raises:
        HyperparameterTypeError: an Optimizer that no class stands for, as a `chain`.
        ExecutionError: a number with a value for each element of a leaf.

    Source:
        funcopt.

    Example:
        >>> import torch, funcopt as fo
        >>> opt = fo.sgd(lr=0.5)
        >>> optimizer, params = fo.to_torch(opt, {"w": torch.ones(2)})
        >>> params["w"].sum().backward(); optimizer.step(); params["w"].detach()
        tensor([0.5000, 0.5000])
    """
    check_optimizer(opt, "to_torch")
    title = next((t for t, name in FACTORIES.items() if name == opt.name), None)
    if title is None or opt.spec is None:
        raise HyperparameterTypeError(
            f"no class of funcopt.torch_optim steps as {opt.name} does; to_torch takes "
            "what a factory of the registry made"
        )
    cls, spec = class_of(title), opt.spec
    state = opt.init(params) if state is None else state
    leaves, structure = tree.flatten(params)
    held = [None if p is None else _parameter(p) for p in leaves]
    numbers = Hypers(spec.hyper, spec.name)
    rows = numbers.per_leaf({}, structure, leaves, (state["step"] + 1).tolist())
    slots = {name: slot in spec.slots for name, slot in _BY_SLOT.items()}
    static = {**_bound(spec), **slots}
    known = inspect.signature(cls).parameters
    groups: dict[int, dict[str, Any]] = {}
    for path, p, row in zip(tree.paths(structure), held, rows):
        if p is None:
            continue
        if any(isinstance(x, Tensor) and x.ndim for x in row.values()):
            raise ExecutionError(
                f"'{path}' has a number for each element, a group has one for all"
            )
        group = groups.setdefault(id(row), {"params": [], **_numbers(opt, row)})
        group["params"].append((path, p))
    # A constructor looks at defaults, too: at nesterov without a momentum, say.
    first: dict[str, Any] = next(iter(groups.values()), {})
    defaults = {k: v for k, v in {**static, **first}.items() if k in known}
    optimizer = cls(**{**defaults, "params": [*groups.values()]})
    for group in optimizer.param_groups:
        own = cls.flags.stepper(cls.flags.key(group)).spec
        if _formula(own) != _formula(spec):
            others = _bound(own)
            asked = (f"{k}={v!r}" for k, v in static.items() if others.get(k, v) != v)
            raise HyperparameterTypeError(
                f"torch_optim.{title} cannot step as this {opt.name} does: it has no "
                f"argument for {', '.join(asked)}"
            )
    columns = functional.slot_columns(state, spec, structure)
    place = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for i, (path, p) in enumerate(zip(tree.paths(structure), held)):
        if p is not None:
            values = {slot: column[i] for slot, column in columns.items()}
            functional.check_fits(path, p, p, spec, values)
            group, states = place[id(p)], optimizer.state
            functional.write(states, p, group, spec, cls.layout, values)
    return optimizer, tree.unflatten(structure, held)


def _bound(spec: Spec) -> dict[str, Any]:
    """The flags that a factory has bound to its functions, and to theirs."""
    found: dict[str, Any] = {}
    ahead: list[Any] = [spec.rule, *spec.slots.values()]
    for function in ahead:
        for name, value in getattr(function, "keywords", {}).items():
            found.setdefault(name, value)
            ahead.append(value)
    return found


def _formula(spec: Spec) -> tuple[Any, ...]:
    """What is equal for optimizers that differ in numbers at most."""
    return _unbound(spec.rule), {k: _unbound(v) for k, v in spec.slots.items()}


def _unbound(x: Any) -> Any:
    """A partial function as what is equal where function and arguments are."""
    if not isinstance(x, functools.partial):
        return x
    return _unbound(x.func), x.args, {k: _unbound(v) for k, v in x.keywords.items()}


#: flags that a slot tells
_BY_SLOT = {"amsgrad": "max_exp_avg_sq", "centered": "grad_avg"}


def _parameter(p: Tensor) -> Tensor:
    if isinstance(p, torch.nn.Parameter):
        return p
    return torch.nn.Parameter(p.detach().clone())


def _numbers(opt: Optimizer, row: dict[str, Any]) -> dict[str, Any]:
    """A group's keys of the rule's keyword arguments."""
    assert opt.spec is not None
    found: dict[str, Any] = {}
    for name, declared in opt.spec.hyper.items():
        if declared.parts:
            found[name] = tuple(row.get(part) for part in declared.parts)
        else:
            found[name] = row.get(name)  # none where each step is to be given one
    return found
