"""A complex leaf steps as its ``view_as_real``, as in torch.optim."""

import io
from typing import Any

import pytest
import torch
from row import Case
from rows import torch_optim
from table import ROWS, SCALAR, TWINS, slots_of
from test_parity import STEPS, TOLERANCE, Race, gradients
from torch import Tensor
from trees import assert_close, assert_same, mixed, random_like

import funcopt as fo
from funcopt import tree
from funcopt.errors import ExecutionError
from funcopt.types import State, Tree

#: of the parts, which are an axis more: a 0-d and an empty leaf among them
PARTS = ((4, 3, 2), (5, 2), (1, 2), (2,), (0, 3, 2))
REAL = {torch.complex64: torch.float32, torch.complex128: torch.float64}

#: of every rule that goes by elements, the first mix of flags and the last
FIRST, LAST = [
    [
        case
        for row in ROWS
        if (spec := (case := Case(row, row.combinations[i])).optimizer().spec)
        and spec.elementwise
    ]
    for i in (0, -1)
]
#: all mixes of those with a counterpart in torch.optim, and some
TORCH = [case for case in TWINS if case.row in torch_optim.ROWS]
RACES = [(case, torch.complex128) for case in TORCH] + [
    (case, torch.complex64) for case in LAST if case.row in torch_optim.ROWS
]
SPLIT = [(torch.complex128, case) for case in FIRST + LAST]
SPLIT += [(torch.complex64, case) for case in LAST]


def pairs(dtype: torch.dtype = torch.float64, seed: int = 0) -> Tree:
    """A tree of five leaves of pairs."""
    return mixed(dtype, seed, PARTS)


def joined(params: Tree) -> Tree:
    """Complex numbers of the pairs."""
    return tree.map(lambda x: torch.view_as_complex(x.clone()), params)


def split(params: Tree) -> Tree:
    return tree.map(lambda x: torch.view_as_real(x) if x.is_complex() else x, params)


def split_state(state: State) -> State:
    return {key: split(value) for key, value in state.items()}


def some_steps(opt: fo.Optimizer, params: Tree, count: int = 4, **how: Any) -> Any:
    """Parameters and state after some steps by gradients of ``params``' own kind."""
    state = opt.init(params)
    for step in range(count):
        grads = split(params) if is_complex(params) else params
        grads = random_like(grads, seed=100 + step)
        grads = joined(grads) if is_complex(params) else grads
        params, state = opt.update(grads, state, params, **how)
    return params, state


def is_complex(params: Tree) -> bool:
    return any(p.is_complex() for p in tree.leaves(params))


class Both(Race):
    """A race whose numbers are compared part by part."""

    def pairs(self) -> list[tuple[str, Tensor, Tensor]]:
        return [(name, split(a), split(b)) for name, a, b in super().pairs()]


@pytest.mark.parametrize("case, dtype", RACES, ids=str)
def test_trajectory(case: Case, dtype: torch.dtype):
    """torch.optim's numbers, step by step, state included."""
    real = REAL[dtype]
    params = joined(pairs(real))
    copies = [leaf.clone() for leaf in tree.leaves(params)]
    run = Both(case.optimizer(), case.twin(copies), params)
    for step in range(STEPS):
        run.step(joined(gradients(split(run.params), step)))
    run.assert_level(TOLERANCE[real])
    run.assert_moved()
    assert {x.dtype for x in tree.leaves(run.params)} == {dtype}


@pytest.mark.costly
@pytest.mark.parametrize("dtype, case", SPLIT, ids=str)
def test_a_complex_leaf_is_a_leaf_of_its_parts(case: Case, dtype: torch.dtype):
    start, opt = pairs(REAL[dtype]), case.optimizer()
    found, state = some_steps(opt, joined(start))
    expected, wanted = some_steps(opt, start)
    assert_same(split(found), expected)
    assert_same(split_state(state), wanted)
    for slot in slots_of(state):
        assert {x.dtype for x in tree.leaves(state[slot])} == {dtype}
    assert_same(split_state(opt.init(joined(start))), opt.init(start))
    assert_same(split(opt.eval_params(state, found)), opt.eval_params(wanted, expected))


