"""L-BFGS, which asks for the loss: against torch.optim.LBFGS, vmapped, differentiated."""

import io
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, jacfwd, jacrev, vmap
from trees import assert_close, mixed

import funcopt as fo
from funcopt import tree
from funcopt.execution import concrete
from funcopt.types import Tree

Loss = Callable[[Any], Tensor]
searches = pytest.mark.parametrize("search", [None, "strong_wolfe"])


def rosenbrock(p: Tensor) -> Tensor:
    return (1 - p[0]) ** 2 + 100 * (p[1] - p[0] ** 2) ** 2


def drawn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


FACTOR = drawn(6, 6, seed=1)
MATRIX = FACTOR @ FACTOR.T / 6 + torch.eye(6).double()
INPUTS = drawn(30, 4, seed=2)
LABELS = (INPUTS @ drawn(4, seed=3) + drawn(30, seed=4) > 0).double()


def quadratic(p: Tensor) -> Tensor:
    return p @ MATRIX @ p / 2 - p.sum()


def logistic(p: Tree) -> Tensor:
    score = INPUTS @ p["w"].reshape(-1) + p["b"]
    penalty = 0.01 * sum(leaf.square().sum() for leaf in tree.leaves(p))
    return torch.nn.functional.binary_cross_entropy_with_logits(score, LABELS) + penalty


def complex_least_squares(p: Tree) -> Tensor:
    error = torch.complex(INPUTS[:, :2], INPUTS[:, 2:]) @ p["c"] + p["b"] - LABELS
    return error.abs().square().mean()


# Each with a start, and a rate at which steps without a search go downhill.
PROBLEMS: dict[str, tuple[Loss, Any, float]] = {
    "quadratic": (quadratic, drawn(6), 0.5),
    "rosenbrock": (rosenbrock, torch.tensor([-1.2, 1.0]).double(), 0.1),
    "logistic": (logistic, {"w": drawn(2, 2), "b": drawn(1)}, 0.8),
    "complex": (
        complex_least_squares,
        {"c": torch.complex(*drawn(2, 2)), "b": drawn(1)},
        0.5,
    ),
}


def updated(opt: fo.Optimizer, loss: Loss, params: Any, state: Any, **how: Any) -> Any:
    grads = tree.unflatten(tree.flatten(params)[1], slopes(loss, params))
    return opt.update(grads, state, params, loss_fn=loss, **how)


def slopes(loss: Loss, params: Any) -> list[Tensor]:
    leaves, structure = tree.flatten(params)
    return list(grad(lambda x: loss(tree.unflatten(structure, x)))(leaves))


def run(opt: fo.Optimizer, loss: Loss, params: Any, count: int, **how: Any) -> Any:
    state = opt.init(params)
    for _ in range(count):
        params, state = updated(opt, loss, params, state, **how)
    return params, state


# Against torch.optim -------------------------------------------------------------------


def against_torch(
    problem: str, count: int = 5, tolerance: float = 1e-11, **flags: Any
) -> tuple[Any, Any]:
    """Equal after every update; the states at the end, ours and torch's."""
    loss, params, rate = PROBLEMS[problem]
    flags = {"lr": 1.0 if flags.get("line_search_fn") else rate, **flags}
    leaves, structure = tree.flatten(params)
    theirs = [p.clone().requires_grad_() for p in leaves]
    twin, opt = torch.optim.LBFGS(theirs, **flags), fo.lbfgs(**flags)

    def closure() -> Tensor:
        twin.zero_grad()
        value = loss(tree.unflatten(structure, theirs))
        value.backward()
        return value

    state = opt.init(params)
    for i in range(count):
        twin.step(closure)
        params, state = updated(opt, loss, params, state)
        assert (state["step"] == i + 1).all()
        for p, expected in zip(tree.leaves(params), theirs, strict=True):
            torch.testing.assert_close(p, expected.detach(), rtol=0, atol=tolerance)
        known = twin.state[theirs[0]]
        assert state["n_iter"] == known["n_iter"]
        assert state["func_evals"] == known["func_evals"]
    return state, known


