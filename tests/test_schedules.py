"""Schedules: torch's and optax's numbers at every step, and derivatives everywhere."""

import inspect
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, hessian, jacrev, vmap
from torch.optim import lr_scheduler

import funcopt as fo
from funcopt import schedules
from funcopt.execution import executor_choice
from funcopt.schedules._parts import Formula

STEPS = 60
BASE = 0.5
OPTAX = json.loads(
    (Path(__file__).parent / "published/schedules/optax.json").read_text()
)["runs"]


def f64(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


# torch: the name of ours, the scheduler, and settings that both take -------------------

CYCLE = {"base_lr": 0.1, "max_lr": BASE}
FALL = {"base_momentum": 0.3, "max_momentum": 0.8}
TORCH: list[tuple[str, Any, dict[str, Any]]] = [
    ("constant", lr_scheduler.ConstantLR, {}),
    ("constant", lr_scheduler.ConstantLR, {"factor": 0.7, "total_iters": 13}),
    ("constant", lr_scheduler.ConstantLR, {"factor": 0.0, "total_iters": 13}),
    ("linear", lr_scheduler.LinearLR, {}),
    (
        "linear",
        lr_scheduler.LinearLR,
        {"start_factor": 0.9, "end_factor": 0.2, "total_iters": 31},
    ),
    ("step", lr_scheduler.StepLR, {"step_size": 7}),
    ("step", lr_scheduler.StepLR, {"step_size": 1, "gamma": 0.9}),
    ("multistep", lr_scheduler.MultiStepLR, {"milestones": [3, 3, 20, 41]}),
    ("multistep", lr_scheduler.MultiStepLR, {"milestones": [0, 11], "gamma": 1.5}),
    ("multistep", lr_scheduler.MultiStepLR, {"milestones": []}),
    ("exponential", lr_scheduler.ExponentialLR, {"gamma": 0.9}),
    ("exponential", lr_scheduler.ExponentialLR, {"gamma": 1.01}),
    ("polynomial", lr_scheduler.PolynomialLR, {}),
    ("polynomial", lr_scheduler.PolynomialLR, {"total_iters": 37, "power": 2.5}),
    ("cosine_annealing", lr_scheduler.CosineAnnealingLR, {"T_max": 17}),
    (
        "cosine_annealing",
        lr_scheduler.CosineAnnealingLR,
        {"T_max": 60, "eta_min": 0.05},
    ),
    *(
        (
            "cosine_warm_restarts",
            lr_scheduler.CosineAnnealingWarmRestarts,
            {"T_0": first, "T_mult": mult, "eta_min": least},
        )
        for first, mult, least in ((7, 1, 0.0), (1, 1, 0.1), (3, 2, 0.1), (2, 3, 0.0))
    ),
    *(
        ("one_cycle", lr_scheduler.OneCycleLR, {"max_lr": BASE, **more})
        for more in (
            {"total_steps": 60},
            {"total_steps": 61, "anneal_strategy": "linear", "pct_start": 0.45},
            {"total_steps": 60, "three_phase": True, "div_factor": 7.0},
            {
                "total_steps": 63,
                "three_phase": True,
                "anneal_strategy": "linear",
                "pct_start": 0.6,
                "final_div_factor": 30.0,
            },
            {"total_steps": 60, "pct_start": 0.0},
            {"total_steps": 61, "pct_start": 1.0},  # torch divides by 0 at count 61
        )
    ),
    *(
        ("one_cycle_momentum", lr_scheduler.OneCycleLR, {"max_lr": BASE, **more})
        for more in (
            {"total_steps": 60},
            {"total_steps": 61, **FALL, "anneal_strategy": "linear"},
            {"total_steps": 60, **FALL, "three_phase": True, "pct_start": 0.21},
        )
    ),
    *(
        (name, lr_scheduler.CyclicLR, {**CYCLE, **FALL, **more})
        for name in ("cyclic", "cyclic_momentum")
        for more in (
            {},
            {"step_size_up": 5},
            {"step_size_up": 4, "step_size_down": 9},
            {"step_size_up": 6, "step_size_down": 1, "mode": "triangular2"},
            {"step_size_up": 5, "mode": "exp_range", "gamma": 0.95},
            {"step_size_up": 3, "scale_fn": lambda cycle: 1 / cycle},
            {
                "step_size_up": 3,
                "scale_fn": lambda count: 0.9**count,
                "scale_mode": "iterations",
            },
        )
    ),
    ("lambda_", lr_scheduler.LambdaLR, {"lr_lambda": lambda t: 1 / (1 + 0.1 * t)}),
    (
        "multiplicative",
        lr_scheduler.MultiplicativeLR,
        {"lr_lambda": lambda t: 1 - 0.3 / t},
    ),
]


def made(name: str, given: dict[str, Any]) -> fo.Schedule:
    """Ours, with those of the arguments that it has, and the base value where it asks."""
    factory = getattr(schedules, name)
    known = inspect.signature(factory).parameters
    arguments = {k: v for k, v in given.items() if k in known}
    if "value" in known:
        arguments["value"] = BASE
    if name == "multiplicative":
        arguments["total_iters"] = STEPS
    return factory(**arguments)


def torch_values(make: Callable[[Any], Any], key: str = "lr") -> list[float]:
    """The trajectory: torch's closed form where it has one."""
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=BASE, momentum=0.9)
    scheduler, found = make(optimizer), []
    for count in range(STEPS):
        closed = getattr(scheduler, "_get_closed_form_lr", None)
        if closed is None:
            found.append(optimizer.param_groups[0][key])
            optimizer.step()
            scheduler.step()
        else:
            scheduler.last_epoch = count
            found.append(closed()[0])
    return found


