"""The view of a step: its vjp and jvp fit each other, and the loop that unroll makes."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from row import Case
from table import QUICK
from torch import Tensor
from torch.func import grad, vmap

import funcopt as fo
from funcopt import tree
from funcopt.derivatives import SmoothLeaves, is_smooth

FEW = ("sgd", "lamb", "prodigy")  # the quick run's
SOME = [
    pytest.param(case, id=str(case), marks=() if few else pytest.mark.slow)
    for case in QUICK
    for few in (case.row.name in FEW and case.flags == case.row.combinations[-1],)
]
ASKING = {
    "lbfgs": fo.lbfgs(lr=0.1, max_iter=3),
    "lbfgs, searching": fo.lbfgs(max_iter=3, line_search_fn="strong_wolfe"),
    "sam": fo.sam(fo.adam(lr=0.1), rho=0.3),
    "chain of sam": fo.chain(fo.clip_by_value(0.7), fo.sam(fo.sgd(lr=0.1)), fo.ema(0.9)),
}


@pytest.fixture(autouse=True)
def by_the_reference() -> Iterator[None]:
    """What is asked here is the same by every executor; kernels take long to build."""
    with fo.execution("reference"):
        yield


def random(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def like(values: Any, seed: int) -> Any:
    """Numbers for each smooth leaf, None for the others."""
    leaves, structure = tree.flatten(values)
    return tree.unflatten(
        structure,
        [
            random(*x.shape, seed=seed + i) if is_smooth(x) else None
            for i, x in enumerate(leaves)
        ],
    )


def product(a: Any, b: Any) -> Tensor:
    pairs = [(x, y) for x, y in zip(tree.leaves(a), tree.leaves(b)) if x is not None]
    assert pairs and all(y is not None for _, y in pairs)
    return torch.stack([(x * y).sum() for x, y in pairs]).sum()


def assert_close(found: Any, expected: Any, tolerance: float = 1e-12) -> None:
    a, b = tree.leaves(found), tree.leaves(expected)
    assert len(a) == len(b) > 0
    scale = max(float(y.abs().max()) for y in b if y is not None and y.numel())
    assert scale > 1e-9, "a zero says nothing"
    for x, y in zip(a, b):
        assert (x is None) == (y is None)
        if x is not None and x.numel():
            assert x.shape == y.shape and (x - y).abs().max() <= tolerance * scale


def loss(p: Any, batch: Tensor, meta: Any, *, buffers: Any) -> tuple[Tensor, Any]:
    terms = [(torch.cos(x) * (k + 1.3) + x**2).mean() for k, x in enumerate(present(p))]
    value = meta["weight"] * torch.stack(terms).sum() * batch.square().mean()
    buffers["sum"].add_(value)
    return value, {"mean": torch.stack(terms).mean(), "count": torch.tensor(3)}


def present(values: Any) -> list[Tensor]:
    return [x for x in tree.leaves(values) if x is not None]


def situation(opt: fo.Optimizer, params: Any, hyper: Any) -> dict[str, Any]:
    """What a step depends on, with a state of two steps."""
    rest = {
        "batch": random(4, seed=1),
        "meta": {"weight": torch.tensor(1.3).double(), "gap": None},
        "buffers": {"sum": torch.tensor(0.2).double()},
    }
    run = fo.unroll(opt, loss, params, steps=2, hyper=hyper, has_aux=True, **rest)
    return {"params": run.params, "state": run.state, "hyper": hyper, **rest}


def of_case(case: Case) -> tuple[fo.Optimizer, dict[str, Any]]:
    opt = case.optimizer()
    return opt, situation(opt, case.small(), case.tensors())


def one_step(opt: fo.Optimizer, given: Any, **how: Any) -> dict[str, Any]:
    run = fo.unroll(opt, loss, steps=1, has_aux=True, **given, **how)
    aux = tree.map(lambda x: x[0], run.aux)
    return {**run._asdict(), "aux": aux, "loss": run.losses[0]}


def check_step(opt: fo.Optimizer, given: dict[str, Any]) -> None:
    stepped, pullback = fo.meta.step_vjp(opt, loss, **given, has_aux=True)
    expected = one_step(opt, given)
    assert stepped.aux["count"] == 3
    for name, value in stepped._asdict().items():
        for a, b in zip(tree.leaves(value), tree.leaves(expected[name])):
            assert a is b is None or torch.allclose(a, b, rtol=1e-12, atol=1e-14)
    cotangents = like(stepped._asdict(), seed=50)
    found = pullback(cotangents)
    assert found.keys() == given.keys()
    assert found["meta"]["gap"] is None
    assert tree.leaves(found["state"].get("step")) == [None]

    # by autograd, through `unroll`
    layout = SmoothLeaves(given)
    values, others = layout.split(given)
    values = [x.clone().requires_grad_() for x in values]
    out = one_step(opt, layout.filled(values, others))
    total = product(cotangents, {k: out[k] for k in cotangents})
    slopes = torch.autograd.grad(total, values, materialize_grads=True)
    assert_close(found, layout.with_holes(slopes))

    # and forward: ⟨c, J t⟩ = ⟨Jᵀ c, t⟩
    tangents = like(given, seed=80)
    along_of, along = fo.meta.step_jvp(
        opt, loss, **given, has_aux=True, tangents=tangents
    )
    assert_close(along_of.params, stepped.params)
    assert along["aux"]["count"] is None
    assert_close(product(along, cotangents), product(found, tangents), 1e-10)


@pytest.mark.parametrize("case", SOME)
def test_a_step_of_any_optimizer_forward_and_back(case: Case):
    check_step(*of_case(case))


@pytest.mark.parametrize("name", ASKING)
def test_a_step_that_asks_for_the_loss(name: str):
    opt = ASKING[name]
    params = {"a": random(2, 3, seed=3), "b": random(3, seed=4)}
    assert "loss_fn" in opt.hyper
    check_step(opt, situation(opt, params, {"lr": torch.tensor(0.1).double()}))


@pytest.mark.parametrize("case", SOME)
def test_the_update_alone(case: Case):
    """step_vjp is update_vjp, and the gradient's own derivatives by hvp and mixed_vp."""
    opt, given = of_case(case)
    cotangents = {k: like(given[k], seed=60) for k in ("params", "state")}
    expected = fo.meta.step_vjp(opt, loss, **given, has_aux=True)[1](cotangents)
    of_loss = {k: given[k] for k in ("params", "batch", "meta", "buffers")}
    grads = grad_of_loss(of_loss)
    new, pullback = fo.meta.update_vjp(
        opt, grads, given["state"], given["params"], hyper=given["hyper"]
    )
    assert_close(new[0], one_step(opt, given)["params"])
    back = pullback(cotangents)
    how = {"vector": back["grads"], "has_aux": True, **of_loss}
    curved, mixed = fo.meta.hvp(loss, **how), fo.meta.mixed_vp(loss, **how)
    joint = tree.map(lambda a, b: a + b, back["params"], curved)
    assert_close(joint, expected["params"])
    assert_close((back["state"], back["hyper"]), (expected["state"], expected["hyper"]))
    for name in ("batch", "meta"):
        if case.row.smooth or any(x.any() for x in present(expected[name])):
            assert_close(mixed[name], expected[name])
        else:  # a sign, whose derivative is 0
            assert all(not x.any() for x in present(mixed[name]))


