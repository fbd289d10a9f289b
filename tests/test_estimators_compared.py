"""The example that compares estimators: its exact answers, and the program in small."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import estimators_compared
import funcopt as fo
from estimators import measure, problems


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    "exact, tolerance",
    [
        (problems.influence_balancing(30), 1e-13),
        (problems.learned_rate(20), 1e-13),
        (problems.learned_penalties(400), 1e-12),  # at the minimum
    ],
    ids=["influence balancing", "rate", "penalties"],
)
def test_the_exact_answers_are_those_of_reverse_mode(
    exact: problems.Exact, tolerance: float
):
    found = measure.whole(fo.meta.reverse, exact)
    torch.testing.assert_close(found, exact.grads, rtol=tolerance, atol=tolerance)
    assert exact.grads.abs().max() > 1e-3


def test_windows_of_all_steps_are_the_whole():
    exact = problems.influence_balancing(12)
    found = measure.windows(exact, fo.meta.truncated, 12)
    torch.testing.assert_close(found, exact.grads, rtol=1e-13, atol=0)
    halves = measure.windows(exact, fo.meta.truncated, 6)
    assert (halves - exact.grads).abs() > 1e-2


@pytest.mark.slow
def test_the_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    options = ["--steps", "8", "--particles", "4", "--out", str(tmp_path)]
    estimators_compared.main(options)
    printed = capsys.readouterr().out
    assert "influence balancing" in printed and "implicit: cg" in printed
    results = json.loads((tmp_path / "results.json").read_text())
    rate = {p["method"]: p for p in results["learned rate"]}
    assert rate["reverse"]["error"] < 1e-12 < 0.1 < rate["first_order"]["error"]
    assert all(p["seconds"] > 0 for p in results["learned penalties"])
    assert (tmp_path / "estimators.png").read_bytes().startswith(b"\x89PNG")


def test_bad_options_are_named(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        estimators_compared.main(["--steps", "3"])
    assert stop.value.code == 2
    assert "'3' is not an integer from 8 up" in capsys.readouterr().err
