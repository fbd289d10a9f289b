"""A program's sweep printed as C: one function for a ragged list of leaves."""

import math
import platform

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
    "sign": "(T)(({0} > 0) - ({0} < 0))",
    "maximum": "larger({0}, {1})",
    "minimum": "smaller({0}, {1})",
    "lerp": "lerp({0}, {1}, {2})",
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
    "pow": "POW({0}, {1})",
    "sigmoid": "1 / (1 + EXP(-{0}))",
}

# A NaN comes through, as in torch: the comparison with one is false. torch's lerp takes
# the nearer end as its base, and its vector kernels contract the product into the sum.
_PRELUDE = """\
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef {computed} T;
typedef {stored} S;
#define BLOCK 4096
#define SUMS {sums}
{functions}
static inline T larger(T a, T b) {{
    T c = a > b ? a : b;  // in two steps, or gcc sees control flow and no vector
    return a != a ? a : c;
}}
static inline T smaller(T a, T b) {{
    T c = a < b ? a : b;
    return a != a ? a : c;
}}
// Within two units in the last place, branch-free, where the C library's is no vector:
// the arc tangent of a quotient up to 1 by a polynomial, and the octants from that.
#ifdef __FP_FAST_FMAF
#define HORNER(a, x, b) __builtin_fmaf(a, x, b)
#else
#define HORNER(a, x, b) (a) * (x) + (b)
#endif
static inline float arc_tangent(float y, float x) {{
    float a = fabsf(x), b = fabsf(y), long_ = a > b ? a : b, short_ = a > b ? b : a;
    float q = short_ == long_ ? (float)(long_ > 0) : short_ / long_, z = q * q;
    float r = HORNER(-0x1.d62e0cp-10f, z, 0x1.65a54ep-7f);
    r = HORNER(r, z, -0x1.fed062p-6f);
    r = HORNER(r, z, 0x1.dac964p-5f);
    r = HORNER(r, z, -0x1.58346cp-4f);
    r = HORNER(r, z, 0x1.c099f2p-4f);
    r = HORNER(r, z, -0x1.2421b4p-3f);
    r = HORNER(r, z, 0x1.9991fep-3f);
    r = HORNER(r, z, -0x1.55553ep-2f);
    r = HORNER(q, z * r, q);
    r = b > a ? 0x1.921fb6p0f - (r + 0x1.777a5cp-25f) : r;
    r = copysignf(1.0f, x) < 0 ? 0x1.921fb6p1f - (r + 0x1.777a5cp-24f) : r;
    return copysignf(r, y);  // a NaN has come through the quotient
}}
static inline T lerp(T a, T b, T w) {{
    int near = FABS(w) < (T)0.5;
    T factor = near ? w : w - 1, base = near ? a : b;
    return {lerp};
}}
static inline T from_bfloat16(uint16_t x) {{
    uint32_t bits = (uint32_t)x << 16;
    float out;
    memcpy(&out, &bits, 4);
    return out;
}}
static inline uint16_t to_bfloat16(float x) {{
    uint32_t bits;
    memcpy(&bits, &x, 4);
    uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return x != x ? 0x7fc0 : (uint16_t)rounded;
}}
// Past the cache: else each line is read before it is written, a third of the traffic.
#if defined(__AVX512F__) && defined(__GNUC__)
typedef long long Line __attribute__((vector_size(64)));
#define PUT(to, line) __builtin_ia32_movntdq512((Line *)(to), line)
#elif defined(__AVX__) && defined(__GNUC__)
typedef long long Line __attribute__((vector_size(32)));
#define PUT(to, line) __builtin_ia32_movntdq256((Line *)(to), line)
#endif
#define TILE 256
static __attribute__((noinline)) void stream(S *to, const S *from, int64_t n) {{
    int64_t i = 0;
#ifdef PUT
    for (; i < n && ((uintptr_t)(to + i) & (sizeof(Line) - 1)); i++) to[i] = from[i];
    for (int64_t per = sizeof(Line) / sizeof(S); i + per <= n; i += per) {{
        Line line;
        memcpy(&line, from + i, sizeof(Line));
        PUT(to + i, line);
    }}
#endif
    for (; i < n; i++) to[i] = from[i];
}}
static inline void fence(void) {{
#ifdef PUT
    __builtin_ia32_sfence();
#endif
}}
"""

