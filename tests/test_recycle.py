"""Results are written into again once nobody holds any of them, and not before."""

import gc
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import dlpack

import funcopt as fo
from funcopt import tree
from funcopt.execution import executor
from funcopt.execution.call_signature import CallSignature
from funcopt.execution.executor import Maker
from funcopt.execution.native import objects
from funcopt.execution.recycle import Recycler
from funcopt.execution.rule import Rule
from funcopt.stepping.per_leaf import Hypers

SIZE = 100_000  # floats: more bytes than the allocator keeps at hand
SMALL = 40


def clipped(lr: Any) -> fo.Optimizer:
    return fo.chain(fo.clip_by_global_norm(1.0), fo.adam(lr=lr), fo.ema(0.9))


def large(seed: int, size: int = SIZE) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def graph(x: Tensor) -> Any:
    """A graph that needs the values of x, and holds them in C++ alone."""
    return (x * torch.ones_like(x, requires_grad=True)).sum()


def values_of_graph(loss: Any) -> Tensor:
    product = loss.grad_fn.next_functions[0][0]
    (leaf,) = (f.variable for f, _ in product.next_functions if f is not None)
    return torch.autograd.grad(loss, leaf)[0]


def within_grad(x: Tensor) -> list[Tensor]:
    """What a level that is gone wrapped: it holds the tensor in C++."""
    held: list[Tensor] = []
    torch.func.grad(lambda y: held.append(y) or y.sum())(x)
    return held


# What holds the tensor, and how its values are seen through that.
HOLDERS: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "a name": (lambda x: x, lambda x: x),
    "a list": (lambda x: [x], lambda held: held[0]),
    "a view": (lambda x: x[10:], lambda v: v),
    "a view of a view": (lambda x: x.view(10, -1)[1:], lambda v: v),
    "what is detached": (lambda x: x.detach(), lambda v: v),
    "an array": (lambda x: x.numpy(), torch.from_numpy),
    "a slice of an array": (lambda x: x.numpy()[5:], torch.from_numpy),
    "a capsule": (Tensor.__dlpack__, dlpack.from_dlpack),
    "the memory": (
        lambda x: x.untyped_storage(),
        lambda s: torch.empty(0).set_(s),
    ),
    "a graph": (graph, values_of_graph),
    "a parameter": (lambda x: torch.nn.Parameter(x), lambda x: x.detach()),
    "a gradient": (
        lambda x: setattr(y := torch.zeros_like(x, requires_grad=True), "grad", x) or y,
        lambda y: y.grad,
    ),
    "its data": (lambda x: x.data, lambda x: x),
    "a view of another dtype": (
        lambda x: x.view(torch.int32),
        lambda x: x.view(torch.float32),
    ),
    "a part of the memory": (
        lambda x: x.untyped_storage()[-8:],
        lambda s: torch.empty(0).set_(s),
    ),
    "a closure": (lambda x: lambda: x, lambda f: f()),
    "a wrapper of torch.func": (within_grad, lambda held: held[0]),
    "another's memory": (lambda x: torch.empty(0).set_(x.untyped_storage()), lambda y: y),
}


def run(steps: int, visit: Callable[[int, Tensor, Any], None], size: int = SIZE) -> None:
    opt, p = fo.adam(lr=0.1), large(0, size)
    state = opt.init(p)
    for step in range(steps):
        p, state = opt.update(large(step + 1, size), state, p)
        visit(step, p, state)


@pytest.mark.parametrize("size", [SMALL, SIZE])
@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.parametrize("at", [2, 5])
def test_what_is_held_is_not_written_over(holder: str, at: int, size: int):
    hold, look = HOLDERS[holder]
    held: list[Any] = []

    def visit(step: int, p: Tensor, state: Any) -> None:
        if step == at:
            kept = hold(p)
            held.append((kept, p.clone()))

    run(9, visit, size)
    ((kept, expected),) = held
    found = look(kept).flatten()
    assert torch.equal(found, expected[-found.numel() :])


@pytest.mark.parametrize("size", [SMALL, SIZE])
def test_what_nobody_holds_is(size: int):
    places: list[tuple[int, ...]] = []

    def visit(step: int, p: Tensor, state: Any) -> None:
        tensors = (p, state["exp_avg"], state["exp_avg_sq"])
        places.append(tuple(x.data_ptr() for x in tensors))

    run(12, visit, size)
    assert len(set(places[4:])) == 2  # two sets of buffers, in turns
    assert places[4::2] == [places[4]] * 4 and places[5::2] == [places[5]] * 4


