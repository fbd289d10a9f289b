"""Rules of whole matrices: leaves that are alike are stepped as one stack."""

from functools import partial
from typing import Any

import pytest
import torch
from row import Case
from table import MATRIX
from torch import Tensor
from torch.func import grad, jvp, vmap
from trees import assert_close, assert_moved, assert_same, random_like, relative

import funcopt as fo
from funcopt import tree
from funcopt.execution import dispatch, stacked
from funcopt.hyper import Hyper
from funcopt.optimizers import _matrices
from funcopt.optimizers._bases import eigenbasis, iterated
from funcopt.types import Tree

ONCE = MATRIX[1::2]


def many(case: Case, dtype: torch.dtype = torch.float64) -> Tree:
    """Two of each shape that the rule takes, and two more of the first."""
    first = case.mixed(dtype, 1)
    more = [first["layers"][0]["weight"] * k for k in (2, 3)]
    return {"a": first, "b": case.mixed(dtype, 2), "c": more}


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("case", MATRIX, ids=str)
def test_a_stack_is_a_loop(case: Case, donate: bool):
    opt, expected = case.optimizer(), many(case)
    start, found = expected, tree.map(torch.clone, expected)
    a, b = opt.init(expected), opt.init(found)
    assert ": stacked" in str(fo.plan(opt, found))
    for seed in range(3):
        grads = random_like(expected, seed)
        expected, a = opt.update(grads, a, expected, execution="reference")
        found, b = opt.update(grads, b, found, donate=donate)
        assert_close((found, b), (expected, a), case.row.rounding)
    assert_moved(found, start, everywhere=False)


AROUND: dict[str, Any] = {
    "a stage before": lambda opt: fo.chain(fo.clip_by_global_norm(0.1), opt),
    "trust region": lambda opt: fo.chain(opt, fo.trust_region(0.01)),
    "average": lambda opt: fo.chain(opt, fo.ema(0.9)),
    "lookahead": lambda opt: fo.chain(opt, fo.lookahead(2)),
    "cautious": fo.cautious,
    "skip_nonfinite": fo.skip_nonfinite,
    "accumulate": lambda opt: fo.accumulate(opt, 2),
    "master_weights": fo.master_weights,
    "sam": fo.sam,
}


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("case", ONCE, ids=str)
def test_what_stands_around_sees_each_leaf_as_it_was(
    case: Case, around: str, donate: bool
):
    """Neither written over before it is looked at again, nor with others in a sum."""
    opt, expected = AROUND[around](case.optimizer()), many(case)
    found = tree.map(torch.clone, expected)
    a, b = opt.init(expected), opt.init(found)
    more: Any = {}
    if around == "sam":
        more = {"loss_fn": lambda p: sum((x**2).sum() for x in tree.leaves(p))}
    for seed in range(2):
        grads = random_like(expected, seed)
        expected, a = opt.update(grads, a, expected, execution="reference", **more)
        found, b = opt.update(grads, b, found, donate=donate, **more)
        assert_same(grads, random_like(expected, seed))
        assert_close((found, b), (expected, a), 10 * case.row.rounding)


@pytest.mark.parametrize("case", ONCE, ids=str)
def test_only_what_is_alike_is_stacked(case: Case):
    """Neither leaves of another age, nor of another rate or dtype."""
    opt, params = case.optimizer(), many(case)
    params["d"] = case.mixed(torch.float32, 3)
    state = opt.init(params)
    _, state = opt.update(
        {**params, "a": tree.map(lambda _: None, params["a"])}, state, params
    )
    rates = {"a": 0.1, "b": 0.2, "c": 0.1, "d": 0.1}
    for gaps in ((), ("a", "b")):
        grads = random_like(params, 4)
        grads |= {key: tree.map(lambda _: None, grads[key]) for key in gaps}
        expected = opt.update(grads, state, params, lr=rates, execution="reference")
        found = opt.update(grads, state, params, lr=rates)
        assert_close(found, expected, case.row.rounding)


@pytest.mark.parametrize("case", ONCE, ids=str)
def test_a_leaf_of_a_stack_has_memory_of_its_own(case: Case):
    opt, params = case.optimizer(), many(case)
    result = opt.update(params, opt.init(params), params)
    found = [x for x in tree.leaves(result) if x.numel()]
    assert len({x.untyped_storage().data_ptr() for x in found}) == len(found)
    assert all(x.untyped_storage().nbytes() == x.nbytes for x in found)


