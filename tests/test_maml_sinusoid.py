"""The sinusoid example: its tasks, its methods, and the whole program in small."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import funcopt as fo
import maml_sinusoid
from funcopt import tree
from sinusoid import methods, report, training, waves

SMALL = ["--iterations", "12", "--tasks", "24"]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# Waves ------------------------------------------------------------------------------


def test_waves_are_of_the_published_family() -> None:
    tasks = waves.sample(4000, 5, 60, seeded())
    assert tasks.support.x.shape == tasks.support.y.shape == (4000, 5, 1)
    assert tasks.query.x.shape == (4000, 60, 1)
    assert -5 <= tasks.query.x.min() < -4.99 < 4.99 < tasks.query.x.max() <= 5
    highest = tasks.query.y.abs().amax((1, 2))
    assert 4.9 < highest.max() <= 5
    # E[A²]/2 of A ~ U[0.1, 5]; the phases and frequencies do not average out fully.
    power = (0.1**2 + 0.1 * 5 + 5**2) / 3 / 2
    assert tasks.query.y.square().mean().item() == pytest.approx(power, rel=0.1)


def test_support_and_query_lie_on_one_sine() -> None:
    """Least squares on [sin ωx, cos ωx] leaves nothing, for one ω in [0.8, 1.2]."""
    tasks = waves.sample(3, 4, 40, seeded(1))
    for i in range(3):
        x = torch.cat([tasks.support.x[i], tasks.query.x[i]]).double()
        y = torch.cat([tasks.support.y[i], tasks.query.y[i]]).double()
        rest = []
        for frequency in torch.linspace(0.8, 1.2, 2001, dtype=torch.float64):
            basis = torch.cat([torch.sin(frequency * x), torch.cos(frequency * x)], 1)
            solution = torch.linalg.lstsq(basis, y).solution
            rest.append((basis @ solution - y).abs().max().item())
        assert min(rest) < 5e-3
        assert max(rest) > 5e-2  # the test can tell frequencies apart


def test_a_seed_is_a_stream() -> None:
    first, again, other = (waves.sample(2, 3, 4, seeded(s)) for s in (0, 0, 1))
    assert torch.equal(first.support.y, again.support.y)
    assert not torch.equal(first.support.y, other.support.y)


# Methods ----------------------------------------------------------------------------


def by_hand(params: methods.Params, task: waves.Wave, rates: list[Any]) -> Tensor:
    """Adapt with autograd and a loop, one tree of rates per step; the query loss."""
    for rate in rates:
        loss = methods.mse(params, task.support)
        grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
        params = {
            name: p - (rate[name] if isinstance(rate, dict) else rate) * g
            for (name, p), g in zip(params.items(), grads)
        }
    return methods.mse(params, task.query)


def trees_of_rates(name: str, theta: methods.Theta, steps: int) -> list[Any]:
    if name == "maml":
        return [0.01] * steps
    if name == "metasgd":
        return [theta["lr"]] * steps
    return [{leaf: rate[k] for leaf, rate in theta["lr"].items()} for k in range(steps)]


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("name", methods.TITLES)
def test_the_meta_gradient_is_that_of_the_loop_by_hand(name: str, steps: int) -> None:
    family = methods.family(methods.Method(name, 0.01, steps), methods.mse)
    params = {k: v.double() for k, v in methods.initial(seeded()).items()}
    theta = tree.map(torch.clone, family.init(params))
    noise = seeded(1)
    for rate in theta.get("lr", {}).values():  # no two rates alike
        rate.mul_(0.5 + torch.rand(rate.shape, generator=noise, dtype=rate.dtype))
    tasks = waves.Wave(
        *(
            waves.Points(part.x.double(), part.y.double())
            for part in waves.sample(3, 5, 10, seeded(2))
        )
    )
    loss, grads = fo.meta.value_and_grad(family.task_loss)(theta, tasks)

    for leaf in tree.leaves(theta):
        leaf.requires_grad_()
    expected = torch.stack(
        [
            by_hand(
                family.params(theta),
                waves.Wave(*(waves.Points(p.x[i], p.y[i]) for p in tasks)),
                trees_of_rates(name, theta, steps),
            )
            for i in range(3)
        ]
    ).mean()
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=1e-12)
    assert grads.keys() == theta.keys()
    for found, leaf in zip(tree.leaves(grads), tree.leaves(theta), strict=True):
        assert leaf.grad is not None and leaf.grad.count_nonzero()
        torch.testing.assert_close(found, leaf.grad, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", methods.TITLES)
def test_predictions_are_those_of_each_number_of_steps(name: str) -> None:
    method = methods.Method(name, 0.01, 2)
    family = methods.family(method, methods.mse)
    theta = family.init(methods.initial(seeded()))
    task = waves.Wave(
        *(waves.Points(p.x[0], p.y[0]) for p in waves.sample(1, 5, 10, seeded(1)))
    )
    path = methods.predictions(method, theta, task.support, task.query.x, 4)
    assert path.shape == (5, 10, 1)
    before = methods.network(family.params(theta), task.query.x)
    torch.testing.assert_close(path[0], before)
    after_two = (path[2] - task.query.y).square().mean()
    torch.testing.assert_close(after_two, family.task_loss(theta, task))
    assert (path.diff(dim=0).abs().amax((1, 2)) > 0).all()


# Training ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [pytest.param(x, marks=[pytest.mark.slow] * (x != "maml")) for x in methods.TITLES],
)
def test_training_moves_everything_and_lowers_the_error(name: str) -> None:
    method = methods.Method(name, 0.01, methods.STEPS[name])
    start = training.train(method, 5, 0, training.Budget(iterations=1))
    trained = training.train(method, 5, 0, training.Budget(iterations=150))
    assert len(trained.losses) == 150 and trained.skipped == 0
    for pair in zip(tree.leaves(trained.theta), tree.leaves(start.theta), strict=True):
        assert not torch.equal(*pair)
    held_out = waves.sample(200, 5, 50, seeded(9))
    before, after = (
        training.evaluate(outcome, held_out, 3)[:, method.steps].mean()
        for outcome in (start, trained)
    )
    assert after < 0.9 * before


def test_a_meta_gradient_that_is_not_finite_makes_no_step() -> None:
    wild = methods.Method("maml", 1e20, 1)  # the adapted network overflows
    outcome = training.train(wild, 5, 0, training.Budget(iterations=3))
    assert outcome.skipped == 3
    expected = methods.initial(seeded())
    assert all(torch.equal(outcome.theta[k], expected[k]) for k in expected)


def test_time_ends_training_too() -> None:
    budget = training.Budget(iterations=None, seconds=1.0)
    assert [budget.spent(10**6, s) for s in (0.0, 0.25, 2.0)] == [0.0, 0.25, 1.0]
    both = training.Budget(iterations=100, seconds=1.0)
    assert both.spent(50, 0.25) == 0.5 and both.spent(50, 0.75) == 0.75


# The program ------------------------------------------------------------------------


def run(out: Path, *more: str) -> dict[str, Any]:
    maml_sinusoid.main([*SMALL, "--out", str(out), *more])
    return json.loads((out / "results.json").read_text())


def without_times(results: dict[str, Any]) -> list[dict[str, Any]]:
    return [{k: v for k, v in m.items() if k != "seconds"} for m in results["methods"]]


def test_the_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = run(tmp_path)
    printed = capsys.readouterr().out
    for row in ("MAML, 1 step", "MAML, 3 steps", "Meta-SGD, 1 step", "LSLR, 3 steps"):
        assert f"| {row} " in printed
    assert printed.count("†") == 3  # two figures and their note
    assert "1.13 ± 0.18 †" in printed and "0.90 ± 0.16 †" in printed
    assert "Second-hand" in printed

    asked = {"shots": 5, "tasks": 24, "seed": 0, "iterations": 12, "minutes": None}
    assert results["settings"].items() >= asked.items()
    assert results["settings"]["inner_lr"] == 0.01
    assert results["environment"]["torch"] == torch.__version__
    assert results["environment"]["threads"] == 1
    titles = [(m["method"], m["trained_steps"]) for m in results["methods"]]
    assert titles == [("MAML", 1), ("MAML", 3), ("Meta-SGD", 1), ("LSLR", 3)]
    for m in results["methods"]:
        assert m["iterations"] == 12
        assert len(m["mse_after_steps"]) == len(m["interval_95"]) == 11
        assert m["mse_after_steps"][0] > 0 and m["interval_95"][0] > 0
    published = [m["published_second_hand"] for m in results["methods"]]
    assert published == ["1.13 ± 0.18", None, "0.90 ± 0.16", None]
    assert (tmp_path / "sinusoid.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_seed_repeats_and_another_differs(tmp_path: Path) -> None:
    few = ["--methods", "metasgd", "lslr:2", "--shots", "10"]
    one, same = (run(tmp_path / name, *few) for name in "ab")
    other = run(tmp_path / "c", *few, "--seed", "1")
    assert without_times(one) == without_times(same)
    for a, b in zip(without_times(one), without_times(other)):
        assert a["mse_after_steps"] != b["mse_after_steps"]
    # No figure is quoted for 10 shots.
    assert all(m["published_second_hand"] is None for m in one["methods"])


def test_minutes_alone_set_the_length(tmp_path: Path) -> None:
    options = ["--methods", "maml", "--minutes", "0.005", "--tasks", "2"]
    maml_sinusoid.main([*options, "--out", str(tmp_path)])
    (row,) = json.loads((tmp_path / "results.json").read_text())["methods"]
    assert row["iterations"] >= 1 and row["seconds"] >= 0.3


def test_a_mean_that_is_not_finite_says_so() -> None:
    errors = torch.tensor([1.0, math.inf])
    assert report.figure(errors, trained=False) == "diverges"
    assert report.figure(torch.tensor([1.0, 1e6]), trained=True) == "[5e+05]"
    assert report.figure(torch.tensor([1.0, 2.0]), trained=True) == "[1.50 ± 0.98]"
    assert report.number(math.nan) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "reptile"], "no method 'reptile', only maml, metasgd, lslr"),
        (["--methods", "maml:0"], "a number of steps, 1 to 10"),
        (["--methods", "lslr:eleven"], "a number of steps, 1 to 10"),
        (["--shots", "0"], "'0' is not an integer from 1 up"),
        (["--iterations", "-5"], "'-5' is not an integer from 1 up"),
        (["--tasks", "1"], "'1' is not an integer from 2 up"),
        (["--seed", "x"], "'x' is not an integer from 0 up"),
        (["--minutes", "nan"], "'nan' is not a positive number of minutes"),
        (["--minutes", "0"], "'0' is not a positive number of minutes"),
    ],
)
def test_bad_options_are_named(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as stop:
        maml_sinusoid.main([*arguments, "--out", str(tmp_path / "none")])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
