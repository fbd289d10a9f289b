"""What holds for every tree, shape, dtype and grouping: drawn at random."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from row import Case
from rows import sign
from table import CASES, ELEMENTWISE, ENDS, slots_of
from torch import Tensor
from trees import assert_same, random_like

import funcopt as fo
from funcopt import tree
from funcopt.types import State, Tree

pytestmark = pytest.mark.slow  # each draws a hundred examples


class Pair(NamedTuple):
    left: Any
    right: Any


DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
SHAPES = [(), (1,), (3,), (2, 3), (0, 3), (2, 1, 2)]


@st.composite
def parameters(draw: Callable[..., Any]) -> Tree:
    """A tree of any containers, empty ones and None among them."""
    leaf = st.builds(
        lambda shape, dtype: torch.empty(shape, dtype=dtype),
        st.sampled_from(SHAPES),
        st.sampled_from(DTYPES),
    )
    keys = st.text("abc", min_size=1, max_size=2)
    shape = st.recursive(
        leaf | st.none(),
        lambda child: (
            st.lists(child, max_size=3)
            | st.lists(child, max_size=3).map(tuple)
            | st.dictionaries(keys, child, max_size=3)
            | st.builds(Pair, child, child)
        ),
        max_leaves=6,
    )
    return random_like(draw(shape), draw(st.integers(0, 99)))


def describe(value: Tree) -> Any:
    """Structure, and shape, dtype and device of every leaf."""
    leaves, structure = tree.flatten(value)
    return structure, [x if x is None else (x.shape, x.dtype, x.device) for x in leaves]


def run(opt: fo.Optimizer, params: Tree, steps: int = 3, **hyper: Any) -> Any:
    """Some steps on gradients that depend on a leaf's place."""
    state = opt.init(params)
    for seed in range(steps):
        params, state = opt.update(random_like(params, seed), state, params, **hyper)
    return params, state


some_case = st.sampled_from(CASES)
per_element = st.sampled_from(ELEMENTWISE)


@given(some_case, parameters(), st.data())
def test_nothing_changes_form(case: Case, params: Tree, data: Any):
    """Whatever has a gradient in a step, and whatever has none."""
    opt = case.optimizer()
    params = case.fit(params)
    state = opt.init(params)
    form = describe((params, state))
    for slot in slots_of(state):
        own = describe(state[slot]), describe(params)
        assert own[0] == own[1] or not case.row.elementwise and own[0][0] == own[1][0]
    for seed in range(3):
        leaves, structure = tree.flatten(random_like(params, seed))
        given = [g if data.draw(st.booleans()) else None for g in leaves]
        result = opt.update(tree.unflatten(structure, given), state, params)
        assert describe(result) == form
        params, state = result


