"""What a hyperparameter may be: its declaration, and the errors for what it is not."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, final

import torch

from funcopt import select, tree
from funcopt.errors import (
    HyperparameterError,
    HyperparameterTypeError,
    UnknownHyperparameterError,
)
from funcopt.schedules.schedule import Schedule
from funcopt.types import HyperValue, Tensor


@final
@dataclass(frozen=True)
class Hyper:
    """One declared hyperparameter: its value, the range of a number given for it.

    The range is [``low``, ``below``), or [``low``, ``most``] where ``most`` is given;
    with ``over`` without ``low`` itself.
    ``parts`` names the rule's arguments where the public one is a tuple of values
    (``betas`` → ``beta1, beta2``); ``optional`` are the places among them where None may
    stand, which leaves that argument to the rule's own default. ``scalar`` are the places
    (0 where it is no tuple) for one number per leaf, not one per element: a slot or a
    total that is made of it would have elements, too. ``wanted`` says what every
    ``update`` has to be given where ``value`` is None.
    """

    value: HyperValue
    low: float = 0.0
    below: float = math.inf
    most: float | None = None
    over: bool = False
    parts: tuple[str, ...] = ()
    wanted: str = ""
    optional: tuple[int, ...] = ()
    scalar: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        # A copy: what the caller does to his dict later is not this optimizer's affair.
        object.__setattr__(self, "value", select.copied(self.value))

    def arguments(self, name: str, value: HyperValue) -> dict[str, HyperValue]:
        """The rule's arguments that ``value`` for ``name`` sets, numbers checked."""
        if not self.parts:
            return {name: self.checked(name, value)}
        if not isinstance(value, Sequence) or len(value) != len(self.parts):
            raise HyperparameterError(
                f"{name} must be {len(self.parts)} values ({', '.join(self.parts)}), "
                f"not {value!r}"
            )
        return {
            part: self.checked(f"{name}[{i}]", v)
            for i, (part, v) in enumerate(zip(self.parts, value))
            if v is not None or i not in self.optional
        }

    def checked(self, name: str, value: HyperValue) -> HyperValue:
        """``value``; raises unless every number and kind in it is allowed.

        Tensors are taken as they are: looking into one would wait for the device, and
        is impossible under vmap.
        """
        if isinstance(value, Tensor) or isinstance(value, float) and self._allows(value):
            return value
        for atom in tree.leaves(value):
            if isinstance(atom, (Tensor, Schedule)) or (
                atom is None and value is not None
            ):
                continue
            if isinstance(atom, Real) and not isinstance(atom, bool):
                if not self._allows(float(atom)):
                    lower = f"{'(' if self.over else '['}{self.low:g}"
                    upper = f"{self.below:g})" if self.most is None else f"{self.most:g}]"
                    raise HyperparameterError(
                        f"{name} must be in {lower}, {upper}, got {atom}"
                    )
            elif callable(atom) and not isinstance(atom, torch.nn.Module):
                raise HyperparameterTypeError(
                    f"{name} got a bare callable {atom!r}; wrap it: "
                    "fo.Schedule(function_of_step)"
                )
            else:
                raise HyperparameterTypeError(
                    f"{name} takes floats, 0-d tensors, trees of them that are a prefix "
                    f"of params, fo.by_name or fo.Schedule, not {_described(atom)}"
                )
        return value

    def _allows(self, number: float) -> bool:
        if self.over and number == self.low:
            return False
        if self.most is not None:
            return self.low <= number <= self.most
        return self.low <= number < self.below


def _described(atom: Any) -> str:
    """What is no value of a hyperparameter; and what to do, where it is a usual one."""
    kind = type(atom).__name__
    if kind == "PerStep":
        return f"{atom!r}; fo.per_step goes into fo.unroll(..., hyper={{...}})"
    if kind == "generator" or isinstance(atom, torch.nn.Module):
        return f"a {kind}; parameters are given to opt.init and opt.update"
    return repr(atom)


def unknown(name: str, known: Mapping[str, Any], owner: str) -> Exception:
    """The error for a hyperparameter that ``owner`` does not have."""
    return UnknownHyperparameterError(
        f"{owner} has no hyperparameter '{name}'; it has {', '.join(known) or 'none'}. "
        "(Flags, and slots a zero leaves out, are fixed when the optimizer is made.)"
    )
