"""A differentiated step like an earlier one skips the questions, and nothing else."""

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from test_fused_autograd import FEW, number, weighted
from torch import Tensor
from torch.func import functionalize, grad, jacfwd, jacrev, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from trees import assert_close, random_like, relative

import funcopt as fo
from funcopt import tree
from funcopt.execution import dispatch, executor_path, fast_path, fused_autograd
from funcopt.execution.native.kernels import Native
from funcopt.types import Tree

LIKE = {"w": torch.empty(4, 3), "b": torch.empty(5), "none": torch.empty(0)}
OPTIMIZER = fo.adamw(weight_decay=0.1)


@pytest.fixture
def paths(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The steps that went by a fast path."""
    taken: list[Any] = []
    original = fused_autograd.record

    def spy(call: Any, tensors: Any) -> Any:
        taken.append(call)
        return original(call, tensors)

    monkeypatch.setattr(fused_autograd, "record", spy)
    yield taken


def positive(seed: int) -> Tree:
    return tree.map(torch.abs, random_like(LIKE, seed))


def hypers(**others: Any) -> dict[str, Any]:
    return {
        "lr": number(0.1).requires_grad_(),
        "betas": (number(0.9).requires_grad_(), 0.99),
        "eps": 1e-3,
    } | others


def slopes(
    opt: fo.Optimizer,
    name: str | None = None,
    steps: int = 3,
    seed: int = 1,
    outer: Callable[[Any], Tensor] = weighted,
    **others: Any,
) -> list[Tensor]:
    """Of an unrolled run: by its start, gradients and hyperparameters."""
    hyper = hypers(**others)
    params, grads = positive(seed), [positive(seed + 2 + k) for k in range(steps)]
    asked = [x for x in tree.leaves((params, grads)) if x is not None]
    for x in asked:
        x.requires_grad_()
    asked += [x for x in tree.leaves(hyper) if getattr(x, "requires_grad", False)]
    state = opt.init(params)
    for g in grads:
        params, state = opt.update(g, state, params, execution=name, **hyper)
    result = (params, {k: v for k, v in state.items() if k != "step"})
    return list(
        torch.autograd.grad(
            outer(result), asked, allow_unused=True, materialize_grads=True
        )
    )


def assert_slopes(found: list[Tensor], expected: list[Tensor]) -> None:
    """To the bit those of an execution that is named, for which there are no paths."""
    assert any(x.any() for x in expected)
    assert len(found) == len(expected) and all(map(torch.equal, found, expected))


HYPER: dict[str, Callable[[], dict[str, Any]]] = {
    "the same": lambda: {},
    "another number": lambda: {"eps": 1e-2},
    "a tensor for a number": lambda: {"eps": number(1e-2).requires_grad_()},
    "a constant tensor": lambda: {"lr": number(0.2)},
    "a number for a tensor": lambda: {"lr": 0.2},
    "float32": lambda: {"lr": number(0.2, torch.float32).requires_grad_()},
    "zero": lambda: {"weight_decay": 0.0},
    "an overflow": lambda: {"lr": 1e308, "weight_decay": 1e308},
    "for each leaf": lambda: {"lr": {"w": 0.1, "b": 0.2, "none": 0.3}},
    "a tensor for each leaf": lambda: {
        "lr": {key: number(0.2).requires_grad_() for key in LIKE}
    },
    "for each element": lambda: {"lr": positive(9)},
}


@pytest.mark.parametrize("what", HYPER)
def test_hyperparameters_that_change(what: str, paths: list[Any]):
    opt = fo.adamw(weight_decay=0.1)
    for _ in range(2):
        slopes(opt)
    assert len(paths) >= 3
    for _ in range(2):
        found = slopes(opt, **HYPER[what]())
        expected = slopes(opt, "native", **HYPER[what]())
        same = [
            torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(found, expected)
        ]
        assert all(same) and len(found) == len(expected)


LEARNED: dict[str, Callable[[], dict[str, Any]]] = {
    "a rate for all": lambda: {},
    "one for each leaf": HYPER["a tensor for each leaf"],
    "numbers for each leaf": lambda: HYPER["for each leaf"]() | {"eps": 1e-2},
    "one for some leaves": lambda: {
        "lr": {"w": number(0.2).requires_grad_(), "b": 0.1, "none": 0.1}
    },
    "one for each element": lambda: {
        "lr": tree.map(lambda x: x.requires_grad_(), positive(9))
    },
    "of each element, and each leaf": lambda: {
        "lr": positive(9) | {"b": positive(9)["b"].requires_grad_()},
        "weight_decay": {key: number(0.1).requires_grad_() for key in LIKE},
    },
}


@pytest.mark.parametrize("what", LEARNED)
def test_what_is_learned_goes_by_its_fast_path(
    what: str, paths: list[Any], monkeypatch: pytest.MonkeyPatch
):
    opt = fo.adamw(weight_decay=0.1)
    expected = slopes(opt, "native", **LEARNED[what]())
    slopes(opt, **LEARNED[what]())
    taken = len(paths)
    monkeypatch.setattr(dispatch, "step", None)
    for _ in range(2):
        assert all(map(torch.equal, slopes(opt, **LEARNED[what]()), expected))
    assert len(paths) >= taken + 6


OUTER: dict[str, Callable[[Any], Tensor]] = {
    "expanded": lambda r: sum(x.sum() for x in tree.leaves(r)),  # pyright: ignore
    "transposed": lambda r: (r[0]["w"].mT @ torch.rand(4, 2).fill_(0.5)).square().sum(),
    "of a slot alone": lambda r: (r[1]["exp_avg"]["w"] ** 2).sum(),
    "some elements": lambda r: (r[0]["w"][1:, ::2] ** 2).sum(),
    "twice": lambda r: weighted(r) + weighted(r),
}


@pytest.mark.parametrize("what", OUTER)
def test_cotangents_that_change(what: str, paths: list[Any]):
    for _ in range(2):
        slopes(OPTIMIZER)
    found = slopes(OPTIMIZER, outer=OUTER[what])
    assert_slopes(found, slopes(OPTIMIZER, "native", outer=OUTER[what]))
    assert paths


@pytest.mark.parametrize("case", FEW[:3], ids=str)
def test_every_rule_with_kernels(case: Any, paths: list[Any]):
    opt = case.optimizer()
    asked = {k: v for k, v in case.tensors().items() if isinstance(v, Tensor)}

    def run(name: str | None) -> list[Tensor]:
        hyper = tree.map(lambda x: x.clone().requires_grad_(), asked)
        params, state = positive(1), opt.init(positive(1))
        for k in range(case.row.warm + 3):
            params, state = opt.update(
                positive(2 + k), state, params, execution=name, **hyper
            )
        return list(torch.autograd.grad(weighted(params), tree.leaves(hyper)))

    run(None)
    assert_slopes(run(None), run("native"))
    # Of nadam the first alone: then the numbers of its state carry a gradient.
    assert len(paths) > 1 or case.row.name == "nadam"


def by_derivatives(opt: fo.Optimizer, name: str | None, order: int) -> Tensor:
    lr, p = number(0.1).requires_grad_(), positive(1)["w"].double().requires_grad_()
    new, state = p, opt.init(p)
    for _ in range(3):
        new, state = opt.update(new * new, state, new, lr=lr, execution=name)
    slope = (new**2).sum()
    for k in range(order):
        slope = torch.autograd.grad(slope, lr, create_graph=k + 1 < order)[0]
    return slope


@pytest.mark.parametrize("order", [1, 2, 3])
def test_derivatives_of_derivatives(order: int, paths: list[Any]):
    for _ in range(2):
        found = by_derivatives(OPTIMIZER, None, order)
    assert paths
    expected = by_derivatives(OPTIMIZER, "native", order)
    assert torch.equal(found, expected) and expected.any()


def step(opt: fo.Optimizer, p: Tensor, **hyper: Any) -> Tensor:
    g = torch.linspace(0.5, 2.0, p.numel()).view_as(p)
    return opt.update(g, opt.init(p.detach()), p, **hyper)[0]


def leaf() -> Tensor:
    return torch.linspace(1.0, 2.0, 6).requires_grad_()


def test_modes_within_and_without(paths: list[Any]):
    opt = fo.adamw()
    for _ in range(3):
        assert step(opt, leaf()).requires_grad
    taken = len(paths)
    assert taken == 2
    with torch.no_grad():
        for _ in range(3):
            assert not step(opt, leaf()).requires_grad
        assert len(paths) == taken
        with torch.enable_grad():
            assert step(opt, leaf()).requires_grad
    assert len(paths) == taken + 1
    with torch.no_grad():
        assert not step(opt, leaf().detach(), lr=number(0.1)).requires_grad
    p = leaf().detach()
    for _ in range(2):
        assert step(opt, p, lr=number(0.1).requires_grad_()).requires_grad
        assert not step(opt, p, lr=number(0.1)).requires_grad
        with torch.no_grad():
            lr = number(0.1).requires_grad_()
            assert not step(opt, p, lr=lr).requires_grad
    with torch.inference_mode():
        assert step(opt, p).is_inference()


def test_transforms_take_no_fast_path(paths: list[Any]):
    opt = fo.adamw()
    p, rows = leaf().detach(), torch.stack([leaf().detach()] * 3)
    for _ in range(3):
        assert step(opt, leaf()).requires_grad
        assert step(opt, p, lr=number(0.1).requires_grad_()).requires_grad
    taken = len(paths)

    def loss(p: Tensor, lr: Tensor) -> Tensor:
        return (step(opt, p, lr=lr) ** 2).sum()

    first = grad(loss, argnums=(0, 1))(p, number(0.1))
    vmap(grad(loss), in_dims=(0, None))(rows, number(0.1))
    vmap(loss, in_dims=(0, None))(rows, number(0.1))
    escaped: list[Tensor] = []

    def keeping(p: Tensor) -> Tensor:
        escaped.append(p)
        return p.sum()

    grad(keeping)(p)
    step(opt, escaped[0])  # a wrapper of a level that has ended
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(leaf(), torch.ones(6))
        pushed = torch.autograd.forward_ad.unpack_dual(step(opt, dual, lr=number(0.1)))
        assert pushed.tangent is not None
    assert len(paths) == taken
    q, lr = p.clone().requires_grad_(), number(0.1).requires_grad_()
    again = torch.autograd.grad((step(opt, q, lr=lr) ** 2).sum(), (q, lr))
    for a, b in zip(first, again):
        assert relative(a, b) <= 1e-6


def test_a_forward_mode_level_leaves_no_fast_path(paths: list[Any]):
    opt, p = fo.adamw(), leaf().detach()
    with torch.autograd.forward_ad.dual_level():
        step(opt, p)
    step(opt, p)
    assert not paths


def test_backward_twice_and_after_a_write(paths: list[Any]):
    opt = fo.adamw()
    for _ in range(2):
        step(opt, leaf())
    p = leaf()
    new = step(opt, p)
    assert paths
    first = torch.autograd.grad(new.sum(), p, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(new.sum(), p, retain_graph=True)[0])
    with torch.no_grad():
        p.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(new.sum(), p)


def test_saved_tensors_may_come_back_otherwise(paths: list[Any]):
    """Hooks that pack into another layout, or another dtype and back."""
    expected = slopes(OPTIMIZER)
    unpacked: list[Callable[[Tensor], Tensor]] = [
        torch.clone,
        lambda x: x.repeat_interleave(2, 0)[::2] if x.ndim else x,
    ]
    for unpack in unpacked:
        with torch.autograd.graph.saved_tensors_hooks(lambda x: x, unpack):
            for a, b in zip(slopes(OPTIMIZER), expected):
                assert torch.equal(a, b)
    assert paths


def test_donation_is_refused_on_a_fast_path(paths: list[Any]):
    opt, p = fo.adamw(), leaf()
    for _ in range(2):
        step(opt, p)
    with pytest.raises(fo.ExecutionError, match="what a derivative still needs"):
        opt.update(torch.ones(6), opt.init(p), p, donate=True)


def test_a_fast_path_holds_no_tensor():
    opt, p, lr = fo.adamw(), leaf(), number(0.1).requires_grad_()
    for _ in range(3):
        new = step(opt, p, lr=lr)
        torch.autograd.grad(new.sum(), (p, lr))
    gone = [weakref.ref(x) for x in (new, p, lr)]
    del new, p, lr
    gc.collect()
    assert [ref() for ref in gone] == [None] * 3


@pytest.mark.parametrize("grad", [True, False])
def test_nor_does_one_of_several_ways_and_gaps(grad: bool):
    opt = fo.adamw(weight_decay={"w": 0.1, "b": 0.0, "none": 0.0})
    params, lr = gap(positive(1), "none"), number(0.1).requires_grad_()
    state = opt.init(params)
    with torch.set_grad_enabled(grad):
        for seed in range(3):
            grads = gap(positive(seed), "none")
            new = opt.update(grads, state, params, lr=lr)[0]
    given = [params["w"], grads["b"], lr]
    made = [new["w"], new["b"]] if grad else []  # others are written into again
    gone = [weakref.ref(x) for x in (*given, *made)]
    del new, params, state, grads, lr, given, made
    gc.collect()
    assert not any(ref() is not None for ref in gone)


def test_threads_of_several_ways_keep_to_their_numbers():
    opt = fo.adamw(weight_decay={"w": 0.1, "b": 0.0, "none": 0.1})
    params, grads = positive(1), positive(2)
    state, rates = opt.init(params), [0.1 * k for k in range(1, 7)] * 30

    def moved(lr: float) -> Tree:
        return opt.update(grads, state, params, lr=lr)[0]

    expected = {lr: moved(lr) for lr in rates}
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(moved, rates))
    for lr, each in zip(rates, found):
        assert all(torch.equal(each[key], x) for key, x in expected[lr].items())


def test_shapes_that_alternate(paths: list[Any]):
    """One optimizer, more kinds of trees than it remembers ways for."""
    opt = fo.adamw()
    for _ in range(2):
        for n in range(1, 8):
            p = torch.linspace(1.0, 2.0, n).requires_grad_()
            found = torch.autograd.grad((step(opt, p) ** 2).sum(), p)
            looked_at = step(opt, p, execution="native")
            assert torch.equal(*found, *torch.autograd.grad((looked_at**2).sum(), p))


@pytest.mark.parametrize("around", [dict, lambda x: {"net": [x, torch.ones(1)]}])
def test_what_comes_out_has_the_order_of_what_came_in(around: Any):
    """Of the keys of its dicts, which is no part of a tree's structure."""
    opt = fo.sgd(lr=0.1)
    for keys in ("ab", "ba", "ab"):
        params = around({key: torch.ones(ord(key) - 90) for key in keys})
        grads = tree.map(torch.ones_like, params)
        for _ in range(3):
            new, _ = opt.update(grads, opt.init(params), params)
            inner = new if "net" not in new else new["net"][0]
            assert [*inner] == [*keys]
            assert all(len(inner[key]) == ord(key) - 90 for key in keys)


def test_copies_of_an_optimizer_are_independent(paths: list[Any]):
    expected = slopes(OPTIMIZER)
    twin = copy.deepcopy(OPTIMIZER)
    assert twin is not OPTIMIZER
    for _ in range(2):
        assert all(map(torch.equal, slopes(twin), expected))
    assert paths


def test_threads_share_the_fast_paths(paths: list[Any]):
    opt = fo.adamw(weight_decay=0.1)
    seeds = range(6)
    expected = [slopes(opt, seed=seed) for seed in seeds]
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda seed: slopes(opt, seed=seed), [*seeds] * 3))
    for k, each in enumerate(found):
        assert all(map(torch.equal, each, expected[k % len(seeds)]))
    assert paths