@pytest.mark.parametrize("history_size", [1, 3, 10])
@pytest.mark.parametrize("max_iter", [1, 4, 20])
@pytest.mark.parametrize("problem", PROBLEMS)
@searches
def test_equal_to_torch(problem: str, search: Any, max_iter: int, history_size: int):
    flags = {"max_iter": max_iter, "history_size": history_size}
    count, tolerance = 5, 1e-11
    if problem == "rosenbrock" and max_iter == 20:
        # torch itself, started one rounding away, is 1e-9 and 1e-5 away at the end.
        count, tolerance = (5, 1e-10) if search else (1, 1e-11)
    state, known = against_torch(
        problem, count, tolerance, line_search_fn=search, **flags
    )
    rows = len(known["ro"])
    assert (
        (state["ro"] > 0) == (torch.arange(history_size) >= history_size - rows)
    ).all()
    assert not state["old_dirs"][: history_size - rows].any()


@pytest.mark.slow
@searches
def test_fifty_updates_are_torchs(search: Any, monkeypatch: pytest.MonkeyPatch):
    """Where rounding is not amplified: curved everywhere, and nearly alike."""

    def bent(p: Tensor) -> Tensor:
        return quadratic(p) + torch.cos(p).sum() / 20

    monkeypatch.setitem(PROBLEMS, "bent", (bent, drawn(6), 0.5))
    flags = {"max_iter": 1, "tolerance_grad": 0.0, "tolerance_change": 0.0}
    against_torch("bent", 50, 1e-12, line_search_fn=search, history_size=5, **flags)


