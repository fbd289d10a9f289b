"""Estimators of meta-gradients: one signature, what each sees, and what they refuse."""

import gc
import io
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vjp, vmap
from torch.utils._python_dispatch import TorchDispatchMode

import funcopt as fo
from funcopt import tree
from funcopt.hyper import Hyper
from funcopt.meta.estimate import KINDS, SEES, SMOOTHED, keys_seen

STEPS = 4


def random(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def f64(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def fit(p: Any, batch: Any, meta: Any = None) -> Tensor:
    x, y = batch
    error = (torch.tanh(x @ p["w"]) * p["scale"] - y) ** 2
    return (error if meta is None else meta["weights"] * error).mean()


def score(p: Any, batch: Any, meta: Any = None) -> Tensor:
    return fit(p, batch)


PARAMS = {"w": random(3, seed=1), "scale": f64(1.3)}
TRAIN = random(5, 3, seed=2), random(5, seed=3)
VALID = random(6, 3, seed=4), random(6, seed=5)


def learned_rule() -> fo.Optimizer:
    def rule(g: Tensor, p: Tensor, *, step: Any, lr: Any, gain: Any) -> tuple[Tensor]:
        return (p - lr * torch.tanh(gain * g),)

    return fo.elementwise(
        rule, name="learned", slots={}, hyper={"lr": Hyper(0.1), "gain": Hyper(2.0)}
    )


def problem(opt: fo.Optimizer | None = None, **more: Any) -> fo.meta.Problem:
    given = {"steps": STEPS, "params": PARAMS, "batch": TRAIN, "outer_batch": VALID}
    return fo.meta.Problem(opt or fo.sgd(lr=0.1), fit, score, **{**given, **more})


def swarm(call: Callable[..., Any], **given: Any) -> Callable[..., Any]:
    """Few particles, narrow: a beta must not come to 1."""

    def called(*arguments: Any, **options: Any) -> fo.meta.Estimate:
        options = {"generator": seeded(), "sigma": 0.01, "particles": 4} | given | options
        return call(*arguments, **options)

    return called


#: every estimator, with as few options as it takes
CALLS: dict[str, Callable[..., fo.meta.Estimate]] = {
    "reverse": fo.meta.reverse,
    "mixed": fo.meta.mixed,
    "truncated": partial(fo.meta.truncated, window=STEPS),
    "first_order": fo.meta.first_order,
    "reptile_gradient": fo.meta.reptile_gradient,
    "forward": fo.meta.forward,
    "implicit": fo.meta.implicit,
    "weight_update_implicit": fo.meta.weight_update_implicit,
    "hypergradient_descent": fo.meta.hypergradient_descent,
    "es": swarm(fo.meta.es),
    "pes": swarm(fo.meta.pes, window=STEPS),
    "es_single": swarm(fo.meta.es_single, window=STEPS),
}

#: of each kind of meta-parameter: an optimizer that has it, and an eta of nothing else
ETAS: dict[str, tuple[fo.Optimizer, Any]] = {
    "init": (fo.sgd(lr=0.1), {"init": PARAMS}),
    "rates": (
        fo.adam(),
        {"hyper": {"lr": f64(0.1), "betas": (f64(0.8), f64(0.9))}},
    ),
    "decay": (fo.adamw(lr=0.1), {"hyper": {"weight_decay": f64(0.1)}}),
    "rule": (learned_rule(), {"hyper": {"gain": f64(1.5)}}),
    "meta": (fo.sgd(lr=0.1), {"meta": {"weights": random(5, seed=6).abs()}}),
}


def test_every_estimator_and_every_kind_is_under_test():
    assert CALLS.keys() == SEES.keys() and ETAS.keys() == KINDS.keys()
    assert all(seen.keys() <= KINDS.keys() for seen in SEES.values())


def table_of_what_is_seen() -> str:
    """What stands in docs/estimators.md."""
    rows = [["", *(what for _, what in KINDS.values())], ["---"] * (1 + len(KINDS))]
    rows += [
        [f"`{name}`", *(seen.get(kind, "raises") for kind in KINDS)]
        for name, seen in SEES.items()
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def test_the_docs_have_the_table():
    page = Path(__file__).parents[1] / "docs" / "estimators.md"
    assert f"\n{table_of_what_is_seen()}\n" in page.read_text()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CALLS)
def test_what_an_estimator_sees_has_a_gradient_and_the_rest_raises(name: str, kind: str):
    opt, eta = ETAS[kind]
    # Adam's first step is the same for all betas.
    carry = None if kind == "init" else fo.meta.advance(problem(opt), eta, 1)
    if name == "reptile_gradient" and kind != "init":
        carry = None
    if kind in SEES[name]:
        estimate = CALLS[name](problem(opt), eta, carry=carry)
        assert estimate.without_influence() == []
        for g, x in zip(tree.leaves(estimate.grads), tree.leaves(eta), strict=True):
            assert (g.shape, g.dtype) == (x.shape, x.dtype) and g.isfinite().all()
        return
    with pytest.raises(fo.MetaParameterError) as caught:
        CALLS[name](problem(opt), eta, carry=carry)
    message, key = str(caught.value), KINDS[kind][0]
    assert message.startswith(f"{name} cannot see eta['{key}']: ")
    able = [other for other in SEES if key in keys_seen(other)]
    assert able and all(f"'{other}'" in message for other in able)


@pytest.mark.parametrize("name", CALLS)
def test_one_result_type_detached_and_like_eta(name: str):
    opt, eta = ETAS[next(iter(SEES[name]))]
    eta = tree.map(lambda x: x.clone().requires_grad_(), eta)
    before = tree.map(torch.clone, tree.detach(eta))
    estimate = CALLS[name](problem(opt), eta)
    assert type(estimate) is fo.meta.Estimate and estimate.value.shape == ()
    assert tree.flatten(estimate.grads)[1] == tree.flatten(eta)[1]
    tensors = [x for x in tree.leaves(tuple(estimate)) if isinstance(x, Tensor)]
    assert len(tensors) > 3 and not any(x.requires_grad for x in tensors)
    assert tree.leaves(tree.map(torch.equal, tree.detach(eta), before))
    saved = io.BytesIO()
    torch.save(estimate.carry, saved)
    saved.seek(0)
    again = torch.load(saved, weights_only=True)
    assert again["step"] == estimate.carry["step"]
    assert tree.flatten(again)[1] == tree.flatten(estimate.carry)[1]


def test_what_has_no_influence_is_named():
    eta = {"meta": {"weights": torch.ones(5).double(), "idle": f64(1.0)}}
    estimate = fo.meta.reverse(problem(), eta)
    assert estimate.without_influence() == ["meta.idle"]


# Windows and carries -------------------------------------------------------------------

LR = {"hyper": {"lr": f64(0.2)}}


def test_windows_go_on_bit_for_bit_and_start_anew_at_the_end():
    whole = fo.meta.advance(problem(fo.adam()), LR, STEPS)
    carry = None
    for window, step in [(1, 1), (2, 3), (7, STEPS)]:  # the last is cut short
        estimate = fo.meta.truncated(problem(fo.adam()), LR, carry=carry, window=window)
        carry = estimate.carry
        assert carry["step"] == step
    assert torch.equal(carry["params"]["w"], whole["params"]["w"])
    assert carry["state"]["step"].tolist() == [STEPS, STEPS]
    anew = fo.meta.truncated(problem(fo.adam()), LR, carry=carry, window=1)
    first = fo.meta.truncated(problem(fo.adam()), LR, window=1)
    assert anew.carry["step"] == 1 and torch.equal(anew.value, first.value)
    assert torch.equal(anew.grads["hyper"]["lr"], first.grads["hyper"]["lr"])


def test_batches_and_per_step_values_go_with_the_step():
    xs, ys = random(STEPS, 5, 3, seed=20), random(STEPS, 5, seed=21)

    def mark(eta: Any) -> Any:
        return {"hyper": {"lr": fo.per_step(eta["hyper"]["lr"].exp())}}

    given = problem(batch=None, batches=(xs, ys), constrain=mark, objective="sum")
    eta = {"hyper": {"lr": -2 + 0.1 * random(STEPS, seed=22)}}
    parts, carry = [], None
    for _ in range(STEPS):
        estimate = fo.meta.truncated(given, eta, carry=carry, window=1)
        parts.append(estimate.grads["hyper"]["lr"])
        carry = estimate.carry
    assert torch.equal(torch.stack(parts) != 0, torch.eye(STEPS, dtype=torch.bool))

    def by_hand(log_lr: Tensor) -> Tensor:
        p, total = PARAMS, torch.zeros(())
        for k in range(STEPS):
            g = torch.func.grad(fit)(p, (xs[k], ys[k]))
            p = {name: p[name] - log_lr[k].exp() * g[name] for name in p}
            total = total + fit(p, VALID)
        return total

    exact = fo.meta.reverse(given, eta)
    slope = torch.func.grad(by_hand)(eta["hyper"]["lr"])
    assert torch.allclose(exact.value, by_hand(eta["hyper"]["lr"]), rtol=1e-12)
    assert torch.allclose(exact.grads["hyper"]["lr"], slope, rtol=1e-11)


def test_no_outer_loss_is_the_inner_loss_of_the_step_that_follows():
    xs, ys = random(STEPS, 5, 3, seed=20), random(STEPS, 5, seed=21)
    given = fo.meta.Problem(
        fo.sgd(), fit, None, STEPS, PARAMS, batches=(xs, ys), objective="sum"
    )
    run = fo.unroll(fo.sgd(lr=0.2), fit, PARAMS, batches=(xs, ys))
    expected = run.losses[1:].sum() + fit(run.params, (xs[-1], ys[-1]))
    assert torch.allclose(fo.meta.reverse(given, LR).value, expected, rtol=1e-14)


@pytest.mark.parametrize("objective", ["last", "mean", "sum"])
@pytest.mark.parametrize("name", ["pes", "es_single"])
def test_windows_of_a_swarm_add_up(name: str, objective: Any):
    """What the windows' values add up to is what one window of all steps gives."""
    call: Any = getattr(fo.meta, name)
    given = problem(fo.sgd(), objective=objective)
    how = {"sigma": 0.05, "particles": 3}
    whole = fo.meta.es(given, LR, generator=seeded(1), **how)
    generator, carry, total = seeded(1), None, f64(0.0)
    for _ in range(2):
        part = call(given, LR, window=2, generator=generator, carry=carry, **how)
        carry, total = part.carry, total + part.grads["hyper"]["lr"]
    if objective == "mean":
        total = total / 2
    same = torch.allclose(total, whole.grads["hyper"]["lr"], rtol=1e-11)
    assert same == (name == "es_single")  # pes draws anew for each window
    kept = {"pes": "perturbation_sums", "es_single": "perturbations"}[name]
    assert carry is not None and carry[kept]["hyper"]["lr"].shape == (3,)
    assert carry["params"]["w"].shape == (6, 3)
    # From the end it begins anew, and nothing of what was drawn before has a part.
    eta = {**LR, "init": PARAMS}
    anew, first = (
        call(given, eta, window=2, generator=seeded(2), carry=at, **how).grads
        for at in (carry, None)
    )
    assert all(map(torch.equal, tree.leaves(anew), tree.leaves(first)))


def test_a_swarm_is_the_formula_written_out():
    generator = seeded(3)
    noise = 0.05 * torch.randn(4, generator=generator, dtype=torch.float64)

    def value(lr: Tensor) -> Tensor:
        return fo.meta.reverse(problem(fo.sgd()), {"hyper": {"lr": lr}}).value

    ahead = torch.stack([value(0.2 + e) for e in noise])
    behind = torch.stack([value(0.2 - e) for e in noise])
    each = noise * (ahead - behind) / (2 * 0.05**2)
    for chunk_size, chunks in ((None, 1), (3, 3)):  # of eight trainings
        calls = []

        def noted(p: Any, batch: Any, calls: list[None] = calls) -> Tensor:
            calls.append(None)
            return fit(p, batch)

        found = fo.meta.es(
            replace(problem(fo.sgd()), inner_loss=noted),
            LR,
            generator=seeded(3),
            sigma=0.05,
            particles=4,
            chunk_size=chunk_size,
        )
        assert torch.allclose(found.grads["hyper"]["lr"], each.mean(), rtol=1e-10)
        error = found.diagnostics["standard_error"]["hyper"]["lr"]
        assert torch.allclose(error, each.std() / 2, rtol=1e-10)
        assert torch.allclose(found.value, torch.cat([ahead, behind]).mean(), rtol=1e-12)
        assert found.diagnostics["values"].shape == (4, 2)
        assert len(calls) == chunks * STEPS
        assert torch.allclose(found.diagnostics["values"][:, 0], ahead, rtol=1e-12)
    lone = CALLS["es"](
        problem(fo.sgd()), LR, generator=seeded(3), sigma=0.05, particles=1
    )
    assert torch.allclose(lone.grads["hyper"]["lr"], each[0], rtol=1e-10)
    assert "standard_error" not in lone.diagnostics  # one pair tells of none


def test_a_width_for_each_meta_parameter():
    eta = {"init": PARAMS, "hyper": {"lr": f64(0.1)}}
    how = {"generator": seeded(), "particles": 2}
    narrow = {"init": 1e-9, "hyper": {"lr": 0.1}}
    found = fo.meta.es_single(problem(), eta, window=1, sigma=narrow, **how).carry
    assert found["perturbations"]["init"]["w"].abs().max() < 1e-7
    assert found["perturbations"]["hyper"]["lr"].abs().max() > 1e-3
    by_name = fo.by_name({"init.*": 1e-9}, default=0.1)
    how["generator"] = seeded()
    again = fo.meta.es_single(problem(), eta, window=1, sigma=by_name, **how).carry
    assert torch.equal(
        again["perturbations"]["init"]["w"], found["perturbations"]["init"]["w"]
    )


def test_a_width_for_each_tensor_of_an_eta_with_gaps():
    eta = {"meta": {"gap": None, "weights": torch.ones(5).double()}}
    sigma = tree.map(lambda x: 0.01 * torch.ones_like(x), eta)
    found, expected = (CALLS["es"](problem(), eta, sigma=s) for s in (sigma, 0.01))
    one, other = (x.grads["meta"]["weights"] for x in (found, expected))
    assert one.all() and torch.allclose(one, other, rtol=1e-12)


@pytest.mark.parametrize("name", ["reverse", "first_order", "truncated"])
def test_estimators_run_under_vmap_over_tasks(name: str):
    xs, ys = random(3, 5, 3, seed=30), random(3, 5, seed=31)
    eta = {"init": PARAMS, "hyper": {"lr": f64(0.1)}}

    def grads(x: Tensor, y: Tensor) -> Any:
        return CALLS[name](problem(fo.adam(), batch=(x, y)), eta).grads

    batched = vmap(grads)(xs, ys)
    for i in range(3):
        row = tree.map(lambda x, i=i: x[i], batched)
        for a, b in zip(tree.leaves(row), tree.leaves(grads(xs[i], ys[i]))):
            assert b.abs().max() > 1e-4 and torch.allclose(a, b, rtol=1e-10)


def test_random_windows_are_seeded_and_within_bounds():
    generator, again = seeded(5), seeded(5)
    drawn = [fo.meta.random_window(2, 9, generator=generator) for _ in range(400)]
    assert drawn == [fo.meta.random_window(2, 9, generator=again) for _ in drawn]
    assert set(drawn) == set(range(2, 10))
    assert drawn.count(2) > 2 * drawn.count(9)  # 0.25 against 0.065


# What tells whether they are of use ----------------------------------------------------


def test_metasmoothness_is_the_formula_written_out():
    """Three trainings; of the parameters' changes, how many keep their sign."""
    eta = {"hyper": {"lr": f64(0.9)}, "meta": None}
    along = {"hyper": {"lr": f64(2.0)}, "meta": None}

    def rough(p: Tensor, _: Any) -> Tensor:
        return torch.cos(3 * p).sum()

    start = torch.linspace(0.2, 2.5, 12, dtype=torch.float64)
    given = fo.meta.Problem(fo.sgd(), rough, None, 6, start)
    ends = [
        fo.unroll(
            fo.sgd(), rough, start, steps=6, hyper={"lr": f64(0.9 + 0.1 * times)}
        ).params
        for times in range(3)
    ]
    first, second = ends[1] - ends[0], ends[2] - ends[1]
    agree = torch.where(first * second > 0, 1.0, -1.0)
    expected = (first.abs() / first.abs().sum() * agree).sum()
    assert -0.9 < expected < 0.9  # some do, some do not
    found = fo.meta.metasmoothness(given, eta, along, h=0.05)
    assert abs(found - expected) < 1e-12
    smooth = fo.meta.metasmoothness(problem(), LR, LR, h=1e-3)
    assert abs(smooth - 1) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_metasmoothness_in_half_precision(dtype: torch.dtype):
    """Steps that a rate has no digits for, and sums that float16 has no numbers for."""

    def rough(p: Tensor, _: Any) -> Tensor:
        return torch.cos(3 * p.float()).sum()

    start = torch.linspace(0.2, 9.0, 100_000).to(dtype)
    half, wide = (
        fo.meta.Problem(fo.sgd(), rough, None, 3, p) for p in (start, start.float())
    )
    rate, along = (
        torch.tensor(0.7, dtype=dtype),
        {"hyper": {"lr": torch.ones((), dtype=dtype)}},
    )
    for h, bound in ((0.5, 0.9), (1e-5, 1.01)):
        expected = fo.meta.metasmoothness(wide, {"hyper": {"lr": rate.float()}}, along, h)
        found = fo.meta.metasmoothness(wide, {"hyper": {"lr": rate}}, along, h)
        assert 0.01 < abs(expected) < bound and torch.equal(found, expected)
    expected = fo.meta.metasmoothness(wide, {"hyper": {"lr": rate}}, along, 0.5)
    found = fo.meta.metasmoothness(half, {"hyper": {"lr": rate}}, along, 0.5)
    assert abs(found - expected) < 20 * torch.finfo(dtype).eps


# Errors --------------------------------------------------------------------------------

WEIGHTS = {"meta": {"weights": torch.ones(5).double()}}
HOW: dict[str, Any] = {"generator": seeded(), "window": 2}
REFUSED: list[tuple[Callable[[], Any], type[Exception], type[Exception], list[str]]] = [
    (lambda: problem(steps=0), fo.HyperparameterError, ValueError, ["steps", "0"]),
    (lambda: problem(objective="best"), fo.HyperparameterError, ValueError, ["'best'"]),
    (
        lambda: problem(batches=TRAIN),
        fo.StructureError,
        ValueError,
        ["batch", "batches", "not both"],
    ),
    (
        lambda: problem(batch=None, batches=TRAIN),
        fo.StructureError,
        ValueError,
        ["5 steps", "steps=4"],
    ),
    (
        lambda: fo.meta.reverse(problem(params=None), LR),
        fo.StructureError,
        ValueError,
        ["params=", "eta['init']"],
    ),
    (
        lambda: fo.meta.reverse(problem(), {}),
        fo.MetaParameterError,
        ValueError,
        ["none", "'init'", "'hyper'", "'meta'"],
    ),
    (
        lambda: fo.meta.reverse(problem(), {"lr": f64(0.1)}),
        fo.MetaParameterError,
        ValueError,
        ["'lr'", "'hyper'"],
    ),
    (
        lambda: fo.meta.reverse(problem(), f64(0.1)),
        fo.HyperparameterTypeError,
        TypeError,
        ["Tensor", "'hyper'"],
    ),
    (
        lambda: fo.meta.reverse(problem(), {"hyper": {"lr": 0.1}}),
        fo.LeafError,
        TypeError,
        ["eta['hyper.lr']", "float"],
    ),
    (
        lambda: fo.meta.truncated(problem(), LR, window=0),
        fo.HyperparameterError,
        ValueError,
        ["window", "0"],
    ),
    (
        lambda: fo.meta.reverse(
            problem(), {"init": PARAMS}, carry=fo.meta.advance(problem(), LR, 2)
        ),
        fo.MetaParameterError,
        ValueError,
        ["reverse", "'init'", "step 2", "'pes'"],
    ),
    (
        lambda: fo.meta.advance(problem(), LR, 5),
        fo.HyperparameterError,
        ValueError,
        ["[0, 4]", "5"],
    ),
    (
        lambda: fo.meta.es(problem(), LR, generator=None),  # pyright: ignore
        fo.HyperparameterTypeError,
        TypeError,
        ["generator"],
    ),
    (
        lambda: fo.meta.es(problem(), LR, generator=seeded(), particles=0),
        fo.HyperparameterError,
        ValueError,
        ["particles", "0"],
    ),
    (
        lambda: fo.meta.pes(problem(), LR, **HOW, sigma=0.0),
        fo.HyperparameterError,
        ValueError,
        ["sigma", "0.0"],
    ),
    (
        lambda: fo.meta.pes(
            problem(),
            LR,
            **HOW,
            particles=3,
            carry=fo.meta.pes(problem(), LR, **HOW, particles=2).carry,
        ),
        fo.StructureError,
        ValueError,
        ["2 pairs", "particles=3"],
    ),
    (
        lambda: fo.meta.implicit(problem(), WEIGHTS, solver="lu"),  # pyright: ignore
        fo.HyperparameterError,
        ValueError,
        ["solver", "'lu'", "'cg'"],
    ),
    (
        lambda: fo.meta.implicit(problem(), WEIGHTS, iterations=0),
        fo.HyperparameterError,
        ValueError,
        ["iterations", "0"],
    ),
    (
        lambda: fo.meta.implicit(problem(), WEIGHTS, damping=-1.0),
        fo.HyperparameterError,
        ValueError,
        ["damping", "-1.0"],
    ),
    (
        lambda: fo.meta.implicit(problem(), WEIGHTS, solver="neumann", step_size=0.0),
        fo.HyperparameterError,
        ValueError,
        ["step_size", "0.0"],
    ),
    (
        lambda: fo.meta.weight_update_implicit(problem(), LR, iterations=0),
        fo.HyperparameterError,
        ValueError,
        ["iterations", "0"],
    ),
    (
        lambda: fo.meta.forward(problem(), LR, window=0),
        fo.HyperparameterError,
        ValueError,
        ["window", "0"],
    ),
    (
        lambda: fo.meta.random_window(5, 4, generator=seeded()),
        fo.HyperparameterError,
        ValueError,
        ["5", "4"],
    ),
    (
        lambda: fo.meta.random_window(2, 4.5, generator=seeded()),  # pyright: ignore
        fo.HyperparameterError,
        ValueError,
        ["high", "4.5"],
    ),
    (
        lambda: fo.meta.random_window(2, 4, generator=None),  # pyright: ignore
        fo.HyperparameterTypeError,
        TypeError,
        ["random_window", "generator", "None"],
    ),
    *(
        (
            lambda h=h: fo.meta.metasmoothness(problem(), LR, LR, h),
            fo.HyperparameterError,
            ValueError,
            ["h ", f"{h}"],
        )
        for h in (0.0, float("inf"))
    ),
    *(
        (
            lambda v=v: fo.meta.metasmoothness(problem(), LR, v, 0.1),
            fo.StructureError,
            ValueError,
            ["direction", *words],
        )
        for v, words in (
            ({"hyper": {"lr": torch.ones(3)}}, ["['hyper.lr']", "[3]", "[]"]),
            ({"hyper": {"lr": None}}, ["['hyper.lr']", "None"]),
            ({"hyper": {}}, ["eta", "missing 'hyper.lr'"]),
        )
    ),
    (
        lambda: fo.meta.metasmoothness(
            fo.meta.Problem(fo.sgd(), lambda p, b: f64(1.0), None, 2, {}), LR, LR, 0.1
        ),
        fo.StructureError,
        ValueError,
        ["metasmoothness", "no parameters"],
    ),
    (
        lambda: fo.meta.reverse(replace(problem(), outer_loss=lambda p, b: p["w"]), LR),
        fo.StructureError,
        ValueError,
        ["outer_loss", "(3,)"],
    ),
    (
        lambda: fo.meta.reverse(
            problem(constrain=lambda e: {"hyper": {"lr": fo.per_step(torch.ones(3))}}), LR
        ),
        fo.StructureError,
        ValueError,
        ["per_step", "4 steps"],
    ),
    (
        lambda: fo.meta.hypergradient_descent(
            problem(constrain=lambda e: {"hyper": {"lr": fo.per_step(torch.ones(5))}}), LR
        ),
        fo.StructureError,
        ValueError,
        ["per_step", "4 steps"],
    ),
    (
        lambda: replace(problem(), inner_loss=None),  # pyright: ignore
        fo.HyperparameterTypeError,
        TypeError,
        ["inner_loss", "None"],
    ),
    (
        lambda: fo.meta.advance(problem(), LR, 1.5),  # pyright: ignore
        fo.HyperparameterError,
        ValueError,
        ["steps", "1.5"],
    ),
    (
        lambda: fo.meta.es(problem(), LR, generator=seeded(), sigma="wide"),  # pyright: ignore
        fo.HyperparameterError,
        ValueError,
        ["sigma", "'wide'"],
    ),
    (
        lambda: fo.meta.es(problem(), LR, generator=seeded(), sigma=torch.ones(1)),
        fo.HyperparameterError,
        ValueError,
        ["sigma", "'hyper.lr'", "[1]", "[]"],
    ),
    (
        lambda: fo.meta.es(
            problem(), WEIGHTS, generator=seeded(), sigma={"meta": torch.ones(32)}
        ),
        fo.HyperparameterError,
        ValueError,
        ["sigma", "'meta.weights'", "[32]", "[5]"],
    ),
    *(
        (
            lambda step=step: fo.meta.reverse(
                problem(), LR, carry={**fo.meta.advance(problem(), LR, 2), "step": step}
            ),
            fo.StructureError,
            ValueError,
            ["carry", f"step {step}", "4 steps"],
        )
        for step in (5, -1)
    ),
    (
        lambda: fo.meta.implicit(
            problem(), WEIGHTS, carry=fo.meta.advance(problem(steps=9), LR, 6)
        ),
        fo.StructureError,
        ValueError,
        ["carry", "step 6", "4 steps"],
    ),
    *(
        (
            lambda eta=eta, carry=carry: fo.meta.advance(problem(), eta, 1, carry=carry),
            error,
            builtin,
            words,
        )
        for eta, carry, error, builtin, words in (
            (f64(0.1), None, fo.HyperparameterTypeError, TypeError, ["Tensor"]),
            (LR["hyper"], None, fo.MetaParameterError, ValueError, ["'lr'", "'hyper'"]),
            (
                LR,
                fo.meta.pes(problem(), LR, **HOW).carry,
                fo.StructureError,
                ValueError,
                ["advance", "a swarm"],
            ),
        )
    ),
    (
        lambda: fo.meta.reverse(problem(), {"hyper": {}}),
        fo.StructureError,
        ValueError,
        ["eta has no tensor"],
    ),
    (
        lambda: fo.meta.implicit(problem(constrain=lambda e: {"hyper": LR}), WEIGHTS),
        fo.MetaParameterError,
        ValueError,
        ["constrain", "['hyper']", "['meta']"],
    ),
    *(
        (
            partial(CALLS[name], problem(), {"init": PARAMS}, carry=cut),
            fo.MetaParameterError,
            ValueError,
            [name, "'init'", "step 2"],
        )
        for name, cut in product(
            ["forward", "pes", "es_single"], [fo.meta.advance(problem(), LR, 2)]
        )
    ),
    (
        lambda: fo.meta.forward(
            problem(), WEIGHTS, carry=fo.meta.forward(problem(), LR, window=1).carry
        ),
        fo.StructureError,
        ValueError,
        ["tangents", "'hyper.lr'", "'meta.weights [5]'"],
    ),
    (
        lambda: fo.meta.pes(
            problem(), WEIGHTS, **HOW, carry=fo.meta.pes(problem(), LR, **HOW).carry
        ),
        fo.StructureError,
        ValueError,
        ["perturbations", "'hyper.lr'", "'meta.weights [5]'"],
    ),
    *(  # as many numbers, of another name; another shape
        (
            lambda call=call, other=other: call(
                problem(), other, carry=call(problem(), LR, window=1).carry
            ),
            fo.StructureError,
            ValueError,
            [what, "'hyper.lr'", words],
        )
        for (what, call), (other, words) in product(
            [("tangents", fo.meta.forward), ("perturbations", CALLS["pes"])],
            [
                ({"hyper": {"weight_decay": f64(0.1)}}, "'hyper.weight_decay'"),
                ({"hyper": {"lr": f64(0.1)[None]}}, "'hyper.lr [1]'"),
            ],
        )
    ),
    *(
        (
            lambda name=name, maker=maker: CALLS[name](
                problem(), LR, carry=maker(problem(), LR, **HOW).carry
            ),
            fo.StructureError,
            ValueError,
            [name, "a swarm"],
        )
        for name, maker in [
            ("reverse", fo.meta.pes),
            ("es", fo.meta.pes),
            ("es_single", fo.meta.pes),  # what it keeps is the sum of several draws
            ("pes", fo.meta.es_single),
        ]
    ),
    *(
        (
            lambda size=size: CALLS["es"](problem(), LR, chunk_size=size),
            fo.HyperparameterError,
            ValueError,
            ["chunk_size", "whole number", repr(size)],
        )
        for size in (0, 2.5, True)
    ),
]


@pytest.mark.parametrize("index", range(len(REFUSED)))
def test_bad_input_raises_and_says_why(index: int):
    call, error, builtin, words = REFUSED[index]
    with pytest.raises(error) as caught:
        call()
    assert isinstance(caught.value, builtin)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("name", CALLS)
def test_a_derivative_of_an_estimate_is_refused(name: str):
    """It has no graph: the derivative would be 0."""
    opt, eta = ETAS["rule" if "rule" in SEES[name] else next(iter(SEES[name]))]

    def value(eta: Any) -> Tensor:
        return CALLS[name](problem(opt), eta).value

    two = tree.map(lambda x: torch.stack([x, x]), eta)
    for ask in (
        lambda: grad(value)(eta),
        lambda: jvp(value, (eta,), (eta,)),
        lambda: vmap(grad(value))(two),
        lambda: grad(lambda x: vmap(value)(x).sum())(two),
    ):
        with pytest.raises(fo.GradientLostError, match=f"^{name} gives numbers"):
            ask()


@pytest.mark.parametrize("what", ["batch", "outer_batch", "params"])
@pytest.mark.parametrize("name", CALLS)
def test_a_derivative_by_what_a_problem_holds_is_refused(name: str, what: str):
    opt, eta = ETAS["rule" if "rule" in SEES[name] else next(iter(SEES[name]))]
    start = getattr(problem(), what)

    def value(scale: Tensor) -> Tensor:
        held = {what: tree.map(lambda x: scale * x, start)}
        return CALLS[name](problem(opt, **held), eta).value

    with pytest.raises(fo.GradientLostError, match=f"^{name} gives numbers"):
        grad(value)(f64(1.0))


def test_a_derivative_of_the_metasmoothness_is_refused():
    def value(scale: Tensor) -> Tensor:
        return fo.meta.metasmoothness(problem(), {"hyper": {"lr": scale}}, LR, h=1e-3)

    with pytest.raises(fo.GradientLostError, match="^metasmoothness gives numbers"):
        grad(value)(f64(0.1))


def test_a_derivative_by_what_a_loss_closes_over_is_refused():
    def value(scale: Tensor) -> Tensor:
        scaled = replace(problem(), inner_loss=lambda p, b: scale * fit(p, b))
        return fo.meta.reverse(scaled, LR).value

    with pytest.raises(fo.GradientLostError, match="gives numbers without a graph"):
        grad(value)(f64(1.0))


# Forms of hyperparameters --------------------------------------------------------------

FORMS: dict[str, Callable[[Any], Any]] = {
    "by name": lambda at: fo.by_name({"w": at["first"]}, default=at["second"]),
    "schedule": lambda at: fo.Schedule(lambda n: at["first"] * 0.5**n + at["second"]),
    "per leaf": lambda at: {"w": at["first"], "scale": at["second"]},
}


@pytest.mark.parametrize("form", FORMS)
def test_what_a_selector_or_a_schedule_holds_is_seen(form: str):
    """No tree shows the tensors in it; one step is one step to every estimator."""
    given = problem(
        fo.adam(),
        constrain=lambda eta: {"hyper": {"lr": FORMS[form](eta["hyper"])}},
        objective="last",
        steps=1,
    )
    eta = {"hyper": {"first": f64(0.1), "second": f64(0.05)}}
    exact = fo.meta.reverse(given, eta).grads["hyper"]
    assert all(abs(g) > 1e-3 for g in exact.values())
    for name in ("mixed", "forward", "truncated", "first_order", "hypergradient_descent"):
        found = CALLS[name](given, eta).grads["hyper"]
        assert all(torch.allclose(found[n], exact[n], rtol=1e-12) for n in exact), name
    # From where one step ends: what another one like it does.
    end = fo.meta.advance(given, eta, 1)
    again = replace(given, params=end["params"], state=end["state"])
    ahead = CALLS["weight_update_implicit"](given, eta, iterations=1).grads["hyper"]
    made: Any = vjp(lambda eta: _one_step(again, eta), eta)
    (wanted,) = made[1](grad(lambda p: score(p, VALID))(end["params"]))
    assert all(torch.allclose(ahead[n], wanted["hyper"][n], rtol=1e-12) for n in exact)


def _one_step(given: fo.meta.Problem, eta: Any) -> Any:
    assert given.constrain is not None
    hyper = given.constrain(eta)["hyper"]
    run = fo.unroll(
        given.opt, fit, given.params, TRAIN, steps=1, state=given.state, hyper=hyper
    )
    return run.params


def test_a_gradient_kept_for_the_next_step_is_not_taken_for_one_by_the_weights():
    alone = replace(problem(), outer_loss=None)
    carry = fo.meta.hypergradient_descent(alone, LR).carry
    fresh = {key: carry[key] for key in carry if key != "grads"}
    eta = {"meta": {"weights": torch.ones(5).double()}}
    one, other = (
        fo.meta.hypergradient_descent(alone, eta, carry=c).grads["meta"]["weights"]
        for c in (carry, fresh)
    )
    assert torch.allclose(one, other, rtol=1e-12)


@pytest.mark.parametrize("outer", [score, None], ids=["an outer loss", "none"])
def test_each_step_of_hypergradient_descent_goes_by_its_own_gradient(outer: Any):
    """And the outer loss's is not taken for it, though it is by the same parameters."""
    given, carry = replace(problem(), outer_loss=outer), None
    for _ in range(3):
        one = fo.meta.hypergradient_descent(given, LR, carry=carry)
        other = fo.meta.truncated(given, LR, window=1, carry=carry)
        slopes, ends = zip(*((e.grads["hyper"], e.carry["params"]) for e in (one, other)))
        assert torch.allclose(slopes[0]["lr"], slopes[1]["lr"], rtol=1e-12)
        assert torch.allclose(ends[0]["w"], ends[1]["w"], rtol=1e-12)
        carry = one.carry


def test_the_way_back_goes_through_constraints():
    constrain = fo.meta.constrained({"init": {"w": fo.meta.exp(), "scale": None}})
    free = {"init": PARAMS}
    found = fo.meta.reptile_gradient(problem(constrain=constrain), free).grads["init"]
    start = constrain(free)
    plain = fo.meta.reptile_gradient(problem(), start).grads["init"]
    assert torch.allclose(found["w"], plain["w"] * start["init"]["w"], rtol=1e-12)
    assert torch.equal(found["scale"], plain["scale"])


SEEING_META = [name for name in CALLS if "meta" in keys_seen(name)]


@pytest.mark.parametrize("name", SEEING_META)
def test_an_eta_with_gaps_and_other_dtypes(name: str):
    eta = {"weights": random(5, seed=6).abs().float()}
    beside = {"gap": None, "empty": torch.zeros(0, 2), "idle": f64(1.0)}
    alone = CALLS[name](problem(), {"meta": eta}).grads["meta"]
    found = CALLS[name](problem(), {"meta": eta | beside}).grads["meta"]
    assert found["gap"] is None and found["empty"].shape == (0, 2)
    assert alone["weights"].dtype is found["weights"].dtype is torch.float32
    assert found["idle"].dtype is torch.float64
    if not SEES[name]["meta"] == SMOOTHED:  # other leaves, other draws
        assert torch.allclose(found["weights"], alone["weights"], rtol=1e-5)


def of_pairs(start: Tensor, made: Callable[[Tensor], Tensor]) -> fo.meta.Problem:
    """A problem in complex numbers, which are ``made`` of the parameters."""
    x, further = (torch.complex(each[0], each[0].flip(0)) for each in (TRAIN, VALID))

    def inner(p: Tensor, x: Tensor, meta: Any = None) -> Tensor:
        error = (torch.tanh((x @ made(p)).real) - (x @ made(p)).imag - 0.3) ** 2
        return (error if meta is None else meta["weights"] * error).mean()

    def outer(p: Tensor, x: Tensor, meta: Any = None) -> Tensor:
        return (made(p) ** 2).real.sum() + (x @ made(p)).abs().square().mean()

    opt = fo.sgd(lr=0.1, momentum=0.5)
    return fo.meta.Problem(opt, inner, outer, STEPS, start, batch=x, outer_batch=further)


@pytest.mark.parametrize("name", [n for n in CALLS if keys_seen(n) != ["init"]])
def test_a_complex_parameter_is_two_real_ones(name: str):
    eta = WEIGHTS if name in SEEING_META else LR
    pairs = random(3, 2, seed=40)
    real = of_pairs(pairs, torch.view_as_complex)
    whole = of_pairs(torch.view_as_complex(pairs), lambda p: p)
    found, expected = (CALLS[name](given, eta) for given in (whole, real))
    for x, y in zip(tree.leaves(found.grads), tree.leaves(expected.grads)):
        assert y.abs().min() > 1e-4 and torch.allclose(x, y, rtol=1e-9)
    for key, wanted in expected.diagnostics.items():
        assert tree.leaves(tree.map(torch.allclose, found.diagnostics[key], wanted))
    along = tree.map(torch.ones_like, eta)
    one, other = (fo.meta.metasmoothness(x, eta, along, h=0.3) for x in (whole, real))
    assert torch.allclose(one, other)


@pytest.mark.parametrize("name", ["es", "pes", "es_single"])
def test_a_swarm_from_an_advanced_carry_is_judged_by_the_loss_itself(name: str):
    """What of the outer loss depends on eta directly counts from the first window on."""
    given = replace(problem(), outer_loss=fit, batch=TRAIN, outer_batch=TRAIN)
    carry = fo.meta.advance(given, WEIGHTS, 2)
    found = CALLS[name](given, WEIGHTS, carry=carry, sigma=0.05)
    noise = 0.05 * torch.randn(4, 5, generator=seeded(), dtype=torch.float64)

    def value(moved: Tensor) -> Tensor:
        return fo.meta.reverse(given, {"meta": {"weights": moved}}, carry=carry).value

    change = torch.stack([value(1 + e) - value(1 - e) for e in noise])
    expected = (noise * change[:, None] / (2 * 0.05**2)).mean(0)
    assert torch.allclose(found.grads["meta"]["weights"], expected, rtol=1e-9)


@pytest.mark.parametrize("expanded", [False, True])
@pytest.mark.parametrize("name", ["sgd", "adam", "lamb", "adafactor", "shampoo"])
def test_forward_of_a_number_times_a_float32_meta_parameter(name: str, expanded: bool):
    """Torch gives that a float64 tangent, which mixes with others or is misread."""
    opt = getattr(fo, name)(lr=0.05)
    x, y = TRAIN[0].float(), TRAIN[1].float()

    def ridge(p: Tensor, batch: Any, meta: Any) -> Tensor:
        slope = (x @ p[:, 0] - y).square().mean()
        return slope + 0.5 * meta["l2"] * (p - meta["at"]).square().sum()

    def judge(p: Tensor, batch: Any, meta: Any) -> Tensor:
        return (x @ p[:, 0] + 0.3 * y).square().mean()

    start = torch.nn.Parameter(torch.ones(1).expand(3, 2))
    given = fo.meta.Problem(opt, ridge, judge, 3, start)
    at = torch.tensor(0.1).expand(2) if expanded else torch.tensor([0.1, 0.1])
    eta = {"meta": {"l2": torch.tensor(0.5), "at": at}}
    found, expected = fo.meta.forward(given, eta), fo.meta.reverse(given, eta)
    for a, b in zip(tree.leaves(found.grads), tree.leaves(expected.grads)):
        assert b.abs().max() > 1e-6 and torch.allclose(a, b, rtol=1e-3, atol=1e-6)
    carried = tree.present([found.carry["params"], found.carry["tangents"]])
    assert not any(x.requires_grad or x.dtype is torch.float64 for x in carried)


@pytest.mark.parametrize(
    "eta", [{"init": {"w": torch.zeros(0, 2)}}, {"meta": {"w": torch.ones(2)}}], ids=str
)
def test_forward_of_no_numbers_or_no_parameters(eta: Any):
    def loss(p: Any, batch: Any, meta: Any = None) -> Tensor:
        return torch.stack(
            [x.sum() ** 2 for x in tree.leaves((p, meta)) if x is not None]
        )[0]

    given = fo.meta.Problem(fo.sgd(lr=0.1), loss, loss, 2, params={})
    found, expected = fo.meta.forward(given, eta), fo.meta.reverse(given, eta)
    assert tree.leaves(tree.map(torch.equal, found.grads, expected.grads)) == [True]
    assert found.diagnostics["tangent_norms"].shape == (
        sum(map(Tensor.numel, tree.leaves(eta))),
    )


SUMMING = {
    "truncated": {"window": 1000},
    "weight_update_implicit": {"iterations": 1000},
} | dict.fromkeys(("reverse", "mixed", "forward", "first_order"), {})


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["last", "mean"])
@pytest.mark.parametrize("name", SUMMING)
def test_a_rate_in_half_precision_is_judged_by_all_its_steps(name: str, objective: Any):
    """Of as many equal numbers bfloat16 would add up 256."""

    def downhill(p: Tensor, batch: Any) -> Tensor:
        return p.sum()

    start = torch.zeros(1, dtype=torch.float64)
    given = fo.meta.Problem(
        fo.sgd(), downhill, downhill, 1000, start, objective=objective
    )
    eta = {"hyper": {"lr": torch.tensor(2.0**-10, dtype=torch.bfloat16)}}
    found = getattr(fo.meta, name)(given, eta, **SUMMING[name]).grads["hyper"]["lr"]
    whole = name == "weight_update_implicit" or objective == "last"
    assert (
        found.dtype is torch.bfloat16 and abs(found / (1000 if whole else 500) + 1) < 0.01
    )


@pytest.mark.parametrize("objective", ["last", "sum"])
@pytest.mark.parametrize("remat", [None, "sqrt"])
@pytest.mark.parametrize("name", ["reverse", "mixed"])
def test_a_weight_in_half_precision_is_judged_by_all_its_steps(
    name: str, remat: Any, objective: Any
):
    def weighed(p: Tensor, batch: Any, meta: Tensor) -> Tensor:
        return meta * p.sum()

    start = torch.zeros(1, dtype=torch.float64)
    given = fo.meta.Problem(
        fo.sgd(lr=2.0**-10), weighed, lambda p, *_: p.sum(), 600, start,
        objective=objective,
    )  # fmt: skip
    eta = {"meta": torch.ones((), dtype=torch.bfloat16)}
    found = getattr(fo.meta, name)(given, eta, remat=remat).grads["meta"]
    whole = 600 if objective == "last" else 600 * 601 / 2
    assert found.dtype is torch.bfloat16 and abs(found / whole * 2**10 + 1) < 0.01


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["es", "pes", "es_single"])
def test_a_swarm_around_half_precision_is_one_of_float32(name: str, dtype: torch.dtype):
    """Settings narrower than its digits, too; rounded is what the losses get."""

    def steep(p: Any, batch: Any, meta: Any = None) -> Tensor:
        return 2e4 * score(p, batch)  # float16 has not each pair's slope, but the mean

    def rounded(eta: Any) -> Any:
        return {k: tree.map(lambda x: x.to(dtype), v) for k, v in eta.items()}

    given = replace(problem(), outer_loss=steep)
    for eta, sigma in ((LR, 1e-5), (WEIGHTS, 0.1)):
        half = rounded(eta)
        wide = tree.map(Tensor.float, half)
        same = given if eta is LR else replace(given, constrain=rounded)
        carries, generators = [None, None], [seeded(), seeded()]
        for _ in range(1 if name == "es" else 2):
            how = {"sigma": sigma, "particles": 20}
            how |= {} if name == "es" else {"window": 2}
            found, expected = (
                CALLS[name](p, x, **how, carry=carry, generator=generator)
                for p, x, carry, generator in zip(
                    (given, same), (half, wide), carries, generators
                )
            )
            carries = [found.carry, expected.carry]
            errors = (x.diagnostics["standard_error"] for x in (found, expected))
            for one, other in ((found.grads, expected.grads), (*errors,)):
                for a, b in zip(tree.leaves(one), tree.leaves(other)):
                    assert b.abs().max() > 1 and b.abs().max() < 6e4
                    assert a.dtype is dtype and torch.equal(a, b.to(dtype))


