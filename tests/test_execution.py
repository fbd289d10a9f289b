"""Every executor computes what the reference computes: every rule, dtype and layout."""

import itertools
import math
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from decimal import Decimal
from functools import partial
from typing import Any

import pytest
import torch
from exact_roots import ExactRoots
from row import Case
from table import (
    ELEMENTWISE,
    ELEMENTWISE_EACH,
    ELEMENTWISE_ENDS,
    ELEMENTWISE_MIXES,
    slots_of,
)
from test_purity import Snapshot, assert_no_sharing
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.func import grad, jvp, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from trees import assert_close, assert_moved, mixed, random_like, relative

import funcopt as fo
from funcopt import tree
from funcopt.execution import dispatch, scalars
from funcopt.execution.native import kernels as native
from funcopt.execution.native import objects
from funcopt.hyper import Hyper
from funcopt.optimizers.madgrad import cube_root
from funcopt.types import State, Tree

FAST = ["foreach", "native"]
QUICK = [torch.float32, torch.bfloat16]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
Result = tuple[Tree, State]


def assert_bits(found: Tree, expected: Tree) -> None:
    """Equal to the last bit and the sign of zero; a NaN is a NaN."""
    leaves, structure = tree.flatten(expected)
    others = tree.flatten_like(structure, found, "found")
    for path, a, b in zip(tree.paths(structure), others, leaves):
        if not isinstance(b, Tensor):
            assert a is b, path
            continue
        assert (a.shape, a.dtype) == (b.shape, b.dtype), path
        both_nan = (a != a) & (b != b)
        same = (a == b) & (torch.signbit(a) == torch.signbit(b)) | both_nan
        assert same.all(), f"'{path}' differs in {(~same).sum()} of {a.numel()}"


def assert_level(case: Case, found: Tree, expected: Tree) -> None:
    """Bit-equal, or nearly so where the rule has functions that are no arithmetic."""
    if not case.row.functions:
        return assert_bits(found, expected)
    leaves, structure = tree.flatten(expected)
    for a, b in zip(tree.flatten_like(structure, found, "found"), leaves):
        eps = torch.finfo(b.dtype).eps if b.is_floating_point() else 0.0
        assert relative(a, b) <= case.row.functions * eps


def ragged(dtype: torch.dtype = torch.float32, seed: int = 1) -> Tree:
    """More than a vector, less than one, one, none, and a 0-d leaf."""
    return mixed(dtype, seed) | {"long": random_like(torch.empty(70, dtype=dtype), seed)}


def steps(
    case: Case,
    name: str,
    params: Tree,
    *,
    like: Callable[[Tree, int], Tree] = random_like,
    state: State | None = None,
    **hyper: Any,
) -> Result:
    """Some steps by one executor; the reference of native with exact roots."""
    opt = case.optimizer()
    state = opt.init(params) if state is None else state
    for step in range(case.row.warm + 1):
        grads = like(params, 10 + step)
        params, state = opt.update(grads, state, params, execution=name, **hyper)
    return params, state


def expected_of(name: str, *args: Any, **kwargs: Any) -> Result:
    """What ``name`` has to give, bit by bit."""
    if name != "native":
        return steps(args[0], "reference", *args[1:], **kwargs)
    with ExactRoots():
        return steps(args[0], "reference", *args[1:], **kwargs)


def some_moved(after: Tree, before: Tree) -> None:
    """What is rounded to half may come back to where it was, but not all of a leaf."""
    pairs = zip(tree.leaves(after), tree.leaves(before))
    assert all(bool((a != b).any()) for a, b in pairs if a.numel() > 1)


def check(
    case: Case,
    name: str,
    params: Tree,
    moved: Callable[[Tree, Tree], None] = assert_moved,
    **kwargs: Any,
) -> None:
    expected = expected_of(name, case, params, **kwargs)
    found = steps(case, name, params, **kwargs)
    assert_level(case, found, expected)
    moved(expected[0], params)


def is_wide(dtype: torch.dtype) -> bool:
    return dtype in (torch.float32, torch.float64)


# --- every rule


#: every rule once, with flags
ONCE = ELEMENTWISE_ENDS[1::2]


#: A kernel of another dtype is the same lines with another type: so all in one, every mix
#: in the other wide one, and each value of each flag in halves.
OF_DTYPE = {torch.float32: ELEMENTWISE, torch.float64: ELEMENTWISE_MIXES}


def costly(dtypes: Sequence[torch.dtype]) -> list[Any]:
    """The ends in two dtypes now, the rest with the slow."""
    ends = {str(case) for case in ELEMENTWISE_ENDS}
    return [
        pytest.param(
            case,
            dtype,
            id=f"{case}-{dtype}".replace("torch.", ""),
            marks=[] if dtype in QUICK and str(case) in ends else pytest.mark.slow,
        )
        for dtype in dtypes
        for case in OF_DTYPE.get(dtype, ELEMENTWISE_EACH)
    ]


@pytest.mark.parametrize("case, dtype", costly(DTYPES))
@pytest.mark.parametrize("name", FAST)
def test_bit_equal_to_the_reference(name: str, case: Case, dtype: torch.dtype):
    check(case, name, ragged(dtype), assert_moved if is_wide(dtype) else some_moved)


def units_apart(found: Tensor, expected: Tensor, before: Tensor) -> float:
    size = torch.maximum(expected.abs(), before.abs()).double()
    unit = torch.finfo(found.dtype).eps * 2.0 ** size.log2().floor()
    return ((found.double() - expected.double()).abs() / unit).max().item()


@pytest.mark.parametrize("case, dtype", costly([torch.float32, torch.float64]))
def test_torchs_root_is_a_few_bits_away(case: Case, dtype: torch.dtype):
    opt, p = case.optimizer(), random_like(torch.empty(2000, dtype=dtype), seed=1)
    state = opt.init(p)
    for step in range(case.row.warm + 1):
        grads = random_like(p, 10 + step)
        found, _ = opt.update(grads, state, p, execution="native")
        before, (p, state) = p, opt.update(grads, state, p, execution="reference")
        if step or case.row.moves:
            some_moved(p, before)
        assert units_apart(found, p, before) <= case.row.roots


@pytest.mark.parametrize("case, dtype", costly([torch.float32, torch.float64]))
def test_powers_are_a_few_bits_away(case: Case, dtype: torch.dtype):
    betas = case.row.floats.get("betas", ())
    if not betas or "betas" in case.row.per_leaf:
        pytest.skip("no betas with elements")
    p, g = random_like([torch.empty(2000, dtype=dtype)] * 2, seed=1)
    firsts = (0.85, 0.9, 0.9)[: len(betas)]
    betas = [b + random_like(p, 3 + i).abs() / (15 + i) for i, b in enumerate(firsts)]
    opt = case.optimizer(betas=tuple(betas))
    state = opt.init(p)
    state["step"] = torch.tensor([8])
    with ExactRoots():
        expected, _ = opt.update(g, state, p, execution="reference")
    found, _ = opt.update(g, state, p, execution="native")
    assert_moved(found, p)
    assert units_apart(found, expected, p) <= case.row.powers


