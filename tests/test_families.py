"""The families of meta-learning, each against the same written out by autograd alone."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import vmap
from torch.nn.functional import linear, tanh

import funcopt as fo
from funcopt import tree

LR, STEPS, TASKS = 0.2, 3, 4
FAMILIES = ("maml", "fomaml", "anil", "cavia", "metasgd", "lslr", "reptile", "imaml")
RATES = ("metasgd", "lslr")
SGD = fo.sgd()
UNRATED = fo.partition(
    {"a": SGD, "b": fo.Optimizer(SGD.init, SGD.update)},
    fo.by_name({"body*": "b"}, default="a"),
)
NOT_LEARNED = {"cavia": "context"}
ONES = torch.ones(2)
OF_TORCH: Any = torch.optim.SGD([ONES], lr=0.1)

Params = dict[str, Tensor]
Points = tuple[Tensor, Tensor]


def network(p: Params, x: Tensor) -> Tensor:
    """[n, 2] → [n]; the context is an input beside x."""
    context = p["context"].expand(x.shape[0], 2)
    hidden = tanh(linear(torch.cat([x, context], 1), p["body.weight"], p["body.bias"]))
    return linear(hidden, p["head.weight"], p["head.bias"]).squeeze(1)


def loss(p: Params, points: Points) -> Tensor:
    x, y = points
    return ((network(p, x) - y) ** 2).mean()


def loss_and_worst(p: Params, points: Points) -> tuple[Tensor, Tensor]:
    x, y = points
    errors = (network(p, x) - y) ** 2
    return errors.mean(), errors.max()


def params() -> Params:
    shapes = {
        "body.weight": (3, 4),
        "body.bias": (3,),
        "head.weight": (1, 3),
        "head.bias": (1,),
        "context": (2,),
    }
    return {name: 0.7 * torch.randn(shape).double() for name, shape in shapes.items()}


def tasks() -> tuple[Points, Points]:
    def points(n: int) -> Points:
        x = torch.randn(TASKS, n, 2).double()
        return x, x.prod(2) + torch.randn(TASKS, 1).double()

    return points(5), points(6)


def family(
    name: str, opt: fo.Optimizer | None = None, loss_fn: Any = None, **options: Any
) -> fo.meta.Family:
    options.setdefault("steps", STEPS)
    if name == "imaml":
        options.setdefault("iterations", 40)  # of conjugate gradients: converged
    return getattr(fo.meta, name)(loss_fn or loss, opt or fo.sgd(lr=LR), **options)


def theta_of(name: str) -> Any:
    """θ of a fresh network; no two learned rates are alike."""
    theta = family(name).init(params())
    if name in RATES:
        theta["lr"] = tree.map(lambda r: r * (0.5 + torch.rand_like(r)), theta["lr"])
    return theta


def one(batch: Any, i: int) -> Any:
    return tree.map(lambda x: x[i], batch)


# By hand ------------------------------------------------------------------------------


def rate(name: str, theta: Any, leaf: str, k: int) -> Any:
    if name == "lslr":
        return theta["lr"][leaf][min(k, STEPS - 1)]
    return theta["lr"][leaf] if name == "metasgd" else LR


def descended(name: str, theta: Any, points: Points, steps: int = STEPS) -> list[Params]:
    """The parameters before, between and after the inner steps."""
    p = dict(theta["params"] if name in RATES else theta)
    if name == "cavia":
        p["context"] = torch.zeros(2).double().requires_grad_()
    moved = {"anil": ("head.weight", "head.bias"), "cavia": ("context",)}.get(name, [*p])
    path = [p]
    for k in range(steps):
        value = loss(p, points)
        if name == "imaml":  # λ = 2
            value = value + sum(((p[n] - theta[n]) ** 2).sum() for n in p)
        grads = torch.autograd.grad(value, [p[n] for n in moved], create_graph=True)
        if name == "fomaml":
            grads = [g.detach() for g in grads]
        steps_made = {n: rate(name, theta, n, k) * g for n, g in zip(moved, grads)}
        p = {n: x - steps_made[n] if n in steps_made else x for n, x in p.items()}
        path.append(p)
    return path


def by_hand(name: str, theta: Any, weights: Tensor | None = None) -> tuple[Tensor, Any]:
    """The mean over the tasks of what the paper asks for, and its gradient."""
    theta = tree.map(lambda x: x.clone().requires_grad_(), theta)
    total = torch.zeros(()).double()
    for i in range(TASKS):
        support, query = one(tasks_of_test, i)
        if name == "reptile":
            whole = torch.cat([support[0], query[0]]), torch.cat([support[1], query[1]])
            end = tree.detach(descended(name, theta, whole)[-1])
            total = total + sum(((theta[n] - end[n]) ** 2).sum() for n in theta) / 2
        elif name == "imaml":
            total = total + implicit_by_hand(theta, support, query)
        else:
            path = descended(name, theta, support)[1:]
            every = torch.stack([loss(p, query) for p in path])
            total = total + (every[-1] if weights is None else (weights * every).sum())
    leaves = tree.leaves(theta)
    grads = torch.autograd.grad(total / TASKS, leaves, materialize_grads=True)
    return total.detach() / TASKS, tree.unflatten(tree.flatten(theta)[1], list(grads))


def implicit_by_hand(theta: Params, support: Points, query: Points) -> Tensor:
    """The query loss, with (I + H / 2)⁻¹ of its gradient for a gradient; H is dense."""
    names, sizes = [*theta], [p.numel() for p in theta.values()]
    end = tree.detach(descended("imaml", theta, support)[-1])

    def of(flat: Tensor, points: Points) -> Tensor:
        parts = flat.split(sizes)
        return loss({n: p.view_as(theta[n]) for n, p in zip(names, parts)}, points)

    at = torch.cat([end[n].flatten() for n in names])
    curved = torch.eye(len(at)).double() + torch.func.hessian(of)(at, support) / 2
    slope = torch.linalg.solve(curved, torch.func.grad(of)(at, query))
    start = torch.cat([theta[n].flatten() for n in names])
    return of(at, query) + (slope * (start - start.detach())).sum()


tasks_of_test: Any = None


@pytest.fixture(autouse=True)
def drawn() -> None:
    global tasks_of_test
    tasks_of_test = tasks()


def close(found: Any, wanted: Any) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("how", ["loop", "vmap"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_meta_gradient_is_the_papers(name: str, how: Any):
    theta = theta_of(name)
    value, grads = fo.meta.value_and_grad(family(name).task_loss, tasks=how)(
        theta, tasks_of_test
    )
    wanted, wanted_grads = by_hand(name, theta)
    close(value, wanted)
    close(grads, wanted_grads)
    parts = grads["params"] if name in RATES else grads
    nonzero = {leaf for leaf, g in parts.items() if g.abs().max() > 1e-4}
    assert nonzero == {*parts} - {NOT_LEARNED.get(name)}


@pytest.mark.parametrize("progress", [0.0, 0.4, 1.0])
def test_the_multi_step_loss_is_the_weighted_one(progress: float):
    theta, weights = theta_of("lslr"), fo.meta.step_weights(STEPS, progress).double()
    judged = partial(family("lslr").task_loss, weights=weights)
    value, grads = fo.meta.value_and_grad(judged)(theta, tasks_of_test)
    wanted, wanted_grads = by_hand("lslr", theta, weights)
    close(value, wanted)
    close(grads, wanted_grads)


# What they share, and what tells them apart ---------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_adaptation_goes_on_beyond_the_steps_of_training(name: str):
    theta, (support, _) = theta_of(name), one(tasks_of_test, 0)
    followed = tree.map(lambda x: x.clone().requires_grad_(), theta)
    for steps in (0, 2, STEPS + 4):
        run = fo.meta.adapt(family(name), followed, support, steps=steps)
        close(run.params, tree.detach(descended(name, followed, support, steps)[-1]))
        assert run.losses.shape == (steps,)
        assert not any(x.requires_grad for x in tree.leaves(run.params))
    scale = torch.ones((), requires_grad=True)  # and nothing that the loss closes over
    scaled = family(name, loss_fn=lambda p, points: scale * loss(p, points))
    run = fo.meta.adapt(scaled, theta, support)
    assert not any(x.requires_grad for x in tree.leaves(run.params))
    default = fo.meta.adapt(family(name), theta, support).params
    close(default, family(name).adapt(theta, support).params)
    close(fo.meta.adapt(family(name), theta, support, steps=STEPS).params, default)


@pytest.mark.parametrize("name", FAMILIES)
def test_many_tasks_adapt_at_once(name: str):
    theta, (supports, _) = theta_of(name), tasks_of_test
    many = vmap(lambda s: fo.meta.adapt(family(name), theta, s).params)(supports)
    for i in range(TASKS):
        single = fo.meta.adapt(family(name), theta, one(supports, i))
        close(one(many, i), single.params)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_unadapted_network(name: str):
    given = params()
    unadapted = family(name).params(family(name).init(given))
    for leaf, value in given.items():
        start = torch.zeros_like(value) if leaf == NOT_LEARNED.get(name) else value
        assert torch.equal(unadapted[leaf], start)
    start = fo.meta.adapt(
        family(name), family(name).init(given), one(tasks_of_test, 0)[0], steps=0
    )
    close(start.params, unadapted)


@pytest.mark.parametrize("name", FAMILIES)
def test_aux_is_of_the_query_after_adaptation(name: str):
    theta = theta_of(name)
    plain = fo.meta.value_and_grad(family(name).task_loss)(theta, tasks_of_test)
    with_aux = family(name, loss_fn=loss_and_worst, has_aux=True)
    (value, worst), grads = fo.meta.value_and_grad(with_aux.task_loss, has_aux=True)(
        theta, tasks_of_test
    )
    close((value, grads), plain)
    support, query = one(tasks_of_test, 1)
    adapted = fo.meta.adapt(family(name), theta, support).params
    close(worst[1], loss_and_worst(adapted, query)[1])


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("opt", [fo.adam(lr=LR), fo.sgd(lr=LR, momentum=0.9)], ids=repr)
@pytest.mark.slow
def test_any_inner_optimizer(name: str, opt: fo.Optimizer):
    """The gradient, where it is the exact one, is the slope along a random way."""
    kind, theta = family(name, opt), theta_of(name)
    mean = fo.meta.value_and_grad(kind.task_loss, tasks="vmap")
    _, grads = mean(theta, tasks_of_test)
    if name in ("fomaml", "reptile", "imaml"):
        assert all(torch.isfinite(g).all() for g in tree.leaves(grads))
        return
    way = tree.map(torch.randn_like, theta)

    def value(distance: float) -> Tensor:
        at = tree.map(lambda x, w: x + distance * w, theta, way)
        return mean(at, tasks_of_test)[0]

    slope = (value(1e-5) - value(-1e-5)) / 2e-5
    along = sum((g * w).sum() for g, w in zip(tree.leaves(grads), tree.leaves(way)))
    torch.testing.assert_close(along, slope, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_gap_in_the_network_stays_one(name: str):
    start = params()
    found = []
    for given in (start, {**start, "gap": None}):
        theta = family(name).init(given)
        value, grads = fo.meta.value_and_grad(family(name).task_loss)(
            theta, tasks_of_test
        )
        adapted = fo.meta.adapt(family(name), theta, one(tasks_of_test, 0)[0]).params
        found.append((value, grads.get("params", grads), adapted))
    (value, grads, adapted), gapped = found
    assert gapped[1].pop("gap") is None and gapped[2].pop("gap") is None
    close(gapped, (value, grads, adapted))


@pytest.mark.parametrize("name", FAMILIES)
def test_what_was_not_followed_comes_without_a_graph(name: str):
    """Or every outer step would hold on to the one before."""
    found = fo.meta.value_and_grad(family(name).task_loss, tasks="loop")(
        theta_of(name), tasks_of_test
    )
    assert not any(x.requires_grad for x in tree.leaves(found))


def test_all_of_a_lone_leaf_may_be_the_head():
    def square(p: Tensor, target: Tensor) -> Tensor:
        return (p - target).square().sum()

    task, theta = (torch.ones(2), torch.zeros(2)), torch.tensor([0.5, 2.0])
    whole, maml = (
        getattr(fo.meta, name)(square, fo.sgd(lr=0.1), steps=2, **more)
        for name, more in (("anil", {"adapted": "*"}), ("maml", {}))
    )
    close(
        torch.func.grad(whole.task_loss)(theta, task),
        torch.func.grad(maml.task_loss)(theta, task),
    )


def test_equal_rates_make_maml_of_those_who_learn_them():
    start = params()
    wanted = fo.meta.value_and_grad(family("maml").task_loss)(start, tasks_of_test)
    for name in RATES:
        value, grads = fo.meta.value_and_grad(family(name).task_loss)(
            family(name).init(start), tasks_of_test
        )
        close((value, grads["params"]), wanted)


def test_first_order_is_the_query_gradient_where_adaptation_ends():
    theta = params()
    support, query = one(tasks_of_test, 0)
    end = family("maml").adapt(theta, support).params
    close(torch.func.grad(family("fomaml").task_loss)(theta, (support, query)),
          torch.func.grad(loss)(end, query))  # fmt: skip


def test_the_context_is_not_learned():
    theta = params()
    outer = fo.adamw(lr=0.1)
    state, start = outer.init(theta), family("cavia").params(theta)
    for _ in range(3):
        _, grads = fo.meta.value_and_grad(family("cavia").task_loss)(start, tasks_of_test)
        start, state = outer.update(grads, state, start)
    assert not start["context"].count_nonzero()
    assert all(start[n].ne(theta[n]).any() for n in theta if n != "context")


def test_reptile_by_sgd_is_the_papers_interpolation():
    theta, kind = params(), family("reptile")
    _, grads = fo.meta.value_and_grad(kind.task_loss)(theta, tasks_of_test)
    outer = fo.sgd(lr=0.25)
    found, _ = outer.update(grads, outer.init(theta), theta)
    support, query = tasks_of_test
    wholes = tree.map(lambda a, b: torch.cat([a, b], 1), support, query)
    ends = [kind.adapt(theta, one(wholes, i)).params for i in range(TASKS)]
    for leaf, p in theta.items():
        mean = torch.stack([end[leaf] for end in ends]).mean(0)
        close(found[leaf], p + 0.25 * (mean - p))


def test_reptile_in_minibatches():
    def halves(task: tuple[Points, Points]) -> Points:
        (x, y), _ = task
        return x[:4].view(2, 2, 2), y[:4].view(2, 2)

    theta, task = params(), one(tasks_of_test, 0)
    kind = family("reptile", None, loss_and_worst, steps=2, batches=halves, has_aux=True)
    grads, _ = torch.func.grad(kind.task_loss, has_aux=True)(theta, task)
    x, y = halves(task)
    single = family("maml", steps=1)
    end = single.adapt(single.adapt(theta, (x[0], y[0])).params, (x[1], y[1])).params
    close(grads, tree.map(lambda p, q: p - q, theta, end))


def test_imaml_at_the_minimum_is_the_closed_form():
    r"""½(φ - c)ᵀA(φ - c): φ* = (A + λ)⁻¹(Ac + λθ), whose derivative is λ(A + λ)⁻¹."""
    root, strength = torch.randn(4, 4).double(), 0.7
    bowl = root @ root.T / 4

    def quadratic(p: Params, centre: Tensor) -> Tensor:
        way = p["x"] - centre
        return 0.5 * way @ bowl @ way

    kind = fo.meta.imaml(
        quadratic, fo.sgd(lr=0.2), steps=400, strength=strength, iterations=6
    )
    theta = {"x": torch.randn(4).double()}
    one_way, other = torch.randn(2, 4).double()
    value, grads = fo.meta.value_and_grad(kind.task_loss)(
        theta, (one_way[None], other[None])
    )
    resolvent = torch.linalg.inv(bowl + strength * torch.eye(4).double())
    minimum = resolvent @ (bowl @ one_way + strength * theta["x"])
    close(value, quadratic({"x": minimum}, other))
    close(grads["x"], strength * resolvent @ bowl @ (minimum - other))
    # At the minimum it is also what the exact gradient through all steps comes to.
    unrolled = torch.func.grad(
        lambda theta: quadratic(kind.adapt(theta, one_way).params, other)
    )(theta)
    close(grads, unrolled)


def test_imaml_damps_the_curvature():
    """½(φ - 1)², λ = 1: φ* = ½, and λ / (1 + λ + damping) of its slope there."""
    kind = fo.meta.imaml(
        lambda p, goal: 0.5 * (p - goal).square().sum(),
        fo.sgd(lr=0.5),
        steps=1,
        strength=1.0,
        damping=2.0,
    )
    task = torch.ones(1), torch.ones(1)
    close(torch.func.grad(kind.task_loss)(torch.zeros(1), task), torch.tensor([-0.125]))


def test_weights_anneal_to_the_last_step():
    weights = [fo.meta.step_weights(5, t) for t in (0.0, 0.3, 0.9, 1.0, 7.0)]
    for w in weights:
        assert float(w.sum()) == pytest.approx(1)
    assert weights[0].tolist() == pytest.approx([0.2] * 5)
    assert all(late[0] < early[0] for early, late in zip(weights[:3], weights[1:4]))
    assert weights[3].tolist() == weights[4].tolist() == [0, 0, 0, 0, 1]


def test_rates_start_from_the_inner_optimizers():
    opt = fo.sgd(lr=fo.by_name({"head*": 0.5}, default=torch.tensor(0.1)))
    theta = family("lslr", opt).init(params())
    assert theta["lr"]["head.bias"].tolist() == [0.5] * STEPS
    assert theta["lr"]["context"].tolist() == pytest.approx([0.1] * STEPS)
    assert family("metasgd", opt).init(params())["lr"]["context"].shape == (2,)


@pytest.mark.parametrize("name", RATES)
def test_rates_start_from_those_of_a_partition(name: str):
    """And give what the same rates in one optimizer give."""
    of_heads = fo.by_name({"head*": 0.5}, default=0.1)
    parts = {"rest": fo.sgd(lr=0.1), "heads": fo.sgd(lr=of_heads)}
    labels = fo.by_name({"head*": "heads"}, default="rest")
    whole = family(name, fo.sgd(lr=of_heads))
    split = family(name, fo.chain(fo.zero_nans(), fo.partition(parts, labels)))
    start, task = params(), one(tasks_of_test, 0)
    theta = whole.init(start)
    close(split.init(start), theta)
    slopes = (torch.func.grad(kind.task_loss)(theta, task) for kind in (split, whole))
    close(*slopes)


def normed(p: Params, points: Points, *, buffers: Params) -> Tensor:
    """By running statistics, too, so that they matter."""
    x, y = points
    x = torch.nn.functional.batch_norm(
        x, buffers["mean"], buffers["var"], training=True, momentum=0.5
    )
    return loss(p, (x, y)) + (p["head.bias"] * buffers["mean"]).square().sum()


@pytest.mark.parametrize("window", [1, 2, 5])
def test_the_multi_step_loss_is_cut_in_windows(window: int):
    """Rates of a step reach the losses of their own window, up to the next cut."""
    theta, weights = theta_of("lslr"), torch.tensor([0.2, 0.3, 0.5]).double()
    kind = family("lslr", window=window)
    task = one(tasks_of_test, 0)
    found = torch.func.grad(kind.task_loss)(theta, task, weights)

    def cut(theta: Any) -> Tensor:
        p, total = theta["params"], torch.zeros(()).double()
        for k in range(STEPS):
            p = tree.detach(p) if k and k % window == 0 else p
            g = torch.func.grad(loss)(p, task[0])
            p = {n: p[n] - theta["lr"][n][k] * g[n] for n in p}
            total = total + weights[k] * loss(p, task[1])
        return total

    close(found, torch.func.grad(cut)(theta))


def test_imaml_has_no_second_derivative_and_says_so():
    kind, theta, task = family("imaml"), params(), one(tasks_of_test, 0)

    def slope(theta: Params) -> Params:
        return torch.func.grad(kind.task_loss)(theta, task)

    along = tree.map(torch.ones_like, theta)
    total = sum(g.sum() for g in slope(theta).values())
    ahead = torch.func.jvp(lambda p: kind.task_loss(p, task), (theta,), (along,))[1]
    close(ahead, total)
    marked = tree.map(lambda x: x.clone().requires_grad_(), theta)
    meta_loss = fo.meta.value_and_grad(kind.task_loss)
    asks: list[Callable[[], Any]] = [
        lambda: torch.func.grad(lambda p: slope(p)["context"].sum())(theta),
        lambda: torch.func.jvp(slope, (theta,), (along,)),
        lambda: meta_loss(marked, tasks_of_test)[1]["context"].sum().backward(),
    ]
    for ask in asks:
        with pytest.raises(fo.GradientLostError, match="first derivatives only"):
            ask()


def test_the_last_steps_weight_alone_is_the_plain_loss():
    """State and buffers go from step to step, and the queries on the way leave them."""
    buffers = {"mean": torch.zeros(2).double(), "var": torch.ones(2).double()}
    opt = fo.sgd(lr=LR, momentum=0.9)
    kind = family("lslr", opt, loss_fn=normed, buffers=buffers)
    last = partial(kind.task_loss, weights=fo.meta.step_weights(STEPS, 1.0))
    theta = theta_of("lslr")
    plain, weighted = (
        fo.meta.value_and_grad(judged, tasks="loop")(theta, tasks_of_test)
        for judged in (kind.task_loss, last)
    )
    close(weighted, plain)


@pytest.mark.parametrize("name", FAMILIES[:-1])  # a minimum has no last buffers
def test_buffers_are_carried_and_not_changed(name: str):
    """Running statistics: the inner loop's go on to the query, and ours stay."""
    buffers = {"mean": torch.zeros(2).double(), "var": torch.ones(2).double()}
    kind = getattr(fo.meta, name)(normed, fo.sgd(lr=LR), steps=2, buffers=buffers)
    theta = kind.init(params())
    ways = [
        fo.meta.value_and_grad(kind.task_loss, tasks=how)(theta, tasks_of_test)
        for how in ("loop", "vmap")
    ]
    close(*ways)
    run = fo.meta.adapt(kind, theta, one(tasks_of_test, 0)[0])
    assert run.buffers["mean"].count_nonzero() and not buffers["mean"].count_nonzero()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_task_is_a_pair_or_a_dict(name: str):
    theta, (support, query) = theta_of(name), one(tasks_of_test, 0)
    kind = family(name)
    close(
        kind.task_loss(theta, {"query": query, "support": support}),
        kind.task_loss(theta, [support, query]),
    )
    more = {"support": support, "query": query, "valid": query}
    of_others = {"train": support, "test": query}
    for task in ((support, query, query), more, of_others, support[0]):
        with pytest.raises(fo.StructureError, match="a pair .support, query."):
            kind.task_loss(theta, task)