def assert_close(found: Sequence[float], expected: Sequence[float], most: float = 1e-12):
    for count, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert abs(a - b) <= most * max(1.0, abs(b)), f"count {count}: {a} is not {b}"


@pytest.mark.parametrize("name, scheduler, given", TORCH)
def test_the_numbers_of_torch(name: str, scheduler: Any, given: dict[str, Any]):
    key = "momentum" if name.endswith("momentum") else "lr"
    ours = made(name, given)
    theirs = torch_values(lambda opt: scheduler(opt, **given), key)
    assert_close([ours(count) for count in range(STEPS)], theirs)


def joined_in_torch(opt: Any) -> Any:
    parts = [
        lr_scheduler.LinearLR(opt, start_factor=0.1, total_iters=10),
        lr_scheduler.CosineAnnealingLR(opt, T_max=20),
        lr_scheduler.ExponentialLR(opt, gamma=0.9),
    ]
    return lr_scheduler.SequentialLR(opt, parts, milestones=[10, 25])


def chained_in_torch(opt: Any) -> Any:
    return lr_scheduler.ChainedScheduler(
        [
            lr_scheduler.ConstantLR(opt, factor=0.1, total_iters=20),
            lr_scheduler.ExponentialLR(opt, gamma=0.9),
            lr_scheduler.PolynomialLR(opt, total_iters=50, power=1.5),
        ]
    )


JOINED = schedules.sequential(
    [
        schedules.linear(BASE, start_factor=0.1, total_iters=10),
        schedules.cosine_annealing(BASE, T_max=20),
        schedules.exponential(BASE, gamma=0.9),
    ],
    milestones=[10, 25],
)
CHAINED = schedules.chained(
    [
        schedules.constant(BASE, factor=0.1, total_iters=20),
        schedules.exponential(1.0, gamma=0.9),
        schedules.polynomial(1.0, total_iters=50, power=1.5),
    ]
)


def test_joined_and_chained_as_in_torch():
    counts = range(STEPS)
    assert_close([JOINED(t) for t in counts], torch_values(joined_in_torch))
    assert_close([CHAINED(t) for t in counts], torch_values(chained_in_torch))


@pytest.mark.parametrize("name, scheduler", dict.fromkeys(row[:2] for row in TORCH))
def test_names_and_defaults_are_torch_s(name: str, scheduler: Any):
    ours = inspect.signature(getattr(schedules, name)).parameters
    theirs = inspect.signature(scheduler).parameters
    # Without a default here: how many steps a loop makes, and a cycle has.
    own = {"value", "total_iters" if name == "multiplicative" else "total_steps"}
    for parameter in ours.keys() - own:
        assert ours[parameter].default == theirs[parameter].default
    gone = {"optimizer", "last_epoch", "cycle_momentum", "epochs", "steps_per_epoch"}
    if not name.endswith("momentum"):
        gone |= {"base_momentum", "max_momentum"}
    else:
        gone |= {"base_lr", "max_lr", "div_factor", "final_div_factor"}
    assert theirs.keys() - ours.keys() <= gone


