"""A program's sweep printed as C: one function for a ragged list of leaves."""

import math
import platform
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from itertools import pairwise

import torch

from funcopt.execution.program import Pass, Program

#: how a dtype is stored, and what makes the computed type of it and back
_STORAGE = {
    torch.float32: ("float", "{}", "{}"),
    torch.float64: ("double", "{}", "{}"),
    torch.bfloat16: ("uint16_t", "from_bfloat16({})", "to_bfloat16({})"),
    torch.float16: ("_Float16", "(float){}", "(_Float16){}"),
}

_EXPRESSIONS = {
    "add": "{0} + {1}",
    "sub": "{0} - {1}",
    "mul": "{0} * {1}",
    "div": "{0} / {1}",
    "neg": "-{0}",
    "abs": "FABS({0})",
    "sqrt": "SQRT({0})",
    "rsqrt": "1 / SQRT({0})",
    "reciprocal": "1 / {0}",
    "sign": "{0} > 0 ? (T)1 : {0} < 0 ? (T)-1 : (T)0",
    "maximum": "larger({0}, {1})",
    "minimum": "smaller({0}, {1})",
    "lerp": "lerp({0}, {1}, {2})",
    "addcmul": "addcmul({0}, {1}, {2})",
    "where": "{0} ? {1} : {2}",
    "spread": "{0}",
    "lt": "{0} < {1}",
    "le": "{0} <= {1}",
    "gt": "{0} > {1}",
    "ge": "{0} >= {1}",
    "eq": "{0} == {1}",
    "ne": "{0} != {1}",
    "logical_and": "({0} != 0) & ({1} != 0)",
    "logical_or": "({0} != 0) | ({1} != 0)",
    "logical_not": "{0} == 0",
    "exp": "EXP({0})",
    "log": "LOG({0})",
    "tanh": "TANH({0})",
    "atan2": "ATAN2({0}, {1})",
    "bits": "bits({0})",
    "of_bits": "of_bits({0})",
    "pow": "POW({0}, {1})",
    "sigmoid": "1 / (1 + EXP(-{0}))",
}

_FLOATS = {"atan2": "arc_tangent"}
_LONG = ("atan2",)  # what begins a loop of its own
_INCLUDES = ["#include <stdint.h>", "#include <string.h>"]
_MATH = ("fabs", "sqrt", "exp", "log", "tanh", "atan2", "pow", "fma")


