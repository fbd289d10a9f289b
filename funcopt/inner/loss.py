"""The loss of one inner step as a pure function, and its gradient."""

from collections.abc import Sequence
from contextlib import nullcontext
from itertools import chain
from typing import Any

import torch

from funcopt import tree
from funcopt.checks import check_function
from funcopt.errors import LeafError, StructureError
from funcopt.execution import autocast, levels
from funcopt.flat_function import FlatFunction
from funcopt.func.norms import RunningStatistics, exact_norms
from funcopt.types import LossFunction, Tensor, Tree

#: the arguments of an inner loss, in `unroll`'s words
ARGUMENTS = ("params", "batch", "meta", "buffers")


class InnerLoss:
    """``loss_fn`` as a function of all that it depends on.

    ``meta`` and ``buffers`` reach ``loss_fn`` where they are not None. It is evaluated
    as torch.autocast chooses where this is made: on the way back, too, which is taken
    outside of that block.
    """

    def __init__(
        self, loss_fn: LossFunction, has_aux: bool = False, name: str = "loss_fn"
    ) -> None:
        check_function(name, loss_fn)
        self.loss_fn = loss_fn
        self.has_aux = has_aux
        self.name = name
        self._autocast = autocast.chosen()

    def __call__(
        self, params: Tree, batch: Tree, meta: Tree, buffers: Tree
    ) -> tuple[Tensor, Tree, Tree]:
        """The loss, aux, and the buffers after."""
        with autocast.choosing(self._autocast):
            out, buffers = called(self.loss_fn, params, batch, meta, buffers)
        return *loss_and_aux(out, self.has_aux, self.name), buffers

    def grad(
        self, params: Tree, batch: Tree, meta: Tree, buffers: Tree, *, own: bool = False
    ) -> tuple[Tree, tuple[Tensor, Tree, Tree]]:
        """∇L by the parameters, and beside it what a call gives.

        ``own`` says that the loss cannot close over these parameters.
        """
        # All of them: whether one is followed decides how the gradient is made.
        flat = FlatFunction(self, params, batch, meta, buffers)
        given = chain.from_iterable(flat.inputs[:-1])  # buffers have no derivative
        exact = exact_norms() if levels.norms_inexact(given) else nullcontext()
        with exact, autocast.choosing(self._autocast):
            grads, out = flat.grad(*flat.inputs, own=own)
        grads = [*map(levels.with_alike_tangent, grads)]
        return flat.like_first(grads), flat.rebuild(out)


def called(
    loss_fn: LossFunction, params: Tree, batch: Tree, meta: Tree, buffers: Tree
) -> tuple[Any, Tree]:
    """What ``loss_fn`` gives, and the copy of the buffers that it may have written in."""
    extra = () if meta is None else (meta,)
    if buffers is None:
        return loss_fn(params, batch, *extra), None
    # Adding a zero made of the data copies the buffers, and batches the copy in every
    # vmap that batches the data: batch norm writes into it in place.
    zero = _zero_of(tree.leaves((params, batch, extra)))
    buffers = tree.map(lambda b: b + zero.to(b.dtype), buffers)
    with RunningStatistics() if _in_transform(buffers) else nullcontext():
        return loss_fn(params, batch, *extra, buffers=buffers), buffers


def _in_transform(buffers: Tree) -> bool:
    """Whether a derivative or vmap knows of these; a compiler cannot say."""
    if torch.compiler.is_compiling() or levels.vmaps():
        return True
    return any(map(levels.is_tracked, tree.present(buffers)))


def loss_and_aux(out: Any, has_aux: bool, name: str) -> tuple[Tensor, Tree]:
    """What the loss function ``name`` gave, as a 0-d loss and a tree of tensors."""
    if has_aux and not (isinstance(out, tuple) and len(out) == 2):
        raise StructureError(
            f"with has_aux=True {name} must return (loss, aux), got {_kind(out)}"
        )
    loss, aux = out if has_aux else (out, None)
    if not isinstance(loss, Tensor) or loss.ndim:
        raise StructureError(
            f"{name} must return a 0-d tensor, got {_kind(loss)}; take the "
            "mean, and set has_aux=True if it returns (loss, aux)"
        )
    if not loss.is_floating_point():
        raise StructureError(f"{name} must return a real number, got {loss.dtype}")
    leaves, structure = tree.flatten(aux)
    for i, leaf in enumerate(leaves):
        if leaf is not None and not isinstance(leaf, Tensor):
            raise LeafError(
                f"aux['{tree.paths(structure)[i]}'] of {name} is {_kind(leaf)}; aux is a "
                "tree of tensors"
            )
    return loss, aux


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return type(value).__name__


def _zero_of(leaves: Sequence[Any]) -> Tensor:
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    zero = torch.zeros((), device=tensors[0].device)
    for tensor in tensors:
        zero = zero + tensor.detach().new_zeros((), dtype=zero.dtype)
    return zero
