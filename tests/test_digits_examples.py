"""The examples on digits, in small: hypergradient descent, and cleaning of labels."""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import data_hypercleaning
import hypergradient_descent


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def results(program: Any, out: Path, *options: str) -> dict[str, Any]:
    program.main(["--quick", "--out", str(out), *options])
    assert next(out.glob("*.png")).read_bytes().startswith(b"\x89PNG")
    return json.loads((out / "results.json").read_text())


def test_a_rate_follows_its_hypergradient(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    found = results(hypergradient_descent, tmp_path, "--steps", "25")
    assert "| logistic regression | SGD-HD |" in capsys.readouterr().out
    for fixed, tuned in zip(found["trainings"][::2], found["trainings"][1::2]):
        assert set(fixed["rates"]) == {0.001}
        assert tuned["rates"] == sorted(tuned["rates"]) and tuned["rates"][-1] > 0.001
        assert tuned["losses"][0] == fixed["losses"][0]
        assert tuned["losses"][-1] < fixed["losses"][-1]
    ordering = found["improved_early_and_at_the_end"]["logistic regression, SGD"]
    assert ordering["here"] == ordering["published"] == [True, True]


def test_sgds_hypergradient_is_minus_the_product_of_gradients():
    """One step of the program by hand: α₁ = α₀ + β g₁ᵀg₀."""
    options = argparse.Namespace(seed=3, steps=1, rate=0.05)
    rule = hypergradient_descent.RULES[0]
    curve = hypergradient_descent.train("logistic regression", rule, True, options)
    generator = torch.Generator().manual_seed(3)
    training, _ = hypergradient_descent.digits(generator)
    params = hypergradient_descent.initial((64, 10), generator)
    rows = torch.randint(1400, (1, hypergradient_descent.BATCH), generator=generator)[0]
    batch = hypergradient_descent.Digits(training.x[rows], training.y[rows])
    slope = torch.func.grad(hypergradient_descent.loss)
    first = slope(params, batch)
    after = slope({n: p - 0.05 * first[n] for n, p in params.items()}, batch)
    product = sum(float((after[n] * first[n]).sum()) for n in params)
    assert curve.rates[-1] == pytest.approx(0.05 + rule.beta * product, rel=1e-6)


def test_wrong_labels_lose_their_weight(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    found = results(data_hypercleaning, tmp_path)
    assert "Wrong labels found: F1" in capsys.readouterr().out
    assert found["f1"] > 0.6  # by chance: 0.5
    assert found["losses"][-1] < found["losses"][0]
    right, all_of_them = (
        found["test_accuracy"][name] for name in ("right labels only", "all labels")
    )
    assert right > all_of_them > 0.5


def test_labels_are_replaced_by_others():
    data = data_hypercleaning.split(0.3, seed=1)
    assert torch.equal(data.training.y != data.truth, data.wrong)
    assert int(data.wrong.sum()) == 150


@pytest.mark.parametrize(
    "program, wrong",
    [
        (hypergradient_descent, ["--steps", "4"]),
        (hypergradient_descent, ["--rate", "0"]),
        (data_hypercleaning, ["--corrupted", "1.1"]),
        (data_hypercleaning, ["--steps", "-1"]),
    ],
)
def test_bad_options_are_named(
    program: Any, wrong: list[str], capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as stop:
        program.main(wrong)
    assert stop.value.code == 2
    assert wrong[0] in capsys.readouterr().err
