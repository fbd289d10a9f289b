"""Sparse gradients: the numbers of torch.optim, entries that are not named untouched."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from trees import assert_close

import funcopt as fo
from funcopt import tree
from funcopt.types import Tree

STEPS, ROWS = 50, 7
Twin = Callable[..., torch.optim.Optimizer]

#: torch.optim makes some in a way of which torch warns
pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks")
coo = partial(torch.sparse_coo_tensor, check_invariants=True)

CASES: list[tuple[Callable[..., fo.Optimizer], Twin, dict[str, Any]]] = [
    (fo.sgd, torch.optim.SGD, {}),
    (fo.sgd, torch.optim.SGD, {"maximize": True}),
    (fo.sgd, torch.optim.SGD, {"momentum": 0.9, "dampening": 0.3}),
    (fo.sgd, torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    (fo.adagrad, torch.optim.Adagrad, {"lr_decay": 0.1}),
    (fo.adagrad, torch.optim.Adagrad, {"maximize": True}),
    (fo.adagrad, torch.optim.Adagrad, {"initial_accumulator_value": 0.1, "eps": 0.01}),
    (fo.sparse_adam, torch.optim.SparseAdam, {}),
    (fo.sparse_adam, torch.optim.SparseAdam, {"maximize": True, "betas": (0.8, 0.9)}),
    (fo.sparse_adam, torch.optim.SparseAdam, {"betas": (0.0, 0.5), "eps": 0.01}),
]
each = pytest.mark.parametrize("factory, twin, flags", CASES)


def sparse_grads(step: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Rows, some of them twice, and single elements; other ones at each step."""
    generator = torch.Generator().manual_seed(step)
    count = step % 5  # none at all, too
    rows = torch.randint(ROWS, (1, count), generator=generator)
    values = torch.randn(count, 3, generator=generator, dtype=dtype)
    spots = torch.randint(3, (2, 4), generator=generator)
    numbers = torch.randn(4, generator=generator, dtype=dtype)
    return {
        "rows": coo(rows, values, (ROWS, 3)),
        "spots": coo(spots, numbers, (3, 3)),
    }


def start(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(99)
    shapes = {"rows": (ROWS, 3), "spots": (3, 3)}
    return {
        key: torch.randn(shape, generator=generator, dtype=dtype)
        for key, shape in shapes.items()
    }


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 2e-6)], ids=str
)
@each
def test_trajectory(
    factory: Callable[..., fo.Optimizer],
    twin: Twin,
    flags: dict[str, Any],
    dtype: torch.dtype,
    tolerance: float,
    donate: bool,
):
    opt, params = factory(lr=0.1, **flags), start(dtype)
    copies = {key: p.clone() for key, p in params.items()}
    theirs = twin([*copies.values()], lr=0.1, **flags)
    state = opt.init(params)
    for step in range(STEPS):
        grads = sparse_grads(step, dtype)
        for key, copy in copies.items():
            copy.grad = grads[key].clone()
        theirs.step()
        old = {key: p.clone() for key, p in params.items()}
        new, state = opt.update(grads, state, params, donate=donate)
        assert (new["rows"] is params["rows"]) == donate
        if not donate:
            assert all(torch.equal(params[key], old[key]) for key in old)
        params = new
        assert_close(params, copies, tolerance)
    for slot in state.keys() - {"step"}:
        held = {key: theirs.state[copy][slot] for key, copy in copies.items()}
        held = {k: x.to_dense() for k, x in held.items()}
        assert_close(state[slot], held, tolerance)
    assert state["step"].tolist() == [STEPS] * 2


@pytest.mark.parametrize(
    "around",
    [
        lambda opt: fo.partition(
            {"a": opt, "b": fo.sgd(lr=0.5)}, {"rows": "a", "b": "b"}
        ),
        fo.skip_nonfinite,
        fo.master_weights,
    ],
)
def test_a_donated_step_of_what_stands_around_it(around: Callable[..., fo.Optimizer]):
    params = {"rows": start()["rows"], "b": torch.ones(2, dtype=torch.float64)}
    grads: Any = {"rows": sparse_grads(2)["rows"], "b": torch.ones(2).double()}
    opt = around(fo.sgd(lr=0.1))
    expected = opt.update(grads, opt.init(params), params)
    given = {key: p.clone() for key, p in params.items()}
    found = opt.update(grads, opt.init(given), given, donate=True)
    assert found[0]["rows"] is given["rows"]
    assert_close(found, expected, 0.0)
    with pytest.raises(fo.ExecutionError, match="share memory"):
        shared = coo(torch.tensor([[0], [1]]), given["b"][:1], (ROWS, 3))
        opt.update({**grads, "rows": shared}, opt.init(given), given, donate=True)


