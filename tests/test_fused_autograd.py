"""Derivatives by kernels: those of the reference, under autograd and every transform."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from row import Case
from table import ELEMENTWISE_ENDS, ELEMENTWISE_MIXES, slots_of
from test_derivatives import warm_state
from torch import Tensor
from torch.autograd import forward_ad, functional
from torch.autograd.graph import saved_tensors_hooks
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from trees import assert_close, assert_same, mixed, random_like, relative

import funcopt as fo
from funcopt import tree
from funcopt.execution import executor_choice
from funcopt.execution.launch_cache import LaunchCache
from funcopt.execution.rule_call import RuleCall
from funcopt.hyper import Hyper
from funcopt.types import Tree

FAST = ["foreach", "native"]
# Of the leaf's largest number.
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}
# ∂/∂mu of asgd is the sum of p - ax, both just rounded, and a tenth of either.
CANCELLING = {("asgd", torch.float32): 4e-6}


def tolerance_of(case: Case, dtype: torch.dtype) -> float:
    return CANCELLING.get((case.row.name, dtype), TOLERANCE[dtype])


def row_of(name: str) -> Case:
    """The optimizer with the most of its flags."""
    return next(case for case in reversed(ELEMENTWISE_ENDS) if case.row.name == name)


#: every rule once, with flags
ONCE = ELEMENTWISE_ENDS[1::2]
# One of each kind: bias corrections, a condition on the step, numbers per leaf, plain.
FEW = [row_of(name) for name in ("adamw", "radam", "nadam", "sgd")]


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Calls that torch's own operations had to compute, where a kernel was forced."""
    calls: list[str] = []
    original = RuleCall.plain

    def spy(self: RuleCall, *tensors: Tensor) -> tuple[Tensor, ...]:
        calls.append("plain")
        return original(self, *tensors)

    monkeypatch.setattr(RuleCall, "plain", spy)
    yield calls


def positive(like: Any, seed: int) -> Any:
    return tree.map(torch.abs, random_like(like, seed))


def point_of(case: Case, dtype: torch.dtype, steps: int = 1) -> dict[str, Any]:
    """All that an unrolled run depends on; exact in float32.

    Of one sign: where terms cancel, what remains of them is their rounding.
    """
    params = positive(mixed(torch.float32), seed=1)
    opt, state = case.optimizer(), case.optimizer().init(params)
    for k in range(case.row.warm):
        _, state = opt.update(positive(params, 11 + k), state, params)
    count = state.pop("step")
    given = {
        "params": params,
        "grads": [positive(params, 2 + k) for k in range(steps)],
        "slots": state,
        "hyper": case.tensors(torch.float32),
    }

    def cast(x: Tensor) -> Tensor:
        return x if x.dtype is torch.float64 else x.to(dtype)

    given = tree.map(cast, given)
    # A hyperparameter is float64 wherever it is used.
    given["hyper"] = tree.map(lambda x: x.double(), given["hyper"])
    return given | {"step": count}


def outputs(case: Case, name: str | None, point: dict[str, Any]) -> Any:
    opt, params = case.optimizer(), point["params"]
    state = {"step": point["step"], **point["slots"]}
    for grads in point["grads"]:
        params, state = opt.update(grads, state, params, execution=name, **point["hyper"])
    return {"params": params, **{k: v for k, v in state.items() if k != "step"}}


def weighted(result: Any) -> Tensor:
    """A scalar in which every number that comes out has a weight of its own."""
    leaves = tree.leaves(result)
    weights = tree.leaves(positive([x.detach().double() for x in leaves], seed=7))
    return torch.stack([(x.double() * w).sum() for x, w in zip(leaves, weights)]).sum()


def gradients(case: Case, name: str | None, point: dict[str, Any]) -> Any:
    varied = {k: v for k, v in point.items() if k != "step"}
    leaves, structure = tree.flatten(varied)
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    again = tree.unflatten(structure, leaves) | {"step": point["step"]}
    found = torch.autograd.grad(
        weighted(outputs(case, name, again)),
        leaves,
        allow_unused=True,
        materialize_grads=True,
    )
    return tree.unflatten(structure, found)


def assert_gradients(found: Any, oracle: Any, tolerance: float) -> None:
    """Each gradient, relative to its largest number over all leaves; in float64."""
    assert found.keys() == oracle.keys()
    for key, expected in oracle.items():
        if key in ("slots", "hyper"):
            assert_gradients(found[key], expected, tolerance)
        else:
            a, b = (
                torch.cat([x.double().flatten() for x in tree.leaves(value)])
                for value in (found[key], expected)
            )
            error = relative(a, b)
            assert error <= tolerance, f"{key} is off by {error:.1e}"


def costly(dtypes: Any) -> list[Any]:
    ends = {str(case) for case in ELEMENTWISE_ENDS}
    return [
        pytest.param(
            case,
            dtype,
            id=f"{case}-{dtype}".replace("torch.", ""),
            marks=[]
            if dtype is torch.float32 and str(case) in ends
            else pytest.mark.slow,
        )
        for dtype in dtypes
        for case in ELEMENTWISE_MIXES
    ]