PLAIN: dict[str, tuple[Callable[[], fo.Optimizer], dict[str, Any]]] = {
    "one sweep": (fo.adamw, {}),
    "norms of a leaf": (fo.lamb, {}),
    "a sum that is a leaf's number": (fo.novograd, {}),
    "a norm, decay, and a scalar slot": (fo.nadam, {"weight_decay": 0.1}),
    "numbers of the whole tree": (fo.prodigy, {"d0": 0.1}),
    "three sums, two slots": (fo.dog, {"reps_rel": 0.1}),
    "two kinds of totals": (
        lambda **given: fo.chain(
            fo.clip_by_global_norm(0.5), fo.normalize(), fo.lamb(**given)
        ),
        {},
    ),
    "noise for each element": (fo.sgld, {"noise": positive(8)}),
    "a rate for each element": (fo.adamw, {"lr": positive(9)}),
    "and another for each leaf": (
        fo.adamw,
        {"lr": positive(9), "weight_decay": {"w": 0.1, "b": 0.2, "none": 0.3}},
    ),
    "a rate for each column": (
        fo.adamw,
        {"lr": positive(9) | {"w": positive(9)["w"][:1]}, "weight_decay": 0.1},
    ),
    "a vector of one number, for all": (fo.adamw, {"lr": torch.full((1,), 0.1)}),
    "a rate for each leaf": (fo.lars, {"lr": {"w": 0.1, "b": 0.2, "none": 0.3}}),
}


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("what", PLAIN)
def test_a_plain_step_goes_by_its_fast_path(
    what: str, donate: bool, monkeypatch: pytest.MonkeyPatch
):
    """To the bit the steps of native kernels that are asked for by name."""
    factory, options = PLAIN[what]
    given = {k: v for k, v in options.items() if k in ("noise", "lr")}
    opt, named = factory(**options), factory(**options)
    params = positive(1)
    runs = [(tree.map(torch.clone, params), opt.init(params)) for _ in range(2)]
    looked: list[Any] = []
    original = dispatch.step
    monkeypatch.setattr(
        dispatch, "step", lambda *a, **k: looked.append(a) or original(*a, **k)
    )
    for seed in range(2, 7):
        grads = positive(seed)
        expected = named.update(grads, *runs[1][::-1], execution="native", **given)
        looked.clear()
        found = opt.update(grads, *runs[0][::-1], donate=donate, **given)
        assert bool(looked) is (seed == 2)
        pairs = zip(tree.leaves(found), tree.leaves(expected))
        assert all(torch.equal(a, b) for a, b in pairs)
        runs = [found, expected]
    assert not torch.equal(runs[0][0]["w"], params["w"])


