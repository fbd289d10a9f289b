"""Nothing given is changed, and nothing returned shares memory with what was given."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from row import Case
from table import ENDS, MIXES
from torch import Tensor
from trees import random_like

import funcopt as fo
from funcopt import tree
from funcopt.hyper import Hyper
from funcopt.types import Tree

DTYPES = [torch.float32, torch.bfloat16]  # worked on as they are; as float32


def tensors(*trees: Any) -> list[Tensor]:
    return [leaf for leaf in tree.leaves(trees) if isinstance(leaf, Tensor)]


class Snapshot:
    """What a tensor is, apart from its name."""

    def __init__(self, *trees: Any) -> None:
        self.tensors = tensors(*trees)
        self.before = [self._look(x) for x in self.tensors]
        self.values = [x.detach().clone() for x in self.tensors]

    @staticmethod
    def _look(x: Tensor) -> tuple[Any, ...]:
        return x._version, x.data_ptr(), x.shape, x.stride(), x.requires_grad

    def assert_untouched(self) -> None:
        assert [self._look(x) for x in self.tensors] == self.before
        assert all(torch.equal(x, v) for x, v in zip(self.tensors, self.values))


def storages(*trees: Any) -> list[int]:
    """Where the numbers lie; an empty tensor has none."""
    return [x.untyped_storage().data_ptr() for x in tensors(*trees) if x.numel()]


def assert_apart(first: Sequence[int], second: Sequence[int]) -> None:
    assert first and second and not set(first) & set(second)


def assert_no_sharing(*trees: Any) -> None:
    found = storages(*trees)
    assert len(found) == len(set(found))


@pytest.mark.costly
@pytest.mark.parametrize("requires_grad", [False, True], ids=["plain", "requires_grad"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", MIXES, ids=str)
def test_init_and_update(case: Case, dtype: torch.dtype, requires_grad: bool):
    opt, params, hyper = case.optimizer(), case.mixed(dtype), case.tensors()
    for leaf in tensors(params):
        leaf.requires_grad_(requires_grad)
    seen = Snapshot(params)
    state = opt.init(params)
    assert_no_sharing(state, params)
    for step in range(3):
        grads = random_like(params, seed=step)
        given = Snapshot(grads, state, params, hyper)
        result = opt.update(grads, state, params, **hyper)
        given.assert_untouched()
        assert_no_sharing(*result, grads, state, params, hyper)
        params, state = result
    seen.assert_untouched()


@pytest.mark.parametrize("execution", ["native", "foreach", "reference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_rule_that_gives_back_what_it_is_given(dtype: torch.dtype, execution: str):
    """The gradient for a slot, and a slot as it was: each has memory of its own."""
    opt = fo.elementwise(
        lambda g, p, last, first, *, step, lr: (p - lr * last, g, first),
        name="late",
        slots={"last": torch.zeros_like, "first": torch.clone},
        hyper={"lr": Hyper(0.1)},
    )
    params = {"w": torch.ones(2, 3, dtype=dtype), "b": torch.ones((), dtype=dtype)}
    state = opt.init(params)
    for seed in range(2):
        grads = random_like(params, seed)
        new = opt.update(grads, state, params, execution=execution)
        assert_no_sharing(*new, grads, state, params)
        params, state = new
    assert all(map(torch.equal, tensors(state["last"]), tensors(grads)))


@pytest.fixture
def odd_defaults() -> Iterator[Callable[[], None]]:
    """What gives torch defaults that no tensor of the test has."""

    def set_them() -> None:
        torch.set_default_dtype(torch.bfloat16)
        torch.set_default_device("meta")

    yield set_them
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)


@pytest.mark.costly
@pytest.mark.parametrize("execution", [None, "reference"])
@pytest.mark.parametrize("case", ENDS, ids=str)
def test_the_defaults_of_torch_have_no_part(
    case: Case, execution: str | None, odd_defaults: Callable[[], None]
):
    opt, params, hyper = case.optimizer(), case.mixed(), case.tensors()
    grads = [random_like(params, seed=i) for i in range(3)]

    def end() -> list[Tensor]:
        p, state = params, opt.init(params)
        for g in grads:
            p, state = opt.update(g, state, p, execution=execution, **hyper)
        return tensors(p, state, opt.eval_params(state, p))

    expected = end()
    odd_defaults()
    for x, y in zip(end(), expected, strict=True):
        assert x.device == y.device and x.dtype is y.dtype and torch.equal(x, y)


@pytest.mark.costly
@pytest.mark.parametrize("case", MIXES, ids=str)
def test_where_a_hyperparameter_is_zero(case: Case):
    """lr = 0 gives the same numbers, but not the same memory."""
    opt, params = case.optimizer(), case.mixed()
    grads, state = random_like(params, seed=1), opt.init(params)
    result = opt.update(grads, state, params, lr=0.0)
    assert_no_sharing(*result, grads, state, params)


@pytest.mark.costly
@pytest.mark.parametrize("case", MIXES, ids=str)
def test_leaves_without_a_gradient_are_returned_themselves(case: Case):
    opt, params = case.optimizer(), case.mixed()
    state = opt.init(params)
    leaves, structure = tree.flatten(random_like(params, seed=1))
    still = [i for i in range(len(leaves)) if i % 2]
    grads = tree.unflatten(
        structure, [None if i % 2 else g for i, g in enumerate(leaves)]
    )
    given = Snapshot(grads, state, params)
    result = opt.update(grads, state, params)
    given.assert_untouched()
    kept = {id(tree.leaves(params)[i]) for i in still}
    assert {id(x) for x in tensors(result[0])} & {id(x) for x in tensors(params)} == kept


@pytest.mark.parametrize("case", ENDS, ids=str)
def test_partition_and_freeze(case: Case):
    params = case.mixed()
    grads, labels = random_like(params, seed=1), {"layers": "a", "empty": "b"}
    wrapped = [
        fo.partition({"a": case.optimizer(), "b": fo.sgd()}, labels),
        fo.freeze(case.optimizer(), {"layers": [False, True], "empty": False}),
    ]
    for opt, frozen in zip(wrapped, ([], tensors(params["layers"][1]))):
        state = opt.init(params)
        assert_apart(storages(state), storages(params))
        given = Snapshot(grads, state, params)
        new, state = opt.update(grads, state, params)
        given.assert_untouched()
        assert_apart(storages(state), storages(new, grads, params))
        assert sorted(set(storages(new)) & set(storages(params))) == sorted(
            storages(frozen)
        )


def loss(params: Tree, target: Tree) -> Tensor:
    parts = tree.map(lambda p, t: ((p - t) ** 2).sum(), params, target)
    return torch.stack(tree.leaves(parts)).sum()


@pytest.mark.parametrize("mode", ["reverse", "first_order"])
@pytest.mark.parametrize("case", ENDS, ids=str)
def test_unroll(case: Case, mode: Any):
    opt, params, target = case.optimizer(), case.mixed(seed=1), case.mixed(seed=2)
    _, state = opt.update(target, opt.init(params), params)
    buffers, hyper = {"mean": torch.zeros(3), "count": torch.tensor(0)}, case.tensors()

    def with_buffers(p: Tree, target: Tree, *, buffers: Tree) -> Tensor:
        buffers["mean"].add_(1.0)
        buffers["count"].add_(1)
        return loss(p, target)

    given = Snapshot(params, target, state, buffers, hyper)
    run = fo.unroll(
        opt,
        with_buffers,
        params,
        target,
        steps=4,
        state=state,
        hyper=hyper,
        buffers=buffers,
        grad_mode=mode,
        window=2,
    )
    given.assert_untouched()
    assert_apart(storages(run), storages(params, target, state, buffers, hyper))
    assert run.buffers["count"] == 4 and run.buffers["mean"].tolist() == [4.0] * 3


@pytest.mark.costly
@pytest.mark.parametrize("path", ["vmap", "loop"])
@pytest.mark.parametrize("case", ENDS, ids=str)
def test_meta_value_and_grad(case: Case, path: Any):
    opt, steps = case.optimizer(), case.row.warm + 1
    theta = {"params": case.mixed(seed=1), "hyper": case.tensors()}
    targets = tree.map(lambda x: torch.stack([x, -x]), case.mixed(seed=2))

    def task_loss(theta: Tree, target: Tree) -> tuple[Tensor, Tensor]:
        run = fo.unroll(
            opt, loss, theta["params"], target, steps=steps, hyper=theta["hyper"]
        )
        return loss(run.params, target), run.losses

    given = Snapshot(theta, targets)
    result = fo.meta.value_and_grad(task_loss, tasks=path, has_aux=True)(theta, targets)
    given.assert_untouched()
    assert_apart(storages(result), storages(theta, targets))
    paths = tree.paths(tree.flatten(theta)[1])
    for path, slope in zip(paths, tensors(result[1]), strict=True):
        assert slope.any() or not slope.numel() or not case.drives(path), path