# optax, from its file ------------------------------------------------------------------


def of_optax(run: dict[str, Any]) -> fo.Schedule:
    given = dict(run["arguments"])
    if "boundaries_and_scales" in given:
        given["boundaries_and_scales"] = dict(given["boundaries_and_scales"])
    if "schedules" in given:
        parts = [{"ours": ours, "arguments": own} for _, ours, own in given["schedules"]]
        given["schedules"] = [of_optax(part) for part in parts]
    return getattr(schedules, run["ours"])(**given)


@pytest.mark.parametrize("run", OPTAX, ids=lambda run: run["ours"])
def test_the_numbers_of_optax(run: dict[str, Any]):
    ours = of_optax(run)
    assert_close([ours(count) for count in range(STEPS)], run["values"])


# What every schedule does --------------------------------------------------------------

# (A float share of 1 is where its range ends, and so has a derivative on one side only.)
EVERY = [
    (name, made(name, given))
    for name, _, given in TORCH
    if given.get("pct_start") not in (0.0, 1.0)
]
EVERY += [(run["ours"], of_optax(run)) for run in OPTAX]
EVERY += [("sequential", JOINED), ("chained", CHAINED)]
IDS = [f"{name}-{i}" for i, (name, _) in enumerate(EVERY)]
COUNTS = range(STEPS + 10)  # some past every end

every = pytest.mark.parametrize("schedule", [s for _, s in EVERY], ids=IDS)


def test_every_schedule_is_in_the_table():
    tested = {name for name, _, _ in TORCH} | {run["ours"] for run in OPTAX}
    tested |= {"sequential", "chained", "reduce_on_plateau", "Plateau"}
    assert tested == set(schedules.__all__)


@every
def test_a_count_may_be_an_int_or_a_tensor_or_batched(schedule: fo.Schedule):
    numbers = [schedule(count) for count in COUNTS]
    assert all(type(value) is float for value in numbers)
    single = [schedule(f64(count)) for count in COUNTS]
    for value in single:  # a number may be left out of the arithmetic altogether
        assert type(value) is float or (value.dtype, value.ndim) == (torch.float64, 0)
    batched = vmap(lambda count: torch.as_tensor(schedule(count), dtype=torch.float64))(
        torch.arange(len(COUNTS), dtype=torch.float64)
    )
    assert_close([float(value) for value in single], numbers, 1e-15)
    assert_close(batched.tolist(), numbers, 1e-15)


def parameters(schedule: fo.Schedule) -> dict[Any, float]:
    """Every float that the schedule has, also in its parts, by where it stands."""
    found: dict[Any, float] = {}
    for name, value in schedule.function.parameters.items():
        members = enumerate(value) if isinstance(value, list) else [(None, value)]
        for i, member in members:
            if isinstance(member, fo.Schedule):
                found |= {(name, i, key): v for key, v in parameters(member).items()}
            elif isinstance(member, float):
                found[name, i, None] = member
    return found


def with_parameters(schedule: fo.Schedule, values: dict[Any, Any]) -> fo.Schedule:
    """The schedule with other values for its floats."""
    formula, changed = schedule.function, {}
    for name, value in formula.parameters.items():
        listed = list(value) if isinstance(value, list) else [value]
        for i, member in enumerate(listed):
            place = i if isinstance(value, list) else None
            if isinstance(member, fo.Schedule):
                inner = {k[2]: v for k, v in values.items() if k[:2] == (name, place)}
                listed[i] = with_parameters(member, inner)
            elif isinstance(member, float):
                listed[i] = values[name, place, None]
        changed[name] = listed if isinstance(value, list) else listed[0]
    return fo.Schedule(Formula(formula.function, changed))


SOME = [0, 1, 4, 10, 11, 25, 33, 69]


