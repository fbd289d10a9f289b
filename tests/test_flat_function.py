"""FlatFunction: one gradient, by whichever way the transforms around it leave open."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from funcopt.execution import levels
from funcopt.flat_function import FlatFunction
from funcopt.types import Tree


def draw(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, dtype=torch.float64, generator=generator)


P, W = draw(0), draw(1)


def cubic(params: Tree, scale: Tensor) -> Tree:
    """Its gradient with respect to p is 3·scale·p²; a gap stands beside p."""
    assert params["gap"] is None
    return (scale * params["p"] ** 3).sum(), None


def gradient(p: Tensor, scale: Tensor) -> Tensor:
    flat = FlatFunction(lambda params: cubic(params, scale), {"p": p, "gap": None})
    grads, out = flat.grad(*flat.inputs)
    loss, aux = flat.rebuild(out)
    assert aux is None and loss.shape == ()
    tree = flat.like_first(grads)
    assert tree["gap"] is None
    return tree["p"]


def dual(p: Tensor) -> Tensor:
    with forward_ad.dual_level():
        out = gradient(forward_ad.make_dual(p, torch.ones_like(p)), W)
        return forward_ad.unpack_dual(out).primal.clone()


def no_grad(p: Tensor) -> Tensor:
    with torch.no_grad():
        return gradient(p.clone().requires_grad_(), W)


def tangent(p: Tensor) -> Tensor:
    return torch.func.jvp(lambda x: gradient(x, W), (p,), (W,))[1]


WHERE: dict[str, Callable[[Tensor], Tensor]] = {
    "nothing around": lambda p: gradient(p, W),
    "variables that require grad": lambda p: gradient(p.clone().requires_grad_(), W),
    "no_grad": no_grad,
    "vmap": lambda p: torch.func.vmap(lambda x: gradient(x, W))(p.expand(2, 3))[1],
    "grad of something else": lambda p: torch.func.grad(
        lambda c: (c * gradient(p, W)).sum()
    )(torch.ones_like(p)),
    "dual numbers": dual,
}


@pytest.mark.parametrize("where", WHERE)
def test_the_gradient_is_the_same_everywhere(where: str):
    torch.testing.assert_close(WHERE[where](P), 3 * W * P**2, rtol=1e-12, atol=0)


SECOND: dict[str, Callable[[], Tensor]] = {
    "func.grad": lambda: torch.func.grad(lambda p: gradient(p, W).sum())(P),
    "autograd": lambda: torch.autograd.grad(
        gradient(p := P.clone().requires_grad_(), W).sum(), p
    )[0],
    "jvp": lambda: tangent(P) / W,
    "vmap(grad)": lambda: torch.func.vmap(
        torch.func.grad(lambda p: gradient(p, W).sum())
    )(P.expand(2, 3))[0],
    # Followed by an outer level only: at the inner one the variables stand still.
    "an unrelated level between": lambda: torch.func.grad(
        lambda p: torch.func.grad(lambda c: (c * gradient(p, W)).sum())(
            torch.ones(3, dtype=torch.float64)
        ).sum()
    )(P),
}


@pytest.mark.parametrize("way", SECOND)
def test_the_gradient_has_its_derivative(way: str):
    torch.testing.assert_close(SECOND[way](), 6 * W * P, rtol=1e-12, atol=0)


def test_what_the_function_closes_over_keeps_its_gradient():
    w = W.clone().requires_grad_()
    g = gradient(P, w)
    torch.testing.assert_close(torch.autograd.grad(g.sum(), w)[0], 3 * P**2)


def test_nothing_is_recorded_where_nothing_is_followed():
    assert not gradient(P, W).requires_grad
    with torch.no_grad():
        assert not gradient(P, W.clone().requires_grad_()).requires_grad


def test_the_derivative_stops_at_the_variables_themselves():
    """A proximal term closes over the very tensors that are varied."""
    p = P.clone().requires_grad_()
    flat = FlatFunction(lambda x: (((x - 2 * p) ** 2).sum(),), p)
    grads, _ = flat.grad(*flat.inputs)
    torch.testing.assert_close(grads[0], -2 * P)


def test_a_loss_that_does_not_depend_has_gradient_zero():
    for p in (P, P.clone().requires_grad_()):
        flat = FlatFunction(lambda x: (W.sum(),), p)
        assert torch.equal(flat.grad(*flat.inputs)[0][0], torch.zeros(3, dtype=P.dtype))


def test_recorded_sees_the_running_level_only():
    seen: list[Any] = []

    def inner(c: Tensor, p: Tensor) -> Tensor:
        seen.append((levels.recorded([c]), levels.recorded([p])))
        return (c * p).sum()

    torch.func.grad(lambda p: torch.func.grad(inner)(W, p).sum())(P)
    assert seen == [(True, False)]
    assert not levels.recorded([]) and not levels.recorded([P])
    assert levels.recorded([P.clone().requires_grad_()])
