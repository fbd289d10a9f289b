"""What AdamW's Triton kernels become on an H100 or H200, as JSON; no GPU is needed.

Run as a program of its own: in the tests' process kernels are the interpreter's.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from funcopt.execution.rule_derivatives import vjp
from funcopt.execution.trace import trace
from funcopt.execution.triton import kernels
from funcopt.execution.triton.source import Printer
from funcopt.execution.triton.tables import BLOCK
from funcopt.optimizers.adamw import rule

HOPPER = GPUTarget("cuda", 90, 32)
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
KINDS = {
    "leaves": "i32", "count": "i32", "blocks": "*i64", "groups": "*i64",
    "table": "*i64", "BLOCK": "constexpr", "WIDTH": "constexpr",
}  # fmt: skip
STREAMS = [True] * 4 + [False] * 6


def adamw(*inputs: Tensor) -> Sequence[Tensor]:
    names = ("step", "lr", "beta1", "beta2", "eps", "weight_decay")
    return rule(*inputs[:4], **dict(zip(names, inputs[4:])), maximize=False)


def compiled(source: str, warps: int) -> Any:
    kernel = kernels._kernel(source)
    signature = {name: KINDS.get(name, "*fp64") for name in kernel.arg_names}
    constants = {name: BLOCK for name, kind in signature.items() if kind == "constexpr"}
    options = {"num_warps": warps, "enable_fp_fusion": False}
    return triton.compile(
        ASTSource(kernel, signature, constants), target=HOPPER, options=options
    )


def described(kernel: Any) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        code, use = (
            subprocess.run(
                [TOOLS / "cuobjdump", how, file.name], text=True, capture_output=True
            ).stdout
            for how in ("-sass", "-res-usage")
        )
    ptx = kernel.asm["ptx"]
    return {
        "wide loads": code.count("LDG.E.128"),
        "wide stores": code.count("STG.E.128"),
        "local": len(re.findall(r"\b(?:LDL|STL)\b", code)),
        "registers": int(re.findall(r"REG:(\d+)", use)[0]),
        "stack": int(re.findall(r"STACK:(\d+)", use)[0]),
        "approximate": re.findall(r"(?:div|sqrt)\.(?:approx|full)\S*f32", ptx),
        "atomic": re.findall(r"\b(?:ATOM|RED)[GS]?\b\S*", code),
        "fused": ptx.count("fma.rn.f32"),
    }


def main() -> None:
    found = {}
    for stored in (torch.float32, torch.float64, torch.bfloat16):
        computed = torch.float64 if stored is torch.float64 else torch.float32
        gradients = vjp(adamw, [True] * len(STREAMS))
        for what, program in (
            ("step", trace(adamw, STREAMS, computed)),
            ("vjp", trace(gradients, [*STREAMS, True, True, True], computed)),
        ):
            printer = Printer(program, stored)
            kernel = compiled(printer.sweep(0), printer.warps(0))
            found[f"{what} {stored}"] = described(kernel)
            if what == "vjp":
                kernel = compiled(printer.finish(0), kernels.FINISHING_WARPS)
                found[f"sums {stored}"] = described(kernel)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
