"""A constraint of a whole tree, from one for each branch or leaf."""

from typing import Any

from funcopt import select, tree
from funcopt.errors import HyperparameterTypeError
from funcopt.meta.constraints import Constraint
from funcopt.types import Tree


def constrained(constraints: Any) -> Constraint:
    """A constraint of trees, from one for each branch or leaf.

    Args:
        constraints: a prefix tree of constraints, or `by_name`; None leaves a branch as
            it is.

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
    constraints = select.copied(constraints)
    for each in tree.leaves(constraints):
        if each is not None and not isinstance(each, Constraint):
            raise HyperparameterTypeError(
                f"constrained takes a tree of constraints, such as exp(), not {each!r}"
            )

    def spread(values: Tree, inverse: bool) -> Tree:
        leaves, structure = tree.flatten(values)
        each = select.per_leaf(constraints, structure, "constrained")
        return tree.unflatten(
            structure,
            [
                leaf
                if leaf is None or constraint is None
                else (constraint.inverse if inverse else constraint)(leaf)
                for leaf, constraint in zip(leaves, each)
            ],
        )

    return Constraint(
        f"constrained({constraints!r})",
        lambda x: spread(x, inverse=False),
        lambda y: spread(y, inverse=True),
    )