def gap(given: Tree, *keys: str) -> Tree:
    return {key: None if key in keys else x for key, x in given.items()}


def two_dtypes(given: Tree) -> Tree:
    return given | {"w": given["w"].double()}


def channels_last(given: Tree) -> Tree:
    image = given["w"].reshape(1, 2, 2, 3).to(memory_format=torch.channels_last)
    return given | {"w": image}


def complex_numbers(given: Tree) -> Tree:
    return given | {"w": torch.complex(given["w"], given["w"].flip(0) - 1)}


#: how params and grads are made of trees like LIKE, and the decay
SEVERAL: dict[str, tuple[Callable[[Tree], Tree], Callable[[Tree], Tree], Any]] = {
    "no decay": (dict, dict, {"w": 0.1, "b": 0.0, "none": 0.1}),
    "two dtypes": (two_dtypes, two_dtypes, 0.1),
    "channels last": (channels_last, channels_last, 0.1),
    "gradients in another order": (
        channels_last,
        lambda given: {k: x.contiguous() for k, x in channels_last(given).items()},
        0.1,
    ),
    "no gradient": (dict, lambda given: gap(given, "b"), 0.1),
    "no parameter": (lambda given: gap(given, "w"), lambda given: gap(given, "w"), 0.1),
    "complex": (complex_numbers, complex_numbers, 0.1),
    "conjugate gradients": (
        complex_numbers,
        lambda given: {k: x.conj() for k, x in complex_numbers(given).items()},
        {"w": 0.1, "b": 0.0, "none": 0.1},
    ),
    "complex, and a gap": (
        complex_numbers,
        lambda given: gap(complex_numbers(given), "b"),
        0.1,
    ),
    "gaps of both kinds, no decay, two dtypes": (
        lambda given: two_dtypes(given) | {"none": None, "c": given["b"] + 1},
        lambda given: two_dtypes(given) | {"none": None, "b": None, "c": given["b"]},
        {"w": 0.0, "b": 0.1, "none": 0.1, "c": 0.0},
    ),
}


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("what", SEVERAL)
@pytest.mark.parametrize(
    "factory",
    [
        fo.adamw,
        fo.nadam,
        fo.lamb,
        lambda **given: fo.chain(fo.clip_by_global_norm(0.5), fo.adamw(**given)),
    ],
    ids=["adamw", "nadam", "lamb", "chain"],
)
def test_leaves_that_go_several_ways_or_stay(
    factory: Callable[..., fo.Optimizer],
    what: str,
    donate: bool,
    monkeypatch: pytest.MonkeyPatch,
):
    make_params, make_grads, decay = SEVERAL[what]
    if factory is fo.lamb and make_params is complex_numbers:
        pytest.skip("a rule with norms takes no complex leaf")
    opt, named = factory(weight_decay=decay), factory(weight_decay=decay)
    params = make_params(positive(1))
    runs = [(tree.map(torch.clone, params), opt.init(params)) for _ in range(2)]
    looked: list[Any] = []
    original = dispatch.step
    monkeypatch.setattr(
        dispatch, "step", lambda *a, **k: looked.append(a) or original(*a, **k)
    )
    for seed in range(2, 6):
        grads, before = make_grads(positive(seed)), runs[0][0]
        expected = named.update(grads, *runs[1][::-1], execution="native")
        looked.clear()
        found = opt.update(grads, *runs[0][::-1], donate=donate)
        assert bool(looked) is (seed == 2)
        pairs = zip(tree.leaves(found), tree.leaves(expected), strict=True)
        assert all(a is b is None or torch.equal(a, b) for a, b in pairs)
        for key, g in grads.items():
            assert (found[0][key] is before[key]) is (donate or g is None)
        runs = [found, expected]
    first = next(key for key, g in grads.items() if g is not None)
    assert not torch.equal(runs[0][0][first], params[first])


