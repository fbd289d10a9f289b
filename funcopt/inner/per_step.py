"""Hyperparameters with one value for each step of an inner loop."""

from collections.abc import Callable
from typing import Any, final

from funcopt import tree
from funcopt.derivatives import widened
from funcopt.errors import StructureError
from funcopt.types import HyperMapping, Tree


@final
class PerStep:
    """A hyperparameter tree with a leading step axis; made by `per_step`."""

    __slots__ = ("values",)

    def __init__(self, values: Tree) -> None:
        self.values = values

    def __repr__(self) -> str:
        return f"per_step({self.values!r})"


def per_step(values: Tree) -> PerStep:
    """Mark a hyperparameter of `unroll` as one value for each step (LSLR).

    Args:
        values: a tensor, or a tree of tensors that is a prefix of params, or `by_name`,
            each of shape [steps, ...]: entry k is the value in step k, 0-d or
            broadcasting to a leaf.

    Returns:
        The marked tree, for ``unroll(..., hyper={name: per_step(values)})``.

    Raises:
        StructureError: in `unroll`, when a leading axis is not the number of steps.

    Source:
        Antoniou, Edwards, Storkey, "How to train your MAML", 2019 (per-layer per-step
        learning rates).

    Example:
        >>> import torch, funcopt as fo
        >>> rates = torch.tensor([0.5, 0.25])
        >>> fo.unroll(fo.sgd(), lambda p, batch: p.sum(), torch.zeros(1), steps=2,
        ...           hyper={"lr": fo.per_step(rates)}).params
        tensor([-0.7500])
    """
    return PerStep(values)


class HyperBySteps:
    """The hyperparameters of a loop, and those of each of its steps.

    ``values`` is the tree of all of them, in which `per_step` leaves no mark; None where
    there are none, for Dynamo takes no empty dict apart.
    """

    def __init__(self, hyper: HyperMapping, steps: int) -> None:
        self._marked: dict[str, tuple[tree.Structure, list[bool]]] = {}
        values: dict[str, Tree] = {}
        for name, value in hyper.items():
            leaves, structure = tree.flatten(value)
            marked = [isinstance(leaf, PerStep) for leaf in leaves]
            # Of the value of many steps, each adds to the gradient.
            leaves = [x.values if isinstance(x, PerStep) else widened(x) for x in leaves]
            for entries, is_marked in zip(leaves, marked):
                if is_marked:
                    length = tree.leading_axis(entries, f"per_step {name}")
                    if length != steps:
                        raise StructureError(
                            f"hyper['{name}'] holds values for {length} steps, the loop "
                            f"makes {steps}"
                        )
            self._marked[name] = structure, marked
            values[name] = tree.unflatten(structure, leaves)
        self.values: Tree = values or None

    def at(self, k: int, values: Tree) -> dict[str, Any]:
        """Those of step k."""
        return self._each(values, lambda x, marked: x[k] if marked else x)

    def sliced(self) -> Tree:
        """Like ``values``: whether each leaf has an entry for each step."""
        return self._each(self.values, lambda _, marked: marked) or None

    def _each(self, values: Tree, function: Callable[[Any, bool], Any]) -> dict[str, Any]:
        """``function`` of each leaf, and of whether it is marked."""
        found = {}
        for name, (structure, marks) in self._marked.items():
            parts = structure.flatten_up_to(values[name])
            entries = [
                tree.map(lambda x, m=marked: function(x, m), part)
                for part, marked in zip(parts, marks)
            ]
            found[name] = tree.unflatten(structure, entries)
        return found
