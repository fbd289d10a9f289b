"""Rules that see their leaf in norms alone: kernels sweep it for these, and again."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from exact_roots import ExactRoots
from row import Case
from table import NORMS, TOTALS
from test_execution import assert_bits
from torch import Tensor
from trees import assert_moved, mixed, random_like, units_of_largest

import funcopt as fo
from funcopt import tree
from funcopt.hyper import Hyper

#: up to the order in which a norm's squares are added
TOLERANCES = [(torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)]


def lamb_like(
    g: Tensor, p: Tensor, exp_avg: Tensor, *, step: Any, lr: Any, beta: Any
) -> tuple[Tensor, ...]:
    """A trust ratio of two norms, and a sum besides: three sums in two sweeps."""
    exp_avg = beta * exp_avg + (1 - beta) * g
    move = exp_avg / (1 - beta**step)
    ratio = torch.linalg.vector_norm(p) / (1e-6 + torch.linalg.vector_norm(move))
    return p - lr * ratio * move - 1e-3 * lr * g.sum(), exp_avg


def optimizer(norms: bool = True) -> fo.Optimizer:
    return fo.per_tensor(
        lamb_like,
        name="lamb_like",
        slots={"exp_avg": torch.zeros_like},
        hyper={"lr": Hyper(0.1), "beta": Hyper(0.8, below=1.0)},
        norms=norms,
    )


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("name", ["native", "foreach"])
@pytest.mark.parametrize("dtype, tolerance", TOLERANCES, ids=str)
def test_each_leaf_has_its_own_norms(
    name: str, dtype: torch.dtype, tolerance: float, donate: bool
):
    """As by the reference, up to the order in which a norm's squares are added."""
    opt, expected = optimizer(), mixed(dtype)
    found = tree.map(torch.clone, expected)
    a, b = opt.init(expected), opt.init(found)
    for seed in range(3):
        grads = random_like(expected, seed)
        expected, a = opt.update(grads, a, expected, execution="reference")
        found, b = opt.update(grads, b, found, execution=name, donate=donate)
        for x, y in zip(tree.leaves((found, b)), tree.leaves((expected, a))):
            assert torch.allclose(x.double(), y.double(), rtol=tolerance, atol=tolerance)
    assert_moved(found, mixed(dtype))


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("name", ["native", "foreach"])
@pytest.mark.parametrize("dtype, tolerance", TOLERANCES, ids=str)
@pytest.mark.parametrize("case", NORMS, ids=str)
def test_every_rule_of_norms_has_kernels(
    case: Case, dtype: torch.dtype, tolerance: float, name: str, donate: bool
):
    opt, expected = case.optimizer(), mixed(dtype)
    found = tree.map(torch.clone, expected)
    a, b = opt.init(expected), opt.init(found)
    assert "native" in str(fo.plan(opt, expected)).partition("\n")[0]
    for seed in range(3):
        grads = random_like(expected, seed)
        expected, a = opt.update(grads, a, expected, execution="reference")
        found, b = opt.update(grads, b, found, execution=name, donate=donate)
        for x, y in zip(tree.leaves((found, b)), tree.leaves((expected, a))):
            assert torch.allclose(x.double(), y.double(), rtol=tolerance, atol=tolerance)
    some_moved = [bool((a != b).any()) for a, b in pairs(found, mixed(dtype))]
    assert all(some_moved)


