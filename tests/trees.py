"""Trees of random tensors, and how far two trees lie apart."""

from collections.abc import Sequence

import torch
from torch import Tensor

from funcopt import tree
from funcopt.types import Tree

Shape = tuple[int, ...]


#: a matrix, a vector, one element, a 0-d and an empty leaf
MIXED: Sequence[Shape] = ((4, 3), (5,), (1,), (), (0, 3))
#: three numbers, one of them 0-d: for what costs an evaluation per number
SMALL: Sequence[Shape] = ((2,), ())


def mixed(
    dtype: torch.dtype = torch.float64, seed: int = 0, shapes: Sequence[Shape] = MIXED
) -> Tree:
    """A nested tree of five leaves."""
    weight, bias, one, scalar, empty = (torch.empty(s, dtype=dtype) for s in shapes)
    layers = [{"weight": weight, "bias": bias}, (one, scalar)]
    return random_like({"layers": layers, "empty": empty}, seed)


def small(
    dtype: torch.dtype = torch.float64, seed: int = 0, shapes: Sequence[Shape] = SMALL
) -> Tree:
    """Two leaves."""
    w, scale = (torch.empty(shape, dtype=dtype) for shape in shapes)
    return random_like({"w": w, "scale": scale}, seed)


def random_like(like: Tree, seed: int) -> Tree:
    """Numbers of both signs with |x| in [0.5, 1.5]: no root is taken near zero."""
    generator = torch.Generator().manual_seed(seed)

    def draw(x: Tensor) -> Tensor:
        size, sign = torch.rand(2, *x.shape, generator=generator, dtype=torch.float64)
        return torch.copysign(size + 0.5, sign - 0.5).to(x.dtype)

    return tree.map(draw, like)


def relative(found: Tensor, expected: Tensor) -> float:
    """max|found - expected| / max|expected|; 0 where both are nothing but zeros."""
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    if not expected.numel() or torch.equal(found, expected):
        return 0.0
    error = (found.double() - expected.double()).abs().max()
    return (error / expected.double().abs().max()).item()


def units_of_largest(found: Tensor, expected: Tensor, before: Tensor) -> float:
    """The greatest difference in units in the last place of the leaf's largest number."""
    largest = torch.maximum(expected.abs().max(), before.abs().max()).double()
    unit = torch.finfo(found.dtype).eps * 2.0 ** largest.log2().floor()
    return ((found.double() - expected.double()).abs().max() / unit).item()


def assert_close(found: Tree, expected: Tree, tolerance: float) -> None:
    """Every leaf within ``tolerance``, relative to the leaf's largest number."""
    leaves, structure = tree.flatten(expected)
    others = tree.flatten_like(structure, found, "found")
    for path, a, b in zip(tree.paths(structure), others, leaves):
        if b is None:
            assert a is None, path
        else:
            error = relative(a, b)
            assert error <= tolerance, f"'{path}' is off by {error:.2e}"


def assert_same(found: Tree, expected: Tree) -> None:
    """Every leaf bit-equal."""
    assert_close(found, expected, 0.0)


def assert_moved(after: Tree, before: Tree, everywhere: bool = True) -> None:
    """Every number changed, or some did: a test of what stood still proves nothing."""
    pairs = zip(tree.leaves(after), tree.leaves(before))
    moved = torch.cat([(a != b).flatten() for a, b in pairs])
    assert moved.all() if everywhere else moved.any()
