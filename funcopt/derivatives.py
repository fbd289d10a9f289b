"""Derivatives of functions of several trees, by name, in torch.func's manner.

The functions take and give mappings from names to trees. What a tree holds beside
floating-point and complex tensors (``None``, steps, Python numbers) is carried along and
has no derivative: in cotangents, tangents and gradients ``None`` stands in its place.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import reduce
from typing import Any, TypeAlias

import torch

from funcopt import tree
from funcopt.errors import ExecutionError, StructureError
from funcopt.types import HALF, Tensor, Tree

Trees: TypeAlias = Mapping[str, Tree]
Function: TypeAlias = Callable[[Trees], Trees]
Pullback: TypeAlias = Callable[[Trees], dict[str, Tree]]

_NOTHING = torch.zeros((), device="cpu")
#: the way out where attention has no such derivative
MATH = (
    "For attention use its MATH backend: with torch.nn.attention.sdpa_kernel("
    "torch.nn.attention.SDPBackend.MATH) around the loss"
)


def is_smooth(leaf: Any) -> bool:
    """Whether there are derivatives by this leaf."""
    return isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())


def vjp(
    function: Function, given: Trees, wrt: Iterable[str] | None = None
) -> tuple[Trees, Pullback]:
    """``function(given)``, and its pullback: cotangents to gradients by ``given``.

    ``wrt`` names the trees whose gradients are wanted; None for all.
    """
    wanted = [*given] if wrt is None else [*wrt]
    _check_names(wanted, given, "wrt")
    chosen = {name: given[name] for name in wanted}
    layout = SmoothLeaves(chosen)
    variables, constants = layout.split(chosen)
    made: list[SmoothLeaves] = []

    def of_variables(values: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        result = function({**given, **layout.filled(values, constants)})
        made[:] = [SmoothLeaves(result)]
        smooth, others = made[0].split(result)
        return [*smooth, values[-1]], others

    # torch.func wants at least one variable and one result: a zero that goes through
    results: Any = torch.func.vjp(of_variables, [*variables, _NOTHING], has_aux=True)
    (*values, _), pull, others = results
    (out,) = made

    def pullback(cotangents: Trees) -> dict[str, Tree]:
        _check_names(cotangents, out.structures, "cotangents")
        filled = out.aligned(cotangents, values, "cotangents")
        zeroed = [torch.zeros_like(x) if c is None else c for x, c in zip(values, filled)]
        return layout.with_holes(pull([*zeroed, _NOTHING])[0])

    return out.filled(values, others), pullback


def vjp_apart(function: Function, given: Trees) -> tuple[Trees, Pullback]:
    """As `vjp`, of what no transform follows: the result has no graph.

    In grad mode wherever it is called, without which torch's LSTM on a CPU keeps too
    little for the way back.
    """
    with torch.enable_grad():
        out, pullback = vjp(function, given)
    return tree.detach(out), pullback


def jvp(
    function: Function, given: Trees, tangents: Trees
) -> tuple[Trees, dict[str, Tree]]:
    """``function(given)``, and its derivative along ``tangents``.

    A tree that has no tangents is a constant.
    """
    _check_names(tangents, given, "tangents")
    chosen = {name: given[name] for name in tangents}
    layout = SmoothLeaves(chosen)
    variables, constants = layout.split(chosen)
    along = layout.aligned(tangents, variables, "tangents")
    moving = [i for i, t in enumerate(along) if t is not None]
    made: list[SmoothLeaves] = []

    def of_moving(values: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        merged = list(variables)
        for i, value in zip(moving, values):
            merged[i] = value
        result = function({**given, **layout.filled(merged, constants)})
        made[:] = [SmoothLeaves(result)]
        smooth, others = made[0].split(result)
        return [*smooth, values[-1]], others

    # A dual number's tangent is laid out as its value: one expanded cannot be written to.
    start = [*(variables[i].contiguous() for i in moving), _NOTHING]
    directions = [*(along[i] for i in moving), _NOTHING]
    with _explained():
        results: Any = torch.func.jvp(of_moving, (start,), (directions,), has_aux=True)
    (*values, _), pushed, others = results
    (out,) = made
    alike = [t.to(x.dtype) for x, t in zip(values, pushed)]  # see `with_alike_tangent`
    return out.filled(values, others), out.with_holes(alike)


@contextmanager
def _explained() -> Iterator[None]:
    """Say what to do where an operation has no forward derivative."""
    try:
        yield
    except (RuntimeError, NotImplementedError) as error:
        words = str(error)
        if "forward AD" not in words or isinstance(error, ExecutionError):
            raise
        raise ExecutionError(
            "an operation of the loss has no derivative in forward mode "
            f"({words.splitlines()[0][:200]}). Reverse mode needs none: "
            f"fo.meta.reverse, fo.meta.step_vjp. {MATH}"
        ) from error


def added(*columns: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The sums of what is there, entry by entry."""
    sums: list[Tensor | None] = []
    for parts in zip(*columns):
        there = [x for x in parts if x is not None]
        sums.append(reduce(torch.add, there) if there else None)
    return sums


