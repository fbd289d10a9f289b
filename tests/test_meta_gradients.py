"""Meta-gradients over tasks: batched = looped = written by hand, through any norm."""

import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap

import funcopt as fo
from funcopt import tree
from funcopt.meta.tasks import choose

TASKS = 5


def random(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def distance(found: Any, expected: Any) -> float:
    """The largest difference, relative to the largest entry of all leaves."""
    a, b = tree.leaves(found), tree.leaves(expected)
    assert len(a) == len(b) > 0 and all(x.shape == y.shape for x, y in zip(a, b))
    scale = max(float(y.abs().max()) for y in b)
    assert scale > 1e-3, "a zero says nothing"
    return max(float((x - y).abs().max()) for x, y in zip(a, b)) / scale


# Networks; the affine norms stand after an adapted layer ------------------------------

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)),
    "conv, batch norm": lambda: conv_net(nn.BatchNorm1d(4, track_running_stats=False)),
    "conv, instance norm": lambda: conv_net(nn.InstanceNorm1d(4, affine=True)),
    "conv, group norm": lambda: conv_net(nn.GroupNorm(2, 4)),
    "linear, layer norm": lambda: nn.Sequential(
        nn.Linear(6, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 2)
    ),
}
WRONG_OUTSIDE = ("conv, batch norm", "conv, instance norm", "linear, layer norm")


def conv_net(norm: nn.Module) -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 6)),
        nn.Conv1d(1, 4, 3),
        norm,
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(16, 2),
    )


class Problem(NamedTuple):
    loss: Callable[[Any, Any], Tensor]  #: (params, (x, y)) -> 0-d
    params: dict[str, Tensor]
    tasks: dict[str, tuple[Tensor, Tensor]]  #: support and query, [TASKS, 7, ...]


def problem(name: str) -> Problem:
    torch.manual_seed(0)
    net = NETWORKS[name]().double()
    params = {
        key: p.detach() + 0.1 * random(*p.shape, seed=i)  # no norm stays at (1, 0)
        for i, (key, p) in enumerate(net.named_parameters())
    }

    def loss(params: Any, batch: Any) -> Tensor:
        # not F.mse_loss: torch 2.13 has no jvp of its gradient for a constant target
        return (functional_call(net, params, (batch[0],)) - batch[1]).square().mean()

    parts = {
        part: (random(TASKS, 7, 6, seed=70 + i), random(TASKS, 7, 2, seed=80 + i))
        for i, part in enumerate(("support", "query"))
    }
    return Problem(loss, params, parts)


def maml(
    loss: Callable[..., Tensor], opt: fo.Optimizer, steps: int = 2
) -> Callable[..., Tensor]:
    def task_loss(theta: Any, task: Any) -> Tensor:
        end = fo.unroll(
            opt,
            loss,
            theta["init"],
            task["support"],
            steps=steps,
            hyper={"lr": theta["lr"]},
        )
        return loss(end.params, task["query"])

    return task_loss


# By hand: plain autograd, task by task, no torch.func ----------------------------------


def sgd_by_hand(p: Tensor, g: Tensor, s: Any, lr: Any, step: int) -> tuple[Tensor, Any]:
    return p - lr * g, s


def adam_by_hand(p: Tensor, g: Tensor, s: Any, lr: Any, step: int) -> tuple[Tensor, Any]:
    m, v = s or (0.0, 0.0)
    m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
    m_hat, v_hat = m / (1 - 0.9**step), v / (1 - 0.999**step)
    return p - lr * m_hat / (v_hat.sqrt() + 1e-8), (m, v)


def by_hand(
    rule: Callable[..., tuple[Tensor, Any]],
    problem: Problem,
    theta: Any,
    lr_of: Callable[[Any, str, int], Any],
    steps: int = 2,
) -> tuple[Tensor, Any]:
    """The mean over tasks and its gradient; ``lr_of(theta, leaf, step)``."""
    loss, _, tasks = problem
    leaves, structure = tree.flatten(theta)
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    theta = tree.unflatten(structure, leaves)
    values = []
    for i in range(TASKS):
        support, query = ((x[i], y[i]) for x, y in (tasks["support"], tasks["query"]))
        p, states = dict(theta["init"]), dict.fromkeys(theta["init"])
        for k in range(steps):
            slopes = torch.autograd.grad(
                loss(p, support), list(p.values()), create_graph=True
            )
            for name, g in zip(list(p), slopes):
                lr = lr_of(theta, name, k)
                p[name], states[name] = rule(p[name], g, states[name], lr, k + 1)
        values.append(loss(p, query))
    value = torch.stack(values).mean()
    return value.detach(), tree.unflatten(structure, torch.autograd.grad(value, leaves))