def test_a_part_that_refuses_when_another_is_written():
    """The long way steps the rest: each leaf is stepped once."""
    opt = fo.lamb(weight_decay={"w": 0.1, "b": 0.0, "none": 0.1})
    params = positive(1)
    state, large = opt.init(params), positive(2) | {"b": positive(2)["b"] * 3e38}
    for grads in (positive(2), large):
        expected = opt.update(grads, state, params, execution="native")
        params, state = opt.update(grads, state, params, donate=True)
        for a, b in zip(tree.leaves((params, state)), tree.leaves(expected)):
            assert torch.equal(a.nan_to_num(), b.nan_to_num())


def test_what_several_parts_refuse_changes_nothing():
    opt = fo.adamw(weight_decay={"w": 0.1, "b": 0.0, "none": 0.1})
    params = positive(1)
    state = opt.init(params)
    for _ in range(2):
        opt.update(positive(2), state, params, donate=True)
    before = tree.map(torch.clone, (params, state))
    shared = params | {"b": params["w"].reshape(-1)[:5]}
    with pytest.raises(fo.ExecutionError, match="memory"):
        opt.update(positive(2), state, shared, donate=True)
    rate = {"w": 0.1, "b": torch.tensor(0.1).requires_grad_(), "none": 0.1}
    with pytest.raises(fo.ExecutionError):
        opt.update(positive(2), state, params, donate=True, lr=rate)
    pairs = zip(tree.leaves(before), tree.leaves((params, state)))
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("factory", [fo.adamw, fo.lamb, fo.adafactor, fo.muon])
def test_a_learned_rate_goes_by_the_fast_path_where_nothing_is_recorded(
    factory: Callable[[], fo.Optimizer], monkeypatch: pytest.MonkeyPatch
):
    opt, params = factory(), {"w": positive(1)["w"]}
    state, lr = opt.init(params), torch.tensor(0.1).requires_grad_()
    looked: list[Any] = []
    original = dispatch.step
    monkeypatch.setattr(
        dispatch, "step", lambda *a, **k: looked.append(a) or original(*a, **k)
    )
    for seed in range(2, 6):
        grads = {"w": positive(seed)["w"]}
        expected = opt.update(grads, state, params, lr=0.1)
        looked.clear()
        with torch.no_grad():
            found = opt.update(grads, state, params, lr=lr)
        assert not looked
        assert torch.allclose(found[0]["w"], expected[0]["w"], rtol=1e-6)
        assert not torch.equal(found[0]["w"], params["w"])
        recorded, _ = opt.update(grads, state, params, lr=lr)
        (slope,) = torch.autograd.grad(recorded["w"].sum(), lr)
        assert slope != 0 and slope.isfinite()
        params, state = found


