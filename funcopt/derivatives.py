"""Derivatives of functions of several trees, by name, in torch.func's manner.

The functions take and give mappings from names to trees. What a tree holds beside
floating-point and complex tensors (``None``, steps, Python numbers) is carried along and
has no derivative: in cotangents, tangents and gradients ``None`` stands in its place.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch

from funcopt import tree
from funcopt.errors import StructureError
from funcopt.types import Tensor, Tree

Trees: TypeAlias = Mapping[str, Tree]
Function: TypeAlias = Callable[[Trees], Trees]
Pullback: TypeAlias = Callable[[Trees], dict[str, Tree]]

_NOTHING = torch.zeros(())


def is_smooth(leaf: Any) -> bool:
    """Whether there are derivatives by this leaf."""
    return isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())


def vjp(
    function: Function, given: Trees, wrt: Iterable[str] | None = None
) -> tuple[Trees, Pullback]:
    """``function(given)``, and what takes its cotangents to those of ``given``.

    ``wrt`` names the trees whose gradients are wanted; None for all.
    """
    wanted = [*given] if wrt is None else [*wrt]
    _check_names(wanted, given, "wrt")
    variables = Smooth({name: given[name] for name in wanted})
    outputs: list[Smooth] = []

    def of_variables(values: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        out = Smooth(function({**given, **variables.filled(values)}))
        outputs[:] = [out]
        return out.values, out.others

    # torch.func wants at least one variable: one that nothing depends on
    made: Any = torch.func.vjp(of_variables, [*variables.values, _NOTHING], has_aux=True)
    values, pull, others = made
    (out,) = outputs

    def pullback(cotangents: Trees) -> dict[str, Tree]:
        _check_names(cotangents, out.structures, "cotangents")
        filled = out.aligned(cotangents, "cotangents")
        zeroed = [torch.zeros_like(x) if c is None else c for x, c in zip(values, filled)]
        return variables.with_holes(pull(zeroed)[0])

    return out.filled(values, others), pullback


def jvp(
    function: Function, given: Trees, tangents: Trees
) -> tuple[Trees, dict[str, Tree]]:
    """``function(given)``, and its derivative along ``tangents``.

    A tree that has no tangents is a constant.
    """
    _check_names(tangents, given, "tangents")
    variables = Smooth({name: given[name] for name in tangents})
    along = variables.aligned(tangents, "tangents")
    moving = [i for i, t in enumerate(along) if t is not None]
    outputs: list[Smooth] = []

    def of_moving(values: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        merged = list(variables.values)
        for i, value in zip(moving, values):
            merged[i] = value
        out = Smooth(function({**given, **variables.filled(merged)}))
        outputs[:] = [out]
        return out.values, out.others

    start = [*(variables.values[i] for i in moving), _NOTHING]
    directions = [*(along[i] for i in moving), _NOTHING]
    made: Any = torch.func.jvp(of_moving, (start,), (directions,), has_aux=True)
    values, pushed, others = made
    (out,) = outputs
    return out.filled(values, others), out.with_holes(pushed)


class Smooth:
    """The smooth leaves of several trees, and what puts such leaves back in place."""

    def __init__(self, trees: Trees) -> None:
        self.structures: dict[str, tree.Structure] = {}
        self._leaves: list[Any] = []
        for name, given in trees.items():
            leaves, self.structures[name] = tree.flatten(given)
            self._leaves += leaves
        self._smooth = [is_smooth(leaf) for leaf in self._leaves]
        self.values: list[Tensor] = [
            leaf for leaf, smooth in zip(self._leaves, self._smooth) if smooth
        ]
        self._tensor = [
            isinstance(leaf, Tensor) and not smooth
            for leaf, smooth in zip(self._leaves, self._smooth)
        ]
        #: tensors that are not smooth: torch.func must see them go by, too
        self.others: list[Tensor] = [
            leaf for leaf, tensor in zip(self._leaves, self._tensor) if tensor
        ]

    def filled(
        self, values: Sequence[Any], others: Sequence[Tensor] | None = None
    ) -> dict[str, Tree]:
        """The trees with other smooth leaves, and other tensors beside them."""
        smooth, rest = iter(values), iter(self.others if others is None else others)
        leaves = [
            next(smooth) if is_value else next(rest) if is_tensor else leaf
            for leaf, is_value, is_tensor in zip(self._leaves, self._smooth, self._tensor)
        ]
        return self._unflatten(leaves)

    def with_holes(self, values: Sequence[Any]) -> dict[str, Tree]:
        """The trees of the smooth leaves alone: None in the other places."""
        smooth = iter(values)
        return self._unflatten([next(smooth) if s else None for s in self._smooth])

    def aligned(self, trees: Trees, what: str) -> list[Any]:
        """One for each smooth leaf, None for what is not in ``trees``."""
        found: list[Any] = []
        for name, structure in self.structures.items():
            if name not in trees or trees[name] is None:
                found += [None] * structure.num_leaves
            else:
                found += tree.flatten_like(structure, trees[name], f"{what}['{name}']")
        kept = [x for x, smooth in zip(found, self._smooth) if smooth]
        for value, x in zip(self.values, kept):
            if x is not None and (not isinstance(x, Tensor) or x.shape != value.shape):
                shape = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
                raise StructureError(
                    f"{what} must have the shapes of what they belong to: one is {shape} "
                    f"where a leaf is {tuple(value.shape)}"
                )
        return kept

    def _unflatten(self, leaves: list[Any]) -> dict[str, Tree]:
        rest = iter(leaves)
        return {
            name: tree.unflatten(structure, [next(rest) for _ in range(count)])
            for name, structure in self.structures.items()
            for count in (structure.num_leaves,)
        }


def _check_names(names: Iterable[str], known: Iterable[str], what: str) -> None:
    unknown = [name for name in names if name not in known]
    if unknown:
        raise StructureError(
            f"{what}: there is no {', '.join(map(repr, unknown))}; the names are "
            f"{', '.join(known)}"
        )