@pytest.mark.parametrize(
    "opt", [fo.adabelief(eps=0.1), fo.adopt(eps=0.1), fo.adam(eps=0.1)], ids=repr
)
def test_a_pullback_without_gradients_of_its_own(opt: fo.Optimizer):
    """It runs when the level of what was saved for it is gone, and here by a kernel."""
    params, grads = ({"w": random(3, 2, seed=s), "b": random(2, seed=s)} for s in (1, 2))
    cotangents = {"params": tree.map(torch.sin, params)}
    state = opt.init(params)
    for _ in range(2):
        params, state = opt.update(tree.map(torch.cos, params), state, params)

    def pulled() -> Any:
        back = fo.meta.update_vjp(opt, grads, state, params)[1]
        return [back(cotangents)["grads"] for _ in range(2)]

    wanted = pulled()
    with torch.no_grad():
        found = pulled()
    for back in found:
        assert_close(back, wanted[0])


def grad_of_loss(of_loss: dict[str, Any]) -> Any:
    chosen = {"params": of_loss["params"]}
    layout = SmoothLeaves(chosen)

    def value(values: list[Tensor]) -> Tensor:
        args = {**of_loss, **layout.filled(values, [])}
        buffers = tree.map(torch.clone, args["buffers"])
        return loss(args["params"], args["batch"], args["meta"], buffers=buffers)[0]

    return layout.with_holes(grad(value)(layout.split(chosen)[0]))["params"]


def squares(p: Tensor, batch: Any) -> Tensor:
    return 0.5 * ((p - batch) ** 2).sum()