@pytest.mark.slow
@given(some_case, parameters(), st.data())
def test_equal_groups_are_no_groups(case: Case, params: Tree, data: Any):
    """As full trees of values, as optimizers of their own, and by name: the same bits."""
    params = case.fit(params)
    expected = run(case.optimizer(**case.floats()), params)
    structure = tree.flatten(params)[1]

    def everywhere(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(everywhere(v) for v in value)
        return tree.unflatten(structure, [value] * structure.num_leaves)

    trees = {name: everywhere(value) for name, value in case.floats().items()}
    assert_same(run(case.optimizer(), params, **trees), expected)

    named = fo.by_name(
        {"*": case.floats()["lr"]} if structure.num_leaves else {}, default=0
    )
    assert_same(run(case.optimizer(**case.floats()), params, lr=named), expected)

    if case.together:
        return
    labels = [data.draw(st.sampled_from("ab")) for _ in range(structure.num_leaves)]
    split = fo.partition(
        {label: case.optimizer(**case.floats()) for label in "ab"},
        tree.unflatten(structure, labels),
    )
    new, states = run(split, params)
    assert_same(new, expected[0])
    for slot in slots_of(expected[1]):
        parts = [tree.leaves(states[label][slot]) for label in "ab"]
        joined = [a if label == "a" else b for a, b, label in zip(*parts, labels)]
        assert_same(joined, tree.leaves(expected[1][slot]))


@given(some_case, st.lists(parameters(), min_size=2, max_size=4), st.data())
def test_group_order_is_irrelevant(case: Case, members: list[Tree], data: Any):
    """Groups with rates of their own, in the order given and in another."""
    members = [case.fit(params) for params in members]
    order = data.draw(st.permutations(range(len(members))))
    groups = [
        {"params": [x for x in tree.leaves(m) if x is not None], "lr": 0.1 / (i + 1)}
        for i, m in enumerate(members)
    ]

    def result(groups: list[Any]) -> Any:
        params, hyper = fo.from_param_groups(groups)
        return run_on_own_values(case.optimizer(**hyper), params)

    expected = result(groups)
    found = result([groups[i] for i in order])
    assert_same(found, [expected[i] for i in order])


def run_on_own_values(opt: fo.Optimizer, params: Tree) -> Tree:
    """Steps on gradients that depend on a leaf's values alone, wherever it stands."""
    state = opt.init(params)
    for _ in range(3):
        grads = tree.map(lambda p: torch.sin(3 * p) + p, params)
        params, state = opt.update(grads, state, params)
    return params


@given(some_case, parameters())
def test_order_of_optimizers_and_patterns_is_irrelevant(case: Case, params: Tree):
    params = case.fit(params)
    both = {"left": params, "right": params}
    made = {"a": case.optimizer(), "b": case.optimizer(lr=0.01)}
    labels = {"left": "a", "right": "b"}
    expected = run(fo.partition(made, labels), both)
    found = run(fo.partition(dict(reversed(made.items())), labels), both)
    assert_same(found, expected)
    if not case.together and any(x is not None for x in tree.leaves(params)):
        patterns = {"left*": case.floats()["lr"], "right*": 0.01}
        for order in (patterns, dict(reversed(patterns.items()))):
            rates = fo.by_name(order, default=0.5)
            assert_same(run(case.optimizer(), both, lr=rates)[0], expected[0])


@pytest.mark.slow
@given(some_case, parameters())
def test_no_rate_no_step(case: Case, params: Tree):
    assume(not case.flags.get("step_sizes", (0.0,))[0])  # rprop's least step is one
    params = case.fit(params)
    assert_same(run(case.optimizer(), params, lr=0.0)[0], params)
    zero = torch.tensor(0.0)
    assert_same(run(case.optimizer(), params, lr=zero)[0], params)


ZERO = torch.zeros((), dtype=torch.float64)
#: what stands around an optimizer and leaves its steps as they are
DEGENERATE: dict[str, Callable[[fo.Optimizer], fo.Optimizer]] = {
    "chain": fo.chain,
    "clips nothing": lambda opt: fo.chain(fo.clip_by_global_norm(1e9), opt),
    "projects nothing": lambda opt: fo.chain(
        opt, fo.project(fo.projections.box, low=-1e9, high=1e9)
    ),
    "average": lambda opt: fo.chain(opt, fo.ema(0.9), fo.polyak()),
    "lookahead": lambda opt: fo.chain(opt, fo.lookahead(1, 1.0)),
    "accumulate": lambda opt: fo.accumulate(opt, 1),
    "skip_nonfinite": fo.skip_nonfinite,
    "freeze": lambda opt: fo.freeze(opt, False),
    "partition": lambda opt: fo.partition({"all": opt}, "all"),
    "scheduled": fo.scheduled,
    "sam": lambda opt: fo.sam(opt, 0.0),
}


@given(some_case, parameters(), st.sampled_from(list(DEGENERATE)))
def test_what_does_nothing_changes_nothing(case: Case, params: Tree, around: str):
    plain, params = case.optimizer(), case.fit(params)
    opt, expected = DEGENERATE[around](plain), params
    state, other = opt.init(params), plain.init(params)
    for seed in range(3):
        grads = random_like(params, seed)

        def loss(p: Tree, grads: Tree = grads) -> Tensor:
            pairs = zip(tree.leaves(p), tree.leaves(grads))
            return sum(((x * g).sum() for x, g in pairs if g is not None), ZERO)

        more: Any = {"loss_fn": loss} if around == "sam" else {}
        expected, other = plain.update(grads, other, expected)
        params, state = opt.update(grads, state, params, **more)
        assert_same(params, expected)


by_sign = [case for case in CASES if case.row in sign.ROWS or case.row.name == "lion"]
by_sign = [case for case in by_sign if case.row.name != "sophia_g"]


@given(st.sampled_from(by_sign), parameters(), st.integers(-3, 6))
def test_a_sign_has_no_size(case: Case, params: Tree, power: int):
    """Gradients times a power of 2, by which nothing is rounded otherwise."""
    case = Case(case.row, {**case.flags, "weight_decay": 0.0})
    found = []
    for scale in (1.0, 2.0**power):
        opt, p = case.optimizer(), params
        state = opt.init(params)
        for seed in range(3):
            grads = tree.map(lambda g, c=scale: c * g, random_like(params, seed))
            p, state = opt.update(grads, state, p)
        found.append(p)
    assert_same(*found)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ENDS, ids=str)