def test_what_is_not_finite_is_counted():
    inf, nan = float("inf"), float("nan")
    grads = {"a": [torch.tensor([nan, 1.0, -inf]), None], "b": torch.zeros(2, 2)}
    counts = fo.meta.nonfinite(grads)
    assert {path: int(n) for path, n in counts.items()} == {"a.0": 2, "b": 0}
    many = vmap(fo.meta.nonfinite)({"c": torch.tensor([[nan, nan], [0.0, inf]])})
    assert many["c"].tolist() == [2, 1]


def longer() -> Any:
    """θ of one step more."""
    return family("lslr", steps=STEPS + 1).init(params())


BAD: dict[str, tuple[Callable[[], Any], type[fo.FuncoptError], str]] = {
    "a mask of the query alone": (
        lambda: family("reptile").task_loss(
            params(), ({"y": torch.ones(2), "m": None}, {"y": torch.ones(3), "m": ONES})
        ),
        fo.StructureError,
        r"joins support and query .* 'm' is None in support and .2. in query; .*batches=",
    ),
    "data without rows": (
        lambda: family("reptile").task_loss(params(), (torch.ones(()), torch.ones(()))),
        fo.StructureError,
        r"'<root>' is \[\] in support and \[\] in query",
    ),
    "rows of other lengths": (
        lambda: family("reptile").task_loss(params(), (torch.ones(2, 2), ONES)),
        fo.StructureError,
        r"is \[2, 2\] in support and \[2\] in query",
    ),
    "a number for data": (
        lambda: family("reptile").task_loss(params(), ({"n": 3}, {"n": ONES})),
        fo.StructureError,
        r"'n' is 3 in support and \[2\] in query",
    ),
    "the same number for data": (
        lambda: family("reptile").task_loss(params(), ({"n": 3}, {"n": 3})),
        fo.StructureError,
        "'n' is 3 in support and 3 in query",
    ),
    "data that the support has not": (
        lambda: family("reptile").task_loss(params(), ({"y": ONES}, {"m": ONES})),
        fo.StructureError,
        "query must have the structure of support: missing 'y'; not in support 'm'",
    ),
    "no step to have a rate": (
        lambda: family("lslr", steps=0),
        fo.HyperparameterError,
        "steps must be a whole number ≥ 1, got 0",
    ),
    "half a step": (
        lambda: family("lslr").adapt(
            theta_of("lslr"), one(tasks_of_test, 0)[0], steps=1.5
        ),
        fo.HyperparameterError,
        "steps must be a whole number ≥ 0, got 1.5",
    ),
    "rates of more steps, by weights": (
        lambda: family("lslr").task_loss(longer(), one(tasks_of_test, 0), torch.ones(3)),
        fo.StructureError,
        r"theta\['lr'\] holds the rates of 4 steps, and this lslr learns those of 3",
    ),
    "rates of fewer steps, by weights": (
        lambda: family("lslr", steps=5).task_loss(
            longer(), one(tasks_of_test, 0), torch.ones(5)
        ),
        fo.StructureError,
        "the rates of 4 steps, and this lslr learns those of 5",
    ),
    "rates of more steps, beyond training": (
        lambda: fo.meta.adapt(
            family("lslr"), longer(), one(tasks_of_test, 0)[0], steps=9
        ),
        fo.StructureError,
        "the rates of 4 steps, and this lslr learns those of 3",
    ),
    "one rate for all steps": (
        lambda: fo.meta.adapt(
            family("lslr"), {"params": ONES, "lr": ONES.sum()}, ONES, steps=9
        ),
        fo.StructureError,
        r"theta\['lr'\]\['<root>'\] must be a tensor with a leading axis",
    ),
    "a list of weights": (
        lambda: family("lslr").task_loss(theta_of("lslr"), one(tasks_of_test, 0), [1.0]),
        fo.StructureError,
        r"weights must be a tensor \[3\], one for each step, got \[1.0\]",
    ),
    "aux that is not given": (
        lambda: family("imaml", has_aux=True).task_loss(params(), one(tasks_of_test, 0)),
        fo.StructureError,
        r"loss_fn must return \(loss, aux\)",
    ),
    "weights of another number of steps": (
        lambda: family("lslr").task_loss(
            theta_of("lslr"), one(tasks_of_test, 0), torch.ones(2)
        ),
        fo.StructureError,
        r"weights must be a tensor \[3\], one for each step, got \[2\]",
    ),
    "a rate that is a schedule": (
        lambda: family("metasgd", fo.sgd(lr=fo.Schedule(float))).init(params()),
        fo.HyperparameterError,
        "learned rate of 'body.bias' starts from a number, not .*Schedule",
    ),
    "a rate for each weight": (
        lambda: family("metasgd", fo.sgd(lr=ONES)).init({"w": ONES}),
        fo.HyperparameterError,
        "learned rate of 'w' starts from a number, not tensor",
    ),
    "rates of torch.optim": (
        lambda: family("metasgd", OF_TORCH).init(params()),
        fo.HyperparameterTypeError,
        "a family that learns rates takes an Optimizer, not SGD",
    ),
    "rates of a module": (
        lambda: family("lslr").init(torch.nn.Linear(1, 1)),
        fo.LeafError,
        r"params\['<root>'\] is Linear, not a tensor; a module's parameters are dict",
    ),
    "rates of whole numbers": (
        lambda: family("metasgd").init({"n": torch.ones(2, dtype=torch.int64)}),
        fo.LeafError,
        r"params\['n'\] is torch.int64",
    ),
    "a rate that its part has not": (
        lambda: family("metasgd", UNRATED).init(params()),
        fo.HyperparameterError,
        "learned rate of 'body.bias' starts from a number, not None",
    ),
    "nothing to adapt": (
        lambda: family("anil", adapted="tail*").adapt(params(), one(tasks_of_test, 0)[0]),
        fo.HyperparameterError,
        r"the glob 'tail\*' fits none of the parameters",
    ),
    "what was adapted for a glob": (
        lambda: family("anil", adapted=["head"]).adapt(params(), 0),
        fo.HyperparameterTypeError,
        r"adapted is a glob, as 'head\*', not \['head'\]",
    ),
    "parameters for theta": (
        lambda: family("metasgd").adapt(params(), one(tasks_of_test, 0)[0]),
        fo.StructureError,
        r"family.init\(params\) makes it; this is .*'head.weight'",
    ),
    "a tensor for theta": (
        lambda: family("lslr").params(torch.ones(2)),
        fo.StructureError,
        "makes it; this is Tensor",
    ),
    "no pull": (
        lambda: family("imaml", strength=0.0),
        fo.HyperparameterError,
        "strength must be positive, got 0.0",
    ),
    "a pull that is no number": (
        lambda: family("imaml", strength=math.nan),
        fo.HyperparameterError,
        "strength must be positive, got nan",
    ),
    "annealing before it begins": (
        lambda: fo.meta.step_weights(3, -0.1),
        fo.HyperparameterError,
        "progress must be at least 0, got -0.1",
    ),
    "fewer steps than none": (
        lambda: fo.meta.adapt(
            family("maml"), params(), one(tasks_of_test, 0)[0], steps=-1
        ),
        fo.HyperparameterError,
        "steps must be a whole number ≥ 0",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_what_cannot_be_is_said(what: str):
    wrong, error, words = BAD[what]
    with pytest.raises(error, match=words):
        wrong()


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_meta_training_on_sine_waves_lowers_the_loss(name: str):
    def draw(count: int) -> tuple[Points, Points]:
        amplitude, phase = torch.rand(2, count, 1) * torch.tensor([[[2.0]], [[math.pi]]])
        x = torch.rand(count, 20, 2) * 6 - 3
        y = (1 + amplitude) * torch.sin(x[..., 0] + phase)
        return (x[:, :10], y[:, :10]), (x[:, 10:], y[:, 10:])

    options: dict[str, Any] = {"steps": 2}
    if name == "imaml":  # near its minimum, which has to be one of the task
        options = {"steps": 8, "strength": 0.2, "iterations": 5}
    kind = family(name, fo.sgd(lr=0.1), **options)
    theta = kind.init(tree.map(lambda p: p.float(), params()))
    outer = fo.adam(lr=0.02)
    state, mean = outer.init(theta), fo.meta.value_and_grad(kind.task_loss)

    def error(theta: Any) -> Tensor:
        support, query = draw(200)
        adapted = vmap(lambda s: fo.meta.adapt(kind, theta, s).params)(support)
        return vmap(loss)(adapted, query).mean()

    before = error(theta)
    for _ in range(150):
        _, grads = mean(theta, draw(16))
        theta, state = outer.update(grads, state, theta)
    assert error(theta) < 0.9 * before
