"""A group's keys: which of them choose the formula, and which are the rule's numbers."""

import inspect
from collections.abc import Callable, Mapping
from functools import lru_cache
from numbers import Real
from typing import Any, SupportsFloat

import torch

from funcopt.errors import HyperparameterError, HyperparameterTypeError
from funcopt.optimizer import Optimizer
from funcopt.spec import Spec
from funcopt.stepping.stepper import Stepper
from funcopt.types import Tensor

#: what torch.optim's groups say of how a step is run; ours follow `differentiable`
EXECUTION: dict[str, Any] = {
    "foreach": None,
    "capturable": False,
    "differentiable": False,
    "fused": None,
}


class Flags:
    """A factory's keyword arguments: flags that choose the formula, and numbers."""

    def __init__(self, factory: Callable[..., Optimizer]) -> None:
        self.factory = factory
        self.signature = inspect.signature(factory)
        names = self.signature.parameters
        made = factory()
        self.vanishing = ()  #: numbers that leave a slot out where they are 0
        if "momentum" in names and "momentum" not in factory(momentum=0.0).hyper:
            made, self.vanishing = factory(momentum=0.5), ("momentum",)
        self.names = tuple(names)
        self.numbers = tuple(made.hyper)
        self.matrices = bool(made.spec and made.spec.matrices)  #: the leaves it takes
        self.static = tuple(name for name in names if name not in made.hyper)
        hyper = made.spec.hyper if made.spec else {}
        #: what may be given to a step, a value for each parameter
        self.data = tuple(name for name in hyper if not hyper[name].parts)
        #: tuples with a place for None, which is another formula
        self.optional = tuple(name for name in hyper if hyper[name].optional)
        self._made = lru_cache(maxsize=64)(self._make)

    def key(self, group: Mapping[str, Any]) -> tuple[Any, ...]:
        """What groups must have in common for one rule to step them."""
        flags = (
            (name, tuple(v) if isinstance(v := group[name], list) else v)
            for name in self.static
            if name in group and name not in self._mute(group)
        )
        there = (
            (name, tuple(None if v is None else 1.0 for v in group[name]))
            for name in self.optional
            if name in group
        )
        gone = ((name, bool(group[name] != 0) / 2) for name in self.vanishing)
        return *flags, *there, *gone

    def _mute(self, group: Mapping[str, Any]) -> tuple[str, ...]:
        """Flags that say nothing with these numbers, and a factory would refuse."""
        gone = any(group[name] == 0 for name in self.vanishing)
        return ("nesterov",) if gone else ()

    def stepper(self, key: tuple[Any, ...]) -> Stepper:
        """What steps the groups of this key; its numbers are the factory's own."""
        return self._made(key)

    def _make(self, key: tuple[Any, ...]) -> Stepper:
        spec = self.factory(**dict(key)).spec
        assert spec is not None
        return Stepper(spec)


def row(spec: Spec, group: Mapping[str, Any]) -> dict[str, Any]:
    """The rule's keyword arguments that a group's numbers are; none is checked.

    torch.optim looks at ranges when an optimizer is made, and never again.
    """
    found: dict[str, Any] = {}
    for name, declared in spec.hyper.items():
        value = group[name]
        if not declared.parts:
            awaited = value is None and declared.wanted  # which each step draws
            found[name] = None if awaited else number(value, name)
            continue
        for i, (part, v) in enumerate(zip(declared.parts, value, strict=True)):
            if v is not None or i not in declared.optional:
                found[part] = number(v, f"{name}[{i}]")
    # A rate that begins or ends at 0 is no other formula, with a kernel of its own.
    if isinstance(found.get("lr"), float) and found["lr"] == 0:
        found["lr"] = torch.zeros((), dtype=torch.float64, device="cpu")
    return found


def number(value: Any, name: str) -> Any:
    """A float, or a 0-d float64 tensor.

    Raises:
        HyperparameterTypeError: it is neither; None, to a rule, would be a 0.
        HyperparameterError: a tensor of several numbers.
    """
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise HyperparameterError(
                f"a group's {name} has shape {tuple(value.shape)}; it is to be one number"
            )
        return value.squeeze().to(torch.float64)
    if isinstance(value, (Real, SupportsFloat)):
        return float(value)
    raise HyperparameterTypeError(
        f"a group's {name} is to be a float or a tensor, not {value!r}"
    )


def fixed(group: Mapping[str, Any], names: tuple[str, ...]) -> bool:
    """Whether no value can change in place, but for one that is itself a tensor."""
    values = [group.get(name) for name in names]
    parts = (part for value in values if isinstance(value, tuple) for part in value)
    return not any(isinstance(x, list) for x in values) and not any(
        isinstance(x, (Tensor, list)) for x in parts
    )
