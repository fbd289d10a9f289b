"""The inner loop: equal to unrolling by hand, to closed forms, and cut where asked."""

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from operator import itemgetter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from influence import THETA, TRUNCATED, influence, influence_loss, stationary
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.func import functional_call, grad, jacfwd, jvp, vmap

import funcopt as fo
from funcopt import select, tree

STEPS = 3


def random(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def assert_close(found: Any, expected: Any, tolerance: float = 1e-12) -> None:
    """Relative to each leaf's largest entry, and no leaf may be trivially zero."""
    a, b = tree.leaves(found), tree.leaves(expected)
    assert len(a) == len(b) > 0
    for x, y in zip(a, b):
        if y is None:
            assert x is None
            continue
        assert x.shape == y.shape and x.dtype == y.dtype
        assert y.abs().max() > 1e-9, "a zero says nothing"
        assert (x - y).abs().max() <= tolerance * y.abs().max()


def gradient(outer: Callable[[Any], Tensor], at: Any, how: str = "autograd") -> list:
    """d outer / d every floating-point leaf of ``at``, by autograd or by torch.func."""
    leaves, structure = tree.flatten(at)
    floats = [i for i, x in enumerate(leaves) if x is not None and x.is_floating_point()]

    def of_floats(values: list[Tensor]) -> Tensor:
        filled = list(leaves)
        for i, value in zip(floats, values):
            filled[i] = value
        return outer(tree.unflatten(structure, filled))

    values = [leaves[i] for i in floats]
    if how == "func":
        return grad(of_floats)(values)
    values = [value.detach().requires_grad_() for value in values]
    # what is cut off gets a zero, as torch.func gives it
    return list(torch.autograd.grad(of_floats(values), values, materialize_grads=True))


# A small regression, and the loop over it written by hand ------------------------------


def network(p: Any, x: Tensor) -> Tensor:
    hidden = torch.tanh(x @ p["hidden"]["weight"] + p["hidden"]["bias"])
    return hidden @ p["out"]["weight"] + p["out"]["bias"]


def support_loss(p: Any, batch: Any, meta: Any) -> Tensor:
    x, y = batch
    error = (network(p, x) - y) ** 2
    decay = sum(w.square().sum() for w in tree.leaves(p))
    return (meta["weights"] * error).mean() + meta["decay"] * decay


QUERY = random(6, 2, seed=90), random(6, 1, seed=91)


def score(params: Any, losses: Tensor) -> Tensor:
    x, y = QUERY
    return ((network(params, x) - y) ** 2).mean() + losses.sum() / 7


def parameters() -> dict[str, Any]:
    return {
        "hidden": {"weight": random(2, 4, seed=1), "bias": random(4, seed=2)},
        "out": {"weight": random(4, 1, seed=3), "bias": random(1, seed=4)},
    }


def sgd_by_hand(g, p, step, lr, weight_decay):
    return (p - lr * (g + weight_decay * p),)


def momentum_by_hand(g, p, buf, step, lr, weight_decay, momentum, dampening):
    g = g + weight_decay * p
    buf = momentum * buf + ((1 - dampening) if step > 1 else 1) * g
    return p - lr * buf, buf


def adam_by_hand(g, p, m, v, step, lr, betas, eps, weight_decay):
    g = g + weight_decay * p
    m = betas[0] * m + (1 - betas[0]) * g
    v = betas[1] * v + (1 - betas[1]) * g**2
    m_hat, v_hat = m / (1 - betas[0] ** step), v / (1 - betas[1] ** step)
    return p - lr * m_hat / (v_hat.sqrt() + eps), m, v


def unroll_by_hand(
    rule: Callable[..., tuple],
    loss_fn: Callable[..., Tensor],
    params: Any,
    data: Sequence[Any],
    slots: Sequence[list[Tensor]] = (),
    start: int = 0,
    hyper_at: Callable[[int, int], dict[str, Any]] = lambda k, i: {},
    first_order: bool = False,
) -> tuple[Any, Tensor]:
    """What `higher` does: autograd.grad(create_graph=True) and the update in a loop.

    ``data[k]`` is the tuple of the loss's further arguments, ``hyper_at(k, i)`` gives
    leaf i's hyperparameters, in step k.
    """
    p, structure = tree.flatten(params)
    slots, losses = [list(slot) for slot in slots], []
    for k, arguments in enumerate(data):
        with torch.enable_grad():
            at = [x if x.requires_grad else x.detach().requires_grad_() for x in p]
            loss = loss_fn(tree.unflatten(structure, at), *arguments)
            grads = torch.autograd.grad(loss, at, create_graph=not first_order)
        losses.append(loss.detach() if first_order else loss)
        rows = [
            rule(g, at[i], *(s[i] for s in slots), step=start + k + 1, **hyper_at(k, i))
            for i, g in enumerate(grads)
        ]
        p, *slots = (list(column) for column in zip(*rows))
    return tree.unflatten(structure, p), torch.stack(losses)


def scalars(**values: float) -> dict[str, Tensor]:
    return {k: torch.tensor(v, dtype=torch.float64) for k, v in values.items()}


BETAS = tuple(torch.tensor(b, dtype=torch.float64) for b in (0.8, 0.9))
INNER = {
    "sgd": (fo.sgd(), sgd_by_hand, scalars(lr=0.1, weight_decay=0.03)),
    "momentum": (
        fo.sgd(momentum=0.5),
        momentum_by_hand,
        scalars(lr=0.1, weight_decay=0.03, momentum=0.7, dampening=0.2),
    ),
    "adam": (
        fo.adam(),
        adam_by_hand,
        {**scalars(lr=0.1, eps=0.01, weight_decay=0.03), "betas": BETAS},
    ),
}


def everything(name: str) -> dict[str, Any]:
    """All that one inner loop depends on: the state is not fresh, no value is zero."""
    opt, _, hyper = INNER[name]
    params = parameters()
    state = opt.init(params)
    for n, slot in enumerate(sorted(state.keys() - {"step"})):
        filled = enumerate(tree.leaves(state[slot]))
        state[slot] = tree.unflatten(
            tree.flatten(params)[1],
            [random(*x.shape, seed=20 + 10 * n + i).abs() for i, x in filled],
        )
    state["step"] = state["step"] + 2
    return {
        "params": params,
        "state": state,
        "hyper": dict(hyper),
        "batch": (random(5, 2, seed=5), random(5, 1, seed=6)),
        "meta": {"weights": random(5, 1, seed=7).abs(), **scalars(decay=0.05)},
    }


def by_library(name: str, **how: Any) -> Callable[[Any], Tensor]:
    def outer(a: dict[str, Any]) -> Tensor:
        run = fo.unroll(
            INNER[name][0],
            support_loss,
            a["params"],
            a["batch"],
            steps=STEPS,
            state=a["state"],
            hyper=a["hyper"],
            meta=a["meta"],
            **how,
        )
        return score(run.params, run.losses)

    return outer


def by_hand(name: str, first_order: bool = False) -> Callable[[Any], Tensor]:
    def outer(a: dict[str, Any]) -> Tensor:
        names = [slot for slot in INNER[name][0].init(a["params"]) if slot != "step"]
        params, losses = unroll_by_hand(
            INNER[name][1],
            support_loss,
            a["params"],
            [(a["batch"], a["meta"])] * STEPS,
            [tree.leaves(a["state"][slot]) for slot in names],
            start=2,
            hyper_at=lambda k, i: a["hyper"],
            first_order=first_order,
        )
        return score(params, losses)

    return outer


@pytest.mark.parametrize("how", ["autograd", "func"])
@pytest.mark.parametrize("name", INNER)
def test_reverse_is_unrolling_by_hand_in_everything(name: str, how: str):
    at = everything(name)
    assert_close(by_library(name)(at), by_hand(name)(at))
    expected = gradient(by_hand(name), at)
    slots = len(at["state"]) - 1
    count = 4 * (1 + slots) + len(tree.leaves(at["hyper"])) + 2 + 2
    assert len(expected) == count  # params, state, hyper, batch, meta
    assert_close(gradient(by_library(name), at, how), expected)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Dynamo does not know:UserWarning")
@pytest.mark.parametrize("hyper", [{}, {"lr": torch.tensor(0.1)}], ids=["none", "lr"])
def test_dynamo_compiles_an_unroll_as_one_graph(hyper: Any):
    """Its gradient, too; of wrappers whose updates define functions."""
    opt = fo.skip_nonfinite(fo.chain(fo.clip_by_global_norm(1.0), fo.adam(lr=0.1)))
    start = {"w": torch.linspace(-1, 1, 4), "b": torch.tensor(0.5)}

    def loss(p: Any, batch: Tensor) -> Tensor:
        return ((p["w"] * batch).sum() + p["b"]) ** 2

    def end(p: Any, batch: Tensor, hyper: Any) -> Tensor:
        return fo.unroll(opt, loss, p, batch, steps=2, hyper=hyper).losses.sum()

    given = start, torch.arange(4.0), hyper
    torch._dynamo.reset()
    compiled = torch.compile(grad(end), fullgraph=True, backend="eager")
    assert_close(compiled(*given), grad(end)(*given))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Dynamo does not know:UserWarning")
def test_dynamo_compiles_an_unroll_with_buffers():
    opt, net = fo.sgd(lr=0.1), batch_norm_net()
    params, buffers = split(net)

    def end(p: Any, x: Tensor, y: Tensor) -> tuple[Any, Any]:
        run = fo.unroll(opt, norm_loss(net), p, (x, y), steps=2, buffers=buffers)
        return run.losses.sum(), (run.params, run.buffers)

    given = params, random(3, 8, 3, seed=1), random(3, 8, 1, seed=2)
    slope = vmap(grad(end, argnums=1, has_aux=True), in_dims=(None, 0, 0))
    torch._dynamo.reset()
    compiled = torch.compile(slope, fullgraph=True, backend="eager")
    assert_close(compiled(*given), slope(*given))


@pytest.mark.parametrize("name", INNER)
def test_forward_mode_is_reverse_mode(name: str):
    at = everything(name)

    def of_lr(lr: Tensor) -> Tensor:
        return by_library(name)({**at, "hyper": {**at["hyper"], "lr": lr}})

    lr = at["hyper"]["lr"]
    assert_close(jacfwd(of_lr)(lr), grad(of_lr)(lr))


@pytest.mark.parametrize("how", ["autograd", "func"])
@pytest.mark.parametrize("name", INNER)
def test_first_order_is_fomaml_by_hand(name: str, how: str):
    at = everything(name)
    constant = {key: at.pop(key) for key in ("batch", "meta")}
    library, hand = by_library(name, grad_mode="first_order"), by_hand(name, True)
    assert_close(library({**at, **constant}), hand({**at, **constant}))
    found = gradient(lambda a: library({**a, **constant}), at, how)
    assert_close(found, gradient(lambda a: hand({**a, **constant}), at))
    exact = gradient(lambda a: by_library(name)({**a, **constant}), at)
    assert any((a - b).abs().max() > 1e-3 for a, b in zip(found, exact))


@pytest.mark.parametrize("name", INNER)
def test_vmap_over_tasks_is_a_loop(name: str):
    at = everything(name)
    xs, ys = random(4, 5, 2, seed=40), random(4, 5, 1, seed=41)

    def one(x: Tensor, y: Tensor) -> Tensor:
        return by_library(name)({**at, "batch": (x, y)})

    assert_close(vmap(one)(xs, ys), torch.stack([one(x, y) for x, y in zip(xs, ys)]))


# Values per step -----------------------------------------------------------------------


def rates(*shape: int, seed: int = 50) -> Tensor:
    return 0.05 + 0.1 * random(*shape, seed=seed).abs()


PER_STEP_RATES = {
    "scalar": rates(STEPS),
    "prefix": {"hidden": rates(STEPS, seed=51), "out": rates(STEPS, seed=52)},
    "leaf": {
        "hidden": {"weight": rates(STEPS, seed=53), "bias": rates(STEPS, seed=54)},
        "out": {"weight": rates(STEPS, seed=55), "bias": rates(STEPS, seed=56)},
    },
    "leaf-shaped": {
        "hidden": {"weight": rates(STEPS, 2, 4), "bias": rates(STEPS, 4)},
        "out": {"weight": rates(STEPS, 4, 1), "bias": rates(STEPS, 1)},
    },
    "by_name": fo.by_name({"*.bias": rates(STEPS, seed=57)}, default=rates(STEPS)),
}


def spread(values: Any) -> list[Tensor]:
    """Each leaf's values, in the order of the leaves: bias before weight."""
    if isinstance(values, select.ByName):
        return [*values.patterns.values(), values.default] * 2
    return [
        branch[leaf] if isinstance(branch, dict) else branch
        for name in ("hidden", "out")
        for branch in [values[name] if isinstance(values, dict) else values]
        for leaf in ("bias", "weight")
    ]


@pytest.mark.parametrize("how", ["autograd", "func"])
@pytest.mark.parametrize("form", PER_STEP_RATES)
def test_per_step_rates_of_every_form(form: str, how: str):
    at = everything("sgd")
    data = [(at["batch"], at["meta"])] * STEPS

    def library(lr: Any) -> Tensor:
        run = fo.unroll(
            fo.sgd(weight_decay=0.03),
            support_loss,
            at["params"],
            at["batch"],
            steps=STEPS,
            meta=at["meta"],
            hyper={"lr": fo.per_step(lr)},
        )
        return score(run.params, run.losses)

    def hand(lr: Any) -> Tensor:
        each = spread(lr)
        return score(
            *unroll_by_hand(
                sgd_by_hand,
                support_loss,
                at["params"],
                data,
                hyper_at=lambda k, i: {"lr": each[i][k], "weight_decay": 0.03},
            )
        )

    lr = PER_STEP_RATES[form]
    assert_close(library(lr), hand(lr))
    assert_close(gradient(library, lr, how), gradient(hand, lr))


@pytest.mark.parametrize("how", [{}, {"remat": "sqrt"}, {"grad_mode": "mixed"}], ids=str)
def test_what_a_selector_holds_is_learned(how: Any):
    """Marked or not: its tensors are as those of a tree, of a step made again, too."""
    at = everything("sgd")
    given = (at["params"], at["batch"])
    marked = rates(STEPS)

    def outer(values: Any, *, by_name: bool) -> Tensor:
        lr, decay = fo.per_step(values["lr"]), values["decay"]
        names, more = {"out": lr, "hidden": marked[0]}, {"out": 0.0, "hidden": decay}
        if by_name:
            names = fo.by_name({"out.*": lr}, default=marked[0])
            more = fo.by_name({"out.*": 0.0}, default=decay)
        hyper = {"lr": names, "weight_decay": more}
        run = fo.unroll(
            fo.sgd(),
            support_loss,
            *given,
            steps=STEPS,
            meta=at["meta"],
            hyper=hyper,
            **how,
        )
        return score(run.params, run.losses)

    values = {"lr": rates(STEPS, seed=58), "decay": marked[1]}
    found, wanted = (grad(partial(outer, by_name=b))(values) for b in (True, False))
    assert tree.map(torch.equal, found, wanted) == {"lr": True, "decay": True}
    assert all(g.abs().min() > 0 for g in found.values())


@pytest.mark.parametrize(
    "how", [{}, {"remat": "step"}, {"grad_mode": "mixed"}, {"grad_mode": "first_order"}],
    ids=str,
)  # fmt: skip
def test_inference_mode_trains_as_no_grad_does(how: Any):
    """There autograd records nothing, and torch.func still does."""
    p, target, lr = random(3, seed=1), random(3, seed=2), torch.tensor(0.1).double()

    def run(lr: Tensor) -> Tensor:
        made = fo.unroll(
            fo.adam(), squared_distance, p, target, steps=3, hyper={"lr": lr}, **how
        )
        return made.losses.sum() + made.params.sum()

    with torch.no_grad():
        wanted = run(lr), grad(run)(lr)
    with torch.inference_mode():
        found = run(lr), grad(run)(lr)
        p = p.clone()
    assert_close(found, wanted)
    assert p.is_inference() and float(wanted[1]) != 0
    assert_close((run(lr), grad(run)(lr)), wanted)  # of what was made there


@pytest.mark.parametrize("how", [{}, {"remat": "step"}, {"grad_mode": "mixed"}], ids=str)
def test_of_shapes_alone(how: Any):
    p = torch.empty(3, device="meta", requires_grad=True)
    run = fo.unroll(fo.adam(), squared_distance, p, p.detach(), steps=3, **how)
    (slope,) = torch.autograd.grad(run.params.sum() + run.losses.sum(), p)
    assert slope.is_meta and slope.shape == p.shape


@pytest.mark.parametrize("how", [{}, {"remat": "step"}, {"grad_mode": "mixed"}], ids=str)
def test_of_fake_tensors(how: Any):
    """Whose generators are real, and nothing beside them."""
    with FakeTensorMode():
        p = torch.ones(3, requires_grad=True)
        run = fo.unroll(fo.adam(), squared_distance, p, p.detach(), steps=3, **how)
        (slope,) = torch.autograd.grad(run.params.sum() + run.losses.sum(), p)
    assert type(slope) is type(p.detach()) is FakeTensor and slope.shape == p.shape


@pytest.mark.slow
@pytest.mark.parametrize("opt", [fo.sgd(), fo.adamw(), fo.muon()], ids=lambda o: o.name)
def test_a_run_is_exported(opt: fo.Optimizer):
    class Adapting(nn.Module):
        def forward(self, p: Tensor, target: Tensor, lr: Tensor) -> Tensor:
            how: Any = {"steps": 2, "hyper": {"lr": lr}}
            return fo.unroll(opt, squared_distance, p, target, **how).params

    given = random(3, 2, seed=1), random(3, 2, seed=2), torch.tensor(0.1)
    others = random(3, 2, seed=3), random(3, 2, seed=4), torch.tensor(0.2)
    exported = torch.export.export(Adapting(), given).module()
    assert_close(exported(*others), Adapting()(*others))


def test_a_run_may_leave_every_transform():
    """torch.func takes no None: neither from vmap, nor as aux."""
    starts, targets = random(4, 3, seed=1), random(3, seed=2)

    def run(p: Tensor) -> fo.Unrolled:
        return fo.unroll(fo.adam(lr=0.1), squared_distance, p, targets, steps=2)

    def outer(p: Tensor) -> tuple[Tensor, fo.Unrolled]:
        made = run(p)
        return made.losses.sum(), made

    whole = vmap(run)(starts)
    assert isinstance(whole, fo.Unrolled) and whole.aux == whole.buffers == ()
    _, aside = torch.func.grad(outer, has_aux=True)(starts[1])
    assert torch.equal(aside.params, whole.params[1])
    again = fo.unroll(
        fo.adam(lr=0.1), squared_distance, aside.params, targets, steps=1,
        state=aside.state, buffers=aside.buffers,
    )  # fmt: skip
    assert not torch.equal(again.params, aside.params)


@pytest.mark.parametrize("form", ["both in one", "each its own", "one of the two"])
def test_per_step_betas(form: str):
    at = everything("adam")
    first, second = (0.5 + 0.1 * torch.arange(3.0, dtype=torch.float64), rates(STEPS))

    def library(betas: tuple[Tensor, Tensor]) -> Tensor:
        marked = {
            "both in one": fo.per_step(betas),
            "each its own": tuple(fo.per_step(b) for b in betas),
            "one of the two": (fo.per_step(betas[0]), betas[1][0]),
        }[form]
        return by_library("adam")({**at, "hyper": {**at["hyper"], "betas": marked}})

    def hand(betas: tuple[Tensor, Tensor]) -> Tensor:
        def hyper_at(k: int, i: int) -> dict[str, Any]:
            beta2 = betas[1][0 if form == "one of the two" else k]
            return {**at["hyper"], "betas": (betas[0][k], beta2)}

        slots = [tree.leaves(at["state"][s]) for s in ("exp_avg", "exp_avg_sq")]
        data = [(at["batch"], at["meta"])] * STEPS
        return score(
            *unroll_by_hand(
                adam_by_hand, support_loss, at["params"], data, slots, 2, hyper_at
            )
        )

    betas = (first, second)
    assert_close(gradient(library, betas), gradient(hand, betas))


# Batches, losses, aux ------------------------------------------------------------------


def plain_sgd(k: int, i: int) -> dict[str, float]:
    return {"lr": 0.1, "weight_decay": 0.0}


def squared_distance(p: Tensor, batch: Tensor) -> Tensor:
    return ((p - batch) ** 2).sum()


def test_batch_serves_every_step_and_batches_one_each():
    p, targets = random(3, seed=1), random(4, 3, seed=2)
    same = targets[:1].expand(4, 3)
    opt = fo.adam(lr=0.1)
    once = fo.unroll(opt, squared_distance, p, targets[0], steps=4)
    for steps in (None, 4):
        each = fo.unroll(opt, squared_distance, p, batches=same, steps=steps)
        assert torch.equal(once.params, each.params)
        assert torch.equal(once.losses, each.losses)

    def library(targets: Tensor) -> Tensor:
        run = fo.unroll(fo.sgd(lr=0.1), squared_distance, p, batches=targets)
        return (run.params**3).sum() + run.losses.sum()

    def hand(targets: Tensor) -> Tensor:
        data = [(target,) for target in targets]
        end, losses = unroll_by_hand(
            sgd_by_hand, squared_distance, p, data, hyper_at=plain_sgd
        )
        return (end**3).sum() + losses.sum()

    assert_close(gradient(library, targets), gradient(hand, targets))


def test_batches_are_a_tree_with_gaps():
    batches = {"y": random(2, 3, seed=1), "x": None, "n": torch.arange(2)}
    seen = []

    def loss(p: Tensor, batch: dict[str, Any]) -> Tensor:
        seen.append((batch["x"], int(batch["n"])))
        return squared_distance(p, batch["y"])

    fo.unroll(fo.sgd(), loss, random(3, seed=2), batches=batches)
    assert seen == [(None, 0), (None, 1)]


def test_aux_is_stacked_tree_by_tree():
    p, targets = random(3, seed=1), random(4, 3, seed=2)

    def loss(p: Tensor, target: Tensor) -> tuple[Tensor, dict[str, Any]]:
        error = p - target
        return (error**2).sum(), {"error": error, "gap": None, "more": [error.argmax()]}

    run = fo.unroll(fo.sgd(lr=0.1), loss, p, batches=targets, has_aux=True)
    plain = fo.unroll(fo.sgd(lr=0.1), squared_distance, p, batches=targets)
    assert torch.equal(run.params, plain.params) and plain.aux == ()
    assert torch.equal(run.losses, (run.aux["error"] ** 2).sum(1))
    assert run.losses.shape == (4,)  # each before its update: the first is the start's
    assert torch.equal(run.losses[0], squared_distance(p, targets[0]))
    assert torch.equal(run.aux["more"][0], run.aux["error"].argmax(1))
    assert run.aux["gap"] is None
    through_aux = grad(
        lambda p: fo.unroll(fo.sgd(lr=0.1), loss, p, batches=targets, has_aux=True).aux[
            "error"
        ][-1, 0]
    )(p)
    assert_close(through_aux[:1], torch.tensor([0.8**3], dtype=torch.float64))


def test_no_steps_change_nothing():
    p = {"w": random(3, seed=1), "gap": None}
    run = fo.unroll(fo.adam(), lambda p, b: p["w"].sum(), p, steps=0)
    assert torch.equal(run.params["w"], p["w"]) and run.params["gap"] is None
    assert run.losses.shape == (0,) and run.aux == ()
    assert run.state["step"].tolist() == [0, 0]
    through = grad(
        lambda w: (
            fo.unroll(fo.adam(), lambda p, b: p["w"].sum(), {"w": w}, steps=0)
            .params["w"]
            .sum()
        )
    )
    assert torch.equal(through(p["w"]), torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("name", INNER)
def test_a_state_continues_the_loop_bit_for_bit(name: str):
    opt, _, hyper = INNER[name]

    def loss(p: Tensor, target: Tensor) -> Tensor:
        return squared_distance(torch.tanh(p), target)

    def whole(p: Tensor) -> fo.Unrolled:
        return fo.unroll(opt, loss, p, batches=targets, hyper=hyper)

    def halves(p: Tensor) -> fo.Unrolled:
        first = fo.unroll(opt, loss, p, batches=targets[:2], hyper=hyper)
        return fo.unroll(
            opt, loss, first.params, batches=targets[2:], state=first.state, hyper=hyper
        )

    p, targets = random(3, seed=1), random(5, 3, seed=2)
    for a, b in zip(tree.leaves(whole(p)[:2]), tree.leaves(halves(p)[:2])):
        assert torch.equal(a, b)
    slopes = [grad(lambda p, run=run: run(p).params.sum())(p) for run in (whole, halves)]
    assert_close(*slopes)


def test_absent_parameters_stay_absent():
    p = {"a": random(2, seed=1), "gap": None, "b": [None, random(3, seed=2)]}

    def end(p: dict[str, Any]) -> fo.Unrolled:
        return fo.unroll(
            fo.adam(lr=0.1),
            lambda p, b: p["a"].square().sum() + p["b"][1].exp().sum(),
            p,
            steps=2,
        )

    run = end(p)
    assert run.params["gap"] is None and run.params["b"][0] is None
    assert run.state["step"].tolist() == [2, 0, 2, 0]
    for name, before in (("a", p["a"]), ("b", p["b"][1])):
        after = run.params[name] if name == "a" else run.params["b"][1]
        assert ((after - before).abs() > 0.01).all()

    def total(p: dict[str, Any]) -> Tensor:
        after = end(p).params
        return after["a"].sum() + after["b"][1].sum()

    slope = gradient(total, p)
    assert len(slope) == 2 and all(g.abs().min() > 0 for g in slope)


# Closed forms --------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["autograd", "func"])
@pytest.mark.parametrize(
    "steps, window", [(1, None), (6, None), (6, 2), (6, 3), (7, 3), (6, 9)]
)
def test_quadratic(steps: int, window: int | None, how: str):
    """x_K = q^K x₀ with q = 1 - αλ; a truncated loop sees its last window only."""
    curvature, alpha, start = 1.7, 0.23, 1.9
    q = 1 - alpha * curvature

    def value(at: dict[str, Tensor], **mode: Any) -> Tensor:
        run = fo.unroll(
            fo.sgd(),
            lambda x, _: 0.5 * curvature * x**2,
            at["x"],
            steps=steps,
            hyper={"lr": at["lr"]},
            **mode,
        )
        return 0.5 * curvature * run.params**2

    def expected(*values: float) -> list[Tensor]:
        return [torch.tensor(v, dtype=torch.float64) for v in values]

    at = scalars(lr=alpha, x=start)
    full = -steps * curvature**2 * q ** (2 * steps - 1) * start**2
    found = gradient(lambda a: value(a, window=window), at, how)
    if window is None or window >= steps:
        assert_close(found, expected(full, curvature * q ** (2 * steps) * start))
    else:
        assert_close(found[:1], expected(full * (steps % window or window) / steps))
        assert found[1] == 0
    first = gradient(lambda a: value(a, grad_mode="first_order"), at, how)
    reach = curvature * start * q**steps
    assert_close(first, expected(-start * reach * (1 - q**steps) / alpha, reach))


@pytest.mark.parametrize("window", [1, 10, 20])
def test_influence_balancing_by_the_window_argument(window: int):
    """A step's loss is of before its update, so the first of a window sees no θ."""

    def total(theta: Tensor) -> Tensor:
        run = fo.unroll(
            influence(),
            influence_loss,
            stationary(),
            steps=3 * (window + 1),
            window=window + 1,
            hyper={"theta": theta},
        )
        return run.losses.sum() / (3 * window)

    assert abs(float(grad(total)(THETA)) - TRUNCATED[window]) < 1e-9


# Cutting the graph ---------------------------------------------------------------------


class Marker:
    """Lives as long as the graph node it is tied to."""


def marked(opt: fo.Optimizer, markers: list[weakref.ref]) -> fo.Optimizer:
    def update(grads: Any, state: Any, params: Any, **hyper: Any) -> tuple[Any, Any]:
        params, state = opt.update(grads, state, params, **hyper)
        marker = Marker()
        params.grad_fn.metadata["marker"] = marker
        markers.append(weakref.ref(marker))
        return params, state

    return fo.Optimizer(opt.init, update, opt.name, opt.hyper)


@pytest.mark.parametrize("name", ["momentum", "adam"])
@pytest.mark.parametrize("window", [None, 3])
def test_the_result_holds_the_last_window_only(name: str, window: int | None):
    markers: list[weakref.ref] = []
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    params, state = fo.unroll(
        marked(INNER[name][0], markers),
        squared_distance,
        random(3, seed=1),
        random(3, seed=2),
        steps=12,
        window=window,
        hyper={"lr": lr},
    )[:2]
    alive = [marker() is not None for marker in markers]
    assert alive == [window is None] * 9 + [True] * 3
    del params, state
    assert not any(marker() for marker in markers)


def test_windows_by_hand_hold_a_constant_number_of_graph_nodes():
    markers: list[weakref.ref] = []
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    opt = marked(fo.adam(), markers)
    params, target = random(3, seed=1), random(3, seed=2)
    state = opt.init(params)
    for _ in range(20):
        run = fo.unroll(
            opt, squared_distance, params, target, steps=4, state=state, hyper={"lr": lr}
        )
        (slope,) = torch.autograd.grad(run.losses.sum(), lr)
        assert slope != 0
        params, state = fo.detach((run.params, run.state))
        assert sum(marker() is not None for marker in markers) <= 4
    assert int(state["step"]) == len(markers) == 80


def test_a_window_as_long_as_the_loop_changes_nothing():
    at = everything("adam")
    expected = gradient(by_library("adam"), at)
    for window in (STEPS, STEPS + 1):
        assert_close(gradient(by_library("adam", window=window), at), expected, 0.0)


def test_detach_keeps_values_storage_and_what_is_no_tensor():
    x = random(3, seed=1).requires_grad_()
    carry = {"x": x * 2, "pair": (x, None), "epoch": 3, "name": "adam"}
    cut = fo.detach(carry)
    assert not cut["x"].requires_grad and torch.equal(cut["x"], x * 2)
    assert cut["pair"][0].data_ptr() == x.data_ptr() and cut["pair"][1] is None
    assert (cut["epoch"], cut["name"]) == (3, "adam")
    assert x.requires_grad and carry["x"].requires_grad


def test_detach_stops_gradients_and_tangents_at_every_level():
    x, t = random(3, seed=1), random(3, seed=2)

    def half(x: Tensor) -> Tensor:
        return fo.detach({"x": x})["x"] * x

    assert torch.equal(grad(lambda x: half(x).sum())(x), x)
    assert torch.equal(jvp(half, (x,), (t,))[1], x * t)
    assert torch.equal(vmap(grad(lambda x: half(x).sum()))(x.diag()), x.diag())
    outer = grad(lambda y: grad(lambda x: (fo.detach(x * y) * x).sum())(x).sum())
    assert torch.equal(outer(t), torch.zeros(3).double())  # cut for the outer level too


# Buffers -------------------------------------------------------------------------------


def batch_norm_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1)
    ).double()


