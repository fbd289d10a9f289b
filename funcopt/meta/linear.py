"""Linear systems in trees of tensors, solved by products alone."""

from collections.abc import Callable
from typing import TypeAlias

import torch

from funcopt import tree
from funcopt.types import Tensor, Tree

Product: TypeAlias = Callable[[Tree], Tree]
_ROUNDING = 8  # so many roundings of one number are no more than rounding


def conjugate_gradients(
    product: Product, wanted: Tree, iterations: int
) -> tuple[Tree, Tensor]:
    """Solve ``product(x) = wanted``; and whether curvature forbade it.

    No number is read, so that no device is waited for: all iterations are made, and x
    stays from where the residual is 0 or the curvature not positive, both to rounding.
    Beyond that point rounding errors would be solved for, and grow without bound along
    directions without curvature. NaN and infinities come through.
    """
    unit = _largest(wanted)
    unit = torch.where(unit == 0, 1.0, unit)  # squares of any wanted are then in range
    wanted = tree.map(lambda b: b / unit, wanted)
    x, r, p = tree.map(torch.zeros_like, wanted), wanted, wanted
    start = left = dot(r, r)
    indefinite = torch.zeros_like(start, dtype=torch.bool)
    going = ~indefinite
    steepest = torch.zeros_like(start)
    tiny = _ROUNDING * _epsilon(wanted)
    for _ in range(iterations):
        bent = product(p)
        curvature, length = dot(p, bent), dot(p, p)
        steepest = torch.maximum(
            steepest, curvature / torch.where(length > 0, length, 1.0)
        )
        going = going & ~(left <= tiny**2 * start)
        flat = curvature <= tiny * steepest * length
        indefinite = indefinite | going & flat
        going = going & ~flat
        size = torch.where(going, left, 0.0) / torch.where(going, curvature, 1.0)
        x, r = plus(x, size, p), plus(r, -size, bent)
        before, left = left, dot(r, r)
        turn = torch.where(going, left, 0.0) / torch.where(going, before, 1.0)
        p = plus(r, turn, p)
    return tree.map(lambda v: v * unit, x), indefinite


def neumann(product: Product, wanted: Tree, iterations: int, step_size: float) -> Tree:
    """The first terms of the Neumann series; the residual of a sum is its next term."""
    x, term = tree.map(torch.zeros_like, wanted), wanted
    for _ in range(iterations):
        x = plus(x, step_size, term)
        term = plus(term, -step_size, product(term))
    return x


def plus(x: Tree, size: Tensor | float, y: Tree) -> Tree:
    return tree.map(lambda a, b: a + size * b, x, y)


def dot(x: Tree, y: Tree) -> Tensor:
    """⟨x, y⟩, a complex number being two real ones; half precision is summed wider."""

    def inner(a: Tensor, b: Tensor) -> Tensor:
        wide = _wide(a)
        return (a.to(wide) * b.to(wide).conj()).real.sum()

    products = tree.present(tree.map(inner, x, y))
    return torch.stack(products).sum() if products else torch.zeros(())


def norm(x: Tree) -> Tensor:
    """‖x‖, also where a square is out of range."""
    unit = _largest(x)
    unit = torch.where(unit == 0, 1.0, unit)
    scaled = tree.map(lambda a: a / unit, x)
    return unit * dot(scaled, scaled).sqrt()


def relative_norm(x: Tree, whole: Tree) -> Tensor:
    """‖x‖ / ‖whole‖; 0 where both are."""
    part, of = norm(x), norm(whole)
    return part / torch.where((part == 0) & (of == 0), 1.0, of)


def _largest(x: Tree) -> Tensor:
    """max |x|, 0 of nothing."""
    found = [a.abs().max() for a in tree.present(x) if a.numel()]
    return (
        torch.stack([a.to(_wide(a)) for a in found]).max() if found else torch.zeros(())
    )


def _epsilon(x: Tree) -> float:
    """The relative rounding error of the coarsest leaf."""
    return max((torch.finfo(a.dtype).eps for a in tree.present(x)), default=0.0)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
