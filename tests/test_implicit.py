"""Implicit differentiation: no curvature, frozen leaves, complex ones, diagnostics."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import funcopt as fo

DOUBLE = torch.float64


def random(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=DOUBLE)


def at(params: Any, inner: Any, outer: Any, **more: Any) -> fo.meta.Problem:
    """Where the training has ended already, says a rate of 0."""
    return fo.meta.Problem(fo.sgd(lr=0.0), inner, outer, 1, params, **more)


@pytest.mark.parametrize("dtype, tolerance", [(DOUBLE, 1e-10), (torch.float32, 1e-3)])
@pytest.mark.parametrize("seed", range(4))
def test_more_products_than_directions_add_no_rounding(
    dtype: Any, tolerance: float, seed: int
):
    """Fewer equations than unknowns: most directions have no curvature."""
    x, goals, params = (
        random(*shape, seed=10 * seed + i).to(dtype)
        for i, shape in enumerate([(2, 9), (2,), (9,)])
    )

    def inner(p: Tensor, _: Any, weights: Tensor) -> Tensor:
        return 0.5 * (weights * (x @ p - goals) ** 2).sum()

    def outer(p: Tensor, _: Any, weights: Tensor) -> Tensor:
        return (x @ p).square().sum()

    eta = {"meta": torch.ones(2, dtype=dtype)}
    found = fo.meta.implicit(at(params, inner, outer), eta, iterations=40)
    made = x @ params
    assert_close(
        found.grads["meta"], -2 * made * (made - goals), rtol=tolerance, atol=tolerance
    )
    assert found.diagnostics["residual"] < tolerance
    assert not found.diagnostics["indefinite"]


@pytest.mark.parametrize("bend", [-2.0, 1e-18], ids=["down", "not, to rounding"])
def test_where_the_loss_bends_down_nothing_is_added_any_more(bend: float):
    bends, wanted = torch.tensor([bend, 1.0, 3.0, 5.0]).double(), random(4, seed=1)
    problem = at(
        torch.zeros(4).double(),
        lambda p, _, force: 0.5 * (bends * p) @ p + force @ p,
        lambda p, _, force: wanted @ p,
    )
    eta = {"meta": torch.zeros(4).double()}
    few, many = (fo.meta.implicit(problem, eta, iterations=n) for n in (4, 30))
    assert few.diagnostics["indefinite"] and 0.1 < few.grads["meta"].norm() < 100
    assert_close(many.grads, few.grads, rtol=0, atol=0)


@pytest.mark.parametrize("solver", ["cg", "neumann", "identity"])
def test_the_residual_is_that_of_what_was_found(solver: Any):
    basis = torch.linalg.qr(random(10, 10, seed=1))[0]
    hessian = ((basis * torch.logspace(0, -4, 10, dtype=DOUBLE)) @ basis.mT).float()
    wanted = random(10, seed=2).float()
    problem = at(
        torch.zeros(10),
        lambda p, _, force: 0.5 * p @ hessian @ p + force @ p,
        lambda p, _, force: wanted @ p,
    )
    found = fo.meta.implicit(
        problem, {"meta": torch.zeros(10)}, solver=solver, iterations=50, damping=1e-5
    )
    v = -found.grads["meta"].double()
    left = wanted.double() - hessian.double() @ v - 1e-5 * v
    residual = found.diagnostics["residual"]
    assert residual.item() == pytest.approx(
        float(left.norm() / wanted.double().norm()), rel=0.5
    )
    assert residual > 1e-5  # what conjugate gradients keep by themselves is 1e-20


@pytest.mark.parametrize("scale", [1e-23, 1.0, 1e22])
def test_squares_out_of_range_are_not_taken(scale: float):
    """In single precision: at the ends a sum of squares is 0, or infinite."""
    bends, wanted = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, -2.0, 1.0])
    problem = at(
        torch.zeros(3),
        lambda p, _, force: 0.5 * (bends * p) @ p + force @ p,
        lambda p, _, force: scale * (wanted @ p),
    )
    found, early = (
        fo.meta.implicit(problem, {"meta": torch.zeros(3)}, iterations=n) for n in (10, 1)
    )
    assert_close(found.grads["meta"] / scale, -wanted / bends, rtol=1e-5, atol=0)
    assert found.diagnostics["residual"] < 1e-5
    # wanted - wantedᵀwanted / wantedᵀH wanted · H wanted is (½, 0, -½)
    assert early.diagnostics["residual"].item() == pytest.approx(12**-0.5, rel=1e-5)


def test_after_the_end_nothing_grows():
    """The first direction bends down; of the second, a thousand times as long, and so
    on, squares would be infinite, and 0 · inf is no zero."""
    problem = at(
        torch.zeros(1000),
        lambda p, _, force: force @ p - 0.5 * p @ p,
        lambda p, _, force: p.sum(),
    )
    found = fo.meta.implicit(problem, {"meta": torch.zeros(1000)}, iterations=20)
    assert found.diagnostics["indefinite"] and not found.grads["meta"].any()


@pytest.mark.parametrize("solver", ["cg", "neumann", "identity"])
def test_where_nothing_moves_the_outer_loss_alone_has_a_slope(solver: Any):
    problem = fo.meta.Problem(
        fo.freeze(fo.sgd(lr=0.1), True),
        lambda p, _, l2: l2 * p**2,
        lambda p, _, l2: l2**2 * p,
        1,
        torch.tensor(2.0),
    )
    found = fo.meta.implicit(problem, {"meta": torch.tensor(3.0)}, solver=solver)
    assert found.grads["meta"] == 12.0 and found.diagnostics["residual"] == 0.0


@pytest.mark.parametrize("solver", ["cg", "neumann", "identity"])
@pytest.mark.parametrize("where", ["outer", "inner"])
def test_what_is_not_finite_is_no_zero(solver: Any, where: str):
    odd = {"outer": 1.0, "inner": 1.0, where: float("nan")}
    problem = at(
        torch.ones(3),
        lambda p, _, force: odd["inner"] * (p**2).sum() + force @ p,
        lambda p, _, force: odd["outer"] * p.sum(),
    )
    found = fo.meta.implicit(problem, {"meta": torch.zeros(3)}, solver=solver)
    assert found.diagnostics["residual"].isnan()
    if solver != "identity" or where == "outer":
        assert found.grads["meta"].isnan().all()


@pytest.mark.parametrize("name", ["implicit", "weight_update_implicit"])
@pytest.mark.parametrize("solver", ["cg", "neumann", "identity"])
def test_an_outer_loss_without_the_parameters(name: str, solver: Any):
    problem = at(
        {"p": torch.ones(2), "nothing": torch.ones(0)},
        lambda p, _, l2: (p["p"] ** 2).sum() * l2,
        lambda p, _, l2: l2**2,
    )
    how = {"solver": solver} if name == "implicit" else {}
    found = getattr(fo.meta, name)(problem, {"meta": torch.tensor(3.0)}, **how)
    assert found.grads["meta"] == 6.0
    key = "residual" if name == "implicit" else "cotangent_ratio"
    assert found.diagnostics[key] == 0.0


@pytest.mark.parametrize("solver", ["cg", "neumann"])
def test_complex_leaves_are_pairs_of_real_ones(solver: Any):
    hessian = random(6, 6, seed=3)
    hessian = torch.eye(6, dtype=DOUBLE) + 0.1 * hessian @ hessian.mT
    goal, forces = random(6, seed=4), random(6, 2, seed=5)

    def inner(p: Tensor, _: Any, eta: Tensor) -> Tensor:
        pairs = torch.view_as_real(p).reshape(-1) if p.is_complex() else p
        return 0.5 * pairs @ hessian @ pairs + pairs @ (forces @ eta)

    def outer(p: Tensor, _: Any, eta: Tensor) -> Tensor:
        pairs = torch.view_as_real(p).reshape(-1) if p.is_complex() else p
        return (pairs - goal).square().sum()

    real = random(6, seed=6)
    found, expected = (
        fo.meta.implicit(
            at(params, inner, outer),
            {"meta": torch.ones(2, dtype=DOUBLE)},
            solver=solver,
            iterations=8,
            step_size=0.3,
        )
        for params in (torch.view_as_complex(real.reshape(3, 2)), real)
    )
    assert expected.grads["meta"].abs().min() > 0.1
    assert_close(found.grads, expected.grads, rtol=1e-10, atol=1e-10)
    assert_close(found.diagnostics, expected.diagnostics, rtol=1e-6, atol=1e-10)
    assert not found.diagnostics["residual"].is_complex()


FROZEN = {"body": True, "head": False, "gap": False}
STILL = {
    "freeze": fo.freeze(fo.sgd(lr=0.5), FROZEN),
    "accumulate": fo.accumulate(fo.freeze(fo.sgd(lr=0.5), FROZEN), 2),
    "partition": fo.freeze(
        fo.partition({"some": fo.sgd(lr=0.5, momentum=0.1)}, "some"), FROZEN
    ),
}


@pytest.mark.parametrize("opt", STILL.values(), ids=[*STILL])
@pytest.mark.parametrize("many", [False, True])
def test_a_frozen_leaf_is_no_unknown(opt: fo.Optimizer, many: bool):
    """Its own gradient is not 0, and it does not follow the penalty."""

    def inner(p: Any, goal: Tensor, l2: Tensor) -> Tensor:
        near = 0.5 * (p["head"] - p["body"] - goal) ** 2
        return near + 0.5 * l2 * (p["head"] ** 2 + p["body"] ** 2)

    def outer(p: Any, _: Any, l2: Tensor) -> Tensor:
        return 0.5 * p["head"] ** 2 + 3.0 * p["body"]

    start = {"body": torch.tensor(2.0).double(), "head": torch.tensor(0.0).double()}
    l2, goals = torch.tensor(0.5).double(), random(3, seed=1)

    def estimate(goal: Tensor) -> Any:
        problem = fo.meta.Problem(
            opt, inner, outer, 30, {**start, "gap": None}, batch=goal
        )
        found = fo.meta.implicit(problem, {"meta": l2})
        return found.grads["meta"], found.diagnostics

    if many:
        found, diagnostics = torch.func.vmap(estimate)(goals)
    else:
        goals = goals[0]
        found, diagnostics = estimate(goals)
    # head = (body + goal) / (1 + l2), and nothing else moves.
    assert_close(found, -((2.0 + goals) ** 2) / (1 + l2) ** 3, rtol=1e-6, atol=1e-8)
    assert (diagnostics["gradient_norm"] < 1e-4).all()


def test_imaml_knows_that_a_frozen_leaf_is_where_it_starts():
    def loss(p: Any, batch: Any) -> Tensor:
        return (torch.tanh(batch[0] @ p["head"]) * p["body"] - batch[1]).square().mean()

    def near(p: Any, batch: Any, start: Any) -> Tensor:
        return loss(p, batch) + (p["head"] - start["head"]).square().sum()

    opt, steps = STILL["freeze"], 40
    theta = {"body": random(seed=2), "head": random(2, seed=3), "gap": None}
    support, query = ((random(4, 3, 2, seed=i), random(4, 3, seed=i + 1)) for i in (4, 6))

    def unrolled(theta: Any, task: Any) -> Tensor:
        run = fo.unroll(opt, near, theta, task[0], steps=steps, meta=theta)
        return loss(run.params, task[1])

    family = fo.meta.imaml(loss, opt, steps=steps)
    found, expected = (
        fo.meta.value_and_grad(task_loss)(theta, (support, query))
        for task_loss in (family.task_loss, unrolled)
    )
    assert expected[1]["body"].abs() > 0.1
    assert_close(found, expected, rtol=1e-8, atol=1e-8)
