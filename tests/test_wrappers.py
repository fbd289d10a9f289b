"""Optimizers that make steps of another one: when, on what, and in which precision."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, vmap
from torch.utils._python_dispatch import BaseTorchDispatchMode
from trees import assert_close, assert_moved, assert_same, mixed, random_like, small

import funcopt as fo
from funcopt import tree
from funcopt.types import Tree

MAKE: dict[str, Callable[[], fo.Optimizer]] = {
    "adamw": lambda: fo.adamw(lr=0.1, eps=0.01),
    "chain": lambda: fo.chain(
        fo.clip_by_global_norm(0.7), fo.sgd(lr=0.1, momentum=0.9), fo.ema(0.5)
    ),
    "partition": lambda: fo.partition(
        {"a": fo.sgd(lr=0.1, momentum=0.9), "b": fo.adamw(lr=0.1, eps=0.01)},
        fo.by_name({"*w*": "a"}, default="b"),
    ),
}
inner = pytest.mark.parametrize("make", MAKE.values(), ids=MAKE.keys())


def gradients(params: Tree, count: int) -> list[Tree]:
    return [random_like(params, 70 + k) for k in range(count)]


def mean(trees: list[Tree]) -> Tree:
    return tree.map(lambda *x: sum(x) / len(x), trees[0], *trees[1:])


def stacked(trees: list[Tree]) -> tuple[list[Tensor], Callable[..., Tree]]:
    return tree.without_none(tree.map(lambda *x: torch.stack(x), trees[0], *trees[1:]))


def assert_donates(opt: fo.Optimizer, params: Tree, grads: list[Tree], **given: Any):
    """The same steps by tensors that stay the same; also in a mode, which reads none."""
    for within in (nullcontext, BaseTorchDispatchMode):
        expected = params, opt.init(params)
        own = tree.map(torch.clone, params)
        donated = own, opt.init(own)
        before = tree.without_none(donated)[0]
        for g in grads:
            expected = opt.update(g, expected[1], expected[0], **given)
            with within():
                donated = opt.update(g, donated[1], donated[0], donate=True, **given)
        assert_close(tree.without_none(donated)[0], tree.without_none(expected)[0], 1e-6)
        after = tree.without_none(donated)[0]
        assert all(a is b for a, b in zip(before, after, strict=True))


# accumulate ----------------------------------------------------------------------------


@inner
@pytest.mark.parametrize("k", [1, 3])
def test_accumulate_steps_by_the_mean(make: Any, k: int):
    opt, plain, params = fo.accumulate(make(), k), make(), mixed()
    state, expected = opt.init(params), (params, plain.init(params))
    grads = gradients(params, 4 * k)
    for i, g in enumerate(grads):
        last = params
        params, state = opt.update(g, state, params)
        if (i + 1) % k:
            for a, b in zip(tree.leaves(params), tree.leaves(last)):
                assert a is b
            continue
        step = mean(grads[i + 1 - k : i + 1])
        expected = plain.update(step, expected[1], expected[0])
        assert_close(params, expected[0], 1e-14)
    assert_close(
        tree.without_none(state["optimizer"])[0],
        tree.without_none(expected[1])[0], 1e-14,
    )  # fmt: skip


def test_accumulate_in_float32():
    """256 halves, of which the later ones would not change a sum of halves."""
    opt = fo.accumulate(fo.sgd(lr=1.0), 1024)
    p = torch.zeros(1, dtype=torch.bfloat16)
    state = opt.init(p)
    assert state["mean"].dtype is torch.float32
    for k in range(1024):
        g = torch.full((1,), 1.0 + k % 2, dtype=torch.bfloat16)
        p, state = opt.update(g, state, p)
    assert p.tolist() == [-1.5]


def test_accumulate_leaves_out_what_had_no_gradient():
    opt = fo.accumulate(fo.sgd(lr=1.0, weight_decay=0.5), 2)
    params = {"a": torch.ones(1), "b": torch.ones(1), "c": torch.ones(1)}
    state = opt.init(params)
    one = torch.ones(1)
    params, state = opt.update({"a": one, "b": 3 * one, "c": None}, state, params)
    params, state = opt.update({"a": one, "b": None, "c": None}, state, params)
    # b: by the mean of what it had
    assert [p.item() for p in params.values()] == [-0.5, -2.5, 1.0]
    assert state["optimizer"]["step"].tolist() == [1, 1, 0]


def test_accumulate_under_vmap_with_tasks_that_have_come_differently_far():
    opt, rows = fo.accumulate(fo.adamw(lr=0.1, eps=0.01), 2), []
    for k in range(3):
        params = mixed(seed=k)
        state = opt.init(params)
        for g in gradients(params, k):
            params, state = opt.update(g, state, params)
        rows.append((random_like(params, k), state, params))
    given, rebuild = stacked(rows)
    found = vmap(lambda x: tree.without_none(opt.update(*rebuild(x)))[0])(given)
    expected, _ = stacked([opt.update(*row) for row in rows])
    assert_close(found, expected, 1e-14)


def test_accumulate_is_differentiable():
    opt, params = fo.accumulate(fo.sgd(lr=0.1, momentum=0.9), 2), small()
    grads = gradients(params, 4)
    leaves, structure = tree.flatten((params, grads, torch.tensor(0.2).double()))

    def function(*leaves: Tensor) -> tuple[Tensor, ...]:
        params, grads, lr = tree.unflatten(structure, leaves)
        state = opt.init(params)
        for g in grads:
            params, state = opt.update(g, state, params, lr=lr)
        return tuple(tree.leaves(params))

    leaves = [x.clone().requires_grad_() for x in leaves]
    assert torch.autograd.gradcheck(function, leaves)


@inner
def test_accumulate_donated(make: Any):
    params = mixed(torch.float32)
    assert_donates(fo.accumulate(make(), 2), params, gradients(params, 5))


# skip_nonfinite ------------------------------------------------------------------------


@inner
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_a_step_with_a_bad_gradient_is_as_if_it_were_not(make: Any, bad: float):
    opt, plain, params = fo.skip_nonfinite(make()), make(), mixed()
    found, expected = (params, opt.init(params)), (params, plain.init(params))
    for i, g in enumerate(gradients(params, 4)):
        if i % 2:
            spoilt, structure = tree.flatten(g)
            spoilt[1] = spoilt[1].clone()
            spoilt[1][0] = bad
            before = found
            found = opt.update(tree.unflatten(structure, spoilt), found[1], found[0])
            old, new = tree.leaves(before[0]), tree.leaves(found[0])
            assert all(a is b for a, b in zip(old, new))
        else:
            found = opt.update(g, found[1], found[0])
            expected = plain.update(g, expected[1], expected[0])
    assert_same(found[0], expected[0])
    assert found[1]["skipped"] == 2
    leaves = (tree.without_none(s)[0] for s in (found[1]["optimizer"], expected[1]))
    assert_same(*map(list, leaves))


def test_each_task_skips_for_itself_and_its_derivative_is_finite():
    opt, params = fo.skip_nonfinite(fo.adamw(lr=0.1)), torch.ones(2).double()
    grads = torch.tensor([[1.0, 2.0], [torch.nan, 1.0], [1.0, torch.inf]]).double()

    def step(g: Tensor, p: Tensor) -> Tensor:
        return opt.update(g, opt.init(p), p)[0]

    new = vmap(step, in_dims=(0, None))(grads, params)
    assert torch.equal(new[1:], torch.ones(2, 2).double())
    assert torch.equal(new[0], step(grads[0], params))
    slope = vmap(grad(lambda g, p: step(g, p).sum(), (0, 1)), in_dims=(0, None))
    by_grad, by_param = slope(grads, params)
    assert by_grad.isfinite().all() and torch.equal(
        by_param[1:], torch.ones(2, 2).double()
    )


@inner
def test_skip_nonfinite_donated(make: Any):
    params = mixed(torch.float32)
    grads = gradients(params, 4)
    grads[1] = tree.map(lambda g: g * torch.nan, grads[1])
    assert_donates(fo.skip_nonfinite(make()), params, grads)


# master_weights ------------------------------------------------------------------------


@inner
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_masters_step_in_float32(make: Any, dtype: torch.dtype):
    opt, plain, params = fo.master_weights(make()), make(), mixed(dtype)
    state = opt.init(params)
    expected = tree.map(lambda p: p.float(), params)
    inner_state = plain.init(expected)
    for g in gradients(params, 5):
        params, state = opt.update(g, state, params)
        wide = tree.map(lambda x: x.float(), g)
        expected, inner_state = plain.update(wide, inner_state, expected)
        assert_same(state["master"], expected)
        assert_same(params, tree.map(lambda w: w.to(dtype), expected))


@pytest.mark.parametrize("stochastic", [False, True])
def test_other_leaves_have_no_master_and_are_not_rounded(stochastic: bool):
    opt = fo.master_weights(fo.sgd(lr=0.1), stochastic=stochastic)
    params = {"half": torch.ones(2).bfloat16(), "full": torch.ones(2)}
    state = opt.init(params)
    assert state["master"]["full"] is None
    given = {"generator": torch.Generator()} if stochastic else {}
    new, later = opt.update(params, state, params, **given)
    assert later["master"]["full"] is None
    assert torch.equal(new["full"], params["full"] - 0.1 * params["full"])


def test_stochastic_rounding_is_right_in_the_mean():
    opt = fo.master_weights(fo.sgd(lr=1.0), stochastic=True)
    p = torch.ones(20_000).bfloat16()
    g = torch.full((20_000,), -0.25 * 2.0**-7).bfloat16()  # a quarter of a unit up
    generator = torch.Generator().manual_seed(0)
    new, state = opt.update(g, opt.init(p), p, generator=generator)
    up = (new == 1 + 2.0**-7).float().mean().item()
    assert (new == 1).float().mean().item() == pytest.approx(1 - up)
    assert up == pytest.approx(0.25, abs=0.01)
    again, _ = opt.update(g, opt.init(p), p, generator=generator.manual_seed(0))
    assert torch.equal(again, new)
    infinite = opt.update(g * torch.inf, opt.init(p), p, generator=generator)[0]
    assert infinite.isinf().all()


def test_the_derivative_of_rounding_is_one():
    opt = fo.master_weights(fo.sgd(lr=1.0), stochastic=True)
    generator = torch.Generator().manual_seed(0)

    def loss(g: Tensor) -> Tensor:
        p = torch.ones(3).bfloat16()
        return opt.update(g, opt.init(p), p, generator=generator)[0].float().sum()

    assert grad(loss)(torch.ones(3).bfloat16()).tolist() == [-1.0] * 3


@inner
def test_master_weights_donated(make: Any):
    params = mixed(torch.bfloat16)
    assert_donates(fo.master_weights(make()), params, gradients(params, 3))


def test_a_generator_reaches_the_part_that_draws_from_it():
    half = fo.master_weights(fo.sgd(lr=0.1), stochastic=True)
    opt = fo.partition(
        {"half": half, "other": fo.sgd(lr=0.1)}, {"a": "half", "b": "other"}
    )
    params = {"a": torch.ones(9, dtype=torch.bfloat16), "b": torch.ones(9)}
    drawn = {"generator": torch.Generator().manual_seed(0)}
    new, state = opt.update(params, opt.init(params), params, **drawn)
    assert 1 < len({*new["a"].tolist()}) and assert_moved(new, params) is None
    assert_same(opt.eval_params(state, new, **drawn)["b"], new["b"])


@pytest.mark.parametrize("donate", [False, True])
def test_what_makes_no_step_is_not_drawn_anew(donate: bool):
    """Neither without a gradient nor in a call in which `accumulate` takes in one."""
    opt = fo.master_weights(fo.accumulate(fo.sgd(lr=1e-3), 2), stochastic=True)
    params = {"a": torch.ones(99, dtype=torch.bfloat16)}
    state, generator = opt.init(params), torch.Generator().manual_seed(0)
    moved = []
    for k in range(6):
        before = params["a"].clone()
        grads = {"a": torch.ones_like(before) if k < 3 else None}
        given = {"donate": donate, "generator": generator}
        params, state = opt.update(grads, state, params, **given)
        moved.append(not torch.equal(params["a"], before))
    assert moved == [False, True, False, True, False, False]


@pytest.mark.parametrize("inner", [fo.sam(fo.sgd(lr=0.01)), fo.lbfgs(max_iter=2)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_loss_of_masters_is_that_of_parameters(inner: Any, dtype: torch.dtype):
    """In their dtype, as the data are: a matrix product takes no two."""
    x, opt = (
        torch.tensor([[1.0, 2.0], [3.0, -4.0]], dtype=dtype),
        fo.master_weights(inner),
    )
    params = {"w": torch.ones(2, dtype=dtype), "b": torch.ones(1)}

    def loss(p: Tree, _: Any = None) -> Tensor:
        return (x @ p["w"]).square().sum().float() + p["b"].square().sum()

    run = fo.unroll(opt, loss, params, steps=3)
    assert run.losses[-1] < run.losses[0] and run.params["w"].dtype is dtype
    slope = grad(lambda p: loss(fo.unroll(opt, loss, p, steps=1).params))(params)
    assert slope["w"].isfinite().all() and slope["w"].dtype is dtype


# sam -----------------------------------------------------------------------------------


def loss_fn(params: Tree) -> Tensor:
    return sum(((p - 0.3) ** 4).sum() for p in tree.leaves(params))  # type: ignore


@inner
@pytest.mark.parametrize("adaptive", [False, True])
def test_sam_steps_by_the_gradient_above(make: Any, adaptive: bool):
    opt, plain, params = fo.sam(make(), 0.2, adaptive=adaptive), make(), mixed()
    found, expected = (params, opt.init(params)), (params, plain.init(params))
    for _ in range(3):
        g = grad(loss_fn)(found[0])
        found = opt.update(g, found[1], found[0], loss_fn=loss_fn)
        leaves, structure = tree.flatten(expected[0])
        g = tree.leaves(grad(loss_fn)(expected[0]))
        size = [p.abs() if adaptive else torch.ones_like(p) for p in leaves]
        length = torch.cat([(s * x).flatten() for s, x in zip(size, g)]).norm()
        above = [p + 0.2 * s * s * x / length for p, s, x in zip(leaves, size, g)]
        steep = grad(loss_fn)(tree.unflatten(structure, above))
        expected = plain.update(steep, expected[1], expected[0])
    assert_close(found[0], expected[0], 1e-13)


def test_sam_is_differentiable_and_batched():
    opt, params = fo.sam(fo.sgd(lr=0.1), 0.2), small()

    def step(*given: Tensor) -> tuple[Tensor, ...]:
        *leaves, rho = given
        p = tree.unflatten(tree.flatten(params)[1], leaves)
        new, _ = opt.update(grad(loss_fn)(p), opt.init(p), p, loss_fn=loss_fn, rho=rho)
        return tuple(tree.leaves(new))

    given = [*tree.leaves(params), torch.tensor(0.2).double()]
    assert torch.autograd.gradcheck(step, [x.clone().requires_grad_() for x in given])
    many = [torch.stack([x, 2 * x]) for x in given]
    for k in range(2):
        expected = step(*(x[k] for x in many))
        assert_close([x[k] for x in vmap(step)(*many)], list(expected), 1e-14)


@inner
@pytest.mark.parametrize("donate", [False, True])
def test_a_schedule_of_rho_goes_on_from_step_to_step(make: Any, donate: bool):
    opt, halved = fo.sam(make(), fo.schedules.exponential(0.4, gamma=0.5)), fo.sam(make())
    params = mixed()
    expected, found = (params, halved.init(params)), (params, opt.init(params))
    found = tree.map(torch.clone, found)
    for k in range(3):
        g = grad(loss_fn)(found[0])
        found = opt.update(g, found[1], found[0], loss_fn=loss_fn, donate=donate)
        more: Any = {"loss_fn": loss_fn, "rho": 0.4 * 0.5**k}
        g = grad(loss_fn)(expected[0])
        expected = halved.update(g, expected[1], expected[0], **more)
    assert_close(found[0], expected[0], 1e-13)


def test_the_optimizers_own_rho_keeps_its_name_in_sam():
    opt, params = fo.sam(fo.adadelta()), mixed()
    given = {"rho": 0.3, "sam_rho": 0.4}
    assert (opt.hyper["rho"], opt.hyper["sam_rho"]) == (0.9, 0.05)
    g = grad(loss_fn)(params)

    def end(opt: fo.Optimizer, **given: Any) -> Any:
        return opt.update(g, opt.init(params), params, loss_fn=loss_fn, **given)

    expected = end(fo.sam(fo.adadelta(rho=0.3), 0.4))
    assert_close(end(opt, **given), expected, 1e-13)
    assert_close(end(fo.scheduled(opt, **given)), expected, 1e-13)
    for other in ("rho", "sam_rho"):
        found = tree.leaves(end(opt, **{**given, other: 0.1}))
        assert any(not torch.equal(*x) for x in zip(found, tree.leaves(expected)))


@pytest.mark.parametrize("at", ["p", "p + ε"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_within_sam_a_step_is_skipped_for_either_gradient(at: str, bad: float):
    opt, params = fo.sam(fo.skip_nonfinite(fo.adam(lr=0.1))), small()
    grads, add = grad(loss_fn)(params), bad if at == "p + ε" else 0.0
    if at == "p":
        tree.leaves(grads)[0].fill_(bad)
    new, state = opt.update(
        grads,
        opt.init(params),
        params,
        loss_fn=lambda p: loss_fn(p) + add * tree.leaves(p)[0].sum(),
    )
    assert state["optimizer"]["skipped"] == 1
    assert_close(new, params, 0)


@pytest.mark.parametrize("recorded", [False, True])
def test_sam_of_leaves_without_gradients_stays(recorded: bool):
    """As in a partition whose other parts move: the loss is of nothing that does."""
    opt = fo.partition({"a": fo.sgd(lr=0.1), "b": fo.sam(fo.sgd())}, {"a": "a", "b": "b"})
    params = {"a": torch.ones(2).requires_grad_(recorded), "b": torch.ones(2)}
    grads = {"a": params["a"], "b": None}
    new, _ = opt.update(grads, opt.init(params), params, loss_fn=loss_fn)
    assert new["b"] is params["b"] and new["a"].requires_grad == recorded
    assert_close(new["a"], torch.full((2,), 0.9), 1e-6)


def test_sam_at_a_minimum_stays():
    opt, p = fo.sam(fo.sgd(lr=0.1)), torch.full((2,), 0.3)
    new, _ = opt.update(torch.zeros(2), opt.init(p), p, loss_fn=loss_fn)
    assert torch.equal(new, p)


# what they share -----------------------------------------------------------------------

WRAPPERS: dict[str, Callable[[fo.Optimizer], fo.Optimizer]] = {
    "accumulate": lambda opt: fo.accumulate(opt, 1),
    "skip_nonfinite": fo.skip_nonfinite,
    "master_weights": fo.master_weights,
    "freeze": lambda opt: fo.freeze(opt, False),
    "partition": lambda opt: fo.partition({"all": opt}, "all"),
    "sam": fo.sam,
    "chain": lambda opt: fo.chain(fo.zero_nans(), fo.freeze(opt, False)),
    "scheduled": lambda opt: fo.scheduled(fo.freeze(opt, False)),
}


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("name", WRAPPERS)
def test_a_leaf_without_a_gradient_stays(name: str, donate: bool):
    opt, params = WRAPPERS[name](fo.adamw(lr=0.1)), mixed(torch.float64)
    more, state = {"loss_fn": loss_fn} if name == "sam" else {}, opt.init(params)
    for gap in range(3):
        leaves, structure = tree.flatten(random_like(params, 70 + gap))
        grads = [None if i % 3 == gap else g for i, g in enumerate(leaves)]
        before = [p.clone() for p in tree.leaves(params)]
        grads_tree = tree.unflatten(structure, grads)
        params, state = opt.update(grads_tree, state, params, donate=donate, **more)
        for g, old, new in zip(grads, before, tree.leaves(params), strict=True):
            assert torch.equal(new, old) == (g is None or not old.numel())


@pytest.mark.parametrize("name", WRAPPERS)
def test_what_is_evaluated_passes_through(name: str):
    opt = WRAPPERS[name](fo.chain(fo.sgd(lr=0.1), fo.polyak()))
    params = mixed(torch.float32)
    found, more = (
        (params, opt.init(params)),
        {"loss_fn": loss_fn} if name == "sam" else {},
    )
    path = []
    for g in gradients(params, 3):
        found = opt.update(g, found[1], found[0], **more)
        path.append(found[0])
    assert_close(opt.eval_params(found[1], found[0]), mean(path), 1e-6)


@pytest.mark.parametrize("name", [*WRAPPERS, "itself"])
def test_what_is_evaluated_goes_by_what_a_step_was_given(name: str):
    """x by its momentum: that of the factory, of `scheduled`, or of each call."""
    wrap = WRAPPERS.get(name, lambda opt: opt)
    params, half = mixed(torch.float64), {"momentum": torch.tensor(0.5)}
    made = wrap(fo.schedule_free_sgd(lr=0.1, momentum=half["momentum"]))
    plain = wrap(fo.schedule_free_sgd())
    later = fo.scheduled(plain, lr=0.1, **half)
    more = {"loss_fn": loss_fn} if name == "sam" else {}
    found = []
    for opt, given in ((made, {}), (plain, half), (later, {})):
        p, state = params, opt.init(params)
        rate = {"lr": 0.1} if opt is plain else {}
        for g in gradients(params, 3):
            p, state = opt.update(g, state, p, **given, **rate, **more)
        found.append(opt.eval_params(state, p, **given))
        if name == "sam":  # what is evaluated is not what was climbed to
            climbed = opt.eval_params(state, p, **given, **more, rho=0.3)
            assert_same(climbed, found[-1])
        other = opt.eval_params(state, p, momentum=0.9)
        assert_moved(other, found[-1], everywhere=False)
        with pytest.raises(fo.UnknownHyperparameterError, match="'nesterov'"):
            opt.eval_params(state, p, nesterov=0.5)
    assert_same(found[1], found[0])
    assert_same(found[2], found[0])


@pytest.mark.parametrize("name", WRAPPERS)
def test_what_is_evaluated_is_of_its_own_state(name: str):
    """An optimizer's that has an average; `freeze` has the state of what it freezes."""
    opt, params = WRAPPERS[name](fo.asgd()), {"w": torch.ones(2)}
    with pytest.raises(fo.StructureError, match="is another optimizer's"):
        opt.eval_params(fo.adam().init(params), params)