@pytest.mark.costly
@pytest.mark.parametrize("case", LAST, ids=str)
def test_real_leaves_beside_it(case: Case):
    """Some leaves complex, some real, some without a gradient in turn."""
    opt, real = case.optimizer(), pairs()
    some = {**joined(real), "layers": [joined(real["layers"][0]), real["layers"][1]]}
    both = [(some, opt.init(some)), (real, opt.init(real))]
    for step in range(5):
        grads = random_like(real, seed=step)
        given = tree.map(
            lambda p, g: torch.view_as_complex(g) if p.is_complex() else g, some, grads
        )
        gaps = []
        for values in (given, grads):
            leaves, structure = tree.flatten(values)
            leaves = [None if (i + step) % 3 == 0 else g for i, g in enumerate(leaves)]
            gaps.append(tree.unflatten(structure, leaves))
        stepped = [opt.update(g, s, p) for g, (p, s) in zip(gaps, both)]
        for i, g in enumerate(tree.leaves(gaps[0])):
            if g is None:
                assert tree.leaves(stepped[0][0])[i] is tree.leaves(both[0][0])[i]
        both = stepped
        assert_same(split(both[0][0]), both[1][0])
        assert_same(split_state(both[0][1]), both[1][1])


@pytest.mark.parametrize("case", LAST, ids=str)
def test_pure_or_in_place(case: Case):
    opt, params = case.optimizer(), joined(pairs())
    state, grads = opt.init(params), joined(pairs(seed=1))
    given = [*tree.leaves((grads, params, state))]
    before = [(x.clone(), x._version) for x in given]
    expected, wanted = opt.update(grads, state, params)
    for x, (value, version) in zip(given, before, strict=True):
        assert torch.equal(x, value) and x._version == version
    found, new = opt.update(grads, state, params, donate=True)
    assert found is params and new is state
    assert_same(split(found), split(expected))
    assert_same(split_state(new), split_state(wanted))
    assert all(p._version > 0 for p in tree.leaves(params) if p.numel())


@pytest.mark.parametrize("execution", ["reference", "foreach", "native"])
def test_every_execution(execution: str):
    params = joined(pairs())
    for how in ({}, {"donate": True}):
        copies = tree.map(torch.clone, params)
        found = some_steps(fo.adam(lr=0.1), copies, execution=execution, **how)
        expected = some_steps(fo.adam(lr=0.1), params, execution="reference")
        assert_close(split(found[0]), split(expected[0]), 1e-14)


@pytest.mark.parametrize("bdim", [0, -1])
@pytest.mark.parametrize("case", LAST, ids=str)
def test_vmap(case: Case, bdim: int):
    opt = case.optimizer()
    tasks = [joined(pairs(seed=i)) for i in range(3)]
    many = tree.map(lambda *leaves: torch.stack(leaves, bdim), *tasks)
    found = torch.vmap(lambda p: two(opt, p), bdim)(many)
    for i, task in enumerate(tasks):
        assert_close(
            split(tree.map(lambda x, i=i: x[i], found)), split(two(opt, task)), 1e-14
        )


def two(opt: fo.Optimizer, params: Tree) -> Tree:
    """Two steps by the parameters themselves, which may be batched."""
    state = opt.init(params)
    for _ in range(2):
        params, state = opt.update(params, state, params)
    return params


