"""Whatever is drawn, every executor gives what the reference gives."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from exact_roots import ExactRoots
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from row import Case
from table import ELEMENTWISE
from test_execution import assert_bits
from test_purity import Snapshot
from torch import Tensor
from torch.func import vmap
from trees import relative

import funcopt as fo
from funcopt import tree
from funcopt.types import Tree

pytestmark = pytest.mark.slow  # each draws a hundred examples

EXECUTIONS = ["foreach", "native", None]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPES = [(), (1,), (0,), (3,), (17,), (2, 3), (3, 0, 2), (2, 3, 2, 2), (9, 1, 5)]
#: rules whose scalars are a number per leaf: no hyperparameter of them has elements
PER_LEAF = {"nadam", "asgd"}

examples = settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])


def numbers(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Of both signs with |x| in [0.5, 1.5], and now and then an exact zero."""
    generator = torch.Generator().manual_seed(seed)
    size, sign, zero = torch.rand(3, *shape, generator=generator, dtype=torch.float64)
    found = torch.copysign(size + 0.5, sign - 0.5)
    return torch.where(zero < 0.05, 0.0, found).to(dtype)


@st.composite
def laid_out(draw: Callable[..., Any], values: Tensor) -> Tensor:
    """The same numbers, in one of the ways that they can lie in memory."""
    way = draw(
        st.sampled_from(["dense", "permuted", "gaps", "shifted", "channels", "flipped"])
    )
    if way == "permuted":
        order = draw(st.permutations(range(values.ndim)))
        back = [order.index(i) for i in range(values.ndim)]
        return values.permute(order).contiguous().permute(back)
    if way == "gaps":
        room = torch.full((*values.shape, 2), torch.nan, dtype=values.dtype)
        room[..., 0] = values
        return room[..., 0]
    if way == "shifted":
        by = draw(st.integers(1, 9))
        room = torch.full((values.numel() + by,), torch.nan, dtype=values.dtype)
        room[by:] = values.flatten()
        return room[by:].view(values.shape)
    if way == "channels" and values.ndim == 4:
        return values.to(memory_format=torch.channels_last)
    if way == "flipped" and values.ndim:
        return values.flip(0).contiguous().flip(0)
    return values


@st.composite
def leaf(draw: Callable[..., Any]) -> tuple[tuple[int, ...], torch.dtype]:
    return draw(st.sampled_from(SHAPES)), draw(st.sampled_from(DTYPES))


