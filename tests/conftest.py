"""Every test run draws the same numbers, and builds its kernels anew."""

import gc
import os
import warnings
from collections.abc import Iterator, Sequence

# Triton reads it where a kernel is defined: before any file that does is collected.
os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch
from hypothesis import settings
from row import Case
from table import PLAINEST, QUICK
from torch import Tensor

from funcopt.execution.executor import Maker, empty_like
from funcopt.execution.native import kernels
from funcopt.execution.recycle import Recycler

with warnings.catch_warnings():
    # torch loads this at the first dual tensor, and warns of its own use of TorchScript
    warnings.simplefilter("ignore", DeprecationWarning)
    import torch._decomp.decompositions_for_jvp  # noqa: F401

# The tensors are small. A second thread gains nothing, and where another program takes
# its core the two wait for each other: seconds for what takes milliseconds.
torch.set_num_threads(1)

collect_ignore_glob = ["published/*.py"]  # scripts, of packages that are not here

settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=100)
settings.load_profile("repeatable")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """For the slow run: most mixes of flags, and foreach.

    (The walk over lists is torch's own operations; kernels are what can be wrong.)
    """
    for item in items:
        callspec = getattr(item, "callspec", None)
        case = callspec.params.get("case") if callspec else None
        quick = PLAINEST if item.get_closest_marker("costly") else QUICK
        between = isinstance(case, Case) and case not in quick
        if between or (callspec and "foreach" in callspec.params.values()):
            item.add_marker(pytest.mark.slow)


def pytest_collection_finish() -> None:
    """Thousands of tests are no garbage: not to be looked through at each collection."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # or JAX would report all that is left as leaks


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def _poison(column: Sequence[Tensor]) -> Sequence[Tensor]:
    for x in column:
        x.data.fill_(torch.nan)  # which no version counts
    return column


@pytest.fixture(scope="session", autouse=True)
def poisoned() -> Iterator[None]:
    """What a native kernel forgets to write is NaN.

    Else it is what memory held: of an earlier step, or of the reference's the very
    numbers that are expected.
    """
    columns, made = Recycler.columns, Maker.__call__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Maker, "__call__", lambda self: _poison(made(self)))
        patch.setattr(
            Recycler, "columns", lambda *given: [*map(_poison, columns(*given))]
        )
        patch.setattr(kernels, "empty_like", lambda like: _poison(empty_like(like)))
        yield


@pytest.fixture
def settled() -> None:
    """What earlier tests have left is not looked through by this one's collections."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def float64_scalars() -> Iterator[None]:
    """torch keeps the scalars of its state in the default dtype."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(default)


@pytest.fixture(scope="session", autouse=True)
def own_kernels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache of this run's own, which its workers share: nothing old is found in it."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FUNCOPT_CACHE", str(folder / "kernels"))
        yield
