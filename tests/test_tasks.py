"""Under vmap the steps of all tasks are one, and each task's is what it is alone."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeAlias

import pytest
import torch
from torch import Tensor
from torch.func import vmap

import funcopt as fo
from funcopt import tree
from funcopt.hyper import Hyper
from funcopt.stepping import vmapped
from funcopt.types import Tree

TASKS = 3
RATES = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
SHAPES = {"w": (4, 2), "b": (5,), "scale": ()}
OPTIMIZERS = {
    "adamw": fo.adamw(weight_decay=0.1),
    "a scalar slot": fo.nadam(),
    "no slot": fo.sgd(lr=fo.schedules.exponential(0.5, gamma=0.9)),
    "a value for each leaf": fo.adam(lr={"w": 0.1, "b": 0.2, "scale": 0.3}),
    "of each element": fo.sgd(
        momentum=0.9, lr={"w": torch.rand(2), "b": 0.2, "scale": 1}
    ),
}


SWEPT = {
    "sgd": fo.sgd(momentum=0.9),
    "adamw": fo.adamw(),
    "lamb": fo.lamb(),
    "chain": fo.chain(fo.clip_by_global_norm(1.0), fo.adam()),
}


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Of each step under vmap, whether the tasks went together."""
    seen: list[bool] = []

    def spied(original: Any) -> Any:
        def spy(*given: Any) -> Any:
            found = original(*given)
            if original is not again or found is not None:
                seen.append(found is not None)
            return found

        return spy

    again = vmapped.again
    for each in (again, vmapped.step):
        monkeypatch.setattr(vmapped, each.__name__, spied(each))
    yield seen


def stacked(seed: int, axis: int = 0, dtype: torch.dtype = torch.float64) -> Tree:
    made = torch.Generator().manual_seed(seed)
    return {
        key: torch.randn(TASKS, *shape, generator=made, dtype=dtype).movedim(0, axis)
        if shape
        else torch.randn(TASKS, generator=made, dtype=dtype)
        for key, shape in SHAPES.items()
    }


def task(i: int, *given: Tree) -> list[Tree]:
    return [tree.map(lambda x: x[i], t) for t in given]


def one_by_one(function: Callable[..., Any], *given: Tree) -> Any:
    rows = [function(*task(i, *given)) for i in range(TASKS)]
    leaves = zip(*map(tree.leaves, rows))
    return tree.unflatten(tree.flatten(rows[0])[1], [*map(torch.stack, leaves)])


def assert_same(found: Any, expected: Any) -> None:
    pairs = list(zip(tree.leaves(found), tree.leaves(expected), strict=True))
    assert all(torch.equal(a, b) and a.dtype is b.dtype for a, b in pairs)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_task_makes_its_own_steps(name: str, together: list[bool]):
    opt = OPTIMIZERS[name]

    def run(p: Tree, *grads: Tree) -> Any:
        state = opt.init(p)
        for g in grads:
            p, state = opt.update(g, state, p)
        return p, state

    given = [stacked(seed) for seed in range(4)]
    assert_same(vmap(run)(*given), one_by_one(run, *given))
    assert together == [True] * 3


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("gaps", [("b",), ("w", "scale"), ("w", "b", "scale")])
@pytest.mark.parametrize("name", ["adamw", "a scalar slot", "a value for each leaf"])
def test_leaves_that_stay(
    name: str, gaps: tuple[str, ...], own: bool, together: list[bool]
):
    """They have no gradient, every time or but once."""
    opt = OPTIMIZERS[name]

    def run(p: Tree, rate: Tensor, *grads: Tree) -> Any:
        state, given = opt.init(p), {"lr": rate} if own else {}
        for k, g in enumerate(grads):
            g = g if k == 1 else {key: None if key in gaps else x for key, x in g.items()}
            new, state = opt.update(g, state, p, **given)
            assert all((new[key] is p[key]) is (x is None) for key, x in g.items())
            p = new
        return p, state

    given = [stacked(0), RATES, *map(stacked, range(1, 5))]
    assert_same(vmap(run)(*given), one_by_one(run, *given))
    joint = not own or name != "a scalar slot"
    asked = 4 if len(gaps) < len(SHAPES) else 1  # not where no leaf steps
    assert together == [joint] * asked


