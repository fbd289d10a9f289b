"""Guards of the way back: norms of adjoints that are seen, and limited."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, jvp, vmap

import funcopt as fo

WAYS: list[dict[str, Any]] = [
    {},
    {"grad_mode": "mixed"},
    {"remat": "sqrt"},
    {"grad_mode": "mixed", "remat": "sqrt"},
]
ZEROS = torch.zeros(4, dtype=torch.float64)
START = torch.tensor([1.0, -2.0], dtype=torch.float64)


def uphill(p: Tensor, _: Any) -> Tensor:
    return -0.5 * (p**2).sum()


def end(opt: fo.Optimizer, norms: Tensor, p: Tensor = START, **way: Any) -> Tensor:
    hyper = {"adjoint_norm": fo.per_step(norms)}
    return fo.unroll(opt, uphill, p, steps=4, hyper=hyper, **way).params.sum()


@pytest.mark.parametrize("way", WAYS)
def test_norms_are_those_of_each_steps_adjoint(way: Any):
    opt = fo.meta.clip_adjoint(fo.sgd(lr=1.0))  # a step doubles
    expected = 2**0.5 * torch.tensor([8.0, 4.0, 2.0, 1.0], dtype=torch.float64)
    assert torch.allclose(grad(lambda n: end(opt, n, **way))(ZEROS), expected)
    each = vmap(grad(lambda n: end(opt, n, **way)))(torch.stack([ZEROS, ZEROS]))
    assert torch.allclose(each, expected.expand(2, 4))
    assert end(opt, ZEROS, **way) == -16.0  # forward nothing changes


@pytest.mark.parametrize("way", WAYS)
def test_a_limit_holds_at_every_step(way: Any):
    opt = fo.meta.clip_adjoint(fo.sgd(lr=1.0), max_norm=2.0)
    norms, slope = grad(lambda n, p: end(opt, n, p, **way), argnums=(0, 1))(ZEROS, START)
    root = 2**0.5
    expected = torch.tensor([4.0, 4.0, 2 * root, root], dtype=torch.float64)
    assert torch.allclose(norms, expected)
    assert torch.allclose(slope.norm(), torch.tensor(4.0).double())


def test_momentum_counts_and_what_is_not_finite_is_stopped():
    p = START.clone().requires_grad_()
    opt = fo.meta.clip_adjoint(fo.sgd(lr=0.1, momentum=0.9), max_norm=1.0)
    params, state = opt.update(p * p, opt.init(p), p)
    both = params.sum() + (3 * state["momentum_buffer"]).sum()
    (slope,) = torch.autograd.grad(both, p, retain_graph=True)
    # (1, 1, 3, 3) has the norm √20, and d params = 1 - 0.2 p, d buffer = 2 p
    expected = (1 - 0.2 * START + 3 * 2 * START) / 20**0.5
    assert torch.allclose(slope, expected)
    (slope,) = torch.autograd.grad(float("inf") * params.sum(), p)
    assert torch.equal(slope, torch.zeros(2).double())
    along = jvp(lambda p: opt.update(p, opt.init(p), p)[0], (START,), (START,))[1]
    assert torch.allclose(along, 0.9 * START)


def test_what_is_refused():
    with pytest.raises(fo.HyperparameterError, match="max_norm"):
        fo.meta.clip_adjoint(fo.sgd(), max_norm=0.0)
    with pytest.raises(fo.UnknownHyperparameterError, match="already"):
        fo.meta.clip_adjoint(fo.meta.clip_adjoint(fo.sgd()))