def print_c(program: Program, sweep: Pass, stored: torch.dtype) -> str:
    """The source of one sweep: ``run`` over a table of pointers, inputs then outputs."""
    wide = program.dtype is torch.float64
    storage, load, store = _STORAGE[stored]
    rows, read = program.scalars_read(sweep), program.streams_read(sweep)
    head = [
        "#include <math.h>",
        *_INCLUDES,
        f"typedef {'double' if wide else 'float'} T;",
        f"typedef int{64 if wide else 32}_t I;",
        f"typedef {storage} S;",
        f"#define SUMS {len(sweep.sums)}",
        f"#define SCALARS {len(rows)}",
        f"#define COLUMNS {len(read) + len(sweep.outputs)}",
        *(f"#define {name.upper()} {_function(name, wide)}" for name in _MATH),
        *(["#define CONTRACTED"] if _contracts() else []),
    ]
    names = {v: f"v{v}" for v in (*rows, *read, *sweep.streams)}

    def name(value: int) -> str:
        return names.get(value) or f"(T){_number(program.op(value).literal)}"

    def aside(k: int, value: int) -> str:
        """When an output goes to a tile: to its place later, or, there already, never."""
        there = value in read and not sums
        return "streaming" + f" || out{k} == in{value}" * there

    def kind(value: int) -> str:
        return "int" if program.op(value).boolean else "T"

    def loop(stage: Sequence[int], ends: Sequence[str]) -> list[str]:
        """Over a tile, from what is read and what loops before have kept."""
        body = [
            *(f"const T v{v} = {load.format(f'in{v}[j + i]')};" for v in read),
            *(f"const {kind(v)} v{v} = kept{v}[i];" for v in there),
        ]
        for v in stage:
            op = program.op(v)
            expression = _EXPRESSIONS[op.name].format(*(name(a) for a in op.args))
            body.append(f"const {kind(v)} v{v} = {expression};")
        added = ",".join(f"s{k}" for k in sums)
        return [
            "        #pragma omp simd" + f" reduction(+:{added})" * bool(added),
            "        for (int64_t i = 0; i < end; i++) {",
            *(f"            {line}" for line in (*body, *ends)),
            "        }",
        ]

    *before, (last, _) = stages = _stages(program, sweep)
    there: list[int] = []
    outputs = list(enumerate(sweep.outputs))
    sums = range(len(sweep.sums))
    size = "streaming ? TILE : n" if sums else "TILE"  # a sum of few costs an addition
    lines = [
        "static void sweep(int64_t n, int64_t from, char *const *at, int64_t leaves,",
        "        const double *scalars, double *sums, int streaming) {",
        *(f"    const T v{v} = (T)scalars[{k}];" for k, v in enumerate(rows)),
        *(
            f"    const S *in{v} = (const S *)at[{k} * leaves] + from;"
            for k, v in enumerate(read)
        ),
        *(
            f"    S *out{k} = (S *)at[{len(read) + k} * leaves] + from, tile{k}[TILE];"
            for k, _ in outputs
        ),
        *(f"    double s{k} = 0;" for k in sums),
        # One loop for both ways: a kernel is built in half the time of two.
        f"    const int64_t all = {size}, half = HALF(n);",
        "    for (int64_t first = 0; first < half; first += all)",
        "    for (int64_t j = first; j < n; j += half) {",
        "        int64_t end = n - j < all ? n - j : all;",
        *(f"        FETCH(in{v} + j);" for v in read if not sums),
        *(
            f"        S *const to{k} = {aside(k, v)} ? tile{k} : out{k} + j;"
            for k, v in outputs
        ),
        *(f"        {kind(v)} kept{v}[TILE];" for _, kept in stages for v in kept),
    ]
    for stage, kept in before:
        lines += loop(stage, [f"kept{v}[i] = v{v};" for v in kept])
        there += kept
    ends = [
        *(f"to{k}[i] = {store.format(name(v))};" for k, v in outputs),
        *(f"s{k} += {name(program.op(s).args[0])};" for k, s in enumerate(sweep.sums)),
    ]
    lines += [
        *loop(last, ends),
        "        if (!streaming) continue;",
        *(f"        stream(out{k} + j, tile{k}, end * sizeof(S));" for k, _ in outputs),
        "    }",
        *(f"    sums[{k}] = s{k};" for k in sums),
        "}",
    ]
    texts = map(_text, ("job.h", "arithmetic.h", "kernel.h"))
    return "\n".join((*head, *texts, *lines, ""))


def print_driver() -> str:
    """The source of ``drive``: what is done for all kernels alike, and built once."""
    return "\n".join((*_INCLUDES, _text("job.h"), _text("driver.c")))


def _stages(program: Program, sweep: Pass) -> list[tuple[Sequence[int], list[int]]]:
    """What each loop over a tile computes, and what of it the later ones need.

    An arc tangent begins a loop: a processor looks ahead over so many instructions, and
    those that wait for one number's root and quotient would keep the next one's from it.
    """
    streams = sweep.streams
    long = (i for i, v in enumerate(streams) if i and program.op(v).name in _LONG)
    starts = [0, *(() if sweep.sums else long), len(streams)]  # a sum has no tiles
    stages = []
    for start, end in pairwise(starts):
        later = {a for v in streams[end:] for a in program.op(v).args}
        later.update(sweep.outputs if end < len(streams) else ())
        stages.append((streams[start:end], [v for v in streams[start:end] if v in later]))
    return stages


@cache
def _text(name: str) -> str:
    return files("funcopt.execution.native").joinpath(name).read_text()


def _function(name: str, wide: bool) -> str:
    return name if wide else _FLOATS.get(name, name + "f")


def _contracts() -> bool:
    """Whether torch's vector kernels contract a product into a sum."""
    if platform.machine() in ("x86_64", "AMD64"):
        return torch.backends.cpu.get_cpu_capability() != "DEFAULT"
    return platform.machine() in ("aarch64", "arm64")


def _number(literal: float) -> str:
    if math.isnan(literal):
        return "NAN"
    if math.isinf(literal):
        return "INFINITY" if literal > 0 else "-INFINITY"
    return literal.hex()
