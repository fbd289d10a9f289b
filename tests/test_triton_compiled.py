"""Triton's kernels compiled for an H100 or H200, which takes no GPU, and read."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton has no release for this system")
pytestmark = pytest.mark.slow  # eight seconds of compilation


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    program = Path(__file__).with_name("compiled_kernels.py")
    done = subprocess.run(
        [sys.executable, str(program)], env=env, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# AdamW reads g, p and two slots, and its derivative three cotangents more. A thread has 8
# of the 1,024 elements of a block, or 4 where 8 warps share it: two words of 16 bytes in
# float32, or one; two in float64; one in bfloat16.
WIDE = {
    "step torch.float32": (4 * 2, 3 * 2),
    "vjp torch.float32": (7, 4),
    "step torch.float64": (4 * 2, 3 * 2),
    "vjp torch.float64": (7 * 2, 4 * 2),
    "step torch.bfloat16": (4, 3),
    "vjp torch.bfloat16": (7, 4),
}
# Two blocks of 4 warps share the 65,536 registers of a processor up to 255 each, two of 8
# up to 128; float64 has to do with one.
MOST = {"step torch.float32": 128, "vjp torch.float32": 128, "step torch.float64": 128}


def test_full_blocks_are_read_and_written_16_bytes_at_a_time(kernels: dict[str, Any]):
    for name, expected in WIDE.items():
        assert (kernels[name]["wide loads"], kernels[name]["wide stores"]) == expected


def test_nothing_is_kept_in_local_memory(kernels: dict[str, Any]):
    for name, kernel in kernels.items():
        assert (kernel["local"], kernel["stack"]) == (0, 0), name
        assert kernel["registers"] <= MOST.get(name, 255), name


def test_arithmetic_is_exact(kernels: dict[str, Any]):
    for name, kernel in kernels.items():
        assert kernel["approximate"] == [], name
        assert kernel["atomic"] == [], name  # sums are added in one order
    assert kernels["step torch.float32"]["fused"] == 2 * 8  # the two averages, no more
