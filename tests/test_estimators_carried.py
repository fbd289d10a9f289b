"""Estimators where the inner loss has buffers and draws random numbers."""

import gc
import io
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import accumulate
from operator import itemgetter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, vmap

import funcopt as fo
from funcopt import tree
from funcopt.inner.rng_state import RngState
from funcopt.meta import smoothness

STEPS = 5


def random(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def f64(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def hidden(p: Any, x: Tensor) -> Tensor:
    return torch.tanh(x @ p["in"])


def inner(p: Any, batch: Any, meta: Any, *, buffers: Any) -> Tensor:
    """Dropout, and a running mean that the loss reads, with a graph."""
    x, y = batch
    h = hidden(p, x)
    buffers["mean"].mul_(0.7).add_(0.3 * h.mean(0))
    buffers["count"] += 1
    error = (F.dropout(h - buffers["mean"], 0.3) @ p["out"] - y) ** 2
    return (meta["weights"] * error).mean()


def outer(p: Any, batch: Any, meta: Any, *, buffers: Any) -> Tensor:
    x, y = batch
    value = (((hidden(p, x) - buffers["mean"]) @ p["out"] - y) ** 2).mean()
    buffers["mean"].zero_()  # what it writes is nobody's
    return value


PARAMS = {"in": random(3, 4, seed=1), "out": random(4, seed=2)}
BUFFERS = {"mean": random(4, seed=3), "count": torch.tensor(0), "gap": None}
BATCHES = random(STEPS, 6, 3, seed=4), random(STEPS, 6, seed=5)
VALID = random(7, 3, seed=6), random(7, seed=7)
ETA = {
    "init": PARAMS,
    "hyper": {"lr": f64(0.3)},
    "meta": {"weights": random(6, seed=8).abs()},
}
HYPER = {"hyper": ETA["hyper"], "meta": ETA["meta"]}


def problem(**more: Any) -> fo.meta.Problem:
    given = {"batches": BATCHES, "outer_batch": VALID, "buffers": BUFFERS}
    plain = fo.meta.Problem(fo.sgd(momentum=0.5), inner, outer, STEPS, PARAMS, **given)
    return replace(plain, **more)


def at_seed(call: Callable[..., Any], *given: Any, **more: Any) -> Any:
    torch.manual_seed(0)
    return call(*given, **more)


def dropping(p: Any, batch: Any, meta: Any, *, buffers: Any) -> Tensor:
    x, y = batch
    return (((F.dropout(hidden(p, x), 0.4) - buffers["mean"]) @ p["out"] - y) ** 2).mean()


def by_hand(
    objective: str, leaves: list[Tensor], structure: Any, judge: Any = outer
) -> Tensor:
    """The training written out, for autograd."""
    eta = tree.unflatten(structure, leaves)
    p, velocity = eta["init"], dict.fromkeys(PARAMS, 0.0)
    buffers = {name: BUFFERS[name].clone() for name in ("mean", "count")}
    values = []
    for k in range(STEPS):
        buffers = tree.map(torch.clone, buffers)
        loss = inner(
            p, tree.map(lambda x, k=k: x[k], BATCHES), eta["meta"], buffers=buffers
        )
        slopes = torch.autograd.grad(loss, list(p.values()), create_graph=True)
        velocity = {n: 0.5 * v + g for (n, v), g in zip(velocity.items(), slopes)}
        p = {n: x - eta["hyper"]["lr"] * velocity[n] for n, x in p.items()}
        copies, ahead = tree.map(torch.clone, buffers), torch.get_rng_state()
        if judge is None:
            batch = tree.map(lambda x, k=k: x[min(k + 1, STEPS - 1)], BATCHES)
            values.append(inner(p, batch, eta["meta"], buffers=copies))
            if k + 1 < STEPS:  # the next step's loss, and so its numbers
                torch.set_rng_state(ahead)
        else:
            values.append(judge(p, VALID, eta["meta"], buffers=copies))
    total = torch.stack(values[-1:] if objective == "last" else values).sum()
    return total / STEPS if objective == "mean" else total


def close(found: Any, expected: Any, tolerance: float = 1e-12) -> None:
    pairs = list(zip(tree.leaves(found), tree.leaves(expected), strict=True))
    for x, y in pairs:
        assert y.abs().max() > 1e-8, "a zero says nothing"
        assert (x - y).abs().max() <= tolerance * y.abs().max()


WHOLE: dict[str, Callable[..., fo.meta.Estimate]] = {
    "reverse": fo.meta.reverse,
    "reverse, step": partial(fo.meta.reverse, remat="step"),
    "reverse, sqrt": partial(fo.meta.reverse, remat="sqrt"),
    "mixed": fo.meta.mixed,
    "mixed, sqrt": partial(fo.meta.mixed, remat="sqrt"),
    "mixed, twos": partial(fo.meta.mixed, remat=2),
    "forward": fo.meta.forward,
    "truncated": partial(fo.meta.truncated, window=STEPS),
    "truncated, mixed": partial(fo.meta.truncated, window=STEPS, grad_mode="mixed"),
}


QUICK = {("mixed, sqrt", "mean"), ("forward", "last"), ("reverse", "sum")}
CASES = [
    pytest.param(name, o, marks=() if (name, o) in QUICK else pytest.mark.slow)
    for name in WHOLE
    for o in ("last", "mean", "sum")
]


@pytest.mark.parametrize("name, objective", CASES)
def test_exact_estimators_are_the_training_written_out(name: str, objective: Any):
    leaves, structure = tree.flatten(ETA)
    leaves = [x.clone().requires_grad_() for x in leaves]
    value = at_seed(by_hand, objective, leaves, structure)
    slopes = torch.autograd.grad(value, leaves)
    found = at_seed(WHOLE[name], problem(objective=objective), ETA)
    close(found.value, value)
    close(found.grads, tree.unflatten(structure, slopes))
    assert found.carry["buffers"]["count"] == STEPS


@pytest.mark.parametrize("judge", [dropping, None], ids=["drawing", "none"])
@pytest.mark.parametrize("name", WHOLE)
def test_outer_losses_of_all_steps_draw_the_same_in_every_way(name: str, judge: Any):
    leaves, structure = tree.flatten(ETA)
    leaves = [x.clone().requires_grad_() for x in leaves]
    value = at_seed(by_hand, "mean", leaves, structure, judge)
    after = torch.rand(3)
    slopes = torch.autograd.grad(value, leaves)
    found = at_seed(WHOLE[name], problem(objective="mean", outer_loss=judge), ETA)
    assert torch.equal(torch.rand(3), after)
    close(found.value, value)
    close(found.grads, tree.unflatten(structure, slopes))


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["mean", "sum"])
@pytest.mark.parametrize("name", [n for n in WHOLE if n not in ("reverse", "forward")])
@pytest.mark.parametrize("case", ["Adam", "no outer loss", "a window", "vmap"])
def test_outer_losses_of_all_steps_are_those_of_plain_reverse(
    case: str, name: str, objective: Any
):
    """What `remat` and mixed mode make of them, under every kind of problem."""

    def loss(p: Any, batch: Any, meta: Any = None) -> Tensor:
        x, y = batch
        error = (hidden(p, x) @ p["out"] - y) ** 2
        return (error if meta is None else meta["weights"] * error).mean()

    judge = None if case == "no outer loss" else lambda p, b, meta: loss(p, b)
    given = fo.meta.Problem(
        fo.adam() if case == "Adam" else fo.sgd(),
        loss,
        judge,
        STEPS,
        PARAMS,
        batches=BATCHES,
        outer_batch=VALID,
        objective=objective,
    )
    eta, carry = ETA, None
    if case == "a window":
        eta, carry = HYPER, fo.meta.advance(given, ETA, 2)
    if case == "vmap":
        tasks = tree.map(lambda x: torch.stack([x, 1.1 * x]), eta)
        found, expected = (
            vmap(lambda eta, call=call: call(given, eta).grads)(tasks)
            for call in (WHOLE[name], fo.meta.reverse)
        )
    else:
        estimate, plain = (
            f(given, eta, carry=carry) for f in (WHOLE[name], fo.meta.reverse)
        )
        close(estimate.value, plain.value)
        close(estimate.diagnostics["losses"], plain.diagnostics["losses"])
        found, expected = estimate.grads, plain.grads
    close(found, expected)


def peak_bytes(call: Callable[[], Any]) -> int:
    """The most bytes that torch's allocator has given out at one time.

    Of this call: what cycles of earlier ones hold is freed before, or it would be counted
    as given back in this one; whenever the collector comes.
    """
    cpu = torch.profiler.ProfilerActivity.CPU
    gc.collect()
    gc.disable()
    try:
        with torch.profiler.profile(activities=[cpu], profile_memory=True) as record:
            call()
    finally:
        gc.enable()
    events: Any = record.profiler.kineto_results.events()  # pyright: ignore
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    return max(accumulate(bytes for _, bytes in sorted(changes, key=itemgetter(0))))


@pytest.mark.slow
def test_with_remat_the_outer_losses_keep_no_graph():
    """Of K steps plain reverse keeps K graphs of both losses, sqrt √K carries."""
    width, batch = 24, random(64, 24, seed=1)
    params = [random(width, width, seed=i) for i in range(3)]
    carry = 3 * 3 * 8 * width**2  # with Adam's two slots

    def loss(p: Any, x: Tensor, meta: Tensor) -> Tensor:
        for w in p:
            x = torch.tanh(x @ w)
        return meta * x.square().mean()

    def peak(steps: int, **how: Any) -> int:
        given = fo.meta.Problem(
            fo.adam(),
            loss,
            loss,
            steps,
            params,
            batch=batch,
            outer_batch=batch,
            objective="mean",
        )
        call = fo.meta.mixed if how.pop("mixed", False) else fo.meta.reverse
        return peak_bytes(lambda: call(given, {"meta": f64(1.0)}, **how))

    few, lean, plain = (
        peak(4, mixed=True, remat="sqrt"),
        peak(16, mixed=True, remat="sqrt"),
        peak(16),
    )
    assert lean <= few + 2.5 * 2 * carry  # of a segment the carries are made again, too
    assert lean <= 18 * carry, (few, lean, plain)  # parameters and slots, 18 times
    assert lean <= plain / 5, (few, lean, plain)


# Windows, swarms, one step --------------------------------------------------------------


def test_windows_carry_buffers_on_bit_for_bit():
    whole = at_seed(fo.meta.advance, problem(), HYPER, STEPS)
    torch.manual_seed(0)
    carry = None
    for window in (2, 1, 9):
        estimate = fo.meta.truncated(problem(), HYPER, carry=carry, window=window)
        saved = io.BytesIO()
        torch.save(estimate.carry, saved)
        saved.seek(0)
        carry = torch.load(saved, weights_only=True)
    assert carry is not None and carry["buffers"]["count"] == STEPS
    assert torch.equal(carry["buffers"]["mean"], whole["buffers"]["mean"])
    assert torch.equal(carry["params"]["in"], whole["params"]["in"])
    assert BUFFERS["count"] == 0  # one's own do not change


@pytest.mark.parametrize(
    "name, chunk_size",
    [
        pytest.param("es", None),
        *(
            pytest.param(name, size, marks=pytest.mark.slow)
            for name in ("es", "pes", "es_single")
            for size in (None, 3)
        ),
    ],
)
def test_a_swarm_draws_the_same_in_each_training(name: str, chunk_size: int | None):
    """Each particle's value is that of a training at its eta, on the same numbers."""
    call: Any = getattr(fo.meta, name)
    how: dict[str, Any] = {"sigma": 0.05, "particles": 2, "chunk_size": chunk_size}
    how |= {} if name == "es" else {"window": STEPS}
    generator = torch.Generator().manual_seed(3)
    eta = {"hyper": {"lr": f64(0.3)}}

    def loss(p: Any, batch: Any, **more: Any) -> Tensor:
        return inner(p, batch, {"weights": 1.0}, **more)

    def judge(p: Any, batch: Any, **more: Any) -> Tensor:
        return outer(p, batch, None, **more)

    given = replace(problem(), inner_loss=loss, outer_loss=judge)
    found = at_seed(call, given, eta, generator=generator, **how)
    generator.manual_seed(3)
    noise = 0.05 * torch.randn(2, generator=generator, dtype=torch.float64)
    for i, sign in ((0, 1), (1, 1), (0, -1), (1, -1)):
        moved = {"hyper": {"lr": 0.3 + sign * noise[i]}}
        expected = at_seed(fo.meta.reverse, given, moved).value
        close(found.diagnostics["values"][i, (1 - sign) // 2], expected, 1e-10)
    assert found.carry["buffers"]["mean"].shape == (4, 4)


@pytest.mark.parametrize("form", ["both", "hyper", "no outer loss"])
def test_hypergradient_descent_is_a_window_of_one_step(form: str):
    given, carry, eta = problem(), None, HYPER
    if form != "both":
        eta, plain = {"hyper": ETA["hyper"]}, {"weights": torch.ones(6).double()}
        given = replace(
            given,
            inner_loss=lambda p, b, **more: inner(p, b, plain, **more),
            outer_loss=lambda p, b, **more: outer(p, b, None, **more),
        )
    if form == "no outer loss":  # buffers go on by the step's loss, not by its
        given = replace(given, outer_loss=None)
    for _ in range(3):
        one, other = (
            at_seed(call, given, eta, carry=carry)
            for call in (
                fo.meta.hypergradient_descent,
                partial(fo.meta.truncated, window=1),
            )
        )
        close(one.grads, other.grads)
        close(one.carry["buffers"]["mean"], other.carry["buffers"]["mean"])
        carry = one.carry


def test_metasmoothness_draws_the_same_in_each_training():
    found = at_seed(
        fo.meta.metasmoothness, problem(), HYPER, tree.map(torch.ones_like, HYPER), 1e-4
    )
    assert found > 0.999


def test_metasmoothness_sets_back_the_generators_of_wherever_the_training_draws(
    monkeypatch: pytest.MonkeyPatch,
):
    """Eta may be on the CPU, and parameters on an accelerator."""
    kept: list[Any] = []

    def noted(tensors: Any) -> RngState:
        kept.extend(tensors)
        return RngState(kept)

    monkeypatch.setattr(smoothness, "RngState", noted)
    along = tree.map(torch.ones_like, HYPER)
    fo.meta.metasmoothness(problem(), HYPER, along, 1e-4)
    assert any(x is PARAMS["in"] for x in kept)


# Where the training ends ----------------------------------------------------------------


def ridge(p: Tensor, batch: Any, meta: Any, *, buffers: Any) -> Tensor:
    buffers.mul_(0.5).add_(0.5 * p)
    return 0.5 * (p - 3.0) ** 2 + 0.5 * meta["l2"] * p**2


CONVERGED = fo.meta.Problem(
    fo.sgd(lr=0.5),
    ridge,
    lambda p, batch, meta, *, buffers: (p + 2 * buffers) ** 2,
    steps=200,
    params=f64(0.0),
    buffers=f64(0.0),
)
L2 = {"meta": {"l2": f64(0.5)}}


def test_weight_update_implicit_sees_through_buffers():
    """The minimum is 3 / (1 + λ), and so is where the buffer comes to."""
    found = fo.meta.weight_update_implicit(CONVERGED, L2, iterations=100)
    close(found.grads["meta"]["l2"], f64(2 * 9 * 2 * -3 / 1.5**2), 1e-10)
    close(fo.meta.reverse(CONVERGED, L2).grads, found.grads, 1e-10)


def test_implicit_refuses_buffers_that_follow_the_parameters():
    words = "implicit cannot see what parameters do through the buffers"
    with pytest.raises(fo.GradientLostError, match=words):
        fo.meta.implicit(CONVERGED, L2)
    unread = replace(CONVERGED, outer_loss=lambda p, b, meta, *, buffers: 9 * p**2)
    found = fo.meta.implicit(unread, L2).grads["meta"]["l2"]
    close(found, f64(18 * 2 * -3 / 1.5**2), 1e-10)

    def reading(p: Tensor, batch: Any, meta: Any, *, buffers: Any) -> Tensor:
        return ridge(p, batch, meta, buffers=buffers) + 0.1 * p * buffers

    with pytest.raises(fo.GradientLostError, match=words):
        fo.meta.implicit(replace(unread, inner_loss=reading), L2)

    def constant(p: Tensor, batch: Any, meta: Any, *, buffers: Any) -> Tensor:
        ridge(fo.detach(p), batch, meta, buffers=buffers)
        return ridge(p, batch, meta, buffers=buffers.clone())

    said = replace(CONVERGED, inner_loss=constant)  # V of p alone: 2 (p + 2 b) p'
    found = fo.meta.implicit(said, L2).grads["meta"]["l2"]
    close(found, f64(2 * 6 * -3 / 1.5**2), 1e-10)


def normed(p: Any, batch: Any, *, buffers: Any = None, training: bool = True) -> Tensor:
    x, y = batch
    running = (None, None) if buffers is None else (buffers["mean"], buffers["var"])
    h = F.batch_norm(x @ p["in"], *running, training=training, momentum=0.3)
    return ((torch.tanh(h) @ p["out"] - y) ** 2).mean()


STATISTICS = {"mean": torch.zeros(4).double(), "var": torch.ones(4).double()}


@pytest.mark.parametrize("outside", ["alone", "vmap(grad)"])
def test_imaml_carries_batch_norm(outside: str):
    """Of training mode buffers change nothing but themselves."""
    task = (BATCHES[0][0], BATCHES[1][0]), VALID

    def slopes(**buffers: Any) -> Any:
        family = fo.meta.imaml(normed, fo.sgd(lr=0.1), steps=20, **buffers)
        if outside == "alone":
            return grad(lambda p: family.task_loss(p, task))(PARAMS)
        tasks = tree.map(lambda x: torch.stack([x, 1.1 * x]), task)
        return fo.meta.value_and_grad(family.task_loss, tasks="vmap")(PARAMS, tasks)[1]

    close(slopes(buffers=STATISTICS), slopes(), 1e-10)
    family = fo.meta.imaml(normed, fo.sgd(lr=0.1), steps=2, buffers=STATISTICS)
    run = family.adapt(PARAMS, task[0])

    def noted(p: Any, batch: Any, *, buffers: Any) -> Any:
        seen = buffers["mean"].clone()
        return normed(p, batch, buffers=buffers), seen

    kind = fo.meta.imaml(noted, fo.sgd(lr=0.1), steps=2, buffers=STATISTICS, has_aux=True)
    close(kind.task_loss(PARAMS, task)[1], run.buffers["mean"])
    assert (run.buffers["mean"] - STATISTICS["mean"]).abs().min() > 1e-3
    assert STATISTICS["mean"].abs().max() == 0


def test_implicit_takes_running_statistics_as_the_end_left_them():
    """In evaluation mode they are constants, as torch's norm layers have them."""
    data = BATCHES[0][0], BATCHES[1][0]

    def weighed(p: Any, batch: Any, meta: Any, **buffers: Any) -> Tensor:
        penalty = meta["l2"] * sum(x.square().sum() for x in p.values())
        return normed(p, batch, **buffers) + penalty

    def judge(p: Any, b: Any, meta: Any, **buffers: Any) -> Tensor:
        return normed(p, b, training=False, **buffers)

    given = fo.meta.Problem(
        fo.sgd(lr=0.1),
        weighed,
        judge,
        4,
        PARAMS,
        batch=data,
        outer_batch=VALID,
        buffers=STATISTICS,
    )
    eta = {"meta": {"l2": f64(0.1)}}
    found = fo.meta.implicit(given, eta)
    end = partial(judge, buffers=found.carry["buffers"])
    constant = replace(given, outer_loss=end, buffers=None)
    close(found.grads, fo.meta.implicit(constant, eta).grads)
    assert fo.meta.weight_update_implicit(given, eta).without_influence() == []
    close(fo.meta.mixed(given, eta, remat=2).grads, fo.meta.reverse(given, eta).grads)
    close(fo.meta.forward(given, eta).grads, fo.meta.reverse(given, eta).grads)