def widened(value: Any) -> Any:
    """The value; a tensor of half precision as float32.

    For what many add up in: bfloat16 would keep the first 256 of equal gradients.
    """
    return value.float() if isinstance(value, Tensor) and value.dtype in HALF else value


class SmoothLeaves:
    """The structures of several trees, and which leaves are smooth, or tensors."""

    def __init__(self, trees: Trees) -> None:
        self.structures: dict[str, tree.Structure] = {}
        leaves: list[Any] = []
        for name, given in trees.items():
            found, self.structures[name] = tree.flatten(given)
            leaves += found
        self._smooth = [is_smooth(leaf) for leaf in leaves]
        self._tensor = [isinstance(leaf, Tensor) for leaf in leaves]
        self._rest = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]

    def split(self, trees: Trees) -> tuple[list[Tensor], list[Tensor]]:
        """The smooth leaves, and the other tensors: torch.func must see those, too."""
        leaves: list[Any] = [
            leaf
            for name, structure in self.structures.items()
            for leaf in structure.flatten_up_to(trees[name])
        ]
        kinds = list(zip(leaves, self._smooth, self._tensor))
        return (
            [leaf for leaf, smooth, _ in kinds if smooth],
            [leaf for leaf, smooth, tensor in kinds if tensor and not smooth],
        )

    def names(self) -> list[str]:
        """The tree that each smooth leaf is of."""
        spread = [n for n, s in self.structures.items() for _ in range(s.num_leaves)]
        return [name for name, smooth in zip(spread, self._smooth) if smooth]

    def filled(self, values: Sequence[Any], others: Sequence[Tensor]) -> dict[str, Tree]:
        """The trees with these smooth leaves, and other tensors beside them."""
        smooth, rest = iter(values), iter(others)
        leaves: list[Any] = [
            next(smooth) if is_value else next(rest) if is_tensor else leaf
            for leaf, is_value, is_tensor in zip(self._rest, self._smooth, self._tensor)
        ]
        return self._unflatten(leaves)

    def with_holes(self, values: Sequence[Any]) -> dict[str, Tree]:
        """The trees of the smooth leaves alone: None in the other places."""
        smooth = iter(values)
        return self._unflatten([next(smooth) if s else None for s in self._smooth])

    def aligned(self, trees: Trees, values: Sequence[Tensor], what: str) -> list[Any]:
        """One for each of ``values``, None for what is not in ``trees``."""
        found: list[Any] = []
        for name, structure in self.structures.items():
            if name not in trees or trees[name] is None:
                found += [None] * structure.num_leaves
            else:
                found += tree.flatten_like(structure, trees[name], f"{what}['{name}']")
        kept = [x for x, smooth in zip(found, self._smooth) if smooth]
        for value, x in zip(values, kept):
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
