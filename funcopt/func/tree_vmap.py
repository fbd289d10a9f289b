"""torch.func.vmap of functions of trees, in which leaves may be ``None``."""

from collections.abc import Callable, Sequence
from typing import Any

from funcopt import select, tree
from funcopt.flat_function import FlatFunction
from funcopt.list_vmap import Randomness, list_vmap
from funcopt.types import Tree


def vmap(
    function: Callable[..., Tree],
    in_dims: int | Sequence[Any] = 0,
    *,
    randomness: Randomness = "error",
    chunk_size: int | None = None,
) -> Callable[..., Tree]:
    """``torch.func.vmap`` for trees in which some leaves are ``None``.

    torch's takes no ``None`` for an argument's leaf, nor for a result's. The states of
    `partition` and `freeze` have such, and so may gradients. It also walks over trees in
    Python, which takes longer than a small step; this does not.

    Args:
        function: of trees of tensors, to a tree of tensors.
        in_dims: the axis to take off every tensor, 0 unless given: one for all
            arguments, or one for each, None for what all have in common. An argument's
            may be a tree of axes, a prefix of it, or a `by_name` selector.
        randomness: as of ``torch.func.vmap``.
        chunk_size: how many entries to do at once; None for all.

    Returns:
        ``function`` of batches of trees; what it returns has the batch as axis 0, and
        ``None`` where ``function`` gives ``None``.

    Raises:
        StructureError: a tree of axes that does not fit its argument.
        Whatever ``torch.func.vmap`` does.

    Source:
        funcopt.

    Example:
        >>> import torch, funcopt as fo
        >>> opt = fo.freeze(fo.sgd(lr=1.0, momentum=0.9), {"body": True, "head": False})
        >>> params = {"body": torch.zeros(3), "head": torch.zeros(3)}     # three nets
        >>> state = fo.func.vmap(opt.init)(params)
        >>> state["momentum_buffer"]
        {'body': None, 'head': tensor([0., 0., 0.])}
        >>> grads = {"body": None, "head": torch.ones(3)}
        >>> params, state = fo.func.vmap(opt.update)(grads, state, params)
        >>> params["head"], state["step"].shape
        (tensor([-1., -1., -1.]), torch.Size([3, 2]))
    """

    def batched(*trees: Tree) -> Tree:
        flat = FlatFunction(function, *trees)
        dims = in_dims if isinstance(in_dims, int) else tuple(in_dims)
        if isinstance(dims, tuple) and len(dims) == len(trees):
            dims = tuple(map(_axes, dims, trees))
        many = list_vmap(flat, dims, randomness=randomness, chunk_size=chunk_size)
        out = many(*flat.inputs)
        return flat.rebuild(out)

    return batched


def _axes(given: Any, values: Tree) -> Any:
    """Of one argument: one for all of its tensors, or a list with one for each."""
    if given is None or isinstance(given, int):
        return given
    leaves, structure = tree.flatten(values)
    axes = select.per_leaf(given, structure, "in_dims")
    return [axis for axis, leaf in zip(axes, leaves) if leaf is not None]