# Memory --------------------------------------------------------------------------------


#: those that go on, with the options for a window of one step
WINDOWED: dict[str, Any] = {
    "truncated": {"window": 1},
    "pes": {"window": 1},
    "hypergradient_descent": {},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.usefixtures("settled")
def test_no_tensor_is_left_over_from_a_meta_step(name: str):
    """Long trainings by windows of a step, short ones whole."""
    opt, eta = ETAS["rule" if "rule" in SEES[name] else next(iter(SEES[name]))]
    params, batch, outer_batch = tree.map(torch.clone, (PARAMS, TRAIN, VALID))
    given = problem(
        opt, params=params, batch=batch, outer_batch=outer_batch,
        steps=1000 if name in WINDOWED else 1,
    )  # fmt: skip
    how, carry, counts = WINDOWED.get(name, {}), None, []

    def alive() -> int:
        gc.collect()
        return sum(issubclass(type(x), Tensor) for x in gc.get_objects())

    last = 1000 if name in WINDOWED or name == "reverse" else 100
    for step in range(last):
        estimate = CALLS[name](given, eta, carry=carry, **how)
        eta = tree.map(lambda x, g: x - 1e-9 * g, eta, estimate.grads)
        carry = estimate.carry
        if step in (20, last - 1):
            counts.append(alive())
    assert counts[0] == counts[1] > 10


@pytest.mark.parametrize("name", [x for x in CALLS if "hyper" in keys_seen(x)])
def test_in_inference_mode(name: str):
    """Adam's steps are kernels there, too, as are their tangents."""

    def call() -> Any:
        return CALLS[name](problem(fo.adam(lr=0.1)), tree.map(torch.clone, LR)).grads

    expected = call()
    with torch.inference_mode():
        found = call()
    assert torch.allclose(found["hyper"]["lr"], expected["hyper"]["lr"], rtol=1e-12)


@pytest.mark.parametrize("name", CALLS)
def test_within_autocast_only_the_losses_are_in_half(name: str):
    """The same as outside, where the losses alone are."""

    def half(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return torch.autocast("cpu", torch.bfloat16)(loss)

    kind = next(kind for kind in ("meta", "rates", "init") if kind in SEES[name])
    opt, eta = ETAS[kind]
    data = {"params": PARAMS, "batch": TRAIN, "outer_batch": VALID}
    data, eta = tree.map(Tensor.float, data), tree.map(Tensor.float, eta)
    given = problem(opt, **data)
    outside = replace(given, inner_loss=half(fit), outer_loss=half(score))
    expected = CALLS[name](outside, eta)
    with torch.autocast("cpu", torch.bfloat16):
        found = CALLS[name](given, eta)
    for x, y in zip(tree.leaves(found.grads), tree.leaves(expected.grads)):
        assert y.abs().max() > 1e-4 and torch.allclose(x, y, rtol=1e-5)


def recurrent(dtype: torch.dtype = torch.float32) -> fo.meta.Problem:
    """Of float32 torch's LSTM is one kernel on a CPU, of float64 many small ones."""
    torch.manual_seed(0)
    net = nn.LSTM(3, 4).to(dtype)
    params = {name: p.detach() for name, p in net.named_parameters()}

    def loss(p: Any, x: Tensor, meta: Any = 1.0) -> Tensor:
        return (meta * functional_call(net, p, (x,))[0] - 0.2).square().mean()

    x = TRAIN[0].to(dtype)
    return fo.meta.Problem(fo.sgd(lr=0.5), loss, loss, 2, params, batch=x, outer_batch=x)


@pytest.mark.parametrize(
    "name", [n for n in CALLS if n != "forward" and SMOOTHED not in SEES[n].values()]
)
def test_torchs_lstm(name: str):
    """Its kernel keeps what the way back needs in grad mode alone."""
    key = keys_seen(name)[0]
    exact, given = recurrent(torch.float64), recurrent()
    etas = {"hyper": {"lr": f64(0.5)}, "init": exact.params, "meta": f64(1.3)}
    expected = CALLS[name](exact, {key: etas[key]})
    found = CALLS[name](given, tree.map(Tensor.float, {key: etas[key]}))
    for x, y in zip(tree.leaves(found.grads), tree.leaves(expected.grads)):
        assert y.abs().max() > 1e-4
        assert torch.allclose(x.double(), y, rtol=1e-3, atol=1e-6)


def attentive() -> fo.meta.Problem:
    def loss(p: Tensor, x: Tensor) -> Tensor:
        q = (x @ p)[:, None]
        return nn.functional.scaled_dot_product_attention(q, q, q).square().mean()

    x, start = random(5, 4, 3, seed=1).float(), random(3, 3, seed=2).float()
    return fo.meta.Problem(fo.sgd(), loss, loss, 2, start, batch=x, outer_batch=x)


@pytest.mark.parametrize("made", [recurrent, attentive])
def test_a_loss_without_a_forward_derivative_says_so(made: Callable[[], fo.meta.Problem]):
    """Of `forward`, and of what else goes forward: with what to do instead."""
    given = made()
    p, x, loss = given.params, given.batch, given.inner_loss
    asked = {"loss_fn": loss, "params": p, "batch": x}
    along, state = tree.map(torch.ones_like, p), fo.sgd().init(p)
    for call in (
        lambda: fo.meta.forward(given, {"hyper": {"lr": torch.tensor(0.1)}}),
        lambda: fo.meta.step_jvp(
            fo.sgd(), state=state, tangents={"params": along}, **asked
        ),
        lambda: fo.meta.hvp(vector=along, **asked),
    ):
        with pytest.raises(fo.ExecutionError, match="forward mode.*reverse.*sdpa_kern"):
            call()


class Accelerator(TorchDispatchMode):
    """The device "meta" as one with numbers: what is copied from there is zeros."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        named, x = kwargs or {}, args[0] if args else None
        if func is torch.ops.aten._to_copy.default and isinstance(x, Tensor):
            made = {"dtype": x.dtype, "device": x.device} | named
            if x.is_meta and made["device"].type == "cpu":
                return torch.zeros(x.shape, dtype=made["dtype"])
        return func(*args, **named)


@pytest.mark.parametrize(
    "name, key", [(n, k) for n in CALLS for k in ("hyper", "meta") if k in keys_seen(n)]
)
def test_numbers_of_eta_may_lie_on_the_cpu(name: str, key: str):
    """As a learned rate does beside parameters on an accelerator."""

    def weighed(p: Any, batch: Any, meta: Any = None) -> Tensor:
        return fit(p, batch) if meta is None else meta * fit(p, batch)

    data = {"params": PARAMS, "batch": TRAIN, "outer_batch": VALID}
    data = tree.map(lambda x: x.to("meta"), data)
    losses = {"inner_loss": weighed, "outer_loss": weighed}
    given = replace(problem(**data), objective="mean", **losses)
    eta = LR if key == "hyper" else {"meta": f64(0.5)}
    with Accelerator():
        found = CALLS[name](given, eta)
        if key == "hyper" and name in ("forward", "pes", "es_single"):
            begun = CALLS[name](given, eta, window=2)
            found = CALLS[name](given, eta, carry=begun.carry)
    assert found.value.is_meta
    assert [x.device.type for x in tree.leaves(found.grads)] == ["cpu"]