@pytest.mark.costly
@pytest.mark.parametrize("case, dtype", costly(TOLERANCE))
@pytest.mark.parametrize("name", FAST)
def test_gradients_of_a_step(name: str, case: Case, dtype: torch.dtype, plain: list[str]):
    """To the gradients, parameters, state and every float hyperparameter."""
    found = gradients(case, name, point_of(case, dtype))
    assert not plain
    oracle = gradients(case, "reference", point_of(case, torch.float64))
    assert_gradients(found, oracle, tolerance_of(case, dtype))
    used = oracle["hyper"].keys() - set(case.row.idle)
    assert all((tree.leaves(oracle["hyper"][k])[0] != 0).all() for k in used - {"lr"})


@pytest.mark.costly
@pytest.mark.parametrize("case, dtype", costly(TOLERANCE))
@pytest.mark.parametrize("name", FAST)
def test_gradients_of_three_steps(name: str, case: Case, dtype: torch.dtype):
    found = gradients(case, name, point_of(case, dtype, steps=3))
    oracle = gradients(case, "reference", point_of(case, torch.float64, steps=3))
    assert_gradients(found, oracle, tolerance_of(case, dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", FEW, ids=str)
@pytest.mark.parametrize("name", FAST)
def test_gradients_of_half_leaves(name: str, case: Case, dtype: torch.dtype):
    """As the reference's in the same dtype: each is rounded to it a few times."""
    point = point_of(case, dtype)
    found, expected = (gradients(case, each, point) for each in (name, "reference"))
    for a, b in zip(tree.leaves(found), tree.leaves(expected)):
        assert a.dtype is b.dtype
    assert_gradients(found, tree.map(Tensor.double, expected), 4 * torch.finfo(dtype).eps)


# --- hyperparameters of every kind


def number(value: float, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(value, dtype=dtype)


def shaped(p: Tensor) -> Tensor:
    return random_like(p, seed=5).abs() / 10


RATES: dict[str, Callable[[Tree], Any]] = {
    "one": lambda p: number(0.1),
    "float32": lambda p: number(0.1, torch.float32),
    "per leaf": lambda p: {"layers": [number(0.1), number(0.2)], "empty": number(0.3)},
    "some": lambda p: {"layers": [number(0.1), 0.2], "empty": 0.3},
    "leaf-shaped": lambda p: tree.map(shaped, p),
    "broadcast": lambda p: tree.map(lambda x: shaped(x[:1]) if x.ndim else shaped(x), p),
    "last axis": lambda p: tree.map(
        lambda x: shaped(x[0]) if x.ndim == 2 and len(x) else 0.1, p
    ),
    "leaf-shaped float64": lambda p: tree.map(lambda x: shaped(x).double(), p),
}


@pytest.mark.costly
@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("case", [FEW[0], FEW[1], FEW[3]], ids=str)
@pytest.mark.parametrize("name", FAST)
def test_rates_of_every_kind(name: str, case: Case, rate: str):
    params = mixed(torch.float32, seed=1)
    grads, state = random_like(params, 2), warm_state(case, params)
    like = RATES[rate](params)

    def slopes(name: str, dtype: torch.dtype) -> list[Tensor]:
        def cast(x: Tensor) -> Tensor:
            return x.to(dtype) if x.is_floating_point() else x

        lr = tree.map(
            lambda x: x.clone().requires_grad_() if isinstance(x, Tensor) else x, like
        )
        result = case.optimizer().update(
            *(tree.map(cast, x) for x in (grads, state, params)), lr=lr, execution=name
        )
        asked = [x for x in tree.leaves(lr) if isinstance(x, Tensor)]
        state_of = {k: v for k, v in result[1].items() if k != "step"}
        return list(torch.autograd.grad(weighted((result[0], state_of)), asked))

    found, oracle = slopes(name, torch.float32), slopes("reference", torch.float64)
    for a, b in zip(found, oracle):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert relative(a.double(), b.double()) <= 1e-6
    assert sum(x.any() for x in oracle) >= min(len(oracle), 2)


# --- transforms

Function = Callable[..., Tensor]  #: of a gradient, a parameter and a rate


def function_of(case: Case, name: str) -> Function:
    """A smooth scalar of one step from a warm state."""
    opt, like = case.optimizer(), random_like(torch.empty(3, dtype=torch.float64), 1)
    state = warm_state(case, like)

    def function(g: Tensor, p: Tensor, lr: Tensor) -> Tensor:
        new, after = opt.update(g, state, p, lr=lr, execution=name)
        total = (new**3).sum()
        for slot in slots_of(after):
            total = total + (after[slot] ** 2).sum()
        return total

    return function


def arguments() -> tuple[Tensor, Tensor, Tensor]:
    g, p = random_like([torch.empty(3, dtype=torch.float64)] * 2, seed=3)
    return g, p, number(0.1)


def tasks() -> tuple[Tensor, Tensor, Tensor]:
    g, p = random_like([torch.empty(4, 3, dtype=torch.float64)] * 2, seed=4)
    return g, p, torch.tensor([0.1, 0.2, 0.05, 0.3], dtype=torch.float64)


ALL = (0, 1, 2)


def by_autograd(f: Function) -> Any:
    leaves = [x.requires_grad_() for x in arguments()]
    return torch.autograd.grad(f(*leaves), leaves)


def by_autograd_twice(f: Function) -> Any:
    leaves = [x.requires_grad_() for x in arguments()]
    first = torch.autograd.grad(f(*leaves), leaves, create_graph=True)
    total = torch.stack([(x**2).sum() for x in first]).sum()
    return torch.autograd.grad(total, leaves)


def by_autograd_three_times(f: Function) -> Any:
    leaves = [x.requires_grad_() for x in arguments()]
    total = f(*leaves)
    for _ in range(2):
        first = torch.autograd.grad(total, leaves, create_graph=True)
        total = torch.stack([(x**2).sum() for x in first]).sum()
    return torch.autograd.grad(total, leaves)


def by_dual_numbers(f: Function) -> Any:
    values, tangents = arguments(), random_like(list(arguments()), seed=8)
    with forward_ad.dual_level():
        out = f(*map(forward_ad.make_dual, values, tangents))
        return list(forward_ad.unpack_dual(out))


def by_one_dual_number(f: Function) -> Any:
    g, p, lr = arguments()
    with forward_ad.dual_level():
        out = f(g, forward_ad.make_dual(p, torch.ones_like(p)), lr)
        return list(forward_ad.unpack_dual(out))


def backward_in_dual_level(f: Function) -> Any:
    g, p, lr = arguments()
    p.requires_grad_()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(p, torch.ones_like(p))
        (slope,) = torch.autograd.grad(f(g, dual, lr), p, create_graph=True)
        return list(forward_ad.unpack_dual(slope))


def pushed(f: Function) -> Any:
    return jvp(f, arguments(), tuple(random_like(list(arguments()), seed=8)))


def pushed_twice(f: Function) -> Any:
    g, p, lr = arguments()

    def along(p: Tensor) -> Tensor:
        return jvp(lambda q: f(g, q, lr), (p,), (torch.ones_like(p),))[1]

    return jvp(along, (p,), (torch.ones_like(p),))


def of_two_rates(f: Function) -> Any:
    g, p, _ = arguments()
    rates = torch.tensor([0.1, 0.2], dtype=torch.float64)
    return vmap(grad(f, argnums=2), in_dims=(None, None, 0))(g, p, rates)


TRANSFORMS: dict[str, Callable[[Function], Any]] = {
    "autograd": by_autograd,
    "autograd twice": by_autograd_twice,
    "autograd three times": by_autograd_three_times,
    "autograd, vectorized": lambda f: functional.jacobian(
        lambda *x: f(*x) ** torch.tensor([2, 3]), arguments(), vectorize=True
    ),
    "autograd twice, vectorized": lambda f: functional.hessian(
        f, arguments(), vectorize=True
    ),
    "forward mode, vectorized": lambda f: functional.jacobian(
        f, arguments(), vectorize=True, strategy="forward-mode"
    ),
    "grad": lambda f: grad(f, argnums=ALL)(*arguments()),
    "vjp": lambda f: vjp(f, *arguments())[1](number(2.0)),
    "jvp": pushed,
    "jvp of jvp": pushed_twice,
    "forward mode": by_dual_numbers,
    "forward mode, one argument": by_one_dual_number,
    "forward over backward": backward_in_dual_level,
    "jacfwd": lambda f: jacfwd(f, argnums=ALL)(*arguments()),
    "jacrev": lambda f: jacrev(f, argnums=ALL)(*arguments()),
    "hessian": lambda f: hessian(f, argnums=ALL)(*arguments()),
    "jacrev of jacrev": lambda f: jacrev(jacrev(f, argnums=ALL), argnums=ALL)(
        *arguments()
    ),
    "jacrev of jacfwd": lambda f: jacrev(jacfwd(f, argnums=ALL), argnums=ALL)(
        *arguments()
    ),
    "grad of grad of grad": lambda f: grad(
        lambda p: grad(lambda q: grad(f, argnums=1)(p, q, p.sum() / 9).sum())(p).sum()
    )(arguments()[1]),
    "vmap of grad": lambda f: vmap(grad(f, argnums=ALL))(*tasks()),
    "vmap of grad, shared rate": lambda f: vmap(
        grad(f, argnums=ALL), in_dims=(0, 0, None)
    )(*tasks()[:2], number(0.1)),
    "vmap of grad, own rates only": of_two_rates,
    "grad of vmap": lambda f: grad(lambda *x: vmap(f)(*x).sum(), argnums=ALL)(*tasks()),
    "grad of vmap, shared rate": lambda f: grad(
        lambda *x: vmap(f, in_dims=(0, 0, None))(*x).sum(), argnums=ALL
    )(*tasks()[:2], number(0.1)),
    "grad of vmap, shared parameters": lambda f: grad(
        lambda *x: vmap(f, in_dims=(0, None, None))(*x).sum(), argnums=ALL
    )(tasks()[0], *arguments()[1:]),
    "vmap of vmap of grad": lambda f: vmap(
        vmap(grad(f, argnums=ALL), in_dims=(0, None, 0)), in_dims=(None, 0, None)
    )(*tasks()),
    "vmap of grad of vmap": lambda f: vmap(
        grad(lambda p, lr, gs: vmap(lambda g: f(g, p, lr))(gs).sum(), argnums=(0, 1)),
        in_dims=(0, 0, None),
    )(*tasks()[1:], tasks()[0]),
    "vmap of hessian": lambda f: vmap(hessian(f, argnums=(1, 2)))(*tasks()),
    "vmap of jvp": lambda f: vmap(lambda *x: jvp(f, x, x))(*tasks()),
    "jvp of vmap": lambda f: jvp(vmap(f), tasks(), tasks()),
    "grad of per-sample grads": lambda f: grad(
        lambda p: (
            vmap(grad(f, argnums=1), in_dims=(0, None, 0))(tasks()[0], p, tasks()[2])
            .square()
            .sum()
        )
    )(arguments()[1]),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("case", FEW, ids=str)
@pytest.mark.parametrize("name", FAST)
def test_under_every_transform(name: str, case: Case, transform: str):
    apply = TRANSFORMS[transform]
    expected = tree.leaves(apply(function_of(case, "reference")))
    found = tree.leaves(apply(function_of(case, name)))
    assert len(found) == len(expected) and any(x.any() for x in expected)
    for a, b in zip(found, expected):
        assert relative(a, b) <= 1e-12


BACKWARD = ["autograd", "autograd twice", "grad", "vjp", "vmap of grad", "grad of vmap"]
FORWARD = ["jvp", "forward mode", "jacfwd", "vmap of jvp", "jvp of vmap"]


@pytest.mark.parametrize("transform", BACKWARD + FORWARD)
def test_kernels_compute_what_they_can(transform: str, plain: list[str]):
    TRANSFORMS[transform](function_of(FEW[0], "native"))
    assert not plain


# By how many operations they have: sgd 2, with momentum 5, adamw 11.
SHORT: list[fo.Optimizer] = [fo.sgd(), fo.sgd(momentum=0.9), fo.adamw()]
WORTH: dict[str, list[str]] = {
    "autograd": ["reference", "reference", "native"],
    "grad": ["reference", "reference", "reference"],
    "jvp": ["reference", "native", "native"],
    "forward mode": ["reference", "native", "native"],
    "vmap of jvp": ["reference", "native", "native"],
    "jvp of vmap": ["reference", "native", "native"],
    "jvp of jvp": ["reference", "reference", "reference"],
    "forward over backward": ["reference", "reference", "native"],
}


def chosen_for(opt: fo.Optimizer, transform: str) -> set[str]:
    like = arguments()[1]
    _, state = opt.update(like, opt.init(like), like)

    def step(g: Tensor, p: Tensor, lr: Tensor) -> Tensor:
        return (opt.update(g, state, p, lr=lr)[0] ** 3).sum()

    with executor_choice.observed() as groups:
        TRANSFORMS[transform](step)
    return {group.choice.name for group in groups}


@pytest.mark.parametrize("transform", WORTH)
def test_kernels_where_they_are_worth_it(transform: str):
    """Of a short rule torch's own derivative is as fast; least so in forward mode."""
    found = [chosen_for(opt, transform) for opt in SHORT]
    assert found == [{name} for name in WORTH[transform]]


@pytest.mark.parametrize("transform", ["jvp", "forward mode"])
def test_forward_mode_looks_once(transform: str, monkeypatch: pytest.MonkeyPatch):
    """At tensors like those of an earlier step."""
    learned: list[Any] = []
    learn = LaunchCache.learn
    monkeypatch.setattr(
        LaunchCache, "learn", lambda *given: (learned.append(given), learn(*given))
    )
    f = function_of(FEW[0], "native")
    TRANSFORMS[transform](f)
    assert learned
    count = len(learned)
    TRANSFORMS[transform](f)
    assert len(learned) == count


@pytest.mark.costly
@pytest.mark.parametrize("moving", ["all", "params"])
@pytest.mark.parametrize("case", ELEMENTWISE_ENDS, ids=str)
def test_forward_mode_from_the_first_step(case: Case, moving: str):
    """A power of the step may have no derivative there, which nobody asks for."""
    point = point_of(case, torch.float64, steps=2)
    fixed = {k: v for k, v in point.items() if k in ("params", "grads", "hyper")}
    given = {k: fixed.pop(k) for k in [*fixed] if moving in ("all", k)}
    start = case.optimizer().init(point["params"])

    def steps(given: Any, name: str) -> Any:
        fresh = {"step": start["step"], "slots": {**start}}
        fresh["slots"].pop("step")
        return outputs(case, name, {**fixed, **given, **fresh})

    expected, found = (
        jvp(partial(steps, name=name), (given,), (random_like(given, seed=8),))[1]
        for name in ("reference", "native")
    )
    for a, b in zip(tree.leaves(found), tree.leaves(expected)):
        assert a.isfinite().all()
        assert relative(a, b) <= 1e-12


# Of both kinds of rates: a number is fixed, and not followed.
@pytest.mark.parametrize("case", FEW, ids=str)
def test_forward_mode_of_a_tensor_beside_a_number(case: Case):
    opt = case.optimizer()
    params = {"a": arguments()[1], "b": arguments()[0]}
    state, grads = warm_state(case, params), random_like(params, 3)

    def step(lr: Tensor, params: Tree, name: str) -> Any:
        return opt.update(grads, state, params, lr={"a": lr, "b": 0.2}, execution=name)

    given = (number(0.1), params)
    expected, found = (
        jvp(partial(step, name=name), given, tuple(random_like([*given], 8)))
        for name in ("reference", "native")
    )
    for a, b in zip(tree.leaves(found), tree.leaves(expected)):
        assert relative(a, b) <= 1e-12


@pytest.mark.parametrize("outside", ["jvp", "vmap"])
@pytest.mark.parametrize("case", FEW, ids=str)
def test_a_tangent_of_another_dtype(case: Case, outside: str):
    """Torch's of a 0-d float32 tensor times a Python number is float64."""
    p = arguments()[1].float()
    state, opt = warm_state(case, p), case.optimizer()

    def step(x: Tensor, half: Any) -> Any:
        return opt.update((half * x).expand(p.shape), state, p, execution="native")

    def pushed(t: Tensor, half: Any) -> Any:
        return jvp(partial(step, half=half), (torch.tensor(0.7),), (t,))[1]

    push = vmap(pushed, (0, None)) if outside == "vmap" else pushed
    along = torch.tensor([1.0, 2.0]) if outside == "vmap" else torch.tensor(1.0)
    found, expected = (push(along, half) for half in (0.5, torch.tensor(0.5)))
    for a, b in zip(tree.leaves(found), tree.leaves(expected)):
        assert a.dtype is b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("case", [*FEW, *map(row_of, ("adopt", "asgd"))], ids=str)
def test_forward_mode_of_tasks_unequally_old(case: Case):
    opt = case.optimizer()
    grads, params, _ = tasks()
    states: list[Any] = []
    for age, p in enumerate(params):
        state = warm_state(case, p)
        for step in range(age):
            _, state = opt.update(random_like(p, 20 + step), state, p)
        states.append(state)
    state = tree.map(lambda *slots: torch.stack(slots), *states)

    def pushed(g: Tensor, p: Tensor, state: Any, name: str) -> Any:
        return jvp(lambda p: opt.update(g, state, p, execution=name), (p,), (g,))

    expected, found = (
        vmap(partial(pushed, name=name))(grads, params, state)
        for name in ("reference", "native")
    )
    for a, b in zip(tree.leaves(found), tree.leaves(expected)):
        assert relative(a, b) <= 1e-12


# --- cotangents, graphs, memory


def step_of(params: Tree, name: str, followed: bool = False, **hyper: Any) -> Any:
    opt = FEW[0].optimizer()
    state = warm_state(FEW[0], tree.map(Tensor.detach, params))
    grads = random_like(params, 2)
    for g in tree.leaves(grads):
        g.requires_grad_(followed)
    return opt.update(grads, state, params, execution=name, **hyper)


COTANGENTS: dict[str, Callable[[Any], Tensor]] = {
    "expanded": lambda r: r[0].sum(),
    "of a slot alone": lambda r: r[1]["exp_avg"].sum(),
    "of some elements": lambda r: r[0][1:, ::2].sum(),
    "transposed": lambda r: (r[0].mT @ torch.ones(4, 2)).sum(),
    "of another order": lambda r: (r[0].mT.contiguous() ** 2).sum(),
    "none of the parameter": lambda r: (r[1]["exp_avg_sq"] ** 2).sum(),
    "twice": lambda r: (r[0] * r[0].detach()).sum() + r[0].sum(),
}


@pytest.mark.parametrize("kind", ["plain", "transposed", "gaps"])
@pytest.mark.parametrize("what", COTANGENTS)
@pytest.mark.parametrize("name", FAST)
def test_cotangents(name: str, what: str, kind: str):
    found = []
    for each in (name, "reference"):
        p = random_like(torch.empty(4, 3), 1)
        if kind == "transposed":
            p = random_like(torch.empty(3, 4), 1).mT
        elif kind == "gaps":
            p = random_like(torch.empty(4, 6), 1)[:, ::2]
        p.requires_grad_()
        lr = number(0.1).requires_grad_()
        total = COTANGENTS[what](step_of(p, each, followed=True, lr=lr))
        found.append(
            torch.autograd.grad(total, [p, lr], allow_unused=True, materialize_grads=True)
        )
    for a, b in zip(*found):
        assert relative(a, b) <= 1e-6
    assert what in ("of a slot alone", "none of the parameter") or found[1][0].any()


@pytest.mark.parametrize("asked", ["params", "grads", "lr", "exp_avg"])
@pytest.mark.parametrize("name", FAST)
def test_only_one_is_followed(name: str, asked: str):
    """Others keep no gradient, and results that do not depend on it no graph."""
    case = FEW[0]
    slopes = []
    for each in (name, "reference"):
        params = mixed(torch.float32, seed=1)
        state = warm_state(case, params)
        grads, lr = random_like(params, 2), number(0.1)
        given = {"params": params, "grads": grads, "lr": lr, **state}[asked]
        for x in tree.leaves(given):
            x.requires_grad_()
        result = case.optimizer().update(grads, state, params, lr=lr, execution=each)
        slopes.append(torch.autograd.grad(weighted(result[0]), tree.leaves(given)))
    for a, b in zip(*slopes):
        assert relative(a, b) <= 1e-6
        assert b.any() or not b.numel()


@pytest.mark.parametrize("form", ["a rate for each leaf", "a rate"])
@pytest.mark.parametrize("case", FEW, ids=str)
@pytest.mark.parametrize("name", FAST)
def test_a_leaf_of_which_nothing_is_asked_has_no_gradient(
    name: str, case: Case, form: str
):
    """None as of the reference, for by zeros an outer optimizer would decay it."""
    found = []
    for each in (name, "reference"):
        params = random_like({"a": torch.empty(3), "b": torch.empty(2, 2)}, 1)
        state, grads = warm_state(case, params), random_like(params, 2)
        rates = {"a": number(0.1), "b": number(0.2)}
        lr = rates if form == "a rate for each leaf" else rates["b"]
        inputs = [*tree.leaves([params, grads]), *tree.leaves(lr)]
        for x in inputs:
            x.requires_grad_()
        new, _ = case.optimizer().update(grads, state, params, lr=lr, execution=each)
        slopes = torch.autograd.grad(new["b"].square().sum(), inputs, allow_unused=True)
        found.append(slopes)
    missing = [slope is None for slope in found[0]]
    assert missing == [slope is None for slope in found[1]] and missing[0]
    for a, b in zip(*found):
        assert b is None or (b.any() and relative(a, b) <= 1e-6)


@pytest.mark.parametrize("name", FAST)
def test_saves_its_inputs_and_nothing_else(name: str):
    params = random_like([torch.empty(100, 3), torch.empty(41)], 1)
    for p in params:
        p.requires_grad_()
    lr = number(0.1).requires_grad_()
    state = warm_state(FEW[0], [p.detach() for p in params])
    grads = random_like([p.detach() for p in params], 2)
    slots = [x for slot in slots_of(state) for x in state[slot]]
    inputs = {x.data_ptr() for x in (*params, *grads, *slots)}
    saved: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        saved.append(x)
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        FEW[0].optimizer().update(grads, state, params, lr=lr, execution=name)
    large = [x for x in saved if x.numel() > 1]
    assert {x.data_ptr() for x in large} == inputs
    elements = sum(p.numel() for p in params)
    assert sum(x.nbytes for x in large) == elements * 4 * (2 + len(slots_of(state)))
    assert sum(x.nbytes for x in saved if x.numel() == 1) <= 64


@pytest.mark.parametrize("name", FAST)
def test_backward_twice_and_after_a_write(name: str):
    p = random_like(torch.empty(4, 3), 1).requires_grad_()
    new, _ = step_of(p, name)
    first = torch.autograd.grad(new.sum(), p, retain_graph=True)
    again = torch.autograd.grad(new.sum(), p, retain_graph=True)
    assert_same(first, again)
    with torch.no_grad():
        p.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(new.sum(), p)


@pytest.mark.parametrize("name", FAST)
def test_no_graph_where_none_is_asked_for(name: str):
    p = random_like(torch.empty(4, 3), 1)
    assert not step_of(p, name)[0].requires_grad
    with torch.no_grad():
        assert not step_of(p.requires_grad_(), name)[0].requires_grad
    with torch.inference_mode():
        assert step_of(p.detach(), name)[0].is_inference()


class Hyperbolic(torch.autograd.Function):
    """tanh, with a derivative by an operation that is in no kernel."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return torch.tanh(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Tensor:
        return cotangents[0] / torch.cosh(ctx.saved_tensors[0]) ** 2

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        return tangents[0] / torch.cosh(ctx.saved_tensors[0]) ** 2


def bent(g: Tensor, p: Tensor, m: Tensor, *, step: Any, lr: Any) -> tuple[Any, ...]:
    m = torch.lerp(m, Hyperbolic.apply(g * p), 0.5)
    return p - lr * m * (1 + p * p), m


def gated(g: Tensor, p: Tensor, m: Tensor, *, step: Any, lr: Any) -> tuple[Any, ...]:
    m = torch.lerp(m, torch.tanh(g * p), 0.5)
    return p - torch.sigmoid(lr) * m * torch.sigmoid(p), m * torch.tanh(lr)


BENT, GATED = (
    fo.elementwise(
        rule,
        name=rule.__name__,
        slots={"m": torch.ones_like},
        hyper={"lr": Hyper(torch.tensor(0.1, dtype=torch.float64))},
    )
    for rule in (bent, gated)
)
DIFFERENTIATED: dict[str, Callable[[Any], Callable[[Tensor], Any]]] = {
    "reverse": grad,
    "reverse over reverse": lambda f: jacrev(jacrev(f)),
    "forward": lambda f: lambda p: jvp(f, (p,), (p + 1,)),
    "forward over reverse": hessian,
    "for each task": lambda f: lambda p: vmap(jacrev(jacrev(f)))(torch.stack([p, 2 * p])),
    "autograd": lambda f: lambda p: functional.hessian(f, p),
}


def check_derivative(opt: fo.Optimizer, what: str, name: str) -> None:
    at = random_like(torch.empty(4, dtype=torch.float64), 1)

    def found(execution: str) -> Any:
        def loss(x: Tensor) -> Tensor:
            p, lr = x[:3], x[3]
            new, state = opt.update(2 * p, opt.init(p), p, lr=lr, execution=execution)
            return new.square().sum() + state["m"].sin().sum()

        return DIFFERENTIATED[what](loss)(at)

    assert_close(found(name), found("reference"), 1e-12)


@pytest.mark.parametrize("what", DIFFERENTIATED)
@pytest.mark.parametrize("name", FAST)
def test_a_derivative_that_no_kernel_has_is_torchs(
    name: str, what: str, plain: list[str]
):
    """Of the first order too where another is asked of it."""
    check_derivative(BENT, what, name)
    assert plain


@pytest.mark.parametrize("what", DIFFERENTIATED)
@pytest.mark.parametrize("name", FAST)
def test_what_saturates_has_kernels_of_its_derivatives(
    name: str, what: str, plain: list[str]
):
    check_derivative(GATED, what, name)
    assert not plain or "forward" in what


def test_a_tensor_of_inference_mode_may_have_a_tangent():
    with torch.inference_mode():
        p = random_like(torch.empty(4, 3), 1)
    opt, found = fo.adam(lr=0.1), []
    for x in (p, p.clone()):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x, torch.ones_like(x))
            new = opt.update([dual], opt.init([x]), [dual])[0][0]
            found.append(forward_ad.unpack_dual(new).tangent)
    assert found[0] is not None and torch.equal(*found)


def test_sums_do_not_depend_on_threads():
    p = random_like(torch.empty(300, 301), 1)
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            lr = number(0.1).requires_grad_()
            new, _ = step_of([p, p[0]], "native", lr=lr)
            found.append(torch.autograd.grad(weighted(new), lr)[0])
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1] == found[2] != 0


@pytest.mark.costly
@pytest.mark.parametrize("case", ONCE, ids=str)
@pytest.mark.parametrize("name", FAST)
def test_a_dead_unit_has_finite_derivatives(name: str, case: Case):
    """Gradients and state that are zero, with an eps as small as in practice."""
    opt = case.optimizer()
    p = torch.tensor([1.0, -2.0, 0.0]).requires_grad_()
    state, hyper = opt.init(p), case.tensors()
    if "eps" in hyper:
        hyper["eps"] = number(1e-8)
    asked = [x.requires_grad_() for x in tree.leaves(hyper)]
    g = torch.tensor([0.0, 0.5, 0.0]).requires_grad_()
    slopes = []
    for each in (name, "reference"):
        new, after = p, state
        for _ in range(case.row.warm + 1):
            new, after = opt.update(g, after, new, execution=each, **hyper)
        slopes.append(
            torch.autograd.grad(
                (new * torch.tensor([1.0, 2.0, 3.0])).sum(),
                [p, g, *asked],
                allow_unused=True,
                materialize_grads=True,
            )
        )
    for a, b in zip(*slopes):
        assert a.isfinite().all()
        assert relative(a, b) <= 1e-5


# --- batches of tasks

STACKS: dict[str, dict[str, Any]] = {
    "everything": {"g": 0, "p": 0, "s": 0},
    "other axes": {"g": 1, "p": -1, "s": 0},
    "shared parameters": {"g": 0, "p": None, "s": None},
    "shared gradients": {"g": None, "p": 0, "s": 0},
    "shared state": {"g": 0, "p": 0, "s": None},
    "own state alone": {"g": None, "p": None, "s": 0},
}
TASKS = 3


def leaf_tree(dtype: torch.dtype = torch.float32) -> Tree:
    shapes = {"w": (4, 5), "b": (37,), "one": (1,), "none": (0,)}
    return {key: torch.empty(shape, dtype=dtype) for key, shape in shapes.items()}


def stack(trees: list[Any], axis: int | None) -> Any:
    """Trees as one with a new axis; the first alone where there is none."""
    if axis is None:
        return trees[0]
    return tree.map(lambda *x: torch.stack(x, axis), *trees)


RATES_OF_TASKS: dict[str, Any] = {
    "fixed": None,
    "shared": number(0.1),
    "own": torch.tensor([0.1, 0.2, 0.05], dtype=torch.float64),
}


@pytest.mark.costly
@pytest.mark.parametrize("rate", RATES_OF_TASKS)
@pytest.mark.parametrize("which", STACKS)
@pytest.mark.parametrize("case", ONCE, ids=str)
@pytest.mark.parametrize("name", FAST)
def test_vmap_is_the_loop(name: str, case: Case, which: str, rate: str, plain: list[str]):
    """Bit by bit, for each task, but for functions that are no arithmetic."""
    opt, axes = case.optimizer(), STACKS[which]
    like = leaf_tree()
    params = [random_like(like, 10 + t) for t in range(TASKS)]
    grads = [random_like(like, 20 + t) for t in range(TASKS)]
    states = [opt.init(p) for p in params]
    for t in range(TASKS):
        for k in range(case.row.warm):
            _, states[t] = opt.update(random_like(like, k + 7 * t), states[t], params[t])
    lr = RATES_OF_TASKS[rate]

    def update(g: Tree, s: Any, p: Tree, lr: Any) -> Any:
        hyper = {} if rate == "fixed" else {"lr": lr}
        return opt.update(g, s, p, execution=name, **hyper)

    lr = number(0.0) if lr is None else lr
    found = vmap(
        update, in_dims=(axes["g"], axes["s"], axes["p"], 0 if lr.ndim else None)
    )(stack(grads, axes["g"]), stack(states, axes["s"]), stack(params, axes["p"]), lr)

    def of(trees: list[Any], axis: int | None, t: int) -> Any:
        return trees[0 if axis is None else t]

    loop = [
        update(
            of(grads, axes["g"], t),
            of(states, axes["s"], t),
            of(params, axes["p"], t),
            lr[t] if lr.ndim else lr,
        )
        for t in range(TASKS)
    ]
    expected = stack(loop, 0)
    if axes["s"] == 0 and case.row.name in ("nadam", "asgd", "radam"):
        assert_close(found, expected, 2e-7)  # a float64 pow against Python's
    else:
        eps = torch.finfo(torch.float32).eps
        assert_close(found, expected, case.row.functions * eps)
    assert not plain


@pytest.mark.parametrize("case", FEW, ids=str)
@pytest.mark.parametrize("name", FAST)
def test_nested_vmap(name: str, case: Case):
    opt, like = case.optimizer(), torch.empty(2, 3, 7)
    params, grads = random_like(like, 1), random_like(like, 2)
    rates = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]])
    state = warm_state(case, like[0, 0] * 0 + 1)

    def update(g: Tensor, p: Tensor, lr: Any) -> Tensor:
        return opt.update(g, state, p, lr=lr, execution=name)[0]

    loop = [
        [update(grads[i, j], params[i, j], rates[i, j]) for j in range(3)]
        for i in range(2)
    ]
    expected = torch.stack([torch.stack(row) for row in loop])
    assert_same(vmap(vmap(update))(grads, params, rates), expected)
    swapped = vmap(vmap(update), in_dims=(1, 1, 1), out_dims=1)(grads, params, rates)
    assert_same(swapped, expected)
    for outer, inner, at in ((None, 0, 0), (0, None, None)):
        lr = rates[0] if outer is None else rates[:, 0]
        both = vmap(vmap(update, in_dims=(0, 0, inner)), in_dims=(0, 0, outer))
        again = [
            [
                update(grads[i, j], params[i, j], lr[j] if at == 0 else lr[i])
                for j in range(3)
            ]
            for i in range(2)
        ]
        assert_same(
            both(grads, params, lr), torch.stack([torch.stack(row) for row in again])
        )


@pytest.mark.parametrize("name", FAST)
def test_tasks_with_steps_and_betas_of_their_own(name: str):
    case = row_of("adamw")
    opt, like = case.optimizer(), torch.empty(TASKS, 9)
    params, grads = random_like(like, 1), random_like(like, 2)
    state = vmap(opt.init)(params)
    state["step"] = torch.tensor([[0], [5], [70]])
    beta = torch.tensor([0.8, 0.9, 0.99], dtype=torch.float64)
    decay = random_like(params, 5).abs() / 10

    def update(g: Tensor, s: Any, p: Tensor, b: Any, d: Any) -> Any:
        hyper = {"betas": (0.9, b), "weight_decay": d}
        return opt.update(g, s, p, execution=name, **hyper)

    found = vmap(update)(grads, state, params, beta, decay)
    expected = [
        update(grads[t], tree.map(lambda x: x[t], state), params[t], beta[t], decay[t])  # noqa: B023
        for t in range(TASKS)
    ]
    assert_close(found, stack(expected, 0), 2e-7)


@pytest.mark.parametrize("name", FAST)
def test_a_stack_is_a_tree_of_larger_leaves(name: str):
    """``update`` on stacked trees needs no vmap: rates that broadcast are the tasks'."""
    case, like = row_of("adamw"), torch.empty(TASKS, 9)
    opt, params, grads = case.optimizer(), random_like(like, 1), random_like(like, 2)
    lr = torch.tensor([0.1, 0.2, 0.05])
    found, _ = opt.update(grads, opt.init(params), params, lr=lr[:, None], execution=name)
    for t in range(TASKS):
        p, g = params[t], grads[t]
        alone, _ = opt.update(g, opt.init(p), p, lr=lr[t].expand(9), execution=name)
        assert torch.equal(found[t], alone)