def settled(opt: fo.Optimizer, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Steps of this optimizer that were asked no more than their tensors."""
    taken: list[Any] = []
    original = executor_path.ExecutorPath.settled

    def spy(self: Any, hyper: Any, donate: bool) -> Any:
        step = original(self, hyper, donate)
        return step and (lambda *given: taken.append(given) or step(*given))

    monkeypatch.setattr(executor_path.ExecutorPath, "settled", spy)
    return taken


UNSETTLED: dict[str, Callable[[Any, Any, Any, Any], Any]] = {
    "an override": lambda opt, g, s, p: opt.update(g, s, p, donate=True, lr=0.5),
    "a tensor": lambda opt, g, s, p: opt.update(g, s, p, donate=True, lr=number(0.5)),
    "a rate for each leaf": lambda opt, g, s, p: opt.update(
        g, s, p, donate=True, lr={"w": 0.1, "b": 0.2, "none": 0.3}
    ),
    "pure": lambda opt, g, s, p: opt.update(g, s, p),
    "pure, of the same tensors": lambda opt, g, s, p: (
        opt.update(g, s, p) and opt.update(g, s, p, donate=True)
    ),
    "by name": lambda opt, g, s, p: opt.update(g, s, p, donate=True, execution="native"),
    "a leaf that is older": lambda opt, g, s, p: opt.update(
        g, s | {"step": s["step"] + torch.tensor([0, 1, 2])}, p, donate=True
    ),
    "transposed": lambda opt, g, s, p: opt.update(
        g | {"w": g["w"].T.contiguous().T}, s, p, donate=True
    ),
    "a leaf that stays": lambda opt, g, s, p: opt.update(
        g | {"b": None}, s, p, donate=True
    ),
    "other tensors": lambda opt, g, s, p: opt.update(
        tree.map(torch.clone, g), s, tree.map(torch.clone, p), donate=True
    ),
}


@pytest.mark.parametrize("factory", [fo.adamw, fo.rmsprop, partial(fo.sgd, momentum=0.9)])
@pytest.mark.parametrize("what", UNSETTLED)
@pytest.mark.parametrize("donate", [False, True])
def test_steps_that_are_settled_and_one_that_is_not(
    donate: bool, what: str, factory: Any, monkeypatch: pytest.MonkeyPatch
):
    """To the bit the steps of an optimizer that never made any, and counted alike."""
    opt = factory(lr=0.1)
    taken = settled(opt, monkeypatch)
    params = positive(1)
    state = opt.init(params)
    for k, call in enumerate(3 * [None] + [UNSETTLED[what]] + 3 * [None]):
        grads = positive(2 + k)
        given = [grads, *map(partial(tree.map, torch.clone), (state, params))]
        old = [x._version for x in tree.leaves((state, params))]
        if call is None:
            expected = factory(lr=0.1).update(*given, execution="native")
            found = opt.update(grads, state, params, donate=donate)
            new = [x._version for x in tree.leaves((state, params))]
            assert all((a < b) is donate for a, b in zip(old, new))
            assert (found[0] is params) is donate
            params, state = found
        else:
            expected = call(factory(lr=0.1), *given)
            found = params, state = call(opt, grads, state, params)
        for a, b in zip(tree.leaves(found), tree.leaves(expected), strict=True):
            assert torch.equal(a, b)
    assert taken


def test_a_settled_step_refuses_what_shares_memory(monkeypatch: pytest.MonkeyPatch):
    opt, params = fo.adamw(), positive(1)
    taken, state = settled(opt, monkeypatch), opt.init(params)
    for k in range(3):
        opt.update(positive(2 + k), state, params, donate=True)
    assert taken
    shared = params["w"]
    for grads in (positive(2) | {"w": shared}, positive(2) | {"b": shared.view(-1)[:5]}):
        before = tree.map(torch.clone, (params, state))
        with pytest.raises(fo.ExecutionError, match="share memory"):
            opt.update(grads, state, params, donate=True)
        pairs = zip(tree.leaves((params, state)), tree.leaves(before))
        assert all(torch.equal(a, b) for a, b in pairs)


def test_a_settled_step_and_the_modes_in_force(monkeypatch: pytest.MonkeyPatch):
    opt, params = fo.adamw(), positive(1)
    taken, state = settled(opt, monkeypatch), opt.init(params)

    def in_place(**others: Any) -> None:
        opt.update(positive(2), state, params, donate=True, **others)

    for _ in range(3):
        in_place()
    count = len(taken)
    assert count
    with fo.execution("reference"):
        in_place()
    with torch.autograd.forward_ad.dual_level(), pytest.raises(fo.ExecutionError):
        in_place()
    with pytest.raises(fo.ExecutionError):
        grad(lambda x: in_place() or x)(torch.ones(()))
    params["w"].requires_grad_()
    with pytest.raises(fo.ExecutionError):
        in_place()
    with torch.no_grad():
        in_place()
    assert len(taken) == count


@pytest.mark.parametrize("donate", [False, True])
def test_a_sum_that_overflows_is_looked_at_anew(donate: bool):
    opt, params = fo.lamb(), positive(1)
    state, large = opt.init(params), tree.map(lambda x: x * 3e38, positive(2))
    for grads in (positive(2), large):
        expected = opt.update(grads, state, params, execution="native")
        params, state = opt.update(grads, state, params, donate=donate)
        for a, b in zip(tree.leaves((params, state)), tree.leaves(expected)):
            assert torch.equal(a.nan_to_num(), b.nan_to_num())


def _adapted(name: str | None, opt: fo.Optimizer, p: Tensor, lr: Tensor) -> Tensor:
    """What three steps on a quartic make of p, as a number."""
    params: Any = {"w": p, "v": p.cos(), "still": torch.ones(2)}
    state = opt.init(params)
    for _ in range(3):
        grads = grad(lambda q: (q["w"] ** 4 * q["v"]).sum())(params)
        grads["still"] = None
        params, state = opt.update(grads, state, params, lr=lr, execution=name)
    return (params["w"] ** 2 - params["v"]).sum() + state["step"].sum()


FOLLOWED: dict[str, Callable[..., Any]] = {
    "grad": lambda f, p, lr: grad(f, argnums=(0, 1))(p[0], lr[0]),
    "vmap(grad)": lambda f, p, lr: vmap(grad(f, argnums=(0, 1)))(p, lr),
    "vmap(grad), shared": lambda f, p, lr: vmap(grad(f), (0, None))(p, lr[0]),
    "grad(vmap)": lambda f, p, lr: grad(lambda q: vmap(f)(q, lr).sum())(p),
    "grad(grad)": lambda f, p, lr: grad(
        lambda x: (grad(f)(p[0], x) ** 2).sum() + grad(f, argnums=1)(p[0], x)
    )(lr[0]),
    "jvp(grad)": lambda f, p, lr: torch.func.jvp(
        lambda x: grad(f)(p[0], x), (lr[0],), (lr[1],)
    ),
    "jacfwd(jacrev)": lambda f, p, lr: torch.func.hessian(f)(p[0], lr[0]),
    "autograd": lambda f, p, lr: torch.autograd.grad(
        f(q := p[0].clone().requires_grad_(), x := lr[0].clone().requires_grad_()), (q, x)
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("how", FOLLOWED)
@pytest.mark.parametrize(
    "opt",
    [
        fo.sgd(momentum=0.9, weight_decay=0.1),
        fo.sgd(weight_decay={"w": 0.1, "v": 0.0, "still": 0.0}),
        fo.nadam(),
        fo.asgd(lambd=0.1, t0=0.0),
        fo.lars(),
        fo.chain(fo.clip_by_global_norm(0.1), fo.sgd()),
    ],
    ids=lambda opt: opt.name,
)
def test_steps_that_torch_follows_take_a_fast_path(
    opt: fo.Optimizer, how: str, monkeypatch: pytest.MonkeyPatch
):
    """To the bit what each is without, whatever was stepped before, and by what."""
    taken = []
    original = fast_path.ReferencePath.run

    def spy(self: Any, *args: Any) -> Any:
        taken.append(how)
        return original(self, *args)

    monkeypatch.setattr(fast_path.ReferencePath, "run", spy)
    numbers = torch.Generator().manual_seed(0)
    p = torch.rand(2, 3, generator=numbers, dtype=torch.float64) + 0.5
    lr = torch.tensor([0.1, 0.02], dtype=torch.float64)
    for transform in (FOLLOWED[how], *FOLLOWED.values(), FOLLOWED[how]):
        found, expected = (
            tree.leaves(transform(partial(_adapted, name, opt), p, lr))
            for name in (None, "reference")
        )
        assert any(x.any() for x in expected)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-15)
    assert taken or opt.name in ("nadam", "chain")


def test_followed_tasks_of_different_ages():
    """Their steps are tensors within vmap, where others' were numbers."""
    opt = fo.nadam()
    p = torch.linspace(0.5, 2, 6, dtype=torch.float64).reshape(2, 3)
    old = vmap(opt.init)(p)
    _, newer = vmap(opt.update)(p, old, p)
    ages = tree.map(lambda a, b: torch.stack([a[0], b[1]]), old, newer)

    def slope(name: str | None, p: Tensor, state: Any) -> Tensor:
        def value(q: Tensor) -> Tensor:
            return (opt.update(q, state, q, execution=name)[0] ** 2).sum()

        return grad(value)(p)

    for _ in range(2):
        for state in (old, ages, newer):
            found, expected = (
                vmap(partial(slope, name))(p, state) for name in (None, "reference")
            )
            torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize(
    "opt",
    [fo.signsgd(), fo.sgd(momentum=0.9), fo.adamw(), fo.asgd()],
    ids=lambda opt: opt.name,
)
@pytest.mark.parametrize("followed", [False, True])
def test_a_fast_path_of_shared_numbers_and_tasks_with_their_own(
    opt: fo.Optimizer, followed: bool
):
    p = torch.linspace(0.5, 2, 12, dtype=torch.float64).reshape(2, 6)
    p.requires_grad_(followed)

    def stepped(name: str | None, p: Tensor, lr: Any) -> Tensor:
        state = opt.init(p)
        for _ in range(2):
            p, state = opt.update(torch.sin(p), state, p, lr=lr, execution=name)
        return p

    rates = torch.tensor([0.1, 0.3], dtype=torch.float64)
    for lr in (0.2, rates, rates[0], rates, 0.1, rates):
        axis = 0 if lr is rates else None
        found, expected = (
            vmap(partial(stepped, name), (0, axis))(p, lr) for name in (None, "reference")
        )
        torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)


