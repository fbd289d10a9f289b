"""What the tests need to know of an optimizer, and mixes of its flags."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, product
from typing import Any

import torch
from trees import MIXED, SMALL, Shape, mixed, small

import funcopt as fo
from funcopt import tree
from funcopt.types import Tree

Flags = Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """What the tests need to know of one optimizer."""

    factory: Callable[..., fo.Optimizer]
    combinations: list[Flags]  #: keyword arguments; every valid mix of flags
    floats: Mapping[str, Any]  #: hyperparameters to differentiate, and values for that
    #: the same rule in torch.optim, or like one of its classes, with the same arguments;
    #: what has none has trajectories in tests/published
    twin: Callable[..., torch.optim.Optimizer] | None = None
    like_twin: Flags = field(default_factory=dict)  #: flags that only ours has
    least: Flags = field(default_factory=dict)  #: below which a float makes no sense
    idle: tuple[str, ...] = ()  #: floats that parameters may not depend on at first
    #: floats that a scalar slot is made of: one number for each leaf
    per_leaf: tuple[str, ...] = ()
    ulps: int = 2  #: of a half-precision step that torch rounds differently
    #: how far a native step may be from the reference with torch's root, in units in the
    #: last place of the larger of the parameter before and after; see docs/execution.md
    roots: int = 0
    #: the same for torch's power of a beta with elements
    powers: int = 0
    #: how far executors may be apart by a function (atan2, not the root) that kernels
    #: round in their way, and torch by a leaf's layout: in units in the last place of a
    #: leaf's largest number
    functions: int = 0
    #: the number that a slot starts from, or the flag that says it, where it is not 0
    first: Mapping[str, float | str] = field(default_factory=dict)
    warm: int = 2  #: steps after which the rule does all that it ever does
    moves: bool = True  #: whether a step moves every number that has a gradient
    #: of test_convergence: what a problem ("" those that are not named) needs besides the
    #: defaults there, ``lr`` and ``steps`` above all; None where it does not arrive
    arrives: Mapping[str, Any] = field(default_factory=dict)
    smooth: bool = True  #: whether the step depends smoothly on the gradient
    shapes: Sequence[Shape] = MIXED  #: of leaves that the rule takes
    few: Sequence[Shape] = SMALL  #: the same, of few numbers
    #: how far a stack, or a batch, of float64 leaves may be from a loop: sums of products
    #: are added in another order
    rounding: float = 1e-14
    elementwise: bool = True  #: whether kernels give the reference's very bits

    @property
    def name(self) -> str:
        return self.factory.__name__


@dataclass(frozen=True)
class Case:
    """A row with one combination of its flags."""

    row: Row
    flags: Flags

    def __str__(self) -> str:
        words = [
            k if v is True else f"{k}={v}" for k, v in self.flags.items() if v not in (0,)
        ]
        return "-".join([self.row.name, *words])

    @property
    def together(self) -> bool:
        """Whether what a leaf does depends on the others: sums over the tree."""
        spec = self.optimizer().spec
        return bool(spec and spec.totals)

    def optimizer(self, **hyper: Any) -> fo.Optimizer:
        return self.row.factory(**{"lr": self.row.floats["lr"], **self.flags, **hyper})

    def mixed(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tree:
        """A tree of leaves of all the shapes that the rule takes."""
        return mixed(dtype, seed, self.row.shapes)

    def small(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tree:
        """A tree for what costs an evaluation per number."""
        return small(dtype, seed, self.row.few)

    def fit(self, params: Tree) -> Tree:
        """The same numbers in leaves that the rule takes."""
        spec = self.optimizer().spec
        if not spec or not spec.matrices:
            return params
        return tree.map(
            lambda p: p if p.ndim == 2 else p.reshape(p.shape[0] if p.ndim else 1, -1),
            params,
        )

    def twin(self, params: Any, **hyper: Any) -> torch.optim.Optimizer:
        hyper = {"lr": self.row.floats["lr"], **self.flags, **hyper}
        hyper = {k: v for k, v in hyper.items() if k not in self.row.like_twin}
        assert self.row.twin is not None
        return self.row.twin(params, foreach=False, **hyper)

    def drives(self, path: str) -> bool:
        """Whether some steps surely depend on the input ``path``.

        Uphill nothing is sure: gradients grow, and adamax has no use for beta2.
        """
        name = path.removeprefix("hyper.").split(".")[0]
        return name not in self.row.idle and not self.flags.get("maximize")

    def floats(self) -> dict[str, Any]:
        """The float hyperparameters that this combination has, with their values."""
        known = self.optimizer().hyper
        values = {**self.row.floats, **self.flags}
        return {name: values[name] for name in self.row.floats if name in known}

    def tensors(self, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
        """The same values as 0-d tensors."""
        return {
            name: tuple(torch.tensor(v, dtype=dtype) for v in value)
            if isinstance(value, tuple)
            else torch.tensor(value, dtype=dtype)
            for name, value in self.floats().items()
        }


def mixes(**choices: tuple[Any, ...]) -> list[Flags]:
    return [dict(zip(choices, values)) for values in product(*choices.values())]


def half(**choices: tuple[Any, Any]) -> list[Flags]:
    """Half of all mixes with maximize, in which any two flags meet in every way."""
    return [
        {"maximize": sum(v == choices[k][1] for k, v in flags.items()) % 2 == 1, **flags}
        for flags in mixes(**choices)
    ]


def showing(cases: Iterable[Case], together: int) -> list[Case]:
    """The cases that show something new: flag values that no earlier case combines.

    As many values as ``together`` says, or fewer; ``maximize`` does not count.
    """
    seen: set[Any] = set()
    kept = []
    for case in cases:
        flags = [(k, str(v)) for k, v in case.flags.items() if k != "maximize"]
        sizes = range(together + 1)
        shown = {(case.row.name, *c) for size in sizes for c in combinations(flags, size)}
        if not shown <= seen:
            kept.append(case)
        seen |= shown
    return kept


OFF_ON = (False, True)
DECAY = (0.0, 0.1)
