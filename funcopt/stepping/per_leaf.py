"""Hyperparameters as data: their value for each leaf."""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from numbers import Real
from operator import is_
from typing import Any, TypeAlias, TypeGuard

import torch

from funcopt import select, tree
from funcopt.errors import HyperparameterError, HyperparameterTypeError
from funcopt.execution.leaves import identity
from funcopt.hyper import Hyper, unknown
from funcopt.schedules.schedule import Schedule
from funcopt.types import HyperMapping, HyperValue, Tensor

#: from the structure, leaves and steps of all leaves to the rule's keywords for each; one
#: object for leaves that share them
LeafValues: TypeAlias = Callable[
    [tree.Structure, Sequence[Any], Sequence[Any]], Sequence[dict[str, Any]]
]


class Hypers:
    """The hyperparameters of one optimizer, and their values for each leaf."""

    def __init__(self, declared: Mapping[str, Hyper], owner: str) -> None:
        self.declared = dict(declared)
        self.owner = owner
        self.arguments: dict[str, HyperValue] = {}
        #: those that every update has to be given
        self.awaited = [n for n, h in declared.items() if h.wanted and h.value is None]
        for name, hyper in self.declared.items():
            if name in self.awaited:
                self.arguments[name] = None
            else:
                self.arguments |= hyper.arguments(name, hyper.value)
        # Trees of plain numbers give the same values at every call on one structure.
        self._constant = {k for k, v in self.arguments.items() if _is_constant(v)}
        # Not a method: the cache would hold this, which may hold a rate with its graph.
        constants = {k: v for k, v in self.arguments.items() if k in self._constant}
        self._spread = partial(_spread, constants)
        self._constants = lru_cache(maxsize=32)(self._spread)
        #: the last structure and its rows: to hash a structure takes long
        self._last: tuple[Any, Any] = None, None
        #: those that are not plain numbers
        self.varying = self.arguments.keys() - self._constant
        #: the arguments of which a leaf has one number, and not one per element
        self._scalar = {
            (hyper.parts or (name,))[place]
            for name, hyper in declared.items()
            for place in hyper.scalar
        }

    def __reduce__(self) -> tuple[Any, ...]:
        return Hypers, (self.declared, self.owner)

    def check_start(self, params: Sequence[Any]) -> None:
        """Raises if a value is the very tree of parameters: ``fo.adamw(params)``."""
        for name in self.varying:
            given = tree.leaves(self.arguments[name])
            if given and len(given) == len(params) and all(map(is_, given, params)):
                raise HyperparameterTypeError(
                    f"{self.owner}'s {name} is the parameters themselves; they are given "
                    f"to opt.init and opt.update, as in fo.{self.owner}(lr=0.1)"
                    ".init(params)"
                )

    def check_given(self, overrides: HyperMapping) -> None:
        """Raises unless ``overrides`` has what every update has to be given."""
        for name in self.awaited:
            if name not in overrides:
                raise HyperparameterError(
                    f"{self.owner} needs {name} at every update, "
                    f"{self.declared[name].wanted}: update(..., {name}={name}), or "
                    f"fo.unroll(..., hyper={{'{name}': fo.per_step(one for each step)}})"
                )

    def check_known(self, overrides: HyperMapping) -> None:
        """Raises if ``overrides`` names what the rule does not have."""
        for name in overrides:
            if name not in self.declared:
                raise unknown(name, self.declared, self.owner)

    def per_leaf(
        self,
        overrides: HyperMapping,
        structure: tree.Structure,
        params: Sequence[Any],
        steps: Sequence[Any],
    ) -> list[dict[str, Any]]:
        """The rule's keyword arguments for each leaf, whose updates are ``steps``."""
        compiling = torch.compiler.is_compiling()
        if compiling:
            rows = self._spread(structure)
        else:
            last, rows = self._last
            if structure is not last:
                rows = self._constants(structure)
                self._last = structure, rows
        if not overrides and not self.varying:
            return rows
        arguments, varying = dict(self.arguments), set(self.varying)
        self.check_known(overrides)
        for name, value in overrides.items():
            given = self.declared[name].arguments(name, value)
            arguments |= given
            varying |= given.keys()
        varying -= {name for name in self.awaited if arguments[name] is None}
        shared = self._shared(arguments, varying, steps)
        if shared is not None:
            if all(row is rows[0] for row in rows):
                return [{**rows[0], **shared}] * len(rows)
            return _interned([{**row, **shared} for row in rows])
        columns = {
            name: column(
                name, arguments[name], structure, params, steps, name in self._scalar
            )
            for name in arguments
            if name in varying
        }
        names = tuple(columns)
        return _interned(
            [
                {**row, **dict(zip(names, values))}
                for row, values in zip(rows, zip(*columns.values()))
            ]
        )

    def _shared(
        self, arguments: HyperMapping, varying: set[str], steps: Sequence[Any]
    ) -> dict[str, Any] | None:
        """The varying arguments, if each is one number that all leaves share; or None."""
        first = steps[0] if steps else None
        if not isinstance(first, int) or steps.count(first) != len(steps):
            return None
        shared = {}
        for name in arguments:  # the declared order, so that runs repeat
            if name in varying:
                value = arguments[name]
                if isinstance(value, Schedule):
                    value = _at(value, max(first - 1, 0))
                if _is_leaf_shaped(value) or not isinstance(value, (Tensor, Real)):
                    return None
                shared[name] = _scalar(value, name)
        return shared


