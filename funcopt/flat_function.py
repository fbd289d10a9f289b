"""A function on trees as one on lists of tensors, which is all that torch.func knows."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from funcopt import tree
from funcopt.execution import levels
from funcopt.types import Tensor, Tree


class FlatFunction:
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

    def grad(
        self, *lists: Sequence[Any], own: bool = False
    ) -> tuple[list[Tensor], list[Any]]:
        """∂(first output)/∂(first list), and beside it all outputs.

        Three ways to the same numbers. ``torch.func.grad`` is always right, but slower:
        it opens a level that every op of the function and of its backward passes through.
        Autograd alone will do where it records the variables already; and, on detached
        copies of them, where no derivative of the result can be asked for through its
        inputs.

        ``own`` says that the function has no other way to the variables, nor one of them
        to another. Dynamo traces the first alone, and torch.export none but the others:
        it takes what torch.func wraps for constants.
        """
        variables, rest = list(lists[0]), lists[1:]
        if torch.compiler.is_dynamo_compiling() or levels.of_inference(variables):
            return torch.func.grad(self._first(rest), has_aux=True)(variables)
        if levels.recorded(variables):
            # Views: the derivative stops at them, also where the function closes over
            # the same tensors (a proximal term).
            views = variables if own else [x.view_as(x) for x in variables]
            out = self(views, *rest)
            return _derivative(out[0], views, record=True), out
        if not levels.differentiating(x for each in lists for x in each):
            following = torch.is_grad_enabled()
            with torch.enable_grad():
                leaves = [x.detach().requires_grad_() for x in variables]
                out = self(leaves, *rest)
                # What the function closes over may be differentiated: keep its graph.
                record = following and not _reached(out) <= set(leaves)
                grads = _derivative(out[0], leaves, record=record)
            return grads, out if record else [x.detach() for x in out]
        return torch.func.grad(self._first(rest), has_aux=True)(variables)

    def _first(
        self, rest: Sequence[Sequence[Any]]
    ) -> Callable[[list[Any]], tuple[Tensor, list[Any]]]:
        def first(variables: list[Any]) -> tuple[Tensor, list[Any]]:
            out = self(variables, *rest)
            return out[0], out

        return first

    def like_first(self, grads: Sequence[Any]) -> Tree:
        """A list like the first input's as a tree like the first."""
        return self._put_back[0](grads)


def _derivative(
    value: Tensor, variables: Sequence[Tensor], *, record: bool
) -> list[Tensor]:
    if not value.requires_grad or not variables:  # of none, autograd takes no derivative
        return [torch.zeros_like(x) for x in variables]
    return list(
        torch.autograd.grad(
            value,
            variables,
            create_graph=record,
            allow_unused=True,
            materialize_grads=True,
        )
    )


def _reached(values: Sequence[Any]) -> set[Tensor]:
    """The leaf tensors that a backward pass from ``values`` would come to."""
    found: set[Tensor] = set()
    seen: set[Any] = set()
    ahead = [x.grad_fn for x in values if isinstance(x, Tensor)]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            found.add(leaf)
        ahead.extend(function for function, _ in node.next_functions)
    return found
