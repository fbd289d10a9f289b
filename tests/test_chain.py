"""A chain is its links one after the other, and an Optimizer like any other."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from row import Case
from table import ENDS
from torch import Tensor
from torch.func import grad, jvp, vmap
from trees import (
    assert_close,
    assert_moved,
    assert_same,
    mixed,
    random_like,
    small,
    units_of_largest,
)

import funcopt as fo
from funcopt import tree
from funcopt.types import Tree

Leaves = list[Tensor]
STEPS = 5


# By hand, on lists of leaves: what each stage is to do ---------------------------------


def norm(leaves: Leaves) -> Tensor:
    return torch.linalg.vector_norm(torch.cat([x.flatten() for x in leaves]))


def clipped(grads: Leaves, params: Leaves, max_norm: Any = 0.7) -> Leaves:
    copies = [torch.zeros_like(g) for g in grads]
    for copy, g in zip(copies, grads):
        copy.grad = g.clone()
    torch.nn.utils.clip_grad_norm_(copies, float(max_norm))
    return [copy.grad for copy in copies]  # type: ignore[misc]


def clamped(grads: Leaves, params: Leaves, max_value: Any = 0.6) -> Leaves:
    return [g.clip(-max_value, max_value) for g in grads]


def rms_clipped(grads: Leaves, params: Leaves, threshold: Any = 0.8) -> Leaves:
    rms = [(g**2).mean().sqrt() if g.numel() else torch.tensor(0.0) for g in grads]
    return [g / max(1.0, r.item() / float(threshold)) for g, r in zip(grads, rms)]


def normalized(grads: Leaves, params: Leaves) -> Leaves:
    return [g / norm(grads) for g in grads]


def centralized(grads: Leaves, params: Leaves) -> Leaves:
    return [
        g - g.flatten(1).mean(1).view(-1, *[1] * (g.ndim - 1))
        if g.ndim > 1 and g.numel()
        else g
        for g in grads
    ]


def decayed(grads: Leaves, params: Leaves, weight_decay: Any = 0.3) -> Leaves:
    return [g + float(weight_decay) * p for g, p in zip(grads, params)]


def without_nans(grads: Leaves, params: Leaves) -> Leaves:
    return [torch.nan_to_num(g, nan=0.0, posinf=torch.inf) for g in grads]


def in_region(new: Leaves, old: Leaves, ratio: Any = 0.05, floor: Any = 1.5) -> Leaves:
    found = []
    for p, q in zip(old, new):
        longest = float(ratio) * max(norm([p]).item(), float(floor))
        length = norm([q - p]).item()
        found.append(p + (q - p) * min(1.0, longest / length) if length else q)
    return found


def on_simplex(x: Tensor, total: float) -> Tensor:
    """By bisection for the shift."""
    low, high = x.min() - total, x.max()
    for _ in range(200):
        middle = (low + high) / 2
        if (x - middle).clip(0).sum() > total:
            low = middle
        else:
            high = middle
    return (x - high).clip(0)


def projected(onto: str) -> Callable[..., Leaves]:
    def one(x: Tensor) -> Tensor:
        if not x.numel() or onto == "non_negative":
            return x.clip(0)
        if onto == "box":
            return x.clip(-0.4, 0.9)
        if onto == "l2_ball":
            return x * min(1.0, 0.8 / norm([x]).item())
        if onto == "simplex":
            return on_simplex(x, 0.7)
        return x if x.abs().sum() <= 0.7 else x.sign() * on_simplex(x.abs(), 0.7)

    return lambda new, old: [one(x) for x in new]


@dataclass(frozen=True)
class Link:
    """A stage, and the same by hand."""

    make: Callable[..., Any]
    by_hand: Callable[..., Leaves]
    before: bool = True
    hyper: Mapping[str, float] = field(default_factory=dict)
    kernels: bool = True  #: whether it leaves the rule to kernels

    def chain(self, **given: Any) -> fo.Optimizer:
        stage, sgd = self.make(**self.hyper), fo.sgd(lr=0.1, momentum=0.9)
        return fo.chain(stage, sgd) if self.before else fo.chain(sgd, stage)


def onto(name: str, kernels: bool, **hyper: float) -> Link:
    function = getattr(fo.projections, name)
    return Link(
        lambda **values: fo.project(function, **values),
        projected(name), before=False, hyper=hyper, kernels=kernels,
    )  # fmt: skip


LINKS = {
    "clip_by_global_norm": Link(fo.clip_by_global_norm, clipped, hyper={"max_norm": 0.7}),
    "clip_by_value": Link(fo.clip_by_value, clamped, hyper={"max_value": 0.6}),
    "clip_by_block_rms": Link(
        fo.clip_by_block_rms, rms_clipped, hyper={"threshold": 0.8}
    ),
    "normalize": Link(fo.normalize, normalized),
    "centralize": Link(fo.centralize, centralized, kernels=False),
    "add_decayed_weights": Link(
        fo.add_decayed_weights, decayed, hyper={"weight_decay": 0.3}
    ),
    "zero_nans": Link(fo.zero_nans, without_nans),
    "trust_region": Link(
        fo.trust_region, in_region, before=False, hyper={"ratio": 0.05, "floor": 1.5}
    ),
    "non_negative": onto("non_negative", True),
    "box": onto("box", True, low=-0.4, high=0.9),
    "l2_ball": onto("l2_ball", True, radius=0.8),
    "l1_ball": onto("l1_ball", False, radius=0.7),
    "simplex": onto("simplex", False, total=0.7),
}
AVERAGES = {
    "ema": lambda: fo.ema(0.8),
    "ema-biased": lambda: fo.ema(0.8, debias=False),
    "polyak": lambda: fo.polyak(0.5),
    "lookahead": lambda: fo.lookahead(2, 0.3),
}


def parted() -> fo.Optimizer:
    """What is more than one rule, around which links run in turn."""
    return fo.partition(
        {"a": fo.sgd(lr=0.1, momentum=0.9), "b": fo.adamw(lr=0.1, eps=0.01)},
        fo.by_name({"*w*": "a"}, default="b"),
    )


CHAINS: dict[str, Callable[[], fo.Optimizer]] = {
    **{name: link.chain for name, link in LINKS.items()},
    **{
        name: lambda stage=stage: fo.chain(fo.adamw(lr=0.1, eps=0.01), stage())
        for name, stage in AVERAGES.items()
    },
    "many": lambda: fo.chain(
        fo.zero_nans(),
        fo.clip_by_value(0.9),
        fo.clip_by_global_norm(0.7),
        fo.add_decayed_weights(0.1),
        fo.normalize(),
        fo.adamw(lr=0.1, eps=0.01),
        fo.ema(0.8),
        fo.lookahead(2),
        fo.ema(0.5),
    ),
    "cautious": lambda: fo.cautious(fo.adamw(lr=0.1, eps=0.01)),
    "over a partition": lambda: fo.chain(
        fo.clip_by_global_norm(0.7), parted(), fo.ema(0.8)
    ),
    "before a partition": lambda: fo.chain(fo.clip_by_global_norm(0.7), parted()),
    "after a partition": lambda: fo.chain(parted(), fo.ema(0.8)),
}
EXACT = {name for name, link in LINKS.items() if link.kernels} | {*AVERAGES, "many"}


def steps(opt: fo.Optimizer, params: Tree, count: int = STEPS, **given: Any) -> Any:
    state = opt.init(params)
    for k in range(count):
        params, state = opt.update(random_like(params, 50 + k), state, params, **given)
    return params, state


@pytest.mark.parametrize("name", LINKS)
def test_a_stage_does_what_is_said_of_it(name: str):
    link, params = LINKS[name], mixed()
    opt, sgd = link.chain(), fo.sgd(lr=0.1, momentum=0.9)
    state, inner = opt.init(params), sgd.init(params)
    leaves, structure = tree.flatten(params)
    for k in range(STEPS):
        grads = random_like(params, 50 + k)
        params, state = opt.update(grads, state, params)
        g = tree.leaves(grads)
        g = link.by_hand(g, leaves) if link.before else g
        new, inner = sgd.update(
            tree.unflatten(structure, g), inner, tree.unflatten(structure, leaves)
        )
        made = tree.leaves(new)
        leaves = made if link.before else link.by_hand(made, leaves)
        assert_close(tree.leaves(params), leaves, 1e-14)
    plain = steps(sgd, mixed())[0]
    differ = [x for x, y in zip(leaves, tree.leaves(plain)) if not torch.equal(x, y)]
    assert differ or name == "zero_nans"


@pytest.mark.parametrize("maximize", [False, True])
def test_what_is_cautious_moves_where_its_step_and_the_gradient_agree(maximize: bool):
    """A gradient of 0 agrees with no step, and what moves makes up for what does not."""
    inner = fo.sgd(lr=0.1, momentum=0.9, maximize=maximize)
    opt = fo.cautious(inner, maximize=maximize)
    p, sign = random_like(torch.empty(6).double(), 1), -1.0 if maximize else 1.0
    state = opt.init(p)
    counts = []
    for k in range(STEPS):
        g = random_like(p, 50 + k) * (torch.arange(6) != k)
        step = p - inner.update(g, state, p)[0]
        agree = sign * step * g > 0
        expected = p - step * agree / max(agree.sum().item() / 6, 1e-3)
        p, state = opt.update(g, state, p)
        assert_close(p, expected, 1e-14)
        counts.append(agree.sum().item())
    assert min(counts) < 5 and max(counts) > 1
    still, _ = opt.update(0 * p, state, p)
    assert torch.equal(still, p)


def test_what_is_cautious_makes_up_for_no_more_than_a_thousand():
    opt, p, g = fo.cautious(fo.sgd(lr=0.1)), torch.zeros(2500), torch.zeros(2500)
    for agreeing, factor in ((2, 1000.0), (5, 500.0)):
        g[:agreeing] = 1.0
        new, _ = opt.update(g, opt.init(p), p)
        assert_close(new, -0.1 * factor * g, 1e-6)


def test_nans_are_zeros():
    opt = fo.chain(fo.zero_nans(), fo.sgd(lr=1.0))
    grads = torch.tensor([torch.nan, torch.inf, 2.0])
    for execution in (None, "foreach", "reference"):
        new, _ = opt.update(
            grads, opt.init(torch.zeros(3)), torch.zeros(3), execution=execution
        )
        assert new.tolist() == [0.0, -torch.inf, -2.0]


NARROW = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("executor", ["native", "foreach"])
@pytest.mark.parametrize(
    "dtype",
    [torch.float64, *(pytest.param(x, marks=pytest.mark.slow) for x in NARROW)],
    ids=str,
)
@pytest.mark.parametrize("name", sorted(EXACT))
def test_kernels_run_the_whole_chain(name: str, dtype: torch.dtype, executor: str):
    opt, params = CHAINS[name](), mixed(dtype)
    found = steps(opt, params, execution=executor)
    tolerance = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    assert_close(found, steps(opt, params, execution="reference"), tolerance)
    assert_moved(found[0], params, everywhere=False)


@pytest.mark.parametrize("executor", ["native", "foreach"])
@pytest.mark.parametrize(
    "dtype", [torch.float64, pytest.param(torch.float32, marks=pytest.mark.slow)], ids=str
)
@pytest.mark.parametrize("name", sorted(EXACT))
def test_stages_are_a_few_bits_away(name: str, dtype: torch.dtype, executor: str):
    """By what they add over a leaf of 90,000 numbers, or over the tree."""
    opt = CHAINS[name]()
    like = {"w": torch.empty(300, 301, dtype=dtype), "b": torch.empty(7, dtype=dtype)}
    params = random_like(like, 1)
    state = opt.init(params)
    for k in range(3):
        grads, before = random_like(like, 10 + k), params
        found, _ = opt.update(grads, state, before, execution=executor)
        params, state = opt.update(grads, state, before, execution="reference")
        for key, p in before.items():
            assert units_of_largest(found[key], params[key], p) <= 2
    assert_moved(params, random_like(like, 1), everywhere=False)


def test_lookahead_goes_back_after_every_k_steps():
    opt, sgd = fo.chain(fo.sgd(lr=0.1), fo.lookahead(2, 0.3)), fo.sgd(lr=0.1)
    p = slow = expected = random_like(torch.empty(3).double(), 1)
    state = opt.init(p)
    for k in range(STEPS):
        g = random_like(p, 50 + k)
        p, state = opt.update(g, state, p)
        expected = sgd.update(g, sgd.init(expected), expected)[0]
        if k % 2:
            slow = expected = slow + 0.3 * (expected - slow)
        assert_close([p, opt.eval_params(state, p)], [expected, slow], 1e-14)


def test_noise_fades_and_is_asked_for():
    opt, p = fo.chain(fo.add_noise(eta=0.25, gamma=2.0), fo.sgd(lr=1.0)), torch.zeros(3)
    noise, state = torch.tensor([1.0, -2.0, 0.0]), opt.init(torch.zeros(3))
    for size in (0.5, 0.25, 0.5 / 3):
        p, state = opt.update(torch.zeros(3), state, p * 0, noise=noise)
        assert_close(p, -size * noise, 1e-7)
    with pytest.raises(fo.HyperparameterError, match="normal_like"):
        opt.update(torch.zeros(3), state, p)


@pytest.mark.parametrize("case", ENDS, ids=str)
def test_a_stage_that_does_nothing_changes_nothing(case: Case):
    """Around every rule of the table, whatever it asks of its leaves."""
    params = case.mixed()
    inner = case.optimizer(**case.floats())
    opt = fo.chain(fo.clip_by_value(1e9), inner, fo.ema(0.5))
    expected = steps(inner, params, 3, execution="reference")
    found, state = steps(opt, params, 3, execution="reference")
    assert_same(found, expected[0])
    assert_same({k: v for k, v in state.items() if "ema" not in k}, expected[1])


def test_a_chain_asks_of_leaves_what_its_optimizer_asks():
    opt = fo.chain(fo.clip_by_global_norm(1.0), fo.muon())
    with pytest.raises(fo.StructureError, match="takes matrices.*'bias'.*partition"):
        opt.init({"weight": torch.ones(2, 2), "bias": torch.ones(2)})


def test_clipping_costs_a_read_more_and_no_write():
    """One kernel for the norm, which writes nothing; one for the step."""
    opt, params = fo.chain(fo.clip_by_global_norm(1.0), fo.adamw()), mixed()
    groups = fo.plan(opt, params).groups
    assert [group.choice.name for group in groups] == ["native", "native"]
    measure, step = (group.rule.program(group.kinds, torch.float64) for group in groups)
    assert not any(map(measure.is_stream, measure.outputs))
    assert [len(sweep.outputs) for sweep in step.passes] == [3]


@pytest.mark.parametrize("name", CHAINS)
def test_vmap_is_a_loop(name: str):
    opt = CHAINS[name]()
    rows = []
    for k in range(3):
        params = mixed(seed=k)
        rows.append((mixed(seed=9 + k), steps(opt, params, 2 * k)[1], params))
    stacked = tree.map(lambda *x: torch.stack(x), rows[0], *rows[1:])
    expected = [opt.update(*row) for row in rows]
    expected = tree.map(lambda *x: torch.stack(x), expected[0], *expected[1:])
    given, rebuild = tree.without_none(stacked)  # vmap knows None as no leaf

    def update(leaves: Leaves) -> Leaves:
        return tree.without_none(opt.update(*rebuild(leaves)))[0]

    assert_close(vmap(update)(given), tree.without_none(expected)[0], 1e-13)


def unrolled(opt: fo.Optimizer, first: Tree, grads: list[Tree], hyper: Any) -> Tree:
    """Where the steps lead, and what would be evaluated there."""
    params, state = first, opt.init(first)
    for g in grads:
        params, state = opt.update(g, state, params, **hyper)
    return params, opt.eval_params(state, params)


@pytest.mark.slow
@pytest.mark.parametrize("name", CHAINS)
def test_derivatives(name: str):
    """By parameters, gradients and every number that the chain has."""
    opt, params = CHAINS[name](), small()
    hyper = {
        key: torch.tensor(value, dtype=torch.float64)
        for key, value in opt.hyper.items()
        if isinstance(value, float) and value
    }
    grads = [random_like(params, 60 + k) for k in range(3)]
    leaves, structure = tree.flatten((params, grads, hyper))
    leaves = [x.clone().requires_grad_() for x in leaves]

    def function(*leaves: Tensor) -> tuple[Tensor, ...]:
        return tuple(tree.leaves(unrolled(opt, *tree.unflatten(structure, leaves))))

    assert torch.autograd.gradcheck(function, leaves)
    plain = tuple(x.detach() for x in leaves)
    forward: Any = jvp(function, plain, tuple(map(torch.ones_like, plain)))[1]
    total = grad(lambda x: sum(y.sum() for y in function(*x)))(plain)
    assert_close(sum(x.sum() for x in forward), sum(x.sum() for x in total), 1e-10)


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        *(
            pytest.param(x, marks=pytest.mark.slow)
            for x in (torch.float64, torch.float16, torch.bfloat16)
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", CHAINS)
def test_derivatives_are_finite_where_all_is_zero(name: str, dtype: torch.dtype):
    opt = CHAINS[name]()
    params = {"w": torch.zeros(2, 3, dtype=dtype), "b": torch.zeros((), dtype=dtype)}
    hyper = {
        key: torch.tensor(value, dtype=torch.float64)
        for key, value in opt.hyper.items()
        if isinstance(value, float)
    }

    def loss(params: Tree, g: Tree, hyper: Any) -> Tensor:
        new, _ = unrolled(opt, params, [g, g], hyper)
        return sum(x.float().sum() for x in tree.leaves(new))  # type: ignore[return-value]

    zeros = tree.map(torch.zeros_like, params)
    for g in tree.leaves(grad(loss, (0, 1, 2))(params, zeros, hyper)):
        assert g.isfinite().all()
    new, _ = steps_on(opt, zeros, params)
    assert all(x.isfinite().all() for x in tree.leaves(new))


def steps_on(opt: fo.Optimizer, grads: Tree, params: Tree) -> Any:
    return opt.update(grads, opt.init(params), params)


@pytest.mark.parametrize("name", CHAINS)
def test_pure_or_donated(name: str):
    opt, params = CHAINS[name](), mixed(torch.float32)
    expected = steps(opt, params)
    assert_same(params, mixed(torch.float32))
    own = tree.map(torch.clone, params)
    state, first = opt.init(own), tree.leaves(own)
    held = tree.leaves(state)
    for k in range(STEPS):
        own, state = opt.update(random_like(own, 50 + k), state, own, donate=True)
    assert_close((own, state), expected, 1e-6)
    assert all(a is b for a, b in zip(tree.leaves(own), first, strict=True))
    assert all(a is b for a, b in zip(tree.leaves(state), held, strict=True))


@pytest.mark.parametrize("name", CHAINS)
def test_the_state_keeps_its_form(name: str):
    opt, params = CHAINS[name](), mixed(torch.float32)
    state = opt.init(params)
    _, later = steps(opt, params)
    assert tree.paths(tree.flatten(state)[1]) == tree.paths(tree.flatten(later)[1])
    for a, b in zip(*(tree.without_none(x)[0] for x in (state, later)), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
    own, theirs = (
        {x.data_ptr() for x in tree.without_none(value)[0] if x.numel()}
        for value in (state, params)
    )
    assert not own & theirs


@pytest.mark.parametrize("name", CHAINS)
def test_a_leaf_without_a_gradient_stays(name: str):
    opt, params = CHAINS[name](), mixed()
    _, state = steps(opt, params, 2)
    leaves, structure = tree.flatten(random_like(params, 3))
    gaps = tree.unflatten(structure, [None, *leaves[1:]])
    new, _ = opt.update(gaps, state, params)
    assert tree.leaves(new)[0] is tree.leaves(params)[0]
    assert tree.leaves(new)[1] is not tree.leaves(params)[1]


@pytest.mark.parametrize("donate", [False, True])
def test_what_moves_without_a_gradient_goes_through_the_stages_after_it(donate: bool):
    """`accumulate` steps a leaf by earlier gradients, with none in the call itself."""
    opt = fo.chain(
        fo.accumulate(fo.sgd(lr=1.0), 2),
        fo.project(fo.projections.box, low=-2.5, high=9.0),
        fo.polyak(start=1.0),
    )
    params = {"a": torch.zeros(1), "b": torch.zeros(1), "c": torch.zeros(1)}
    state, g = opt.init(params), torch.ones(1)
    for grads in ({"a": g, "b": 3 * g, "c": None}, {"a": g, "b": None, "c": None}):
        params, state = opt.update(grads, state, params, donate=donate)
    assert [p.item() for p in params.values()] == [-1.0, -2.5, 0.0]
    assert_same(opt.eval_params(state, params), params)
    assert state["parameter_stages"]["step"].tolist() == [2, 2, 0]


@pytest.mark.parametrize("around", [fo.master_weights, fo.as_torchopt])
def test_what_is_made_anew_without_moving_is_no_step_of_the_stages(around: Any):
    """Another tensor of the same value, where there was no gradient."""
    opt = around(fo.sgd(lr=1.0))
    opt = opt if isinstance(opt, fo.Optimizer) else fo.from_transform(opt)
    opt = fo.chain(opt, fo.polyak())
    params = {k: torch.zeros(1, dtype=torch.bfloat16) for k in "ab"}
    state, g = opt.init(params), torch.ones(1, dtype=torch.bfloat16)
    for grads in ({"a": g, "b": g}, {"a": g, "b": None}, {"a": g, "b": g}):
        params, state = opt.update(grads, state, params)
    assert state["parameter_stages"]["step"].tolist() == [3, 2]
    averages = opt.eval_params(state, params)
    assert [x.item() for x in averages.values()] == [-2.0, -1.5]


def test_an_optimizer_that_asks_for_the_loss():
    """It is asked at the parameters; stages are for the gradients that are given."""
    params = {"w": torch.tensor([2.0, -1.0]).double()}

    def loss_fn(p: Any) -> Tensor:
        return (p["w"] ** 2).sum()

    for inner in (fo.lbfgs(max_iter=2), fo.sam(fo.sgd(lr=0.1))):
        opt = fo.chain(fo.zero_nans(), inner, fo.ema(0.5))
        grads = grad(loss_fn)(params)
        new, _ = opt.update(grads, opt.init(params), params, loss_fn=loss_fn)
        plain, _ = inner.update(grads, inner.init(params), params, loss_fn=loss_fn)
        assert_same(new, plain)
        assert loss_fn(new) < loss_fn(params)


def test_the_stages_of_a_chain_of_chains_keep_their_place():
    for several in (
        (fo.clip_by_value(0.5),),
        (fo.clip_by_global_norm(0.5), fo.clip_by_value(0.2), fo.normalize()),
    ):
        inner = fo.chain(*several, fo.sgd(lr=0.1))
        outer = fo.chain(fo.add_decayed_weights(0.2), inner, fo.ema(0.5))
        flat = fo.chain(
            fo.add_decayed_weights(0.2), *several, fo.sgd(lr=0.1), fo.ema(0.5)
        )
        assert_same(steps(outer, mixed()), steps(flat, mixed()))


def test_a_partition_is_clipped_by_the_norm_of_all():
    """Also where each part could be clipped by its own: that is another thing."""
    params = {"a": torch.zeros(1), "b": torch.zeros(1)}
    grads = {"a": torch.tensor([6.0]), "b": torch.tensor([8.0])}
    parts = {"a": fo.sgd(lr=1.0), "b": fo.sgd(lr=2.0)}
    opt = fo.chain(fo.clip_by_global_norm(5.0), fo.partition(parts, {"a": "a", "b": "b"}))
    new, _ = opt.update(grads, opt.init(params), params)
    assert torch.allclose(new["a"], torch.tensor([-3.0]))
    assert torch.allclose(new["b"], torch.tensor([-8.0]))


def test_a_name_that_is_taken_gets_its_owners_before_it():
    opt = fo.chain(
        fo.add_decayed_weights(0.5), fo.add_decayed_weights(0.25), fo.adamw(lr=0.1)
    )
    own = {
        "add_decayed_weights_weight_decay": 0.5,
        "add_decayed_weights_2_weight_decay": 0.25,
    }
    assert {k: v for k, v in opt.hyper.items() if k.startswith("add")} == own
    assert opt.hyper["weight_decay"] == 0.01
    twice = fo.chain(fo.adamw(lr=0.1), fo.ema(0.5), fo.ema(0.9))
    own = ["ema", "ema_weight", "ema_ema", "ema_ema_weight"]
    assert list(twice.init(mixed()))[3:] == own


def test_what_to_evaluate_with():
    """The last average of a chain; without one what the optimizer says, or params."""
    params, box = [torch.zeros(2)], fo.project(fo.projections.box, low=-9.0, high=9.0)
    for after in ((fo.ema(0.9), fo.polyak()), (fo.polyak(), box)):
        opt = fo.chain(fo.sgd(lr=1.0), *after)
        p, state = params, opt.init(params)
        for _ in range(3):
            p, state = opt.update([torch.ones(2)], state, p)
        assert opt.eval_params(state, p)[0].tolist() == [-2.0, -2.0]
    opt = fo.chain(fo.clip_by_value(1.0), fo.sgd(lr=1.0))
    assert opt.eval_params(opt.init(params), params) is params


def test_before_the_first_step_a_schedule_is_asked_for_its_first_value():
    seen = []
    decay = fo.Schedule(lambda count: seen.append(count) or 0.5)
    opt = fo.chain(fo.sgd(lr=0.1), fo.ema(decay))
    params = [torch.ones(2)]
    assert torch.equal(opt.eval_params(opt.init(params), params)[0], params[0])
    assert seen == [0]


def test_an_average_by_a_decay_that_changes_weighs_what_it_holds():
    decay = fo.schedules.linear(0.8, start_factor=0.5, total_iters=3)
    opt, p = fo.chain(fo.sgd(lr=1.0), fo.ema(decay)), torch.tensor([3.0, -1.0])
    state, held, weight = opt.init(p), torch.zeros(2), 0.0
    for k in range(5):
        p, state = opt.update(torch.full((2,), k % 2 - 0.5), state, p)
        held = decay(k) * held + (1 - decay(k)) * p
        weight = decay(k) * weight + 1 - decay(k)
        torch.testing.assert_close(opt.eval_params(state, p), held / weight)
    still = opt.init(p)
    for _ in range(5):
        _, still = opt.update(torch.zeros(2), still, p)
    torch.testing.assert_close(opt.eval_params(still, p), p)
