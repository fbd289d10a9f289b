"""Constraints: there and back, finite everywhere, and what they cannot give refused."""

from collections.abc import Callable
from math import inf, nan
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, jvp, vmap

import funcopt as fo
from funcopt import tree


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


#: each with its open range
RANGES: dict[str, tuple[Any, float, float]] = {
    "exp": (fo.meta.exp(), 0.0, inf),
    "softplus": (fo.meta.softplus(), 0.0, inf),
    "sigmoid": (fo.meta.sigmoid(), 0.0, 1.0),
    "one_minus_exp": (fo.meta.one_minus_exp(), -inf, 1.0),
    "box": (fo.meta.box(-0.5, 2.0), -0.5, 2.0),
}
ALL = {name: row[0] for name, row in RANGES.items()} | {"simplex": fo.meta.simplex()}


def inside(low: float, high: float) -> st.SearchStrategy[float]:
    """Of all sizes, near bounds and far from them."""
    size = st.floats(-300.0, 300.0).map(lambda e: 10.0**e)
    if low == -inf:
        return size.map(lambda s: high - s).filter(lambda y: y < high)
    if high == inf:
        return size.map(lambda s: low + s).filter(lambda y: y > low)
    near = st.floats(-16.0, 0.0).map(lambda e: 10.0**e * (high - low))
    either = near.map(lambda s: low + s) | near.map(lambda s: high - s)
    return either.filter(lambda y: low < y < high)


@pytest.mark.parametrize("name", RANGES)
@given(data=st.data())
def test_there_and_back(name: str, data: st.DataObject):
    """To rounding; of a number near a bound, to that of the distance from it."""
    constraint, low, high = RANGES[name]
    y = data.draw(inside(low, high))
    x = constraint.inverse(f64(y))
    assert x.isfinite()
    back = constraint(x).item()
    assert low <= back <= high or abs(back - y) <= 1e-15 * abs(y)
    # an error of x's last place is what it is; it grows by the logarithm
    room = 4e-16 * (1 + x.abs().item()) * max(abs(y), min(abs(y - low), abs(high - y)))
    assert abs(back - y) <= room


@pytest.mark.parametrize("name", RANGES)
@given(x=st.floats(-15.0, 15.0))
def test_back_and_there(name: str, x: float):
    """Where y keeps x's digits."""
    constraint = RANGES[name][0]
    again = constraint.inverse(constraint(f64(x))).item()
    slope = abs(grad(lambda x: constraint(x).sum())(f64(x)).item())
    y = constraint(f64(x)).item()
    assert abs(again - x) <= 4e-16 * (1 + abs(x)) + 8e-16 * max(abs(y), 1.0) / slope


@given(st.lists(st.floats(-200.0, 0.0), min_size=1, max_size=6))
def test_a_simplex_there_and_back(exponents: list[float]):
    y = torch.tensor([10.0**e for e in exponents], dtype=torch.float64)
    y = y / y.sum()
    simplex = fo.meta.simplex()
    x = simplex.inverse(y)
    assert x.mean().abs() <= 1e-13 * (1 + x.abs().max())
    assert torch.allclose(simplex(x), y, rtol=2e-13, atol=0.0)
    assert abs(simplex(x).sum() - 1) < 1e-15
    assert torch.allclose(simplex(x + 3.0), y, rtol=2e-13, atol=0.0)
    assert torch.allclose(simplex.inverse(simplex(x)), x, rtol=1e-13, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32,
                                   torch.float64], ids=str)  # fmt: skip
@pytest.mark.parametrize("name", ["exp", "one_minus_exp"])
def test_the_largest_numbers_there_and_back(name: str, dtype: torch.dtype):
    """All that a dtype has, to its own rounding, which the logarithm's error grows by."""
    largest, unit = torch.finfo(dtype).max, torch.finfo(dtype).eps
    y = torch.tensor([1.0, 0.9, 0.6, 0.3], dtype=torch.float64).mul(largest).to(dtype)
    y = -y if name == "one_minus_exp" else y
    x = ALL[name].inverse(y)
    off = ALL[name](x).double() / y.double() - 1
    assert (off.abs() <= unit * (1 + x.double().abs())).all()
    beyond = torch.tensor([2.0, 1e4], dtype=dtype) * x[0]
    slopes: Any = jvp(ALL[name], (beyond,), (torch.ones_like(beyond),))
    assert slopes[0].isfinite().all() and not slopes[1].any()