@pytest.mark.parametrize("case", ONCE, ids=str)
def test_the_derivative_of_a_stack(case: Case):
    opt, params = case.optimizer(), many(case)
    state, grads = opt.init(params), random_like(params, 5)
    weights = random_like(params, 6)

    def outer(x: Any, name: str) -> Tensor:
        new, s = opt.update(x["grads"], state, x["params"], lr=x["lr"], execution=name)
        new, _ = opt.update(new, s, new, lr=x["lr"], execution=name)
        parts = tree.map(lambda p, w: (p * w).sum(), new, weights)
        return torch.stack(tree.leaves(parts)).sum()

    point = {"grads": grads, "params": params, "lr": torch.tensor(0.1).double()}
    slopes = {name: grad(outer)(point, name) for name in ("reference", "stacked")}
    assert_close(slopes["stacked"], slopes["reference"], 10 * case.row.rounding)
    along = random_like(point, 7)
    tangents = {
        name: jvp(lambda x, n=name: outer(x, n), (point,), (along,))[1] for name in slopes
    }
    assert_close(tangents["stacked"], tangents["reference"], 10 * case.row.rounding)


@pytest.mark.parametrize("name", ["adafactor", "muon"])
def test_steps_like_earlier_ones_go_on_alike(name: str, monkeypatch: pytest.MonkeyPatch):
    """By a stack, though a step between names the loop; groups and rates may change."""
    together: Any = stacked._together
    calls: list[int] = []

    def spy(leaves: Any, apart: bool) -> Any:
        calls.append(len(leaves.params))
        return together(leaves, apart)

    monkeypatch.setattr(stacked, "_together", spy)
    opt = getattr(fo, name)(lr=0.1)
    expected = found = random_like([torch.empty(4, 3).double()] * 8, 1)
    found = tree.map(torch.clone, found)
    a, b = opt.init(expected), opt.init(found)
    rates: list[Any] = [0.1, 0.1, 0.2, torch.tensor(0.1), [0.1] * 4 + [0.3] * 4, 0.1, 0.1]
    for k, lr in enumerate(rates):
        grads = random_like(expected, 2 + k)
        expected, a = opt.update(grads, a, expected, lr=lr, execution="reference")
        named = "reference" if k == 4 else None
        found, b = opt.update(grads, b, found, lr=lr, donate=k > 2, execution=named)
    assert_close((found, b), (expected, a), 1e-3 if name == "muon" else 1e-13)
    assert calls == [8] * 6
    assert_moved(found, random_like(found, 1), everywhere=True)


@pytest.mark.parametrize(
    "size, threads, calls",
    [
        (48, 1, [4, 4]),
        (36, 2, [3, 3]),
        (12, 1, []),
        (12, 2, [2, 2, 2, 2]),
        (12, 4, [4, 4]),
        (12, 9, [5, 3]),
    ],
)
def test_a_stack_is_no_larger_than_a_cache(
    size: int, threads: int, calls: list[int], monkeypatch: pytest.MonkeyPatch
):
    """Or has a leaf for each thread, up to 60 elements; few left over go one by one."""
    together: Any = stacked._together
    found = []

    def spy(leaves: Any, apart: bool) -> Any:
        found.append(len(leaves.params))
        return together(leaves, apart)

    monkeypatch.setattr(stacked, "_together", spy)
    monkeypatch.setattr(stacked, "_STACK", size)
    monkeypatch.setattr(stacked, "_LARGEST", 60)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    opt, params = fo.adafactor(), random_like([torch.empty(4, 3).double()] * 8, 1)
    given = random_like(params, 2), opt.init(params), params
    expected = opt.update(*given, execution="reference")
    assert_close(opt.update(*given), expected, 1e-13)
    assert found == calls


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("name", ["adafactor", "muon"])
def test_a_donated_step_writes_where_the_old_values_are(
    name: str, nesterov: bool, monkeypatch: pytest.MonkeyPatch
):
    flags: dict[str, Any] = {"nesterov": nesterov} if name == "muon" else {}
    opt = getattr(fo, name)(lr=0.1, weight_decay=0.1, **flags)
    expected = random_like([torch.empty(s) for s in ((4, 3), (2, 5))], 1)
    found = tree.map(torch.clone, expected)
    a, b = opt.init(expected), opt.init(found)
    monkeypatch.setattr(dispatch, "_copy", None)  # to copy would fail
    for seed in range(2, 5):
        grads = random_like(expected, seed)
        kept = tree.map(torch.clone, grads)
        expected, a = opt.update(grads, a, expected)
        opt.update(grads, b, found, donate=True)
        assert_close((found, b, grads), (expected, a, kept), 0.0)


