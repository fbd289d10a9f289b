"""The numbers are torch.optim's: 50 steps of every combination of flags."""

from collections.abc import Iterator
from contextlib import contextmanager
from math import inf, nan
from typing import Any

import pytest
import torch
from row import Case
from table import ENDS, SCALAR, TWINS, slots_of
from torch import Tensor
from trees import assert_same, random_like

import funcopt as fo
from funcopt import tree
from funcopt.types import State, Tree

STEPS = 50
END_TWINS = [
    Case(case.row, {**case.flags, **case.row.like_twin}) for case in ENDS if case.row.twin
]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}
HALF = [torch.float16, torch.bfloat16]


@contextmanager
def float64_scalars() -> Iterator[None]:
    """torch keeps the scalars of its state in the default dtype, funcopt in float64."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(default)


class Race:
    """An Optimizer, and torch.optim on copies of the same parameters."""

    def __init__(self, opt: fo.Optimizer, twin: torch.optim.Optimizer, params: Tree):
        self.opt, self.twin = opt, twin
        self.params, self.state = params, opt.init(params)
        self.copies: list[Tensor] = [
            p for group in twin.param_groups for p in group["params"]
        ]
        self.paths = tree.paths(tree.flatten(params)[1])
        #: what both had after each step, by the name of the leaf
        self.course: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self.starts = [copy.clone() for copy in self.copies]
        self.moved = [torch.zeros_like(copy, dtype=torch.bool) for copy in self.copies]

    def step(self, grads: Tree, **hyper: Any) -> None:
        self.params, self.state = self.opt.update(grads, self.state, self.params, **hyper)
        for copy, g in zip(self.copies, tree.leaves(grads), strict=True):
            copy.grad = None if g is None else g.clone()
        with float64_scalars():
            self.twin.step()
        for moved, start, leaf in zip(self.moved, self.starts, tree.leaves(self.params)):
            moved |= leaf != start
        for name, ours, theirs in self.pairs():
            assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype), name
            course = self.course.setdefault(name, [])
            course.append((ours.clone(), theirs.detach().clone()))

    def assert_moved(self) -> None:
        """Every number has moved: parity of what stands still proves nothing."""
        assert all(moved.all() for moved in self.moved)

    def pairs(self) -> list[tuple[str, Tensor, Tensor]]:
        """Parameters and slots of both; torch makes slots at a first gradient."""
        found: list[tuple[str, Tensor, Tensor]] = []
        leaves = tree.leaves(self.params)
        for i, (path, copy) in enumerate(zip(self.paths, self.copies)):
            found.append((path, leaves[i], copy))
            for slot, theirs in self.twin.state[copy].items():
                if slot == "step":
                    assert self.state["step"][i] == theirs, path
                elif slot in SCALAR:
                    found.append((f"{slot} of {path}", self.state[slot][i], theirs))
                elif theirs is not None:
                    ours = tree.leaves(self.state[slot])[i]
                    found.append((f"{slot} of {path}", ours, theirs))
        return found

    def assert_level(self, tolerance: float | None = None, floor: float = 0.0) -> None:
        """After every step that was made; each leaf as its dtype asks, unless given."""
        for name, course in self.course.items():
            most = TOLERANCE[course[0][0].dtype] if tolerance is None else tolerance
            both = (torch.stack(side).double() for side in zip(*course))
            ours, theirs = (side.reshape(len(course), -1) for side in both)
            if not ours.numel():
                continue
            # The largest number held so far is the scale: one that passes through zero
            # keeps the rounding of the numbers that it was made of.
            sizes = theirs.abs().amax(1).cummax(0).values
            errors = (ours - theirs).abs().amax(1)
            for step in (~(errors <= most * sizes + floor)).nonzero():
                error, size = errors[step].item(), sizes[step].item()
                pytest.fail(f"{name}, step {step.item()}: {error:.2e} of {size}")


def race(case: Case, params: Tree, **hyper: Any) -> Race:
    copies = [leaf.clone() for leaf in tree.leaves(params)]
    return Race(case.optimizer(**hyper), case.twin(copies, **hyper), params)


def gradients(params: Tree, step: int) -> Tree:
    """Small ones after the tenth: only where exp_avg_sq falls is amsgrad not adam."""
    size = 1.0 if step < 10 else 0.01
    return tree.map(lambda g: size * g, random_like(params, seed=100 + step))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", TWINS, ids=str)
def test_trajectory(case: Case, dtype: torch.dtype):
    run = race(case, case.mixed(dtype))
    for step in range(STEPS):
        run.step(gradients(run.params, step))
    run.assert_level(TOLERANCE[dtype])
    run.assert_moved()
    assert run.state["step"].tolist() == [STEPS] * 5


@pytest.mark.parametrize("case", END_TWINS, ids=str)
def test_leaves_of_two_dtypes(case: Case):
    narrow, wide = case.mixed(torch.float32, 1), case.mixed(torch.float64, 2)
    run = race(case, {"narrow": narrow, "wide": wide, "more": case.mixed(seed=3)})
    for step in range(STEPS):
        run.step(gradients(run.params, step))
    run.assert_level()
    run.assert_moved()


@pytest.mark.parametrize("size", [1e20, 1e30], ids=str)
@pytest.mark.parametrize("case", END_TWINS, ids=str)
def test_gradients_whose_squares_overflow(case: Case, size: float):
    """1e40 is no float32, but 0.001 times it is; 1e57 is none: torch's stand still."""
    run = race(case, case.mixed(torch.float32))
    for step in range(4):
        run.step(tree.map(lambda g: size * g, random_like(run.params, seed=100 + step)))
        for name, ours, theirs in run.pairs():
            finite = theirs[theirs.isfinite()].abs()
            atol = 2e-6 * finite.max().item() if finite.numel() else 0.0
            torch.testing.assert_close(
                ours, theirs, rtol=0, atol=atol, equal_nan=True, msg=name
            )