def norm_loss(net: nn.Module) -> Callable[..., Tensor]:
    def loss(p: Any, batch: Any, *, buffers: Any) -> Tensor:
        x, y = batch
        return F.mse_loss(functional_call(net, (p, buffers), (x,)), y)

    return loss


def split(net: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    params = {name: p.detach().clone() for name, p in net.named_parameters()}
    return params, {name: b.clone() for name, b in net.named_buffers()}


def test_batch_norm_statistics_are_those_of_a_module_trained_in_place():
    net, twin = batch_norm_net(), batch_norm_net()
    params, buffers = split(net)
    kept = {name: (b.clone(), b._version) for name, b in buffers.items()}
    xs, ys = random(5, 8, 3, seed=1), random(5, 8, 1, seed=2)
    run = fo.unroll(
        fo.sgd(lr=0.1, momentum=0.9),
        norm_loss(net),
        params,
        batches=(xs, ys),
        buffers=buffers,
    )
    torch_opt = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    for x, y in zip(xs, ys):
        torch_opt.zero_grad()
        F.mse_loss(twin(x), y).backward()
        torch_opt.step()
    trained, statistics = split(twin)
    assert int(statistics["1.num_batches_tracked"]) == 5
    for name, b in statistics.items():
        assert run.buffers[name].dtype == b.dtype
        assert not torch.equal(b, kept[name][0])
        assert torch.allclose(run.buffers[name], b, rtol=1e-12, atol=0)
    assert_close(run.params, trained)
    for name, (value, version) in kept.items():  # the caller's
        assert torch.equal(buffers[name], value) and buffers[name]._version == version
    assert torch.equal(dict(net.named_buffers())["1.running_var"], torch.ones(4))


@pytest.mark.parametrize("per_task_params", [False, True])
@pytest.mark.parametrize("differentiated", [False, True])
def test_buffers_under_vmap_are_one_set_per_task(
    per_task_params: bool, differentiated: bool
):
    net = batch_norm_net()
    params, buffers = split(net)
    xs, ys = random(4, 8, 3, seed=1), random(4, 8, 1, seed=2)
    if per_task_params:
        params = {
            k: p + random(4, *p.shape, seed=i) for i, (k, p) in enumerate(params.items())
        }
    before = {name: (b.clone(), b._version) for name, b in buffers.items()}

    def one(p: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Any]:
        run = fo.unroll(
            fo.sgd(lr=0.1), norm_loss(net), p, (x, y), steps=3, buffers=buffers
        )
        return run.losses[-1], (run.params, run.buffers)

    if differentiated:
        slope = grad(one, has_aux=True)
        batched = vmap(slope, in_dims=(0 if per_task_params else None, 0, 0))
        call: Callable[..., Any] = slope
    else:
        batched = vmap(one, in_dims=(0 if per_task_params else None, 0, 0))
        call = one
    rows = [
        call(tree.map(itemgetter(i), params) if per_task_params else params, x, y)
        for i, (x, y) in enumerate(zip(xs, ys))
    ]
    expected = tree.map(lambda *r: torch.stack(r), *rows)
    for a, b in zip(tree.leaves(batched(params, xs, ys)), tree.leaves(expected)):
        assert torch.allclose(a.double(), b.double(), rtol=1e-11, atol=1e-13)
    means = expected[1][1]["1.running_mean"]
    assert (means[0] - means[1]).abs().max() > 1e-3  # tasks do differ
    for name, (value, version) in before.items():
        assert torch.equal(buffers[name], value) and buffers[name]._version == version


@pytest.mark.parametrize("batched", ["params", "batch", "meta", "hyper"])
def test_buffers_are_batched_by_whatever_is(batched: str):
    """What is written into a buffer is batched where anything that made it is."""

    def loss(p: Tensor, x: Tensor, meta: Tensor, *, buffers: Any) -> Tensor:
        buffers["mean"].mul_(0.5).add_(0.5 * p * x * meta)
        return (p * x * meta).square().sum()

    def end(x: dict[str, Tensor]) -> Tensor:
        run = fo.unroll(
            fo.sgd(),
            loss,
            x["params"],
            x["batch"],
            steps=2,
            meta=x["meta"],
            hyper={"lr": x["hyper"].abs()},
            buffers={"mean": mean},
        )
        return run.buffers["mean"]

    mean, names = random(3, seed=9), ("params", "batch", "meta", "hyper")
    inputs = {name: random(3, seed=i) for i, name in enumerate(names)}
    rows = random(4, 3, seed=8)
    found = vmap(lambda row: end({**inputs, batched: row}))(rows)
    expected = torch.stack([end({**inputs, batched: row}) for row in rows])
    assert torch.allclose(found, expected, rtol=1e-12)
    assert (expected[0] != expected[1]).all()


def table_loss(norm: Callable[..., Tensor], k: int) -> Callable[..., Tensor]:
    """With statistics for each step (MAML++): a row of one table, a column of another."""

    def loss(p: Tensor, x: Tensor, *, buffers: Any) -> Tensor:
        table = buffers["mean"][k], buffers["var"][:, k]
        images = torch.stack([x, x.square()], dim=-1)
        seen = norm(images * p[:, None], *table, p, None, True)
        return (seen + F.batch_norm(images, *table, p)).sin().square().mean()

    return loss


@pytest.mark.parametrize("norm", [F.batch_norm, F.instance_norm])
@pytest.mark.parametrize("grad_mode", ["reverse", "mixed"])
@pytest.mark.parametrize("axis", [0, 1])
def test_statistics_under_vmap_are_written_wherever_they_lie(
    norm: Callable[..., Tensor], axis: int, grad_mode: Any
):
    """torch's batching rule writes into a copy where they do not lie side by side."""

    def end(p: Tensor, x: Tensor, mean: Tensor) -> tuple[Tensor, Any]:
        buffers = {"mean": mean, "var": mean.t() ** 2 + 1}
        total = p.sum() * 0
        for k in range(2):
            run = fo.unroll(
                fo.sgd(lr=0.1), table_loss(norm, k), p, x, steps=2, buffers=buffers,
                grad_mode=grad_mode,
            )  # fmt: skip
            p, buffers, total = run.params, run.buffers, total + run.losses.sum()
        return total + p.square().sum(), buffers

    p, x, mean = random(3, seed=1), random(4, 8, 3, seed=2), random(4, 2, 3, seed=3)
    slope = grad(end, has_aux=True)
    rows = [slope(p, *one) for one in zip(x, mean)]
    expected = tree.map(lambda *r: torch.stack(r), *rows)
    given = p, x, mean.movedim(0, axis).contiguous()
    assert_close(vmap(slope, in_dims=(None, 0, axis))(*given), expected)
    assert (expected[1]["mean"] != mean).all()


def test_gradients_reach_through_the_buffers():
    """Buffers are data like any other: an average of what the parameters were."""

    def loss(p: Tensor, _: Any, *, buffers: Any) -> Tensor:
        buffers["mean"].mul_(0.5).add_(0.5 * p)
        return 0.5 * (p**2).sum()

    def end(p: Tensor, mean: Tensor) -> Tensor:
        run = fo.unroll(fo.sgd(lr=0.5), loss, p, steps=2, buffers={"mean": mean})
        return run.buffers["mean"].sum()

    p, mean = random(3, seed=1), random(3, seed=2)
    ones = torch.ones(3, dtype=torch.float64)
    assert torch.equal(grad(end)(p, mean), ones * (0.25 + 0.5 * 0.5))
    assert torch.equal(grad(end, argnums=1)(p, mean), ones * 0.25)


# Randomness ----------------------------------------------------------------------------


def dropout(x: Tensor, generator: torch.Generator | None) -> Tensor:
    kept = torch.rand(x.shape, generator=generator, dtype=x.dtype) < 0.5
    return torch.where(kept, 2 * x, 0.0)


def test_dropout_by_an_explicit_generator_is_the_same_loop_by_hand():
    def loss_with(generator: torch.Generator) -> Callable[..., Tensor]:
        def loss(p: Tensor, x: Tensor) -> Tensor:
            return (dropout(x, generator) @ p - 1).square().mean()

        return loss

    def seeded() -> torch.Generator:
        return torch.Generator().manual_seed(3)

    x = random(6, 3, seed=1)

    def library(p: Tensor) -> Tensor:
        run = fo.unroll(fo.sgd(lr=0.1), loss_with(seeded()), p, x, steps=3)
        return run.losses.sum() + run.params.square().sum()

    def hand(p: Tensor) -> Tensor:
        loss, data = loss_with(seeded()), [(x,)] * 3
        end, losses = unroll_by_hand(sgd_by_hand, loss, p, data, hyper_at=plain_sgd)
        return losses.sum() + end.square().sum()

    p = random(3, seed=2)
    before = torch.get_rng_state()
    for how in ("autograd", "func"):
        assert_close(gradient(library, p, how), gradient(hand, p))
    assert torch.equal(torch.get_rng_state(), before)
    masks = [dropout(x, g) for g in [seeded()] for _ in range(2)]
    assert not torch.equal(*masks)  # a mask for each step, not one for all


@pytest.mark.parametrize("randomness", ["different", "same"])
def test_dropout_by_functorch_randomness(randomness: str):
    x = random(40, 3, seed=1)

    def end(x: Tensor) -> Tensor:
        def loss(p: Tensor, x: Tensor) -> Tensor:
            return (F.dropout(x) @ p - 1).square().mean()

        return fo.unroll(fo.sgd(lr=0.1), loss, random(3, seed=2), x, steps=2).params

    torch.manual_seed(0)
    a, b = vmap(end, randomness=randomness)(torch.stack([x, x]))
    assert torch.equal(a, b) == (randomness == "same")
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(end)(torch.stack([x, x]))


# Parameters that the loss can reach by another way --------------------------------------


def late(g: Tensor, p: Tensor, *, step: Any) -> tuple[Tensor]:
    """A rule that gives its input back at first, as none should."""
    return (p if step == 1 else p - 0.5 * g,)


def tied(grads: Any, state: Any, params: Any, **_: Any) -> tuple[Any, Any]:
    """An update of which one new parameter is made of another."""
    w = params["w"] - 0.5 * grads["w"]
    return {"w": w, "b": 2 * w}, state


@pytest.mark.parametrize("remat", [None, "step"])
@pytest.mark.parametrize("steps", [1, 2])
def test_what_the_loss_closes_over_is_constant_also_where_a_step_gives_it_back(
    steps: int, remat: Any
):
    """The start itself in the first step, and what that one gives back in the second."""
    late_one = fo.elementwise(late, name="late", slots={}, hyper={})
    opt = late_one if steps == 2 else fo.sgd(lr=0.5)

    def outer(theta: Tensor) -> Tensor:
        fixed = theta if remat is None else theta.detach()
        run = fo.unroll(opt, lambda p, _: p * fixed, theta, steps=steps, remat=remat)
        return run.params

    theta = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    end = outer(theta)
    assert end.item() == 1.5  # 3 - 3 / 2: the gradient of p·θ by p is θ, not 2 θ
    (slope,) = torch.autograd.grad(end, theta)
    assert slope.item() == (0.5 if remat is None else 1.0)


def test_a_parameter_made_of_another_is_a_variable_of_its_own():
    opt = fo.Optimizer(lambda params: {"step": torch.zeros(2)}, tied)

    def outer(w: Tensor) -> Tensor:
        run = fo.unroll(
            opt, lambda p, _: p["w"] * p["b"], {"w": w, "b": torch.ones_like(w)}, steps=2
        )
        return run.params["w"]

    w = torch.tensor(3.0, dtype=torch.float64)
    # w₁ = w - ½, b₁ = 2 w₁, w₂ = w₁ - ½ b₁ = 0
    assert torch.func.grad_and_value(outer)(w) == (0.0, 0.0)


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_remat_is_equal_to_the_bit_also_of_leaves_used_often(name: str):
    """A gradient's terms are added up in the same order."""
    opt = getattr(fo, name)(lr=0.1)

    def loss(p: Any, x: Tensor) -> Tensor:
        y = x
        for _ in range(3):
            y = torch.tanh(y @ p["w"] + p["b"]) * p["b"]
        return y.square().mean()

    torch.manual_seed(0)
    x = torch.randn(7, 4, dtype=torch.float64)
    start = {
        "w": torch.randn(4, 4, dtype=torch.float64, requires_grad=True),
        "b": torch.randn(4, dtype=torch.float64, requires_grad=True),
    }
    found = []
    for remat in (None, "step", 2):
        run = fo.unroll(opt, loss, start, x, steps=5, remat=remat)
        found.append(torch.autograd.grad(loss(run.params, x), list(start.values())))
    for other in found[1:]:
        for a, b in zip(found[0], other):
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["adam", "lamb"])
@pytest.mark.parametrize(
    "how",
    [{"remat": "step"}, {"remat": "sqrt"}, {"grad_mode": "mixed"}],
    ids=str,
)
def test_what_is_made_again_is_made_as_autocast_chose(name: str, how: dict[str, Any]):
    """On the way back, which torch recommends to go outside of the block."""
    torch.manual_seed(0)
    x, y, w = torch.randn(16, 6), torch.randn(16, 2), torch.randn(6, 2)

    def loss(p: Tensor, _: Any) -> Tensor:
        return ((x @ p).tanh().float() - y).square().mean()

    def meta_gradient(**how: Any) -> Tensor:
        p = w.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            opt = getattr(fo, name)(lr=0.05)
            out = loss(fo.unroll(opt, loss, p, steps=4, **how).params, None)
        return torch.autograd.grad(out, p)[0]

    assert torch.equal(meta_gradient(**how), meta_gradient())
