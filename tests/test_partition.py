"""Optimizers made of optimizers: each leaf goes its own way, frozen ones stay."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, vmap
from trees import assert_close

import funcopt as fo
from funcopt import tree

ADAM, SGD = fo.adam(lr=0.1), fo.sgd(lr=0.5, momentum=0.9)


def random_tree(seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    weight, bias, first, second = (
        torch.randn(shape, generator=generator) for shape in ((3, 2), (2,), (2,), ())
    )
    return {"body": {"weight": weight, "bias": bias}, "head": [first, second]}


PARAMS = random_tree(1)
FULL = {"body": {"weight": "adam", "bias": "sgd"}, "head": ["sgd", "sgd"]}
LABELS: dict[str, Any] = {
    "prefix": {"body": "adam", "head": "sgd"},
    "full": {"body": {"weight": "adam", "bias": "adam"}, "head": ["sgd", "sgd"]},
    "by_name": fo.by_name({"body.*": "adam"}, default="sgd"),
}


NOISE = [random_tree(10 + k) for k in range(3)]


def train(opt: fo.Optimizer, params: Any, steps: int = 3, **hyper: Any) -> Any:
    state = opt.init(params)
    for noise in NOISE[:steps]:
        grads = tree.map(torch.add, params, noise)
        params, state = opt.update(grads, state, params, **hyper)
    return params, state


def alone(opt: fo.Optimizer, branch: str, **hyper: Any) -> Any:
    """What the optimizer does where it has a branch of the tree to itself."""
    params = {branch: PARAMS[branch]}
    state = opt.init(params)
    for noise in NOISE:
        grads = tree.map(torch.add, params, {branch: noise[branch]})
        params, state = opt.update(grads, state, params, **hyper)
    return params, state


def assert_same(found: Any, expected: Any) -> None:
    a, b = tree.leaves(found), tree.leaves(expected)
    assert len(a) == len(b) > 0 and all(torch.equal(x, y) for x, y in zip(a, b))


def present(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree.leaves(values) if leaf is not None]


# partition -----------------------------------------------------------------------------


@pytest.mark.parametrize("form", LABELS)
def test_each_part_is_trained_as_if_alone(form: str):
    opt = fo.partition({"adam": ADAM, "sgd": SGD}, LABELS[form])
    params, state = train(opt, PARAMS)
    body, adam_state = alone(ADAM, "body")
    head, sgd_state = alone(SGD, "head")
    assert_same(params["body"], body["body"])
    assert_same(params["head"], head["head"])
    assert_same(present(state["adam"]["exp_avg"]), present(adam_state["exp_avg"]))
    assert_same(
        present(state["sgd"]["momentum_buffer"]), present(sgd_state["momentum_buffer"])
    )
    assert state["adam"]["step"].tolist() == [3, 3, 0, 0]
    assert state["sgd"]["step"].tolist() == [0, 0, 3, 3]
    for before, after in zip(tree.leaves(PARAMS), tree.leaves(params)):
        assert (before != after).all()


def test_the_others_leaves_are_gaps_in_a_state():
    state = fo.partition({"adam": ADAM, "sgd": SGD}, LABELS["prefix"]).init(PARAMS)
    assert state["adam"]["exp_avg"]["head"] == [None, None]
    assert state["sgd"]["momentum_buffer"]["body"] == {"weight": None, "bias": None}


def test_the_order_of_the_parts_and_a_part_without_leaves_change_nothing():
    one = train(fo.partition({"adam": ADAM, "sgd": SGD}, LABELS["prefix"]), PARAMS)
    two = train(fo.partition({"sgd": SGD, "adam": ADAM}, LABELS["prefix"]), PARAMS)
    three = train(
        fo.partition({"none": fo.adamw(), "adam": ADAM, "sgd": SGD}, LABELS["prefix"]),
        PARAMS,
    )
    assert_same(one[0], two[0])
    assert_same(one[0], three[0])
    assert three[1]["none"]["step"].tolist() == [0] * 4
    assert present(three[1]["none"]["exp_avg"]) == []


def test_one_part_for_all_is_the_optimizer_itself():
    assert_same(train(fo.partition({"a": ADAM}, "a"), PARAMS)[0], train(ADAM, PARAMS)[0])


def test_a_hyperparameter_goes_to_every_part_that_has_it():
    opt = fo.partition({"adam": ADAM, "sgd": SGD}, LABELS["prefix"])
    params, _ = train(opt, PARAMS, lr=0.01, momentum=0.5, betas=(0.5, 0.6))
    body = alone(ADAM, "body", lr=0.01, betas=(0.5, 0.6))[0]
    head = alone(SGD, "head", lr=0.01, momentum=0.5)[0]
    assert_same(params, {**body, **head})
    assert opt.hyper["lr"] == {"adam": 0.1, "sgd": 0.5}
    assert opt.hyper["momentum"] == {"sgd": 0.9}


def test_a_hyperparameter_tree_is_one_of_all_params():
    opt = fo.partition({"adam": ADAM, "sgd": SGD}, LABELS["prefix"])
    for lr in ({"body": 0.01, "head": 0.02}, fo.by_name({"body*": 0.01}, default=0.02)):
        params, _ = train(opt, PARAMS, lr=lr)
        body, head = alone(ADAM, "body", lr=0.01)[0], alone(SGD, "head", lr=0.02)[0]
        assert_same(params, {**body, **head})


def test_gaps_in_params_and_gradients_pass_through():
    opt = fo.partition(
        {"adam": ADAM, "sgd": SGD}, {"w": "adam", "gap": "sgd", "b": "sgd"}
    )
    params = {"w": torch.ones(2), "gap": None, "b": torch.ones(2)}
    grads = {"w": torch.ones(2), "gap": None, "b": None}
    new, state = opt.update(grads, opt.init(params), params)
    assert new["gap"] is None and torch.equal(new["b"], params["b"])
    assert (new["w"] != 1).all() and state["sgd"]["step"].tolist() == [0, 0, 0]


def test_a_partition_may_hold_a_partition():
    inner = fo.partition({"m": ADAM, "v": SGD}, fo.by_name({"*weight": "m"}, default="v"))
    outer = fo.partition({"all": inner, "rest": fo.sgd(lr=0.1)}, "all")
    assert_same(train(outer, PARAMS)[0], train(inner, PARAMS)[0])


def test_transforms_go_through_a_partition():
    opt = fo.partition({"adam": ADAM, "sgd": SGD}, LABELS["prefix"])

    def after(scale: Tensor, lr: Tensor) -> Tensor:
        params = tree.map(lambda p: p * scale, PARAMS)
        return sum(
            (p.square().sum() for p in tree.leaves(train(opt, params, lr=lr)[0])),
            torch.zeros(()),
        )

    scales, rates = torch.tensor([0.5, 2.0]), torch.tensor([0.1, 0.2])
    slopes = vmap(grad(after, argnums=(0, 1)))(scales, rates)
    rows = [grad(after, argnums=(0, 1))(s, r) for s, r in zip(scales, rates)]
    for found, *row in zip(slopes, *rows):
        assert torch.allclose(found, torch.stack(row), rtol=1e-4)
        assert (found != 0).all()


def loss(params: Any) -> Tensor:
    """No sum of parts: each leaf's minimum depends on where the others are."""
    weight, bias = params["body"]["weight"], params["body"]["bias"]
    first, second = params["head"]
    score = weight @ first + bias @ first - second
    return score.square().sum() + sum(p.square().sum() for p in tree.leaves(params))


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_part_that_asks_for_the_loss_is_given_the_whole_tree(
    frozen: bool, donate: bool
):
    """And in it the others' leaves as they were, whichever part steps first."""
    lbfgs, params = fo.lbfgs(max_iter=4), tree.map(torch.clone, PARAMS)
    head: Any = {"head": params["head"]}

    def of_head(part: Any) -> Tensor:
        return loss({"body": PARAMS["body"], **part})

    expected = lbfgs.update(grad(of_head)(head), lbfgs.init(head), head, loss_fn=of_head)[
        0
    ]
    opt = fo.freeze(lbfgs, FROZEN["prefix"])
    if not frozen:
        opt = fo.partition({"adam": ADAM, "sgd": lbfgs}, LABELS["prefix"])
    state, grads = opt.init(params), grad(loss)(params)
    new, _ = opt.update(grads, state, params, loss_fn=loss, donate=donate)
    assert_same(new["head"], expected["head"])
    assert (new["head"][0] != PARAMS["head"][0]).all()
    moved = (new["body"]["weight"] != PARAMS["body"]["weight"]).all()
    assert bool(moved) is not frozen
    assert loss(new) < loss(PARAMS)


