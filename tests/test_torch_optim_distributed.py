"""torch.distributed's own tools around our classes, on two processes."""

from typing import Any

import optimizer_ranks
import pytest
import ranks

CASES = ("ddp", "zero", "fsdp2", "refused", "checkpoints")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """What each rank says of each case."""
    folder = tmp_path_factory.mktemp("ranks")
    return ranks.outcomes(optimizer_ranks.__file__, CASES, folder)


@pytest.mark.parametrize("case", ["ddp", "zero", "fsdp2"])
def test_steps_are_torchs_and_those_of_one_process(outcomes: Any, case: str):
    for found in outcomes[case]:
        for name, distances in found.items():
            # Muon's products are rounded to bfloat16, part by part where rows are split.
            limit = 2e-2 if name == "Muon" else 1e-13
            assert distances["moved"] > (1e-6 if name == "Prodigy" else 0.05), name
            assert distances["theirs"] <= 1e-13, name
            assert distances["alone"] <= limit, name


def test_zeros_state_that_is_brought_together_is_torchs(outcomes: Any):
    first, _ = outcomes["zero"]
    assert first["AdamW"]["state"] <= 1e-13


def test_distributed_checkpoints_go_on(outcomes: Any):
    """Saved by ours or torch's, loaded by ours or torch's; on both ranks."""
    for found in outcomes["checkpoints"]:
        assert len(found) == 4
        assert max(found.values()) <= 1e-13, found


REFUSED = {
    "Adafactor": "adafactor needs each parameter whole",
    "Shampoo": "shampoo needs each parameter whole",
    "AdamW": "is not split over ranks as that is: load a checkpoint by",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_ranks_cannot_step_is_refused(outcomes: Any, name: str):
    for found in outcomes["refused"]:
        assert found[name]["error"] == "ExecutionError"
        assert REFUSED[name] in found[name]["words"]