@pytest.fixture
def spread(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The fast paths' streams that have but one number for each leading entry."""
    found: list[Any] = []
    original = Native.direct

    def spy(self: Any, *given: Any, **how: Any) -> Any:
        found.append(how.get("spread"))
        return original(self, *given, **how)

    monkeypatch.setattr(Native, "direct", spy)
    yield found


def tasks(count: int, *shapes: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    return random_like([torch.empty(count, *shape) for shape in shapes], seed)


def one_each(p: Tensor, scale: float = 0.1) -> Tensor:
    """Another positive number for each leading entry."""
    return (scale * torch.linspace(0.5, 1.5, len(p))).view(-1, *[1] * (p.ndim - 1))


#: shapes, hyperparameters of leaves like those, and the streams that are to be spread
SPREAD: dict[str, tuple[Any, Callable[[list[Tensor]], dict[str, Any]], list[int]]] = {
    "a rate": ([(90, 70), (150,)], lambda p: {"lr": [*map(one_each, p)]}, [4]),
    "a rate, one number a task": (
        [(90, 70), ()],
        lambda p: {"lr": [*map(one_each, p)]},
        [4],
    ),
    "many blocks": ([(9001,)], lambda p: {"lr": [*map(one_each, p)]}, [4]),
    "a rate, and a tensor's decay": (
        [(40, 30)],
        lambda p: {
            "lr": [*map(one_each, p)],
            "weight_decay": [torch.rand_like(x) for x in p],
        },
        [4],
    ),
    "each number": (
        [(90, 70), (150,)],
        lambda p: {
            "lr": [*map(one_each, p)],
            "betas": ([*map(one_each, p)], 0.99),
            "weight_decay": [*map(one_each, p)],
            "eps": [*map(one_each, p)],
        },
        [4, 5, 6, 7],
    ),
    "more than columns to fill": (
        [(90, 70), (150,)],
        lambda p: {
            "lr": [*map(one_each, p)],
            "betas": ([*map(one_each, p)], [one_each(x, 0.5) for x in p]),
            "weight_decay": [*map(one_each, p)],
            "eps": [*map(one_each, p)],
        },
        [4, 5, 6, 7, 8],
    ),
    "short leaves": ([(3,), (5,)], lambda p: {"lr": [*map(one_each, p)]}, []),
    "a rate for each column": (
        [(90, 70)],
        lambda p: {"lr": [torch.rand(1, 1, 70)]},
        [],
    ),
    "rates that lie apart": (
        [(90, 70)],
        lambda p: {"lr": [one_each(torch.empty(14, 1, 1))[::2]]},
        [],
    ),
}


@pytest.mark.parametrize("donate", [False, True], ids=["pure", "in place"])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", SPREAD)
def test_one_number_for_each_leading_entry_is_not_copied(
    name: str, threads: int, donate: bool, spread: list[Any]
):
    shapes, hypers, expected = SPREAD[name]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        opt, p = fo.adamw(), tasks(7, *shapes)
        q, grads = [x.clone() for x in p], tasks(7, *shapes, seed=1)
        state, other = opt.init(p), opt.init(q)
        for seed in range(3):
            torch.manual_seed(seed)
            given = hypers(p)
            p, state = opt.update(grads, state, p, donate=donate, **given)
            q, other = opt.update(grads, other, q, execution="native", **given)
            found, wanted = tree.leaves((p, state)), tree.leaves((q, other))
            assert all(map(torch.equal, found, wanted))
    finally:
        torch.set_num_threads(before)
    assert spread and all([*x] == expected for x in spread)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.complex64])