@searches
def test_what_is_kept_equals_what_torch_keeps(search: Any):
    state, known = against_torch(
        "rosenbrock", 3, line_search_fn=search, max_iter=5, history_size=4
    )
    for key in ("d", "t", "prev_flat_grad", "prev_loss", "H_diag"):
        expected = torch.as_tensor(known[key], dtype=torch.float64)
        torch.testing.assert_close(state[key], expected, rtol=1e-7, atol=1e-9)
    for key in ("old_dirs", "old_stps", "ro"):
        expected = torch.stack([torch.as_tensor(x) for x in known[key]])
        torch.testing.assert_close(state[key], expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    "flags",
    [
        {"tolerance_grad": 1e-2},
        {"tolerance_change": 1e-3},
        {"max_eval": 1},
        {"max_eval": 2},
        {"max_eval": 4},
        {"max_eval": 9},
        {"max_iter": 6, "max_eval": 30},
        {"tolerance_grad": 10.0},
        {"lr": 1e-3},
        {"lr": 30.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("problem", PROBLEMS)
@searches
def test_it_stops_where_torch_stops(problem: str, search: Any, flags: Any):
    if search is None and flags.get("lr") == 30.0:
        pytest.skip("runs away")
    against_torch(problem, 3, line_search_fn=search, **flags)


def wavy(p: Tensor) -> Tensor:
    return (p**2).sum() / 20 + torch.sin(3 * p).sum() + torch.sin(7 * p[0] * p[1])


@pytest.mark.parametrize("max_eval", [1, 2, 4, 25])
@pytest.mark.parametrize("lr", [1e-3, 0.1, 3.0, 30.0])
def test_a_search_in_waves_is_torchs(
    lr: float, max_eval: int, monkeypatch: pytest.MonkeyPatch
):
    """Far too short and far too long first steps, many minima: every case is met.

    One search each: what follows from a search here amplifies roundings without end.
    """
    flags = {"line_search_fn": "strong_wolfe", "max_iter": 1, "max_eval": max_eval}
    for seed in range(10):
        monkeypatch.setitem(PROBLEMS, "waves", (wavy, 2 * drawn(3, seed=seed), lr))
        against_torch("waves", 1, 1e-10, lr=lr, **flags)


# Tasks and derivatives -----------------------------------------------------------------


@searches
@pytest.mark.parametrize("blind", [False, True])
def test_tasks_stop_on_their_own(
    search: Any, blind: bool, monkeypatch: pytest.MonkeyPatch
):
    """Also where no value may be looked at."""
    tasks = torch.cat([drawn(5, 2), torch.ones(1, 2).double(), 1 + drawn(2, 2) / 100])
    rate = 1.0 if search else 0.02
    opt = fo.lbfgs(rate, 5, history_size=3, line_search_fn=search, tolerance_change=1e-4)

    def task(p: Tensor) -> Any:
        return run(opt, rosenbrock, p, 3)

    expected = [task(p) for p in tasks]
    if blind:
        monkeypatch.setattr(concrete, "peek", lambda _: None)
    params, state = vmap(task)(tasks)
    assert len(set(state["n_iter"].tolist())) > (3 if search else 1)
    assert state["n_iter"].tolist() == [int(s["n_iter"]) for _, s in expected]
    assert state["func_evals"].tolist() == [int(s["func_evals"]) for _, s in expected]
    assert_close(params, torch.stack([p for p, _ in expected]), 1e-12)
    assert_close(state["d"], torch.stack([s["d"] for _, s in expected]), 1e-9)


@searches
def test_each_task_may_have_its_own_rate(search: Any):
    opt, rates = fo.lbfgs(max_iter=4, line_search_fn=search), torch.tensor([0.01, 0.3])
    start = torch.tensor([-1.2, 1.0]).double()

    def task(lr: Any) -> Tensor:
        return run(opt, rosenbrock, start, 2, lr=lr)[0]

    found = vmap(task)(rates.double())
    for p, lr in zip(found, rates.double()):
        assert_close(p, task(lr), 1e-12)
        assert_close(p, task(float(lr)), 1e-12)


@searches
@pytest.mark.parametrize("problem", ["rosenbrock", "logistic", "complex"])
def test_derivatives_are_those_of_the_steps(problem: str, search: Any):
    loss, start, rate = PROBLEMS[problem]
    opt = fo.lbfgs(max_iter=3, history_size=2, line_search_fn=search)
    leaves, structure = tree.flatten(start)

    def two(lr: Tensor, *leaves: Tensor) -> Any:
        params = tree.unflatten(structure, leaves)
        return tuple(tree.leaves(run(opt, loss, params, 2, lr=lr)[0]))

    inputs = [torch.tensor(rate).double(), *(leaf.clone() for leaf in leaves)]
    assert torch.autograd.gradcheck(two, [x.requires_grad_() for x in inputs])
    if problem == "complex":
        return  # jacrev takes real inputs only
    inputs = [x.detach() for x in inputs]
    every = tuple(range(len(inputs)))
    backward, forward = jacrev(two, every)(*inputs), jacfwd(two, every)(*inputs)
    assert_close(tree.leaves(backward), tree.leaves(forward), 1e-9)


@searches
@pytest.mark.parametrize("updates", [1, 3])
def test_derivatives_by_gradients_and_what_is_kept(search: Any, updates: int):
    loss, start, rate = PROBLEMS["rosenbrock"]
    opt = fo.lbfgs(max_iter=2, history_size=2, line_search_fn=search)
    params, first = run(opt, loss, start, 2, lr=rate)
    grads = slopes(loss, params)[0]
    counts = {key: x for key, x in first.items() if not x.is_floating_point()}
    kept = {key: x for key, x in first.items() if x.is_floating_point()}
    lr = torch.tensor(rate, dtype=torch.float64)
    inputs, form = tree.flatten((params, grads, kept, lr))

    def end(*inputs: Tensor) -> tuple[Tensor, ...]:
        p, g, slots, lr = tree.unflatten(form, inputs)
        state = counts | slots
        for _ in range(updates):
            p, state = opt.update(g, state, p, lr=lr, loss_fn=loss)
            g = slopes(loss, p)[0]
        return p, *(state[key] for key in slots)

    assert torch.autograd.gradcheck(end, [x.detach().requires_grad_() for x in inputs])


@searches
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_derivatives_are_finite_where_nothing_moves(search: Any, dtype: torch.dtype):
    opt = fo.lbfgs(max_iter=3, history_size=2, line_search_fn=search)
    start = torch.tensor([[1.0, 1.0], [0.5, 0.25], [1.0 + 2**-7, 1.0]], dtype=dtype)

    def task(p: Tensor, lr: Tensor) -> Tensor:
        return run(opt, rosenbrock, p, 2, lr=lr)[0]

    lr = torch.tensor(0.01, dtype=dtype)
    assert torch.equal(task(start[0], lr), start[0])
    for stops in (start[:1], start):  # alone, and held while others go on
        by_param, by_lr = vmap(jacrev(task, (0, 1)), in_dims=(0, None))(stops, lr)
        assert by_param.isfinite().all() and by_lr.isfinite().all()
        assert torch.equal(by_param[0], torch.eye(2, dtype=dtype))


@searches
def test_a_loss_without_a_slope_moves_nothing(search: Any):
    opt, p = fo.lbfgs(line_search_fn=search, tolerance_grad=0.0), torch.ones(2)
    p.requires_grad_()
    new = run(opt, lambda p: (p * 0).sum(), p, 2)[0]
    (by,) = torch.autograd.grad(new.sum(), p)
    assert torch.equal(new, p) and torch.equal(by, torch.ones(2))


# What every optimizer promises ---------------------------------------------------------


def squares(p: Tree) -> Tensor:
    leaves = [x for x in tree.leaves(p) if x is not None]
    parts = [((i + 1) * (x.double() - 0.3) ** 2).sum() for i, x in enumerate(leaves)]
    return torch.stack(parts).sum()


def form(values: Tree) -> Any:
    return tree.map(lambda x: (x.shape, x.dtype), values)


@searches
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_nothing_given_changes_and_what_comes_is_alike(search: Any, dtype: torch.dtype):
    opt = fo.lbfgs(0.2, line_search_fn=search, history_size=3)
    params = mixed(dtype)
    state = opt.init(params)
    for _ in range(3):
        before = tree.map(torch.clone, (params, state))
        new = updated(opt, squares, params, state)
        for old, found in zip(tree.leaves(before), tree.leaves((params, state))):
            assert torch.equal(old, found)
        assert form(new) == form((params, state))
        held = {x.untyped_storage().data_ptr() for x in tree.leaves(params) if x.numel()}
        apart = [x for x in tree.leaves(new[0]) if x.numel()]
        assert held.isdisjoint({x.untyped_storage().data_ptr() for x in apart})
        assert len({x.untyped_storage().data_ptr() for x in apart}) == len(apart)
        params, state = new
    assert squares(params) < 1e-3 * squares(mixed(dtype))


@searches
def test_donated(search: Any):
    opt, p = fo.lbfgs(line_search_fn=search, max_iter=4), drawn(6)
    expected, state = run(opt, quadratic, p, 3), opt.init(p)
    for _ in range(3):
        new, new_state = updated(opt, quadratic, p, state, donate=True)
        assert new is p and new_state is state
    assert torch.equal(p, expected[0])
    for key, value in expected[1].items():
        assert torch.equal(state[key], value)


@searches
@pytest.mark.parametrize("history_size", [1, 3, 20])
@pytest.mark.parametrize("donate", [False, True], ids=["pure", "donated"])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_what_nobody_follows(problem: str, donate: bool, history_size: int, search: Any):
    """Then memory is used again: of a state that is given away, and never another's."""
    loss, params, rate = PROBLEMS[problem]
    opt = fo.lbfgs(
        1.0 if search else rate, 4, history_size=history_size, line_search_fn=search
    )
    asked: list[tuple[Tree, Tree]] = []

    def noted(p: Tree) -> Tensor:
        asked.append((p, tree.map(lambda x: x.detach().clone(), p)))
        return loss(p)

    expected = params = tree.map(torch.clone, params)
    known = state = opt.init(params)
    if donate:
        params, state = tree.map(torch.clone, (params, state))
    for i in range(4):
        expected, known = updated(opt, loss, expected, known)
        # The last two begin anew with fewer steps: not all pairs come that may come.
        how: dict[str, Any] = {} if i < 2 else {"tolerance_change": 1e-3}
        if how:
            expected, known = updated(opt, loss, params, state, **how)
        before = tree.map(torch.clone, (params, state))
        grads = tree.unflatten(tree.flatten(params)[1], slopes(loss, params))
        asked.clear()
        with torch.no_grad():
            given = {"loss_fn": noted, "donate": donate, **how}
            new, new_state = opt.update(grads, state, params, **given)
        for p, then in asked[donate:]:  # also what the loss has seen
            assert all(map(torch.equal, tree.leaves(p), tree.leaves(then)))
        assert (new is params) == donate
        if not donate:
            for x, y in zip(tree.leaves(before), tree.leaves((params, state))):
                assert torch.equal(x, y)
        params, state = new, new_state
        for x, y in zip(tree.leaves(params), tree.leaves(expected), strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=1e-9)
        assert state["n_iter"] == known["n_iter"]
        assert ((state["ro"] > 0) == (known["ro"] > 0)).all()
        for key in ("old_dirs", "old_stps", "d"):
            scale = 1e-7 * (1 + known[key].abs().max())
            torch.testing.assert_close(state[key], known[key], rtol=0, atol=float(scale))


@searches
@pytest.mark.parametrize(
    "flags", [{"tolerance_grad": 10.0}, {"tolerance_grad": 0.1}], ids=str
)
def test_it_stops_as_early_where_nobody_follows(search: Any, flags: Any):
    loss, params, rate = PROBLEMS["quadratic"]
    opt = fo.lbfgs(1.0 if search else rate, line_search_fn=search, **flags)
    expected, known = run(opt, loss, params, 2)
    with torch.no_grad():
        found, state = run(opt, loss, params, 2)
    assert state["n_iter"] == known["n_iter"] < 2 * 20
    assert state["func_evals"] == known["func_evals"]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


@searches
@pytest.mark.parametrize("donate", [False, True], ids=["pure", "donated"])
def test_vectors_of_many_pages(donate: bool, search: Any):
    """Their memory comes from the system; all else is as with few numbers."""
    curvature = torch.logspace(-1, 0, 150_000, dtype=torch.float64)
    away = {"w": drawn(300, 500), "b": drawn(3)}

    def loss(p: Tree) -> Tensor:
        squares = (p["w"] - away["w"]).flatten() ** 2
        return (curvature * squares).sum() / 2 + ((p["b"] - away["b"]) ** 2).sum()

    opt = fo.lbfgs(max_iter=4, history_size=5, line_search_fn=search)
    expected = params = tree.map(torch.zeros_like, away)
    known = state = opt.init(params)
    assert state["old_dirs"].nbytes > 1 << 20
    if donate:
        params, state = tree.map(torch.clone, (params, state))
    for _ in range(2):
        expected, known = updated(opt, loss, expected, known)
        grads = tree.unflatten(tree.flatten(params)[1], slopes(loss, params))
        before = tree.map(torch.clone, (params, state))
        with torch.no_grad():
            old = params, state
            params, state = opt.update(grads, state, params, loss_fn=loss, donate=donate)
        if not donate:
            assert all(map(torch.equal, tree.leaves(old), tree.leaves(before)))
        near = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-9)
        for x, y in zip(tree.leaves((params, state)), tree.leaves((expected, known))):
            near(x, y)


@searches
def test_a_known_value_spares_an_evaluation(search: Any):
    opt, p, calls = fo.lbfgs(0.5, 3, line_search_fn=search), drawn(6), []

    def counted(p: Tensor) -> Tensor:
        calls.append(p)
        return quadratic(p)

    grads, value = torch.func.grad_and_value(quadratic)(p)
    expected = opt.update(grads, opt.init(p), p, loss_fn=counted)
    without = len(calls)
    found = opt.update(grads, opt.init(p), p, loss_fn=counted, value=value)
    assert len(calls) == 2 * without - 1
    for a, b in zip(tree.leaves(found), tree.leaves(expected), strict=True):
        assert torch.equal(a, b)


@searches
def test_saved_and_loaded_it_goes_on(search: Any):
    opt = fo.lbfgs(0.5, 4, line_search_fn=search)
    params, state = run(opt, quadratic, drawn(6), 2)
    file = io.BytesIO()
    torch.save((params, state), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    expected = updated(opt, quadratic, params, state)
    for a, b in zip(tree.leaves(updated(opt, quadratic, *loaded)), tree.leaves(expected)):
        assert torch.equal(a, b)


@searches
def test_a_leaf_without_a_gradient_stays(search: Any):
    opt = fo.lbfgs(0.5, 3, line_search_fn=search)
    params = {"a": drawn(3), "b": drawn(2, seed=1), "none": None}
    params, state = run_some(opt, params, opt.init(params), ())
    params, state = run_some(opt, params, state, ())
    new, new_state = run_some(opt, params, state, ("b",))
    assert torch.equal(new["b"], params["b"]) and new["none"] is None
    assert new_state["step"].tolist() == [3, 2, 0] and state["step"].tolist() == [2, 2, 0]
    assert squares(new) < squares(params)
    assert not new_state["d"][3:].any()
    stays, rest = run_some(opt, params, state, ("a", "b"))
    assert torch.equal(stays["a"], params["a"]) and torch.equal(
        rest["step"], state["step"]
    )
    alone = {"a": drawn(3)}
    other = {"a": drawn(3), "b": drawn(2, seed=1), "none": None}
    found = run_some(opt, other, opt.init(other), ("b",))[0]["a"]
    assert_close(found, run_some(opt, alone, opt.init(alone), ())[0]["a"], 1e-14)


def run_some(opt: fo.Optimizer, params: Any, state: Any, without: Any) -> Any:
    grads = {
        key: None if p is None or key in without else 2 * (i + 1) * (p - 0.3)
        for i, (key, p) in enumerate(params.items())
    }
    return opt.update(grads, state, params, loss_fn=squares)


@searches
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_leaves_of_all_kinds_where_nobody_follows(search: Any, dtype: torch.dtype):
    """One without elements, one that the loss does not read, and one number."""
    params = {
        "a": drawn(2, 3),
        "b": drawn(0, 3),
        "c": drawn(2),
        "d": drawn(1)[0].to(dtype),
    }
    unread = params["c"]

    def loss(p: Tree) -> Tensor:
        return squares({key: p[key] for key in ("a", "b", "d")})

    opt = fo.lbfgs(0.1, 3, history_size=2, line_search_fn=search)
    expected, known = run(opt, loss, params, 2)
    state = opt.init(params)
    for _ in range(2):
        grads = tree.unflatten(tree.flatten(params)[1], slopes(loss, params))
        with torch.no_grad():
            params, state = opt.update(grads, state, params, loss_fn=loss)
    assert form((params, state)) == form((expected, known))
    assert torch.equal(params["c"], unread)
    for x, y in zip(tree.leaves((params, state)), tree.leaves((expected, known))):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)


def test_nothing_to_step():
    opt = fo.lbfgs()
    for params in ({}, {"a": None}, {"a": torch.zeros(0)}):
        grads = tree.map(torch.zeros_like, params)
        new, _ = opt.update(grads, opt.init(params), params, loss_fn=squares_or_zero)
        assert tree.flatten(new)[1] == tree.flatten(params)[1]


def squares_or_zero(p: Tree) -> Tensor:
    return sum((x.sum() for x in tree.leaves(p) if x is not None), torch.zeros(()))


def test_a_schedule_and_settings_for_one_call():
    p, opt = drawn(6), fo.lbfgs(fo.Schedule(lambda k: 0.5 / (1 + k)), 3)
    found = run(opt, quadratic, p, 2)[0]
    plain, state = fo.lbfgs(max_iter=3), fo.lbfgs().init(p)
    first, state = updated(plain, quadratic, p, state, lr=0.5)
    assert_close(updated(plain, quadratic, first, state, lr=0.25)[0], found, 1e-14)
    still, state = updated(plain, quadratic, p, plain.init(p), tolerance_grad=1e3)
    assert torch.equal(still, p) and state["n_iter"] == 0 and state["func_evals"] == 1


def test_a_search_meets_an_infinite_loss_and_goes_on():
    def walled(p: Tensor) -> Tensor:
        return -torch.log(1 - p).sum() - torch.log(p).sum()

    def loss(p: Tensor) -> Tensor:
        inside = ((p > 0) & (p < 1)).all()
        return torch.where(inside, walled(p.clamp(0.01, 0.99)), torch.inf)

    opt = fo.lbfgs(line_search_fn="strong_wolfe", lr=5.0)
    p = run(opt, loss, torch.tensor([0.05, 0.9]).double(), 3)[0]
    assert_close(p, torch.full_like(p, 0.5), 1e-6)


@searches
def test_within_autocast_is_outside(search: str | None):
    """But for the loss, which is evaluated as it chooses."""
    opt = fo.lbfgs(lr=0.5, max_iter=6, line_search_fn=search)
    torch.manual_seed(0)
    p, v, target = torch.randn(3, 5)
    seen: list[bool] = []

    def loss(p: Tensor, _: Any) -> Tensor:
        seen.append(torch.is_autocast_enabled("cpu"))
        return ((p - target) ** 2 * (1 + v**2)).sum() + (p.tanh() * v).sum()

    def adapted(p: Tensor) -> Tensor:
        return fo.unroll(opt, loss, p, steps=2).params

    def slope(p: Tensor) -> Tensor:
        return grad(lambda p: adapted(p).sum())(p)

    wanted, outside = (adapted(p), slope(p)), len(seen)
    with torch.autocast("cpu", torch.bfloat16):
        found = adapted(p), slope(p)
    assert not any(seen[:outside]) and all(seen[outside:])
    assert_close(found, wanted, 1e-5)
