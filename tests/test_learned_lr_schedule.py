"""The example that learns a schedule: its gradients, its bias, the program in small."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import learned_lr_schedule as example


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_rates_go_through_the_knots():
    knots = torch.tensor([0.1, 0.4, 0.2]).log()
    found = example.rates(knots, 5)
    expected = torch.tensor([0.1, 0.2, 0.4, math.sqrt(0.08), 0.2])
    torch.testing.assert_close(found, expected)


def test_a_window_of_all_steps_is_forward_mode():
    eta = {"hyper": {"lr": torch.full((3,), math.log(0.05))}}
    training = example.problem(12, seed=0)
    whole, windowed, single = (
        example.hypergradient(training, eta, window)["hyper"]["lr"]
        for window in (None, 12, 1)
    )
    torch.testing.assert_close(windowed, whole, rtol=1e-4, atol=0)
    assert (single - whole).abs().max() > 0.3 * whole.abs().max()


def test_the_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    options = ["--steps", "12", "--iterations", "3", "--windows", "4", "--trainings", "2"]
    example.main([*options, "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "| all steps, forward mode |" in printed and "| windows of 4 |" in printed
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["settings"]["steps"] == 12
    for schedule in results["schedules"]:
        assert len(schedule["rates"]) == 12 and len(schedule["losses"]) == 13
        assert schedule["losses"][-1] < schedule["losses"][0]
    assert (tmp_path / "learned_lr_schedule.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "wrong", [["--steps", "0"], ["--windows", "0"], ["--knots", "1"]]
)
def test_bad_options_are_named(wrong: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        example.main(wrong)
    assert stop.value.code == 2
    assert "must be 1 or more" in capsys.readouterr().err
