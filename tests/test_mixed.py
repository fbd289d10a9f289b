"""Mixed mode and rematerialisation: the same gradients as reverse, from less memory."""

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from row import Case
from table import QUICK
from torch import Tensor, nn
from torch.func import functional_call, grad, jacfwd, jacrev, vjp, vmap

import funcopt as fo
from funcopt import tree
from funcopt.inner import mixed

STEPS = 9
WAYS: dict[str, dict[str, Any]] = {
    "mixed": {"grad_mode": "mixed"},
    "step": {"remat": "step"},
    "sqrt": {"remat": "sqrt"},
    "fours": {"remat": 4},
    "mixed, step": {"grad_mode": "mixed", "remat": "step"},
    "mixed, sqrt": {"grad_mode": "mixed", "remat": "sqrt"},
}
OWN = {name: WAYS[name] for name in ("mixed", "sqrt", "mixed, sqrt")}
#: of the others the quick run takes none
EACH = [pytest.param(way, marks=() if way in OWN else pytest.mark.slow) for way in WAYS]


@pytest.fixture(autouse=True)
def by_the_reference() -> Iterator[None]:
    """What is asked here is the same by every executor; kernels take long to build."""
    with fo.execution("reference"):
        yield


def random(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def number(x: float) -> Tensor:
    return torch.tensor(x, dtype=torch.float64)


def distance(found: Any, expected: Any) -> float:
    """The largest difference, relative to each leaf's largest entry."""
    pairs = list(zip(tree.leaves(found), tree.leaves(expected), strict=True))
    assert pairs and all(y.abs().max() > 1e-12 for _, y in pairs), "a zero says nothing"
    return max(float((x - y).abs().max() / y.abs().max()) for x, y in pairs)


def loss(p: Any, batch: Any, meta: Any, *, buffers: Any) -> tuple[Tensor, Any]:
    x, y, kind = batch
    hidden = torch.tanh(x @ p["in"] + p["bias"])
    error = (hidden @ p["out"] - y) ** 2
    buffers["mean"].mul_(0.9).add_(hidden.mean())
    value = (meta["weight"] * error)[kind >= 0].mean() + 0.1 * buffers["mean"] ** 2
    return value, {"error": error.mean(), "worst": error.argmax(), "bias": p["bias"]}


def arguments() -> dict[str, Any]:
    return {
        "params": {
            "in": random(2, 4, seed=1),
            "bias": random(4, seed=2),
            "out": random(4, 1, seed=3),
        },
        "batch": (random(5, 2, seed=4), random(5, 1, seed=5)),
        "meta": random(5, 1, seed=6).abs(),
        "lr": number(0.1),
        "mean": number(0.3),
    }


ADAM = fo.adam()


def outer(**way: Any) -> Callable[[Any], Tensor]:
    """A scalar of all that an inner loop gives, of all that it is made from."""

    def of_all(a: dict[str, Any]) -> Tensor:
        run = fo.unroll(
            ADAM,
            loss,
            {**a["params"], "gap": None},
            (*a["batch"], torch.arange(5)[:, None]),
            steps=STEPS,
            hyper={"lr": a["lr"]},
            meta={"weight": a["meta"]},
            buffers={"mean": a["mean"]},
            has_aux=True,
            **way,
        )
        assert run.aux["worst"].shape == (STEPS,) and run.params["gap"] is None
        end = sum((x**2).sum() for x in tree.leaves(run.params) if x is not None)
        slots = [x for x in tree.leaves(run.state) if x is not None]
        slots = [x.square().sum() for x in slots if x.is_floating_point()]
        aux = run.aux["error"].prod() + run.aux["bias"].sum()
        weights = torch.arange(1.0, STEPS + 1)  # of each step's loss its own
        return end + sum(slots) + (weights * run.losses).sum() + aux + run.buffers["mean"]

    return of_all


def gradient(function: Callable[[Any], Tensor], how: str) -> list[Tensor]:
    leaves, structure = tree.flatten(arguments())

    def of_leaves(values: list[Tensor]) -> Tensor:
        return function(tree.unflatten(structure, values))

    tasks = [torch.stack([x, 1.1 * x]) for x in leaves]
    if how == "autograd":
        leaves = [x.requires_grad_() for x in leaves]
        return list(torch.autograd.grad(of_leaves(leaves), leaves))
    if how == "grad":
        return grad(of_leaves)(leaves)
    if how == "vmap(grad)":
        return vmap(grad(of_leaves))(tasks)
    if how == "grad(vmap)":
        return grad(lambda tasks: vmap(of_leaves)(tasks).sum())(tasks)
    tasks = [x.requires_grad_() for x in tasks]  # autograd(vmap)
    return list(torch.autograd.grad(vmap(of_leaves)(tasks).sum(), tasks))


HOW = ("autograd", "grad", "vmap(grad)", "grad(vmap)", "autograd(vmap)")
CROSS = [
    pytest.param(way, how, marks=() if few else pytest.mark.slow)
    for way in WAYS
    for how in HOW
    for few in ((how == "grad" or "sqrt" in way) and way in OWN,)
]


@pytest.mark.parametrize("way, how", CROSS)
def test_nine_steps_of_adam_are_those_of_reverse(way: str, how: str):
    found = gradient(outer(**WAYS[way]), how)
    assert distance(found, gradient(outer(), how)) < 1e-14
    if "mixed" not in way and how in HOW[:3]:
        expected = gradient(outer(), how)
        assert all(torch.equal(a, b) for a, b in zip(found, expected))  # every bit


@pytest.fixture
def as_on_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mixed mode goes back by forward over reverse mode, not by the gradient again."""
    monkeypatch.setattr(mixed, "by_forward", lambda _: True)


@pytest.mark.parametrize(
    "way, how",
    [
        pytest.param(
            way,
            how,
            marks=() if how == "grad" and "step" not in way else pytest.mark.slow,
        )
        for way in WAYS
        for how in HOW
        if "mixed" in way
    ],
)
def test_forward_over_reverse_gives_the_same(
    as_on_an_accelerator: None, way: str, how: str
):
    assert distance(gradient(outer(**WAYS[way]), how), gradient(outer(), how)) < 1e-14


@pytest.mark.parametrize("way", OWN)
def test_forward_mode_takes_the_plain_loop(way: str):
    a = arguments()

    def of_lr(lr: Tensor, **how: Any) -> Tensor:
        return outer(**how)({**a, "lr": lr})

    expected = grad(of_lr)(a["lr"])
    assert distance(jacfwd(lambda lr: of_lr(lr, **OWN[way]))(a["lr"]), expected) < 1e-12


# Every optimizer of the registry ------------------------------------------------------

FEW = ("sgd", "lamb", "prodigy")
SOME = [
    pytest.param(case, id=str(case), marks=() if few else pytest.mark.slow)
    for case in QUICK
    for few in (case.row.name in FEW and case.flags == case.row.combinations[-1],)
]


def wavy(p: Any, batch: Tensor, meta: Tensor) -> Tensor:
    terms = [
        (torch.cos(x) * (k + 1.3) + x**2).mean() for k, x in enumerate(tree.leaves(p))
    ]
    return meta * torch.stack(terms).sum() * batch.square().mean()


def of_registry(
    opt: fo.Optimizer, params: Any, hyper: Any, by_func: bool = False, **way: Any
) -> list[Tensor]:
    at = {"p": params, "h": hyper, "b": random(3, 4, seed=7), "m": number(1.3)}
    leaves, structure = tree.flatten(at)
    leaves = [x.clone().requires_grad_(not by_func) for x in leaves]

    def end(leaves: list[Tensor]) -> Tensor:
        a = tree.unflatten(structure, leaves)
        given = {"batches": a["b"], "hyper": a["h"], "meta": a["m"]}
        run = fo.unroll(opt, wavy, a["p"], **given, **way)
        return sum((x**2).sum() for x in tree.leaves(run.params)) + run.losses.sum()

    if by_func:
        return grad(end)(leaves)
    return list(torch.autograd.grad(end(leaves), leaves, materialize_grads=True))


def check_ways(opt: fo.Optimizer, params: Any, hyper: Any) -> None:
    expected = of_registry(opt, params, hyper)
    scale = max(float(x.abs().max()) for x in expected)
    assert scale > 1e-9
    for way in OWN.values():
        for by_func in (False, True):
            found = of_registry(opt, params, hyper, by_func, **way)
            for x, y in zip(found, expected):
                assert (x - y).abs().max() <= 1e-11 * scale


@pytest.mark.parametrize("case", SOME)
def test_any_optimizer_in_any_way(case: Case):
    check_ways(case.optimizer(), case.small(), case.tensors())


ASKING = {
    "lbfgs": fo.lbfgs(max_iter=3),
    "lbfgs, searching": fo.lbfgs(max_iter=3, line_search_fn="strong_wolfe"),
    "sam": fo.sam(fo.adam(), rho=0.3),
    "chain of sam": fo.chain(fo.clip_by_value(0.7), fo.sam(fo.sgd()), fo.ema(0.9)),
}


@pytest.mark.parametrize("name", ASKING)
def test_what_asks_for_the_loss(name: str):
    """Against central differences, and then in every way."""
    opt, params = ASKING[name], {"a": random(2, 3, seed=3), "b": random(3, seed=4)}
    hyper, batches = {"lr": number(0.1)}, random(3, 4, seed=7)
    check_ways(opt, params, hyper)
    weight, step = number(1.3), 1e-6

    def end(meta: Tensor) -> Tensor:
        run = fo.unroll(opt, wavy, params, batches=batches, hyper=hyper, meta=meta)
        return sum((x**2).sum() for x in tree.leaves(run.params)) + run.losses.sum()

    slope = (end(weight + step) - end(weight - step)) / (2 * step)
    assert distance(grad(end)(weight), slope) < 1e-6


# Batches, values per step, windows ----------------------------------------------------


@pytest.mark.parametrize("window", [None, 2, 3])
@pytest.mark.parametrize("way", EACH)
def test_entries_for_each_step_and_windows(way: str, window: int | None):
    p, rates, targets = random(3, seed=1), random(7, seed=2).abs(), random(7, 3, seed=3)
    decay = {"all": number(0.1)}

    def end(values: list[Tensor], **how: Any) -> Tensor:
        p, rates, targets, decay = values
        run = fo.unroll(
            fo.sgd(momentum=0.5),
            lambda p, b, meta: (
                ((p - b["y"]).sin() ** 2).sum() + meta["all"] * (p**3).sum()
            ),
            p,
            batches={"y": targets, "n": torch.arange(7)},
            hyper={"lr": fo.per_step(0.1 * rates), "weight_decay": 0.01},
            meta={"all": decay},
            window=window,
            **how,
        )
        return (run.params**3).sum() + (run.losses**2).sum()

    at = [p, rates, targets, decay["all"]]
    assert distance(grad(lambda a: end(a, **WAYS[way]))(at), grad(end)(at)) < 1e-13


def test_nothing_changes_without_steps_and_without_gradients():
    p = random(3, seed=1)
    run = fo.unroll(fo.adam(), lambda p, b: p.sum(), p, steps=0, remat="sqrt")
    assert torch.equal(run.params, p) and run.losses.shape == (0,)
    with torch.no_grad():
        rows = [
            fo.unroll(fo.adam(), lambda p, b: p.cos().sum(), p, steps=3, **way).params
            for way in ({}, *WAYS.values())
        ]
    assert all(torch.equal(row, rows[0]) and not row.requires_grad for row in rows)


# Second derivatives of the whole ------------------------------------------------------


def quartic(p: Tensor, batch: Tensor) -> Tensor:
    return ((p - batch) ** 4).sum()


def end_of(lr: Tensor, **way: Any) -> Tensor:
    p, target = random(3, seed=1), random(3, seed=2)
    run = fo.unroll(fo.sgd(), quartic, p, target, steps=4, hyper={"lr": 0.1 * lr}, **way)
    return (run.params**3).sum()


@pytest.mark.parametrize("way", EACH)
def test_a_second_derivative_is_right_or_refused(way: str):
    lr = number(0.2)
    expected = grad(grad(end_of))(lr)
    assert distance(grad(grad(lambda x: end_of(x, **WAYS[way])))(lr), expected) < 1e-12
    lr = number(0.2).requires_grad_()
    (slope,) = torch.autograd.grad(end_of(lr, **WAYS[way]), lr, create_graph=True)
    assert distance(torch.autograd.grad(slope, lr), [expected]) < 1e-12

    def penalty(lr: Tensor) -> Tensor:
        slopes = torch.autograd.grad(end_of(lr, **WAYS[way]), lr, create_graph=True)
        return slopes[0] ** 2

    with pytest.raises(fo.GradientLostError, match="second"):
        grad(penalty)(number(0.2))


@pytest.mark.parametrize("window", [2, 3])
@pytest.mark.parametrize("way", EACH)
def test_a_second_derivative_stops_at_a_cut(way: str, window: int):
    lr, how = number(0.2), WAYS[way]
    expected = grad(grad(lambda lr: end_of(lr, window=window)))(lr)
    found = grad(grad(lambda lr: end_of(lr, window=window, **how)))(lr)
    assert distance(found, expected) < 1e-12


@pytest.mark.parametrize("way", EACH)
def test_a_second_derivative_goes_through_buffers_and_state(way: str):
    def of_lr(lr: Tensor, **how: Any) -> Tensor:
        return outer(**how)({**arguments(), "lr": lr})

    lr = number(0.1)
    expected = grad(grad(of_lr))(lr)
    found = grad(grad(lambda lr: of_lr(lr, **WAYS[way])))(lr)
    assert distance(found, expected) < 1e-12


@pytest.mark.parametrize("way", EACH)
@pytest.mark.parametrize("around", [grad, lambda f: vmap(f)])
def test_a_pullback_may_be_called_where_its_level_is_gone(way: str, around: Any):
    """What was saved wears that level's wrapper, and a level around runs on."""
    p, data, weight = random(3, seed=1), random(3, seed=2), random(3, seed=3)

    def loss(p: Tensor, data: Tensor) -> Tensor:
        return (torch.cos(p) + p**2).mean() * data.square().mean()

    def back(x: Tensor, **how: Any) -> Tensor:
        def end(p: Tensor, data: Tensor) -> Tensor:
            return fo.unroll(fo.sgd(lr=0.1), loss, p, data, steps=3, **how).params

        pullback = torch.func.vjp(end, p + x, data)[1]  # x does not reach the data
        return torch.stack([(g**2).sum() for g in pullback(weight)]).sum()

    at = number(0.3) if around is grad else random(4, seed=4) / 4
    found = around(lambda x: back(x, **WAYS[way]))(at)
    assert distance(found, around(back)(at)) < 1e-12


@pytest.mark.parametrize("inside", [True, False])
def test_a_pullback_by_tensors_of_inference_mode(inside: bool):
    opt = fo.sgd(lr=0.02)

    def back(p: Tensor, target: Tensor) -> Tensor:
        state = opt.init(p)
        _, pullback = fo.meta.step_vjp(opt, quartic, p, state, target, grad_mode="mixed")
        return pullback({"params": torch.ones_like(p)})["params"]

    given = random(3, seed=1), random(3, seed=2)
    expected = back(*given)
    with torch.inference_mode():
        copies = [x.clone() for x in given]
        found = back(*copies) if inside else None
    if found is None:
        with torch.no_grad():
            found = back(*copies)
    assert distance(found, expected) < 1e-12


# Random numbers -----------------------------------------------------------------------


def dropped(p: Tensor, x: Tensor) -> Tensor:
    return (F.dropout(x) @ p - 1).square().mean()


@pytest.mark.parametrize("how", ["autograd", "grad", "vmap(grad)"])
@pytest.mark.parametrize("way", EACH)
def test_dropout_is_drawn_again_as_it_was(way: str, how: str):
    x = random(6, 3, seed=1)

    def end(p: Tensor, **how: Any) -> Tensor:
        run = fo.unroll(fo.adam(lr=0.1), dropped, p, x, steps=5, **how)
        return run.params.square().sum() + run.losses.square().sum()

    def slope(**way: Any) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        p = random(3, seed=2)
        if how == "autograd":
            p.requires_grad_()
            found = torch.autograd.grad(end(p, **way), p)[0]
        elif how == "grad":
            found = grad(lambda p: end(p, **way))(p)
        else:
            each = vmap(grad(lambda p: end(p, **way)), randomness="different")
            found = each(torch.stack([p, p]))
        return found, torch.rand(3)  # and the generator is where it was left

    (found, after), (expected, expected_after) = slope(**WAYS[way]), slope()
    assert distance(found, expected) < 1e-14
    assert "mixed" in way or torch.equal(found, expected)  # every bit
    assert torch.equal(after, expected_after)
    if how == "vmap(grad)":
        assert not torch.equal(found[0], found[1])


@pytest.mark.parametrize("way", ["mixed", "mixed, sqrt"])
def test_all_looks_at_a_loss_see_the_same_numbers(as_on_an_accelerator: None, way: str):
    """Its gradient, and then what else of it has a cotangent."""
    x = random(6, 3, seed=1)

    def noisy(p: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        error = F.dropout(x) @ p - 1
        return error.square().mean(), error.sin().sum()

    def end(p: Tensor, **how: Any) -> Tensor:
        run = fo.unroll(fo.adam(lr=0.1), noisy, p, x, steps=5, has_aux=True, **how)
        return run.params.square().sum() + run.losses.sum() + run.aux.sum()

    def slope(**way: Any) -> Tensor:
        torch.manual_seed(0)
        return grad(lambda p: end(p, **way))(random(3, seed=2))

    assert distance(slope(**WAYS[way]), slope()) < 1e-13


@pytest.mark.parametrize("how", ["jacrev", "jacrev twice", "vmap(jacrev)", "pullback"])
@pytest.mark.parametrize("way", EACH)
def test_many_cotangents_see_the_same_numbers(way: str, how: str):
    """vmap over them draws nothing, in whichever of its modes, as without `WAYS`."""
    x, p = random(6, 3, seed=1), random(3, seed=2)

    def cubic(p: Tensor, x: Tensor) -> Tensor:
        return (F.dropout(x) @ p - 1).pow(3).mean()

    def slopes(**way: Any) -> tuple[Tensor, Tensor]:
        def end(p: Tensor) -> Tensor:
            return fo.unroll(fo.adam(lr=0.1), cubic, p, x, steps=4, **way).params

        torch.manual_seed(0)
        if how == "jacrev":
            found = jacrev(end)(p)
        elif how == "jacrev twice":
            found = jacrev(jacrev(end))(p)
        elif how == "vmap(jacrev)":
            tasks = torch.stack([p, 2 * p])
            found = vmap(jacrev(end), randomness="different")(tasks)
        else:
            pull: Any = vjp(end, p)[1]
            found = vmap(lambda bar: pull(bar)[0], randomness="different")(
                torch.eye(3, dtype=p.dtype)
            )
        return found, torch.rand(3)

    (found, after), (expected, expected_after) = slopes(**WAYS[way]), slopes()
    assert distance(found, expected) < 1e-13
    assert torch.equal(after, expected_after)


@pytest.mark.parametrize("way", ["mixed", "step", "sqrt", "mixed, sqrt"])
@pytest.mark.parametrize("device", ["cpu", "accelerator"])
@pytest.mark.parametrize("outside", ["grad", "vmap(grad)"])
def test_a_generator_of_its_own_is_found_out(
    way: str, device: str, outside: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(mixed, "by_forward", lambda _: device == "accelerator")
    generator = torch.Generator().manual_seed(3)

    def loss(p: Tensor, x: Tensor) -> Tensor:
        kept = torch.rand(x.shape, generator=generator) < 0.5
        return (torch.where(kept, x, 0.0) @ p - 1).square().mean()

    def end(p: Tensor) -> Tensor:
        run = fo.unroll(fo.sgd(), loss, p, random(6, 3, seed=1), steps=4, **WAYS[way])
        return run.params.sum()

    slope, p = grad(end), random(3, seed=2)
    if outside == "vmap(grad)":
        slope, p = vmap(slope, randomness="different"), torch.stack([p, 2 * p])
    with pytest.raises(fo.ExecutionError, match="generator of its own"):
        slope(p)


# What a loss closes over --------------------------------------------------------------


def closing(scale: Any, **way: Any) -> Callable[[Tensor], Tensor]:
    def end(p: Tensor) -> Tensor:
        def loss(p: Tensor, _: Any) -> Tensor:
            return scale * (p**3).sum()

        return fo.unroll(fo.sgd(), loss, p, steps=2, **way).params.sum()

    return end


@pytest.mark.parametrize("way", OWN)
@pytest.mark.parametrize(
    "lose",
    [
        lambda end, p, s: end(s.requires_grad_())(p),
        lambda end, p, s: end(s.requires_grad_())(p.requires_grad_()),
        lambda end, p, s: grad(end(s.requires_grad_()))(p),
        lambda end, p, s: vmap(end(s.requires_grad_()))(p[None]),
        lambda end, p, s: vmap(grad(end(s.requires_grad_())))(p[None]),
        lambda end, p, s: grad(lambda s: end(s)(p))(s),
        lambda end, p, s: grad(lambda s: grad(end(s))(p).sum())(s),
        lambda end, p, s: vmap(grad(lambda s: end(s)(p)))(s[None]),
        lambda end, p, s: grad(lambda s: vmap(end(s))(p[None]).sum())(s),
        lambda end, p, s: grad(lambda p: vmap(lambda s: end(s)(p))(s[None]).sum())(p),
    ],
)
def test_a_gradient_by_what_the_loss_closes_over_is_never_lost(lose: Any, way: str):
    with pytest.raises(fo.GradientLostError, match=r"closes over.*meta="):
        lose(lambda s: closing(s, **OWN[way]), random(3, seed=1), number(2.0))


@pytest.mark.parametrize("way", OWN)
def test_a_gradient_by_what_the_optimizer_closes_over_is_never_lost(way: str):
    def end(lr: Tensor) -> Tensor:
        p = random(3, seed=1)
        opt = fo.sgd(lr=lr)
        run = fo.unroll(opt, lambda p, _: (p**3).sum(), p, steps=2, **OWN[way])
        return run.params.sum()

    if way == "mixed":  # the gradient alone runs apart: nothing is lost
        assert grad(end)(number(0.1)).abs() > 0.1
    else:
        with pytest.raises(fo.GradientLostError, match="hyper="):
            grad(end)(number(0.1))


@pytest.mark.parametrize("way", OWN)
def test_what_is_closed_over_and_not_followed_may_stay(way: str):
    p, scale = random(3, seed=1), number(2.0)
    assert distance(grad(closing(scale, **OWN[way]))(p), grad(closing(scale))(p)) < 1e-14
    for at in (scale.requires_grad_(), number(1.0)):
        found = grad(closing(fo.detach(at), **OWN[way]))(p)
        assert distance(found, grad(closing(fo.detach(at)))(p)) < 1e-14

    def each(**way: Any) -> Tensor:  # batched, but by a level inside which all happens
        return vmap(lambda s: grad(closing(s, **way))(p))(random(2, seed=3))

    assert distance(each(**OWN[way]), each()) < 1e-14
    with torch.no_grad():
        closing(number(1.0).requires_grad_(), **OWN[way])(p)


# Losses without a forward derivative --------------------------------------------------


def attention(p: Tensor, x: Tensor) -> Tensor:
    q = (x @ p)[:, None]
    return F.scaled_dot_product_attention(q, q, q).square().mean()


def recurrent() -> tuple[Any, Callable[..., Tensor]]:
    net = nn.LSTM(3, 4)
    params = {k: v.detach() for k, v in net.named_parameters()}
    return params, lambda p, x: functional_call(net, p, (x,))[0].square().mean()


def without_derivative(net: str) -> tuple[Any, Callable[..., Tensor]]:
    x = random(5, 4, 3, seed=1).float()  # of doubles torch's LSTM is made of small parts
    params, inner = random(3, 3, seed=2).float(), attention
    if net == "lstm":
        params, inner = recurrent()

    def end(params: Any, **way: Any) -> Tensor:
        run = fo.unroll(fo.sgd(lr=0.1), inner, params, x, steps=2, **way)
        return torch.stack([(p**2).sum() for p in tree.leaves(run.params)]).sum()

    return params, end


def check_refusal(params: Any, end: Callable[..., Tensor], way: str) -> None:
    leaves = tree.map(lambda p: p.clone().requires_grad_(), params)
    for differentiate in (
        lambda: end(leaves, **WAYS[way]).backward(),
        lambda: grad(lambda p: end(p, **WAYS[way]))(params),
    ):
        with pytest.raises(fo.ExecutionError, match=r"'reverse'.*sdpa_kernel"):
            differentiate()


@pytest.mark.parametrize("way", ["mixed", "mixed, sqrt"])
def test_attention_without_a_second_derivative_says_so(way: str):
    params, end = without_derivative("attention")
    check_refusal(params, end, way)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        found = grad(lambda p: end(p, **WAYS[way]))(params)
        assert distance(found, grad(end)(params)) < 1e-5


@pytest.mark.parametrize("way", ["mixed", "mixed, sqrt"])
def test_torchs_lstm_needs_no_forward_derivative_on_a_cpu(way: str):
    params, end = without_derivative("lstm")
    found = grad(lambda p: end(p, **WAYS[way]))(params)
    assert distance(found, grad(end)(params)) < 1e-5


@pytest.mark.parametrize("way", ["mixed", "mixed, sqrt"])
@pytest.mark.parametrize("net", ["attention", "lstm"])
def test_a_loss_without_a_forward_derivative_says_so(
    as_on_an_accelerator: None, net: str, way: str
):
    params, end = without_derivative(net)
    check_refusal(params, end, way)


# What is kept -------------------------------------------------------------------------

WIDTH, BATCH = 32, 256


def kept_bytes(opt: fo.Optimizer, steps: int, **way: Any) -> int:
    """Bytes that autograd keeps for the way back through an inner loop."""

    class Held:
        def __init__(self, x: Tensor) -> None:
            self.x = x

    held: weakref.WeakSet[Held] = weakref.WeakSet()

    def pack(x: Tensor) -> Held:
        each = Held(x)
        held.add(each)
        return each

    def network(p: list[Tensor], batch: Tensor, meta: Tensor) -> Tensor:
        for w in p:
            batch = torch.tanh(batch @ w)
        return (meta * batch.square().mean(1)).mean()

    params = [random(WIDTH, WIDTH, seed=i).requires_grad_() for i in range(3)]
    meta = random(BATCH, seed=9).abs().requires_grad_()
    x = random(BATCH, WIDTH, seed=8)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda each: each.x):
        run = fo.unroll(opt, network, params, x, steps=steps, meta=meta, **way)
    gc.collect()
    storages = [each.x.untyped_storage() for each in held]
    found = sum({s.data_ptr(): s.nbytes() for s in storages}.values())
    assert run.losses.requires_grad
    return found


CARRY = 3 * WIDTH * WIDTH * 8  # bytes of the parameters
GIVEN = CARRY + BATCH * WIDTH * 8 + BATCH * 8


@pytest.mark.usefixtures("settled")
def test_mixed_keeps_the_carries_and_a_gradient():
    """Reverse: the graph of every inner backward pass."""
    reverse = kept_bytes(fo.sgd(), 1)
    assert kept_bytes(fo.sgd(), 1, grad_mode="mixed") <= reverse / 3
    for steps in (1, 4, 8):
        kept = kept_bytes(fo.sgd(), steps, grad_mode="mixed")
        assert kept <= GIVEN + 2 * steps * CARRY + 1000 * steps
        assert kept <= kept_bytes(fo.sgd(), steps) / 3
    adam = [kept_bytes(fo.adam(), steps, grad_mode="mixed") for steps in (2, 4, 6)]
    assert adam[2] - adam[1] == pytest.approx(adam[1] - adam[0], rel=0.02)
    assert adam[2] - adam[1] <= 2 * 6 * CARRY  # two steps of Adam's own arithmetic


@pytest.mark.slow
@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("mode", ["reverse", "mixed"])
def test_sqrt_keeps_a_root_of_the_carries(mode: str):
    for steps in (1, 4, 16, 64):
        way = {"grad_mode": mode, "remat": "sqrt"}
        carry = 3 * CARRY  # with Adam's two slots
        states = round(steps**0.5)  # the first is given
        expected = GIVEN + 2 * CARRY + (states - 1) * carry
        assert kept_bytes(fo.adam(), steps, **way) == pytest.approx(expected, rel=0.02)
        each = kept_bytes(fo.adam(), steps, grad_mode=mode, remat="step")
        assert each == pytest.approx(expected + (steps - states) * carry, rel=0.02)


# What is refused ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "way, words",
    [
        ({"remat": "root"}, "'root'"),
        ({"remat": 0}, "0"),
        ({"remat": True}, "True"),
        ({"remat": 2.0}, "2.0"),
        ({"remat": "sqrt", "grad_mode": "first_order"}, "first_order"),
        ({"grad_mode": "exact"}, "'mixed'"),
    ],
)
def test_what_is_refused(way: Any, words: str):
    with pytest.raises(fo.HyperparameterError, match=words):
        fo.unroll(fo.sgd(), quartic, torch.ones(3), torch.ones(3), steps=2, **way)