def test_a_donation_that_one_part_refuses_is_none_to_the_others():
    halves = {"a": fo.sgd(lr=0.1), "b": fo.sgd(lr=0.1)}
    opt = fo.partition(halves, {"x": "a", "y": "b"})
    params = {"x": torch.ones(2), "y": torch.ones(2)}
    state = opt.init(params)
    grads = {"x": torch.ones(2), "y": params["y"][:]}
    with pytest.raises(fo.ExecutionError, match="share memory"):
        opt.update(grads, state, params, donate=True)
    assert params["x"].tolist() == [1.0, 1.0] and not state["a"]["step"].any()


# freeze --------------------------------------------------------------------------------

FROZEN: dict[str, Any] = {
    "prefix": {"body": True, "head": False},
    "full": {"body": {"weight": True, "bias": True}, "head": [False, False]},
    "by_name": fo.by_name({"body.*": True}, default=False),
}


@pytest.mark.parametrize("form", FROZEN)
def test_frozen_leaves_stay_and_keep_no_state(form: str):
    opt = fo.freeze(ADAM, FROZEN[form])
    params, state = train(opt, PARAMS)
    for name in ("weight", "bias"):
        assert params["body"][name] is PARAMS["body"][name]
    assert_same(params["head"], alone(ADAM, "head")[0]["head"])
    assert state["exp_avg"]["body"] == {"weight": None, "bias": None}
    assert state["step"].tolist() == [0, 0, 3, 3]