@each
def test_what_is_not_named_is_not_touched(
    factory: Callable[..., fo.Optimizer], twin: Twin, flags: dict[str, Any]
):
    if "momentum" in flags:
        pytest.skip("momentum goes on everywhere")
    opt, p = factory(lr=0.1, **flags), start()["rows"]
    g = coo(torch.tensor([[1, 4, 1]]), torch.ones(3, 3).double(), p.shape)
    new, state = opt.update(g, opt.init(p), p)
    assert (new != p).any(1).nonzero().flatten().tolist() == [1, 4]
    first = opt.init(p)
    for slot in state.keys() - {"step"}:
        changed = (state[slot] != first[slot]).any(1)
        assert changed.nonzero().flatten().tolist() == [1, 4]


def test_dense_and_sparse_and_none():
    opt, params = fo.adagrad(lr=0.1), {**start(), "dense": torch.ones(2), "no": None}
    params["gap"] = torch.ones(2)
    grads: Tree = {**sparse_grads(3), "dense": torch.ones(2), "no": None, "gap": None}
    plain = {k: g if g is None else g.to_dense() for k, g in grads.items()}
    found = opt.update(grads, opt.init(params), params)
    expected = opt.update(plain, opt.init(params), params)
    assert_close(found[0], expected[0], 1e-15)
    assert_close(found[1]["sum"], expected[1]["sum"], 1e-15)
    assert found[0]["gap"] is params["gap"]
    assert found[1]["step"].tolist() == expected[1]["step"].tolist()


@each
def test_complex_rows_are_rows_of_their_parts(
    factory: Callable[..., fo.Optimizer], twin: Twin, flags: dict[str, Any]
):
    opt, at = factory(lr=0.1, **flags), torch.tensor([[1, 4]])
    p, values = torch.rand(ROWS, 3, 2).double() - 0.5, torch.randn(3, 2, 3, 2).double()
    whole = start = torch.view_as_complex(p)
    state, other = opt.init(p), opt.init(whole)
    for v in values:
        p, state = opt.update(coo(at, v, p.shape), state, p)
        v = torch.view_as_complex(v)
        whole, other = opt.update(coo(at, v, whole.shape), other, whole)
        assert torch.equal(torch.view_as_real(whole), p)
    assert (whole != start)[at[0]].all()


FLOATS: dict[Callable[..., fo.Optimizer], dict[str, Any]] = {
    fo.sgd: {"lr": 0.1, "momentum": 0.9, "dampening": 0.3},
    fo.adagrad: {"lr": 0.1, "lr_decay": 0.1, "eps": 0.1},
    fo.sparse_adam: {"lr": 0.1, "betas": (0.8, 0.9), "eps": 0.1},
}


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("factory", FLOATS)
def test_derivative(factory: Callable[..., fo.Optimizer], steps: int):
    """By parameter, values, state and every number."""
    opt, at, first = factory(**FLOATS[factory]), torch.tensor([[0, 2]]), start()["rows"]
    _, state = opt.update(sparse_grads(3)["rows"], opt.init(first), first)
    counts, hyper = state.pop("step"), tree.map(torch.tensor, FLOATS[factory])
    hyper = tree.map(torch.Tensor.double, hyper)
    inputs, form = tree.flatten((first, torch.rand(2, 3).double() + 1, state, hyper))

    def end(*inputs: Tensor) -> tuple[Tensor, ...]:
        p, values, slots, hyper = tree.unflatten(form, inputs)
        state = {"step": counts, **slots}
        for _ in range(steps):
            g = coo(at, values * p[at[0]], p.shape)
            p, state = opt.update(g, state, p, **hyper)
        return p, *(state[slot] for slot in slots)

    assert torch.autograd.gradcheck(end, [x.detach().requires_grad_() for x in inputs])


CLIPPED: dict[str, Callable[[], Any]] = {
    "clip_by_value": lambda: fo.clip_by_value(0.3),
    "clip_by_global_norm": lambda: fo.clip_by_global_norm(0.5),
    "normalize": fo.normalize,
    "zero_nans": fo.zero_nans,
}


