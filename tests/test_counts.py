"""The host knows the steps of leaves on an accelerator, and waits for no read of them."""

import copy
import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from trees import assert_close, random_like

import funcopt as fo
from funcopt import tree
from funcopt.execution import concrete
from funcopt.stepping import counts, vmapped
from funcopt.types import State, Tree

LIKE = {"w": torch.empty(4, 3), "b": torch.empty(5), "c": torch.empty(2)}


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """Steps lie on an accelerator, as it were; those vectors that are waited for."""
    found: list[Tensor] = []
    original = counts._waited_for

    def spy(steps: Tensor) -> list[int]:
        found.append(steps)
        return original(steps)

    monkeypatch.setattr(concrete, "on_host", lambda x: x.dtype is not torch.int64)
    monkeypatch.setattr(counts, "_waited_for", spy)
    yield found


def gradients(count: int, resting: str = "") -> list[Tree]:
    made = [random_like(LIKE, 10 + k) for k in range(count)]
    return [{**g, resting: None} for g in made] if resting else made


def steps(
    opt: fo.Optimizer, params: Tree, state: State, grads: list[Tree], **how: Any
) -> tuple[Tree, State]:
    for g in grads:
        params, state = opt.update(g, state, params, **how)
    return params, state


def assert_same(found: tuple[Tree, State], expected: tuple[Tree, State]) -> None:
    pairs = zip(tree.leaves(found), tree.leaves(expected), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


OPTIMIZERS: dict[str, Callable[[], fo.Optimizer]] = {
    "adamw": lambda: fo.adamw(lr=0.1),
    "a schedule": lambda: fo.adam(lr=fo.schedules.exponential(0.1, 0.5)),
    "a rate in a tensor": lambda: fo.adam(lr=torch.tensor(0.1)),
    "two ways": lambda: fo.adamw(lr=0.1, weight_decay={"w": 0.1, "b": 0.0, "c": 0.0}),
    "a total": lambda: fo.chain(fo.clip_by_global_norm(1.0), fo.radam(lr=0.1)),
    "numbers of its own": lambda: fo.nadam(lr=0.1),
    "leaves that are whole": lambda: fo.lamb(lr=0.1),
}
HOW: dict[str, dict[str, Any]] = {"pure": {}, "in place": {"donate": True}}


@pytest.mark.parametrize("resting", ["", "b"], ids=["all step", "one rests"])
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_loop_waits_for_nothing(
    name: str, how: str, resting: str, waits: list[Tensor], monkeypatch: Any
):
    def run() -> tuple[Tree, State]:
        opt, params = OPTIMIZERS[name](), random_like(LIKE, 1)
        return steps(opt, params, opt.init(params), gradients(6, resting), **HOW[how])

    found = run()
    assert not waits
    monkeypatch.undo()
    assert_same(found, run())


def test_a_vector_from_elsewhere_is_waited_for_once(waits: list[Tensor]):
    opt, params, grads = fo.adamw(lr=0.1), random_like(LIKE, 1), gradients(4)
    state = {**opt.init(params), "step": torch.tensor([3, 3, 7])}
    steps(opt, params, state, grads)
    assert [*map(id, waits)] == [id(state["step"])]


def test_what_is_written_over_is_waited_for_again(waits: list[Tensor]):
    opt, params, grads = fo.adamw(lr=0.1), random_like(LIKE, 1), gradients(4)
    params, state = steps(opt, params, opt.init(params), grads[:2])
    assert not waits
    state["step"].fill_(20)
    found = opt.update(grads[2], state, params)
    assert [*map(id, waits)] == [id(state["step"])]
    fresh = {**state, "step": torch.tensor([20, 20, 20])}
    assert_same(found, fo.adamw(lr=0.1).update(grads[2], fresh, params))


def test_of_inference_tensors_no_version_is_asked(waits: list[Tensor]):
    opt, params, grads = fo.adamw(lr=0.1), random_like(LIKE, 1), gradients(3)
    with torch.inference_mode():
        params, state = steps(opt, params, opt.init(params), grads)
    assert len(waits) == 3 and state["step"].tolist() == [3, 3, 3]


@pytest.mark.parametrize("how", HOW)
def test_what_a_graph_was_captured_with_is_never_remembered(
    how: str, waits: list[Tensor], monkeypatch: pytest.MonkeyPatch
):
    opt, params, grads = fo.adamw(lr=0.1), random_like(LIKE, 1), gradients(4)
    params, state = steps(opt, params, opt.init(params), grads[:2], **HOW[how])
    held = state["step"]
    del waits[:]
    with monkeypatch.context() as capture:
        capture.setattr(counts, "_is_capturing", lambda _: True)
        opt.update(grads[2], state, params, **HOW[how])
    assert not waits
    with _unsafe_preserve_version_counter(held):
        held.fill_(9)  # as replays would
    for _ in range(3):
        found = opt.update(grads[3], {**state, "step": held}, params, **HOW[how])
        expected = held + (how == "pure")
        assert torch.equal(found[1]["step"], expected)


def test_what_is_dropped_is_forgotten(waits: list[Tensor]):
    opt, params = fo.adamw(lr=0.1), random_like(LIKE, 1)
    state = opt.init(params)
    params, state = steps(opt, params, state, gradients(5))
    gc.collect()
    known = [x for x in gc.get_objects() if isinstance(x, counts.Counts) and x._known]
    assert [len(x._known) for x in known] == [1]
    assert copy.deepcopy(opt).update(params, state, params)[1]["step"].tolist() == [6] * 3


@pytest.mark.parametrize("own", [False, True], ids=["a rate", "each task's rate"])
@pytest.mark.parametrize("name", ["adamw", "a schedule"])
def test_tasks_step_as_one(
    name: str, own: bool, waits: list[Tensor], monkeypatch: pytest.MonkeyPatch
):
    """By vmap around a loop that begins with ``init``: what all tasks share is known."""
    taken: list[bool] = []
    original = vmapped.again

    def spy(*given: Any) -> Any:
        taken.append((made := original(*given)) is not None)
        return made

    monkeypatch.setattr(vmapped, "again", spy)
    opt = OPTIMIZERS[name]()
    rates = torch.tensor([0.1, 0.2, 0.4], dtype=torch.float64)
    params = tree.map(lambda x: torch.stack([x, 2 * x, 3 * x]), random_like(LIKE, 1))

    grads = gradients(4)

    def run(p: Tree, rate: Tensor) -> Tree:
        how = {"lr": rate} if own else {}
        return steps(opt, p, opt.init(p), grads, **how)[0]

    torch.vmap(run)(params, rates)
    found = torch.vmap(run)(params, rates)
    assert all(taken[4:]) and not waits
    monkeypatch.undo()
    each = [tree.unflatten(tree.flatten(params)[1], x) for x in zip(*tree.leaves(params))]
    expected = [run(p, rate) for p, rate in zip(each, rates)]
    assert_close(found, tree.map(lambda *x: torch.stack(x), *expected), 1e-6)


@pytest.mark.parametrize("in_turn", [False, True], ids=["all", "in turn"])
def test_the_adapters_counts_are_known(
    in_turn: bool, waits: list[Tensor], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(concrete, "on_host", lambda x: x.ndim != 1)  # vectors alone
    start = [random_like(torch.empty(3, 2), seed) for seed in range(4)]
    mine, other = ([x.clone().requires_grad_() for x in start] for _ in range(2))
    ours, torchs = fo.torch_optim.AdamW(mine), torch.optim.AdamW(other)
    for k in range(12):
        for i, (p, q) in enumerate(zip(mine, other)):
            g = random_like(torch.empty(3, 2), 10 * k + i)
            p.grad, q.grad = (None, None) if in_turn and i % 3 == k % 3 else (g, g)
        ours.step()
        torchs.step()
    for p, q in zip(mine, other):
        torch.testing.assert_close(p, q)
        assert torch.equal(ours.state[p]["step"], torchs.state[q]["step"])
    first = [x for x in waits if x.dtype is torch.int64]  # of long steps, on a CPU
    assert len(waits) - len(first) <= (6 if in_turn else 2)