def test_the_gradient_of_a_frozen_leaf_is_not_read():
    opt = fo.freeze(ADAM, FROZEN["prefix"])
    expected = train(opt, PARAMS, steps=1)[0]
    head = tree.map(torch.add, PARAMS, NOISE[0])["head"]
    for body in (
        {"weight": None, "bias": None},
        {"weight": torch.full((3, 2), float("nan")), "bias": torch.ones(2)},
    ):
        new = opt.update({"body": body, "head": head}, opt.init(PARAMS), PARAMS)[0]
        assert_same(new, expected)


def test_freeze_all_or_nothing():
    params, state = train(fo.freeze(ADAM, True), PARAMS)
    assert all(a is b for a, b in zip(tree.leaves(params), tree.leaves(PARAMS)))
    assert present(state["exp_avg"]) == []
    assert_same(train(fo.freeze(ADAM, False), PARAMS)[0], train(ADAM, PARAMS)[0])


def test_a_frozen_optimizer_keeps_its_hyperparameters():
    opt = fo.freeze(ADAM, FROZEN["prefix"])
    assert opt.hyper == ADAM.hyper and opt.name == "freeze(adam)"
    params = train(opt, PARAMS, lr=0.01)[0]
    assert_same(params["head"], alone(ADAM, "head", lr=0.01)[0]["head"])


def test_freeze_and_partition_agree():
    frozen = train(fo.freeze(SGD, FROZEN["prefix"]), PARAMS)[0]
    none = fo.partition({"yes": SGD, "no": fo.sgd(lr=0.0)}, {"body": "no", "head": "yes"})
    assert_same(frozen, train(none, PARAMS)[0])


# from_param_groups ---------------------------------------------------------------------


def modules() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(5)
    return nn.Linear(3, 4), nn.Linear(4, 2)


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_groups_train_as_torch_optim_trains_them(name: str, named: bool):
    body, head = modules()
    parts = [m.named_parameters() if named else m.parameters() for m in (body, head)]
    groups: list[dict[str, Any]] = [{"params": list(part)} for part in parts]
    defaults: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.0}
    if name == "sgd":
        groups[1] |= {"lr": 0.05, "weight_decay": 0.1}
        defaults |= {"momentum": 0.9, "nesterov": True}
    else:
        groups[1] |= {"betas": (0.5, 0.6), "eps": 1e-3}
        defaults |= {"betas": (0.9, 0.999), "eps": 1e-8}
    trained, hyper = fo.from_param_groups(groups, **defaults)
    params = before = tree.map(lambda p: p.detach().clone(), trained)
    opt = getattr(fo, name)(**hyper)
    torch_class = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[name]
    torch_opt = torch_class(groups, **defaults)
    state, x = opt.init(params), torch.randn(5, 3)
    for _ in range(5):
        torch_opt.zero_grad()
        head(torch.tanh(body(x))).square().mean().backward()
        params, state = opt.update(tree.map(lambda p: p.grad, trained), state, params)
        torch_opt.step()
    assert type(params[0]) is (dict if named else list)
    for start, ours, theirs in zip(*map(tree.leaves, (before, params, trained))):
        assert (start != ours).all()
        assert torch.allclose(ours, theirs, rtol=1e-6, atol=1e-7)


def test_what_the_groups_become():
    a, b, c = torch.ones(1), torch.ones(2), torch.ones(3)
    params, hyper = fo.from_param_groups(
        [{"params": a}, {"params": [b, c], "lr": 0.2, "betas": (0.5, 0.6)}],
        lr=0.1,
        betas=(0.9, 0.99),
        amsgrad=True,
    )
    assert params[0][0] is a and params[1][0] is b and params[1][1] is c
    assert hyper == {
        "lr": [0.1, 0.2],
        "betas": ([0.9, 0.5], [0.99, 0.6]),
        "amsgrad": True,
    }


def test_a_group_may_be_given_as_an_iterator_and_is_not_changed():
    group = {"params": (p for p in [torch.ones(1), torch.ones(2)]), "lr": 0.1}
    kept = dict(group)
    params, _ = fo.from_param_groups(iter([group]))
    assert len(params[0]) == 2 and group == kept


