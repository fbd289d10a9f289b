"""The step's derivatives: right, of both orders and modes, and finite everywhere."""

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from row import Case, showing
from table import CASES, ENDS, MIXES
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import grad, jvp, vmap
from trees import assert_close, mixed, random_like, relative

import funcopt as fo
from funcopt import tree
from funcopt.types import State, Tree

FlatFunction = Callable[..., tuple[Tensor, ...]]

# How two flags meet is one step's affair, and so is the sign of a gradient: of many steps
# none of the flags, and what shows each of them.
DOWNHILL = [case for case in CASES if not case.flags["maximize"]]
DESCENDING = showing([*ENDS[::2], *reversed(DOWNHILL)], 1)


def loss(params: Tree, weights: Tree) -> Tensor:
    """Smooth and coupled; its gradient has weights' signs and is nowhere near zero."""
    leaves = zip(tree.leaves(params), tree.leaves(weights))
    total = torch.stack([(torch.exp(p / 2) * c).sum() for p, c in leaves]).sum()
    return total + 0.01 * total**2


def warm_state(case: Case, params: Tree) -> State:
    """A state some steps old: in the first one, max_exp_avg_sq ties with exp_avg_sq."""
    opt = case.optimizer()
    state = opt.init(params)
    for step in range(case.row.warm):
        _, state = opt.update(random_like(params, 11 + step), state, params)
    return state


def flat(function: Callable[[Any], Any], argument: Any) -> tuple[FlatFunction, Any]:
    """``function`` of the leaves of its argument to the leaves of its result."""
    leaves, structure = tree.flatten(argument)

    def on_leaves(*leaves: Tensor) -> tuple[Tensor, ...]:
        return tuple(tree.leaves(function(tree.unflatten(structure, leaves))))

    return on_leaves, tuple(leaf.detach().requires_grad_() for leaf in leaves)


def one_step(case: Case) -> tuple[FlatFunction, Any]:
    """A step as a function of gradients, slots, parameters and hyperparameters."""
    opt, params = case.optimizer(), case.small(seed=1)
    state = warm_state(case, params)
    step = state.pop("step")

    def update(x: Tree) -> Tree:
        state = {"step": step, **x["slots"]}
        new, state = opt.update(x["grads"], state, x["params"], **x["hyper"])
        del state["step"]
        return new, state

    grads = random_like(params, seed=2)
    point = {"grads": grads, "slots": state, "params": params, "hyper": case.tensors()}
    return flat(update, point)


def three_steps(case: Case) -> tuple[FlatFunction, Any]:
    """Three steps as a function of parameters, slots, hyperparameters and the data."""
    opt, params = case.optimizer(), case.small(seed=1)
    state = warm_state(case, params)
    step = state.pop("step")

    def unroll(x: Tree) -> Tree:
        state = {"step": step, **x["slots"]}
        run = fo.unroll(
            opt, loss, x["params"], x["data"], steps=3, state=state, hyper=x["hyper"]
        )
        del run.state["step"]
        return run.params, run.state, run.losses

    data = random_like(params, seed=3)
    point = {"params": params, "slots": state, "hyper": case.tensors(), "data": data}
    return flat(unroll, point)


@pytest.mark.costly
@pytest.mark.parametrize("case", MIXES, ids=str)
def test_gradcheck_of_a_step(case: Case):
    function, point = one_step(case)
    assert gradcheck(function, point, check_forward_ad=True)


@pytest.mark.slow
@pytest.mark.parametrize("case", MIXES, ids=str)
def test_gradgradcheck_of_a_step(case: Case):
    function, point = one_step(case)
    # Of mixes of flags between none and all a random projection. torch's takes one
    # output for another where some have no derivative: a sign's gradient is such.
    fast = case not in ENDS and case.row.factory is not fo.signsgd
    assert gradgradcheck(function, point, fast_mode=fast)


@pytest.mark.costly
@pytest.mark.parametrize("case", DESCENDING, ids=str)
def test_gradcheck_of_three_steps(case: Case):
    function, point = three_steps(case)
    assert gradcheck(function, point, check_undefined_grad=False)


