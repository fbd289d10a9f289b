"""A function on trees as one on lists of tensors, which is all that torch.func knows."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from funcopt import tree
from funcopt.types import Tensor, Tree


class Listed:
    """``function`` of ``trees``, called with the lists of the leaves that are there.

    A ``None`` leaf and a container that only optree knows stop torch.func, as an input
    and as an output. So lists cross: ``inputs`` are those of ``trees``; a call gives the
    list of the result's leaves, and `rebuild` the result.
    """

    def __init__(self, function: Callable[..., Tree], *trees: Tree) -> None:
        self.function = function
        split = [tree.without_none(given) for given in trees]
        self.inputs = [present for present, _ in split]
        self._put_back = [put_back for _, put_back in split]

    def __call__(self, *lists: Sequence[Any]) -> list[Any]:
        trees = [put_back(each) for put_back, each in zip(self._put_back, lists)]
        present, self.rebuild = tree.without_none(self.function(*trees))
        return present

    def grad(self, *lists: Sequence[Any]) -> tuple[list[Tensor], list[Any]]:
        """∂(first output)/∂(first list), and beside it all outputs."""

        def first(variables: list[Any]) -> tuple[Tensor, list[Any]]:
            out = self(variables, *lists[1:])
            return out[0], out

        return torch.func.grad(first, has_aux=True)(list(lists[0]))

    def like_first(self, grads: Sequence[Any]) -> Tree:
        """A list like the first input's as a tree like the first."""
        return self._put_back[0](grads)
