"""An optimizer is data: its pickled copy makes the same steps, in any process."""

import copy
import dataclasses
import math
import multiprocessing
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from table import CASES, ENDS, Case
from test_schedules import EVERY, IDS
from torch import Tensor
from trees import assert_same, random_like

import funcopt as fo
from funcopt import tree
from funcopt.hyper import Hyper
from funcopt.types import Tree

PARAMS = {
    "body": [torch.linspace(-1.0, 2.0, 6).view(2, 3), torch.linspace(0.5, 1.0, 4)],
    "head": {"w": torch.linspace(2.0, -1.0, 6).view(3, 2), "b": torch.ones(2)},
}
MATRICES = [x for x in tree.leaves(PARAMS) if x.ndim == 2]


def halved(count: Any) -> Any:
    return 0.5**count


def wave(count: Any) -> Any:
    return 1 / count


def onto(x: Tensor, most: Any) -> Tensor:
    return x.clamp(max=most)


def own_rule(g: Tensor, p: Tensor, mean: Tensor, *, step: Any, lr: Any) -> Any:
    mean = (mean + g) / 2
    return p - lr * mean, mean


def own_update(grads: Tree, state: Any, params: Tree, **given: Any) -> Any:
    return tree.map(torch.add, params, grads), state


def loss_fn(params: Tree) -> Tensor:
    return torch.stack([(x - 0.3).square().sum() for x in tree.leaves(params)]).sum()


def running() -> torch.optim.Optimizer:
    first, second = (torch.nn.Parameter(torch.ones(2) * k) for k in (1.0, 2.0))
    given = [{"params": [first], "lr": 0.1}, {"params": [second], "amsgrad": True}]
    return torch.optim.AdamW(given, lr=0.2)


GROUPS = fo.by_name({"head*": 0.1, "*0": fo.Schedule(halved)}, default=0.01)
PARTS = {"a": fo.sgd(lr=0.1, momentum=0.9), "b": fo.chain(fo.adamw(), fo.ema(0.5))}
PARTITION = fo.partition(PARTS, fo.by_name({"*0": "a"}, default="b"))

#: optimizers made of what a user can give, and of others
MADE: dict[str, Callable[[], fo.Optimizer]] = {
    "groups": lambda: fo.adamw(lr=GROUPS, weight_decay={"body": 0.1, "head": 0.0}),
    "tensors": lambda: fo.adam(lr=torch.tensor(0.1), eps=torch.tensor(1e-3)),
    "a rate for each weight": lambda: fo.sgd(lr=tree.map(torch.abs, PARAMS)),
    "own rule": lambda: fo.elementwise(
        own_rule,
        name="own",
        slots={"mean": torch.zeros_like},
        hyper={"lr": Hyper(0.1)},
    ),
    "own functions": lambda: fo.Optimizer(PARTITION.init, own_update),
    "gradient stages": lambda: fo.chain(
        fo.zero_nans(),
        fo.clip_by_global_norm(0.7),
        fo.clip_by_value(0.5),
        fo.clip_by_block_rms(0.3),
        fo.centralize(),
        fo.normalize(),
        fo.add_decayed_weights(0.1),
        fo.add_noise(0.01, noise=random_like(PARAMS, 7)),
        fo.adam(lr=0.1),
    ),
    "parameter stages": lambda: fo.chain(
        fo.adam(lr=0.1),
        fo.trust_region(0.2),
        fo.project(fo.projections.box, low=-0.9, high=0.9),
        fo.project(onto, most=0.8),
        fo.ema(0.5),
        fo.ema(0.9, debias=False),
        fo.polyak(1.0),
        fo.lookahead(2),
    ),
    "stages around a partition": lambda: fo.chain(
        fo.clip_by_global_norm(0.7), PARTITION, fo.polyak()
    ),
    "partition": lambda: PARTITION,
    "partition by a tree": lambda: fo.partition(PARTS, {"body": "a", "head": "b"}),
    "freeze": lambda: fo.freeze(fo.adam(), {"body": True, "head": False}),
    "accumulate": lambda: fo.accumulate(PARTITION, 2),
    "master_weights": lambda: fo.master_weights(fo.adam()),
    "skip_nonfinite": lambda: fo.skip_nonfinite(fo.adam()),
    "cautious": lambda: fo.cautious(fo.lion(lr=0.1), maximize=True),
    "scheduled": lambda: fo.scheduled(
        fo.adam(), lr=fo.schedules.cosine_annealing(0.1, 9)
    ),
    "scheduled partition": lambda: fo.scheduled(PARTITION, lr=fo.Schedule(halved)),
    "sam": lambda: fo.sam(fo.sgd(lr=0.1), rho=0.5, adaptive=True),
    "lbfgs": lambda: fo.lbfgs(max_iter=3, history_size=2, line_search_fn="strong_wolfe"),
    "lbfgs in a partition": lambda: fo.partition(
        {"a": fo.lbfgs(max_iter=2), "b": fo.sgd(lr=0.1)}, {"body": "a", "head": "b"}
    ),
    "from_transform": lambda: fo.from_transform(fo.as_torchopt(fo.adam(lr=0.1))),
    "nested": lambda: fo.accumulate(
        fo.skip_nonfinite(fo.scheduled(fo.freeze(PARTITION, GROUPS_FROZEN), lr=0.1)), 2
    ),
}
GROUPS_FROZEN = fo.by_name({"*b": True}, default=False)


def over_pickle(x: Any) -> Any:
    return pickle.loads(pickle.dumps(x))


