"""Hyperparameters: every form a value may take, for every leaf, at every call."""

import math
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from optree.dataclasses import dataclass as optree_dataclass
from row import Case
from table import QUICK
from torch import Tensor
from torch.func import grad, vmap

import funcopt as fo
from funcopt import traced_tree, tree
from funcopt.hyper import Hyper

DEEP = {
    "body": {"weight": torch.full((2, 3), 2.0), "bias": torch.full((3,), 2.0)},
    "head": [torch.full((4,), 2.0), torch.tensor(2.0)],
}
PATHS = ("body.bias", "body.weight", "head.0", "head.1")


def spent(value: Any, *, steps: int = 1, call: bool = False, name: str = "lr") -> Any:
    """What one hyperparameter took of each leaf: its value, with a rule that subtracts.

    The rule is given what the resolver makes of ``value``, and nothing else.
    """

    def rule(g: Tensor, p: Tensor, *, step: int, lr: Any) -> tuple[Tensor]:
        return (p - lr,)

    hyper = {name: Hyper(0.5 if call else value)}
    opt = fo.elementwise(rule, name="spend", slots={}, hyper=hyper)
    params, state = DEEP, opt.init(DEEP)
    for _ in range(steps):
        override = {name: value} if call else {}
        params, state = opt.update(DEEP, state, params, **override)
    return tree.map(lambda new, old: old - new, params, DEEP)