@pytest.mark.costly
@pytest.mark.parametrize("case", TWINS, ids=str)
def test_trajectory_the_other_way(case: Case):
    """Uphill for downhill: the mixes of flags that the table leaves out."""
    flags = {**case.flags, "maximize": not case.flags["maximize"]}
    run = race(Case(case.row, flags), case.mixed())
    for step in range(STEPS):
        run.step(gradients(run.params, step))
    run.assert_level(TOLERANCE[torch.float64])
    run.assert_moved()


@pytest.mark.parametrize("case", TWINS, ids=str)
def test_leaves_without_a_gradient_stay(case: Case):
    run, counts = race(case, case.mixed()), [0] * 5
    for step in range(STEPS):
        leaves, structure = tree.flatten(gradients(run.params, step))
        gaps = [None if (i + step) % 3 == 0 else g for i, g in enumerate(leaves)]
        before, state = run.params, run.state
        run.step(tree.unflatten(structure, gaps))
        for i, g in enumerate(gaps):
            counts[i] += g is not None
            if g is None:  # nothing of that leaf is touched, not even copied
                slots = slots_of(state)
                old = [before, *(state[slot] for slot in slots)]
                new = [run.params, *(run.state[slot] for slot in slots)]
                for a, b in zip(old, new):
                    assert tree.leaves(a)[i] is tree.leaves(b)[i]
                for slot in SCALAR & state.keys():
                    assert state[slot][i] == run.state[slot][i]
    run.assert_level(TOLERANCE[torch.float64])
    run.assert_moved()
    assert run.state["step"].tolist() == counts


@pytest.mark.parametrize("case", TWINS, ids=str)
def test_no_gradient_at_all(case: Case):
    run = race(case, case.mixed())
    nothing = tree.map(lambda _: None, run.params)
    run.step(nothing)
    assert run.state["step"].tolist() == [0] * 5
    run.step(gradients(run.params, 0))
    run.step(nothing)
    run.assert_level(TOLERANCE[torch.float64])
    run.assert_moved()


def scaled(value: Any, factor: float, least: Any) -> Any:
    if isinstance(value, tuple):
        lows = least if isinstance(least, tuple) else [least] * len(value)
        return tuple(scaled(v, factor, low) for v, low in zip(value, lows))
    return max(factor * value, least)


@pytest.mark.costly
@pytest.mark.parametrize("factor", [0.5, 0.0])
@pytest.mark.parametrize("case", TWINS, ids=str)
def test_groups(case: Case, factor: float):
    """Two groups that differ in every float; a zero switches terms off in one only."""
    values = case.floats()
    others = {
        name: scaled(value, factor, case.row.least.get(name, 0.0))
        for name, value in values.items()
    }
    others["lr"] = 0.5 * values["lr"]
    members = [list(case.mixed(seed=seed)["layers"][0].values()) for seed in (1, 2)]
    groups = [{"params": p, **v} for p, v in zip(members, (values, others))]
    copies = [{**g, "params": [p.clone() for p in g["params"]]} for g in groups]
    params, hyper = fo.from_param_groups(groups, **case.flags)
    run = Race(case.row.factory(**hyper), case.twin(copies), params)
    for step in range(STEPS):
        run.step(gradients(params, step))
    run.assert_level(TOLERANCE[torch.float64])
    run.assert_moved()


@pytest.mark.costly
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", TWINS, ids=str)
def test_hyperparameters_as_tensors(case: Case, dtype: torch.dtype):
    run = race(case, case.mixed(dtype), **case.floats())
    for step in range(STEPS):
        run.step(gradients(run.params, step), **case.tensors())
    run.assert_level(TOLERANCE[dtype])
    run.assert_moved()


