"""`scheduled`: any Optimizer with other values, which a call may replace again."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, vmap

import funcopt as fo
from funcopt import schedules, tree

PARAMS = {
    "body": {"w": torch.tensor([[1.0, -2.0], [0.5, 3.0]]), "b": torch.tensor([0.5, 1.0])},
    "head": torch.tensor([2.0, -1.0]),
}
LABELS = {"body": "adam", "head": "sgd"}
FALL = schedules.exponential(0.3, gamma=0.8)
VALUES: dict[str, Any] = {
    "float": 0.3,
    "tensor": torch.tensor(0.3),
    "tree": {"body": {"w": 0.1, "b": torch.tensor(0.2)}, "head": 0.3},
    "by_name": fo.by_name({"*b": 0.0}, default=FALL),
    "schedule": FALL,
    "tree of schedules": {"body": FALL, "head": schedules.linear(0.5)},
}


def mixed(**lr: Any) -> fo.Optimizer:
    return fo.partition({"adam": fo.adam(**lr), "sgd": fo.sgd(**lr)}, LABELS)


MADE: dict[str, Callable[..., fo.Optimizer]] = {
    "adamw": fo.adamw,
    "partition": mixed,
    "frozen": lambda **lr: fo.freeze(fo.adam(**lr), {"body": False, "head": True}),
    "twice": lambda **lr: fo.scheduled(mixed(), **lr or {"lr": 0.7}),
    "override": lambda **lr: fo.scheduled(fo.scheduled(fo.sgd(), lr=0.9), **lr),
}


def train(opt: fo.Optimizer, params: Any = PARAMS, **hyper: Any) -> Any:
    state = opt.init(params)
    for _ in range(4):
        grads = tree.map(lambda p: 2 * p, params)
        params, state = opt.update(grads, state, params, **hyper)
    return params, state


def assert_same(found: Any, expected: Any) -> None:
    pairs = zip(tree.leaves(found), tree.leaves(expected), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs if a is not None)


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("made", MADE)
def test_the_same_as_given_to_every_call(made: str, value: str):
    opt, lr = MADE[made](), VALUES[value]
    expected = train(opt, lr=lr)
    assert_same(train(fo.scheduled(opt, lr=lr)), expected)
    assert not torch.equal(tree.leaves(expected[0])[0], tree.leaves(train(opt)[0])[0])


@pytest.mark.parametrize("made", MADE)
def test_a_call_comes_first(made: str):
    opt = MADE[made]()
    assert_same(train(fo.scheduled(opt, lr=FALL), lr=0.05), train(opt, lr=0.05))


def test_what_is_not_named_stays():
    opt = fo.scheduled(fo.adamw(lr=0.2, betas=(0.5, 0.6)), weight_decay=FALL)
    assert_same(train(opt), train(fo.adamw(lr=0.2, betas=(0.5, 0.6), weight_decay=FALL)))
    assert opt.hyper["lr"] == 0.2 and opt.hyper["weight_decay"] is FALL
    betas = fo.scheduled(fo.adam(lr=0.2), betas=(FALL, 0.9))
    assert_same(train(betas), train(fo.adam(lr=0.2, betas=(FALL, 0.9))))


def test_a_partition_s_parts_get_what_they_have():
    opt = fo.scheduled(mixed(lr=0.1), betas=(FALL, 0.9))
    expected = fo.partition(
        {"adam": fo.adam(lr=0.1, betas=(FALL, 0.9)), "sgd": fo.sgd(lr=0.1)}, LABELS
    )
    assert_same(train(opt), train(expected))
    assert opt.name == "scheduled(partition)"


def test_no_value_changes_nothing():
    for make in MADE.values():
        assert_same(train(fo.scheduled(make())), train(make()))


def test_it_is_still_one_rule_that_runs_as_before():
    opt = fo.scheduled(fo.adamw(), lr=FALL)
    assert opt.spec is not None and opt.name == "adamw"
    params = {"w": torch.ones(300, 40)}
    assert str(fo.plan(opt, params)) == str(fo.plan(fo.adamw(), params))


@pytest.mark.parametrize("made", MADE)
def test_derivatives_and_tasks_go_through(made: str):
    opt = MADE[made]()

    def after(value: Tensor) -> Tensor:
        lr = schedules.cosine_decay(value, decay_steps=5)
        moved, _ = train(fo.scheduled(opt, lr=lr), tree.map(Tensor.double, PARAMS))
        return sum((p.sum() for p in tree.leaves(moved)), torch.zeros(()).double())

    values = torch.tensor([0.1, 0.2], dtype=torch.float64)
    for found, value in zip(vmap(grad(after))(values), values):
        ahead, behind = after(value + 1e-6), after(value - 1e-6)
        assert found.item() == pytest.approx((ahead - behind).item() / 2e-6, rel=1e-6)


def test_a_dict_changed_by_its_owner_is_another_value():
    for opt in (fo.sgd(), mixed()):
        rates = {"body": 0.1, "head": 0.2}
        changed = fo.scheduled(opt, lr=rates)
        before = train(changed)
        rates["body"] = 100.0
        assert_same(train(changed), before)


@pytest.mark.parametrize("made", MADE)
def test_an_unknown_name(made: str):
    with pytest.raises(fo.UnknownHyperparameterError, match="'rate'"):
        fo.scheduled(MADE[made](), rate=0.1)
    with pytest.raises(fo.UnknownHyperparameterError, match="'rate'"):
        train(fo.scheduled(MADE[made](), lr=0.1), rate=0.1)


def test_a_value_that_may_not_be():
    with pytest.raises(fo.HyperparameterError, match="lr"):
        fo.scheduled(fo.sgd(), lr=-1.0)
    with pytest.raises(fo.HyperparameterTypeError, match=r"fo\.Schedule"):
        fo.scheduled(fo.sgd(), lr=lambda count: 0.1)
    for lr, error in ((-1.0, fo.HyperparameterError), (abs, fo.HyperparameterTypeError)):
        with pytest.raises(error, match="lr"):
            train(fo.scheduled(mixed(), lr=lr))