ODD = [0.0, -0.0, 1e-45, -1e-40, 1e-30, 1e-20, 1e20, -1e30, 3e38]
NOT_FINITE = [torch.inf, -torch.inf, torch.nan]


@pytest.mark.parametrize("dtype", QUICK, ids=str)
@pytest.mark.parametrize("case", ONCE, ids=str)
@pytest.mark.parametrize("name", FAST)
def test_odd_gradients(name: str, case: Case, dtype: torch.dtype):
    """Zeros, subnormal, huge, infinite: each with every finite parameter."""
    pairs = torch.cartesian_prod(
        torch.tensor(ODD + NOT_FINITE, dtype=torch.float64),
        torch.tensor(ODD, dtype=torch.float64),
    ).to(dtype)
    params, grads = pairs[:, 1].contiguous(), pairs[:, 0].contiguous()
    expected = expected_of(name, case, params, like=lambda p, s: grads * (1 + s % 2))
    found = steps(case, name, params, like=lambda p, s: grads * (1 + s % 2))
    if case.row.functions:
        found = without_rounding(found, expected, params, case.row.functions)
    assert_bits(found, expected)


def without_rounding(
    found: Result, expected: Result, before: Tensor, units: float
) -> Result:
    """With finite parameters as expected, each of which is within some units of it."""
    (p, state), q = found, expected[0]
    rounded = p.isfinite() & q.isfinite() & (p != q)
    if rounded.any():
        assert units_apart(p[rounded], q[rounded], before[rounded]) <= units
    return torch.where(rounded, q, p), state


OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "neg": lambda a, b: -a,
    "abs": lambda a, b: abs(a),
    "sqrt": lambda a, b: torch.sqrt(a),
    "reciprocal": lambda a, b: 1 / a,
    "sign": lambda a, b: torch.sign(a),
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "clamp": lambda a, b: a.clamp(-1.0, 1.0),
    "clamp from below by zero": lambda a, b: a.clamp(min=0.0),
    "clamp from above by zero": lambda a, b: a.clamp(max=0.0),
    "where": lambda a, b: torch.where(a > b, a, b + 1),
    "comparisons": lambda a, b: torch.where((a <= b) & (b != 1) | (a == 1), a, b + 1),
    "not": lambda a, b: torch.where(torch.logical_not(a >= b), a, b + 1),
    "a condition as a number": lambda a, b: (a < b).to(a.dtype) * b,
    "less such a number": lambda a, b: (1 - (a < b).to(a.dtype)) * b,
    "two of them": lambda a, b: ((a < b).to(a.dtype) + (b > 0).to(a.dtype)) * b,
    "two conditions added": lambda a, b: ((a < b) + (b > 0)) * b,
    "a condition copied": lambda a, b: (torch.zeros_like(a).copy_(a < b) + 1) * b,
    "lerp": lambda a, b: torch.lerp(a, b, 0.1),
    "lerp from the end": lambda a, b: torch.lerp(a, b, 0.9),
    "lerp past the start": lambda a, b: torch.lerp(a, b, -0.7),
    "addcmul": lambda a, b: torch.addcmul(a, a, b),
    "addcmul by a number": lambda a, b: torch.addcmul(a, b, b, value=0.1),
}


@pytest.mark.parametrize("dtype", QUICK, ids=str)
@pytest.mark.parametrize("what", OPERATIONS)
@pytest.mark.parametrize("name", FAST)
def test_operations_on_odd_numbers(name: str, what: str, dtype: torch.dtype):
    """Alone: within a rule another term may hide where a NaN came to nothing."""

    def rule(g: Tensor, p: Tensor, *, step: Any) -> Any:
        return (OPERATIONS[what](g, p),)

    opt = fo.elementwise(rule, name=what, slots={}, hyper={})
    odd = torch.tensor([*ODD, *NOT_FINITE, 1.0, -1.5], dtype=torch.float64)
    g, p = torch.cartesian_prod(odd, odd).to(dtype).unbind(1)
    with ExactRoots():
        expected, _ = opt.update(g, opt.init(p), p, execution="reference")
    found, _ = opt.update(g, opt.init(p), p, execution=name)
    if what in ("maximum", "minimum"):  # torch's own choice of ±0 varies
        expected, found = expected + 0.0, found + 0.0
    assert_bits(found, expected)
    assert expected.isfinite().any() and (expected.isnan().any() or what == "sign")


@pytest.mark.parametrize("name", scalars._NUMBERS)
def test_numbers_are_computed_as_tensors_are(name: str):
    """Where Python computes them at all: else tensors do."""
    text = scalars._NUMBERS[name]
    count = max(text.count("{}"), *(k for k in (1, 2, 3) if f"{{{k - 1}}}" in text), 1)
    letters = "a, b, c"[: 3 * count - 2]
    compute = scalars._compiled(letters, [f"return {text.format(*letters.split(', '))}"])
    computed = 0
    for values in itertools.product((0.0, 1.0, -1.0, 2.5, -0.3, math.nan), repeat=count):
        try:
            found = compute(*values)
        except (ArithmeticError, ValueError):
            continue
        tensors = [torch.tensor(x, dtype=torch.float64) for x in values]
        expected = scalars._TENSORS[name](*tensors).item()
        assert found == pytest.approx(expected, rel=1e-15, abs=1e-15, nan_ok=True), values
        computed += 1
    assert computed > 2


# --- layouts


def negative(x: Tensor) -> Tensor:
    """A view whose memory holds the number of the other sign, as ``z.conj().imag``."""
    return torch._neg_view(x)  # pyright: ignore[reportPrivateImportUsage]


def dense(*shape: int) -> Tensor:
    return random_like(torch.empty(shape), seed=1)


LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "channels_last": lambda: dense(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "channels_last_3d": lambda: dense(2, 3, 2, 2, 2).to(
        memory_format=torch.channels_last_3d
    ),
    "transposed": lambda: dense(4, 5).mT,
    "permuted": lambda: dense(4, 5, 3).permute(2, 0, 1),
    "every second": lambda: dense(4, 10)[:, ::2],
    "a column": lambda: dense(7, 3)[:, 1],
    "rows with gaps": lambda: dense(4, 10)[:, :7],
    "off by one": lambda: dense(40)[1:38],
    "off by three bytes of half": lambda: dense(40).bfloat16()[3:].float()[1:],
    "expanded": lambda: dense(5, 1).expand(5, 4),
    "expanded number": lambda: dense(1)[0].expand(6),
    "overlapping": lambda: dense(12).unfold(0, 4, 2),
    "negative view": lambda: negative(dense(4, 5)),
    "imaginary part": lambda: torch.complex(dense(4, 5), dense(4, 5)).conj().imag,
    "real part": lambda: torch.complex(dense(4, 5), dense(4, 5)).real,
    "one-sized axes": lambda: dense(4, 1, 5).as_strided((4, 1, 5), (5, 77, 1)),
    "empty with strides": lambda: dense(4, 0, 3).transpose(0, 2),
}
# One rule of each kind: no state, state, a number per leaf, comparisons.
FEW = [c for c in ELEMENTWISE_ENDS if c.row.name in ("sgd", "adamw", "nadam", "rprop")][
    ::2
]


def same_layout(p: Tensor, seed: int) -> Tensor:
    return torch.empty_like(p).copy_(random_like(p, seed))


def contiguous(p: Tensor, seed: int) -> Tensor:
    return random_like(p.contiguous(), seed)


def leafwise(like: Callable[[Tensor, int], Tensor], params: Tree, seed: int) -> Tree:
    return tree.map(lambda p: like(p, seed), params)