def curve(schedule: fo.Schedule, point: Tensor, counts: Sequence[Any] = SOME) -> Tensor:
    """The values at some counts, as a function of all the schedule's floats."""
    given = with_parameters(schedule, dict(zip(parameters(schedule), point)))
    values = [torch.as_tensor(given(count), dtype=torch.float64) for count in counts]
    return torch.stack([value.expand(()) for value in values])


def floats(schedule: fo.Schedule) -> Tensor:
    return torch.tensor(list(parameters(schedule).values()), dtype=torch.float64)


@every
def test_differentiable_in_every_float(schedule: fo.Schedule):
    point = floats(schedule).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: curve(schedule, x), point)
    on_tensors = [f64(count) for count in SOME]
    slopes = jacrev(lambda x: curve(schedule, x))(point.detach())
    batched = jacrev(lambda x: curve(schedule, x, on_tensors))(point.detach())
    assert torch.allclose(slopes, batched, rtol=1e-12, atol=1e-12)
    assert slopes.abs().sum() > 0


@every
def test_vmap_over_every_float_is_the_loop(schedule: fo.Schedule):
    points = floats(schedule) * torch.tensor([[1.0], [0.9], [0.5]], dtype=torch.float64)
    found = vmap(lambda x: curve(schedule, x))(points)
    both = vmap(
        lambda x: vmap(lambda count: curve(schedule, x, [count]))(
            torch.tensor(SOME, dtype=torch.float64)
        )
    )(points)
    rows = torch.stack([curve(schedule, point) for point in points])
    assert torch.allclose(found, rows, rtol=1e-15, atol=1e-16)
    assert torch.allclose(both[..., 0], rows, rtol=1e-14, atol=1e-16)


# The only floats that may not be 0.
DIVIDE = {"div_factor", "final_div_factor", "decay_rate"}


@pytest.mark.slow
@every
@pytest.mark.parametrize("kind", [int, f64])
def test_derivatives_are_finite_at_zero(schedule: fo.Schedule, kind: Callable[..., Any]):
    point = [float(bool(DIVIDE & {*key})) for key in parameters(schedule)]
    nought, counts = torch.tensor(point).double(), [kind(count) for count in SOME]
    for derivative in (lambda f: f, jacrev, hessian, lambda f: jacrev(jacrev(f))):
        found = derivative(lambda x: curve(schedule, x, counts))(nought)
        assert found.isfinite().all()


@every
def test_a_tensor_of_any_dtype_is_float64_inside(schedule: fo.Schedule):
    """A power of a float32 number taken in float64 keeps its digits."""
    point = floats(schedule).float()
    found, expected = curve(schedule, point), curve(schedule, point.double())
    assert found.dtype == torch.float64
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name, schedule", dict(EVERY).items())
def test_compile_makes_one_graph(name: str, schedule: fo.Schedule):
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    def value(count: Tensor, base: Tensor) -> Tensor:
        return base * schedule(count)

    torch.compiler.reset()
    compiled = torch.compile(value, fullgraph=True, backend=backend)
    for count in (0, 1, 25, 69):
        expected = 2 * schedule(count)
        assert compiled(f64(count), f64(2.0)).item() == pytest.approx(expected, rel=1e-14)
    assert len(graphs) == 1


def test_one_backward_leaves_the_next_its_graph():
    """A schedule made once serves many steps that are differentiated one by one."""
    for dtype in (torch.float32, torch.float64):
        base = torch.tensor(0.5, dtype=dtype, requires_grad=True)
        lr = schedules.warmup_cosine_decay(0.0, base, 3, 9)
        for count in range(5):
            lr(count).backward()
        with torch.no_grad():
            base.mul_(2)
        assert lr(3).item() == 1.0


def test_how_one_looks():
    lr = schedules.cosine_annealing(0.1, T_max=10)
    assert repr(lr) == "Schedule(cosine_annealing(value=0.1, T_max=10, eta_min=0.0))"


def test_a_long_run_of_restarts_is_exact():
    lr = schedules.cosine_warm_restarts(1.0, T_0=3, T_mult=2)
    for restart in (3 * (2**n - 1) for n in (2, 20, 40)):
        assert lr(restart) == lr(f64(restart)).item() == 1.0
        assert lr(restart - 1) < 0.5