@pytest.mark.parametrize("opt", [fo.sgd(), fo.lion(), fo.nadam()], ids=lambda o: o.name)
def test_one_number_for_each_leading_entry_in_other_dtypes(
    opt: fo.Optimizer, dtype: torch.dtype, spread: list[Any]
):
    like = [torch.empty(5, 40, 9, dtype=dtype), torch.empty(5, 99, dtype=dtype)]
    p = q = [torch.randn_like(x) for x in like]
    grads = [torch.randn_like(x) for x in like]
    state = other = opt.init(p)
    decay = [one_each(x) for x in like]
    for _ in range(3):
        p, state = opt.update(grads, state, p, weight_decay=decay)
        q, other = opt.update(grads, other, q, weight_decay=decay, execution="native")
        found, wanted = tree.leaves((p, state)), tree.leaves((q, other))
        assert all(map(torch.equal, found, wanted))
    assert any(spread)


@pytest.mark.slow
@pytest.mark.parametrize("factory", [fo.sgd, fo.adamw, fo.adafactor, fo.prodigy])
def test_what_is_traced_after_plain_steps_is_the_rule(factory: Callable[..., Any]):
    """A fast path would give the tracer tensors of which it knows nothing: constants."""
    opt, params = factory(lr=0.1), positive(1)
    state, others = opt.init(params), random_like(LIKE, 3)
    for _ in range(3):
        opt.update(random_like(LIKE, 2), state, params)
    traced = make_fx(lambda *given: opt.update(*given))(
        random_like(LIKE, 2), state, params
    )
    assert_close(traced(others, state, params), opt.update(others, state, params), 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("opt", [fo.adafactor(), fo.soap()], ids=lambda opt: opt.name)
def test_a_step_is_traced_with_shapes_that_are_symbols(opt: fo.Optimizer):
    """A rule that takes its leaf whole has slots whose shapes are made of the leaf's."""
    p = torch.eye(3) + 1
    given = 2 * p, opt.update(p, opt.init(p), p)[1], p
    traced = make_fx(lambda *given: opt.update(*given), tracing_mode="symbolic")(*given)
    others = -p.square(), *given[1:]
    assert_close(traced(*others), opt.update(*others), 1e-6)


FUNCTIONALIZED: dict[str, Callable[[Any], Any]] = {
    "itself": functionalize,
    "its derivative": lambda f: functionalize(jacrev(f)),
    "within a derivative": lambda f: jacrev(functionalize(f)),
    "within forward mode": lambda f: jacfwd(functionalize(f)),
    "within vmap": lambda f: lambda lr: vmap(functionalize(f))(torch.stack([lr, 2 * lr])),
    "within a trace": lambda f: lambda lr: make_fx(functionalize(f))(2 * lr)(lr),
}
_PLAIN: dict[str, Callable[[Any], Any]] = {
    "its derivative": jacrev,
    "within a derivative": jacrev,
    "within forward mode": jacfwd,
    "within vmap": lambda f: lambda lr: vmap(f)(torch.stack([lr, 2 * lr])),
}


@pytest.mark.parametrize("how", FUNCTIONALIZED)
@pytest.mark.parametrize("mode", ["reverse", "mixed"])
@pytest.mark.parametrize(
    "opt",
    [
        fo.sgd(),
        fo.adamw(),
        fo.muon(ns_dtype=None),
        pytest.param(fo.shampoo(), marks=pytest.mark.slow),
    ],
    ids=lambda opt: opt.name,
)
def test_steps_are_functionalized(opt: fo.Optimizer, mode: Any, how: str):
    """torch has no rule of ``functionalize`` for an autograd.Function."""
    start = torch.tensor([[1.0, 2.0, -1.5], [0.5, -3.0, 1.0]], dtype=torch.float64)

    def stepped(lr: Tensor) -> Tensor:
        return fo.unroll(
            opt,
            lambda p, _: (p**4).sum(),
            start,
            steps=2,
            hyper={"lr": lr},
            grad_mode=mode,
            remat="step" if mode == "mixed" else None,
        ).params

    found = FUNCTIONALIZED[how](stepped)(number(0.1))
    expected = _PLAIN.get(how, lambda f: f)(stepped)(number(0.1))
    assert (expected != 0).all()
    assert_close(found, expected, 1e-9)


def test_soap_is_functionalized_without_its_derivative():
    opt, p = fo.soap(lr=0.1), torch.eye(3) + 1

    def stepped(lr: Tensor) -> Tensor:
        new, state = opt.update(p + lr, opt.init(p), p)
        return opt.update(p, state, new)[0]

    assert_close(functionalize(stepped)(number(0.1)), stepped(number(0.1)), 1e-6)
    with pytest.raises(fo.GradientLostError, match="functionalize"):
        jacrev(functionalize(stepped))(number(0.1))
