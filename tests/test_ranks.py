"""Tasks split over two processes: the numbers of one, and errors that all are told."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from torch.testing import assert_close

import funcopt as fo
from funcopt.meta import ranks as over

CASES = (
    "numbers",
    "failing",
    "without_tasks",
    "another_theta",
    "another_precision",
    "with_a_graph",
    "within_grad",
    "elementwise",
    "silent",
    "ended",  # the last: a rank is gone
)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """What each rank says of each case."""
    return ranks.outcomes(ranks.__file__, CASES, tmp_path_factory.mktemp("ranks"))


def expected() -> tuple[Any, Any]:
    return ranks.meta(slice(0, 5), ranks.theta(), None)


@pytest.mark.slow
@pytest.mark.parametrize("start", ["two processes", "torchrun"])
def test_unequal_counts_give_the_mean_over_all_tasks(
    start: str, outcomes: Any, tmp_path: Path
):
    (loss, aux), grads = expected()
    if start == "torchrun":
        outcomes = ranks.by_torchrun(ranks.__file__, ["numbers"], tmp_path)
    first, second = outcomes["numbers"]
    for found in (first, second):
        numbers = [torch.tensor(found[n], dtype=torch.float64) for n in ("loss", "w")]
        assert_close(numbers, [loss, grads["w"]], rtol=1e-12, atol=1e-12)
        lr, dtype = found["lr"]
        assert lr == pytest.approx(grads["lr"].item(), rel=1e-6) and found["gap"] is None
        assert dtype == "torch.float32"
    # What comes beside the loss stays where it is.
    own = torch.tensor(first["aux"] + second["aux"], dtype=torch.float64)
    assert len(first["aux"]) == 3
    assert_close(own, aux, rtol=1e-12, atol=1e-12)


ERRORS = {
    "failing": (
        ("RemoteTaskError", "rank 1 failed: KeyError: 'no such task'"),
        ("KeyError", "no such task"),
    ),
    "without_tasks": (
        ("RemoteTaskError", "rank 1 failed: StructureError: tasks has 0 entries"),
        ("StructureError", "tasks has 0 entries"),
    ),
    "another_theta": (
        ("StructureError", "rank 0 has theta.w torch.float64 (3, 2), rank 1 theta.v"),
    )
    * 2,
    "another_precision": (
        (
            "StructureError",
            "rank 0 has theta.w torch.float32 (3, 2), rank 1 theta.w torch.bfloat16",
        ),
    )
    * 2,
    "within_grad": (
        (
            "GradientLostError",
            "a transform of torch.func or a forward-mode level is open",
        ),
        ("RemoteTaskError", "rank 0 failed: GradientLostError: a sum over ranks"),
    ),
    "with_a_graph": (("GradientLostError", "a sum over ranks gives results without"),)
    * 2,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ERRORS)
def test_all_ranks_raise(outcomes: Any, name: str):
    for found, (kind, words) in zip(outcomes[name], ERRORS[name]):
        assert found["error"] == kind and words in found["words"]


@pytest.mark.slow
def test_after_a_failure_the_next_meta_step_works(outcomes: Any):
    loss = expected()[0][0].item()
    for found in outcomes["failing"]:
        assert found["loss"] == pytest.approx(loss, rel=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ended", "silent"])
def test_a_process_that_does_not_come_is_not_waited_for(outcomes: Any, name: str):
    found, _ = outcomes[name]
    assert found["error"] == "RemoteTaskError"
    assert "another rank did not answer" in found["words"]


@pytest.mark.slow
def test_updates_of_dtensors_are_those_of_their_parts(outcomes: Any):
    """The plain rule on each rank's part; the state lies as the parameters do."""
    for found in outcomes["elementwise"]:
        assert len(found) > 25  # of every elementwise rule
        for name, outcome in found.items():
            assert outcome["distance"] <= 1e-12, name
            lie, both = outcome["placements"], ["(Replicate(),)", "(Shard(dim=0),)"]
            assert lie == both * (len(lie) // 2), name


SHARDED = ("fully_sharded", "unrolled_shards")


@pytest.fixture(scope="module")
def of_shards(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    script = Path(ranks.__file__).with_name("sharded_ranks.py")
    return ranks.outcomes(str(script), SHARDED, tmp_path_factory.mktemp("shards"))


@pytest.mark.slow
@pytest.mark.parametrize("case", SHARDED)
def test_parameters_of_fsdp2_step_as_whole_ones(of_shards: Any, case: str):
    """Trained by their own gradients; and in an inner loop, with its derivatives."""
    for found in of_shards[case]:
        assert len(found) > 1
        for name, distance in found.items():
            assert distance <= 1e-12, name


@pytest.fixture
def group_of_one(tmp_path: Path) -> Iterator[Any]:
    file = f"file://{tmp_path}/store"
    dist.init_process_group("gloo", init_method=file, rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_a_group_of_one(group_of_one: Any):
    found = ranks.meta(slice(0, 5), ranks.theta(), group_of_one)
    with pytest.raises(fo.StructureError, match="tasks has 0 entries"):
        ranks.meta(slice(0, 0), ranks.theta(), group_of_one)
    assert_close(found, expected(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "group, words",
    [
        (dist.GroupMember.NON_GROUP_MEMBER, "a group that this process is not in"),
        ([0, 1], r"a group of torch\.distributed, .*not \[0, 1\]"),
        (False, "not False"),
    ],
)
def test_what_is_no_group_of_this_process(group: Any, words: str):
    with pytest.raises(fo.HyperparameterTypeError, match=words):
        ranks.meta(slice(0, 5), ranks.theta(), group)


def test_ranks_have_the_numbers_of_the_whole_job(
    group_of_one: Any, monkeypatch: pytest.MonkeyPatch
):
    """Those of a group that is a part of it: here of 4 and 7, of which 7 fails."""
    monkeypatch.setattr(dist, "get_process_group_ranks", lambda group: [4, 7])
    told = [[True, 5, 0], [False, 0, 0]]
    monkeypatch.setattr(over, "_gathered", lambda *_: told)
    monkeypatch.setattr(over, "_all_words", lambda *_: [None, "KeyError: 'no such'"])
    with pytest.raises(fo.RemoteTaskError, match="^rank 7 failed: KeyError"):
        ranks.meta(slice(0, 5), ranks.theta(), group_of_one)
    told[:] = [[True, 5, 0], [True, 5, 1]]
    monkeypatch.setattr(over, "_all_words", lambda *_: ["a (2,)", "a (3,)"])
    with pytest.raises(fo.StructureError, match=r"rank 4 has a \(2,\), rank 7 a \(3,\)"):
        ranks.meta(slice(0, 5), ranks.theta(), group_of_one)
