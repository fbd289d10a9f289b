"""Standard normals for a tree, from a generator that is given."""

import torch

from funcopt import tree
from funcopt.checks import check_generator
from funcopt.errors import LeafError
from funcopt.types import Tensor, Tree


def normal_like(params: Tree, generator: torch.Generator) -> Tree:
    """A tree of independent standard normals: the noise of a step, as data.

    Args:
        params: a tree of floating-point or complex tensors; a ``None`` leaf stays one.
        generator: what the numbers come from, and what moves on. They are drawn on its
            device and then go to each leaf's, so that a seed gives the same anywhere.

    Returns:
        A tree like ``params``: each leaf of its shape, dtype and device; of a complex
        number each part is a standard normal.

    Raises:
        HyperparameterTypeError: no generator: noise that cannot be repeated is not drawn.
        LeafError: a leaf that is no floating-point tensor.

    Source:
        funcopt.

    Example:
        >>> import torch, funcopt as fo
        >>> generator = torch.Generator().manual_seed(0)
        >>> fo.normal_like({"w": torch.zeros(3)}, generator)
        {'w': tensor([ 1.5410, -0.2934, -2.1788])}
    """
    check_generator("normal_like", generator)
    leaves, structure = tree.flatten(params)
    paths = tree.paths(structure)
    drawn = [
        None if p is None else _normal(p, path, generator)
        for p, path in zip(leaves, paths)
    ]
    return tree.unflatten(structure, drawn)


def _normal(p: Tensor, path: str, generator: torch.Generator) -> Tensor:
    if isinstance(p, Tensor) and p.is_complex():  # both parts as wide: they step apart
        return torch.view_as_complex(
            _normal(torch.view_as_real(p.resolve_conj()), path, generator)
        )
    if not isinstance(p, Tensor) or not p.is_floating_point():
        what = p.dtype if isinstance(p, Tensor) else type(p).__name__
        raise LeafError(
            f"normal_like draws floating-point tensors, and at '{path}' is {what}"
        )
    noise = torch.randn(
        p.shape, generator=generator, dtype=p.dtype, device=generator.device
    )
    return noise.to(p.device)