def test_what_cannot_be_stacked_is_said(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    square, wide = torch.ones(3, 3), torch.ones(3, 4)
    assert "no 3 small leaves" in str(fo.plan(fo.muon(), [square, wide] * 2))
    assert "muon: 4 leaves" in str(fo.plan(fo.muon(), [square] * 4, execution="stacked"))
    large = torch.ones(300, 300)
    assert "no 3 small leaves" in str(fo.plan(fo.muon(), [large] * 4))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert "muon: 4 leaves" in str(fo.plan(fo.muon(), [large] * 4))
    assert ": stacked" in str(fo.plan(fo.muon(), [large] * 4))
    for other in (fo.muon(ns_dtype=None), fo.adafactor(), fo.shampoo(), fo.soap()):
        assert "no 3 small leaves" in str(fo.plan(other, [large] * 4))
    with pytest.raises(fo.ExecutionError, match="no 2 small leaves"):
        fo.plan(fo.muon(), [square, wide], execution="stacked")
    with pytest.raises(fo.ExecutionError, match="only leaves of a rule that needs each"):
        fo.plan(fo.adam(), [square, square], execution="stacked")
    assert "stacked" not in str(fo.plan(fo.adam(), [square, square]))


def test_muon_takes_matrices():
    with pytest.raises(fo.StructureError, match=r"'bias'\] has shape \(3,\).*partition"):
        fo.muon().init({"bias": torch.ones(3), "weight": torch.ones(3, 3)})
    with pytest.raises(fo.StructureError, match="takes matrices"):
        fo.chain(fo.clip_by_global_norm(1.0), fo.muon()).init(torch.ones(3))


@pytest.mark.parametrize("shape", [(6, 3), (3, 6)], ids=str)
def test_muons_derivative_is_that_of_its_iteration_unrounded(shape: tuple[int, ...]):
    """In bfloat16 as in float64: and the two steps differ, as their numbers do."""
    g, p, along = random_like([torch.empty(shape).double()] * 3, 8)
    found = {}
    for dtype in (torch.bfloat16, None):
        opt = fo.muon(lr=0.1, ns_dtype=dtype)

        def step(g: Tensor, opt: Any = opt) -> Tensor:
            return opt.update(g, opt.init(p), p)[0]

        slope = grad(lambda g, f=step: (f(g) * along).sum())(g)
        found[dtype] = slope, jvp(step, (g,), (along,))[1], step(g)
    assert_close(found[torch.bfloat16][:2], found[None][:2], 1e-13)
    assert 1e-6 < (found[torch.bfloat16][2] - found[None][2]).abs().max() < 1e-2


def test_muons_step_within_forward_modes_is_the_step_outside():
    """Rounded as bfloat16's products are, though its derivative is not."""
    opt, (g, p) = fo.muon(lr=0.1), random_like([torch.empty(6, 3).double()] * 2, 8)

    def step(g: Tensor) -> Tensor:
        return opt.update(g, opt.init(p), p)[0]

    found = jvp(lambda g: jvp(step, (g,), (g,))[0], (g,), (g,))[0]
    assert torch.equal(found, step(g))


@pytest.mark.parametrize("shape", [(20, 64), (64, 20), (32, 32)], ids=str)
def test_float32_makes_bfloat16s_products(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
):
    """To a bit of bfloat16, of which sums in another order may round the other way."""
    x, how = random_like(torch.empty(shape), 1), ((3.4445, -4.7750, 2.0315), 5, 1e-7)
    found = _matrices.orthogonalized(x, *how, torch.bfloat16)
    unrounded = _matrices.orthogonalized(x, *how, torch.float32)
    monkeypatch.setattr(_matrices, "_SMALL", (0, 0))
    expected = _matrices.orthogonalized(x, *how, torch.bfloat16)
    assert (found - expected).norm() < 3e-3 * expected.norm()
    assert (found - unrounded).norm() > 6e-3 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_muon_is_finite_without_a_gradient(dtype: torch.dtype):
    """All of a matrix 0: the least divisor alone divides, and the derivative is 1/eps."""
    opt, zero = fo.muon(), torch.zeros(3, 4, dtype=dtype)
    state = opt.init(zero)
    new, _ = opt.update(zero, state, zero)
    assert torch.equal(new, zero)
    slope = grad(lambda g: opt.update(g, state, zero)[0].sum())(zero)
    assert slope.isfinite().all() and slope.any()


AS_TORCHS = [(torch.float64, 1e-12), (torch.float32, 2e-6)]
ITERATIONS: list[dict[str, Any]] = [
    {"ns_steps": 0},
    {"ns_steps": 8, "ns_coefficients": (1.5, -0.5, 0.0)},
    {"ns_steps": 3, "ns_coefficients": (2.0, -1.5, 0.5), "momentum": 0.0},
    {"eps": 3.0, "adjust_lr_fn": "original", "nesterov": False},
]


@pytest.mark.parametrize("flags", ITERATIONS, ids=str)
@pytest.mark.parametrize("dtype, tolerance", AS_TORCHS, ids=str)
def test_muons_iterations_are_torchs(
    flags: dict[str, Any], dtype: torch.dtype, tolerance: float
):
    """Others than the usual ones; of a norm below eps, too."""
    shapes = [(4, 3), (2, 5), (1, 3), (3, 3)]
    params = random_like([torch.empty(s, dtype=dtype) for s in shapes], 1)
    first, copies = params, [p.clone() for p in params]
    opt, twin = fo.muon(lr=0.1, **flags), torch.optim.Muon(copies, lr=0.1, **flags)
    state = opt.init(params)
    for step in range(50):
        grads = random_like(params, 10 + step)
        params, state = opt.update(grads, state, params)
        for p, g in zip(copies, grads):
            p.grad = g.clone()
        twin.step()
        assert_close(params, copies, tolerance)
    usual = fo.muon(lr=0.1, nesterov=flags.get("nesterov", True))
    other, _ = usual.update(first, usual.init(first), first)
    assert_moved(opt.update(first, opt.init(first), first)[0], other, everywhere=False)


@pytest.mark.parametrize("d, eps", [(1.0, (None, 1e-3)), (1.1, (1e-2, 1.2))])
@pytest.mark.parametrize("dtype, tolerance", AS_TORCHS, ids=str)
def test_adafactors_bounds_are_torchs(
    d: float, eps: Any, dtype: torch.dtype, tolerance: float
):
    """Moves that are clipped, parameters that are small, and leaves of one number."""
    shapes = [(4, 3), (5,), (), (1, 1), (2, 1, 3)]
    params = random_like([torch.empty(s, dtype=dtype) for s in shapes], 1)
    copies, hyper = [p.clone() for p in params], {"lr": 0.1, "d": d, "eps": eps}
    opt, twin = fo.adafactor(**hyper), torch.optim.Adafactor(copies, **hyper)
    state = opt.init(params)
    for step in range(50):
        size = 10.0 ** (step % 5 - 2)
        grads = [size * g for g in random_like(params, 10 + step)]
        params, state = opt.update(grads, state, params)
        for p, g in zip(copies, grads):
            p.grad = g.clone()
        twin.step()
        for ours, theirs in zip(params, copies):
            assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max().clamp(1)


def test_a_rate_that_is_no_number_is_not_taken_for_a_large_one():
    """As in torch, whose Adafactor has ``lr`` for a bound."""
    opt, p = fo.adafactor(), torch.ones(3, 2)
    new, _ = opt.update(p, opt.init(p), p, lr=torch.tensor(torch.nan))
    assert new.isnan().all()


@pytest.mark.parametrize("size", [0.0, 1e-25, 1e-18, 1e-12, 1e-6])
def test_adafactors_derivative_is_finite_by_small_gradients(size: float):
    """Of a matrix, and of a row in one whose other rows are not small."""
    opt, p = fo.adafactor(), torch.ones(4, 3)
    g = random_like(p, 1)
    for scale in (torch.full((4, 1), size), torch.tensor([[size], [1.0], [1.0], [1.0]])):

        def outer(g: Tensor, scale: Tensor = scale) -> Tensor:
            new, state = opt.update(g * scale, opt.init(p), p)
            return (opt.update(g * scale, state, new)[0] * random_like(p, 2)).sum()

        slope = grad(outer)(g)
        assert slope.isfinite().all() and (size < 1e-9 or slope.any())


def test_adafactors_derivative_past_its_bounds():
    opt, p = fo.adafactor(lr=0.1, d=1.0, eps=(1e-3, 3.0)), torch.ones(3, 2).double()
    g = random_like(p, 1)
    _, state = opt.update(g, opt.init(p), p)
    given = [(5 * g).requires_grad_(), p.requires_grad_()]
    assert torch.autograd.gradcheck(lambda g, p: opt.update(g, state, p)[0], given)


@pytest.mark.parametrize("eps", [1e-4, 1e-30])  # whose square is 0 in float32
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_shampoo_is_finite_at_equal_eigenvalues(dtype: torch.dtype, eps: float):
    """A gradient that is zero, one of equal singular values, one of rank one."""
    one = torch.eye(3, dtype=dtype)
    for g in (0 * one, one, torch.ones_like(one)):
        opt, p = fo.shampoo(eps=eps), torch.zeros_like(one)

        def outer(g: Tensor, opt: Any = opt, p: Tensor = p) -> Tensor:
            new, state = opt.update(g, opt.init(p), p)
            return (opt.update(g, state, new)[0] * torch.arange(3)).sum()

        assert grad(outer)(g).isfinite().all()
        assert grad(lambda g, f=outer: grad(f)(g).sum())(g).isfinite().all()


def test_adafactors_groups_may_leave_an_eps_to_the_dtype():
    p = [torch.ones(2, 2), torch.ones(2)]
    groups = [{"params": p[:1]}, {"params": p[1:], "lr": 0.5}]
    params, hyper = fo.from_param_groups(groups, lr=0.1, eps=(None, 1e-3))
    new, _ = fo.adafactor(**hyper).update(params, fo.adafactor().init(params), params)
    assert torch.allclose(new[0][0], 0.9 * p[0]) and torch.allclose(new[1][0], 0.5 * p[1])


def symmetric(values: list[float], seed: int = 0) -> Tensor:
    """Of these eigenvalues."""
    n = len(values)
    q = torch.linalg.qr(random_like(torch.empty(n, n).double(), seed))[0]
    return q @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ q.mT


def rotated(x: Tensor) -> Tensor:
    return eigenbasis(x).abs()  # a vector's sign is LAPACK's choice


SKEWED = symmetric([3.0, 2.0, 1.5], 1)


def iterated_of(x: Tensor) -> Tensor:
    return iterated(x, SKEWED)


@pytest.mark.parametrize("basis", [rotated, iterated_of])
def test_the_derivative_of_a_basis(basis: Any):
    """Of both orders and modes, also of a stack."""
    x = torch.stack([symmetric([3.0, 2.0, 0.5]), symmetric([1.0, 0.1, 0.01], 2)])
    x.requires_grad_()
    assert torch.autograd.gradcheck(basis, x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(basis, x)
    along = random_like(x, 3)
    found = torch.vmap(lambda x, t: jvp(basis, (x,), (t,))[1])(x.detach(), along)
    rows = [jvp(basis, (a,), (t,))[1] for a, t in zip(x.detach(), along)]
    assert_close(found, torch.stack(rows), 1e-13)


def test_the_derivative_of_what_is_determined_of_a_basis():
    """Between eigenspaces, by finite differences: x is of two, and stays so."""
    x, weights = symmetric([2.0, 2.0, 0.5]), random_like(torch.empty(3, 3).double(), 4)
    along = random_like(x, 5)
    skew = along - along.mT  # turning x changes none of its eigenvalues

    def projection(t: Any) -> Tensor:
        turn = torch.linalg.matrix_exp(t * skew)
        q = eigenbasis(turn @ x @ turn.mT)[:, :2]
        return (q @ q.mT * weights).sum()

    t, h = torch.zeros((), dtype=torch.float64), 1e-6
    numeric = (projection(t + h) - projection(t - h)) / (2 * h)
    assert relative(grad(projection)(t), numeric) < 1e-8
    assert relative(jvp(projection, (t,), (t + 1,))[1], numeric) < 1e-8


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # Dynamo does
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_basis_that_nothing_determines_is_a_constant(
    dtype: torch.dtype, compiled: bool
):
    one = torch.eye(3, dtype=dtype)
    weights = random_like(one, 6)

    def both(x: Tensor) -> Tensor:
        return ((eigenbasis(x) + iterated(x, one)) * weights).sum()

    if compiled:
        torch.compiler.reset()
        both = torch.compile(both, backend="aot_eager", fullgraph=True)
    for x in (0 * one, torch.ones_like(one), 1e-200 * one):
        x.requires_grad_()
        (slope,) = torch.autograd.grad(both(x), x)
        assert slope.isfinite().all()
        assert slope.any() == (x.detach()[0, 1] == 1)  # a rank of one has a direction
        if not compiled:  # and forward mode takes the same for constant
            along = random_like(one, 7)
            ahead = jvp(both, (x.detach(),), (along,))[1]
            assert abs(ahead - (slope * along).sum()) <= 1e-5 * slope.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_soap_is_finite_at_equal_eigenvalues(dtype: torch.dtype):
    opt, one = fo.soap(precondition_frequency=1), torch.eye(3, dtype=dtype)
    for g in (0 * one, one, torch.ones_like(one)):

        def outer(g: Tensor) -> Tensor:
            params, state = 0 * one, opt.init(one)
            for _ in range(4):
                params, state = opt.update(g, state, params, eps=0.1)
            return (params * torch.arange(3)).sum()

        assert grad(outer)(g).isfinite().all()
        assert grad(lambda g, f=outer: grad(f)(g).sum())(g).isfinite().all()


def test_soaps_axes():
    """Which have a basis: none too long, and vectors only where they are to."""
    p = [torch.ones(shape) for shape in ((2, 5), (3,), (2, 2, 2), (), (0, 2), (1,))]

    def sides(**flags: Any) -> list[int]:
        return [q.numel() for q in fo.soap(**flags).init(p)["Q"]]

    assert sides() == [4 + 25, 0, 12, 0, 0, 0]
    assert sides(max_precond_dim=4) == [4, 0, 12, 0, 0, 0]
    assert sides(precondition_1d=True) == [29, 9, 12, 1, 0, 1]
    assert sides(merge_dims=True) == [100, 0, 64, 0, 0, 0]
    assert sides(merge_dims=True, max_precond_dim=4) == [4, 0, 16 + 4, 0, 0, 0]
    assert sides(merge_dims=True, max_precond_dim=1) == [0, 0, 0, 0, 0, 0]


def test_soap_takes_a_rate_for_each_number():
    """In the leaf's own coordinates, not in its basis'."""
    p, rates = [random_like(torch.empty(2, 2).double(), i) for i in (1, 2)]
    grads = [random_like(p, seed) for seed in (3, 4)]

    def moved(lr: Any) -> Tensor:
        opt, state, new = fo.soap(weight_decay=0.0), None, p
        state = opt.init(p)
        for g in grads:
            new, state = opt.update(g, state, new, lr=lr)
        return new - p

    assert_close(moved(rates.abs()), rates.abs() * moved(1.0), 1e-13)


@pytest.mark.parametrize("name", ["adafactor", "shampoo", "soap", "muon"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_step_within_autocast_is_the_step_outside(name: str, dtype: torch.dtype):
    opt = getattr(fo, name)(lr=0.05)
    torch.manual_seed(0)
    p, grads = torch.randn(4, 3), torch.randn(3, 4, 3)

    def stepped() -> torch.Tensor:
        params, state = p, opt.init(p)
        for g in grads:
            params, state = opt.update(g, state, params)
        return params.clone()

    wanted = stepped()
    with torch.autocast("cpu", dtype):
        assert torch.equal(stepped(), wanted)


def learned(g: Tensor, p: Tensor, *, step: Any, lr: Any) -> tuple[Tensor]:
    """A rule of its own products, one of which torch takes by a list."""
    hidden = torch.nn.functional.linear(g, g.mT @ p).tanh()
    return (p - lr * torch.einsum("ij,jk,kl->il", [hidden, hidden.mT, p]),)


WITHIN = {
    "adafactor": fo.adafactor(lr=0.05),
    "shampoo": fo.shampoo(lr=0.05, eps=1.0),
    "soap": fo.soap(lr=0.05, eps=0.1, precondition_frequency=2),
    "muon": fo.muon(lr=0.05),
    "learned": fo.per_tensor(learned, name="learned", slots={}, hyper={"lr": Hyper(0.1)}),
}


def by_autograd(f: Any, x: Tensor, v: Tensor, order: int = 1) -> Tensor:
    x = x.clone().requires_grad_()
    slope = f(x)
    for left in reversed(range(order)):
        slope = torch.autograd.grad((slope * v).sum(), x, create_graph=left > 0)[0]
    return slope


DERIVATIVES: dict[str, Any] = {
    "autograd": by_autograd,
    "autograd twice": partial(by_autograd, order=2),
    "grad": lambda f, x, v: grad(f)(x),
    "jvp": lambda f, x, v: jvp(f, (x,), (v,))[1],
    "vmap(grad)": lambda f, x, v: vmap(grad(f))(torch.stack([x, v])),
    "grad(vmap)": lambda f, x, v: grad(lambda x: vmap(f)(x).sum())(torch.stack([x, v])),
    "grad(grad)": lambda f, x, v: grad(lambda x: (grad(f)(x) * v).sum())(x),
    "jvp(grad)": lambda f, x, v: jvp(grad(f), (x,), (v,))[1],
    "grad(jvp)": lambda f, x, v: grad(lambda x: jvp(f, (x,), (v,))[1])(x),
}


@pytest.mark.parametrize("name", WITHIN)
@pytest.mark.parametrize("how", DERIVATIVES)
def test_a_derivative_within_autocast_is_the_one_outside(name: str, how: str):
    opt = WITHIN[name]
    torch.manual_seed(0)
    x, v, grads = torch.randn(4, 3), torch.randn(4, 3), torch.randn(3, 4, 3)

    def stepped(x: Tensor) -> Tensor:
        params, state = x, opt.init(x)
        for g in grads:
            params, state = opt.update(g * x + g, state, params)
        return (params * v).sum()

    wanted = DERIVATIVES[how](stepped, x, v)
    assert wanted.abs().max() > 1e-3
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(DERIVATIVES[how](stepped, x, v), wanted, 1e-4)


PRODUCTS: dict[str, Any] = {
    "@": lambda x, b: x @ b,
    "inner": torch.inner,
    "tensordot": lambda x, b: torch.tensordot(x, b, dims=1),
    "multi_dot": lambda x, b: torch.linalg.multi_dot([x, b, x]),
    "matrix_power": lambda x, _: x.matrix_power(3),
    "inverse": lambda x, b: torch.inverse(x + 6 * torch.eye(6)) @ b,
    "pinv": lambda x, _: torch.linalg.pinv(x + 6 * torch.eye(6)),
    "cov": lambda x, _: torch.cov(x),
    "nuclear norm": lambda x, _: torch.linalg.matrix_norm(x, "nuc"),
    "attention": lambda x, b: torch.nn.functional.scaled_dot_product_attention(
        x[None], b[None], x[None]
    ),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_rules_own_products_keep_their_dtype_in_derivatives(name: str):
    torch.manual_seed(0)
    x, b, weights = torch.randn(6, 6), torch.randn(6, 6), torch.randn(36)

    def rule(g: Tensor, p: Tensor, *, step: Any) -> tuple[Tensor]:
        found = PRODUCTS[name](g, p).flatten()
        return (p - 0.1 * (weights[: found.numel()] * found).sum(),)

    opt = fo.per_tensor(rule, name="own", slots={}, hyper={})

    def slope() -> Tensor:
        return grad(lambda g: opt.update(g, opt.init(b), b)[0].sum())(x)

    wanted = slope()
    assert wanted.abs().max() > 1e-3
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(slope(), wanted, 1e-5)


@pytest.mark.parametrize("opt", [fo.muon(), fo.shampoo()], ids=lambda opt: opt.name)
def test_a_backward_within_hooks_of_saved_tensors(opt: fo.Optimizer):
    """As within torch.autograd.graph.save_on_cpu; torch.func refuses to work there."""
    start = random_like(torch.empty(4, 3), 1).requires_grad_()
    lr = torch.tensor(0.1, requires_grad=True)

    def slopes() -> Any:
        p, state = start, opt.init(start)
        for _ in range(2):
            p, state = opt.update(p**3, state, p, lr=lr)
        return torch.autograd.grad(p.square().sum(), (start, lr))

    expected = slopes()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.clone(), lambda x: x):
        found = slopes()
    assert_close(found, expected, 1e-6)