def test_a_schedule_past_its_end_is_not_asked():
    """What would have grown to infinity by then makes no NaN of the derivative."""

    def value(gamma: Tensor) -> Tensor:
        growing = schedules.exponential(1.0, gamma=gamma)
        return schedules.sequential([growing, 0.5], [4])(f64(100_000))

    assert value(f64(2.0)) == 0.5 and grad(value)(f64(2.0)) == 0


# As a hyperparameter -------------------------------------------------------------------

PARAMS = {"w": torch.tensor([1.0, -2.0]), "b": torch.tensor([0.5])}
PARAMS = {name: p.double() for name, p in PARAMS.items()}
USES: dict[str, Callable[[fo.Schedule], dict[str, Any]]] = {
    "lr": lambda s: {"lr": s},
    "betas": lambda s: {"lr": 0.1, "betas": (s, 0.9)},
    "weight_decay": lambda s: {"lr": 0.1, "weight_decay": s},
    "tree": lambda s: {"lr": {"w": s, "b": 0.1}, "weight_decay": {"w": 0.2, "b": s}},
    "by_name": lambda s: {"lr": fo.by_name({"w": s}, default=0.1)},
}


def loss(p: dict[str, Tensor], _: Any) -> Tensor:
    return ((p["w"] - 0.3) ** 2).sum() + (p["b"] ** 4).sum()


def train(opt: fo.Optimizer, steps: int = 6, **hyper: Any) -> dict[str, Tensor]:
    params, state = PARAMS, opt.init(PARAMS)
    for _ in range(steps):
        params, state = opt.update(grad(loss)(params, None), state, params, **hyper)
    return params


@pytest.mark.parametrize("use", USES)
def test_as_any_hyperparameter(use: str):
    lr = schedules.one_cycle(0.4, total_steps=6)
    params = train(fo.adamw(**USES[use](lr)))
    called = train(fo.adamw(), **USES[use](lr))
    state, expected = fo.adamw().init(PARAMS), PARAMS
    opt = fo.adamw()
    for count in range(6):
        constant = USES[use](lr(count))  # pyright: ignore[reportArgumentType]
        expected, state = opt.update(
            grad(loss)(expected, None), state, expected, **constant
        )
    for name, p in expected.items():
        assert torch.equal(params[name], p) and torch.equal(called[name], p)


@pytest.mark.parametrize("use", USES)
def test_meta_gradients_to_a_schedule_s_own_parameters(use: str):
    def outer(peak: Tensor, end: Tensor, exponent: Tensor) -> Tensor:
        lr = schedules.warmup_cosine_decay(0.1, peak, 2, 5, end, exponent)
        opt = fo.adamw(**USES[use](lr))
        return loss(fo.unroll(opt, loss, PARAMS, steps=6).params, None)

    point = (f64(0.4), f64(0.05), f64(1.5))
    assert torch.autograd.gradcheck(outer, tuple(x.requires_grad_() for x in point))
    slopes = torch.autograd.grad(outer(*point), point)
    assert all(slope != 0 for slope in slopes)


def test_a_base_value_for_each_task():
    def adapted(base: Tensor) -> Tensor:
        lr = schedules.cosine_decay(base, decay_steps=4)
        return fo.unroll(fo.sgd(lr=lr), loss, PARAMS, steps=4).params["w"]

    bases = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    found, slopes = vmap(adapted)(bases), vmap(jacrev(adapted))(bases)
    for row, slope, base in zip(found, slopes, bases):
        assert torch.allclose(row, adapted(base), rtol=1e-12)
        assert torch.allclose(slope, jacrev(adapted)(base), rtol=1e-10)


def test_a_schedule_stays_with_the_kernel():
    """One program, whatever the values: also 0, which as a number has its own."""
    lr = schedules.warmup_cosine_decay(0.0, 0.1, 2, 4)
    opt = fo.adamw(lr=lr, weight_decay=schedules.linear(0.1, 1.0, 0.0, total_iters=3))
    params = {"w": torch.ones(300, 40)}
    state, kinds = opt.init(params), set()
    for _ in range(6):
        with executor_choice.observed() as groups:
            params, state = opt.update(params, state, params)
        ((name, kind),) = {(group.choice.name, group.kinds) for group in groups}
        assert name == "native"
        kinds.add(kind)
    assert len(kinds) == 1 and lr(0) == lr(4) == 0


