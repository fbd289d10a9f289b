"""torch.distributed's own tools around our classes, on two processes."""

from typing import Any

import optimizer_ranks
import pytest
import ranks

CASES = ("ddp",)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """What each rank says of each case."""
    folder = tmp_path_factory.mktemp("ranks")
    return ranks.outcomes(optimizer_ranks.__file__, CASES, folder)


@pytest.mark.parametrize("case", ["ddp"])
def test_steps_are_torchs_and_those_of_one_process(outcomes: Any, case: str):
    for found in outcomes[case]:
        for name, distances in found.items():
            assert distances["moved"] > 0.05, name
            assert distances["theirs"] <= 1e-13, name
            assert distances["alone"] <= 1e-13, name