@pytest.mark.slow
@pytest.mark.parametrize("case", DESCENDING, ids=str)
def test_gradgradcheck_of_three_steps(case: Case):
    function, point = three_steps(case)
    # A random projection; gradients that are not there are one step's affair.
    assert gradgradcheck(function, point, fast_mode=True, check_undefined_grad=False)


@pytest.mark.costly
@pytest.mark.parametrize("case", MIXES, ids=str)
def test_central_differences(case: Case):
    """A second oracle, past autograd's own checker: one direction at a time."""
    opt, start, data = case.optimizer(), case.mixed(seed=1), case.mixed(seed=2)
    point = {"params": start, "hyper": case.tensors(), "data": data}

    def outer(x: Tree) -> Tensor:
        run = fo.unroll(opt, loss, x["params"], x["data"], steps=3, hyper=x["hyper"])
        return loss(run.params, random_like(start, seed=3))

    slopes, h = grad(outer)(point), 1e-5
    for seed in range(3):
        direction = random_like(point, seed=20 + seed)
        ahead = outer(tree.map(lambda x, d: x + h * d, point, direction))
        behind = outer(tree.map(lambda x, d: x - h * d, point, direction))
        along = tree.map(lambda s, d: (s * d).sum(), slopes, direction)
        slope = torch.stack(tree.leaves(along)).sum()
        assert relative((ahead - behind) / (2 * h), slope) <= 1e-7


def test_the_derivative_of_prodigys_bound_on_growth():
    """From the first step on: by a state alone there is a jump, where its d is d0."""
    opt = fo.prodigy(beta3=0.7, growth_rate=1.1)
    given: Any = {"lr": 0.2, "betas": (0.8, 0.9), "eps": 0.01, "d0": 0.7, "beta3": 0.7}
    hyper = given | {"weight_decay": 0.1, "d_coef": 9.0, "growth_rate": 1.1}
    hyper = tree.map(lambda x: torch.tensor(x, dtype=torch.float64), hyper)

    def unroll(x: Tree) -> Tree:
        run = fo.unroll(opt, loss, x["params"], x["data"], steps=5, hyper=x["hyper"])
        del run.state["step"]
        return run.params, run.state

    params, data = random_like([torch.zeros(2).double()] * 2, 1)
    point = {"params": params, "hyper": hyper, "data": data}
    _, state = unroll(point)
    assert (state["d"] < 0.5 * state["d_max"]).all()
    slopes = grad(lambda x: unroll(x)[0].sum())(point)["hyper"]
    assert slopes["growth_rate"] != 0 and slopes["beta3"] != 0
    assert gradcheck(*flat(unroll, point))


@pytest.mark.parametrize("case", [c for c in ENDS if not c.row.elementwise], ids=str)
def test_forward_mode_around_tasks_with_states_of_their_own(case: Case):
    """The states have the tasks' axis and no tangent, which torch cannot ask them."""
    opt = case.optimizer()
    tasks = tree.map(lambda p: torch.stack([p, 0.9 * p]), case.small(seed=1))
    grads, direction = random_like(tasks, seed=2), random_like(tasks, seed=3)
    _, state = vmap(opt.update)(tasks, vmap(opt.init)(tasks), tasks)

    def step(state: State, g: Tree, p: Tree) -> Tree:
        return opt.update(g, state, p)

    def along(state: State, g: Tree, p: Tree, d: Tree) -> Tree:
        return jvp(lambda p: step(state, g, p)[0], (p,), (d,))[1]

    expected = vmap(along)(state, grads, tasks, direction)
    found = jvp(lambda p: vmap(step)(state, grads, p)[0], (tasks,), (direction,))[1]
    assert_close(found, expected, max(1e-13, case.row.rounding))
    with forward_ad.dual_level():
        dual = tree.map(forward_ad.make_dual, tasks, direction)
        new, _ = vmap(step)(state, grads, dual)
        found = tree.map(lambda p: forward_ad.unpack_dual(p).tangent, new)
    assert_close(found, expected, max(1e-13, case.row.rounding))


