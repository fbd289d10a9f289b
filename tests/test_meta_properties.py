"""Meta-gradients of whatever is drawn: each is the training written out by autograd."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from row import Case
from table import PLAINEST, QUICK
from test_compositions import AROUND, SMOOTH
from torch import Tensor
from torch.func import grad, jvp, vmap
from torch.nn import functional as F
from trees import assert_close, random_like, relative

import funcopt as fo
from funcopt import tree
from funcopt.types import Tree

CASES = [c for c in QUICK if c.row.smooth and c.row.name not in ("sgld", "sophia_g")]
#: those with one number for each leaf in their state take no values for elements
FORMS = ("number", "per leaf", "per element", "by name", "schedule", "per step", "exp")


def f64(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def examples(count: int) -> Any:
    return settings(max_examples=count, suppress_health_check=[HealthCheck.too_slow])


# Estimators ----------------------------------------------------------------------------


class Draw(NamedTuple):
    """A problem, by what it is made of."""

    case: Case
    around: list[str]
    name: str  #: of a hyperparameter
    form: str  #: in which it is learned
    keys: frozenset[str]  #: of eta
    steps: int
    objective: Any
    own_batches: bool
    outer: bool  #: whether there is an outer loss

    def params(self) -> Tree:
        first = self.case.small(seed=1)
        gap = [self.case.small(seed=2)["w"], None]
        return {"a": first, "b": (self.case.small(seed=3)["w"], gap)}

    def optimizer(self) -> fo.Optimizer | None:
        opt = self.case.optimizer()
        try:
            for name in self.around:
                opt = AROUND[name](opt)
        except fo.FuncoptError:
            return None
        return opt if self.name in opt.hyper else None

    def free(self) -> Tree:
        """The hyperparameter's numbers, as they are learned."""
        value = self.case.floats()[self.name]
        if isinstance(value, tuple):
            return tuple(map(f64, value))
        number, params = f64(value), self.params()
        many: dict[str, Callable[[], Tree]] = {
            "per leaf": lambda: tree.map(lambda p: number * 1.0, params),
            "per element": lambda: tree.map(
                lambda p: number * torch.ones_like(p), params
            ),
            "by name": lambda: (number, 0.9 * number),
            "schedule": lambda: (0.8 * number, 0.2 * number),
            "per step": lambda: number * (1 - 0.05 * torch.arange(self.steps)),
            "exp": lambda: number.clamp(min=1e-3).log(),
        }
        return many.get(self.form, lambda: number)()

    def value(self, free: Tree, k: int | None) -> Any:
        """What the optimizer takes, of all steps or of step k."""
        if isinstance(self.case.floats()[self.name], tuple):
            return free
        if self.form == "by name":
            return fo.by_name({"a.*": free[0]}, default=free[1])
        if self.form == "schedule":
            return fo.Schedule(lambda count: free[0] + free[1] * 0.7**count)
        if self.form == "per step":
            return fo.per_step(free) if k is None else free[k]
        return free.exp() if self.form == "exp" else free

    def constrain(self, eta: Tree) -> Tree:
        """Eta as the optimizer takes it."""
        if "hyper" not in eta:
            return eta
        return {**eta, "hyper": {self.name: self.value(eta["hyper"][self.name], None)}}

    def eta(self) -> Tree:
        every = {
            "init": self.params(),
            "hyper": {self.name: self.free()},
            "meta": f64(1.3),
        }
        return {key: every[key] for key in sorted(self.keys)}

    def batches(self) -> Tensor:
        return torch.linspace(0.5, 1.0, self.steps, dtype=torch.float64)

    def problem(self) -> fo.meta.Problem:
        opt = self.optimizer()
        assert opt is not None
        data: Any = {"batch": f64(0.7)}
        if self.own_batches:
            data = {"batches": self.batches()}
        return fo.meta.Problem(
            opt,
            inner,
            outer if self.outer else None,
            self.steps,
            self.params(),
            outer_batch=f64(0.3),
            objective=self.objective,
            constrain=self.constrain,
            **data,
        )