# Plateau -------------------------------------------------------------------------------

METRICS = torch.randn(STEPS, generator=torch.Generator().manual_seed(3)).double()
METRICS = METRICS + 2 + 3 / (1 + torch.arange(STEPS, dtype=torch.float64))
PLATEAUS: list[dict[str, Any]] = [
    {"patience": 2},
    {"patience": 0, "factor": 0.7, "mode": "max", "cooldown": 3},
    {"patience": 1, "factor": 0.5, "threshold": 0.3, "threshold_mode": "abs"},
    {"patience": 1, "mode": "max", "threshold": 0.2, "threshold_mode": "abs"},
    {"patience": 3, "factor": 0.6, "threshold": 0.2, "min_lr": 0.1, "cooldown": 1},
    {"patience": 0, "factor": 0.8, "mode": "max", "threshold": 0.1, "eps": 0.05},
]


def follow(plateau: schedules.Plateau, metrics: Any = METRICS) -> Tensor:
    state, values = plateau.init(), []
    for metric in metrics:
        value, state = plateau.update(metric, state)
        values.append(value)
    return torch.stack(values)


@pytest.mark.parametrize("given", PLATEAUS, ids=str)
def test_a_plateau_is_torch_s(given: dict[str, Any]):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=BASE)
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, **given)
    plateau, theirs = schedules.reduce_on_plateau(BASE, **given), []
    for metric in METRICS.tolist():
        scheduler.step(metric)
        theirs.append(optimizer.param_groups[0]["lr"])
    assert theirs[0] > theirs[-1]
    assert_close(follow(plateau).tolist(), theirs)
    assert_close(follow(plateau, METRICS.tolist()).tolist(), theirs)


def test_a_plateau_s_defaults_are_torch_s():
    ours = inspect.signature(schedules.reduce_on_plateau).parameters
    theirs = inspect.signature(lr_scheduler.ReduceLROnPlateau).parameters
    assert [*ours][1:] == [*theirs][1:]
    assert all(ours[n].default == theirs[n].default for n in [*ours][1:])


@pytest.mark.parametrize("given", PLATEAUS, ids=str)
def test_a_plateau_under_vmap_and_its_derivatives(given: dict[str, Any]):
    def last(*at: Tensor) -> Tensor:
        value, factor, least, metrics = at
        changed = {**given, "factor": factor, "min_lr": least}
        return follow(schedules.reduce_on_plateau(value, **changed), metrics.unbind())

    numbers = torch.tensor([[0.3, 0.6], [0.7, 0.4], [0.01, 0.2]])
    (values, factors, least), metrics = numbers.double(), torch.stack([METRICS, -METRICS])
    found = vmap(last)(values, factors, least, metrics)
    for row, *point in zip(found, values, factors, least, metrics):
        assert torch.equal(row, last(*point))
    point = [x[0].clone().requires_grad_() for x in (values, factors, least)]
    assert torch.autograd.gradcheck(lambda *x: last(*x, METRICS), point)


def test_a_plateau_s_state_keeps_no_graph_of_the_metric_and_no_alias():
    base = f64(0.5)
    plateau = schedules.reduce_on_plateau(base)
    state = plateau.init()
    kept = {key: value.clone() for key, value in state.items()}
    metric = f64(1.0).requires_grad_()
    value, after = plateau.update(metric, state)
    base.mul_(2)
    assert not after["best"].requires_grad and not value.requires_grad
    assert all(torch.equal(state[key], kept[key]) for key in kept)
    assert {k: (v.dtype, v.shape) for k, v in after.items()} == {
        k: (v.dtype, v.shape) for k, v in state.items()
    }


@pytest.mark.slow
def test_a_plateau_compiles():
    plateau = schedules.reduce_on_plateau(BASE, patience=2)
    torch.compiler.reset()
    update = torch.compile(plateau.update, fullgraph=True, backend="eager")
    state, expected = plateau.init(), follow(plateau)
    for metric, value in zip(METRICS, expected):
        found, state = update(metric, state)
        assert torch.equal(found, value)