@pytest.mark.parametrize("case", FEW, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", FAST)
def test_parameters_in_any_layout(name: str, layout: str, case: Case):
    params = {"odd": LAYOUTS[layout](), "plain": dense(4, 5)}
    for like in (contiguous, same_layout):
        check(case, name, params, like=partial(leafwise, like))
    before = Snapshot(params)
    steps(case, name, params)
    before.assert_untouched()


@pytest.mark.parametrize("case", FEW, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", FAST)
def test_gradients_in_any_layout(name: str, layout: str, case: Case):
    made = LAYOUTS[layout]()
    params = {"odd": torch.empty(made.shape).copy_(made) + 2, "plain": dense(3)}

    def like(params: Tree, seed: int) -> Tree:
        scale = 1.0 if "view" in layout or "part" in layout else float(seed)
        grads = made if scale == 1.0 else LAYOUTS[layout]()
        return {"odd": grads, "plain": random_like(params["plain"], seed)}

    check(case, name, params, like=like)


ZEROS = """
import torch, funcopt as fo
opt, p = fo.adamw(lr=0.1, weight_decay=0.1), torch.ones(5)
zeros = torch._efficientzerotensor((5,))
for name in ("native", "foreach", None, None, None):
    found = opt.update(zeros, opt.init(p), p, execution=name)
    expected = opt.update(torch.zeros(5), opt.init(p), p, execution="reference")
    assert torch.equal(found[0], expected[0]), name
"""


def test_a_zero_without_memory():
    """What autograd makes for no derivative at all; read, it would end the process."""
    done = subprocess.run([sys.executable, "-c", ZEROS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("case", ELEMENTWISE_ENDS, ids=str)
@pytest.mark.parametrize("name", FAST)
def test_state_in_another_layout(name: str, case: Case):
    """As after loading it: contiguous state for a transposed parameter."""
    params = {"w": dense(4, 5).mT, "c": LAYOUTS["channels_last"]()}
    state = case.optimizer().init(params)
    for slot in slots_of(state):
        state[slot] = tree.map(Tensor.contiguous, state[slot])
    check(case, name, params, state=state)


@pytest.mark.parametrize("layout", ["channels_last", "channels_last_3d", "transposed"])
@pytest.mark.parametrize("name", FAST)
def test_a_dense_layout_is_kept(name: str, layout: str):
    params = LAYOUTS[layout]()
    new, state = steps(Case(ELEMENTWISE_ENDS[4].row, {}), name, params)
    assert new.stride() == params.stride()
    for slot in slots_of(state):
        assert state[slot].stride() == params.stride()


@pytest.mark.parametrize("offset", range(1, 8))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FAST)
def test_unaligned(name: str, dtype: torch.dtype, offset: int):
    """Every tensor begins somewhere else in memory."""

    def shifted(x: Tensor, by: int) -> Tensor:
        room = torch.zeros(x.numel() + by, dtype=x.dtype)
        return room[by:].copy_(x)

    adamw = next(c for c in ELEMENTWISE_ENDS if c.row.name == "adamw")
    params = shifted(random_like(torch.empty(99, dtype=dtype), 1), offset)
    state = adamw.optimizer().init(params)
    for k, slot in enumerate(slots_of(state)):
        state[slot] = shifted(state[slot], offset * (k + 2) % 16)
    like = lambda p, seed: shifted(random_like(p, seed), offset * 3 % 16)  # noqa: E731
    moved = assert_moved if is_wide(dtype) else some_moved
    check(adamw, name, params, moved, state=state, like=like)


# --- trees


@pytest.mark.costly
@pytest.mark.parametrize("case", ONCE, ids=str)
@pytest.mark.parametrize("name", FAST)
def test_dtypes_in_one_tree(name: str, case: Case):
    check(case, name, {str(dtype): ragged(dtype) for dtype in DTYPES}, moved=some_moved)


@pytest.mark.parametrize("case", ELEMENTWISE_ENDS, ids=str)
@pytest.mark.parametrize("name", FAST)
def test_nothing_at_all(name: str, case: Case):
    opt = case.optimizer()
    for params in ({}, {"a": None}, {"a": torch.empty(0, 3)}):
        result = opt.update(params, opt.init(params), params, execution=name)
        expected = opt.update(params, opt.init(params), params, execution="reference")
        assert_bits(result, expected)


@pytest.mark.parametrize("name", FAST)
def test_ten_thousand_leaves(name: str):
    adamw = next(c for c in ELEMENTWISE_ENDS if c.row.name == "adamw")
    params = {f"{i}": x for i, x in enumerate(dense(10_000, 3).unbind())}
    whole = random_like(torch.empty(10_000, 3), 2)
    grads = {f"{i}": x for i, x in enumerate(whole.unbind())}
    opt = adamw.optimizer()
    found, _ = opt.update(grads, opt.init(params), params, execution=name)
    stacked = torch.stack(list(params.values()))
    with ExactRoots():
        expected, _ = opt.update(whole, opt.init(stacked), stacked, execution="reference")
    if name == "native":
        assert torch.equal(torch.stack(list(found.values())), expected)
    else:  # its root is torch's
        assert torch.allclose(torch.stack(list(found.values())), expected, rtol=3e-7)


@pytest.mark.parametrize("case", ELEMENTWISE_ENDS, ids=str)
@pytest.mark.parametrize("name", FAST)
def test_leaves_that_rest(name: str, case: Case):
    """Leaves join in step after step: their counts differ."""

    def like(params: Tree, seed: int) -> Tree:
        leaves, structure = tree.flatten(random_like(params, seed))
        some = [g if seed >= 10 + i % 3 else None for i, g in enumerate(leaves)]
        return tree.unflatten(structure, some)

    params = ragged()
    expected = expected_of(name, case, params, like=like)
    found = steps(case, name, params, like=like)
    assert len(set(found[1]["step"].tolist())) > 1
    assert_level(case, found, expected)


@pytest.mark.parametrize("case", ELEMENTWISE_ENDS, ids=str)
@pytest.mark.parametrize("name", FAST)
def test_steps_that_differ(name: str, case: Case):
    params, state = steps(case, "reference", ragged())
    state["step"] = torch.arange(len(state["step"])) * 50_000 + 1
    check(case, name, params, state=state)


# --- hyperparameters


def each(leaves: Tree, *values: Any) -> Tree:
    """The values in turn, a leaf each."""
    found, structure = tree.flatten(leaves)
    return tree.unflatten(structure, [values[i % len(values)] for i in range(len(found))])


def number(value: float, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(value, dtype=dtype)


def shaped(p: Tensor) -> Tensor:
    return random_like(p, seed=5).abs() / 10


def row(p: Tensor) -> Tensor:
    return shaped(p[:1]) if p.ndim > 1 else shaped(p)


RATES: dict[str, Callable[[Tree], Any]] = {
    "float": lambda p: 0.03,
    "0-d": lambda p: number(0.03),
    "0-d float32": lambda p: number(0.03, torch.float32),
    "0-d that requires grad": lambda p: number(0.03).requires_grad_(),
    "per leaf": lambda p: each(p, 0.03, 0.1),
    "per leaf, 0-d": lambda p: each(p, number(0.03), number(0.1)),
    "some 0-d": lambda p: each(p, 0.03, number(0.1)),
    "leaf-shaped": lambda p: tree.map(shaped, p),
    "broadcast": lambda p: tree.map(row, p),
    "of every kind": lambda p: {
        "layers": [0.03, number(0.1)],
        "empty": 0.5,
        "long": shaped(p["long"]),
    },
    "schedule": lambda p: fo.Schedule(lambda t: 0.1 / (1 + t)),
    "one 0-d tensor for all": lambda p: each(p, number(0.03)),
}


REST = "of every kind"


@pytest.mark.costly
@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("case", ONCE, ids=str)
@pytest.mark.parametrize("name", FAST)
def test_rates_of_every_kind(name: str, case: Case, rate: str):
    params, lr = ragged(), RATES[rate](ragged())
    with torch.no_grad():
        if "lr" in case.row.per_leaf and rate in ("leaf-shaped", "broadcast", REST):
            for each_name in (name, "reference"):
                with pytest.raises(fo.HyperparameterError, match="one number per leaf"):
                    steps(case, each_name, params, lr=lr)
        else:
            check(case, name, params, lr=lr)


@pytest.mark.costly
@pytest.mark.parametrize("kind", ["per leaf", "0-d", "leaf-shaped"])
@pytest.mark.parametrize("case", ONCE, ids=str)
@pytest.mark.parametrize("name", FAST)
def test_every_hyperparameter_of_every_kind(name: str, case: Case, kind: str):
    params = ragged()

    def spread(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(spread, value))
        if kind == "0-d":
            return number(value)
        if kind == "per leaf":
            return each(params, value, value * 0.9)
        factors = tree.map(lambda p: random_like(p, 3).abs() / 10 + 0.85, params)
        return tree.map(lambda x: (x * value).clamp(max=max(value, 0.99)), factors)

    refused = case.row.per_leaf if kind == "leaf-shaped" else ()
    values = {k: spread(v) for k, v in case.floats().items() if k not in refused}
    if kind == "leaf-shaped" and name == "native":  # a power is one bit from torch's
        found = steps(case, name, params, **values)
        expected = expected_of(name, case, params, **values)
        assert_close(found, expected, 4 * torch.finfo(torch.float32).eps)
    else:
        check(case, name, params, **values)


@pytest.mark.parametrize("name", FAST)
def test_a_zero_among_others_leaves_the_term_out_there_alone(name: str):
    """Where the decay is the number 0, an infinite parameter makes no NaN."""
    case = next(
        c for c in ELEMENTWISE if c.row.name == "adamw" and c.flags["weight_decay"]
    )
    params = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([1.0, 3.0])}
    check(case, name, params, weight_decay={"a": 0.0, "b": 0.1})
    check(case, name, params, weight_decay={"a": number(0.0), "b": 0.0})


# --- purity and donation


@pytest.mark.costly
@pytest.mark.parametrize("dtype", QUICK, ids=str)
@pytest.mark.parametrize("case", ONCE, ids=str)
@pytest.mark.parametrize("name", FAST)
def test_inputs_are_untouched_and_outputs_new(name: str, case: Case, dtype: torch.dtype):
    opt, params = case.optimizer(), ragged(dtype)
    grads, state = random_like(params, 2), opt.init(params)
    given = Snapshot(grads, state, params)
    for lr in (0.1, 0.0):
        result = opt.update(grads, state, params, execution=name, lr=lr)
        given.assert_untouched()
        assert_no_sharing(*result, grads, state, params)


EVERY = [*FAST, "reference", None]


def tensors_of(*trees: Any) -> list[Tensor]:
    return [x for x in tree.leaves(trees) if isinstance(x, Tensor)]


@pytest.mark.parametrize("case", ONCE, ids=str)
@pytest.mark.parametrize("name", EVERY)
def test_donation_writes_the_same_numbers(name: str | None, case: Case):
    opt, params = case.optimizer(), ragged()
    state = opt.init(params)
    mine = tree.map(torch.clone, params)
    own = tree.map(torch.clone, state)
    objects = tensors_of(mine, own)
    for step in range(case.row.warm + 1):
        grads = random_like(params, 10 + step)
        params, state = opt.update(grads, state, params, execution=name)
        versions, seen = [x._version for x in objects], Snapshot(grads)
        result = opt.update(grads, own, mine, execution=name, donate=True)
        seen.assert_untouched()
        assert result[0] is mine or tensors_of(result[0]) == tensors_of(mine)
        assert all(a is b for a, b in zip(tensors_of(*result), objects))
        assert_bits((mine, own), (params, state))
        assert all(x._version > v for x, v in zip(objects, versions) if x.numel())


@pytest.mark.parametrize(
    "layout", ["transposed", "every second", "rows with gaps", "negative view"]
)
@pytest.mark.parametrize("name", EVERY)
def test_donation_in_any_layout(name: str | None, layout: str):
    case = next(c for c in ELEMENTWISE_ENDS if c.row.name == "adamw")
    opt, params = case.optimizer(), LAYOUTS[layout]()
    state, grads = opt.init(params), contiguous(params, 3)
    expected = opt.update(grads, state, params, execution=name)
    result = opt.update(grads, state, params, execution=name, donate=True)
    assert result[0] is params
    assert_bits(result, expected)


def test_autograd_sees_a_donation():
    opt, w = fo.adamw(lr=0.1), torch.ones(3, requires_grad=True)
    state, grads = opt.init(w), torch.ones(3)
    loss = (w * w).sum()
    with torch.no_grad():
        for _ in range(2):  # a step like the last one, too
            opt.update(grads, state, w, donate=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def tied(p: Tensor) -> Any:
    return {"a": p, "b": p}, {"a": torch.ones(4), "b": torch.ones(4)}


class Wrapped(Tensor):
    """Another tensor's values, and no memory, as a DTensor has none: no address."""

    @staticmethod
    def __new__(cls, of: Tensor) -> "Wrapped":
        return Tensor._make_wrapper_subclass(cls, of.shape, dtype=of.dtype)

    def __init__(self, of: Tensor) -> None:
        self.of = of

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["of"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], *rest: Any) -> "Wrapped":
        return Wrapped(inner["of"])

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        given = tree.map(cls.unwrapped, (args, kwargs or {}))
        out = func(*given[0], **given[1])
        return args[0] if out is given[0][0] else tree.map(cls.wrapped, out)

    @classmethod
    def wrapped(cls, x: Any) -> Any:
        return cls(x) if isinstance(x, Tensor) else x

    @classmethod
    def unwrapped(cls, x: Any) -> Any:
        return x.of if isinstance(x, cls) else x


REFUSED_DONATIONS: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "tied leaves": (tied, "must not share memory"),
    "overlapping parts": (
        lambda p: ({"a": p[:3], "b": p[2:]}, {"a": torch.ones(3), "b": torch.ones(2)}),
        "must not share memory",
    ),
    "the gradient itself": (lambda p: (p, p), "must not share memory"),
    "expanded": (lambda p: (p[:1].expand(4), torch.ones(4)), "stand for several"),
    "overlapping itself": (
        lambda p: (p.as_strided((3, 2), (1, 1)), torch.ones(3, 2)),
        "stand for several",
    ),
    "requires grad": (
        lambda p: (p.requires_grad_(), torch.ones(4)),
        "what a derivative still needs",
    ),
    "gradient requires grad": (
        lambda p: (p, torch.ones(4, requires_grad=True)),
        "what a derivative still needs",
    ),
}


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("what", REFUSED_DONATIONS)
def test_refused_donations_change_nothing(what: str, name: str | None):
    opt = fo.adamw(lr=0.1)
    make, sentence = REFUSED_DONATIONS[what]
    params, grads = make(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    state = opt.init(params)
    opt.update(torch.ones(4), opt.init(torch.ones(4)), torch.ones(4), donate=True)
    given = Snapshot(params, grads, state)
    with pytest.raises(fo.ExecutionError, match=sentence):
        opt.update(grads, state, params, donate=True, execution=name)
    given.assert_untouched()


def test_what_has_no_memory_of_its_own_is_donated():
    """A wrapper lies in that of what it wraps, a fake tensor in none."""
    opt, (p, g) = fo.adamw(lr=0.1), random_like([torch.empty(4), torch.empty(4)], 1)
    expected = opt.update(g, opt.init(p), p)[0]
    wrapped = Wrapped(p.clone())
    new, state = opt.update(Wrapped(g), opt.init(wrapped), wrapped, donate=True)
    assert new is wrapped and torch.equal(wrapped.of, expected)
    assert state["exp_avg"].of.any()
    tied = [Wrapped(p[:3]), Wrapped(p[1:])]
    grads = [Wrapped(torch.ones(3)), Wrapped(torch.ones(3))]
    with pytest.raises(fo.ExecutionError, match="must not share memory"):
        opt.update(grads, opt.init(tied), tied, donate=True)
    with FakeTensorMode():
        fake = torch.ones(4)
        assert opt.update(torch.ones(4), opt.init(fake), fake, donate=True)[0] is fake


@pytest.mark.parametrize("opt", [fo.adamw(), fo.nadam()], ids=lambda o: o.name)
def test_a_donated_step_is_made_whatever_another_thread_opens(
    opt: fo.Optimizer, monkeypatch: pytest.MonkeyPatch
):
    """A level of forward mode is of all threads: here it is gone after the first look."""
    original, (p, g) = dispatch.executor_choice.groups, random_like([dense(4)] * 2, 1)
    expected = opt.update(g, opt.init(p), p, execution="reference")

    def groups(*given: Any) -> Any:
        with torch.autograd.forward_ad.dual_level():
            return original(*given)

    monkeypatch.setattr(dispatch.executor_choice, "groups", groups)
    found = opt.update(g, opt.init(p), p, donate=True)
    assert found[0] is p
    assert_close(found, expected, 1e-6)


def two_kinds(p: Tensor) -> dict[str, Tensor]:
    return {"a": p, "b": torch.ones(3)}


def clipped() -> Any:
    return fo.chain(fo.clip_by_global_norm(1.0), fo.adamw())


def parted() -> Any:
    return fo.partition({"x": fo.sgd(), "y": fo.adamw()}, {"a": "x", "b": "y"})


DONATED_BY: dict[str, Callable[[], fo.Optimizer]] = {
    "sgd": fo.sgd,
    "adamw": fo.adamw,
    "nadam": fo.nadam,
    "adafactor": fo.adafactor,
    "dog": fo.dog,
    "lbfgs": fo.lbfgs,
    "sam": lambda: fo.sam(fo.sgd()),
    "clipped": clipped,
    "parted": parted,
    "lookahead": lambda: fo.chain(fo.adamw(), fo.lookahead(2)),
}


@pytest.mark.parametrize("where", [0, 1, 2], ids=["parameters", "state", "steps"])
@pytest.mark.parametrize("name", DONATED_BY)
def test_what_torch_would_not_write_is_refused_before_anything_is(name: str, where: int):
    """Tensors of inference mode, and an expanded step; after steps that were alike."""
    opt, grads = DONATED_BY[name](), {"a": torch.rand(2, 3), "b": torch.rand(3)}
    more: Any = {"loss_fn": lambda p: (p["a"] * p["b"]).square().sum()}
    more = more if name in ("lbfgs", "sam") else {}

    def made(inference: Sequence[bool]) -> list[Any]:
        both = [{"a": torch.ones(2, 3), "b": torch.ones(3)}]
        both.append(opt.init(*both))
        for i, each in enumerate(inference):
            with torch.inference_mode(each):
                both[i] = tree.map(torch.clone, both[i])
        return both

    refused = [[True, False], [False, True], [False, False]][where]
    for inside in (False, True):
        with torch.inference_mode(inside):
            opt.update(grads, *made(refused)[::-1], **more)
            opt.update(grads, *made([inside, inside])[::-1], donate=True, **more)
            opt.update(grads, *made([False, False])[::-1], donate=True, **more)
    given = made(refused)
    if where == 2:
        given[1] = tree.map(
            lambda x: x[:1].expand(2) if x.dtype is torch.int64 and x.ndim else x,
            given[1],
        )
    before = tree.map(torch.clone, given)
    with pytest.raises(fo.ExecutionError, match=r"clone\(\)"):
        opt.update(grads, *given[::-1], donate=True, **more)
    assert_bits(given, before)


#: params of which the rate is a part, and that rate
RATES_DONATED: dict[str, Callable[[], tuple[dict[str, Tensor], Any]]] = {
    "a number of leaves of two dtypes": lambda: (
        params := two_kinds(torch.tensor(0.1, dtype=torch.float64)),
        params["a"],
    ),
    "another leaf": lambda: (
        params := two_kinds(torch.rand(3)),
        {"a": 0.1, "b": params["a"]},
    ),
    "the elements before": lambda: (
        two_kinds((base := torch.rand(5000))[1:]),
        {"a": base[:-1], "b": 0.1},
    ),
}


@pytest.mark.parametrize(
    "make", [fo.sgd, fo.adamw, clipped, parted], ids=["sgd", "adamw", "clipped", "parted"]
)
@pytest.mark.parametrize("what", RATES_DONATED)
def test_a_rate_in_donated_memory(make: Any, what: str):
    """Is refused, also after steps that were like it in all but that."""
    params, lr = RATES_DONATED[what]()
    grads, opt = leafwise(random_like, params, 2), make()
    state = opt.init(params)
    for _ in range(3):
        mine, own = tree.map(torch.clone, (params, state))
        opt.update(grads, own, mine, lr=lr, donate=True)
    given = Snapshot(params, grads, state)
    with pytest.raises(fo.ExecutionError, match="hyperparameter is in memory"):
        opt.update(grads, state, params, lr=lr, donate=True)
    given.assert_untouched()


@pytest.mark.parametrize("transform", [grad, vmap], ids=["grad", "vmap"])
def test_no_donation_within_a_transform(transform: Any):
    opt, p = fo.adamw(lr=0.1), torch.ones(3, 2)

    def function(p: Tensor) -> Tensor:
        return opt.update(torch.ones_like(p), opt.init(p), p, donate=True)[0].sum()

    with pytest.raises(fo.ExecutionError, match="what a derivative still needs"):
        transform(function)(p)


# --- which one runs


def trimmed(g: Tensor, p: Tensor, *, step: Any, lr: Any) -> Any:
    return (p - lr * torch.erf(g),)


NO_KERNEL = fo.elementwise(trimmed, name="trimmed", slots={}, hyper={"lr": Hyper(0.5)})


@pytest.mark.parametrize("name", FAST)
def test_what_is_forced_and_cannot_run_says_why(name: str):
    p = torch.ones(2)
    with pytest.raises(fo.ExecutionError, match=f"'{name}' .* trimmed: aten.erf is not"):
        NO_KERNEL.update(p, NO_KERNEL.init(p), p, execution=name)
    with (
        fo.execution(name),
        pytest.raises(fo.ExecutionError, match=f"'{name}' cannot run trimmed"),
    ):
        NO_KERNEL.update(p, NO_KERNEL.init(p), p)
    expected = p - 0.5 * torch.erf(p)
    assert torch.equal(NO_KERNEL.update(p, NO_KERNEL.init(p), p)[0], expected)
    plan = str(fo.plan(NO_KERNEL, p))
    assert "reference" in plan and f"not {name}: aten.erf is not" in plan


def test_there_is_no_such_execution():
    opt, p = fo.sgd(), torch.ones(2)
    for use in (
        lambda: opt.update(p, opt.init(p), p, execution="cuda"),
        lambda: fo.execution("cuda").__enter__(),
        lambda: torch.compile(opt.update, backend="eager")(
            p, opt.init(p), p, execution="cuda"
        ),
    ):
        with pytest.raises(fo.ExecutionError, match="native, .*foreach, .*reference"):
            use()


def test_a_plan_of_no_rule():
    params = {"w": torch.ones(3)}
    own = fo.Optimizer(dict, lambda g, s, p: (p, s), "own")
    for opt in (own, fo.freeze(fo.sgd(), True)):
        assert str(fo.plan(opt, params)).startswith(f"{opt.name}: no rule was run")
    assert "no rule was run" in str(
        fo.plan(fo.lbfgs(), params, loss_fn=lambda p: p["w"].sum())
    )


def executed(*args: Any, **kwargs: Any) -> str:
    return fo.plan(*args, **kwargs).groups[0].choice.name


def test_the_argument_beats_the_context_and_contexts_nest():
    opt, p = fo.adamw(), torch.ones(2)
    assert executed(opt, p) == "native"
    with fo.execution("foreach"):
        assert executed(opt, p) == "foreach"
        assert executed(opt, p, execution="reference") == "reference"
        with fo.execution("reference"):
            assert executed(opt, p) == "reference"
        assert executed(opt, p) == "foreach"
        elsewhere: list[str] = []
        thread = threading.Thread(target=lambda: elsewhere.append(executed(opt, p)))
        thread.start()
        thread.join()
        assert elsewhere == ["native"]
    with pytest.raises(ZeroDivisionError), fo.execution("reference"):
        raise ZeroDivisionError
    assert executed(opt, p) == "native"


class Kernels:
    """Python's objects as they are read in C or in Python; kernels count, or idle."""

    def __init__(self) -> None:
        self.objects, self.idle = objects.load(), False
        self.threads: list[int] = []  #: that each call of a kernel may use

    def __getattr__(self, name: str) -> Any:
        return getattr(self.objects, name)

    def run(self, *given: Any) -> int:
        self.threads.append(given[9])
        return 0 if self.idle else self.objects.run(*given)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Kernels:
    found = Kernels()
    monkeypatch.setattr(objects, "load", lambda: found)
    return found


@pytest.mark.parametrize("way", ["first", "like the last", "derivative", "in a batch"])
def test_what_no_kernel_writes_is_poisoned(way: str, kernels: Kernels):
    """Or no test would see what a kernel leaves out."""
    opt, (p, g) = fo.adamw(), random_like([torch.empty(2, 5)] * 2, 1)
    state = opt.init(p)

    def step() -> Tensor:
        if way == "in a batch":
            return vmap(lambda p, g: opt.update(g, opt.init(p), p)[0])(p, g)
        if way == "like the last":
            return opt.update(g, state, p)[0]
        with fo.execution("native"):
            if way == "first":
                return opt.update(g, state, p)[0]
            return grad(lambda p: opt.update(g, state, p)[0].square().sum())(p)

    for _ in range(3):  # and what is written into again has numbers in it
        assert step().isfinite().all()
    kernels.idle = True
    assert step().isnan().all()


def unrolled(opt: fo.Optimizer, p: Tree) -> Tensor:
    state, first = opt.init(p), p
    for _ in range(3):
        p, state = opt.update(first, state, p)
    return torch.stack([x.square().sum() for x in tree.leaves(p)]).sum()


def followed(p: Tree) -> Tree:
    return tree.map(lambda x: x.clone().requires_grad_(), p)


OWN = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
#: what is done with an optimizer and three tasks, and how often a kernel is called
LAUNCHES: dict[str, tuple[Callable[[fo.Optimizer, Tree], Any], int]] = {
    "pure": (lambda opt, p: opt.update(p, opt.init(p), p), 1),
    "in place": (
        lambda opt, p: opt.update(p, opt.init(p), tree.map(torch.clone, p), donate=True),
        1,
    ),
    "vmap": (lambda opt, p: vmap(lambda p: opt.update(p, opt.init(p), p))(p), 1),
    "vmap, rates of their own": (
        lambda opt, p: vmap(lambda p, lr: opt.update(p, opt.init(p), p, lr=lr))(p, OWN),
        1,
    ),
    "vmap of vmap": (
        lambda opt, p: vmap(
            vmap(lambda p, lr: opt.update(p, opt.init(p), p, lr=lr), (0, None)),
            (None, 0),
        )(p, OWN),
        1,
    ),
    "stacked, rates of their own": (
        lambda opt, p: opt.update(
            p,
            opt.init(p),
            p,
            lr=tree.map(lambda x: OWN.float().view(3, *[1] * (x.ndim - 1)), p),
        ),
        1,
    ),
    "three steps and backward": (
        lambda opt, p: torch.autograd.grad(
            unrolled(opt, q := followed(p)), tree.leaves(q)
        ),
        3 + 3,
    ),
    "grad of three steps": (lambda opt, p: grad(lambda p: unrolled(opt, p))(p), 3 + 3),
    "vmap of grad": (lambda opt, p: vmap(grad(lambda p: unrolled(opt, p)))(p), 3 + 3),
    "jvp": (lambda opt, p: jvp(lambda p: unrolled(opt, p), (p,), (p,)), 3 + 3),
    "clipped": (
        lambda opt, p: (clip := fo.chain(fo.clip_by_global_norm(1.0), opt)).update(
            p, clip.init(p), p
        ),
        1 + 1,
    ),
}


@pytest.mark.parametrize("what", LAUNCHES)
def test_how_often_a_kernel_is_called(what: str, kernels: Kernels):
    """Once for a step of all leaves, and tasks; once for the derivative of a step."""
    run, count = LAUNCHES[what]
    params = random_like({"w": torch.empty(3, 2, 4), "b": torch.empty(3, 5)}, 1)
    # of so short a rule torch.func makes the derivative as fast itself
    with fo.execution("native") if "grad" in what else nullcontext():
        run(fo.adamw(lr=0.1), params)  # new kernels are tried
        opt = fo.adamw(lr=0.1)
        for _ in range(3):
            kernels.threads.clear()
            run(opt, params)
            assert len(kernels.threads) == count


@pytest.mark.parametrize("threads", [1, 2])
def test_a_kernel_may_use_torchs_threads(threads: int, kernels: Kernels):
    """All of them where there is enough to do."""
    opt, before = fo.adamw(), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for p, expected in ((dense(70_000), threads), (dense(70), 1)):
            for _ in range(2):
                opt.update(p, opt.init(p), p)
                assert kernels.threads.pop() == expected
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("past_cache", [False, True])
@pytest.mark.parametrize("threads", [1, 2])
def test_threads_do_not_change_a_bit(
    threads: int, past_cache: bool, monkeypatch: pytest.MonkeyPatch
):
    case = next(c for c in ELEMENTWISE_ENDS if c.row.name == "adamw")
    if past_cache:
        monkeypatch.setattr(native, "_PAST_CACHE", 0)
    params = {"big": dense(70_001), "small": dense(5), "also": dense(33, 1000)}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check(case, "native", params)
    finally:
        torch.set_num_threads(before)


# --- a step like the last one is not looked at again; one unlike it is


class Watching(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@contextmanager
def used(opt: fo.Optimizer, params: Tree) -> Iterator[Callable[..., Result]]:
    """An optimizer that has made equal steps: what it decided is remembered."""
    state = opt.init(params)
    for _ in range(3):
        params, state = opt.update(random_like(params, 4), state, params)
    yield lambda grads=None, **kwargs: opt.update(
        random_like(params, 5) if grads is None else grads,
        kwargs.pop("state", state),
        kwargs.pop("params", params),
        **kwargs,
    )


def test_a_mode_sees_the_operations_of_a_later_step():
    with used(fo.adamw(lr=0.1), dense(5)) as update:
        with Watching() as mode:
            update()
        assert any("sqrt" in name for name in mode.seen)


CHANGES: dict[str, Callable[[], dict[str, Any]]] = {
    "another shape": lambda: {"params": dense(4), "grads": dense(4) + 3},
    "another layout": lambda: {"grads": dense(10)[::2] + 3, "params": dense(10)[::2]},
    "only the gradient's": lambda: {"grads": dense(10)[::2]},
    "a negative view": lambda: {"grads": negative(dense(5))},
    "another rate": lambda: {"lr": 0.7},
    "a 0-d rate": lambda: {"lr": number(0.7)},
    "a leaf-shaped rate": lambda: {"lr": shaped(dense(5))},
    "no decay": lambda: {"weight_decay": 0.0},
    "another dtype": lambda: {"params": dense(5).double(), "grads": dense(5).double()},
    "expanded": lambda: {"grads": dense(1).expand(5)},
    "a Parameter": lambda: {"params": torch.nn.Parameter(dense(5), requires_grad=False)},
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_changes_after_equal_steps(what: str):
    change = CHANGES[what]()
    with used(fo.adamw(lr=0.1, weight_decay=0.1), dense(5)) as update:
        if "params" in change:
            change["state"] = fo.adamw().init(change["params"])
        found = update(**change)
        with ExactRoots():
            expected = update(**change, execution="reference")
        assert_bits(found, expected)


@pytest.mark.parametrize("opt", [fo.adamw(), fo.lamb()], ids=lambda o: o.name)
@pytest.mark.parametrize("number", [shaped, lambda p: torch.tensor(0.3)])
def test_a_rate_that_is_a_subclass_is_one_for_torch(
    opt: fo.Optimizer, number: Callable[[Tensor], Tensor]
):
    """A kernel would read at the address that it has not, and end the process."""
    p = dense(4, 3)
    with used(opt, p) as update:
        update(lr=number(p))  # and so its way is known
        expected = update(lr=number(p), execution="reference")
        found = update(lr=Wrapped(number(p)))
        assert_bits(tree.map(Wrapped.unwrapped, found), expected)


def test_derivatives_after_equal_steps():
    """Of parameters, gradients, slots, numbers per leaf, hyperparameters."""
    opt, p = fo.nadam(lr=0.1), dense(5)
    state = opt.init(p)
    for _ in range(3):
        p, state = opt.update(dense(5), state, p)
    with torch.enable_grad():
        for what in ("grads", "params", "exp_avg", "mu_product", "lr"):
            grads, hyper = dense(5), {"lr": number(0.1)}
            params, now = p.clone(), {k: v.clone() for k, v in state.items()}
            found = {"grads": grads, "params": params, "lr": hyper["lr"], **now}[what]
            found.requires_grad_()
            hyper = hyper if what == "lr" else {}
            new, after = opt.update(grads, now, params, **hyper)
            assert new.requires_grad, what
            assert (torch.autograd.grad(new.sum(), found)[0] != 0).any(), what
    with torch.no_grad():
        assert not opt.update(dense(5), state, p.clone().requires_grad_())[
            0
        ].requires_grad
    new, _ = opt.update(dense(5), state, p.clone().requires_grad_())
    assert new.requires_grad


def test_transforms_after_equal_steps():
    opt, p = fo.adamw(lr=0.1), dense(5)
    with used(opt, p) as update:
        rows = dense(3, 5)
        found = vmap(lambda g: update(g)[0])(rows)
        expected = torch.stack([update(g)[0] for g in rows])
        assert torch.equal(found, expected)
        slope = grad(lambda g: update(g)[0].sum())(rows[0])
        assert slope.any()
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(rows[0], torch.ones(5))
            tangent = torch.autograd.forward_ad.unpack_dual(update(dual)[0]).tangent
        assert tangent is not None and torch.allclose(tangent, slope)


def test_masked_guards_change_nothing(monkeypatch: pytest.MonkeyPatch):
    from funcopt.execution import guarded_cache

    case = next(c for c in ELEMENTWISE_ENDS if c.row.name == "adamw")
    monkeypatch.setattr(guarded_cache, "_TensorGuards", None)
    check(case, "native", ragged())
    with used(fo.adamw(lr=0.1), dense(5)) as update:
        found = update()
        with ExactRoots():
            assert_bits(found, update(execution="reference"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_arc_tangent_in_every_octant(dtype: torch.dtype):
    """Its signs, zeros, infinities and NaN exact, the rest to two places."""
    opt = fo.elementwise(
        lambda y, x, *, step: (torch.atan2(y, x),), name="atan2", slots={}, hyper={}
    )
    inf, nan = float("inf"), float("nan")
    some = torch.tensor([0, 1, 1e-45, 3e38, inf, 0.7, 2.5, nan], dtype=dtype)
    drawn = torch.randn(300, generator=torch.Generator().manual_seed(0))
    every = torch.cat([some, -some, drawn.to(dtype)])
    y, x = (grid.reshape(-1) for grid in torch.meshgrid(every, every, indexing="ij"))
    found, _ = opt.update(y, opt.init(x), x, execution="native")
    exact = torch.atan2(y.double(), x.double())
    assert torch.equal(found.isnan(), exact.isnan())
    number = ~exact.isnan()
    assert torch.equal(found.signbit()[number], exact.signbit()[number])
    place = torch.finfo(dtype).eps * exact.abs().clamp(min=torch.finfo(dtype).tiny)
    assert ((found.double() - exact).abs() <= 2 * place).logical_or(exact.isnan()).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_loops_that_arc_tangents_begin_have_what_those_before_computed(
    dtype: torch.dtype,
):
    def rule(g: torch.Tensor, p: torch.Tensor, *, step: Any) -> tuple[torch.Tensor, ...]:
        rises, product = g > p, g * p
        first = torch.atan2(product, p + 3)
        second = torch.atan2(first + 1, g + product)
        return (torch.where(rises, first + p, second * product),)

    opt = fo.elementwise(rule, name="arcs", slots={}, hyper={})
    seeded = torch.Generator().manual_seed(0)
    # in tiles, with one left over, and in halves
    g, p = (
        [torch.randn(n, generator=seeded).to(dtype) for n in (700, 9001)] for _ in "gp"
    )
    found, _ = opt.update(g, opt.init(p), p, execution="native")
    given, _ = opt.update(g, opt.init(p), [x.clone() for x in p], donate=True)
    for x, y, a, b in zip(g, p, found, given):
        (exact,) = rule(x.double(), y.double(), step=1)
        distance = (a.double() - exact).abs() / (1 + exact.abs())
        assert distance.max() <= 4 * torch.finfo(dtype).eps
        assert torch.equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "digits"), [(torch.float32, 1e-6), (torch.float64, 1e-14)]
)
def test_a_cube_root_of_every_size(dtype: torch.dtype, digits: float):
    """To two places from the least number to the largest; its derivatives, too."""
    least, largest = torch.finfo(dtype).tiny, torch.finfo(dtype).max
    sizes = torch.linspace(math.log2(least) - 20, math.log2(largest), 2_001)
    x = torch.exp2(sizes.double()).clamp(max=largest).to(dtype)
    place = Decimal(torch.finfo(dtype).eps)
    for value, found in zip(x.tolist(), cube_root(x).tolist()):
        exact = Decimal(value) ** (1 / Decimal(3))  # to 28 digits
        assert abs(Decimal(found) - exact) <= 2 * place * exact
    assert 0 < cube_root(torch.zeros(1, dtype=dtype)) < 1e-14
    x = torch.linspace(0, 8, 2_001, dtype=dtype).requires_grad_()
    (slope,) = torch.autograd.grad(cube_root(x).sum(), x, create_graph=True)
    (bend,) = torch.autograd.grad(slope.sum(), x)
    assert slope[0] == bend[0] == 0
    x, slope, bend = (y.detach()[1:].double() for y in (x, slope, bend))
    assert (slope * 3 * x ** (2 / 3) - 1).abs().max() <= digits
    assert (bend * -4.5 * x ** (5 / 3) - 1).abs().max() <= 100 * digits
