"""Triton kernels: run by Triton's interpreter on the CPU, and compiled for an H100."""

import gc
import os
import subprocess
import sys
import weakref
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

os.environ["TRITON_INTERPRET"] = "1"  # is read where a kernel is defined
np = pytest.importorskip("numpy")
pytest.importorskip("triton", reason="Triton has no release for this system")

from row import Case  # noqa: E402
from table import ELEMENTWISE_ENDS, ELEMENTWISE_MIXES, NORMS, rule_of  # noqa: E402
from test_execution import OPERATIONS  # noqa: E402
from trees import relative  # noqa: E402

import funcopt as fo  # noqa: E402
from funcopt.bits import bits, of_bits  # noqa: E402
from funcopt.execution.executor import BuildError  # noqa: E402
from funcopt.execution.foreach import Foreach  # noqa: E402
from funcopt.execution.native import objects  # noqa: E402
from funcopt.execution.program import Program  # noqa: E402
from funcopt.execution.rule import Kinds, Rule  # noqa: E402
from funcopt.execution.trace import trace  # noqa: E402
from funcopt.execution.triton import arithmetic, kernels, tables  # noqa: E402
from funcopt.execution.triton.kernels import Triton  # noqa: E402

SHAPES = [(3, 5), (0,), (1,), (1030,), ()]
WHICH = [0, 1, 1, 0, 1]  # the row of scalars of each leaf
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The interpreter is rough with bfloat16, and before Triton 3.9 it rounds the product
    in tl.fma; numpy warns of what masks discard."""
    from triton import language as tl
    from triton.runtime import interpreter

    cast = interpreter.InterpreterBuilder.cast_impl

    def rounded(self: Any, value: Any, kind: Any) -> Any:
        bits, kinds = np.array(value.data), (value.dtype.scalar, kind.scalar)
        if kinds == (tl.float32, tl.bfloat16):
            half = torch.from_numpy(bits).to(torch.bfloat16).view(torch.int16)
            return interpreter.TensorHandle(half.numpy().view(np.uint16), tl.bfloat16)
        if kinds == (tl.bfloat16, tl.float32):
            half = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)
            return interpreter.TensorHandle(half.float().numpy(), tl.float32)
        return cast(self, value, kind)

    def fused(self: Any, x: Any, y: Any, z: Any) -> Any:
        product = torch.addcmul(*(torch.tensor(each.data) for each in (z, x, y)))
        return interpreter.TensorHandle(product.numpy(), z.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "cast_impl", rounded)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fma", fused)

    called = interpreter.InterpretedFunction.__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.fn.__name__ == "aligned":  # what the interpreter takes at its word
            assert not (args[0].handle.data % 16).any()
        own = self.fn.__module__ == arithmetic.__name__
        return self.rewrite()(*args) if own else called(self, *args, **kwargs)

    # The language is the interpreter's own since the kernel began. To look through all of
    # it again for each function that a kernel calls takes half of the time.
    monkeypatch.setattr(interpreter.InterpretedFunction, "__call__", call)
    with np.errstate(all="ignore"):
        yield


def rule_and_values(case: Case) -> tuple[Rule, dict[str, Any]]:
    """A case's rule, and the values of its hyperparameters."""
    optimizer = case.optimizer(**case.floats())
    rule = rule_of(optimizer)
    values = []
    for value in optimizer.hyper.values():
        values += value if isinstance(value, tuple) else [value]
    return rule, dict(zip(rule.hyper, values))


def computed(stored: torch.dtype) -> torch.dtype:
    return torch.float64 if stored is torch.float64 else torch.float32


def column(dtype: torch.dtype, positive: bool = False) -> list[Tensor]:
    leaves = [torch.randn(shape, dtype=torch.float64) for shape in SHAPES]
    return [(x.abs() + 0.1 if positive else x).to(dtype) for x in leaves]


