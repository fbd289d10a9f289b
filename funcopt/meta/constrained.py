"""A constraint of a whole tree, from one for each branch or leaf."""

from dataclasses import dataclass
from typing import Any

from funcopt import select, tree
from funcopt.errors import HyperparameterTypeError
from funcopt.meta.constraints import Constraint
from funcopt.types import Tree


def constrained(constraints: Any) -> Constraint:
    """A constraint of trees, from one for each branch or leaf.

    Args:
        constraints: a prefix tree of constraints, or `by_name`; None leaves a branch as
            it is. What ``constrained`` gives may stand for a branch.

    Returns:
        A constraint that takes a tree of unconstrained tensors to one of constrained
        tensors, as ``Problem(constrain=)`` wants it.

    Raises:
        HyperparameterTypeError: for what is no constraint.
        StructureError: by the result, for a tree that ``constraints`` is no prefix of.
        HyperparameterError: by ``inverse``, for a value that is not allowed.

    Source:
        funcopt.

    Example:
        >>> import torch, funcopt as fo
        >>> constrain = fo.meta.constrained(
        ...     {"hyper": {"lr": fo.meta.exp(), "momentum": fo.meta.sigmoid()}})
        >>> eta = {"hyper": {"lr": torch.tensor(0.1), "momentum": torch.tensor(0.9)}}
        >>> free = constrain.inverse(eta)
        >>> free["hyper"]
        {'lr': tensor(-2.3026), 'momentum': tensor(2.1972)}
        >>> constrain(free)["hyper"]
        {'lr': tensor(0.1000), 'momentum': tensor(0.9000)}
    """
    for each in tree.leaves(constraints):
        if each is not None and not isinstance(each, Constraint):
            raise HyperparameterTypeError(
                f"constrained takes a tree of constraints, such as exp(), not {each!r}"
            )

    whole = tree.map(_tree_of, constraints)
    return Constraint(
        f"constrained({whole!r})",
        _Spread(whole, inverse=False),
        _Spread(whole, inverse=True),
    )


def _tree_of(constraint: Constraint) -> Any:
    """The tree that a constraint of a branch was made from."""
    forward = constraint.forward
    return forward.constraints if isinstance(forward, _Spread) else constraint


@dataclass(frozen=True, eq=False)
class _Spread:
    """Each leaf by its constraint, or by the inverse of that."""

    constraints: Any
    inverse: bool

    def __call__(self, values: Tree) -> Tree:
        leaves, structure = tree.flatten(values)
        each = select.per_leaf(self.constraints, structure, "constrained")
        rows = zip(leaves, each)
        return tree.unflatten(structure, [self._one(*row) for row in rows])

    def _one(self, leaf: Any, constraint: Constraint | None) -> Any:
        if leaf is None or constraint is None:
            return leaf
        return constraint.inverse(leaf) if self.inverse else constraint(leaf)