@pytest.mark.parametrize("name", ["native", "foreach"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", [*NORMS, *TOTALS], ids=str)
def test_sums_are_a_few_bits_away(case: Case, dtype: torch.dtype, name: str):
    """In no more than docs/execution.md says; of a leaf's alone foreach has the bits."""
    opt = case.optimizer()
    like = {"w": torch.empty(300, 301, dtype=dtype), "b": torch.empty(7, dtype=dtype)}
    params = random_like(like, 1)
    state = opt.init(params)
    for step in range(case.row.warm + 2):
        given = random_like(like, 10 + step), state, params
        found = opt.update(*given, execution=name)
        before, (params, state) = params, opt.update(*given, execution="reference")
        for key, p in before.items():
            assert units_of_largest(found[0][key], params[key], p) <= 2
        if not case.together and (name == "foreach" or dtype is torch.float32):
            with ExactRoots() if name == "native" else nullcontext():
                assert_bits(found, opt.update(*given, execution="reference"))
        assert_moved(params, before, everywhere=False)


def pairs(a: Any, b: Any) -> list[tuple[Tensor, Tensor]]:
    return [(x, y) for x, y in zip(tree.leaves(a), tree.leaves(b)) if x.numel()]


def test_a_sum_over_many_blocks_is_exact():
    """Blocks are added in float64: 3 million ones are 3 million."""
    opt = fo.per_tensor(
        lambda g, p, *, step, lr: (p - lr * g.sum(),),
        name="total",
        slots={},
        hyper={"lr": Hyper(1.0)},
        norms=True,
    )
    p = torch.zeros(3_000_001)
    (new,) = opt.update([torch.ones_like(p)], opt.init([p]), [p], execution="native")[0]
    assert new.unique().tolist() == [-3_000_001.0]


def test_a_derivative_and_a_batch_are_the_references():
    opt, params = optimizer(), {"w": torch.ones(2, 3)}
    state, seen = opt.init(params), []

    def update(p: Any) -> Any:
        seen.append(str(fo.plan(opt, p, p, state)))
        return opt.update(p, state, p)[0]["w"]

    torch.vmap(update)({"w": torch.ones(4, 2, 3)})
    torch.func.grad(lambda p: update(p).sum())(params)
    for text in seen:
        assert "reference" in text and "each task's, whole" in text
    assert "native" in str(fo.plan(opt, params))


def test_what_is_not_declared_is_not_traced():
    text = str(fo.plan(optimizer(norms=False), torch.ones(3)))
    assert "reference" in text and "needs each leaf whole" in text


@pytest.mark.parametrize("dtype", [*(d for d, _ in TOLERANCES), torch.float16], ids=str)
@pytest.mark.parametrize("case", NORMS, ids=str)
def test_derivatives_are_finite_where_a_norm_is_zero(case: Case, dtype: torch.dtype):
    """Of a leaf's gradient, of the leaf, and of both; by all that there is."""
    opt, some = case.optimizer(), mixed(dtype)
    state, zeros = opt.init(some), tree.map(torch.zeros_like, some)
    step, steps = state.pop("step"), case.row.warm + 1

    def outer(x: Any) -> Tensor:
        params, state = x["params"], {"step": step, **x["slots"]}
        for _ in range(steps):
            params, state = opt.update(x["grads"], state, params, **x["hyper"])
        ends = zip(tree.leaves(params), tree.leaves(some))
        return torch.stack([(p.float() * (q + 1)).sum() for p, q in ends]).sum()

    for grads, params in ((zeros, some), (some, zeros), (zeros, zeros)):
        point = {"grads": grads, "params": params, "slots": state}
        slopes = torch.func.grad(outer)(point | {"hyper": case.tensors()})
        for path, x in zip(tree.paths(tree.flatten(slopes)[1]), tree.leaves(slopes)):
            assert x.isfinite().all(), path
        assert slopes["params"]["layers"][0]["weight"].any()


def test_where_there_is_no_ratio_the_step_is_plain():
    """At a zero parameter, and for a zero gradient."""
    zero, g = torch.zeros(2), torch.tensor([3.0, -4.0])
    lamb, lars = fo.lamb(lr=0.1, eps=0.0, weight_decay=0.0), fo.lars(lr=0.1)
    for name in ("reference", "native"):
        new, _ = lamb.update(g, lamb.init(zero), zero, execution=name)
        assert torch.allclose(new, torch.tensor([-0.1, 0.1]))
        new, _ = lars.update(g, lars.init(zero), zero, execution=name)
        assert torch.allclose(new, -0.1 * g)
        for opt in (lamb, lars):
            new, _ = opt.update(zero, opt.init(g), g, execution=name)
            assert torch.equal(new, g)
