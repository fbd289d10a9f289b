"""Every test run draws the same numbers."""

import warnings

import pytest
import torch
from hypothesis import settings

with warnings.catch_warnings():
    # torch loads this at the first dual tensor, and warns of its own use of TorchScript
    warnings.simplefilter("ignore", DeprecationWarning)
    import torch._decomp.decompositions_for_jvp  # noqa: F401

# The tensors are small. A second thread gains nothing, and where another program takes
# its core the two wait for each other: seconds for what takes milliseconds.
torch.set_num_threads(1)

settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=100)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