def test_state_comes_out_as_it_went_in(together: list[bool]):
    """Its count for every task, in memory of its own."""
    opt, p, g = fo.adam(), stacked(0), stacked(1)
    state = vmap(opt.init)(p)
    for _ in range(3):
        p, state = vmap(opt.update)(g, state, p)
    assert state["step"].is_contiguous() and together == [True] * 3
    assert state["step"].tolist() == [[3] * len(SHAPES)] * TASKS


def test_what_tasks_share_and_other_axes(together: list[bool]):
    opt, p, g = fo.adam(), tree.map(lambda x: x[0], stacked(0)), stacked(1)
    state = opt.init(p)
    expected = one_by_one(lambda g: opt.update(g, state, p), g)
    found = vmap(lambda g: opt.update(g, state, p))(g)
    assert_same(found, expected)
    last = {key: -1 for key in SHAPES}
    back = tree.map(lambda x: x.movedim(0, -1), g)
    assert_same(vmap(lambda g: opt.update(g, state, p), (last,))(back), expected)
    assert together == [True] * 2


OWN: dict[str, Callable[[Any, Tensor], dict[str, Any]]] = {
    "a rate": lambda state, x: {"lr": x},
    "a tree of rates": lambda state, x: {"lr": {"w": x, "b": 0.1, "scale": x}},
    "a schedule's": lambda state, x: {"lr": fo.schedules.exponential(x, gamma=0.9)},
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("what", OWN)
def test_numbers_of_their_own(what: str, dtype: torch.dtype, together: list[bool]):
    """Steps with them and without, in turn, by one optimizer."""
    opt, g, p = fo.adamw(), stacked(1, dtype=dtype), stacked(0, dtype=dtype)

    def steps(g: Tree, p: Tree, rate: Tensor) -> Any:
        state = opt.init(p)
        for i in range(5):
            own = {} if i == 2 else OWN[what](state, rate)
            p, state = opt.update(g, state, p, **own)
        return p, state

    assert_same(vmap(steps)(g, p, RATES), one_by_one(steps, g, p, RATES))
    assert together == [True] * 5


def test_their_own_numbers_on_other_axes_and_shared_leaves(together: list[bool]):
    """A task's numbers are for its leaves, wherever in memory these are."""
    opt, p, g = fo.adam(), tree.map(lambda x: x[0], stacked(0)), stacked(1)
    state, last = opt.init(p), {key: -1 for key in SHAPES}
    expected = one_by_one(lambda g, x: opt.update(g, state, p, lr=x), g, RATES)
    back = tree.map(lambda x: x.movedim(0, -1).contiguous(), g)
    for given, axes in ((g, 0), (back, last)):
        step = vmap(lambda g, x: opt.update(g, state, p, lr=x), (axes, 0))
        assert_same(step(given, RATES), expected)
    start = tree.map(lambda x: x[0], g)  # of a sweep: only the rate differs
    sweep = lambda x: opt.update(start, state, p, lr=x)  # noqa: E731
    assert_same(vmap(sweep)(RATES), one_by_one(sweep, RATES))
    turned = torch.rand(5, 4, TASKS)  # all tensors of the step have these strides
    first = lambda p, x: opt.update(p, opt.init(p), p, lr=x)[0]  # noqa: E731
    found = vmap(first, (-1, 0))(turned, RATES)
    expected = one_by_one(first, turned.movedim(-1, 0).contiguous(), RATES)
    assert_same(found, expected)
    assert together == [True] * 4


def _untraced(g: Tensor, p: Tensor, *, step: Any, lr: Any) -> tuple[Tensor]:
    return (p - lr * torch.special.erfcx(g),)


NO_KERNEL = fo.elementwise(_untraced, name="odd", slots={}, hyper={"lr": Hyper(0.1)})

#: optimizer, and the values that tasks have of their own
APART: dict[str, tuple[fo.Optimizer, Callable[[Tensor], Any]]] = {
    "more than a number": (fo.adam(), lambda x: {"w": x.expand(2), "b": x, "scale": x}),
    "a slot that is a number": (fo.nadam(), lambda x: x),
    "no kernel": (NO_KERNEL, lambda x: x),
}


@pytest.mark.parametrize("what", APART)
def test_values_of_their_own_that_keep_tasks_apart(what: str, together: list[bool]):
    (opt, values), g, p = APART[what], stacked(1), stacked(0)

    def step(g: Tree, p: Tree, rate: Tensor) -> Any:
        return opt.update(g, opt.init(p), p, lr=values(rate))[0]

    found, expected = vmap(step)(g, p, RATES), one_by_one(step, g, p, RATES)
    for key, x in found.items():
        torch.testing.assert_close(x, expected[key], rtol=1e-14, atol=0)
    assert together == [False]


def test_the_derivative_by_their_own_numbers(together: list[bool]):
    opt, g, p = fo.adamw(), stacked(1), stacked(0)

    def step(rate: Tensor, g: Tree, p: Tree) -> Tensor:
        new, _ = opt.update(g, opt.init(p), p, lr=rate)
        return sum((x**2).sum() for x in tree.leaves(new))  # pyright: ignore

    found = torch.func.grad(lambda rates: vmap(step)(rates, g, p).sum())(RATES)
    alone = [torch.func.grad(step)(*task(i, RATES, g, p)) for i in range(TASKS)]
    torch.testing.assert_close(found, torch.stack(alone), rtol=1e-12, atol=0)
    assert found.abs().min() > 0.1 and not any(together)


def test_steps_of_their_own_keep_tasks_apart(together: list[bool]):
    opt, g, p = fo.adam(), stacked(1), stacked(0)
    state = vmap(opt.init)(p)
    state["step"] = torch.arange(TASKS)[:, None].repeat(1, len(SHAPES))
    found, _ = vmap(opt.update)(g, state, p)
    for i in range(TASKS):
        expected, _ = opt.update(*task(i, g, state, p))
        for key, x in found.items():
            torch.testing.assert_close(x[i], expected[key], rtol=1e-14, atol=0)
    assert together == [False]


def test_vmap_in_vmap(together: list[bool]):
    opt, p = fo.adam(), {"w": torch.randn(2, TASKS, 4)}
    g = {"w": torch.randn(2, TASKS, 4)}
    step = vmap(vmap(lambda g, p: opt.update(g, opt.init(p), p)[0]))
    flat = [{"w": x["w"].flatten(0, 1)} for x in (g, p)]
    expected = vmap(lambda g, p: opt.update(g, opt.init(p), p)[0])(*flat)
    assert torch.equal(step(g, p)["w"].flatten(0, 1), expected["w"])
    assert all(together)


@pytest.mark.parametrize("rates", [RATES, RATES.repeat(2)], ids=len)
@pytest.mark.parametrize("name", SWEPT)
def test_a_sweep_of_numbers_for_each_task(name: str, rates: Tensor):
    """The inner vmap's own, which all tasks of the outer one share."""
    opt = SWEPT[name]
    g, p = stacked(1), stacked(0)

    def sweep(g: Tree, p: Tree) -> Any:
        def steps(rate: Tensor) -> Any:
            new, state = opt.update(g, opt.init(p), p, lr=rate)
            return opt.update(g, state, new, lr=rate)

        return vmap(steps)(rates)

    def one_at_a_time(g: Tree, p: Tree) -> Any:
        rows = [opt.update(g, opt.init(p), p, lr=rate) for rate in rates]
        rows = [opt.update(g, s, new, lr=r) for (new, s), r in zip(rows, rates)]
        return tree.map(lambda *x: torch.stack(x), *rows)

    found, expected = vmap(sweep)(g, p), one_by_one(one_at_a_time, g, p)
    for x, y in zip(tree.leaves(found), tree.leaves(expected), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=0)


@pytest.mark.parametrize("own", [False, True])
def test_a_step_like_the_last_is_not_looked_at(
    own: bool, monkeypatch: pytest.MonkeyPatch
):
    opt, g, p = fo.adam(), stacked(1), stacked(0)
    state = vmap(opt.init)(p)
    for step in (vmapped.step, None):
        monkeypatch.setattr(vmapped, "step", step)
        p, state = vmap(
            lambda g, state, p, x: opt.update(g, state, p, **({"lr": x} if own else {}))
        )(g, state, p, RATES)


Changed: TypeAlias = Callable[[Tree, Any, Tree], tuple[Any, ...]]


def of_half_precision(g: Tree, state: Any, p: Tree) -> tuple[Any, ...]:
    g, p = (tree.map(Tensor.bfloat16, x) for x in (g, p))
    return g, vmap(fo.adam().init)(p), p


#: what comes after equal steps: other gradients, states and parameters of the tasks
CHANGED: dict[str, Changed] = {
    "the same": lambda g, state, p: (g, state, p),
    "fewer tasks": lambda *given: tuple(tree.map(lambda x: x[:2], x) for x in given),
    "shared gradients": lambda g, state, p: (
        tree.map(lambda x: x[:1].expand_as(x), g),
        state,
        p,
    ),
    "other shapes": lambda *given: tuple(
        tree.map(lambda x: x[:, :1] if x.is_floating_point() and x.ndim > 1 else x, x)
        for x in given
    ),
    "other strides": lambda g, state, p: (
        tree.map(lambda x: x.mT.contiguous().mT if x.ndim > 2 else x, g),
        state,
        p,
    ),
    "another dtype": of_half_precision,
    "ages": lambda g, state, p: (
        g,
        {**state, "step": state["step"] + torch.arange(TASKS)[:, None]},
        p,
    ),
    "a gap": lambda g, state, p: ({**g, "b": None}, state, p),
    "followed": lambda g, state, p: (
        tree.map(lambda x: x.clone().requires_grad_(), g),
        state,
        p,
    ),
}


@pytest.mark.parametrize("rate", [None, 0.2, RATES], ids=["no", "a number", "own"])
@pytest.mark.parametrize("what", CHANGED)
def test_what_changes_after_equal_steps(what: str, rate: Any, together: list[bool]):
    opt, g, p = fo.adam(), stacked(1), stacked(0)
    state = vmap(opt.init)(p)
    for _ in range(2):
        p, state = vmap(opt.update)(g, state, p)
    known = len(together)
    given = CHANGED[what](g, state, p)
    rate = rate[: len(given[2]["w"])] if isinstance(rate, Tensor) else rate

    def step(g: Tree, state: Any, p: Tree, rate: Any, how: str | None) -> Any:
        return opt.update(
            g, state, p, execution=how, **({} if rate is None else {"lr": rate})
        )

    dims = (0, 0, 0, 0 if isinstance(rate, Tensor) else None)
    expected, found = (
        fo.func.vmap(partial(step, how=how), dims)(*given, rate)
        for how in ("reference", None)
    )
    for a, b in zip(tree.leaves(found), tree.leaves(expected), strict=True):
        torch.testing.assert_close(
            a, b, rtol=1e-14 if a.dtype != torch.bfloat16 else 0, atol=0
        )
        assert a.requires_grad == b.requires_grad
    apart = what == "ages" or (what == "followed" and isinstance(rate, Tensor))
    assert together[known:] == [not apart]


@pytest.mark.slow
@pytest.mark.parametrize("way", ["autograd", "func"])
def test_derivatives(way: str, together: list[bool]):
    """By a rate that the tasks share, through two steps."""
    opt, p, grads = fo.adamw(), stacked(0), [stacked(1), stacked(2)]

    def loss(rate: Tensor, run: Callable[..., Any]) -> Tensor:
        def steps(p: Tree, *grads: Tree) -> Any:
            state = opt.init(p)
            for g in grads:
                p, state = opt.update(g, state, p, lr=rate)
            return p

        return sum((x**2).sum() for x in tree.leaves(run(steps, p, *grads)))  # pyright: ignore

    def slope(run: Callable[..., Any]) -> Tensor:
        rate = torch.tensor(0.1, dtype=torch.float64)
        if way == "func":
            return torch.func.grad(loss)(rate, run)
        return torch.autograd.grad(loss(rate.requires_grad_(), run), rate)[0]

    found = slope(lambda f, *given: vmap(f)(*given))
    torch.testing.assert_close(found, slope(one_by_one), rtol=1e-12, atol=0)
    assert found.abs() > 1 and all(together) and together


def test_what_does_not_fit_is_said_of_one_task():
    opt, p, g = fo.adam(), stacked(0), stacked(1)
    g["b"] = g["b"][:, :-1]
    with pytest.raises(fo.StructureError, match=r"shape \(4,\), its parameter \(5,\)"):
        vmap(lambda g, p: opt.update(g, opt.init(p), p))(g, p)
    with pytest.raises(fo.ExecutionError, match="donate"):
        vmap(lambda p: opt.update(p, opt.init(p), p, donate=True))(p)
