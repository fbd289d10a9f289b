"""The classic loop in small: groups, resuming to the bit, habits, the whole program."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import training_loop
from digits import data, gradients, sweep
from digits.network import Network, groups
from digits.training import Training, differing, distance, warmup_and_cosine
from funcopt import torch_optim


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_groups_split_by_names_and_leave_nothing_out():
    net = Network(10)
    found = groups(net, lr=1.0, backbone=0.1, weight_decay=0.05)
    names = [[name for name, _ in group["params"]] for group in found]
    assert names[0] == ["backbone.conv1.weight", "backbone.conv2.weight"]
    assert names[2:] == [["head.weight"], ["head.bias"]]
    assert sorted(sum(names, [])) == sorted(name for name, _ in net.named_parameters())
    rates = [(group["lr"], group["weight_decay"]) for group in found]
    assert rates == [(0.1, 0.05), (0.1, 0.0), (1.0, 0.05), (1.0, 0.0)]


def test_warmup_and_cosine():
    share = warmup_and_cosine(20)
    assert [share(0), share(1), share(2), share(11)] == [0.5, 1.0, 1.0, 0.5]
    assert share(20) == pytest.approx(0.0)


def test_no_image_is_in_both_parts():
    training, test = data.load(seed=3)
    assert (len(training.y), len(test.y)) == (1400, 397)
    images = {tuple(x.flatten().tolist()) for x in training.x}
    assert not images & {tuple(x.flatten().tolist()) for x in test.x}
    few = data.first_of_each(training, 3)
    assert few.y.bincount().tolist() == [3] * 10
    mirror = data.mirrored(few)
    assert torch.equal(mirror.x[..., 0], few.x[..., 7]) and torch.equal(mirror.y, few.y)


@pytest.mark.parametrize(
    "saved_at, killed_at",
    [(3, 4), *(pytest.param(*at, marks=pytest.mark.slow) for at in [(1, 2), (4, 4)])],
)
def test_a_resumed_training_is_the_same_to_the_bit(
    tmp_path: Path, saved_at: int, killed_at: int
):
    training, test = data.load(seed=0)
    few, file = test.rows(slice(20)), tmp_path / "checkpoint.pt"

    def begun(seed: int) -> Training:
        return Training(torch_optim.AdamW, steps=5, seed=seed)

    whole = begun(1).run(training, few)
    begun(1).run(training, few, until=killed_at, save_to=file, save_at=saved_at)
    resumed = begun(2)
    assert differing(whole, resumed.run(training, few)) > 10_000  # another seed
    resumed = begun(2).load(file)
    assert resumed.step == saved_at
    assert differing(whole, resumed.run(training, few)) == 0
    assert resumed.curves == whole.curves


@pytest.mark.slow
def test_the_same_loop_on_torch_optim_goes_the_same_way():
    training, test = data.load(seed=0)
    ours, theirs = (
        Training(library.AdamW, steps=8, seed=1).run(training, test)
        for library in (torch_optim, torch.optim)
    )
    start = Training(torch.optim.AdamW, steps=8, seed=1)
    assert distance(ours.net, start.net) > 0.01
    assert distance(ours.net, theirs.net) < 1e-4
    assert ours.curves.losses == pytest.approx(theirs.curves.losses, rel=1e-5)


def test_zeros_are_gradients_and_micro_batches_add_up():
    training, _ = data.load(seed=0)
    assert gradients.moved_while_frozen(training, set_to_none=True, steps=1) == 0.0
    assert gradients.moved_while_frozen(training, set_to_none=False, steps=1) > 1e-3
    assert gradients.accumulated_against_whole(training, steps=2) < 1e-9


def test_the_best_rate_is_that_of_the_lowest_loss():
    rows = [("a", 0.1, 2.0), ("a", 1.0, 1.0), ("b", 0.1, math.inf), ("b", 1.0, 3.0)]
    points = [sweep.Point(*row) for row in rows]
    assert {name: p.lr for name, p in sweep.best(points).items()} == {"a": 1.0, "b": 1.0}


@pytest.mark.slow
def test_the_program_in_small(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    training_loop.main(["--quick", "--out", str(tmp_path)])
    shown = capsys.readouterr().out
    assert "| numbers that differ after kill and resume | 0 of" in shown
    found: dict[str, Any] = json.loads((tmp_path / "results.json").read_text())
    picture = (tmp_path / "training_loop.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert found["loop"]["differing"] == 0
    assert found["loop"]["accuracy"] > 0.8
    assert found["loop"]["to_torch"] < 1e-3
    assert max(new[0] for new, _ in found["fine_tuning"].values()) > 60
    assert {p["loss"] < sweep.CHANCE for p in found["best_rates"].values()} == {True}


@pytest.mark.parametrize("wrong", [["--steps", "9"], ["--rates", "0"], ["--seeds", "-1"]])
def test_bad_options_are_named(wrong: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        training_loop.main(wrong)
    assert stop.value.code == 2
    assert wrong[0] in capsys.readouterr().err