INNER = {"sgd": (fo.sgd(), sgd_by_hand, 0.3), "adam": (fo.adam(), adam_by_hand, 0.02)}


def with_lr(problem: Problem, lr: float) -> dict[str, Any]:
    return {"init": problem.params, "lr": torch.tensor(lr, dtype=torch.float64)}


@pytest.mark.parametrize("tasks", ["vmap", "loop", "auto"])
@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("name", NETWORKS)
def test_every_path_is_autograd_by_hand(name: str, inner: str, tasks: Any):
    case, (opt, rule, lr) = problem(name), INNER[inner]
    theta = with_lr(case, lr)
    expected = by_hand(rule, case, theta, lambda theta, leaf, k: theta["lr"])
    mean = fo.meta.value_and_grad(maml(case.loss, opt), tasks=tasks)
    found = mean(theta, case.tasks)
    assert distance(found[0], expected[0]) < 1e-12
    assert distance(found[1], expected[1]) < 1e-12
    assert found[0].shape == () and found[1].keys() == theta.keys()


@pytest.mark.parametrize("name", NETWORKS)
def test_the_usual_recipe_is_wrong_through_affine_norms(name: str):
    """pytorch/functorch#534: a gradient taken outside of vmap, and no error.

    Where torch mends it, the first assertion says so: `exact_norms` can then go.
    """
    case = problem(name)
    theta = with_lr(case, 0.3)
    truth = by_hand(sgd_by_hand, case, theta, lambda theta, leaf, k: theta["lr"])[1]

    def plain(theta: Any, task: Any) -> Tensor:
        params = theta["init"]
        for _ in range(2):
            slopes = grad(case.loss)(params, task["support"])
            params = {key: p - theta["lr"] * slopes[key] for key, p in params.items()}
        return case.loss(params, task["query"])

    def outside(task_loss: Callable[..., Tensor]) -> Any:
        batched = vmap(task_loss, in_dims=(None, 0))
        return grad(lambda theta: batched(theta, case.tasks).mean())(theta)

    usual = distance(outside(plain), truth)
    assert usual > 1e-4 if name in WRONG_OUTSIDE else usual < 1e-12
    unrolled = maml(case.loss, fo.sgd())
    assert distance(outside(unrolled), truth) < 1e-12
    inside = fo.meta.value_and_grad(unrolled, tasks="vmap")(theta, case.tasks)[1]
    assert distance(inside, truth) < 1e-12