def f64(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


ROW = torch.tensor([0.125, 0.25, 0.5])
# form: the value, and what bias, weight, head.0 and head.1 get of it
FORMS: dict[str, tuple[Any, Sequence[Any]]] = {
    "float": (0.25, [0.25] * 4),
    "int": (1, [1.0] * 4),
    "zero": (0, [0.0] * 4),
    "numpy float64": (np.float64(0.25), [0.25] * 4),
    "numpy float32": (np.float32(0.25), [0.25] * 4),
    "numpy int": (np.int64(1), [1.0] * 4),
    "0-d float32": (torch.tensor(0.25), [0.25] * 4),
    "0-d float64": (f64(0.25), [0.25] * 4),
    "0-d int": (torch.tensor(1), [1.0] * 4),
    "prefix of floats": ({"body": 0.25, "head": 0.5}, [0.25, 0.25, 0.5, 0.5]),
    "prefix with a list": ({"body": 0.25, "head": [0.5, 1]}, [0.25, 0.25, 0.5, 1.0]),
    "prefix with a tuple": ({"body": 0.25, "head": (0.5, 1)}, [0.25, 0.25, 0.5, 1.0]),
    "prefix of 0-d tensors": (
        {"body": torch.tensor(0.25), "head": f64(0.5)},
        [0.25, 0.25, 0.5, 0.5],
    ),
    "full tree": (
        {"body": {"weight": 0.25, "bias": 0.5}, "head": [1.0, 0.125]},
        [0.5, 0.25, 1.0, 0.125],
    ),
    "leaf-shaped tensors": (
        {"body": {"weight": ROW.expand(2, 3), "bias": ROW}, "head": 0.5},
        [ROW, ROW, 0.5, 0.5],
    ),
    "a row that broadcasts": ({"body": ROW, "head": 0.5}, [ROW, ROW, 0.5, 0.5]),
    "a column that broadcasts": (
        {"body": {"weight": ROW[:2, None], "bias": ROW}, "head": 0.5},
        [ROW, ROW[:2, None], 0.5, 0.5],
    ),
    "tensor of another dtype": (
        {"body": ROW.double(), "head": 0.5},
        [ROW, ROW, 0.5, 0.5],
    ),
    "by_name": (
        fo.by_name({"*.bias": 0.5, "head.*": 1.0}, default=0.25),
        [0.5, 0.25, 1.0, 1.0],
    ),
    "by_name, the first that fits": (
        fo.by_name({"body.b*": 0.5, "body*": 1.0, "*": 0.125}, default=9.0),
        [0.5, 1.0, 0.125, 0.125],
    ),
    "by_name within a branch": (
        {"body": fo.by_name({"bias": 0.5}, default=0.25), "head": 0.125},
        [0.5, 0.25, 0.125, 0.125],
    ),
    "by_name of tensors": (
        fo.by_name({"head.?": f64(0.5)}, default=torch.tensor(0.25)),
        [0.25, 0.25, 0.5, 0.5],
    ),
    "by_name with a set": (
        fo.by_name({"head.[1-9]": 0.5}, default=0.25),
        [0.25, 0.25, 0.25, 0.5],
    ),
    "schedule": (fo.Schedule(lambda count: 0.5 / (count + 1)), [0.5] * 4),
    "schedule of a 0-d tensor": (fo.Schedule(lambda count: f64(0.5)), [0.5] * 4),
    "schedule of an int": (fo.Schedule(lambda count: 1), [1.0] * 4),
    "prefix with a schedule": (
        {"body": fo.Schedule(lambda count: 0.25), "head": 0.5},
        [0.25, 0.25, 0.5, 0.5],
    ),
    "by_name with a schedule": (
        fo.by_name({"head.0": fo.Schedule(lambda count: 0.5)}, default=0.25),
        [0.25, 0.25, 0.5, 0.25],
    ),
}


@pytest.mark.parametrize("call", [False, True], ids=["factory", "update"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_value(form: str, call: bool):
    value, expected = FORMS[form]
    structure = tree.flatten(DEEP)[1]
    assert tree.paths(structure) == PATHS
    for found, p, number in zip(
        tree.leaves(spent(value, call=call)), tree.leaves(DEEP), expected
    ):
        assert found.dtype == p.dtype and found.shape == p.shape
        assert torch.equal(found, torch.as_tensor(number).float().expand(p.shape))


@optree_dataclass(namespace=traced_tree.NAMESPACE)
class Net:
    body: Any
    head: Any


class Both(NamedTuple):
    body: Any
    head: Any


#: what makes a container of two parts
CONTAINERS: dict[str, Callable[[Any, Any], Any]] = {
    "named tuple": Both,
    "deque": lambda body, head: deque([body, head]),
    "ordered": lambda body, head: OrderedDict(head=head, body=body),
    "dataclass": Net,
}


@pytest.mark.parametrize("call", [False, True], ids=["factory", "update"])
@pytest.mark.parametrize("number", [float, f64], ids=["floats", "tensors"])
@pytest.mark.parametrize("container", CONTAINERS)
def test_a_tree_of_values_in_any_container(container: str, number: Any, call: bool):
    """It may be a prefix, or whole, in whatever container the parameters are."""
    both, (a, b, c) = CONTAINERS[container], map(number, (0.25, 0.5, 0.125))
    params = [both({"x": torch.ones(2), "y": torch.ones(3)}, torch.ones(1))]
    for body, expected in ((a, (a, a)), ({"x": a, "y": c}, (a, c))):
        value = [both(body, b)]
        given: dict[str, Any] = {"lr": value} if call else {}
        opt = fo.sgd() if call else fo.sgd(lr=value)
        new, _ = opt.update(params, opt.init(params), params, **given)
        rates = [both(dict(zip("xy", expected)), b)]
        assert_same(new, tree.map(lambda p, rate: p - rate, params, rates))


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_misfit_in_any_container_is_named(container: str):
    value = CONTAINERS[container](0.5, 0.5)
    opt, params = fo.sgd(lr={"net": value}), {"net": [torch.ones(1)] * 3}
    with pytest.raises(fo.StructureError, match="lr.*'net'.*'net.2'"):
        opt.update(params, opt.init(params), params)


def decay_rates() -> list[str]:
    def largest(numbers: Sequence[Any]) -> float:
        return max(float(torch.as_tensor(number).max()) for number in numbers)

    return [form for form, (_, numbers) in FORMS.items() if largest(numbers) < 1]


@pytest.mark.parametrize("form", decay_rates())
def test_every_form_for_betas(form: str):
    """A pair of values, each of any form: the same as the same numbers leaf by leaf."""
    value, numbers = FORMS[form]
    opt = fo.adam(lr=0.1, betas=(value, 0.5))
    new, state = opt.update(DEEP, opt.init(DEEP), DEEP)
    for m, p, number in zip(tree.leaves(state["exp_avg"]), tree.leaves(DEEP), numbers):
        expected = (1 - torch.as_tensor(number)) * p
        assert torch.allclose(m, expected.expand(p.shape), rtol=1e-6)
    plain = fo.adam(lr=0.1, betas=(0.5, 0.5)).update(DEEP, opt.init(DEEP), DEEP)[0]
    for a, b in zip(tree.leaves(new), tree.leaves(plain)):  # bias-corrected: a first
        assert torch.allclose(a, b, rtol=1e-6)  # step does not depend on beta


@pytest.mark.parametrize("call", [False, True], ids=["factory", "update"])
def test_a_schedule_counts_each_leaf_s_own_steps(call: bool):
    seen: list[Any] = []

    def rate(count: Any) -> float:
        seen.append(count)
        return 0.5**count

    schedule = fo.Schedule(rate)
    opt = fo.sgd(lr=0.0 if call else schedule)
    params = {"a": torch.zeros(1), "b": torch.zeros(1)}
    state, override = opt.init(params), ({"lr": schedule} if call else {})
    ones = {"a": torch.ones(1), "b": torch.ones(1)}
    params, state = opt.update(ones, state, params, **override)
    params, state = opt.update({**ones, "b": None}, state, params, **override)
    params, state = opt.update(ones, state, params, **override)
    assert params["a"].item() == -(1 + 0.5 + 0.25)
    assert params["b"].item() == -(1 + 0.5)  # its second step came one call later
    assert all(type(count) is int for count in seen)


@pytest.mark.parametrize("call", [False, True], ids=["factory", "update"])
@pytest.mark.parametrize("form", ["shared", "tree"])
def test_a_schedule_is_not_asked_before_its_first_count(form: str, call: bool):
    """Nor for a leaf that has had no gradient yet, and steps never."""

    def schedule(count: Any) -> float:
        return 0.1 / (1 + count)

    lr: Any = fo.Schedule(schedule)
    lr = {"a": lr, "b": lr} if form == "tree" else lr
    opt, override = fo.sgd(lr=0.0 if call else lr), ({"lr": lr} if call else {})
    params = {"a": torch.zeros(1), "b": torch.zeros(1)}
    state = opt.init(params)
    for grads in ({"a": None, "b": None}, *[{"a": torch.ones(1), "b": None}] * 2):
        params, state = opt.update(grads, state, params, **override)
    assert params == {"a": torch.tensor([-0.1 - 0.1 / 2]), "b": torch.zeros(1)}


def test_a_schedule_is_asked_once_for_the_leaves_that_share_it():
    seen: list[int] = []
    schedule = fo.Schedule(lambda count: seen.append(count) or f64(0.5))
    for lr in (schedule, {"body": schedule, "head": 0.1}):
        seen.clear()
        spent(lr, steps=3)
        assert seen == [0, 1, 2]


def test_a_schedule_under_vmap_gets_float64_tensors():
    seen: list[Any] = []

    def rate(count: Any) -> Any:
        seen.append(count)
        return 0.5**count

    opt = fo.sgd(lr=fo.Schedule(rate))

    def one(step: Tensor, p: Tensor) -> Tensor:
        return opt.update(torch.ones(2), {"step": step}, p)[0]

    found = vmap(one)(torch.tensor([[0], [1], [3]]), torch.zeros(3, 2))
    assert found[:, 0].tolist() == [-1.0, -0.5, -0.125]
    assert [(count.dtype, count.ndim) for count in seen] == [(torch.float64, 0)]


def test_a_schedule_carries_a_gradient_to_its_own_parameters():
    def after(decay: Tensor) -> Tensor:
        opt = fo.sgd(lr=fo.Schedule(lambda count: 0.5 * decay**count))
        p, state = torch.zeros(1), opt.init(torch.zeros(1))
        for _ in range(3):
            p, state = opt.update(torch.ones(1), state, p)
        return p.sum()  # -(1 + d + d²) / 2

    assert grad(after)(f64(0.25)).item() == pytest.approx(-(1 + 2 * 0.25) / 2)


def test_an_override_lasts_for_one_call():
    opt = fo.adam(lr=0.5)
    expected = opt.update(DEEP, opt.init(DEEP), DEEP)
    opt.update(DEEP, opt.init(DEEP), DEEP, lr=0.1, betas=(0.1, 0.2), eps=1.0)
    again = opt.update(DEEP, opt.init(DEEP), DEEP)
    assert_same(again, expected)
    assert opt.hyper["lr"] == 0.5 and opt.hyper["betas"] == (0.9, 0.999)


@pytest.mark.parametrize("value", [0.25, f64(0.25), {"body": 0.25, "head": 0.25}])
def test_the_factory_and_the_call_agree(value: Any):
    made, called = fo.adamw(lr=value), fo.adamw()
    assert_same(
        made.update(DEEP, made.init(DEEP), DEEP),
        called.update(DEEP, called.init(DEEP), DEEP, lr=value),
    )


def assert_same(found: Any, expected: Any) -> None:
    pairs = zip(tree.leaves(found), tree.leaves(expected), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


# Values are spread once for each structure ---------------------------------------------


def test_what_is_kept_for_one_structure_is_not_used_for_another():
    opt = fo.sgd(lr=fo.by_name({"*a": 0.5}, default=0.25))
    one, two = torch.ones(1), torch.ones(2)
    trees = [
        ({"a": one, "b": two}, [0.5, 0.25]),
        ({"b": one, "a": two}, [0.5, 0.25]),  # the same structure: keys are sorted
        ({"b": one, "ca": two}, [0.25, 0.5]),
        ({"a": {"b": one, "a": two}}, [0.5, 0.25]),
        ({"b": {"a": one}, "c": {"a": two}}, [0.5, 0.5]),
    ]
    unfit = [one, two]
    for params, rates in trees * 2:
        new = opt.update(params, opt.init(params), params)[0]
        assert [1 - x[0].item() for x in tree.leaves(new)] == rates
        with pytest.raises(fo.HyperparameterError, match="fits none"):
            opt.update(unfit, opt.init(unfit), unfit)


@pytest.mark.parametrize("number", [float, torch.tensor], ids=["floats", "tensors"])
def test_a_tree_of_values_has_the_gaps_of_params(number: Any):
    params = {"a": torch.ones(2), "gap": None, "b": [None, torch.ones(1)]}
    rates = {"a": number(0.5), "gap": None, "b": [None, number(0.25)]}
    opt, many = fo.sgd(lr=rates), tree.map(lambda p: 0.5 * torch.ones_like(p), params)
    for given, last in [({}, 0.75), ({"lr": rates}, 0.75), ({"lr": many}, 0.5)]:
        new = opt.update(params, opt.init(params), params, **given)[0]
        assert new["gap"] is None and new["b"][0] is None
        assert new["a"].tolist() == [0.5, 0.5] and new["b"][1].item() == last
    grads = {**params, "a": None}  # nothing else is let through
    for bad in ({**rates, "a": None}, {**rates, "b": None}):
        with pytest.raises(fo.HyperparameterTypeError, match=r"lr is None at '[ab]"):
            opt.update(grads, opt.init(params), params, lr=bad)
    with pytest.raises(fo.HyperparameterTypeError, match="not None"):
        fo.sgd(lr=None)  # pyright: ignore[reportArgumentType]


def test_more_structures_than_are_kept():
    opt = fo.sgd(lr=[0.5, 0.25])
    for _ in range(2):
        for n in range(1, 80):
            params = [torch.ones(1)] * 1, [torch.ones(1)] * n
            new = opt.update(params, opt.init(params), params)[0]
            assert [x.item() for x in tree.leaves(new)] == [0.5] + [0.75] * n


def test_a_dict_changed_by_its_owner_is_another_value():
    """The optimizer is a value: what the caller does to his dict later is his affair."""
    rates = {"body": 0.25, "head": 0.5}
    opt = fo.sgd(lr=rates)
    before = opt.update(DEEP, opt.init(DEEP), DEEP)
    rates["body"] = 100.0
    assert_same(opt.update(DEEP, opt.init(DEEP), DEEP), before)
    wider = {"body": DEEP["body"], "head": torch.ones(1)}  # a structure not seen so far
    new = opt.update(wider, opt.init(wider), wider)[0]
    assert torch.equal(new["body"]["bias"], torch.full((3,), 1.5))


def test_threads_do_not_disturb_each_other():
    """Eight threads, one optimizer, as many trees: each gets what it gets alone."""
    opt = fo.adam(lr=fo.by_name({"*0": 0.1}, default=0.01))

    def train(n: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(n)
        params = {str(i): torch.randn(3, generator=generator) for i in range(n % 4 + 1)}
        params |= {f"thread{n}": {"w": torch.randn(2, generator=generator)}}
        state = opt.init(params)
        for _ in range(30):
            params, state = opt.update(params, state, params, eps=10.0 ** -(n + 1))
        return tree.leaves((params, state))

    alone = [train(n) for n in range(8)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(train, range(8)))
    assert_same(together, alone)


# Precision -----------------------------------------------------------------------------

BETA_FORMS: dict[str, Callable[[float], Any]] = {
    "float": float,
    "0-d float32": lambda beta: torch.tensor(beta, dtype=torch.float32),
    "0-d float64": f64,
    "tree of float32": lambda beta: {"w": torch.tensor(beta, dtype=torch.float32)},
    "schedule": lambda beta: fo.Schedule(lambda count: torch.tensor(beta).float()),
}


@pytest.mark.parametrize("form", BETA_FORMS)
@pytest.mark.parametrize("step", [1, 7, 10_000])
def test_bias_corrections_are_float64(form: str, step: int):
    """1 - β₂ᵗ in float32 at β₂ = 1 - 2⁻²⁰ and t = 1 would keep three digits of seven."""
    beta = 1 - 2**-20  # a float32 number: the forms agree to the last bit
    opt = fo.adam(lr=1.0, betas=(0.5, BETA_FORMS[form](beta)), eps=0.0)
    params = {"w": torch.zeros(1)}
    v = 3.0
    state = {
        "step": torch.tensor([step - 1]),
        "exp_avg": {"w": torch.zeros(1)},
        "exp_avg_sq": {"w": torch.tensor([v])},
    }
    new = opt.update({"w": torch.ones(1)}, state, params)[0]["w"].item()
    m_hat = 0.5 / (1 - 0.5**step)
    v_hat = (beta * v + (1 - beta)) / (1 - beta**step)
    assert new == pytest.approx(-m_hat / math.sqrt(v_hat), rel=3e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1), f64(0.1)])
def test_a_hyperparameter_s_dtype_is_never_a_parameter_s(dtype: torch.dtype, lr: Any):
    params = {"w": torch.ones(3, dtype=dtype), "scale": torch.ones((), dtype=dtype)}
    opt = fo.adamw(lr=lr, betas=(f64(0.9), torch.tensor(0.99)))
    new, state = opt.update(params, opt.init(params), params)
    assert all(x.dtype == dtype for x in tree.leaves(new))
    assert all(x.dtype == dtype for x in tree.leaves(state["exp_avg_sq"]))
    assert state["step"].dtype == torch.int64


def test_a_leaf_s_own_tensor_may_be_of_more_digits():
    params = torch.ones(3)
    new = fo.sgd().update(params, fo.sgd().init(params), params, lr=ROW.double())[0]
    assert new.dtype == torch.float32 and torch.equal(new, 1 - ROW)


@pytest.mark.parametrize("case", QUICK, ids=str)
def test_a_value_for_each_element_is_refused_or_leaves_the_state_as_it_is(case: Case):
    """It may not make a slot with elements of one without: before any is written to."""
    opt, values = case.optimizer(), case.floats()
    p = torch.linspace(0.5, 1.5, 6, dtype=torch.float64).reshape(2, 3)
    for name, value in values.items():
        wholes = [*value] if isinstance(value, tuple) else [value]
        for i, whole in enumerate(wholes):
            given = [*wholes[:i], torch.full_like(p, whole), *wholes[i + 1 :]]
            given = tuple(given) if isinstance(value, tuple) else given[0]
            params, state = p.clone(), opt.init(p)
            before = [x.clone() for x in tree.leaves((params, state))]
            try:
                for _ in range(2):
                    opt.update(p, state, params, donate=True, execution="reference",
                               **{**values, name: given})  # fmt: skip
            except fo.HyperparameterError as error:
                assert "one number per leaf" in str(error)
                assert all(map(torch.equal, tree.leaves((params, state)), before))
            after = tree.leaves((params, state))
            assert [x.shape for x in after] == [x.shape for x in before]


def test_a_total_that_is_no_sum_is_refused():
    def rule(g: Tensor, p: Tensor, *, step: int, lr: Any, size: Tensor) -> Any:
        return (p - lr * g / size,)

    opt = fo.elementwise(
        rule, name="divided", slots={}, hyper={"lr": Hyper(0.1)},
        totals={"size": lambda g, p, *, step, lr: (g * g).sum() * lr})  # fmt: skip
    p = torch.ones(4)
    assert opt.update(p, opt.init(p), p)[0][0] == 0.75
    for leaves in (p, [p, torch.ones(3)]):
        for execution in (None, "reference"):
            with pytest.raises(fo.HyperparameterError, match="'size' is one number"):
                lr = tree.map(torch.ones_like, leaves)
                opt.update(leaves, opt.init(leaves), leaves, lr=lr, execution=execution)


def test_what_a_value_looks_like():
    assert repr(fo.sgd(lr=0.1)) == "sgd(lr=0.1, weight_decay=0.0)"
    assert repr(fo.by_name({"*b": 0.5}, default=1)) == "by_name({'*b': 0.5}, default=1)"

    def warmup(count: int) -> float:
        return 0.1 * count

    assert repr(fo.Schedule(warmup)) == "Schedule(warmup)"
    assert repr(fo.per_step([0.1])) == "per_step([0.1])"
