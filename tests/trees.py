"""Trees of random tensors, and how far two trees lie apart."""

import torch
from torch import Tensor

from funcopt import tree
from funcopt.types import Tree


def mixed(dtype: torch.dtype = torch.float64, seed: int = 0) -> Tree:
    """A nested tree with a matrix, a vector, one element, a 0-d and an empty leaf."""

    def new(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    layers = [{"weight": new(4, 3), "bias": new(5)}, (new(1), new())]
    return random_like({"layers": layers, "empty": new(0, 3)}, seed)


def small(dtype: torch.dtype = torch.float64, seed: int = 0) -> Tree:
    """Three numbers, one of them 0-d: for what costs an evaluation per number."""
    like = {"w": torch.empty(2, dtype=dtype), "scale": torch.empty((), dtype=dtype)}
    return random_like(like, seed)


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
