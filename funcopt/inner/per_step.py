"""Hyperparameters with one value for each step of an inner loop."""

from collections.abc import Callable
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


def hyper_by_step(hyper: HyperMapping, steps: int) -> Callable[[int], dict[str, Any]]:
    """The hyperparameters as a function of the step, `per_step` values resolved."""
    for name, value in hyper.items():
        for marked in tree.leaves(value):
            if isinstance(marked, PerStep):
                length = tree.leading_axis(marked.values, f"per_step {name}")
                if length != steps:
                    raise StructureError(
                        f"hyper['{name}'] holds values for {length} steps, the loop "
                        f"makes {steps}"
                    )

    def at(k: int) -> dict[str, Any]:
        def entry(value: Any) -> Any:
            if isinstance(value, PerStep):
                return tree.map(itemgetter(k), value.values)
            return value

        return tree.map(entry, dict(hyper))

    return at
