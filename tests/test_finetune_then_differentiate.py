"""A trained adapter handed over and differentiated: its parts, and the program."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import finetune_then_differentiate as program
import funcopt as fo
from digits import data, handover
from digits.data import Digits
from digits.handover import Task
from digits.network import Network, groups
from funcopt import torch_optim

EXAMPLES, BATCH = 12, 6


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def task() -> Task:
    digits, _ = data.load(seed=0, training=40)
    digits = Digits(digits.x.double(), digits.y)
    given, clean = digits.rows(slice(EXAMPLES)), digits.rows(slice(EXAMPLES, None))
    labels = handover.with_wrong_labels(given, 0.25, data.seeded(1))
    given_labels = Digits(given.x, labels)
    return Task(given_labels, clean, clean, labels != given.y, given.y)


def running(task: Task, steps: int) -> tuple[torch.nn.Module, torch_optim.Adapter]:
    torch.manual_seed(0)
    net = Network(10, dropout=0.0).double()
    optimizer = torch_optim.AdamW(groups(net, lr=4e-3, backbone=0.1))
    for _ in range(steps):
        one_step(net, optimizer, task, torch.arange(BATCH))
    return net, optimizer


def one_step(net: Any, optimizer: Any, task: Task, rows: torch.Tensor) -> None:
    weights = torch.ones(EXAMPLES, dtype=torch.float64)
    optimizer.zero_grad()
    params = handover.live(optimizer)
    handover.weighted_loss(net, params, task.training, rows, weights).backward()
    optimizer.step()


BATCHES = torch.arange(EXAMPLES).view(2, BATCH)


def test_wrong_labels_are_as_many_as_asked(task: Task):
    assert int(task.wrong.sum()) == 3
    assert torch.equal(task.training.y != task.truth, task.wrong)


@pytest.mark.slow
def test_hypergradients_are_finite_differences(task: Task):
    net, optimizer = running(task, steps=2)
    problem = handover.next_steps(optimizer, net, task, BATCHES)
    eta = handover.as_it_runs(optimizer, task)
    estimate = fo.meta.reverse(problem, eta)
    assert handover.value(problem, eta) == pytest.approx(estimate.value.item(), rel=1e-9)
    checks = handover.check(problem, eta, estimate.grads, [0, 7])
    names = [f"{name}[{i}]" for name in ("lr", "weight_decay") for i in range(4)]
    assert [c.name for c in checks] == [*names, "weights[0]", "weights[7]"]
    assert min(abs(c.difference) for c in checks) > 1e-9
    assert max(c.error for c in checks) < 1e-4


def test_the_steps_as_a_function_are_those_of_the_loop(task: Task):
    net, optimizer = running(task, steps=2)
    problem = handover.next_steps(optimizer, net, task, BATCHES)
    end = fo.meta.advance(problem, handover.as_it_runs(optimizer, task), 2)
    before = [p.detach().clone() for p in net.parameters()]
    for rows in BATCHES:
        one_step(net, optimizer, task, rows)
    by_loop = [p.detach().clone() for p in net.parameters()]
    assert all(not torch.equal(p, q) for p, q in zip(before, by_loop))
    optimizer.load(end["params"], end["state"])
    for p, q in zip(net.parameters(), by_loop):
        torch.testing.assert_close(p.detach(), q, rtol=1e-12, atol=1e-14)


def test_the_area_under_the_curve():
    scores = torch.tensor([3.0, 1.0, 2.0, 2.0])
    wrong = torch.tensor([True, False, True, False])
    assert handover.ranked_above(scores, wrong) == (1 + 1 + 1 + 0.5) / 4


@pytest.mark.slow
def test_the_program_in_small(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    program.main(["--quick", "--out", str(tmp_path)])
    assert "| learned weights and rates |" in capsys.readouterr().out
    picture = tmp_path / "finetune_then_differentiate.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    found: dict[str, Any] = json.loads((tmp_path / "results.json").read_text())
    assert found["largest_error"] < 1e-4
    assert found["loop_against_function"] < 1e-12
    assert found["wrong_ranked_above_right"]["by hypergradient"] > 0.6
    assert found["clean_loss"]["after"] < found["clean_loss"]["before"]
    assert found["correlation"] > 0.9
    assert min(found["test_accuracy"].values()) > 0.5


@pytest.mark.parametrize(
    "wrong", [["--corrupted", "0"], ["--steps", "-1"], ["--left-out", "321"]]
)
def test_bad_options_are_named(wrong: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        program.main(wrong)
    assert stop.value.code == 2
    assert wrong[0] in capsys.readouterr().err
