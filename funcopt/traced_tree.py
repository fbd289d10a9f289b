"""Trees in plain Python, in optree's place while torch.compile traces.

Dynamo of torch 2.13 traces optree by functions of its own. But a dict that holds no
tensor it gives to optree itself, whose record of the keys is another than theirs: such
a dict (in `partition`, the branch of another part) is neither taken apart nor made.
"""

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import optree
from optree.utils import total_order_sorted

from funcopt.types import Tree

NAMESPACE = "funcopt"  # of our containers: other users of optree see none of them
_DICTS = (dict, OrderedDict, defaultdict)  # which stand for one another


@dataclass(frozen=True)
class Structure:
    """What an ``optree.PyTreeSpec`` is to a tree, as far as we need it."""

    kind: type | None = None  #: None of a leaf
    keys: tuple[Any, ...] = ()
    parts: "tuple[Structure, ...]" = ()
    known: Any = None  #: a dict's keys in their own order; of others what is not in parts
    rebuild: Callable[[Any, list[Any]], Tree] | None = None  #: from both; None of a dict
    num_leaves: int = 1

    def is_leaf(self) -> bool:
        return self.kind is None

    def entries(self) -> list[Any]:
        return list(self.keys)

    def children(self) -> "list[Structure]":
        return list(self.parts)

    def flatten_up_to(self, tree: Tree) -> list[Any]:
        """What ``tree`` has in the places of the leaves.

        Raises:
            ValueError: it has no such places.
        """
        if self.kind is None:
            return [tree]
        if self.kind in _DICTS and type(tree) in _DICTS:
            if set(tree) != set(self.keys):
                raise ValueError
            children = [tree[key] for key in self.keys]
        else:
            if type(tree) is not self.kind:
                raise ValueError
            children, known, *_ = _one_level(tree)
            if len(children) != len(self.parts) or known != self.known:
                raise ValueError
        found: list[Any] = []
        for part, child in zip(self.parts, children):
            found.extend(part.flatten_up_to(child))
        return found

    def filled(self, leaves: Iterator[Any]) -> Tree:
        """The tree that holds the next of ``leaves``."""
        if self.kind is None:
            return next(leaves)
        values = [part.filled(leaves) for part in self.parts]
        if self.rebuild is not None:
            return self.rebuild(self.known, values)
        made = dict(zip(self.keys, values))
        return {key: made[key] for key in self.known}

    def paths(self) -> list[list[str]]:
        """The keys that lead to each leaf."""
        if self.kind is None:
            return [[]]
        keys = getattr(self.kind, "_fields", self.keys)
        return [
            [str(key), *rest]
            for key, part in zip(keys, self.parts)
            for rest in part.paths()
        ]


def flatten(tree: Tree) -> tuple[list[Any], Structure]:
    """As ``optree.tree_flatten`` where None is a leaf."""
    leaves: list[Any] = []
    return leaves, _structure(tree, leaves)


def _structure(tree: Tree, leaves: list[Any]) -> Structure:
    """That of ``tree``, whose leaves are added to ``leaves``."""
    before = len(leaves)
    if type(tree) is dict:
        keys = total_order_sorted(tree)
        known, rebuild = tuple(tree), None
        parts = [_structure(tree[key], leaves) for key in keys]
    elif optree.tree_is_leaf(tree, none_is_leaf=True, namespace=NAMESPACE):
        leaves.append(tree)
        return Structure()
    else:
        children, known, keys, rebuild = _one_level(tree)
        parts = [_structure(child, leaves) for child in children]
    count = len(leaves) - before
    return Structure(type(tree), tuple(keys), tuple(parts), known, rebuild, count)


def _one_level(tree: Tree) -> Any:
    return optree.tree_flatten_one_level(tree, none_is_leaf=True, namespace=NAMESPACE)