@pytest.mark.parametrize("by", ["theta", "tasks"])
def test_autograd_through_a_meta_gradient_with_norms(by: str):
    """torch's own derivative, of a batch, is wrong without a word."""

    def loss(p: Any, x: Tensor) -> Tensor:
        norm = torch.nn.functional.layer_norm(x @ p["w"], (4,), p["g"], p["b"])
        return norm.tanh().square().mean()

    def task_loss(theta: Any, x: Tensor) -> Tensor:
        return loss(fo.unroll(fo.sgd(lr=0.1), loss, theta, x, steps=1).params, x)

    made = torch.Generator().manual_seed(1)
    w, g, b, x = (
        torch.randn(shape, generator=made, dtype=torch.float64)
        for shape in ((3, 4), (4,), (4,), (4, 5, 3))
    )

    def total(s: Any) -> Tensor:
        moved = {"w": w + (s * w.cos() if by == "theta" else 0.0), "g": g, "b": b}
        batch = x + s * x.cos() if by == "tasks" else x
        grads = fo.meta.value_and_grad(task_loss, tasks="vmap")(moved, batch)[1]
        return torch.cat([v.flatten() for v in grads.values()]).square().sum()

    zero = torch.zeros((), dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(total(zero), zero)
    central = (total(1e-5).detach() - total(-1e-5).detach()) / 2e-5
    assert slope.abs() > 1e-3
    torch.testing.assert_close(slope, central, rtol=1e-5, atol=1e-8)


def test_auto_is_the_rule_that_choose_tells():
    def ways(counts: tuple[int, ...], *shapes: tuple[int, ...], on: str = "cpu") -> Any:
        theta = {"none": None, "b": torch.zeros(2)}
        theta |= {str(shape): torch.zeros(shape, device=on) for shape in shapes}
        return [choose(theta, count) for count in counts]

    assert ways((1, 2, 3), (4, 3)) == ["loop", "loop", "vmap"]
    assert ways((9,), (32, 32, 3, 3), (4, 3)) == ["loop"]
    # No convolution, or a narrow one; and another device than the CPU.
    assert ways((9,), (1024, 1024), (64, 64, 3), (32, 31, 3, 3)) == ["vmap"]
    assert ways((1, 2, 9), (32, 32, 3, 3), on="meta") == ["loop", "vmap", "vmap"]


@pytest.mark.parametrize("chunk_size", [1, 2, 3, TASKS, TASKS + 2])
def test_chunks_change_nothing(chunk_size: int):
    case = problem("conv, batch norm")
    theta, task_loss = with_lr(case, 0.3), maml(case.loss, fo.sgd())
    whole = fo.meta.value_and_grad(task_loss, tasks="vmap")(theta, case.tasks)
    calls = 0

    def spied(theta: Any, task: Any) -> tuple[Tensor, Any]:
        nonlocal calls
        calls += 1
        return task_loss(theta, task), {"first": task["query"][0][0]}

    (loss, aux), grads = fo.meta.value_and_grad(
        spied, tasks="vmap", chunk_size=chunk_size, has_aux=True
    )(theta, case.tasks)
    assert calls == -(-TASKS // chunk_size)  # all tasks of a chunk at once
    assert distance((loss, grads), whole) < 1e-12
    assert torch.equal(aux["first"], case.tasks["query"][0][:, 0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("how", [{"tasks": "vmap"}, {"tasks": "loop"}, {"chunk_size": 7}])
def test_a_mean_over_many_tasks_in_half_precision(dtype: torch.dtype, how: Any):
    """Their sum would stop at 256 equal ones in bfloat16, or leave float16's range."""
    theta = {"a": torch.tensor(100.0, dtype=dtype), "idle": torch.ones(2, dtype=dtype)}
    xs = torch.linspace(50.0, 150.0, 1000).to(dtype)

    def task_loss(theta: Any, x: Tensor) -> Tensor:
        return theta["a"] * x / 100

    value, grads = fo.meta.value_and_grad(task_loss, **how)(theta, xs)
    assert value.dtype is grads["a"].dtype is grads["idle"].dtype is dtype
    assert abs(value.item() / 100 - 1) < 0.01 and abs(grads["a"].item() - 1) < 0.01


@pytest.mark.parametrize("tasks", ["vmap", "loop"])
def test_aux_has_a_row_for_each_task(tasks: Any):
    case = problem("mlp")
    theta, task_loss = with_lr(case, 0.3), maml(case.loss, fo.sgd())

    def with_aux(theta: Any, task: Any) -> tuple[Tensor, Any]:
        loss = task_loss(theta, task)
        return loss, {"loss": loss, "more": (task["query"][1], theta["lr"])}

    (loss, aux), grads = fo.meta.value_and_grad(with_aux, tasks=tasks, has_aux=True)(
        theta, case.tasks
    )
    plain = fo.meta.value_and_grad(task_loss, tasks=tasks)(theta, case.tasks)
    assert torch.equal(loss, plain[0]) and distance(grads, plain[1]) < 1e-12
    assert aux["loss"].shape == (TASKS,) and not aux["loss"].requires_grad
    assert distance(aux["loss"].mean(), loss) < 1e-12
    assert torch.equal(aux["more"][0], case.tasks["query"][1])
    assert torch.equal(aux["more"][1], theta["lr"].expand(TASKS))


@pytest.mark.parametrize("tasks", ["vmap", "loop"])
def test_task_and_aux_trees_may_have_gaps(tasks: Any):
    case = problem("mlp")
    theta, task_loss = with_lr(case, 0.3), maml(case.loss, fo.sgd())

    def with_aux(theta: Any, task: Any) -> tuple[Tensor, Any]:
        assert task["gap"] is None
        loss = task_loss(theta, task)
        return loss, {"loss": loss, "gap": None}

    mean = fo.meta.value_and_grad(with_aux, tasks=tasks, has_aux=True)
    (loss, aux), grads = mean(theta, {**case.tasks, "gap": None})
    assert aux["loss"].shape == (TASKS,) and aux["gap"] is None
    plain = fo.meta.value_and_grad(task_loss, tasks=tasks)(theta, case.tasks)
    assert distance((loss, grads), plain) < 1e-12


@pytest.mark.parametrize("way", [{}, {"remat": "step"}], ids=str)
def test_what_was_not_followed_comes_without_a_graph(way: dict[str, Any]):
    """Also where the loss's weights are learned, and what is trained is a constant."""
    case = problem("mlp")

    def task_loss(weight: Tensor, task: Any) -> Tensor:
        def weighted(p: Any, batch: Any, weight: Tensor) -> Tensor:
            return weight * case.loss(p, batch)

        given = {"steps": 2, "meta": weight, **way}
        run = fo.unroll(fo.sgd(lr=0.1), weighted, case.params, task["support"], **given)
        return case.loss(run.params, task["query"])

    mean = fo.meta.value_and_grad(task_loss, tasks="loop")
    value, slope = mean(torch.tensor(0.7).double(), case.tasks)
    assert slope.abs() > 1e-4 and not value.requires_grad and not slope.requires_grad


# What is learned -----------------------------------------------------------------------

PARAMS = ("0.weight", "0.bias", "2.weight", "2.bias")  # of the MLP
LEARNED: dict[str, tuple[Callable[[], Any], Callable[[Any, str, int], Any]]] = {
    "scalar": (
        lambda: torch.tensor(0.3, dtype=torch.float64),
        lambda theta, leaf, k: theta["lr"],
    ),
    "per leaf": (
        lambda: {p: torch.tensor(0.1 + 0.1 * i).double() for i, p in enumerate(PARAMS)},
        lambda theta, leaf, k: theta["lr"][leaf],
    ),
    "per element (Meta-SGD)": (
        lambda: {
            p: 0.1 + 0.1 * random(*shape, seed=i).abs()
            for i, (p, shape) in enumerate(zip(PARAMS, [(5, 6), (5,), (2, 5), (2,)]))
        },
        lambda theta, leaf, k: theta["lr"][leaf],
    ),
    "per step": (
        lambda: torch.tensor([0.3, 0.2, 0.1], dtype=torch.float64),
        lambda theta, leaf, k: theta["lr"][k],
    ),
    "per leaf and step (LSLR)": (
        lambda: {p: 0.1 + 0.1 * random(3, seed=i).abs() for i, p in enumerate(PARAMS)},
        lambda theta, leaf, k: theta["lr"][leaf][k],
    ),
}


@pytest.mark.parametrize("tasks", ["vmap", "loop"])
@pytest.mark.parametrize("form", LEARNED)
def test_learned_rates_of_every_form(form: str, tasks: Any):
    case, (make, lr_of) = problem("mlp"), LEARNED[form]
    theta = {"init": case.params, "lr": make()}
    expected = by_hand(sgd_by_hand, case, theta, lr_of, steps=3)

    def task_loss(theta: Any, task: Any) -> Tensor:
        lr = fo.per_step(theta["lr"]) if "step" in form else theta["lr"]
        end = fo.unroll(
            fo.sgd(), case.loss, theta["init"], task["support"], steps=3, hyper={"lr": lr}
        )
        return case.loss(end.params, task["query"])

    found = fo.meta.value_and_grad(task_loss, tasks=tasks)(theta, case.tasks)
    assert distance(found[0], expected[0]) < 1e-12
    assert distance(found[1]["init"], expected[1]["init"]) < 1e-12
    assert distance(found[1]["lr"], expected[1]["lr"]) < 1e-12
    assert all(g.abs().min() > 0 for g in tree.leaves(found[1]["lr"]))


class Theta(NamedTuple):
    body: dict[str, Any]
    head: list[Tensor]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tasks", ["vmap", "loop"])
def test_gradients_look_like_theta(tasks: Any, dtype: torch.dtype):
    theta = Theta(
        {
            "deep": {"er": random(3, seed=1).to(dtype)},
            "scale": torch.ones((), dtype=dtype),
        },
        [random(3, seed=2).to(dtype), (random(2, 3, seed=3).to(dtype),)],  # pyright: ignore
    )

    def loss(p: Theta, x: Tensor) -> Tensor:
        row = p.body["deep"]["er"] * p.body["scale"] + p.head[0] - p.head[1][0].prod(0)
        return (row * x).square().sum()

    def task_loss(theta: Theta, x: Tensor) -> Tensor:
        return loss(fo.unroll(fo.sgd(lr=0.01), loss, theta, x, steps=2).params, x)

    value, grads = fo.meta.value_and_grad(task_loss, tasks=tasks)(
        theta, random(4, 3, seed=4).to(dtype)
    )
    assert type(grads) is Theta and value.dtype == dtype
    assert tree.flatten(grads)[1] == tree.flatten(theta)[1]
    for g, p in zip(tree.leaves(grads), tree.leaves(theta)):
        assert (g.shape, g.dtype) == (p.shape, dtype) and g.abs().max() > 0


# Randomness ----------------------------------------------------------------------------


def noisy_loss(theta: Tensor, task: Tensor) -> tuple[Tensor, Tensor]:
    noise = torch.rand(3, dtype=torch.float64)
    return (theta * task * noise).sum(), noise


PATHS = [("vmap", None), ("vmap", 2), ("loop", None)]


@pytest.mark.parametrize("tasks, chunk_size", PATHS)
@pytest.mark.parametrize("randomness", ["different", "same"])
def test_randomness_across_tasks(randomness: Any, tasks: Any, chunk_size: int | None):
    mean = fo.meta.value_and_grad(
        noisy_loss,
        tasks=tasks,
        chunk_size=chunk_size,
        has_aux=True,
        randomness=randomness,
    )
    theta, task_batch = random(3, seed=1), random(TASKS, 3, seed=2)
    torch.manual_seed(0)
    (_, noise), grads = mean(theta, task_batch)
    assert noise.unique(dim=0).shape[0] == (1 if randomness == "same" else TASKS)
    assert distance(grads, (task_batch * noise).mean(0)) < 1e-12
    (_, again), _ = mean(theta, task_batch)
    assert not torch.equal(noise, again)  # the next call draws anew
    torch.manual_seed(0)
    assert torch.equal(mean(theta, task_batch)[0][1], noise)  # a seed repeats it


def test_the_same_numbers_are_the_same_on_every_path():
    drawn = []
    for tasks, chunk_size in PATHS:
        torch.manual_seed(0)
        mean = fo.meta.value_and_grad(
            noisy_loss,
            tasks=tasks,
            chunk_size=chunk_size,
            has_aux=True,
            randomness="same",
        )
        drawn.append(mean(random(3, seed=1), random(TASKS, 3, seed=2))[0][1])
    assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[0], drawn[2])


def test_random_numbers_nobody_asked_for_are_an_error():
    mean = fo.meta.value_and_grad(noisy_loss, tasks="vmap", has_aux=True)
    with pytest.raises(RuntimeError, match="randomness"):
        mean(random(3, seed=1), random(TASKS, 3, seed=2))


def test_dropout_in_the_inner_loop_differs_by_task_and_by_step():
    def task_loss(theta: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        def loss(p: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
            dropped = F.dropout(x)
            return (dropped @ p).square().mean(), dropped != 0

        run = fo.unroll(fo.sgd(lr=0.1), loss, theta, x, steps=3, has_aux=True)
        return run.params.square().sum(), run.aux

    x = random(30, 4, seed=1).expand(TASKS, 30, 4)
    (_, masks), _ = fo.meta.value_and_grad(
        task_loss, tasks="vmap", has_aux=True, randomness="different"
    )(random(4, seed=2), x)
    assert masks.shape == (TASKS, 3, 30, 4)
    assert masks.flatten(0, 1).unique(dim=0).shape[0] == TASKS * 3


# Inside other transforms ---------------------------------------------------------------


def mean_of(case: Problem, tasks: Any) -> Callable[[Any], tuple[Tensor, Any]]:
    mean = fo.meta.value_and_grad(maml(case.loss, fo.sgd()), tasks=tasks)
    return lambda theta: mean(theta, case.tasks)


def scaled(theta: Any, by: Tensor) -> Any:
    return {"init": tree.map(lambda p: p * by, theta["init"]), "lr": theta["lr"]}


@pytest.mark.parametrize("tasks", ["vmap", "loop"])
def test_a_derivative_of_the_meta_loss_follows_the_meta_gradient(tasks: Any):
    case = problem("mlp")
    theta, mean = with_lr(case, 0.3), mean_of(case, tasks)
    grads = mean(theta)[1]["init"]
    expected = sum(
        ((grads[k] * p).sum() for k, p in case.params.items()), torch.zeros(())
    )
    one = torch.ones((), dtype=torch.float64)
    assert distance(grad(lambda s: mean(scaled(theta, s))[0])(one), expected) < 1e-12
    slope = jvp(lambda s: mean(scaled(theta, s))[0], (one,), (one,))[1]
    assert distance(slope, expected) < 1e-12


@pytest.mark.parametrize("tasks", ["vmap", "loop"])
def test_a_derivative_of_the_meta_gradient_is_the_meta_hessian(tasks: Any):
    case = problem("mlp")
    theta, mean = with_lr(case, 0.3), mean_of(case, tasks)
    one = torch.ones((), dtype=torch.float64)

    def lr_slope(scale: Tensor) -> Tensor:
        return mean(scaled(theta, scale))[1]["lr"]

    step = 1e-5
    expected = (lr_slope(one + step) - lr_slope(one - step)) / (2 * step)
    assert distance(grad(lr_slope)(one), expected) < 1e-7
    assert distance(jvp(lr_slope, (one,), (one,))[1], expected) < 1e-7


def test_vmap_over_starts():
    case = problem("mlp")
    theta, mean = with_lr(case, 0.3), mean_of(case, "vmap")
    scales = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    batched = vmap(lambda s: mean(scaled(theta, s)))(scales)
    rows = [mean(scaled(theta, s)) for s in scales]
    assert distance(batched, tree.map(lambda *r: torch.stack(r), *rows)) < 1e-12


# Purity and memory ---------------------------------------------------------------------


@pytest.mark.parametrize("tasks", ["vmap", "loop"])
def test_nothing_that_is_given_changes(tasks: Any):
    case = problem("conv, batch norm")
    theta = with_lr(case, 0.3)
    given = tree.leaves((theta, case.tasks))
    before = [(x.clone(), x._version) for x in given]
    fo.meta.value_and_grad(maml(case.loss, fo.sgd()), tasks=tasks)(theta, case.tasks)
    for x, (value, version) in zip(given, before):
        assert torch.equal(x, value) and x._version == version and x.grad is None


@pytest.mark.parametrize("tasks", ["vmap", "loop"])
def test_a_module_s_own_parameters_under_no_grad_keep_no_graph(tasks: Any):
    case = problem("mlp")
    expected = mean_of(case, tasks)(with_lr(case, 0.3))
    theta = tree.map(lambda p: p.clone().requires_grad_(), with_lr(case, 0.3))
    with torch.no_grad():
        found = mean_of(case, tasks)(theta)
    assert not any(x.requires_grad for x in tree.leaves(found))
    assert distance(found, expected) < 1e-12


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("tasks", ["vmap", pytest.param("loop", marks=pytest.mark.slow)])
def test_meta_training_keeps_no_tensor_alive(tasks: Any):
    case = problem("mlp")
    theta, outer = with_lr(case, 0.3), fo.adam(lr=0.01)
    state, mean, counts, losses = outer.init(theta), mean_of(case, tasks), [], []

    def alive() -> int:
        gc.collect()
        return sum(issubclass(type(x), Tensor) for x in gc.get_objects())

    for i in range(100):
        loss, grads = mean(theta)
        theta, state = outer.update(grads, state, theta)
        losses.append(float(loss))
        if i % 20 == 19:
            counts.append(alive())
    assert len(set(counts)) == 1 and counts[0] > 10
    assert losses[-1] < 0.8 * losses[0]  # and it does learn


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_thousand_meta_steps_take_no_more_memory():
    """Nor what Python does not see: a graph that is held, and what it holds."""

    def loss(p: Any, x: Tensor) -> Tensor:
        return ((torch.tanh(x @ p["w"]) @ p["v"] - 1) ** 2).mean()

    def task_loss(theta: Any, x: Tensor) -> Tensor:
        hyper = {"lr": theta["lr"]}
        run = fo.unroll(fo.adam(), loss, theta["init"], x, steps=2, hyper=hyper)
        return loss(run.params, x)

    def used() -> tuple[int, int]:
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        tensors = sum(issubclass(type(x), Tensor) for x in gc.get_objects())
        return pages * os.sysconf("SC_PAGE_SIZE"), tensors

    init = {"w": torch.randn(64, 256) / 8, "v": torch.randn(256) / 16}
    theta, tasks = {"init": init, "lr": torch.tensor(0.01)}, torch.randn(2, 4, 64)
    outer, mean = fo.adam(lr=1e-3), fo.meta.value_and_grad(task_loss, tasks="vmap")
    state, before = outer.init(theta), (0, 0)
    for i in range(1000):
        _, grads = mean(theta, tasks)
        theta, state = outer.update(grads, state, theta)
        if i == 99:
            before = used()
    after = used()
    # One matrix for each of 900 meta-steps would be 59 MB.
    assert after[0] - before[0] < 20e6 and after[1] == before[1]