def pushed(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: jvp(function, (x,), (torch.ones_like(x),))[1]


@pytest.mark.parametrize("execution", [None, "reference"])
@pytest.mark.parametrize("name", ["nadam", "madgrad", "lamb", "adafactor", "shampoo"])
def test_forward_mode_from_a_float32_number(name: str, execution: str | None):
    """Torch makes a float64 tangent of it and a Python number (pytorch#90065)."""
    opt, start = getattr(fo, name)(lr=0.05), random_like(torch.zeros(2, 3), seed=1)

    def trained(x: Tensor) -> Tensor:
        def loss(p: Tree) -> Tensor:
            return 0.5 * x * sum((q - x).square().sum() for q in p.values())

        p = {"matrix": start.to(x.dtype), "number": 2.0 * x}
        state = opt.init(p)
        for _ in range(2):
            p, state = opt.update(grad(loss)(p), state, p, execution=execution)
        return p["matrix"].sum() + p["number"]

    first, second = grad(trained), grad(grad(trained))
    x = torch.tensor(0.7)
    for found, expected in (
        (pushed(trained), first),
        (pushed(pushed(trained)), second),
        (pushed(first), second),
    ):
        slope = expected(x.double())
        assert slope.abs() > 0.01 and relative(found(x).double(), slope) <= 1e-3


@pytest.mark.parametrize("name", ["asgd", "schedule_free_sgd", "schedule_free_adamw"])
def test_a_tangent_around_grad_goes_through_numbers_of_the_state(name: str):
    """Inside of grad torch does not show it, and the number was taken for a constant."""
    opt, start = getattr(fo, name)(), random_like(torch.zeros(4).double(), seed=1)

    def trained(lr: Tensor, p: Tensor) -> Tensor:
        state = opt.init(p)
        for _ in range(3):
            p, state = opt.update(p.sin() + 0.2 * p, state, p, lr=lr)
        return p.cos().sum()

    lr = torch.tensor(0.1).double()
    found = pushed(lambda lr: grad(trained, argnums=1)(lr, start))(lr)
    assert_close(found, grad(lambda p: grad(trained)(lr, p))(start), 1e-12)


# Of a float64 pow against Python's; in float32 nothing of it is left.
ROUNDING = {torch.float64: 1e-15, torch.float32: 0.0}


@pytest.mark.costly
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("case", ENDS, ids=str)
def test_a_float_and_a_0d_tensor_are_the_same_number(case: Case, dtype: torch.dtype):
    opt, params = case.optimizer(), case.mixed(dtype)
    grads, state = random_like(params, seed=2), warm_state(case, params)
    expected = opt.update(grads, state, params, **case.floats())
    given = opt.update(grads, state, params, **case.tensors())
    made_with = case.optimizer(**case.tensors()).update(grads, state, params)
    assert_close(given, expected, ROUNDING[dtype])
    assert_close(made_with, expected, ROUNDING[dtype])


# The derivative by a dead gradient is lr/eps: with torch's eps beyond float16's 65504.
EPS = {
    torch.float64: 1e-8,
    torch.float32: 1e-8,
    torch.bfloat16: 1e-8,
    torch.float16: 1e-3,
}


def point_with_eps(case: Case, eps: float) -> dict[str, Any]:
    """The hyperparameters as tensors, with an eps as small as in practice."""
    hyper, least = case.tensors(), case.row.least.get("eps", 0.0)
    if "eps" not in hyper:
        return hyper
    first, old = torch.tensor(max(eps, least)), hyper["eps"]
    return hyper | {"eps": (first, *old[1:]) if isinstance(old, tuple) else first}


@pytest.mark.costly
@pytest.mark.parametrize("case", DESCENDING, ids=str)
def test_finite_at_a_dead_unit(case: Case):
    """Zero gradients and a zero state, also with zero parameters."""
    opt, steps = case.optimizer(), case.row.warm + 1  # one for all: traced once
    for dtype, start in product(EPS, ("zeros", "random")):
        target = case.mixed(dtype, seed=1)
        params = case.mixed(dtype, seed=2)
        if start == "zeros":
            params = tree.map(torch.zeros_like, params)
        alive = tree.map(lambda x: (torch.arange(x.numel()) > 0).view(x.shape), params)
        inner = partial(loss_of_the_living, alive)
        dead = tree.leaves(grad(inner)(params, target))
        assert all(g.flatten()[0] == 0 for g in dead if g.numel())

        def outer(x: Tree, inner: Any = inner, target: Tree = target) -> Tensor:
            params, hyper = x["params"], x["hyper"]
            run = fo.unroll(opt, inner, params, target, steps=steps, hyper=hyper)
            return distance(run.params, target)

        at = {"params": params, "hyper": point_with_eps(case, EPS[dtype])}
        slopes = grad(outer)(at)
        for path, slope in zip(tree.paths(tree.flatten(slopes)[1]), tree.leaves(slopes)):
            assert slope.isfinite().all(), (path, dtype, start)
        if case.row.smooth:
            assert slopes["params"]["layers"][0]["weight"].count_nonzero() >= 6
        assert slopes["hyper"]["lr"] != 0, (dtype, start)


def distance(a: Tree, b: Tree) -> Tensor:
    parts = tree.map(lambda x, y: ((x - y) ** 2).sum(), a, b)
    return torch.stack(tree.leaves(parts)).sum()


def loss_of_the_living(alive: Tree, params: Tree, target: Tree) -> Tensor:
    return distance(tree.map(torch.mul, params, alive), target)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", MIXES, ids=str)
def test_finite_at_every_size_of_gradient(case: Case, dtype: torch.dtype):
    """Down to the least number there is: squares that are subnormal, or nothing."""
    sizes = torch.logspace(0, -323, 324, dtype=torch.float64).to(dtype).view(18, 18)
    opt, hyper = case.optimizer(), point_with_eps(case, 1e-8)

    def outer(x: Tree) -> Tensor:
        params = x["params"]
        state = opt.init(params)
        for _ in range(case.row.warm + 1):
            params, state = opt.update(x["grads"], state, params, **x["hyper"])
        return (params - 1).square().sum()

    slopes = grad(outer)(
        {"params": torch.zeros_like(sizes), "grads": sizes, "hyper": hyper}
    )
    assert all(slope.isfinite().all() for slope in tree.leaves(slopes))


@pytest.mark.parametrize("name", ["adam", "adam_atan2", "adagrad", "rmsprop"])
def test_second_derivatives_are_finite_at_a_dead_unit(name: str):
    opt = getattr(fo, name)()

    def outer(x: Tree) -> Tensor:
        params, state = x["params"], opt.init(x["params"])
        for _ in range(2):
            params, state = opt.update(x["grads"], state, params, lr=x["lr"])
        return (params - 1).square().sum()

    dead = torch.tensor([0.0, 0.5], dtype=torch.float64)
    point = {"params": dead, "grads": dead, "lr": torch.tensor(0.1, dtype=torch.float64)}
    squares = grad(lambda x: sum(g.square().sum() for g in tree.leaves(grad(outer)(x))))
    assert all(slope.isfinite().all() for slope in tree.leaves(squares(point)))


# Where a formula has a root of a negative number, 0/0 or 0⁰ in a branch not taken.
CORNERS: dict[str, tuple[fo.Optimizer, dict[str, Any]]] = {
    "radam, never rectified": (fo.radam(), {"betas": (0.9, 0.5)}),
    "radam, four in the denominator": (fo.radam(), {"betas": (0.9, 0.6)}),
    "radam, rectified": (fo.radam(), {"betas": (0.9, 0.99)}),
    "radam without averages": (fo.radam(), {"betas": (0.0, 0.0)}),
    "nadam without averages": (fo.nadam(), {"betas": (0.0, 0.0)}),
    "nadam at full momentum": (fo.nadam(), {"momentum_decay": 0.0}),
    "adamax without averages": (fo.adamax(), {"betas": (0.0, 0.0), "eps": 0.0}),
    "adagrad without eps": (fo.adagrad(), {"eps": 0.0}),
    "adadelta without eps": (fo.adadelta(), {"eps": 0.0}),
    "adadelta without averages": (fo.adadelta(), {"rho": 0.0}),
    "rmsprop, of no variance": (fo.rmsprop(centered=True), {"alpha": 0.0}),
    "adabelief without averages": (fo.adabelief(), {"betas": (0.0, 0.0)}),
    "yogi without a start": (fo.yogi(initial_accumulator_value=0.0), {"eps": 0.0}),
    "adan without averages": (fo.adan(), {"betas": (0.0, 0.0, 0.0), "eps": 0.0}),
    "adopt without averages": (fo.adopt(clip=False), {"betas": (0.0, 0.0), "eps": 0.0}),
    "ademamix, warming up from no average": (
        fo.ademamix(alpha_warmup=3, beta3_warmup=5),
        {"betas": (0.0, 0.0, 0.0), "alpha": 0.0},
    ),
    "adam_atan2 without averages": (fo.adam_atan2(), {"betas": (0.0, 0.0)}),
    "mars_adamw without averages": (fo.mars_adamw(), {"betas": (0.0, 0.0)}),
    "asgd, averaging": (fo.asgd(), {"t0": 1.0, "lambd": 0.0, "alpha": 0.0}),
    "rprop, bounded": (fo.rprop(), {"step_sizes": (0.01, 0.01)}),
    "no learning rate": (fo.asgd(), {"lr": 0.0}),
    "sgld without noise": (fo.sgld(noise=0.5), {"temperature": 0.0, "lr": 0.0}),
    "sophia, no estimate": (fo.sophia_g(), {"hessian": -1.0, "rho": 0.0}),
    "schedule-free without a rate, by its root": (
        fo.schedule_free_sgd(),
        {"lr": 0.0, "weight_lr_power": 0.5},
    ),
    "madgrad at rest": (fo.madgrad(), {"lr": 0.0, "eps": 1e-6, "momentum": 0.0}),
}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("corner", CORNERS)
def test_finite_in_the_corners(corner: str, dtype: torch.dtype):
    """Eight equal gradients: a mean square less the mean's square rounds to any side."""
    opt, values = CORNERS[corner]
    hyper = tree.map(lambda v: torch.tensor(float(v), dtype=torch.float64), values)

    def outer(x: Tree) -> Tensor:
        params = x["params"]
        state = opt.init(params)
        for _ in range(8):
            params, state = opt.update(x["grads"], state, params, **x["hyper"])
        slots = [v for name, v in state.items() if name != "step"]
        return torch.stack([v.square().sum().to(dtype) for v in [params, *slots]]).sum()

    point = {"params": mixed(dtype)["layers"][0]["weight"], "hyper": hyper}
    point["grads"] = random_like(point["params"], seed=1)
    assert outer(point).isfinite()
    slopes = grad(outer)(point)
    for path, slope in zip(tree.paths(tree.flatten(slopes)[1]), tree.leaves(slopes)):
        assert slope.isfinite().all(), path
    along = tree.map(torch.ones_like, point)
    assert jvp(outer, (point,), (along,))[1].isfinite()


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr:UserWarning")
@pytest.mark.parametrize("make", [fo.adam, fo.muon], ids=["adam", "muon"])
def test_linearized_is_the_same_at_each_call(make: Any):
    """torch.func.linearize does what is done in place anew at each call."""
    opt, params = make(), {"a": torch.rand(4, 3).double(), "b": torch.rand(3, 3).double()}
    grads = {"a": torch.rand(4, 3).double(), "b": None}
    lr = torch.tensor(0.05).double()

    def step(lr: Tensor) -> Tensor:
        p, state = opt.update(grads, opt.init(params), params, lr=lr)
        return opt.update(grads, state, p, lr=lr)[0]["a"]

    expected = jvp(step, (lr,), (torch.ones_like(lr),))[1]
    pushed = torch.func.linearize(step, lr)[1]
    for _ in range(3):
        assert_close([pushed(torch.ones_like(lr))], [expected], 1e-12)