@pytest.mark.costly
@pytest.mark.parametrize("case", LAST, ids=str)
def test_derivatives(case: Case):
    """torch's convention: the gradient of the parts, as the parts of one number."""
    opt, start = case.optimizer(), pairs()

    def objective(params: Tree) -> Tensor:
        ends = tree.leaves(split(two(opt, params)))
        return torch.stack([(x * (x + 2)).sum() for x in ends]).sum()

    expected = torch.func.grad(objective)(start)
    found = torch.func.grad(objective)(joined(start))
    assert_close(split(found), expected, 1e-13)
    recorded = tree.map(lambda x: x.requires_grad_(), joined(start))
    leaves = tree.leaves(recorded)
    grads = torch.autograd.grad(objective(recorded), leaves)
    assert_close([torch.view_as_real(g) for g in grads], tree.leaves(expected), 1e-13)


def test_gradients_of_a_loss_are_steps_downhill():
    """What autograd gives is what a step takes, lazily conjugated or not."""
    goal = torch.tensor([1.0 + 2.0j, -0.5j])

    def loss(p: Tensor) -> Tensor:
        return (p - goal).abs().square().sum()

    opt, p = fo.sgd(lr=0.25), torch.zeros(2, dtype=torch.complex64)
    state = opt.init(p)
    for _ in range(40):
        p, state = opt.update(torch.func.grad(loss)(p), state, p)
    assert torch.allclose(p, goal)
    assert p.conj().is_conj()
    with pytest.raises(ExecutionError, match="resolve_conj"):
        opt.update(p.clone().conj(), state, p.conj(), donate=True)
    step = opt.update(p.conj(), state, p.conj())[0]
    assert torch.equal(step, opt.update(p.conj_physical(), state, p.conj_physical())[0])
    with pytest.raises(ExecutionError, match="resolve_conj"):  # after one like it, too
        opt.update(p.clone().conj(), state, p.conj(), donate=True)


@pytest.mark.parametrize("shape", [(), (4, 3), (3,), (4, 1)], ids=str)
def test_leaf_shaped_hyperparameters(shape: tuple[int, ...]):
    p = joined(torch.randn(4, 3, 2, dtype=torch.float64))
    lr = torch.rand(shape, dtype=torch.float64)
    opt = fo.adam(lr=lr)
    wide = fo.adam(lr=lr.unsqueeze(-1) if lr.ndim else lr)
    assert_same(split(two(opt, p)), split_two(wide, p))
    parts = torch.rand(4, 3, 2, dtype=torch.float64)
    each = fo.adam(lr=torch.view_as_complex(parts))  # its own for each part
    assert_same(split(two(each, p)), split_two(fo.adam(lr=parts), p))
    one = torch.tensor([0.1, 0.2], dtype=torch.float64)
    each = fo.adam(lr=torch.view_as_complex(one))
    assert_same(split(two(each, p[0, 0])), split_two(fo.adam(lr=one), p[0, 0]))
    for misfit in (torch.ones(2), torch.ones(4, 3, 2), torch.ones(2, 1)):
        with pytest.raises(fo.HyperparameterError, match="broadcasts"):
            two(fo.adam(lr=misfit), p)
    with pytest.raises(fo.HyperparameterError, match="complex128"):
        two(each, p.real)


def split_two(opt: fo.Optimizer, p: Tensor) -> Tensor:
    return two(opt, torch.view_as_real(p))


def test_a_lane_of_real_leaves_is_left():
    """The same tree with other leaves, in turn with real ones."""
    opt, start = fo.adam(lr=0.1), {"w": torch.rand(3, 2, dtype=torch.float64)}
    for _ in range(3):
        expected = some_steps(opt, start)
        found = some_steps(opt, joined(start))
        assert_same(split(found[0]), expected[0])
        assert is_complex(found[0]) and not is_complex(expected[0])