@st.composite
def draws(draw: Any, cases: Sequence[Case] = tuple(CASES)) -> Draw:
    case = draw(st.sampled_from(cases))
    forms = FORMS if not case.row.per_leaf else [f for f in FORMS if "element" not in f]
    keys = st.frozensets(st.sampled_from(("init", "hyper", "meta")), min_size=1)
    return Draw(
        case,
        draw(st.lists(st.sampled_from(SMOOTH), max_size=2)),
        draw(st.sampled_from(sorted(case.floats()))),
        draw(st.sampled_from(forms)),
        draw(keys),
        draw(st.integers(1, 3)),
        draw(st.sampled_from(("last", "mean", "sum"))),
        draw(st.booleans()),
        draw(st.booleans()),
    )


def inner(p: Tree, batch: Tensor, meta: Tensor | float = 1.0) -> Tensor:
    """Smooth and coupled; its gradient is nowhere near zero."""
    there = [x for x in tree.leaves(p) if x is not None]
    total = torch.stack([torch.exp(x / 3).sum() for x in there]).sum()
    return meta * total * batch + 0.01 * total**2


def outer(p: Tree, batch: Tensor, meta: Tensor | float = 1.0) -> Tensor:
    there = [x for x in tree.leaves(p) if x is not None]
    return torch.stack([torch.sin(x + batch).sum() for x in there]).sum() + 0.1 * meta


def by_hand(
    draw: Draw, problem: fo.meta.Problem, eta: Tree, first_order: bool = False
) -> tuple[Tensor, Tree]:
    """The objective and its derivative: a loop, and torch.autograd.grad."""
    leaves, structure = tree.flatten(eta)
    leaves = [x if x is None else x.clone().requires_grad_() for x in leaves]
    eta = tree.unflatten(structure, leaves)
    meta = [eta["meta"]] if "meta" in eta else []
    p = eta.get("init", problem.params)
    state, values = problem.opt.init(p), []
    for k in range(problem.steps):
        batch = draw.batches()[k] if draw.own_batches else f64(0.7)
        at, form = tree.without_none(p)
        at = [x if x.requires_grad else x.clone().requires_grad_() for x in at]
        slopes = torch.autograd.grad(
            inner(form(at), batch, *meta), at, create_graph=True, materialize_grads=True
        )
        if first_order:
            slopes = [g.detach() for g in slopes]
        more: dict[str, Any] = {}
        if "hyper" in eta:
            more[draw.name] = draw.value(eta["hyper"][draw.name], k)
        if "loss_fn" in problem.opt.hyper:
            more["loss_fn"] = lambda p, batch=batch: inner(p, batch, *meta)
        p, state = problem.opt.update(
            form(slopes), state, p, execution="reference", **more
        )
        judge, on = outer, f64(0.3)
        if not draw.outer:
            ahead = min(k + 1, problem.steps - 1)
            judge, on = inner, draw.batches()[ahead] if draw.own_batches else f64(0.7)
        values.append(judge(p, on, *meta))
    total = values[-1] if draw.objective == "last" else torch.stack(values).sum()
    total = total / len(values) if draw.objective == "mean" else total
    there = [x for x in leaves if x is not None]
    found = torch.autograd.grad(total, there, materialize_grads=True, allow_unused=True)
    rest = iter(found)
    slopes = [None if x is None else next(rest) for x in leaves]
    return total.detach(), tree.unflatten(structure, slopes)


EXACT: dict[str, Callable[..., fo.meta.Estimate]] = {
    "reverse": fo.meta.reverse,
    "mixed": fo.meta.mixed,
    "forward": fo.meta.forward,
    "truncated": lambda *given: fo.meta.truncated(*given, window=9),
}
#: with these a tree must show every tensor
REMADE: dict[str, Callable[..., fo.meta.Estimate]] = {
    "remat": lambda *given: fo.meta.reverse(*given, remat="step"),
    "mixed remat": lambda *given: fo.meta.mixed(*given, remat="sqrt"),
}


