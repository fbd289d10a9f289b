"""Hyperparameters with one value for each step of an inner loop."""

from operator import itemgetter
from typing import Any, final

from funcopt import tree
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
        values: a tensor, or a tree of tensors that is a prefix of params, each of shape
            [steps, ...]: entry k is the value in step k, 0-d or broadcasting to a leaf.

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

    ``values`` is the tree of all of them, in which `per_step` leaves no mark.
    """

    def __init__(self, hyper: HyperMapping, steps: int) -> None:
        leaves, self._structure = tree.flatten(dict(hyper))
        self._marked = [isinstance(leaf, PerStep) for leaf in leaves]
        for name, value in hyper.items():
            for marked in tree.leaves(value):
                if isinstance(marked, PerStep):
                    length = tree.leading_axis(marked.values, f"per_step {name}")
                    if length != steps:
                        raise StructureError(
                            f"hyper['{name}'] holds values for {length} steps, the loop "
                            f"makes {steps}"
                        )
        self.values: dict[str, Tree] = tree.unflatten(
            self._structure,
            [leaf.values if isinstance(leaf, PerStep) else leaf for leaf in leaves],
        )

    def at(self, k: int, values: Tree) -> dict[str, Any]:
        """Those of step k."""
        parts = self._structure.flatten_up_to(values)
        entries = [
            tree.map(itemgetter(k), part) if marked else part
            for part, marked in zip(parts, self._marked)
        ]
        return tree.unflatten(self._structure, entries)

    def sliced(self) -> Tree:
        """Like ``values``: whether each leaf has an entry for each step."""
        parts = self._structure.flatten_up_to(self.values)  # pyright: ignore[reportArgumentType]
        marks = [
            tree.map(lambda _, m=marked: m, part)
            for part, marked in zip(parts, self._marked)
        ]
        return tree.unflatten(self._structure, marks)