def test_a_flag_that_is_a_word_is_compared_as_one():
    words = ["".join(["spec", "tral"]) for _ in range(2)]
    assert words[0] is not words[1]
    groups = [{"params": torch.ones(1), "norm": word} for word in words]
    assert fo.from_param_groups(groups)[1] == {"norm": "spectral"}


def test_no_groups_and_empty_groups():
    assert fo.from_param_groups([]) == ([], {})
    assert fo.from_param_groups([{"params": []}], lr=0.1) == ([[]], {"lr": 0.1})


# torch.compile -------------------------------------------------------------------------


class Pair(NamedTuple):
    head: Any
    body: Any


ONE, TWO = torch.linspace(-1.0, 1.0, 3), torch.linspace(2.0, 1.0, 2)
#: trees of which the first leaf is one part, so that branches hold nothing of the other
DIVIDED: dict[str, Any] = {
    "dicts": {"b": {"y": ONE, "x": TWO}, "a": {"y": ONE, "x": TWO}},
    "a dict of one": [ONE, {"a": TWO}],
    "lists in a dict": {"l": [ONE, TWO], "m": ONE},
    "tuples in a dict": {"l": (ONE, TWO), "m": ONE},
    "a named tuple": {"p": Pair({"w": ONE}, TWO), "a": {"w": TWO, "b": None}},
    "ordered": OrderedDict(b=OrderedDict(y=ONE, x=TWO), a={"y": ONE}),
}


def divided(params: Any) -> dict[str, fo.Optimizer]:
    first, *_ = tree.paths(tree.flatten(params)[1])
    labels = fo.by_name({first: "a"}, default="b")
    frozen = fo.by_name({first: True}, default=False)
    parted = fo.partition({"a": SGD, "b": ADAM}, labels)
    return {
        "partition": parted,
        "freeze": fo.freeze(ADAM, frozen),
        "the other frozen": fo.freeze(ADAM, fo.by_name({first: False}, default=True)),
        "both": fo.freeze(parted, frozen),
        "twice": fo.partition({"a": parted, "b": SGD}, labels),
        "chain": fo.chain(fo.clip_by_global_norm(1.0), parted, fo.ema(0.5)),
        "accumulate": fo.accumulate(parted, 2),
        "around": fo.freeze(fo.master_weights(fo.skip_nonfinite(ADAM)), frozen),
    }


def check_compiled(params: Any, opt: fo.Optimizer, backend: str) -> None:
    """One graph, the same numbers, and dicts whose keys have the same order."""

    def step(grads: Any, state: Any, params: Any) -> Any:
        return opt.update(grads, state, params)

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    state = opt.init(params)
    for _ in range(2):
        expected = step(params, state, params)
        found = compiled(params, state, params)
        assert_close(present(found), present(expected), 1e-6)
        keys = [repr(tree.map(lambda _: 0, x)) for x in (found, expected)]
        assert keys[0] == keys[1]
        params, state = expected


def test_compiled():
    check_compiled(PARAMS, fo.partition({"adam": ADAM, "sgd": SGD}, FULL), "eager")


@pytest.mark.slow
@pytest.mark.parametrize("name", DIVIDED)
def test_compiled_of_any_tree(name: str):
    check_compiled(DIVIDED[name], divided(DIVIDED[name])["both"], "eager")


@pytest.mark.slow
@pytest.mark.parametrize("way", divided(DIVIDED["dicts"]))
def test_compiled_of_any_composition(way: str):
    params = DIVIDED["dicts"]
    check_compiled(params, divided(params)[way], "aot_eager")


def test_compiled_with_numbers_for_branches():
    """A dict without a tensor, of floats and not of None."""
    rates = {"body": {"weight": 0.1, "bias": 0.2}, "head": 0.3}

    def step(params: Any, state: Any) -> Any:
        return ADAM.update(params, state, params, lr=rates, betas=(0.8, {**BETAS}))

    compiled = torch.compile(step, fullgraph=True, backend="eager")
    state = ADAM.init(PARAMS)
    assert_same(compiled(PARAMS, state), step(PARAMS, state))


BETAS = {"body": 0.9, "head": [0.99, 0.999]}


def test_a_gradient_through_a_compiled_partition():
    opt = fo.partition({"adam": ADAM, "sgd": SGD}, FULL)
    state = opt.init(PARAMS)

    def after(rate: Tensor) -> Tensor:
        params, _ = opt.update(PARAMS, state, PARAMS, lr={"body": rate, "head": 0.1})
        return torch.stack([x.square().sum() for x in tree.leaves(params)]).sum()

    rate = torch.tensor(0.3, requires_grad=True)
    (expected,) = torch.autograd.grad(after(rate), rate)
    compiled: Callable[[Tensor], Tensor] = torch.compile(
        after, fullgraph=True, backend="aot_eager"
    )
    (found,) = torch.autograd.grad(compiled(rate), rate)
    assert torch.allclose(found, expected)