def trajectory(opt: fo.Optimizer, params: Tree, count: int = 3) -> Any:
    """Some steps, the state after them, and what to evaluate with."""
    state = opt.init(params)
    given = {"loss_fn": loss_fn} if "loss_fn" in opt.hyper else {}
    for k in range(count):
        grads = random_like(params, 40 + k)
        params, state = opt.update(grads, state, params, **given)
    return params, state, opt.eval_params(state, params)


def params_of(case: Case) -> Tree:
    spec = case.optimizer().spec
    return MATRICES if spec and spec.matrices else PARAMS


def assert_equal(found: Tree, expected: Tree) -> None:
    assert_same(*(tree.without_none(x)[0] for x in (found, expected)))


def test_every_optimizer():
    for case in CASES:
        opt = case.optimizer()
        assert repr(over_pickle(opt)) == repr(opt), case


@pytest.mark.costly
@pytest.mark.parametrize("case", ENDS, ids=str)
def test_the_copy_of_every_optimizer_makes_the_same_steps(case: Case):
    opt, params = case.optimizer(), params_of(case)
    expected = trajectory(opt, params, 2)
    assert_equal(trajectory(over_pickle(opt), params, 2), expected)


@pytest.mark.parametrize("copied", [over_pickle, copy.deepcopy, copy.copy])
@pytest.mark.parametrize("name", MADE)
def test_the_copy_of_what_is_made_of_others_does(name: str, copied: Callable[..., Any]):
    opt = MADE[name]()
    fresh = copied(opt)
    expected = trajectory(opt, PARAMS)
    assert_equal(trajectory(fresh, PARAMS), expected)
    assert_equal(trajectory(copied(opt), PARAMS), expected)  # of one that has stepped


def test_the_copy_of_what_came_from_torch_does():
    opt, params, _ = fo.from_torch(running())
    assert_equal(trajectory(over_pickle(opt), params), trajectory(opt, params))


def test_a_step_is_no_part_of_what_is_pickled():
    opt = fo.chain(fo.clip_by_global_norm(0.5), fo.adamw())
    before = pickle.dumps(opt)
    trajectory(opt, PARAMS)
    assert pickle.dumps(opt) == before


def test_every_wrapper_and_stage_is_among_them():
    here = Path(__file__).read_text()
    missing = {name for name in fo.transforms.__all__ if f"fo.{name}(" not in here}
    assert missing == {"from_param_groups"}  # which gives no optimizer


def test_another_process():
    """Started anew, so that nothing is there but what was sent."""
    opt = MADE["nested"]()
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found = pool.apply(trajectory, (opt, PARAMS))
    assert_equal(found, trajectory(opt, PARAMS))


@pytest.mark.parametrize("schedule", [s for _, s in EVERY], ids=IDS)
def test_schedules(schedule: fo.Schedule):
    if "lambda" in repr(schedule):
        with pytest.raises((pickle.PicklingError, AttributeError), match="lambda"):
            pickle.dumps(schedule)
        return
    found = over_pickle(schedule)
    counts = range(30)
    assert [found(t) for t in counts] == [schedule(t) for t in counts]


@pytest.mark.parametrize(
    "schedule",
    [
        fo.schedules.lambda_(0.4, halved),
        fo.schedules.multiplicative(0.4, wave, total_iters=3),
        fo.schedules.cyclic(0.1, 0.4, step_size_up=3, scale_fn=wave),
        fo.schedules.sequential([fo.Schedule(halved), 0.1], milestones=[3]),
    ],
)
def test_schedules_of_own_functions(schedule: fo.Schedule):
    found = over_pickle(schedule)
    assert [found(t) for t in range(9)] == [schedule(t) for t in range(9)]


def test_reduce_on_plateau():
    plateau = fo.schedules.reduce_on_plateau(0.4, "max", 0.5, patience=1, cooldown=1)
    found, states = over_pickle(plateau), [plateau.init()] * 2
    for metric in (1.0, 2.0, 2.0, 2.0, math.nan, 1.0, 1.0):
        states = [each.update(metric, s)[1] for each, s in zip((plateau, found), states)]
        assert_equal(*states)
    assert states[0]["value"] < 0.4


@pytest.mark.parametrize(
    "make",
    [
        lambda: fo.sgd(lr=fo.Schedule(lambda count: 0.5**count)),
        lambda: fo.chain(fo.sgd(), fo.project(lambda x: x)),
        lambda: fo.elementwise(
            lambda g, p, *, step: (p - g,), name="own", slots={}, hyper={}
        ),
    ],
)
def test_a_function_without_a_name_is_pickle_s_to_refuse(make: Callable[[], Any]):
    with pytest.raises((pickle.PicklingError, AttributeError), match="lambda"):
        pickle.dumps(make())


def test_what_is_replaced_is_kept():
    opt = dataclasses.replace(fo.sgd(lr=0.1), update=own_update, name="mine")
    found = over_pickle(opt)
    assert found.name == "mine" and found.update is own_update


def test_what_is_written_into_a_dict_afterwards_is_not():
    rates = {"body": 0.1, "head": 0.2}
    labels = {"body": "a", "head": "b"}
    plain, parted = fo.sgd(lr=rates), fo.partition(PARTS, labels)
    expected = [trajectory(opt, PARAMS) for opt in (plain, parted)]
    rates["body"], labels["body"] = 5.0, "b"
    for opt, steps in zip((plain, parted), expected):
        assert_equal(trajectory(over_pickle(opt), PARAMS), steps)
    assert plain.hyper["lr"] == {"body": 0.1, "head": 0.2}