def test_asgd_is_evaluated_at_its_average():
    """torch.optim's ``ax``; before a first step, at the parameters."""
    opt, params = fo.asgd(lr=0.1, t0=2.0), {"w": torch.linspace(-1, 1, 5).double()}
    state, twin = opt.init(params), params["w"].clone().requires_grad_()
    theirs = torch.optim.ASGD([twin], lr=0.1, t0=2.0)
    assert torch.equal(opt.eval_params(state, params)["w"], params["w"])
    for _ in range(6):
        twin.grad = twin.detach().sin()
        theirs.step()
        params, state = opt.update({"w": params["w"].sin()}, state, params)
    found = opt.eval_params(state, params)["w"]
    # torch keeps eta in float32
    torch.testing.assert_close(found, theirs.state[twin]["ax"], rtol=1e-9, atol=0)
    assert not torch.equal(found, params["w"])


def test_what_an_average_does_not_go_by_is_not_its_affair():
    """The names are those of `update`, in a chain too; an unknown one is refused."""
    p = {"w": torch.ones(2)}
    for inner in (fo.sgd(), fo.freeze(fo.sgd(), False)):
        for opt in (inner, fo.chain(inner, fo.ema(0.5)), fo.chain(fo.zero_nans(), inner)):
            state = opt.init(p)
            expected = opt.eval_params(state, p)
            assert_same(opt.eval_params(state, p, lr=0.1), expected)
            with pytest.raises(fo.UnknownHyperparameterError, match="'rate'"):
                opt.eval_params(state, p, rate=0.1)