def _spread(constants: HyperMapping, structure: tree.Structure) -> list[dict[str, Any]]:
    """The arguments that are plain numbers, for each leaf."""
    columns = [
        [float(v) for v in select.per_leaf(value, structure, name)]
        for name, value in constants.items()
    ]
    if not columns:
        return [{}] * structure.num_leaves
    return _interned([dict(zip(constants, values)) for values in zip(*columns)])


def _interned(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows, one object for those that are equal: executors tell them apart by ``id``.

    Under a compiler they stay: it would guard on the id of each tensor, and recompile.
    """
    if torch.compiler.is_compiling():
        return rows
    known: dict[Any, dict[str, Any]] = {}
    return [known.setdefault(tuple(map(identity, row.values())), row) for row in rows]


def _is_constant(value: HyperValue) -> bool:
    return value is not None and all(isinstance(v, Real) for v in tree.leaves(value))


def column(
    name: str,
    value: HyperValue,
    structure: tree.Structure,
    params: Sequence[Any],
    steps: Sequence[Any] = (),
    one: bool = False,
) -> list[Any]:
    """One argument's value for each leaf, ready for arithmetic.

    ``one`` says that a leaf takes a single number, and not one per element.
    """

    def scalar(number: Any) -> Any:
        return number if isinstance(number, Schedule) else _scalar(number, name)

    given, own = tree.flatten(value)
    atoms = [x if x is None else scalar(x) for x in given]  # once, before leaves share it
    if own != structure:
        atoms = select.per_leaf(tree.unflatten(own, atoms), structure, name)
    column: list[Any] = []
    known: dict[tuple[int, int], Any] = {}  # of a schedule and count: leaves share it
    for i, (atom, p) in enumerate(zip(atoms, params)):
        if atom is None and p is not None:
            raise HyperparameterTypeError(
                f"{name} is None at '{tree.paths(structure)[i]}', where params has a "
                "leaf; only where params has None a tree of values may have it"
            )
        if isinstance(atom, Schedule):
            key, step = id(atom), steps[i]
            if not isinstance(step, int):
                atom = _scalar(_at(atom, step - 1), name)
            elif (key, step) in known:
                atom = known[key, step]
            else:
                # A leaf that never had a gradient has made no step, and takes none now.
                atom = known[key, step] = _scalar(_at(atom, max(step - 1, 0)), name)
        if p is not None and _is_leaf_shaped(atom):
            if one or not _fits(atom, p):
                way = (
                    "it is one number per leaf: give a float or a real 0-d tensor"
                    if one
                    else "give a real 0-d tensor, or one that broadcasts to the parameter"
                )
                raise HyperparameterError(
                    f"{name} at '{tree.paths(structure)[i]}' has shape "
                    f"{tuple(atom.shape)} on {atom.device} ({atom.dtype}), the parameter "
                    f"{tuple(p.shape)} on {p.device} ({p.dtype}); {way}"
                )
            atom = _per_element(atom, p)
        column.append(atom)
    return column


def _at(schedule: Schedule, count: Any) -> Any:
    """Its value, the number 0 as a tensor.

    A rule with the number 0 is a program of its own, without the terms that vanish: a
    schedule that begins or ends at 0 would have a kernel built in the midst of training.
    """
    value = schedule(count)
    if isinstance(value, Real) and value == 0:
        return torch.zeros((), dtype=torch.float64, device="cpu")
    return value


def _scalar(value: Any, name: str) -> Any:
    """A float, or a float64 scalar: 1 - beta**t would lose its digits in float32."""
    if isinstance(value, Tensor):
        if value.dtype is torch.float64 or _is_leaf_shaped(value):
            return value  # `to` takes as long to find that there is nothing to do
        return value.to(torch.float64)
    if isinstance(value, Real):
        return float(value)
    raise HyperparameterTypeError(
        f"the Schedule of {name} must give a float or a tensor, not {value!r}"
    )


def _is_leaf_shaped(value: Any) -> TypeGuard[Tensor]:
    """Whether it has a value per element; a complex one has, for the parts of each."""
    return isinstance(value, Tensor) and (value.ndim > 0 or value.is_complex())


def _per_element(atom: Tensor, p: Tensor) -> Tensor:
    """A value for each number of the leaf, or for each part of a complex one."""
    if not p.is_complex():
        return atom.to(p.dtype)
    if atom.is_complex():
        return torch.view_as_real(atom.to(p.dtype).resolve_conj())
    return atom.to(p.dtype.to_real()).unsqueeze(-1)  # both parts share it


def _fits(atom: Tensor, p: Tensor) -> bool:
    if atom.is_complex() and not p.is_complex():
        return False
    if atom.device != p.device or atom.ndim > p.ndim:
        return False
    pairs = zip(reversed(atom.shape), reversed(p.shape))
    return all(a == b or a == 1 for a, b in pairs)