def test_steps_that_no_lane_takes_recycle_too():
    """A rate with a value for each element."""
    opt, p, places = fo.adam(), large(0, SMALL), []
    state, lr = opt.init(p), torch.full((SMALL,), 0.1)
    for step in range(8):
        p, state = opt.update(large(step, SMALL), state, p, lr=lr)
        places.append(p.data_ptr())
    assert places[2::2] == [places[2]] * 3 and places[3::2] == [places[3]] * 3


def test_one_that_is_held_keeps_its_set():
    recycler, like = Recycler(), [large(0, n) for n in (3, 5)]
    held = recycler.columns(Maker(like), 2)[1][1]
    place = held.data_ptr()
    for _ in range(5):
        assert all(x is not held for c in recycler.columns(Maker(like), 2) for x in c)
    assert held.data_ptr() == place and held._version == 0


def test_what_a_weak_reference_sees_ends():
    """It would see another step's values in it, if it did not."""
    recycler, like = Recycler(), [large(0, SMALL)]
    seen = weakref.ref(recycler.columns(Maker(like), 1)[0][0])
    for _ in range(3):
        recycler.columns(Maker(like), 1)
    assert seen() is None


def marked(x: Tensor) -> None:
    x.mark = True  # pyright: ignore[reportAttributeAccessIssue]


def with_gradient(x: Tensor) -> None:
    x.grad = torch.ones_like(x)


def emptied(x: Tensor) -> None:
    x.untyped_storage().resize_(0)


def shortened(x: Tensor) -> None:
    """Where it is the tail of the memory that is gone."""
    x.untyped_storage().resize_(0)
    x.untyped_storage().resize_(16)


def moved(x: Tensor) -> None:
    """Into the memory of another tensor, that somebody holds."""
    OTHERS.append(torch.zeros_like(x))
    x.set_(OTHERS[-1].untyped_storage(), 0, x.shape, x.stride())


def traded(x: Tensor) -> None:
    """So that as many hold the old memory as ever."""
    OTHERS.append(x.detach())
    moved(x)