# What is refused -----------------------------------------------------------------------

NAN = float("nan")
RANGE: list[tuple[Callable[[], Any], str]] = [
    (lambda: schedules.constant(-0.1), "value"),
    (lambda: schedules.constant(NAN), "value"),
    (lambda: schedules.constant(float("inf")), "value"),
    (lambda: schedules.constant(0.1, factor=1.5), "factor"),
    (lambda: schedules.constant(0.1, total_iters=-1), "total_iters"),
    (lambda: schedules.linear(0.1, start_factor=1.5), "start_factor"),
    (lambda: schedules.linear(0.1, end_factor=-0.5), "end_factor"),
    (lambda: schedules.linear(0.1, total_iters=0), "total_iters"),
    (lambda: schedules.step(0.1, step_size=0), "step_size"),
    (lambda: schedules.step(0.1, step_size=3, gamma=-1.0), "gamma"),
    (lambda: schedules.multistep(0.1, [3, 2]), "milestones"),
    (lambda: schedules.multistep(0.1, [-3, 2]), r"milestones\[0\]"),
    (lambda: schedules.exponential(0.1, gamma=NAN), "gamma"),
    (lambda: schedules.polynomial(0.1, total_iters=0), "total_iters"),
    (lambda: schedules.polynomial(0.1, power=-1.0), "power"),
    (lambda: schedules.cosine_annealing(0.1, T_max=0), "T_max"),
    (lambda: schedules.cosine_annealing(0.1, T_max=3, eta_min=-1.0), "eta_min"),
    (lambda: schedules.cosine_warm_restarts(0.1, T_0=0), "T_0"),
    (lambda: schedules.cosine_warm_restarts(0.1, T_0=2, T_mult=0), "T_mult"),
    (lambda: schedules.cosine_decay(0.1, decay_steps=-5), "decay_steps"),
    (lambda: schedules.one_cycle(0.1, total_steps=0), "total_steps"),
    (lambda: schedules.one_cycle(0.1, total_steps=9, pct_start=1.5), "pct_start"),
    (lambda: schedules.one_cycle(0.1, total_steps=9, div_factor=0.0), "div_factor"),
    (lambda: schedules.one_cycle(0.1, 9, anneal_strategy="sin"), "'sin'"),  # pyright: ignore[reportArgumentType]
    (lambda: schedules.one_cycle_momentum(9, max_momentum=1.5), "max_momentum"),
    (lambda: schedules.cyclic(0.1, 0.2, step_size_up=0), "step_size_up"),
    (lambda: schedules.cyclic(0.1, 0.2, step_size_down=-1), "step_size_down"),
    (lambda: schedules.cyclic(0.1, 0.2, mode="square"), "'square'"),  # pyright: ignore[reportArgumentType]
    (lambda: schedules.cyclic(0.1, 0.2, scale_mode="round"), "'round'"),  # pyright: ignore[reportArgumentType]
    (lambda: schedules.cyclic_momentum(base_momentum=-0.1), "base_momentum"),
    (lambda: schedules.multiplicative(0.1, abs, total_iters=-1), "total_iters"),
    (lambda: schedules.sequential([], []), "empty"),
    (lambda: schedules.sequential([JOINED, JOINED], []), "1 milestones, not 0"),
    (lambda: schedules.sequential([JOINED], [3]), "0 milestones, not 1"),
    (lambda: schedules.sequential([JOINED] * 3, [5, 3]), "increase"),
    (lambda: schedules.sequential([JOINED, -1.0], [5]), r"schedules\[1\]"),
    (lambda: schedules.chained([]), "empty"),
    (lambda: schedules.piecewise_constant(0.1, {3: -1.0}), "scale at 3"),
    (lambda: schedules.piecewise_constant(0.1, {-3: 1.0}), "boundary"),
    (lambda: schedules.piecewise_interpolate(0.1, {3: 1.0}, "cubic"), "'cubic'"),  # pyright: ignore[reportArgumentType]
    (lambda: schedules.linear_one_cycle(0.1, 10, 0.6, 0.5), "pct_start, pct_final"),
    (lambda: schedules.linear_one_cycle(0.1, 1), "no step"),
    (lambda: schedules.cosine_one_cycle(0.1, 10, pct_start=1.0), "pct_start"),
    (lambda: schedules.exponential_decay(0.1, 0, 0.5), "transition_steps"),
    (lambda: schedules.exponential_decay(0.1, 3, 0.0), "decay_rate"),
    (lambda: schedules.exponential_decay(0.1, 3, 0.5, -1), "transition_begin"),
    (lambda: schedules.polynomial_decay(0.1, 0.2, 1.0, 0), "transition_steps"),
    (lambda: schedules.warmup_constant(0.1, 0.2, -1), "warmup_steps"),
    (lambda: schedules.warmup_cosine_decay(0.1, 0.2, 5, 5), "decay_steps"),
    (lambda: schedules.warmup_exponential_decay(0.1, 0.2, 5, 0, 0.5), "transition_steps"),
    (lambda: schedules.reduce_on_plateau(0.1, mode="both"), "'both'"),  # pyright: ignore[reportArgumentType]
    (lambda: schedules.reduce_on_plateau(0.1, factor=1.0), "factor"),
    (lambda: schedules.reduce_on_plateau(0.1, patience=-1), "patience"),
    (lambda: schedules.reduce_on_plateau(0.1, threshold_mode="both"), "'both'"),  # pyright: ignore[reportArgumentType]
]
PLATEAU = schedules.reduce_on_plateau(0.1)
KIND: list[tuple[Callable[[], Any], str]] = [
    (lambda: schedules.constant("fast"), "'fast'"),
    (lambda: schedules.constant(True), "True"),
    (lambda: schedules.constant(None), "None"),
    (lambda: schedules.linear({"w": 0.1}), "value"),
    (lambda: schedules.linear(0.1, total_iters=2.5), "total_iters"),  # pyright: ignore[reportArgumentType]
    (lambda: schedules.step(0.1, step_size=torch.tensor(3)), "step_size"),  # pyright: ignore[reportArgumentType]
    (lambda: schedules.multistep(0.1, 3), "milestones"),  # pyright: ignore[reportArgumentType]
    (lambda: schedules.multistep(0.1, [1.5]), r"milestones\[0\]"),  # pyright: ignore[reportArgumentType]
    (lambda: schedules.exponential(0.1, gamma=JOINED), "gamma"),
    (lambda: schedules.lambda_(0.1, 0.9), "lr_lambda"),  # pyright: ignore[reportArgumentType]
    (lambda: schedules.multiplicative(0.1, JOINED, 3), "lr_lambda"),
    (lambda: schedules.cyclic(0.1, 0.2, scale_fn=0.9), "scale_fn"),  # pyright: ignore[reportArgumentType]
    (lambda: schedules.sequential(JOINED, []), "list"),  # pyright: ignore[reportArgumentType]
    (lambda: schedules.sequential([abs, 0.1], [3]), r"schedules\[0\]"),  # pyright: ignore[reportArgumentType]
    (lambda: schedules.chained([PLATEAU]), r"schedules\[0\]"),  # pyright: ignore[reportArgumentType]
    (lambda: schedules.piecewise_constant(0.1, [[3, 0.5]]), "dict"),  # pyright: ignore[reportArgumentType]
    (lambda: schedules.piecewise_constant(0.1, {0.5: 0.5}), "boundary"),  # pyright: ignore[reportArgumentType]
    (lambda: schedules.cosine_one_cycle(0.1, 9, pct_start=f64(0.3)), "pct_start"),  # pyright: ignore[reportArgumentType]
    (lambda: PLATEAU.update("low", PLATEAU.init()), "'low'"),
    (lambda: PLATEAU.update(torch.ones(2), PLATEAU.init()), r"\(2,\)"),
]


@pytest.mark.parametrize("call, words", RANGE)
def test_out_of_range(call: Callable[[], Any], words: str):
    with pytest.raises(fo.HyperparameterError, match=words):
        call()


@pytest.mark.parametrize("call, words", KIND)
def test_of_the_wrong_kind(call: Callable[[], Any], words: str):
    with pytest.raises(fo.HyperparameterTypeError, match=words):
        call()