# Blocks are of one size whatever the number of threads, and the sums of blocks are added
# in their order: a result does not depend on who computed it.
_DRIVER = """
typedef struct {
    int64_t leaves, tasks;
    const int64_t *sizes, *rows;
    const double *scalars;
    char *const *pointers;
    double *partial;
    int streaming, parallel;
} Job;

// Of the OpenMP that torch has loaded, so that both share one pool of threads.
static int (*thread_number)(void), (*thread_count)(void);
static void (*parallel)(void (*)(void *), void *, unsigned, unsigned);

void bind(void *number, void *count, void *run) {
    thread_number = (int (*)(void))number;
    thread_count = (int (*)(void))count;
    parallel = (void (*)(void (*)(void *), void *, unsigned, unsigned))run;
}

static int64_t blocks_of(const Job *job) {
    int64_t blocks = 0;
    for (int64_t i = 0; i < job->leaves; i++)
        blocks += (job->sizes[i] + BLOCK - 1) / BLOCK * job->tasks;
    return blocks;
}

static void work(void *data) {
    const Job *job = data;
    int64_t total = blocks_of(job), block = 0;
    int64_t mine = job->parallel ? thread_number() : 0;
    int64_t all = job->parallel ? thread_count() : 1;
    int64_t begin = total * mine / all, end = total * (mine + 1) / all;
    for (int64_t i = 0; i < job->leaves && block < end; i++) {
        int64_t size = job->sizes[i], each = (size + BLOCK - 1) / BLOCK;
        if (block + each * job->tasks <= begin) {
            block += each * job->tasks;
            continue;
        }
        for (int64_t task = 0; task < job->tasks; task++) {
            int64_t row = job->rows[i] * job->tasks + task;
            for (int64_t b = 0; b < each; b++, block++) {
                if (block < begin || block >= end) continue;
                int64_t n = size - b * BLOCK < BLOCK ? size - b * BLOCK : BLOCK;
                sweep(n, task * size + b * BLOCK, job->pointers + i, job->leaves,
                      job->scalars + row * SCALARS, job->partial + block * SUMS,
                      job->streaming);
            }
        }
    }
    if (job->streaming) fence();
}

int run(int64_t leaves, int64_t tasks, const int64_t *sizes, const int64_t *rows,
        const double *scalars, char *const *pointers, double *sums, int streaming,
        int threads) {
    Job job = {leaves, tasks, sizes, rows, scalars, pointers, 0, streaming,
               threads > 1 && parallel};
    if (SUMS && !(job.partial = malloc((blocks_of(&job) + 1) * SUMS * sizeof(double))))
        return 1;
    if (job.parallel) parallel(work, &job, threads, 0);
    else work(&job);
    const double *partial = job.partial;
    for (int64_t i = 0; SUMS && i < leaves; i++)
        for (int64_t task = 0; task < tasks; task++, sums += SUMS) {
            for (int k = 0; k < SUMS; k++) sums[k] = 0;
            for (int64_t b = 0; b < (sizes[i] + BLOCK - 1) / BLOCK; b++, partial += SUMS)
                for (int k = 0; k < SUMS; k++) sums[k] += partial[k];
        }
    free(job.partial);
    return 0;
}
"""

_FLOATS = {"atan2": "arc_tangent"}
_MATH = ("fabs", "sqrt", "exp", "log", "tanh", "atan2", "pow", "fma")


def parameters(program: Program, sweep: Pass) -> tuple[int, ...]:
    """The scalars that the sweep's kernel is given, in order: a row of doubles."""
    used = [a for v in sweep.streams for a in program.op(v).args]
    return tuple(
        dict.fromkeys(
            a for a in used if not program.is_stream(a) and not _literal(program, a)
        )
    )


def inputs(program: Program, sweep: Pass) -> tuple[int, ...]:
    """The streams that the kernel reads, in order."""
    used = [a for v in sweep.streams for a in program.op(v).args]
    used += [*sweep.outputs, *(program.op(s).args[0] for s in sweep.sums)]
    return tuple(
        i for i in dict.fromkeys(used) if program.is_input(i) and program.inputs[i]
    )


def print_c(program: Program, sweep: Pass, stored: torch.dtype) -> str:
    """The source of one sweep: ``run`` over a table of pointers, inputs then outputs."""
    wide = program.dtype is torch.float64
    storage, load, store = _STORAGE[stored]
    functions = "\n".join(
        f"#define {name.upper()} {name if wide else _FLOATS.get(name, name + 'f')}"
        for name in _MATH
    )
    contracted = platform.machine() in ("x86_64", "AMD64", "aarch64", "arm64")
    if contracted and platform.machine() in ("x86_64", "AMD64"):
        contracted = torch.backends.cpu.get_cpu_capability() != "DEFAULT"
    prelude = _PRELUDE.format(
        computed="double" if wide else "float",
        stored=storage,
        sums=len(sweep.sums),
        functions=functions,
        lerp="FMA(factor, b - a, base)" if contracted else "factor * (b - a) + base",
    )
    rows = parameters(program, sweep)
    read = inputs(program, sweep)
    names = {v: f"v{v}" for v in (*rows, *read, *sweep.streams)}

    def name(value: int) -> str:
        return names.get(value) or f"(T){_number(program.op(value).literal)}"

    outputs = list(enumerate(sweep.outputs))
    sums = range(len(sweep.sums))
    lines = [
        f"#define SCALARS {len(rows)}",
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
        "    for (int64_t j = 0, all = streaming ? TILE : n; j < n; j += all) {",
        "        int64_t end = n - j < all ? n - j : all;",
        *(
            f"        S *const to{k} = streaming ? tile{k} : out{k} + j;"
            for k, _ in outputs
        ),
        "        #pragma omp simd"
        + (f" reduction(+:{','.join(f's{k}' for k in sums)})" if sums else ""),
        "        for (int64_t i = 0; i < end; i++) {",
        *(f"            const T v{v} = {load.format(f'in{v}[j + i]')};" for v in read),
    ]
    for v in sweep.streams:
        op = program.op(v)
        kind = "int" if op.boolean else "T"
        expression = _EXPRESSIONS[op.name].format(*(name(a) for a in op.args))
        lines.append(f"            const {kind} v{v} = {expression};")
    lines += [
        *(f"            to{k}[i] = {store.format(name(v))};" for k, v in outputs),
        *(
            f"            s{k} += {name(program.op(s).args[0])};"
            for k, s in enumerate(sweep.sums)
        ),
        "        }",
        "        if (!streaming) break;",
        *(f"        stream(out{k} + j, tile{k}, end);" for k, _ in outputs),
        "    }",
        *(f"    sums[{k}] = s{k};" for k in sums),
        "}",
    ]
    return prelude + "\n".join(lines) + "\n" + _DRIVER


def _literal(program: Program, value: int) -> bool:
    return not program.is_input(value) and program.op(value).name == "const"


def _number(literal: float) -> str:
    if math.isnan(literal):
        return "NAN"
    if math.isinf(literal):
        return "INFINITY" if literal > 0 else "-INFINITY"
    return literal.hex()