@pytest.mark.costly
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", TWINS, ids=str)
def test_zero_gradients(case: Case, dtype: torch.dtype):
    """The safe root changes no number: where nothing but zeros came in, not one bit."""
    run = race(case, case.mixed(dtype))
    dead = tree.map(lambda p: torch.arange(p.numel()).view(p.shape) % 2 == 0, run.params)
    for step in range(STEPS):
        grads = gradients(run.params, step)
        run.step(tree.map(lambda g, off: g.masked_fill(off, 0.0), grads, dead))
        if not any(case.flags.get(name) for name in ("weight_decay", "lambd")):
            for ours, theirs, off in zip(
                tree.leaves(run.params), run.copies, tree.leaves(dead)
            ):
                assert torch.equal(ours[off], theirs[off])
    run.assert_level(TOLERANCE[dtype])


def misgiven(value: Any) -> Iterator[Any]:
    """Out of its range, each place of it alone."""
    for bad in (-1.0, 1.0, 2.0, -1e-3, 60.0, 0.0, nan, inf, "fast", None):
        if not isinstance(value, tuple):
            yield bad
        else:
            yield from ((*value[:i], bad, *value[i + 1 :]) for i in range(len(value)))


def refused_alike(ours: Any, theirs: Any, values: dict[str, Any]) -> int:
    """How many bad numbers torch refuses, each of which is to raise the same here."""
    refused = 0
    for name, value in values.items():
        for bad in misgiven(value):
            try:
                theirs([torch.ones(2, 2)], **{name: bad})
            except Exception as error:
                refused += 1
                with pytest.raises(type(error)):
                    ours(**{name: bad})
    return refused


OF_TORCH = [case for case in TWINS if case.row.name != "lion"]


@pytest.mark.parametrize("case", OF_TORCH, ids=str)
def test_what_torch_refuses_is_refused_alike(case: Case):
    assert refused_alike(case.optimizer, case.twin, case.floats()) > 1


def test_what_torch_refuses_of_those_without_a_row_is_refused_alike():
    adam = {"lr": 0.1, "betas": (0.9, 0.9), "eps": 0.1}
    assert refused_alike(fo.sparse_adam, torch.optim.SparseAdam, adam) > 9
    assert refused_alike(fo.lbfgs, torch.optim.LBFGS, {"lr": 1.0}) > 3


@pytest.mark.parametrize("case", TWINS, ids=str)
def test_gradients_whose_square_underflows(case: Case):
    """A zero under the root and none above it: eps alone divides.

    Of weight decay uphill the rounding grows with the parameters: so twenty steps.
    """
    shape = (1,) * len(case.row.shapes[3])  # of one number
    run = race(case, [torch.zeros(shape) for _ in range(8)])
    grads = [g.expand(shape) for g in torch.logspace(-23, -34, 8)]
    for _ in range(20):
        run.step(grads)
    run.assert_level(TOLERANCE[torch.float32])
    run.assert_moved()


@pytest.mark.costly
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("case", TWINS, ids=str)
def test_half_precision(case: Case, dtype: torch.dtype):
    """torch rounds after every operation of a step, funcopt once at its end."""
    run, tolerance = race(case, case.mixed(dtype)), case.row.ulps * torch.finfo(dtype).eps
    for step in range(STEPS):
        run.step(gradients(run.params, step))
        for _, ours, theirs in run.pairs():
            theirs.detach().copy_(ours)
    run.assert_level(tolerance, floor=1e-5)
    run.assert_moved()


@pytest.mark.costly
@pytest.mark.parametrize(
    "dtype",
    [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.slow)],
    ids=str,
)
@pytest.mark.parametrize("case", ENDS, ids=str)
def test_half_precision_is_a_float32_step_rounded_once(case: Case, dtype: torch.dtype):
    """Zero gradients too: in float16 eps would be nothing, and 0/0 the step."""
    opt, params = case.optimizer(), case.mixed(dtype)
    state, start = opt.init(params), params
    dead = tree.map(lambda p: torch.arange(p.numel()).view(p.shape) % 2 == 1, params)

    def cast(value: Tree, to: torch.dtype) -> Tree:
        return tree.map(lambda x: x.to(to), value)

    def cast_state(state: State, to: torch.dtype) -> State:
        return {**state, **{slot: cast(state[slot], to) for slot in slots_of(state)}}

    def cast_like(value: Tree, like: Tree) -> Tree:
        return tree.map(lambda x, y: x.to(y.dtype), value, like)

    for step in range(STEPS):
        grads = gradients(params, step)
        grads = tree.map(lambda g, off: g.masked_fill(off, 0.0), grads, dead)
        float32 = torch.float32
        wide, wide_state = opt.update(
            cast(grads, float32), cast_state(state, float32), cast(params, float32)
        )
        params, state = opt.update(grads, state, params)
        assert_same((params, state), cast_like((wide, wide_state), (params, state)))
        assert all(p.isfinite().all() for p in tree.leaves(params))
        if step == 0 and case.row.moves:  # later a coarse number may come back
            rows = zip(*map(tree.leaves, (params, start, dead)), strict=True)
            moved = [(p != first)[~off] for p, first, off in rows if p.numel()]
            whole = not case.row.elementwise  # where little of a step may go to a number
            assert all(x.any() if whole else x.all() for x in moved)