EXTREMES = (-1e300, -1e5, -745.0, -40.0, -1e-300, 0.0, 1e-300, 40.0, 708.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", ALL)
def test_derivatives_are_finite_at_extremes(name: str, dtype: torch.dtype):
    sizes = EXTREMES if dtype is torch.float64 else [x for x in EXTREMES if abs(x) < 1e38]
    x = torch.tensor([*sizes, 1e5, 1e30], dtype=dtype)
    made: Any = jvp(ALL[name], (x,), (torch.ones_like(x),))
    y, along = made
    assert y.dtype == dtype and y.isfinite().all() and along.isfinite().all()
    weights = torch.linspace(0.1, 1.0, len(x), dtype=dtype)
    first = grad(lambda x: (ALL[name](x) * weights).sum())
    second = grad(lambda x: (first(x) * weights).sum())
    assert first(x).isfinite().all() and second(x).isfinite().all()


@pytest.mark.parametrize("name", ALL)
def test_derivatives_are_right_of_two_orders_and_under_vmap(name: str):
    x = f64(-3.0, -0.2, 0.0, 0.7, 2.5).requires_grad_()
    assert gradcheck(ALL[name], (x,), check_forward_ad=True)
    assert gradgradcheck(ALL[name], (x,))
    rows = torch.stack([x.detach(), 2 * x.detach()])
    found = vmap(ALL[name])(rows)
    assert torch.allclose(found, torch.stack([ALL[name](r) for r in rows]), rtol=1e-15)
    again = vmap(ALL[name].inverse)(found)
    assert torch.allclose(again, torch.stack([ALL[name].inverse(r) for r in found]))
    assert torch.allclose(ALL[name](rows), found, rtol=1e-15)  # row by row as they are
    assert torch.allclose(ALL[name].inverse(found), again, rtol=1e-12)
    y = ALL[name](x).detach().requires_grad_()
    slope = grad(lambda x: ALL[name](x)[1])(x.detach())[1]
    back = grad(lambda y: ALL[name].inverse(y)[1])(y.detach())[1]
    if name != "simplex":  # whose elements hang together
        assert abs(slope * back - 1) < 1e-12


def test_named_values():
    assert fo.meta.exp()(f64(0.0)) == 1
    assert abs(fo.meta.softplus()(f64(0.0)) - torch.log(f64(2.0))) < 1e-15
    assert fo.meta.sigmoid()(f64(0.0)) == 0.5
    assert fo.meta.box(-0.5, 2.0)(f64(0.0)) == 0.75
    ends = fo.meta.box(0.3, 0.9)(f64(-1e4, 1e4)).tolist()
    assert ends == [0.3, 0.9]  # where 0.3 + (0.9 - 0.3) is past the end
    assert abs(fo.meta.one_minus_exp().inverse(f64(0.999)) + 6.907755278982137) < 1e-13
    assert 1e307 < fo.meta.exp()(f64(1e4)) < inf
    assert repr(fo.meta.box(0.0, 2.0)) == "box(0.0, 2.0)"


# Trees ---------------------------------------------------------------------------------


def test_a_tree_of_constraints_is_a_prefix():
    constrain = fo.meta.constrained(
        {"init": None, "hyper": {"lr": fo.meta.exp(), "betas": fo.meta.one_minus_exp()}}
    )
    eta = {
        "init": {"w": f64(-1.0, 2.0), "gap": None},
        "hyper": {"lr": {"w": f64(0.1)}, "betas": (f64(0.9), f64(0.99))},
    }
    free = constrain.inverse(eta)
    assert torch.equal(free["init"]["w"], eta["init"]["w"])
    assert free["init"]["gap"] is None and type(free["hyper"]["betas"]) is tuple
    assert torch.allclose(free["hyper"]["lr"]["w"], f64(0.1).log())
    again = constrain(free)
    assert tree.flatten(again)[1] == tree.flatten(eta)[1]
    for a, b in zip(tree.leaves(again), tree.leaves(eta)):
        assert a is b is None or torch.allclose(a, b, rtol=1e-14)
    later: dict[str, Any] = {"lr": fo.meta.exp()}
    kept = fo.meta.constrained(later)
    later["lr"] = None  # what becomes of the tree has no part
    assert torch.equal(kept.inverse({"lr": f64(0.1)})["lr"], f64(0.1).log())
    named = fo.meta.constrained(fo.by_name({"hyper.lr*": fo.meta.exp()}, default=None))
    assert torch.equal(named.inverse(eta)["hyper"]["lr"]["w"], free["hyper"]["lr"]["w"])
    assert torch.equal(named.inverse(eta)["hyper"]["betas"][0], f64(0.9))


def test_a_constrained_tree_may_stand_for_a_branch():
    hyper = {"lr": fo.meta.exp(), "momentum": fo.meta.sigmoid()}
    whole = fo.meta.constrained({"init": None, "hyper": hyper})
    nested = fo.meta.constrained({"init": None, "hyper": fo.meta.constrained(hyper)})
    eta = {"init": f64(-1.0), "hyper": {"lr": f64(0.1), "momentum": f64(0.9)}}
    free = nested.inverse(eta)
    assert repr(nested) == repr(whole)
    assert torch.allclose(free["hyper"]["lr"], f64(0.1).log())
    assert torch.allclose(nested(free)["hyper"]["momentum"], f64(0.9))


@pytest.mark.parametrize("name", ["reverse", "forward", "truncated", "weight", "descent"])
def test_estimators_give_the_gradient_of_what_is_free(name: str):
    """dV/dx = dV/dy · dy/dx, of every estimator that sees a rate."""

    def loss(p: Tensor, _: Any) -> Tensor:
        return (p**4).sum()

    def problem(constrain: Any) -> fo.meta.Problem:
        return fo.meta.Problem(
            fo.sgd(), loss, loss, 3, f64(0.5, -0.8), constrain=constrain
        )

    calls: dict[str, Callable[..., fo.meta.Estimate]] = {
        "reverse": fo.meta.reverse,
        "forward": fo.meta.forward,
        "truncated": lambda *a: fo.meta.truncated(*a, window=2),
        "weight": fo.meta.weight_update_implicit,
        "descent": fo.meta.hypergradient_descent,
    }
    constrain = fo.meta.constrained({"hyper": {"lr": fo.meta.exp()}})
    eta = {"hyper": {"lr": torch.tensor(0.1, dtype=torch.float64)}}
    plain = calls[name](problem(None), eta).grads["hyper"]["lr"]
    free = calls[name](problem(constrain), constrain.inverse(eta)).grads["hyper"]["lr"]
    assert plain != 0 and abs(free - 0.1 * plain) < 1e-14


REFUSED: list[tuple[Callable[[], Any], list[str]]] = [
    (lambda: fo.meta.exp().inverse(f64(0.1, -2.0)), ["exp", "-2"]),
    (lambda: fo.meta.exp().inverse(f64(0.0)), ["exp", ": 0"]),
    (lambda: fo.meta.exp().inverse(f64(nan)), ["exp", "nan"]),
    (lambda: fo.meta.exp().inverse(f64(1.0, inf)), ["exp", ": inf"]),
    (lambda: fo.meta.softplus().inverse(f64(inf)), ["softplus", ": inf"]),
    (lambda: fo.meta.softplus().inverse(f64(0.0)), ["softplus", ": 0"]),
    (lambda: fo.meta.sigmoid().inverse(f64(1.0)), ["sigmoid", ": 1"]),
    (lambda: fo.meta.sigmoid().inverse(f64(0.0)), ["sigmoid", ": 0"]),
    (lambda: fo.meta.one_minus_exp().inverse(f64(1.0)), ["one_minus_exp", ": 1"]),
    (lambda: fo.meta.one_minus_exp().inverse(f64(1.5)), ["one_minus_exp", "1.5"]),
    (lambda: fo.meta.one_minus_exp().inverse(f64(-inf)), ["one_minus_exp", "-inf"]),
    (lambda: fo.meta.simplex().inverse(f64(inf, 1.0)), ["simplex", "inf"]),
    (lambda: fo.meta.box(1.0, 2.0).inverse(f64(3.0)), ["box(1.0, 2.0)", ": 3"]),
    (lambda: fo.meta.simplex().inverse(f64(0.0, 1.0)), ["simplex", ": 0"]),
    (lambda: vmap(fo.meta.exp().inverse)(f64(1.0, -2.0)), ["exp", "-2"]),
    (lambda: fo.meta.box(2.0, 2.0), ["low < high", "2.0"]),
    (lambda: fo.meta.box(0.0, inf), ["low < high", "inf"]),
    (lambda: fo.meta.box(-inf, 0.0), ["low < high", "-inf"]),
    (
        lambda: fo.meta.constrained({"lr": fo.meta.exp()})({"eps": f64(1.0)}),
        ["constrained", "'lr'", "'eps'"],
    ),
    (lambda: fo.meta.simplex()(f64(0.5)[0]), ["simplex", "0-d"]),
    (lambda: fo.meta.simplex().inverse(f64(0.5)[0]), ["simplex", "0-d"]),
]
#: what is no value, or no constraint, at all
OF_ANOTHER_KIND: list[tuple[Callable[[], Any], list[str]]] = [
    (lambda: fo.meta.exp()(0.5), ["exp", "float"]),
    (lambda: fo.meta.sigmoid().inverse(0.5), ["sigmoid", "float"]),
    (lambda: fo.meta.box(0.0, 2.0)(torch.tensor(1)), ["box(0.0, 2.0)", "torch.int64"]),
    (lambda: fo.meta.constrained({"lr": 3}), ["constrained", "3"]),
    (
        lambda: fo.meta.constrained({"lr": fo.meta.exp()}).inverse({"lr": 0.1}),
        ["exp", "float"],
    ),
]


@pytest.mark.parametrize("index", range(len(REFUSED)))
def test_what_a_constraint_cannot_give_is_refused(index: int):
    call, words = REFUSED[index]
    with pytest.raises(fo.FuncoptError) as caught:
        call()
    assert isinstance(caught.value, ValueError)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize("index", range(len(OF_ANOTHER_KIND)))
def test_what_is_of_another_kind_is_named(index: int):
    call, words = OF_ANOTHER_KIND[index]
    with pytest.raises(fo.FuncoptError) as caught:
        call()
    assert isinstance(caught.value, TypeError)
    assert all(word in str(caught.value) for word in words), str(caught.value)