def agree(found: fo.meta.Estimate, value: Tensor, grads: Tree, what: str) -> None:
    """To rounding, of the largest number of eta's gradient: others may cancel to 0."""
    assert relative(found.value, value) <= 1e-9, what
    pairs = zip(tree.leaves(found.grads), tree.leaves(grads), strict=True)
    there = [(a, b) for a, b in pairs if b is not None]
    largest = max(b.abs().max().item() for _, b in there)
    for a, b in there:
        assert a.shape == b.shape and a.dtype == b.dtype, what
        assert (a - b).abs().max() <= 1e-8 * max(largest, 1e-3), what


def check_estimators(draw: Draw) -> None:
    if draw.optimizer() is None:
        return
    problem, eta = draw.problem(), draw.eta()
    value, grads = by_hand(draw, problem, eta)
    hidden = "hyper" in eta and draw.form == "schedule"
    for name, call in {**EXACT, **({} if hidden else REMADE)}.items():
        agree(call(problem, eta), value, grads, name)
    if "meta" not in eta and "loss_fn" not in problem.opt.hyper:
        value, grads = by_hand(draw, problem, eta, first_order=True)
        if draw.outer:
            agree(fo.meta.first_order(problem, eta), value, grads, "first_order")


@examples(2)
@given(draws(tuple(c for c in PLAINEST if c.row.name in ("sgd", "adamw", "rmsprop"))))
def test_a_plain_optimizers_estimates_are_the_training_written_out(draw: Draw):
    check_estimators(draw)


@pytest.mark.slow
@examples(30)
@given(draws())
def test_estimates_are_the_training_written_out(draw: Draw):
    check_estimators(draw)


# Over tasks ----------------------------------------------------------------------------

NORMS: dict[str, Callable[[Tree, Tensor], Tensor]] = {
    "none": lambda p, h: h * p["scale"] + p["shift"],
    "layer": lambda p, h: F.layer_norm(h, (4,), p["scale"], p["shift"]),
    "batch": lambda p, h: (
        F.batch_norm(h, None, None, p["scale"], p["shift"], training=True) + h
    ),
    "group": lambda p, h: F.group_norm(h, 2, p["scale"], p["shift"]),
}
WAYS: list[dict[str, Any]] = [
    {},
    {"remat": "step"},
    {"grad_mode": "mixed"},
    {"grad_mode": "mixed", "remat": "sqrt"},
]
THETA = {
    "p": {
        name: random_like(torch.empty(shape, dtype=torch.float64), seed)
        for seed, (name, shape) in enumerate(
            {"w": (3, 4), "scale": (4,), "shift": (4,), "out": (4,)}.items()
        )
    },
    "lr": f64(0.1),
}
TASKS = {
    "x": random_like(torch.empty(3, 5, 3, dtype=torch.float64), 5),
    "y": random_like(torch.empty(3, 5, dtype=torch.float64), 6),
    "gap": None,
}


def mean_loss(norm: str, opt: fo.Optimizer, how: Any, way: dict[str, Any]) -> Any:
    def fit(p: Tree, task: Tree) -> Tensor:
        hidden = torch.tanh(NORMS[norm](p, task["x"] @ p["w"]))
        return (hidden @ p["out"] - task["y"]).square().mean()

    def task_loss(theta: Tree, task: Tree) -> Tensor:
        given: Any = {"steps": 2, "hyper": {"lr": theta["lr"]}, **way}
        return fit(fo.unroll(opt, fit, theta["p"], task, **given).params, task)

    return fo.meta.value_and_grad(task_loss, tasks=how)


TASK_CASES = [c for c in CASES if c.row.shapes[1] == (5,)]