@pytest.mark.parametrize(
    "opt",
    [
        fo.partition(
            {"a": fo.adam(lr=0.1), "b": fo.sgd(lr=0.1, momentum=0.9)},
            {"layers": "a", "empty": "b"},
        ),
        fo.freeze(fo.adagrad(lr=0.1), {"layers": False, "empty": True}),
        fo.accumulate(fo.adam(lr=0.1), k=2),
        fo.skip_nonfinite(fo.rprop(lr=0.1)),
        fo.master_weights(fo.adam(lr=0.1)),
        fo.chain(fo.clip_by_global_norm(0.5), fo.adamw(lr=0.1), fo.ema(0.5)),
        fo.chain(fo.clip_by_value(0.5), fo.adamw(lr=0.1), fo.lookahead(2)),
    ],
    ids=lambda opt: opt.name,
)
def test_wrapped(opt: fo.Optimizer):
    start = pairs()
    found, state = some_steps(opt, joined(start), 5)
    expected, wanted = some_steps(opt, start, 5)
    assert_same(split(found), expected)
    assert_same(split(opt.eval_params(state, found)), opt.eval_params(wanted, expected))


def test_the_common_norm_is_torchs():
    params, grads = joined(pairs()), joined(pairs(seed=1))
    opt = fo.chain(fo.clip_by_global_norm(0.5), fo.sgd(lr=1.0))
    found = opt.update(grads, opt.init(params), params)[0]
    copies = [p.clone().requires_grad_() for p in tree.leaves(params)]
    for copy, g in zip(copies, tree.leaves(grads), strict=True):
        copy.grad = g.clone()
    torch.nn.utils.clip_grad_norm_(copies, 0.5)
    torch.optim.SGD(copies, lr=1.0).step()
    for copy, p in zip(copies, tree.leaves(found), strict=True):
        assert_close(torch.view_as_real(p), torch.view_as_real(copy.detach()), 1e-14)


def test_saved_and_loaded():
    opt = fo.adagrad(lr=0.1, initial_accumulator_value=0.1)
    params, state = some_steps(opt, joined(pairs()))
    file = io.BytesIO()
    torch.save((params, state), file)
    file.seek(0)
    again = torch.load(file, weights_only=True)
    grads = joined(pairs(seed=1))
    a, b = opt.update(grads, state, params), opt.update(grads, again[1], again[0])
    assert_same(split(a[0]), split(b[0]))


def test_noise_is_as_wide_in_both_parts():
    generator = torch.Generator().manual_seed(0)
    p = torch.zeros(100_000, dtype=torch.complex64)
    noise = fo.normal_like(p, generator)
    assert noise.dtype is torch.complex64
    assert torch.allclose(torch.view_as_real(noise).std(0), torch.ones(2), atol=0.01)
    opt = fo.sgld(lr=0.5)
    new, _ = opt.update(p, opt.init(p), p, noise=noise)
    assert torch.allclose(torch.view_as_real(new).std(0), torch.ones(2), atol=0.01)


@pytest.mark.parametrize(
    "p",
    [
        torch.randn(4, 5, dtype=torch.complex64).mT,
        torch.randn(4, 10, dtype=torch.complex64)[:, 1::2],
        torch.randn(5, 1, dtype=torch.complex64).expand(5, 4),
        torch.randn(3, dtype=torch.complex64)[None, 1:],
        torch.randn(1, 1, dtype=torch.complex64),
    ],
    ids=["transposed", "every second", "expanded", "offset", "one"],
)
def test_layouts(p: Tensor):
    opt, dense = fo.adamax(lr=0.1), p.clone(memory_format=torch.contiguous_format)
    assert_same(split(two(opt, p)), split(two(opt, dense)))


def test_scalar_slots_are_numbers_per_leaf():
    opt, params = fo.nadam(lr=0.1), joined(pairs())
    _, state = some_steps(opt, params)
    assert state["mu_product"].dtype is torch.float64
    assert state["mu_product"].shape == (5,) and "mu_product" in SCALAR


def test_compiled():
    opt, params = fo.adam(lr=0.1), {"w": joined(torch.rand(3, 2, dtype=torch.float64))}
    compiled = torch.compile(lambda p: two(opt, p), backend="aot_eager", fullgraph=True)
    assert_close(split(compiled(params)), split(two(opt, params)), 1e-14)