@pytest.mark.parametrize("name", WRAPPERS)
def test_hyperparameters_pass_through(name: str):
    opt, params = WRAPPERS[name](fo.sgd(lr=0.1)), mixed(torch.float32)
    more = {"loss_fn": loss_fn} if name == "sam" else {}
    g = random_like(params, 1)
    new, _ = opt.update(g, opt.init(params), params, lr=0.0, **more)
    assert_same(new, params)
    assert "lr" in opt.hyper


# where nothing can be read --------------------------------------------------------------

WRAPPED: dict[str, Callable[[fo.Optimizer], fo.Optimizer]] = {
    "accumulate": lambda opt: fo.accumulate(opt, 2),
    "skip_nonfinite": fo.skip_nonfinite,
    "master_weights": fo.master_weights,
}


@inner
@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED.keys())
def test_on_a_device_that_is_not_the_steps(wrap: Any, make: Any):
    """Steps are counted on the CPU, and the condition is where the parameters are."""
    opt = wrap(make())
    params = tree.map(lambda p: p.to("meta"), mixed(torch.float32))
    state = opt.init(params)
    looks = [(x.shape, x.dtype) for x in tree.present(state)]
    for _ in range(3):
        params, state = opt.update(params, state, params)
    assert all(p.is_meta for p in tree.leaves(params))
    assert [(x.shape, x.dtype) for x in tree.present(state)] == looks


@inner
def test_donated_where_there_is_no_memory(make: Any):
    opt, params = make(), tree.map(lambda p: p.to("meta"), mixed(torch.float32))
    state = opt.init(params)
    for _ in range(2):
        found = opt.update(params, state, params, donate=True)[0]
        assert all(a is b for a, b in zip(tree.leaves(found), tree.leaves(params)))