@pytest.mark.slow
@examples(12)
@given(
    st.sampled_from(TASK_CASES),
    st.sampled_from(sorted(NORMS)),
    st.sampled_from(["loop", "vmap"]),
    st.sampled_from(WAYS),
)
def test_a_derivative_of_the_meta_gradient(
    case: Case, norm: str, how: str, way: dict[str, Any]
):
    """By the norms' own second and third derivatives, in every order; else refused."""
    mean = mean_loss(norm, case.optimizer(), how, way)
    along = random_like(THETA, 7)

    def at(s: Tensor) -> Tensor:
        theta = tree.map(lambda x, v: x + s * v, THETA, along)
        value, grads = mean(theta, TASKS)
        pairs = zip(tree.leaves(grads), tree.leaves(along))
        return value + torch.stack([(g * torch.cos(v)).sum() for g, v in pairs]).sum()

    zero = f64(0.0)
    slope = jvp(at, (zero,), (f64(1.0),))[1]
    central = [(at(f64(h)) - at(f64(-h))) / (2 * h) for h in (1e-4, 1e-5, 1e-6)]
    assert min(relative(x, slope) for x in central) <= 1e-4
    s = zero.clone().requires_grad_()
    assert relative(torch.autograd.grad(at(s), s)[0], slope) <= 1e-7
    try:
        assert relative(grad(at)(zero), slope) <= 1e-7
    except fo.GradientLostError:
        assert way and how == "loop"


def test_what_tasks_share_is_counted_once():
    """ASGD's own rate is the same in all tasks: no axis of theirs, but a derivative."""
    opt = fo.asgd(lambd=0.1, t0=0.5, alpha=0.9)
    start, tasks = f64(1.2), torch.tensor([0.5, 1.0, 1.5], dtype=torch.float64)

    def end(lr: Tensor, p: Tensor, task: Tensor, **way: Any) -> Tensor:
        run = fo.unroll(
            opt, lambda p, x: (p * x - 1) ** 4, p, task, steps=3, hyper={"lr": lr}, **way
        )
        return run.params

    def slopes(lr: Tensor, **way: Any) -> Tensor:
        by_start = grad(lambda p, x: end(lr, p, x, **way))
        return vmap(by_start, (None, 0))(start, tasks).sum()

    wanted = grad(slopes)(f64(0.1))
    for way in WAYS:
        assert relative(grad(lambda lr, w=way: slopes(lr, **w))(f64(0.1)), wanted) < 1e-12
    guarded = fo.meta.clip_adjoint(fo.sgd(), max_norm=1e9)

    def by_guard(lr: Tensor, task: Tensor) -> Tensor:
        p = {"own": start * task, "shared": start}
        new, _ = guarded.update(p, guarded.init(p), p, lr=lr)
        return new["own"] * new["shared"]

    both = grad(lambda lr: vmap(by_guard, (None, 0))(lr, tasks).sum())(f64(0.1))
    each = vmap(grad(by_guard), (None, 0))(f64(0.1), tasks).sum()
    assert relative(both, each) < 1e-12


@pytest.mark.parametrize("name", ["maml", "fomaml", "metasgd", "anil"])
def test_no_step_leaves_buffers_to_the_query_loss(name: str):
    """The tasks' axis is the query's, where no step gave one to the buffers."""
    buffers = {"mean": torch.zeros(2).double(), "var": torch.ones(2).double()}

    def loss(p: Tree, x: Tensor, *, buffers: Tree) -> Tensor:
        h = F.batch_norm(x * p["head"], *buffers.values(), training=True)
        return (h + x * p["head"] - 1).square().mean()

    options: dict[str, Any] = {"buffers": buffers}
    queries = random_like(torch.empty(3, 4, 2, dtype=torch.float64), 1)
    for steps in (0, 2):
        ways = [{}, {"remat": "step"}] if steps and name != "fomaml" else [{}]
        for way in ways:
            kind = getattr(fo.meta, name)(
                loss, fo.sgd(lr=0.1), steps=steps, **options, **way
            )
            theta = kind.init({"head": torch.tensor([0.5, 2.0]).double(), "gap": None})
            found = [
                fo.meta.value_and_grad(kind.task_loss, tasks=how)(
                    theta, (queries, queries.flip(0))
                )
                for how in ("loop", "vmap")
            ]
            assert_close(found[0], found[1], 1e-12)
            assert found[0][1] is not None and not buffers["mean"].any()