def arguments(
    rule: Rule, values: dict[str, Any], kinds: Kinds, dtype: torch.dtype
) -> tuple[list[list[Tensor]], list[list[float]]]:
    """Columns of leaves, and two rows of scalars, for the inputs of a step."""
    given = [v for v, kind in zip(values.values(), kinds) if kind != "zero"]
    streams = [
        column(dtype, positive=i > 1) for i, s in enumerate(rule.inputs(kinds)) if s
    ]
    scalars = [0.7 for scalar in rule.scalar if scalar]
    return streams, [[*scalars, 3, *given], [*scalars, 10000, *(v * 0.9 for v in given)]]


class ExactRoots(TorchDispatchMode):
    """torch's own square root of a long CPU tensor (MKL's) is off by an ulp at times."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.sqrt.default:
            return torch.as_tensor(np.sqrt(args[0].detach().numpy()))
        return func(*args, **(kwargs or {}))


def defined(
    program: Program, streams: Sequence[Sequence[Tensor]], rows: Sequence[Sequence[float]]
) -> list[list[Tensor]]:
    """What torch makes of the program's function, leaf by leaf, a column per output."""
    made = []
    for i, row in enumerate(WHICH):
        leaf = (c[i].reshape(-1).to(program.dtype) for c in streams)
        numbers = (torch.tensor(x, dtype=torch.float64) for x in rows[row])
        inputs = [next(leaf if stream else numbers) for stream in program.inputs]
        with ExactRoots():
            outputs = program.function(*inputs)
        made.append(
            [
                x.detach().reshape(streams[0][i].shape) if program.is_stream(o) else x
                for x, o in zip(outputs, program.outputs)
            ]
        )
    return [list(c) for c in zip(*made)]


def run(
    program: Program, dtype: torch.dtype, streams: Any, rows: Any, **options: Any
) -> list[Any]:
    """The outputs by Triton, which must fill NaN-poisoned tensors and change no input."""
    written = {o for o in program.outputs if program.is_stream(o)}
    out = [[torch.full_like(x, float("nan")) for x in streams[0]] for _ in written]
    before = [[x.clone() for x in c] for c in streams]
    found = Triton(program, dtype)(streams, rows, WHICH, out=out, **options)
    for now, old in zip(streams, before):
        assert all(map(torch.equal, now, old))
    return found