OTHERS: list[Tensor] = []
CHANGES: list[Callable[[Tensor], Any]] = [
    marked, with_gradient, emptied, shortened, moved, traded, Tensor.t_,
    Tensor.requires_grad_, lambda x: x.resize_(x.numel() // 2),
]  # fmt: skip


@pytest.mark.parametrize("size", [SMALL, SIZE])
@pytest.mark.parametrize("at", [0, 4])
@pytest.mark.parametrize("change", CHANGES)
def test_what_is_no_more_as_it_was_made_is_left(
    change: Callable[[Tensor], Any], at: int, size: int
):
    """Be it as it was when it is looked at first, or later."""
    like, recycler = [large(0, size).view(10, -1)], Recycler()
    for _ in range(at):
        recycler.columns(Maker(like), 1)
    x = recycler.columns(Maker(like), 1)[0][0]
    change(x)
    del x
    recycler.columns(Maker(like), 1)
    new = recycler.columns(Maker(like), 1)[0][0]
    assert (new.shape, new.stride()) == (like[0].shape, like[0].stride())
    assert not new.requires_grad and not new.__dict__ and new.grad is None
    assert new.untyped_storage().nbytes() == like[0].nbytes
    assert all(new.data_ptr() != x.data_ptr() for x in OTHERS)


def test_what_is_swapped_for_what_only_it_holds_is_written_over():
    """No harm is done: nobody else holds that memory."""
    like, recycler = [large(0, SMALL)], Recycler()
    recycler.columns(Maker(like), 1)[0][0].set_(torch.zeros(SMALL).untyped_storage())
    recycler.columns(Maker(like), 1)
    assert recycler.columns(Maker(like), 1)[0][0].shape == (SMALL,)


def test_other_shapes_are_other_tensors():
    recycler = Recycler()
    for k in range(12):
        like = [torch.empty(3 + k % 4), torch.empty(2, k % 3)]
        found = recycler.columns(Maker(like), 2)
        assert all([x.shape for x in c] == [x.shape for x in like] for c in found)


def test_other_counts_are_other_tensors():
    recycler, like = Recycler(), [large(0, SMALL)]
    for k in range(12):
        assert len(recycler.columns(Maker(like), 1 + k % 3)) == 1 + k % 3


def test_no_more_than_two_sets_of_a_kind_are_held():
    recycler, kinds = Recycler(), [[large(k) for k in range(n)] for n in (1, 4, 2)]
    for like in kinds:
        for _ in range(5):
            recycler.columns(Maker(like), 3)
    made = [len(x.tensors) for x in recycler._made]
    assert made == [12, 12, 6, 6]  # of the kind before these until their time is over


def test_tied_leaves_are_two_results():
    recycler, x, places = Recycler(), large(0), []
    for _ in range(6):
        (made, again) = recycler.columns(Maker([x, x]), 1)[0]
        assert made is not again and made.data_ptr() != again.data_ptr()
        places.append((made.data_ptr(), again.data_ptr()))
        del made, again
    assert len({*places}) == len(recycler._made) == 2


def test_what_has_not_been_asked_for_lately_is_let_go():
    recycler = Recycler()
    seen = weakref.ref(recycler.columns(Maker([large(0)]), 1)[0][0])
    for _ in range(9):
        assert seen() is not None
        recycler.columns(Maker([large(0, SMALL)]), 1)
    assert seen() is None


@pytest.mark.parametrize("kinds", range(1, 5))
def test_kinds_in_turns_recycle_each_its_own(kinds: int):
    """The groups of a tree, or two nets with one optimizer."""
    recycler, places = Recycler(), []
    for k in range(6 * kinds):
        made = recycler.columns(Maker([large(0, SMALL + k % kinds)]), 2)
        places.append([x.data_ptr() for column in made for x in column])
    first, *rounds = [places[k : k + 2 * kinds] for k in range(0, len(places), 2 * kinds)]
    assert rounds == [first] * 2


def test_groups_recycle():
    opt = fo.adam(lr={"w": 0.1, "b": 0.01}, weight_decay={"w": 0.1, "b": 0.0})
    params, places = {"w": large(0), "b": large(1, SMALL)}, []
    state = opt.init(params)
    for step in range(10):
        grads = {"w": large(step), "b": large(step, SMALL)}
        params, state = opt.update(grads, state, params)
        places.append([x.data_ptr() for x in params.values()])
    assert places[6::2] == [places[6]] * 2 and places[7::2] == [places[7]] * 2


def test_of_more_axes_than_a_tensor_holds_itself_none_is_kept():
    """Their order might have changed unseen."""
    like, recycler = [torch.zeros(1, 2, 1, 2, 3, 1)], Recycler()
    for _ in range(4):
        ((made,),) = recycler.columns(Maker(like), 1)
        assert made.stride() == like[0].stride()
        made.transpose_(0, 1)  # contiguous still


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_in_modes(mode: Callable[[], Any]):
    with mode():
        run(4, lambda *_: None)


def test_without_the_private_helpers(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(objects, "load", objects.InPython)
    recycler = Recycler()
    for _ in range(4):
        recycler.columns(Maker([large(0)]), 2)
    assert not recycler._made


@pytest.mark.parametrize("size", [SMALL, SIZE])
def test_two_threads_never_get_the_same_buffer(size: int):
    """One optimizer, one tree: each thread's results are those of a run of its own."""
    opt = fo.adam(lr=0.1)

    def worker(seed: int) -> Tensor:
        p = large(seed, size)
        state = opt.init(p)
        for step in range(10):
            p, state = opt.update(large(seed + step + 1, size), state, p)
        return p

    seeds = (0, 50, 100, 150) * 4
    expected = [worker(seed) for seed in seeds]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(worker, seeds))
    assert all(map(torch.equal, found, expected))


LOOKS = {
    "contiguous": torch.empty(3, 4),
    "transposed": torch.empty(3, 4).mT,
    "channels last": torch.empty(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "with gaps": torch.empty(6, 8)[::2, ::2],
    "expanded": torch.empty(3, 1).expand(3, 4),
    "0-d": torch.empty((), dtype=torch.float64),
    "empty": torch.empty(0, 3, dtype=torch.bfloat16),
    "half": torch.empty(5, dtype=torch.float16),
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("inference", [False, True])
def test_new_ones_look_like_the_old(
    masked: bool, inference: bool, monkeypatch: pytest.MonkeyPatch
):
    """Without the private helper, too."""
    assert executor._empty_strided_cpu is not None
    if masked:
        monkeypatch.setattr(executor, "_empty_strided_cpu", None)
    make = Maker([*LOOKS.values()])
    with torch.inference_mode(inference):
        made, expected = make(), executor.empty_like([*LOOKS.values()])
    for x, y in zip(made, expected, strict=True):
        assert (x.shape, x.stride(), x.dtype) == (y.shape, y.stride(), y.dtype)
        assert (x.is_inference(), x.requires_grad) == (y.is_inference(), False)
        assert type(x) is torch.Tensor and x.device == y.device
    assert not {x.data_ptr() for x in made if x.numel()} & {x.data_ptr() for x in make()}


@pytest.mark.parametrize("remat", ["step", "sqrt"])
def test_a_loop_that_is_dropped_takes_its_graph_along(remat: Any):
    """At once, though its steps are held by the optimizer, and that by its graph."""
    gc.collect()
    gc.disable()
    try:
        seen: list[Any] = []
        for _ in range(4):
            opt, p, batch = fo.adamw(), large(0).requires_grad_(), large(1)
            seen += map(weakref.ref, (p, batch))
            loss = lambda p, batch: ((p - batch) ** 2).sum()  # noqa: E731
            run = fo.unroll(opt, loss, p, batch, steps=6, remat=remat)
            assert run.params.grad_fn is not None
        del opt, p, batch, run
        assert not any(x() is not None for x in seen)
    finally:
        gc.enable()


@pytest.mark.parametrize("donate", [False, True])
def test_an_optimizer_that_is_dropped_takes_its_buffers_along(donate: bool):
    """At once: a loop may make one for each task."""
    opt, params = fo.adamw(), [torch.ones(1000)]
    state = opt.init(params)
    gc.collect()
    gc.disable()
    try:
        seen: list[Any] = []
        for _ in range(4):
            params, state = opt.update([torch.ones(1000)], state, params, donate=donate)
            seen += map(weakref.ref, tree.leaves((params, state)))
        del opt, params, state
        assert not any(x() is not None for x in seen)
    finally:
        gc.enable()


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("options", [{"remat": 1}, {"remat": 9}, {}], ids=str)
def test_no_graph_hangs_on_what_is_kept_to_be_written_into(options: Any, backward: bool):
    """It would hold the optimizer that holds it: an unroll would never be freed."""
    held: list[Any] = []

    def run() -> None:
        opt, scale = fo.adamw(), torch.ones(3)
        params = {name: torch.zeros(3, requires_grad=True) for name in "abc"}
        held.extend(map(weakref.ref, (opt, scale)))

        def loss(p: Any, _: Any) -> torch.Tensor:
            return torch.stack([(x - scale).square().sum() for x in p.values()]).sum()

        end = fo.unroll(opt, loss, params, steps=3, **options).params
        if backward:
            assert torch.autograd.grad(end["a"].sum(), params["a"])[0].all()

    run()
    gc.collect()
    assert not any(x() is not None for x in held)


def alive() -> int:
    """How many tensors there are, and objects of this library's that may hold some."""
    kinds = (Tensor, Recycler, Rule, CallSignature, Hypers)
    return sum(issubclass(type(x), kinds) for x in gc.get_objects())


@pytest.mark.slow
@pytest.mark.parametrize("tasks", ["loop", "vmap"])
@pytest.mark.parametrize("options", [{}, {"remat": 1}, {"grad_mode": "mixed"}], ids=str)
@pytest.mark.parametrize(
    "make", [fo.adamw, fo.lamb, clipped], ids=["adamw", "lamb", "chain"]
)
def test_an_optimizer_made_in_the_loss_is_gone_with_it(
    make: Any, options: Any, tasks: Any
):
    """At once, with its buffers and the rate that is learned: it is made at each call."""

    def loss(p: Any, target: Any) -> Tensor:
        return torch.stack([(x - target).square().sum() for x in p.values()]).sum()

    def task_loss(theta: Any, target: Tensor) -> Tensor:
        rate = theta["log"].exp()
        learned = {"hyper": {"lr": rate}} if "remat" in options else {}
        opt = make(lr=0.1 if learned else rate)
        how = {**learned, **options}
        return loss(fo.unroll(opt, loss, theta["init"], target, steps=3, **how).params, 0)

    init = {"w": large(0, SMALL), "b": large(1, SMALL)}
    theta = {"init": init, "log": torch.tensor(-2.0)}
    meta_step = fo.meta.value_and_grad(task_loss, tasks=tasks)
    for _ in range(2):
        meta_step(theta, large(2, 4))
    gc.collect()
    gc.disable()
    try:
        before = alive()
        for _ in range(3):
            assert meta_step(theta, large(2, 4))[1]["log"] != 0
        assert alive() == before
    finally:
        gc.enable()