def test_no_gradient_no_step(case: Case, dtype: torch.dtype):
    """Zeros from the first: where 0/0 would be NaN, and half an eps nothing."""
    still = {"weight_decay": 0.0, "lambd": 0.0, "noise": 0.0}
    known = case.optimizer().hyper
    given = {name: value for name, value in still.items() if name in known}
    opt, params = case.optimizer(), case.mixed(dtype)
    zeros, new, state = tree.map(torch.zeros_like, params), params, opt.init(params)
    for _ in range(3):
        new, state = opt.update(zeros, state, new, **given)
    assert_same(new, params)
    assert all(x.isfinite().all() for x in tree.leaves(state))


@given(some_case, parameters())
def test_maximizing_is_descent_on_the_negative(case: Case, params: Tree):
    params = case.fit(params)
    up, down = (
        Case(case.row, {**case.flags, "maximize": flag}).optimizer()
        for flag in (True, False)
    )
    state, other = up.init(params), down.init(params)
    there = here = params
    for seed in range(3):
        grads = random_like(params, seed)
        there, state = up.update(grads, state, there)
        here, other = down.update(tree.map(torch.neg, grads), other, here)
    assert_same((there, state), (here, other))


@given(
    per_element,
    st.sampled_from(DTYPES),
    st.sampled_from([(7,), (4, 5), (2, 3, 3)]),
    st.integers(0, 99),
)
def test_elementwise(case: Case, dtype: torch.dtype, shape: tuple[int, ...], seed: int):
    """Steps commute with every reordering, reshaping and choice of a leaf's numbers."""
    opt = case.optimizer()
    params, *all_grads = random_like([torch.empty(shape, dtype=dtype)] * 4, seed)
    order = torch.randperm(params.numel(), generator=torch.Generator().manual_seed(seed))

    def after(view: Callable[[Tensor], Tensor]) -> tuple[Tensor, State]:
        p = view(params)
        state = opt.init(p)
        for grads in all_grads:
            p, state = opt.update(view(grads), state, p)
        return p, state

    expected = after(lambda x: x)
    for view in (
        lambda x: x.flatten(),
        lambda x: x.flatten()[order],
        lambda x: x.flatten()[order[:3]],
        lambda x: x.mT if x.ndim > 1 else x.flip(0),
        lambda x: torch.stack([x, x], dim=-1)[..., 0],  # not contiguous
    ):
        p, state = after(view)
        assert_same(p, view(expected[0]))
        for slot in slots_of(state):
            assert_same(state[slot], view(expected[1][slot]))


@pytest.mark.parametrize("case", [c for c in ENDS if not c.together], ids=str)
def test_tied_leaves_are_two_places(case: Case):
    """The same tensor twice: two states, equal values; unequal rates part them."""
    shared = case.mixed()
    params, grads = {"a": shared, "b": shared}, random_like(shared, seed=1)
    opt = case.optimizer()
    state = opt.init(params)
    assert state["step"].shape == (10,)
    for _ in range(3):
        params, state = opt.update({"a": grads, "b": grads}, state, params)
    assert_same(params["a"], params["b"])
    alone, _ = opt.update(grads, opt.init(shared), shared)
    rates = {"a": case.row.floats["lr"], "b": 0.0}
    both = {"a": shared, "b": shared}
    parted, _ = opt.update({"a": grads, "b": grads}, opt.init(both), both, lr=rates)
    assert_same(parted, {"a": alone, "b": shared})