@pytest.mark.slow
@pytest.mark.parametrize("stage", CLIPPED)
@each
def test_after_a_stage_that_makes_zeros_of_zeros(
    factory: Callable[..., fo.Optimizer], twin: Twin, flags: dict[str, Any], stage: str
):
    """As torch with gradients that the stage made beforehand, all of them dense."""
    opt = fo.chain(CLIPPED[stage](), factory(lr=0.1, **flags))
    ahead = fo.chain(CLIPPED[stage](), fo.sgd(lr=1.0))
    params = start()
    copies = {key: p.clone() for key, p in params.items()}
    theirs, state = twin([*copies.values()], lr=0.1, **flags), opt.init(params)
    for step in range(10):
        grads = {key: 3 * g for key, g in sparse_grads(step).items()}
        if stage == "zero_nans" and step % 5:
            grads["rows"] = grads["rows"] * torch.tensor(torch.nan)
        zeros = {key: torch.zeros_like(p) for key, p in params.items()}
        dense = {key: g.to_dense() for key, g in grads.items()}
        made, _ = ahead.update(dense, ahead.init(zeros), zeros)
        for key, copy in copies.items():
            at = grads[key].coalesce().indices()
            copy.grad = coo(at, -made[key][tuple(at)], copy.shape)
        theirs.step()
        params, state = opt.update(grads, state, params)
        assert_close(params, copies, 1e-12)


@pytest.mark.parametrize(
    "make",
    [
        lambda: fo.chain(fo.clip_by_block_rms(1.0), fo.sparse_adam()),
        lambda: fo.chain(fo.add_decayed_weights(0.1), fo.sparse_adam()),
        lambda: fo.chain(fo.clip_by_value(1.0), fo.sparse_adam(), fo.ema(0.9)),
        lambda: fo.cautious(fo.sparse_adam()),
    ],
)
def test_what_goes_by_all_of_a_leaf_is_not_for_sparse_adam(make: Any):
    with pytest.raises(fo.HyperparameterTypeError, match=r"all of a leaf.*fo\.adam"):
        make()


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda p, g: fo.adagrad(weight_decay=0.1), fo.HyperparameterError, "to_dense"),
        (lambda p, g: fo.sgd(weight_decay=0.1), fo.HyperparameterError, "weight_decay"),
        (lambda p, g: fo.adam(), fo.LeafError, "to_dense"),
        (lambda p, g: fo.rmsprop(), fo.LeafError, "to_dense"),
        (
            lambda p, g: fo.chain(fo.clip_by_block_rms(1.0), fo.sgd()),
            fo.LeafError,
            "to_dense",
        ),
        (lambda p, g: fo.chain(fo.sgd(), fo.polyak()), fo.LeafError, "to_dense"),
        (
            lambda p, g: fo.chain(fo.zero_nans(), fo.freeze(fo.sgd(), False)),
            fo.LeafError,
            "to_dense",
        ),
        (lambda p, g: fo.accumulate(fo.sgd(), 2), fo.LeafError, "to_dense"),
        (lambda p, g: fo.cautious(fo.sgd()), fo.LeafError, "to_dense"),
    ],
)
def test_refused(call: Any, error: type[Exception], words: str):
    p, g = start(), sparse_grads(3)
    opt = call(p, g)
    with pytest.raises(error, match=words):
        opt.update(g, opt.init(p), p)


def test_a_step_that_is_not_finite_is_skipped():
    opt, p = fo.skip_nonfinite(fo.sparse_adam(lr=0.1)), start()
    g, state = sparse_grads(3), opt.init(p)
    bad = {**g, "rows": g["rows"] * torch.tensor(torch.inf)}
    same, state = opt.update(bad, state, p)
    assert_close(same, p, 0.0)
    assert state["skipped"] == 1
    alone = fo.sparse_adam(lr=0.1)
    expected, _ = alone.update(g, alone.init(p), p)
    assert_close(opt.update(g, state, p)[0], expected, 0.0)


def test_misfits():
    p, opt = start(), fo.sparse_adam()
    grads, state = sparse_grads(3), fo.sparse_adam().init(p)
    with pytest.raises(fo.LeafError, match="'rows' is dense.*sparse_adam"):
        opt.update({**grads, "rows": p["rows"]}, state, p)
    with pytest.raises(fo.StructureError, match=r"shape \(3, 3\)"):
        opt.update({**grads, "rows": grads["spots"]}, state, p)
    with pytest.raises(fo.LeafError, match="float32"):
        opt.update({**grads, "rows": grads["rows"].float()}, state, p)
    p["rows"].requires_grad_()
    with pytest.raises(fo.FuncoptError, match="donate"):
        opt.update(grads, state, p, donate=True)