def test_the_maps_are_linear_functions_for_vmap():
    opt, p, target = fo.adam(), random(3, seed=1), random(3, seed=2)
    given = (opt, squares, p, opt.init(p), target)
    _, pullback = fo.meta.step_vjp(*given, wrt=("params", "batch"))
    eye = torch.eye(3, dtype=torch.float64)
    rows = vmap(lambda c: pullback({"params": c}))(eye)
    assert rows.keys() == {"params", "batch"}
    columns = vmap(
        lambda t: fo.meta.step_jvp(*given, tangents={"params": t})[1]["params"]
    )
    assert_close(rows["params"], columns(eye).T)
    assert_close(vmap(lambda v: fo.meta.hvp(squares, p, v, target))(eye), eye)
    cross = vmap(lambda v: fo.meta.mixed_vp(squares, p, v, target)["batch"])(eye)
    assert_close(cross, -eye)


def test_what_is_not_given_is_zero():
    opt, p = fo.sgd(momentum=0.5), {"w": random(3, seed=1), "gap": None}
    step = {
        "loss_fn": lambda p, _: squares(p["w"], torch.ones(3)),
        "params": p,
        "state": opt.init(p),
    }
    stepped, pullback = fo.meta.step_vjp(opt, **step, hyper={"lr": 0.1})
    assert stepped.params["gap"] is None
    nothing = pullback({})
    assert torch.equal(nothing["params"]["w"], torch.zeros(3).double())
    assert nothing["hyper"] == {"lr": None} and nothing["batch"] is None
    some = pullback({"params": {"w": None, "gap": None}, "loss": torch.ones(()).double()})
    assert_close(some["params"]["w"], p["w"] - 1)
    along = fo.meta.step_jvp(opt, **step, tangents={"params": None})[1]
    assert torch.equal(along["params"]["w"], torch.zeros(3).double())


@pytest.mark.parametrize("autograd", [False, True])
def test_a_third_derivative_through_a_norm(autograd: bool):
    """torch's own is wrong there: of layer, batch and instance norm, with weights."""
    data, p, v = random(3, 4, seed=1), random(4, seed=2), random(4, seed=3)

    def by_torch(x: Tensor, p: Tensor) -> Tensor:
        return torch.nn.functional.layer_norm(x, (4,), p)

    def by_hand(x: Tensor, p: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * p

    def third(norm: Callable[..., Tensor]) -> list[Tensor]:
        def loss(p: Tensor, x: Tensor) -> Tensor:
            return norm(x * p, p).sin().square().sum()

        def products(p: Tensor) -> Tensor:
            mixed = fo.meta.mixed_vp(loss, p, v, data, wrt=("batch",))["batch"]
            return mixed.square().sum() + fo.meta.hvp(loss, p, v, data).square().sum()

        if not autograd:
            return [grad(products)(p)]
        at = p.clone().requires_grad_()
        return [*torch.autograd.grad(products(at), at)]

    assert_close(third(by_torch), third(by_hand), 1e-9)


def test_of_nothing_that_is_smooth_there_is_no_derivative():
    p, count = random(3, seed=1), torch.tensor(2)
    found = fo.meta.mixed_vp(lambda p, batch: (p**3).sum() * batch, p, p, count)
    assert found == {"batch": None, "meta": None, "buffers": None}
    opt, nothing = fo.adam(), {"gap": None}
    state = opt.init(nothing)
    (stepped, _), pullback = fo.meta.update_vjp(opt, nothing, state, nothing)
    assert stepped == pullback({})["grads"] == nothing


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda s: fo.meta.step_vjp(*s, wrt=("eta",)), ["'eta'", "params"]),
        (lambda s: fo.meta.step_vjp(*s)[1]({"lr": 1.0}), ["'lr'", "cotangents"]),
        (lambda s: fo.meta.step_vjp(*s)[1]({"params": torch.ones(2)}), ["(2,)", "(3,)"]),
        (lambda s: fo.meta.step_vjp(*s)[1]({"params": [1]}), ["list", "(3,)"]),
        (lambda s: fo.meta.step_jvp(*s, tangents={"params": 1.0}), ["float", "(3,)"]),
        (lambda s: fo.meta.hvp(s[1], s[2], torch.ones(2), s[4]), ["(2,)", "(3,)"]),
        (lambda s: fo.meta.mixed_vp(s[1], s[2], s[2], s[4], wrt=("lr",)), ["'lr'"]),
    ],
)
def test_what_does_not_fit_is_refused(call: Callable[[Any], Any], words: list[str]):
    opt, p = fo.sgd(), random(3, seed=1)
    with pytest.raises(fo.StructureError) as caught:
        call((opt, squares, p, opt.init(p), random(3, seed=2)))
    assert all(word in str(caught.value) for word in words)


def test_first_order_takes_no_gradients_of_an_optimizers_own():
    with pytest.raises(fo.HyperparameterError, match=r"lbfgs.*first_order"):
        fo.unroll(
            fo.lbfgs(), squares, torch.ones(2), 1.0, steps=1, grad_mode="first_order"
        )