@st.composite
def hyperparameter(
    draw: Callable[..., Any], value: float, params: Tree, wide: bool
) -> Any:
    """A float, a number, one for each leaf, one for each element, a schedule."""
    kinds = ["float", "0-d", "0-d float32", "per leaf", "mixed", "schedule"]
    kind = draw(st.sampled_from(kinds + ["elements", "broadcast"] if wide else kinds))
    leaves, structure = tree.flatten(params)

    def number(factor: float = 1.0, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.tensor(value * factor, dtype=dtype)

    def elements(p: Tensor, seed: int) -> Tensor:
        return value * (0.8 + 0.2 * numbers(tuple(p.shape), p.dtype, seed).abs() / 1.5)

    if kind == "float":
        return value
    if kind == "0-d":
        return number()
    if kind == "0-d float32":
        return number(dtype=torch.float32)
    if kind == "schedule":
        return fo.Schedule(lambda t: value * (1 - 0.1 / (2 + t)))
    each: list[Any] = []
    for i, p in enumerate(leaves):
        if kind == "per leaf":
            each.append(value * (1 - 0.01 * i))
        elif kind == "mixed":
            each.append(draw(st.sampled_from([value, number(), number(0.9), value])))
        elif kind == "elements" or not p.ndim:
            each.append(elements(p, i))
        else:
            each.append(elements(p[:1] if len(p) else p, i))
    return tree.unflatten(structure, each)


@st.composite
def step(draw: Callable[..., Any]) -> dict[str, Any]:
    """An optimizer, and the arguments of some of its updates."""
    case: Case = draw(st.sampled_from(ELEMENTWISE))
    kinds = draw(st.lists(leaf(), max_size=5))
    seed = draw(st.integers(0, 999))
    params = [
        draw(laid_out(numbers(shape, dtype, seed + i)))
        for i, (shape, dtype) in enumerate(kinds)
    ]
    wide = case.row.name not in PER_LEAF
    floats = case.floats()
    chosen = draw(st.lists(st.sampled_from(sorted(floats)), unique=True, max_size=2))
    hyper: dict[str, Any] = {}
    for name in chosen:
        value, scalar = floats[name], isinstance(floats[name], float)
        # A power of a tensor is a bit from torch's: those stay a number per leaf.
        hyper[name] = (
            draw(hyperparameter(value, params, wide and name in ("lr", "weight_decay")))
            if scalar
            else tuple(draw(hyperparameter(v, params, False)) for v in value)
        )
    all_grads = [
        [
            draw(st.none() if draw(st.integers(0, 9)) == 0 else laid_out(values))
            for values in (
                numbers(shape, dtype, seed + 100 * (k + 1) + i)
                for i, (shape, dtype) in enumerate(kinds)
            )
        ]
        for k in range(draw(st.integers(1, 3)))
    ]
    return {"case": case, "params": params, "all_grads": all_grads, "hyper": hyper}


def run(
    name: str | None,
    case: Case,
    params: Tree,
    all_grads: list[Tree],
    hyper: dict[str, Any],
    **options: Any,
) -> Any:
    opt = case.optimizer()
    state = opt.init(params)
    for grads in all_grads:
        params, state = opt.update(
            grads, state, params, execution=name, **hyper, **options
        )
    return params, state


@examples
@given(step(), st.sampled_from(EXECUTIONS))
def test_bit_equal_to_the_reference(drawn: dict[str, Any], name: str | None):
    seen = Snapshot(drawn["params"], drawn["all_grads"], drawn["hyper"])
    found = run(name, **drawn)
    seen.assert_untouched()
    if name == "foreach":
        expected = run("reference", **drawn)
    else:
        with ExactRoots():
            expected = run("reference", **drawn)
    assert_bits(found, expected)


@examples
@given(step(), st.sampled_from([*EXECUTIONS, "reference"]))
def test_donation_changes_no_number(drawn: dict[str, Any], name: str | None):
    expected = run(name, **drawn)
    mine = [p.clone(memory_format=torch.preserve_format) for p in drawn["params"]]
    found = run(name, **{**drawn, "params": mine}, donate=True)
    assert all(a is b for a, b in zip(found[0], mine))
    assert_bits(found, expected)


@examples
@given(step(), st.sampled_from(["foreach", "native"]), st.booleans())
def test_gradients_are_the_references(drawn: dict[str, Any], name: str, own: bool):
    """In float64, to everything that may be followed."""

    def wide(x: Any) -> Any:
        return x.double() if isinstance(x, Tensor) else x

    case, hyper = drawn["case"], tree.map(wide, drawn["hyper"])
    params = [wide(p) for p in drawn["params"]]
    all_grads = [[wide(g) for g in grads] for grads in drawn["all_grads"]]
    asked = [
        x.requires_grad_()
        for x in (*params, *(g for grads in all_grads for g in grads))
        if x is not None
    ]
    if own:
        numbers_ = {id(x): x for x in tree.leaves(hyper) if isinstance(x, Tensor)}
        asked += [x.requires_grad_() for x in numbers_.values()]
    found = []
    for each in (name, "reference"):
        new, state = run(each, case, params, all_grads, hyper)
        outputs = [x for x in tree.leaves((new, state)) if isinstance(x, Tensor)]
        total = torch.zeros((), dtype=torch.float64)
        for k, x in enumerate(outputs):
            if x.is_floating_point():
                total = total + (x * numbers(tuple(x.shape), x.dtype, k)).sum()
        if not total.requires_grad:
            return
        found.append(
            torch.autograd.grad(total, asked, allow_unused=True, materialize_grads=True)
        )
    scale = max((x.abs().max() for x in found[1] if x.numel()), default=torch.tensor(1.0))
    for a, b in zip(*found):
        assert relative(a, b) <= 1e-10 or (a - b).abs().max() <= 1e-13 * scale


@examples
@given(
    step(),
    st.sampled_from(["foreach", "native"]),
    st.integers(1, 3),
    st.sampled_from(["none", "shared", "own"]),
    st.data(),
)
def test_vmap_is_the_loop(
    drawn: dict[str, Any], name: str, size: int, rate: str, data: Any
):
    """Tasks stacked along any axis, each with its own numbers, or sharing some."""
    case, params, grads = drawn["case"], drawn["params"], drawn["all_grads"][0]
    opt = case.optimizer()
    state = opt.init(params)
    axes = [
        None if g is None else data.draw(st.integers(-1 - g.ndim, g.ndim)) for g in grads
    ]
    tasks = [
        None if g is None else [g * (1 + 0.25 * t) for t in range(size)] for g in grads
    ]
    lr = torch.linspace(0.1, 0.2, size, dtype=torch.float64)

    def update(g: Any, lr: Any) -> Any:
        hyper = {} if rate == "none" else {"lr": lr}
        return opt.update(g, state, params, execution=name, **hyper)

    if not any(g is not None for g in grads):
        return
    present = [i for i, g in enumerate(grads) if g is not None]

    def of_present(given: list[Tensor], lr: Any) -> Any:
        full: list[Any] = [None] * len(grads)
        for i, g in zip(present, given):
            full[i] = g
        return update(full, lr)

    stacked = [torch.stack(tasks[i] or [], axes[i] or 0) for i in present]
    found = vmap(of_present, ([axes[i] for i in present], 0 if rate == "own" else None))(
        stacked, lr if rate == "own" else lr[0]
    )
    for t in range(size):
        own = [None if each is None else each[t] for each in tasks]
        expected = update(own, lr[t] if rate == "own" else lr[0])
        assert_bits(tree.map(lambda x: x[t], found), expected)  # noqa: B023
