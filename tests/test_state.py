"""The state: a plain dict under torch.optim's names, of one structure, safe to save."""

import io
from typing import Any

import pytest
import torch
from row import Case
from table import COPIES, ENDS, MIXES, SCALAR, TWINS, slots_of
from trees import assert_same, random_like

import funcopt as fo
from funcopt import tree
from funcopt.types import State, Tree


def saved_and_loaded(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def steps(opt: fo.Optimizer, at: tuple[Tree, State], which: range) -> tuple[Tree, State]:
    params, state = at
    for step in which:
        params, state = opt.update(random_like(params, seed=step), state, params)
    return params, state


def partitioned(case: Case) -> fo.Optimizer:
    return fo.partition(
        {"a": case.optimizer(), "b": fo.sgd(momentum=0.9)}, {"layers": "a", "empty": "b"}
    )


def frozen(case: Case) -> fo.Optimizer:
    return fo.freeze(case.optimizer(), fo.by_name({"*.bias": True}, default=False))


MADE = {"alone": Case.optimizer, "partition": partitioned, "freeze": frozen}


@pytest.mark.costly
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", MADE.values(), ids=MADE.keys())
@pytest.mark.parametrize("case", MIXES, ids=str)
def test_save_load_continue(case: Case, make: Any, dtype: torch.dtype):
    opt, start = make(case), case.mixed(dtype)
    half = steps(opt, (start, opt.init(start)), range(3))
    expected = steps(opt, half, range(3, 6))
    loaded = saved_and_loaded(half)
    assert_same(loaded, half)
    # another optimizer object, as after a restart
    assert_same(steps(make(case), loaded, range(3, 6)), expected)


@pytest.mark.parametrize("case", TWINS, ids=str)
def test_names_are_those_of_torch(case: Case):
    """But for the step, which sgd counts too, and for a buffer that is not there."""
    opt, leaf = case.optimizer(), torch.ones(case.row.few[0])
    twin, leaf.grad = case.twin([leaf]), torch.ones_like(leaf)
    twin.step()
    kept = {name for name, value in twin.state[leaf].items() if value is not None}
    state = opt.init(leaf)
    assert type(state) is dict
    assert kept | {"step"} <= state.keys()
    # torch has slots of its own for matrices, for which others have no use here
    assert not any(state[name].numel() for name in state.keys() - kept - {"step"})
    assert next(iter(state)) == "step"


@pytest.mark.costly
@pytest.mark.parametrize("make", MADE.values(), ids=MADE.keys())
@pytest.mark.parametrize("case", MIXES, ids=str)
def test_structure_stays(case: Case, make: Any):
    opt, params = make(case), case.mixed(torch.float32)
    state = opt.init(params)
    first = tree.flatten(state)[1]
    for step in range(3):
        params, state = steps(opt, (params, state), range(step, step + 1))
        assert tree.flatten(state)[1] == first
        assert tree.paths(tree.flatten(state)[1]) == tree.paths(first)


@pytest.mark.costly
@pytest.mark.parametrize("case", ENDS, ids=str)
def test_layout(case: Case):
    """int64 steps, a float64 scalar slot, an entry per leaf; other slots like params."""
    params = case.mixed(torch.float16)
    state = case.optimizer().init(params)
    _, after = steps(case.optimizer(), (params, state), range(2))
    for at, count in ((state, 0), (after, 2)):
        assert at["step"].dtype == torch.int64
        assert at["step"].tolist() == [count] * 5
    for name in state.keys() - {"step"}:
        start = case.row.first.get(name, 0.0)
        start = case.flags.get(start, 0.0) if isinstance(start, str) else start
        if name in SCALAR:
            expected = torch.full((5,), start, dtype=torch.float64)
        elif name in COPIES:
            expected = params
        elif case.row.elementwise:
            expected = tree.map(lambda p, v=start: torch.full_like(p, v), params)
        else:  # what it is like is for the rule to say
            expected = tree.map(torch.empty_like, after[name])
            forms = zip(tree.leaves(state[name]), tree.leaves(expected))
            assert all((x.shape, x.dtype) == (y.shape, y.dtype) for x, y in forms)
            continue
        assert_same(state[name], expected)


@pytest.mark.parametrize("case", ENDS, ids=str)
def test_frozen_leaves_keep_no_state(case: Case):
    params = case.mixed()
    state = frozen(case).init(params)
    slots = [state[name] for name in slots_of(state)]
    assert all(slot["layers"][0]["bias"] is None for slot in slots)
    assert all(slot["layers"][0]["weight"] is not None for slot in slots)