def assert_as_defined(program: Program, streams: Any, rows: Any, units: int = 0) -> None:
    """Streams bit for bit, or within some units in the last place of the largest number;
    sums as foreach adds them, in float64."""
    found = run(program, program.dtype, streams, rows)
    added = Foreach(program, program.dtype)(streams, rows, WHICH)
    for value, column, expected, sums in zip(
        program.outputs, found, defined(program, streams, rows), added
    ):
        for x, y, total in zip(column, expected, sums, strict=True):
            if program.is_stream(value):
                assert relative(x, y) <= units * torch.finfo(y.dtype).eps
            else:
                tolerance = 1e-11 if program.dtype is torch.float64 else 1e-6
                total = torch.as_tensor(total, dtype=torch.float64)
                torch.testing.assert_close(x, total, rtol=tolerance, atol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("case", ELEMENTWISE_MIXES, ids=str)
def test_a_step_is_bit_equal_to_the_rule(case: Case):
    rule, values = rule_and_values(case)
    kinds = rule.kinds(values)
    program = rule.program(kinds, torch.float32)
    given = arguments(rule, values, kinds, torch.float32)
    assert_as_defined(program, *given, case.row.functions)


@pytest.mark.parametrize(
    "case, dtype",
    [
        # the interpreter takes a second for each
        pytest.param(
            case, dtype, id=f"{case}-{dtype}",
            marks=[] if k % 8 == 1 and dtype is torch.float32 else pytest.mark.slow,
        )
        for k, case in enumerate(ELEMENTWISE_ENDS)
        for dtype in (torch.float32, torch.float64)[: 1 + k % 2]  # both of the fullest
    ],
)  # fmt: skip
def test_a_step_and_its_derivatives(case: Case, dtype: torch.dtype):
    rule, values = rule_and_values(case)
    kinds = rule.kinds(values)
    streams, rows = arguments(rule, values, kinds, dtype)
    units = case.row.functions
    assert_as_defined(rule.program(kinds, dtype), streams, rows, units)
    cotangents = [column(dtype) for stream in rule.outputs if stream]
    scalars = [1.5 for stream in rule.outputs if not stream]
    vjp = rule.vjp(kinds, dtype, (True,) * len(rule.inputs(kinds)))
    rows_of_both = [[*row, *scalars] for row in rows]
    assert_as_defined(vjp, streams + cotangents, rows_of_both, units)
    jvp = rule.jvp(kinds, dtype, (True,) * len(rule.inputs(kinds)))
    tangents = [column(dtype) for _ in streams]
    rows_of_both = [[*row, *[0.1] * len(row)] for row in rows]
    assert_as_defined(jvp, streams + tangents, rows_of_both, units)


@pytest.mark.parametrize(
    "case, dtype",
    [
        pytest.param(
            case, dtype, id=f"{case}-{dtype}",
            marks=[] if case.row.name == "lamb" and k % 2 else pytest.mark.slow,
        )
        for k, case in enumerate(NORMS)
        for dtype in (torch.float32, torch.float64)
    ],
)  # fmt: skip
def test_a_rule_of_norms(case: Case, dtype: torch.dtype):
    """Up to the order in which squares are added, in float64."""
    rule, values = rule_and_values(case)
    kinds = rule.kinds(values)
    program = rule.program(kinds, dtype)
    assert len(program.passes) > 1
    assert_as_defined(program, *arguments(rule, values, kinds, dtype), units=2)


def squared(p: Tensor, g: Tensor, lr: Tensor, decay: Tensor) -> tuple[Tensor, ...]:
    """Two streams, a stream's sum, and a scalar."""
    step = torch.lerp(p, g * g, 0.3) * decay - lr / torch.sqrt(g * g + 1)
    return step, torch.maximum(p, g), (step * g).sum(), decay**lr


PROGRAM = trace(squared, [True, True, False, False], torch.float32)
ROWS = [[0.5, 0.9], [0.25, 0.8]]


def leaves(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Any]:
    return [[torch.randn(shape).to(dtype) for shape in shapes] for _ in range(2)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_halves_are_computed_in_float32_and_rounded_once(dtype: torch.dtype):
    streams = [column(dtype), column(dtype)]
    found = run(PROGRAM, dtype, streams, ROWS)
    for got, expected in zip(found[:2], defined(PROGRAM, streams, ROWS)):
        assert all(map(torch.equal, got, (x.to(dtype) for x in expected)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_leaves_at_any_storage_offset(dtype: torch.dtype):
    program = trace(
        squared,
        PROGRAM.inputs,
        torch.float64 if dtype is torch.float64 else torch.float32,
    )
    sizes = [2050, 2047]
    streams = leaves(*[(n,) for n in sizes], dtype=dtype)
    memory = [[torch.full((2080,), 7.0, dtype=dtype) for _ in sizes] for _ in range(2)]
    plain = Triton(program, dtype)(streams, ROWS, [0, 1])
    for shift in (0, 1, 3):
        moved = [[m[shift : n + shift].copy_(x) for m, x, n in zip(*c, sizes)]
                 for c in zip(memory, streams)]  # fmt: skip
        out = [[torch.full((2080,), 7.0, dtype=dtype) for _ in sizes] for _ in range(2)]
        begin = 5 if shift else 16
        parts = [[x[begin : begin + n] for x, n in zip(c, sizes)] for c in out]
        found = Triton(program, dtype)(moved, ROWS, [0, 1], out=parts)
        for a, b in zip(found, plain):
            assert all(map(torch.equal, a, b))
        around = [x for c in out for y, n in zip(c, sizes)
                  for x in (y[:begin], y[begin + n :])]  # fmt: skip
        assert all((x == 7).all() for x in around)


class Spied:
    """A kernel, and the options of its launches."""

    def __init__(self, kernel: Any, seen: list[dict[str, Any]]) -> None:
        self.kernel, self.seen = kernel, seen

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*given: Any, **options: Any) -> None:
            self.seen.append(options)
            self.kernel[grid](*given, **options)

        return launch


def test_one_launch_for_all_leaves_that_contracts_no_product():
    """And one for the sums."""
    executor, seen = Triton(PROGRAM, torch.float32), []
    executor._kernels = [
        [kernel and Spied(kernel, seen) for kernel in pair] for pair in executor._kernels
    ]
    executor(leaves((3, 5), (0,), (1030,)), ROWS, [0, 1, 0])
    assert [options["enable_fp_fusion"] for options in seen] == [False, False]


def test_donated_leaves_are_written_in_place():
    streams = leaves((3, 5), (1030,))
    expected = Triton(PROGRAM, torch.float32)(streams, ROWS, [0, 1])
    found = Triton(PROGRAM, torch.float32)(streams, ROWS, [0, 1], out=streams)
    assert all(x is y for a, b in zip(found[:2], streams) for x, y in zip(a, b))
    for a, b in zip(found, expected):
        assert all(map(torch.equal, a, b))


@pytest.mark.parametrize("in_place", [False, True])
def test_what_a_fast_path_calls_is_the_same_step(in_place: bool):
    rule = rule_of(fo.sgd(momentum=0.9))
    kinds = ("scalar",) * len(rule.hyper)
    executor = Triton(rule.program(kinds, torch.float32), torch.float32)
    direct = executor.direct(column(torch.float32), WHICH)
    for step in (1, 2):
        streams = [column(torch.float32) for _ in range(3)]
        rows = [[step, *(0.1 * (k + j) for j, _ in enumerate(kinds))] for k in (1, 2)]
        expected = executor(streams, rows, WHICH)
        tensors = [x for c in streams for x in c]
        out = (
            None
            if in_place
            else [[torch.full_like(x, 7) for x in c] for c in streams[1:]]
        )
        found = direct(tensors, objects.load().addresses(tensors), rows, out)
        assert found is not None
        for k, (a, b) in enumerate(zip(found, expected)):
            assert all(map(torch.equal, a, b))
            into = streams[k + 1] if out is None else out[k]
            assert all(x is y for x, y in zip(a, into))


def test_scalars_in_tensors_are_read_where_they_are():
    streams, executor = leaves((3, 5), (1030,)), Triton(PROGRAM, torch.float32)
    expected = executor(streams, ROWS, [0, 1])
    lr = torch.tensor(0.5, dtype=torch.float64)
    decay = torch.tensor(0.8)  # float32: its own value in float64
    found = executor(streams, [[lr, 0.9], [torch.tensor(0.25), decay]], [0, 1])
    assert all(map(torch.equal, found[0][:1], expected[0][:1]))
    again = executor(streams, [[0.5, 0.9], [0.25, float(decay)]], [0, 1])
    for a, b in zip(found, again):
        assert all(map(torch.equal, a, b))


def test_scalars_that_are_lazy_are_read_as_they_are_meant():
    """torch's zero without memory, as tangents are; and its negative that is not made."""
    streams, executor = leaves((3, 5)), Triton(PROGRAM, torch.float32)
    zero = torch._efficientzerotensor((), dtype=torch.float64)  # pyright: ignore
    negative = torch.tensor(1 - 0.8j, dtype=torch.complex128).conj().imag
    assert zero._is_zerotensor() and negative.is_neg() and negative == 0.8
    expected = executor(streams, [[0.0, 0.8]], [0])
    for a, b in zip(executor(streams, [[zero, negative]], [0]), expected):
        assert all(map(torch.equal, a, b))


class Stream:
    def __init__(self, number: int) -> None:
        self.cuda_stream = number


class Event:
    done = False

    def record(self, stream: Stream) -> None: ...

    def query(self) -> bool:
        return self.done


class Pinned:
    """Memory of the host that is copied to a device, which there is none of."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, part: slice) -> "Pinned":
        return Pinned(len(range(self.count)[part]))

    def copy_(self, words: Tensor) -> "Pinned":
        self.words = words
        return self

    def to(self, device: Any, non_blocking: bool) -> Tensor:
        return self.words.clone()


class Cuda:
    """What `Uploads` asks of torch.cuda, answered without a GPU."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.capturing, self.stream = False, Stream(1)
        self.recorded: list[tuple[Tensor, Stream]] = []
        monkeypatch.setattr(
            torch.cuda, "is_current_stream_capturing", lambda: self.capturing
        )
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.stream)
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(tables, "_pinned", self._pinned)
        monkeypatch.setattr(Event, "done", False)
        monkeypatch.setattr(
            Tensor, "record_stream", lambda x, stream: self.recorded.append((x, stream))
        )

    def _pinned(self, count: int) -> Pinned:
        assert not self.capturing, "no memory is pinned while a graph is captured"
        return Pinned(count)


GPU: Any = SimpleNamespace(type="cuda")
CONTENT = bytes(range(64))


def test_a_table_stays_on_the_stream_that_its_memory_is_given_out_on(
    monkeypatch: pytest.MonkeyPatch,
):
    cuda, uploads, beside = Cuda(monkeypatch), tables.Uploads(), (torch.ones(2),)
    first = uploads(CONTENT, GPU, beside)
    assert uploads(CONTENT, GPU, beside) is first
    Event.done = True
    assert uploads(CONTENT, GPU, beside) is first
    cuda.stream = Stream(2)
    assert uploads(CONTENT, GPU, beside) is not first
    assert [stream.cuda_stream for _, stream in cuda.recorded] == [1, 1, 1, 2]


def test_what_a_graph_reads_lives_as_long_as_it_may_be_replayed(
    monkeypatch: pytest.MonkeyPatch,
):
    cuda, uploads, beside = Cuda(monkeypatch), tables.Uploads(), torch.ones(2)
    uploads(CONTENT, GPU, (beside,))
    cuda.capturing, cuda.stream = True, Stream(2)
    made = [uploads(bytes([k]) * 64, GPU, (beside,)) for k in range(100)]
    held = [*map(weakref.ref, (beside, *made))]
    del beside, made
    cuda.capturing = False
    for k in range(10):
        uploads(bytes([k]) * 64, GPU, ())
    cuda.recorded.clear()
    gc.collect()
    assert all(x() is not None for x in held)


def test_truths_are_numbers_in_sums_and_products():
    def count(x: Tensor, least: Tensor) -> tuple[Tensor, ...]:
        large, small = x > least, x < -least
        return (large * x + small, (large | small).sum().to(torch.float64))

    program = trace(count, [True, False], torch.float32)
    x = torch.randn(1500)
    (values,), (number,) = Triton(program, torch.float32)([[x]], [[0.5]], [0])
    assert (
        torch.equal(values, (x > 0.5) * x + (x < -0.5)) and number == (abs(x) > 0.5).sum()
    )


@pytest.mark.parametrize("tasks", [1, 3])
@pytest.mark.parametrize("pooled", [False, True])
def test_a_task_is_computed_as_if_alone(tasks: int, pooled: bool):
    streams, executor = leaves((tasks, 5), (tasks, 0), (tasks, 1030)), Triton(
        PROGRAM, torch.float32
    )  # fmt: skip
    lr = torch.linspace(0.1, 0.5, tasks, dtype=torch.float64)
    decay = torch.linspace(0.5, 0.9, 2 * tasks, dtype=torch.float64)[::2]
    rows = [[lr, 0.9], [0.25, decay]]
    found = executor(streams, rows, [1, 0, 1], tasks=tasks, pooled=pooled)
    for t in range(tasks):
        own = [[float(lr[t]), 0.9], [0.25, float(decay[t])]]
        alone = executor(
            [[x[t] for x in c] for c in streams], own, [1, 0, 1], pooled=pooled
        )
        for a, b in zip(found, alone):
            assert all(torch.equal(x[t], y) for x, y in zip(a, b))
    assert len(found[2]) == (2 if pooled else 3)


@pytest.mark.parametrize("block", [1024, 16])
def test_sums_end_where_the_leaf_does(block: int, monkeypatch: pytest.MonkeyPatch):
    """Be their blocks more than are added at once, or less."""
    monkeypatch.setattr(tables, "BLOCK", block)
    monkeypatch.setattr(kernels, "BLOCK", block)
    program = trace(lambda x: (torch.exp(x).sum(),), [True], torch.float64)
    x = torch.randn(block + block // 2 + 256, dtype=torch.float64)
    (found,) = Triton(program, torch.float64)([[x]], [[]], [0])
    torch.testing.assert_close(found[0], x.exp().sum(), rtol=1e-14, atol=0)


def test_sums_are_float64():
    program = trace(lambda x: ((x * 1).sum(),), [True], torch.float32)
    x = torch.ones(1500)
    x[7] = 2.0**24
    (found,) = Triton(program, torch.float32)([[x]], [[]], [0])
    assert found[0] == 2**24 + 1499


def test_a_layout_is_of_its_sizes_rows_and_tasks():
    """Of one executor, that remembers some of them."""
    program = trace(lambda x, lr: (x * lr, x.sum()), [True, False], torch.float32)
    executor, x = Triton(program, torch.float32), leaves((4, 6), (4, 5))[:1]
    y = [[a.reshape(-1)[:k] for a, k in zip(c, (8, 20))] for c in x]
    one, two = [[0.5]], [[0.5], [0.25]]
    cases: list[tuple[Any, Any, list[int], dict[str, Any]]] = [
        (x, two, [0, 1], {}),
        (y, two, [0, 1], {}),
        (x, two, [1, 0], {}),
        (x, two, [0, 0], {"pooled": True}),
        (x, one, [0, 0], {"pooled": True}),
        (x, two, [1, 0], {"pooled": True}),
        (x, two, [0, 1], {"tasks": 2}),
        (x, two, [0, 1], {"tasks": 4}),
    ]
    for streams, rows, which, how in cases:
        found = executor(streams, rows, which, **how)
        expected = Triton(program, torch.float32)(streams, rows, which, **how)
        for a, b in zip(found, expected):
            assert all(map(torch.equal, a, b)) and len(a) == len(b)
    first = executor._layout(x[0], [0, 1], 2, 0, False)
    for n in range(40):
        made = executor._layout([torch.empty(n)], [0], 1, 0, False)
        assert executor._layout([torch.empty(n)], [0], 1, 0, False) is made
        assert executor._layout(x[0], [0, 1], 2, 0, False) is first
    assert len(executor._layouts) == kernels._LAYOUTS


def test_pooled_sums_are_those_of_their_leaves():
    streams, executor = (
        leaves((3, 5), (0,), (1030,), (7,)),
        Triton(PROGRAM, torch.float32),
    )
    which = [1, 0, 1, 0]
    apart = torch.stack(list(executor(streams, ROWS, which)[2]))
    pooled = executor(streams, ROWS, which, pooled=True)[2]
    torch.testing.assert_close(pooled[0], apart[1] + apart[3])
    torch.testing.assert_close(pooled[1], apart[0] + apart[2])


def test_long_leaves_are_walked(monkeypatch: pytest.MonkeyPatch):
    streams, which = leaves((5000,), (2048,), (1,)), [0, 1, 0]
    short = Triton(PROGRAM, torch.float32)(streams, ROWS, which)
    monkeypatch.setattr(tables, "_PROGRAMS", 2)
    plan = tables.block_layout([5000, 2048, 1], which, 2, 0, False)
    assert plan.blocks[:, 4:].tolist() == [[0, 3072], [3072, 5000], [0, 2048], [0, 1]]
    walked = Triton(PROGRAM, torch.float32)(streams, ROWS, which)
    for a, b in zip(short[:2], walked[:2]):
        assert all(map(torch.equal, a, b))
    torch.testing.assert_close(torch.stack(list(short[2])), torch.stack(list(walked[2])))


def test_sums_feed_later_sweeps():
    def turned(g: Tensor, p: Tensor, lr: Tensor) -> tuple[Tensor, ...]:
        length = torch.linalg.vector_norm(g)
        tilt = (g / length * p).sum()
        return 2 * g, g / length, p - lr * tilt * g / length, length, tilt

    program = trace(turned, [True, True, False], torch.float64)
    assert [len(sweep.sums) for sweep in program.passes] == [1, 1, 0]
    streams = leaves((3, 5), (2000,), dtype=torch.float64)
    found = Triton(program, torch.float64)(streams, [[0.5]], [0, 0])
    for g, p, *outputs in zip(*streams, *found):
        expected = turned(g, p, torch.tensor(0.5))
        torch.testing.assert_close(outputs, [*expected], rtol=1e-13, atol=1e-15)


def test_powers_are_those_of_python():
    """1 - β**t to the last bit but one, also after a million steps."""
    program = trace(
        lambda x, beta, t: (x + 1, beta**t), (True, False, False), torch.float64
    )
    rows = [[b, t] for b in (0.0, 0.5, 0.9, 0.999, 0.99999, 1.0)
            for t in (0, 1, 2, 3, 10, 1e3, 12345, 1e6)]  # fmt: skip
    found = Triton(program, torch.float64)([[torch.ones(1)] * len(rows)], rows,
                                           range(len(rows)))[1]  # fmt: skip
    for (beta, t), got in zip(rows, found):
        exact = beta**t
        assert abs(float(got) - exact) <= 1.2e-16 * max(exact, 1e-30)


def odd_pairs(dtype: torch.dtype) -> Tensor:
    """Each with each: of both signs, whole and not, subnormal, huge, infinite, NaN."""
    some = [0, 1, -1, 2, -3, 2.5, -0.5, 1e-30, 1e30, np.inf, -np.inf, np.nan]
    odd = torch.tensor([*some, torch.finfo(dtype).tiny / 8], dtype=dtype)
    return torch.cartesian_prod(odd, odd)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_operations_on_odd_numbers(dtype: torch.dtype):
    """All in one kernel."""

    def every(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        powers = [x**k for k in (0.5, 1.0, 2.0, -0.5, -1.0)]
        choices = [torch.where(x == y, x, torch.inf), torch.where(x < y, -torch.inf, y)]
        found = [operation(x, y) for operation in OPERATIONS.values()]
        return *found, *powers, *choices, of_bits(bits(x) + 1)

    program = trace(every, (True, True), dtype)
    x, y = odd_pairs(dtype).T.contiguous()
    found = Triton(program, dtype)([[x], [y]], [[]], [0])
    eps = torch.finfo(dtype).eps  # torch's root is as far from the right one
    for (got,), expected in zip(found, every(x, y), strict=True):
        torch.testing.assert_close(got, expected, rtol=eps, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ["exp", "log", "tanh", "sigmoid", "rsqrt", "reciprocal",
                                  "sign", "atan2", "pow"])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_other_operations(name: str, dtype: torch.dtype):
    function = getattr(torch, name)
    binary = name in ("atan2", "pow")
    program = trace(lambda x, y: (function(x, y) if binary else function(x),),
                    (True, True), dtype)  # fmt: skip
    x, y = torch.cat([odd_pairs(dtype), torch.randn(300, 2, dtype=dtype)]).T.contiguous()
    expected = function(x, y) if binary else function(x)
    (found,) = Triton(program, dtype)([[x], [y]], [[]], [0])
    torch.testing.assert_close(
        found[0], expected, rtol=8 * torch.finfo(dtype).eps, atol=0, equal_nan=True
    )


def test_powers_of_streams_and_scalars():
    program = trace(lambda x, t: (x**t, t**x), (True, False), torch.float32)
    x = torch.rand(1500) + 0.1
    found = Triton(program, torch.float32)([[x]], [[3.7]], [0])
    for (got,), expected in zip(found, (x.double() ** 3.7, 3.7 ** x.double())):
        torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=0)


def test_what_has_no_kernel_is_told(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(BuildError, match="no Triton kernels for torch.complex64"):
        Triton(PROGRAM, torch.complex64)
    kernels._vocabulary.cache_clear()
    with monkeypatch.context() as old, pytest.raises(BuildError, match="older than 3.2"):
        old.setattr("triton.__version__", "3.1.0")
        Triton(trace(lambda x: (x - 40,), [True], torch.float32), torch.float32)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(BuildError, match="pip install triton"):
        Triton(trace(lambda x: (x - 41,), [True], torch.float32), torch.float32)
    kernels._vocabulary.cache_clear()


def test_triton_is_imported_with_the_first_kernel_only():
    code = "import sys, funcopt; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
