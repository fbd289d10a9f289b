"""Meta-gradients with exact answers: every estimator against what is known by hand."""

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from influence import (
    START,
    THETA,
    TOTAL,
    TRUNCATED,
    influence,
    influence_loss,
    stationary,
)
from row import Case
from table import QUICK
from torch import Tensor
from trees import random_like

import funcopt as fo
from funcopt import tree


def f64(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def close(found: Any, expected: Any, tolerance: float = 1e-12) -> bool:
    """Relative to the largest entry of all leaves, which is not nothing."""
    a, b = tree.leaves(found), tree.leaves(expected)
    assert len(a) == len(b) > 0
    scale = max(abs(torch.as_tensor(y)).max() for y in b)
    assert scale > 1e-9, "a zero says nothing"
    return all(bool(((x - y).abs() <= tolerance * scale).all()) for x, y in zip(a, b))


# Influence balancing -------------------------------------------------------------------

BALANCING = {"hyper": {"theta": THETA}}


def balancing(steps: int, start: Tensor, objective: Any) -> fo.meta.Problem:
    return fo.meta.Problem(
        influence(), influence_loss, influence_loss, steps, start, objective=objective
    )


@pytest.mark.parametrize("window", TRUNCATED)
def test_truncated_windows_get_the_sign_wrong(window: int):
    problem, carry = balancing(2 * window, stationary(), "mean"), None
    for _ in range(2):
        estimate = fo.meta.truncated(problem, BALANCING, carry=carry, window=window)
        carry = estimate.carry
        slope = float(estimate.grads["hyper"]["theta"])
        assert abs(slope - TRUNCATED[window]) < 0.006  # the table's rounding
        assert (slope < 0) == (window <= 100)
    assert carry is not None and torch.allclose(carry["params"], stationary(), atol=1e-9)


EXACT = {
    "reverse": fo.meta.reverse,
    "mixed": fo.meta.mixed,
    "mixed, sqrt": partial(fo.meta.mixed, remat="sqrt"),
    "forward": fo.meta.forward,
}


@pytest.mark.parametrize(
    "name, steps",
    [
        ("reverse", 100),
        ("mixed", 100),
        ("forward", 100),
        pytest.param("reverse", 1000, marks=pytest.mark.slow),
    ],
)
def test_the_sum_of_all_losses_from_the_start(name: str, steps: int):
    estimate = EXACT[name](balancing(steps, START, "sum"), BALANCING)
    value, slope = TOTAL[steps]
    assert abs(float(estimate.value) - value) < 1e-4
    assert abs(float(estimate.grads["hyper"]["theta"]) - slope) < 1e-4


@pytest.mark.slow
def test_what_it_tends_to():
    """From rest, the derivative of a step's loss becomes 24."""
    problem = balancing(1200, stationary(), "mean")
    carry = fo.meta.forward(problem, BALANCING, window=1000).carry
    late = fo.meta.forward(problem, BALANCING, carry=carry, window=1)
    assert abs(float(late.grads["hyper"]["theta"]) - 24) < 0.1


@pytest.mark.parametrize(
    "name, particles", [("es", 200), ("es_single", 200), ("pes", 1000)]
)
def test_evolution_is_unbiased_in_windows(name: str, particles: int):
    """V is quadratic in θ: smoothing it leaves its derivative as it is."""
    problem, windows = balancing(100, START, "sum"), 1 if name == "es" else 10
    how: dict[str, Any] = {} if name == "es" else {"window": 10}
    generator, carry, parts = seeded(7), None, []
    for _ in range(windows):
        estimate = getattr(fo.meta, name)(
            problem,
            BALANCING,
            carry=carry,
            generator=generator,
            sigma=0.1,
            particles=particles,
            **how,
        )
        carry = estimate.carry
        parts.append(estimate)
    slope = sum(float(e.grads["hyper"]["theta"]) for e in parts)
    # At worst the windows' errors go all one way.
    error = sum(float(e.diagnostics["standard_error"]["hyper"]["theta"]) for e in parts)
    assert error < 0.15 * TOTAL[100][1]
    assert abs(slope - TOTAL[100][1]) < 2 * error


# Nine steps of Adam --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mixed", "mixed, sqrt", "forward"])
def test_nine_steps_of_adam_are_the_same_in_every_exact_way(name: str):
    """By the fast executors, which the estimators run."""
    matrix, row = torch.zeros(4, 3, dtype=torch.float64), torch.zeros(4).double()
    start = random_like({"w": matrix.T, "v": row}, seed=3)
    x, y = random_like((matrix, row), seed=4)

    def fit(p: Any, batch: Any, meta: Any) -> Tensor:
        error = (torch.tanh(x @ p["w"]) @ p["v"] - y) ** 2
        return (meta["weights"] * error).mean()

    problem = fo.meta.Problem(fo.adam(), fit, fit, 9)
    settings = {"lr": f64(0.1), "betas": (f64(0.8), f64(0.9)), "eps": f64(1e-2)}
    eta = {"init": start, "hyper": settings, "meta": {"weights": y.square()}}
    found, expected = (
        call(problem, eta).grads for call in (EXACT[name], fo.meta.reverse)
    )
    for a, b in zip(tree.leaves(found), tree.leaves(expected)):
        assert close([a], [b], 1e-14)


# A learned rate on a quadratic ---------------------------------------------------------

CURVATURE, ALPHA, FROM, K = 1.7, 0.23, 1.9, 6
Q = 1 - ALPHA * CURVATURE


def quadratic(x: Tensor, _: Any) -> Tensor:
    return 0.5 * CURVATURE * x**2


def learned_rate() -> fo.meta.Problem:
    return fo.meta.Problem(fo.sgd(), quadratic, quadratic, K, f64(FROM))


RATE = {"hyper": {"lr": f64(ALPHA)}}
BOTH = {"init": f64(FROM), **RATE}
FULL = -K * CURVATURE**2 * Q ** (2 * K - 1) * FROM**2


@pytest.mark.parametrize("name", EXACT)
def test_a_learned_rate_and_start(name: str):
    """x_K = q^K x₀ with q = 1 - αλ."""
    found = EXACT[name](learned_rate(), BOTH)
    expected = {"init": CURVATURE * Q ** (2 * K) * FROM, "hyper": {"lr": FULL}}
    assert close(found.grads, expected)
    assert close(found.value, 0.5 * CURVATURE * (Q**K * FROM) ** 2)


@pytest.mark.parametrize("window", range(1, K + 1))
def test_a_truncated_rate_is_its_windows_share(window: int):
    carry = fo.meta.advance(learned_rate(), RATE, K - window)
    found = fo.meta.truncated(learned_rate(), RATE, carry=carry, window=window)
    assert close(found.grads["hyper"]["lr"], FULL * window / K)


def test_a_rate_of_first_order():
    found = fo.meta.first_order(learned_rate(), BOTH).grads
    reach = CURVATURE * FROM * Q**K
    expected = {"init": reach, "hyper": {"lr": -FROM * reach * (1 - Q**K) / ALPHA}}
    assert close(found, expected)


@pytest.mark.parametrize("outer", [None, quadratic])
def test_a_rate_by_hypergradient_descent_is_the_product_of_two_gradients(outer: Any):
    problem, carry = fo.meta.Problem(fo.sgd(), quadratic, outer, K, f64(FROM)), None
    for k in range(K):
        found = fo.meta.hypergradient_descent(problem, RATE, carry=carry)
        carry = found.carry
        before, after = CURVATURE * Q**k * FROM, CURVATURE * Q ** (k + 1) * FROM
        assert close(found.grads["hyper"]["lr"], -after * before)
        assert carry["step"] == k + 1
        if outer is None:  # the next step's gradient is known
            assert close(carry["grads"], after)


@pytest.mark.parametrize("iterations", [1, 3, 40])
def test_a_rate_by_the_weight_update(iterations: int):
    found = fo.meta.weight_update_implicit(learned_rate(), RATE, iterations=iterations)
    end = Q**K * FROM
    expected = -CURVATURE * end**2 * (1 - Q**iterations) / ALPHA
    assert close(found.grads["hyper"]["lr"], expected)
    assert close(found.diagnostics["cotangent_ratio"], Q**iterations)


def test_reptile_is_the_way_back():
    problem = fo.meta.Problem(fo.sgd(lr=ALPHA), quadratic, quadratic, K)
    found = fo.meta.reptile_gradient(problem, {"init": f64(FROM)})
    assert close(found.grads["init"], FROM * (1 - Q**K))


@pytest.mark.parametrize("name", ["es", "pes", "es_single"])
def test_a_rate_by_evolution(name: str):
    """The width is small: the smoothed derivative is the derivative."""
    how: dict[str, Any] = {"generator": seeded(1), "sigma": 1e-3, "particles": 200_000}
    how |= {} if name == "es" else {"window": K // 2}
    slope, error, carry = f64(0.0), f64(0.0), None
    for _ in range(1 if name == "es" else 2):
        found = getattr(fo.meta, name)(learned_rate(), RATE, carry=carry, **how)
        slope, carry = slope + found.grads["hyper"]["lr"], found.carry
        error = error + found.diagnostics["standard_error"]["hyper"]["lr"]
    assert error < 0.1 * abs(FULL)
    assert abs(slope - FULL) < 3 * error


def test_a_rate_does_not_move_a_minimum():
    with pytest.raises(fo.MetaParameterError, match="implicit cannot see"):
        fo.meta.implicit(learned_rate(), RATE)


# A learned penalty on a quadratic ------------------------------------------------------

CENTRE, PENALTY, TARGET = 2.0, 0.3, 0.5
MINIMUM = CENTRE / (1 + PENALTY)
TRUTH = -(MINIMUM - TARGET) * CENTRE / (1 + PENALTY) ** 2
L2 = {"meta": f64(PENALTY)}


def penalised() -> fo.meta.Problem:
    """The minimum is that of the last batches; the first bends more."""

    def inner(x: Tensor, bend: Tensor, l2: Tensor) -> Tensor:
        return 0.5 * bend * (x - CENTRE) ** 2 + 0.5 * l2 * x**2

    def outer(x: Tensor, _: Any, l2: Tensor) -> Tensor:
        return 0.5 * (x - TARGET) ** 2

    bends = torch.ones(80, dtype=torch.float64)
    bends[0] = 3.0
    return fo.meta.Problem(fo.sgd(lr=0.5), inner, outer, 80, f64(0.0), batches=bends)


def test_a_penalty_by_conjugate_gradients_in_one_step():
    found = fo.meta.implicit(penalised(), L2, iterations=1)
    assert close(found.grads["meta"], TRUTH)
    assert found.diagnostics["residual"] < 1e-15
    assert found.diagnostics["gradient_norm"] < 1e-12
    more = fo.meta.implicit(penalised(), L2, iterations=5)  # there is nothing left to do
    assert close(more.grads["meta"], TRUTH) and not more.diagnostics["indefinite"]
    carry = fo.meta.advance(penalised(), L2, 30)
    rest = fo.meta.implicit(penalised(), L2, carry=carry)
    assert close(rest.grads["meta"], TRUTH) and rest.carry["step"] == 80


@pytest.mark.parametrize("terms", [1, 2, 7, 60])
def test_a_penalty_by_a_neumann_series(terms: int):
    left = (1 - 0.4 * (1 + PENALTY)) ** terms
    found = fo.meta.implicit(
        penalised(), L2, solver="neumann", iterations=terms, step_size=0.4
    )
    assert close(found.grads["meta"], TRUTH * (1 - left))
    assert abs(found.diagnostics["residual"] - abs(left)) < 1e-12
    if terms == 1:
        identity = fo.meta.implicit(penalised(), L2, solver="identity", step_size=0.4)
        assert close(identity.grads, found.grads, 0.0)


def test_a_penalty_damped():
    found = fo.meta.implicit(penalised(), L2, damping=0.7)
    assert close(found.grads["meta"], TRUTH * (1 + PENALTY) / (1 + PENALTY + 0.7))


def test_conjugate_gradients_stop_where_the_loss_bends_down():
    def saddle(p: Tensor, _: Any, weight: Tensor) -> Tensor:
        return 0.5 * (p[0] ** 2 - weight * p[1] ** 2)

    problem = fo.meta.Problem(
        fo.sgd(lr=0.0), saddle, lambda p, _, w: p.sum(), 1, torch.ones(2).double()
    )
    found = fo.meta.implicit(problem, {"meta": f64(1.0)})
    assert found.diagnostics["indefinite"] and found.grads["meta"].isfinite()


# A penalty for each weight of a logistic regression ------------------------------------

FEATURES = 20
PUBLISHED = {0: 0.693147242, 10: 0.628559113, 20: 0.624390602, 99: 0.624089837}  # float32


def logistic(steps: int = 100) -> tuple[fo.meta.Problem, Any]:
    """The problem of hypertorch's notebook, number by number."""
    draw = np.random.RandomState(1)
    truth, x = draw.randn(FEATURES), draw.randn(1000, FEATURES)
    y = x @ truth + 0.1 * draw.randn(1000) > 0
    order = draw.permutation(1000)
    valid, train = (
        (torch.from_numpy(x[part]), torch.from_numpy(y[part]).double())
        for part in (order[:500], order[500:])
    )

    def cross_entropy(w: Tensor, batch: Any) -> Tensor:
        logits = batch[0] @ w
        return (
            torch.logaddexp(logits, torch.zeros_like(logits)) - batch[1] * logits
        ).mean()

    def inner(w: Tensor, batch: Any, l2: Tensor) -> Tensor:
        return cross_entropy(w, batch) + 0.5 * (l2 * w * w).sum()

    def outer(w: Tensor, batch: Any, l2: Tensor) -> Tensor:
        return cross_entropy(w, batch)

    problem = fo.meta.Problem(
        fo.sgd(lr=0.1),
        inner,
        outer,
        steps,
        torch.zeros(FEATURES).double(),
        batch=train,
        outer_batch=valid,
    )
    return problem, {"meta": torch.ones(FEATURES).double()}


def test_the_published_losses_of_a_logistic_regression():
    problem, eta = logistic()
    losses = fo.meta.reverse(problem, eta).diagnostics["losses"]
    for step, value in PUBLISHED.items():
        assert abs(float(losses[step]) - value) < 4e-7


@pytest.mark.slow
def test_estimators_agree_on_a_logistic_regression():
    """At the minimum all give its derivative; what looks back k steps, to its power."""
    problem, eta = logistic(300)
    exact = fo.meta.reverse(problem, eta)
    others = {
        **{name: (call(problem, eta), 1e-13) for name, call in EXACT.items()},
        "cg": (fo.meta.implicit(problem, eta, iterations=20), 1e-13),
        "neumann": (
            fo.meta.implicit(
                problem, eta, solver="neumann", iterations=200, step_size=0.5
            ),
            1e-13,
        ),
        "weight update": (
            fo.meta.weight_update_implicit(problem, eta, iterations=200),
            1e-10,
        ),
    }
    for name, (found, tolerance) in others.items():
        assert found.value == exact.value, name
        assert close(found.grads, exact.grads, tolerance), name
    assert others["cg"][0].diagnostics["gradient_norm"] < 1e-14
    one_step = fo.meta.implicit(problem, eta, solver="identity")
    assert not close(one_step.grads, exact.grads, 0.1)
    along = tree.leaves(one_step.grads)[0] @ tree.leaves(exact.grads)[0]
    assert along > 0  # biased, and downhill


# Hypergradients of every optimizer -----------------------------------------------------


def coupled(params: Any, weights: Any, _: Any = None) -> Tensor:
    """Smooth, and nowhere near a zero gradient."""
    leaves = zip(tree.leaves(params), tree.leaves(weights))
    total = torch.stack([(torch.exp(p / 2) * c).sum() for p, c in leaves]).sum()
    return total + 0.01 * total**2


@pytest.mark.slow
@pytest.mark.parametrize("case", QUICK, ids=str)
def test_hypergradients_are_central_differences(case: Case):
    params = case.small(seed=1)
    problem = fo.meta.Problem(
        case.optimizer(),
        coupled,
        coupled,
        3,
        batch=random_like(params, seed=2),
        outer_batch=random_like(params, seed=3),
    )
    eta, h = {"init": params, "hyper": case.tensors()}, 1e-5
    found, along = fo.meta.reverse(problem, eta), random_like(eta, seed=20)
    ahead, behind = (
        fo.meta.reverse(problem, tree.map(lambda x, d, h=h: x + h * d, eta, along)).value
        for h in (h, -h)
    )
    products = tree.map(lambda g, d: (g * d).sum(), found.grads, along)
    slope = torch.stack(tree.leaves(products)).sum()
    assert abs((ahead - behind) / (2 * h) - slope) <= 1e-7 * abs(slope)
    for other in EXACT.values():
        assert close(other(problem, eta).grads, found.grads, 1e-12)
