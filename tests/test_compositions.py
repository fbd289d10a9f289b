"""Whatever stands around whatever: a step is one step, and its derivative is right."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from row import Case
from table import QUICK
from test_purity import Snapshot
from torch import Tensor
from torch.func import grad, vmap
from trees import assert_close, random_like, relative

import funcopt as fo
from funcopt import tree
from funcopt.types import Tree

pytestmark = pytest.mark.slow  # each draws many examples

Around = Callable[[fo.Optimizer], fo.Optimizer]
LABELS = fo.by_name({"a.*": "a"}, default="b")

#: what may stand around an optimizer, itself perhaps such a composition
AROUND: dict[str, Around] = {
    "clip_by_global_norm": lambda opt: fo.chain(fo.clip_by_global_norm(0.7), opt),
    "clip_by_block_rms": lambda opt: fo.chain(fo.clip_by_block_rms(0.5), opt),
    "add_decayed_weights": lambda opt: fo.chain(fo.add_decayed_weights(0.1), opt),
    "normalize": lambda opt: fo.chain(fo.normalize(), opt),
    "ema": lambda opt: fo.chain(opt, fo.ema(0.9)),
    "lookahead": lambda opt: fo.chain(opt, fo.lookahead(2)),
    "trust_region": lambda opt: fo.chain(opt, fo.trust_region(0.5)),
    "project": lambda opt: fo.chain(opt, fo.project(fo.projections.l2_ball, radius=5.0)),
    "cautious": fo.cautious,
    "accumulate": lambda opt: fo.accumulate(opt, 2),
    "skip_nonfinite": fo.skip_nonfinite,
    "master_weights": fo.master_weights,
    "sam": fo.sam,
    "freeze": lambda opt: fo.freeze(opt, fo.by_name({"b.*": True}, default=False)),
    "partition": lambda opt: fo.partition({"a": opt, "b": fo.sgd(lr=0.1)}, LABELS),
}
#: those of which a step is a smooth function
SMOOTH = [name for name in AROUND if name not in ("cautious", "clip_by_global_norm")]
WAYS: list[dict[str, Any]] = [
    {"remat": "step"},
    {"grad_mode": "mixed"},
    {"grad_mode": "mixed", "remat": "sqrt"},
]
CASES = [case for case in QUICK if case.row.name not in ("sgld", "sophia_g")]


class Composition(NamedTuple):
    case: Case
    around: list[str]

    def optimizer(self) -> fo.Optimizer | None:
        """None where two of them do not go together, which is said in a sentence."""
        opt = self.case.optimizer()
        try:
            for name in self.around:
                opt = AROUND[name](opt)
        except (TypeError, ValueError) as error:
            assert isinstance(error, fo.FuncoptError)
            return None
        return opt

    def params(self) -> Tree:
        """Five leaves of each kind, and three more that are alike."""
        first = self.case.mixed(seed=1)
        alike = [first["layers"][0]["weight"] * k for k in (2, 3, 4)]
        return {"a": first, "b": alike}


def compositions(cases: list[Case], around: list[str]) -> st.SearchStrategy[Composition]:
    lists = st.lists(st.sampled_from(around), min_size=1, max_size=4)
    return st.builds(Composition, st.sampled_from(cases), lists)


def bowl(p: Tree, _: Any = None) -> Tensor:
    """Smooth and coupled; its gradient is nowhere near zero."""
    total = torch.stack([torch.exp(x / 3).sum() for x in tree.leaves(p)]).sum()
    return total + 0.01 * total**2


def examples(count: int) -> Any:
    return settings(max_examples=count, suppress_health_check=[HealthCheck.too_slow])


@examples(50)
@given(compositions(CASES, list(AROUND)), st.integers(0, 4))
def test_a_step_is_one_step(composition: Composition, gap: int):
    """By the reference, by what is chosen, and donated; gaps stay, inputs too."""
    opt = composition.optimizer()
    if opt is None:
        return
    params = composition.params()
    more: Any = {"loss_fn": bowl} if "loss_fn" in opt.hyper else {}
    state = opt.init(params)
    for seed in range(3):
        leaves, structure = tree.flatten(random_like(params, seed))
        at = (gap + seed) % len(leaves)
        grads = [None if i == at else g for i, g in enumerate(leaves)]
        given_grads = tree.unflatten(structure, grads)
        snapshot = Snapshot(given_grads, state, params)
        expected = opt.update(given_grads, state, params, execution="reference", **more)
        found = opt.update(given_grads, state, params, **more)
        snapshot.assert_untouched()
        own = tree.map(torch.clone, (state, params))
        donated = opt.update(given_grads, *own, donate=True, **more)
        assert_close(found, expected, 1e-9)
        assert_close(donated, expected, 1e-9)
        if "accumulate" not in composition.around:  # which goes by the last gradients
            old, new = (tree.leaves(p)[at] for p in (params, found[0]))
            assert torch.equal(old, new)
        params, state = found


@examples(30)
@given(
    compositions([case for case in CASES if case.row.smooth], SMOOTH),
    st.sampled_from(WAYS),
)
def test_a_meta_gradient_is_right(composition: Composition, way: dict[str, Any]):
    """Against central differences; and the same in every way, and for tasks at once."""
    opt = composition.optimizer()
    if opt is None:
        return
    params = composition.params()

    def end(p: Tree, **way: Any) -> Tensor:
        run = fo.unroll(opt, bowl, p, steps=2, **way)
        return sum(torch.sin(x).sum() for x in tree.leaves(run.params)) + run.losses.sum()

    slopes, along = grad(end)(params), random_like(params, 7)
    assert_close(grad(lambda p: end(p, **way))(params), slopes, 1e-9)
    many = tree.map(lambda p: torch.stack([p, 1.1 * p]), params)
    each = vmap(grad(lambda p: end(p, **way)))(many)
    assert_close(tree.map(lambda x: x[0], each), slopes, 1e-7)
    slope = torch.stack([(s * d).sum() for s, d in _pairs(slopes, along)]).sum()
    found = [_central(end, params, along, h) for h in (1e-4, 1e-5, 1e-6)]
    assert min(relative(x, slope) for x in found) <= 1e-5


def _pairs(*trees: Tree) -> Any:
    return zip(*map(tree.leaves, trees))


def _central(end: Callable[..., Tensor], p: Tree, along: Tree, h: float) -> Tensor:
    def moved(by: float) -> Tensor:
        return end(tree.map(lambda x, d: x + by * d, p, along))

    return (moved(h) - moved(-h)) / (2 * h)
