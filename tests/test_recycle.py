"""Large results are written into again once nobody holds them, and not before."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import dlpack

import funcopt as fo
from funcopt.execution import recycle
from funcopt.execution.recycle import Recycler

SIZE = 100_000  # floats: more bytes than the allocator keeps at hand


def large(seed: int) -> Tensor:
    return torch.randn(SIZE, generator=torch.Generator().manual_seed(seed))


def graph(x: Tensor) -> Any:
    """A graph that needs the values of x, and holds them in C++ alone."""
    return (x * torch.ones(SIZE, requires_grad=True)).sum()


def values_of_graph(loss: Any) -> Tensor:
    product = loss.grad_fn.next_functions[0][0]
    (leaf,) = (f.variable for f, _ in product.next_functions if f is not None)
    return torch.autograd.grad(loss, leaf)[0]


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
}


def run(steps: int, visit: Callable[[int, Tensor, Any], None]) -> None:
    opt, p = fo.adam(lr=0.1), large(0)
    state = opt.init(p)
    for step in range(steps):
        p, state = opt.update(large(step + 1), state, p)
        visit(step, p, state)


@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.parametrize("at", [2, 3])
def test_what_is_held_is_not_written_over(holder: str, at: int):
    hold, look = HOLDERS[holder]
    held: list[Any] = []

    def visit(step: int, p: Tensor, state: Any) -> None:
        if step == at:
            kept = hold(p)
            held.append((kept, p.clone()))

    run(8, visit)
    ((kept, expected),) = held
    found = look(kept).flatten()
    assert torch.equal(found, expected[-found.numel() :])


def test_what_nobody_holds_is():
    places: list[tuple[int, ...]] = []

    def visit(step: int, p: Tensor, state: Any) -> None:
        tensors = (p, state["exp_avg"], state["exp_avg_sq"])
        places.append(tuple(x.data_ptr() for x in tensors))

    run(12, visit)
    assert len(set(places[4:])) == 2  # two sets of buffers, in turns
    assert places[4::2] == [places[4]] * 4 and places[5::2] == [places[5]] * 4


def test_versions_tell_that_it_was_written_over():
    like = [large(0)]
    recycler = Recycler()
    first = recycler.columns(like, 1)[0][0]
    version, place = first._version, first.data_ptr()
    del first
    recycler.columns(like, 1)
    again = recycler.columns(like, 1)[0][0]
    assert again.data_ptr() == place and again._version == version + 1


def marked(x: Tensor) -> None:
    x.mark = True  # pyright: ignore[reportAttributeAccessIssue]


def resized(x: Tensor) -> None:
    x.resize_(SIZE // 2)


@pytest.mark.parametrize("change", [marked, resized, Tensor.requires_grad_, Tensor.t_])
def test_what_is_no_more_as_it_was_made_is_left(change: Callable[[Tensor], Any]):
    like, recycler = [large(0).view(100, -1)], Recycler()
    x = recycler.columns(like, 1)[0][0]
    change(x)
    del x
    recycler.columns(like, 1)
    new = recycler.columns(like, 1)[0][0]
    assert (new.shape, new.stride()) == (like[0].shape, like[0].stride())
    assert not new.requires_grad and not new.__dict__


def test_small_leaves_are_not_kept():
    recycler = Recycler()
    recycler.columns([torch.ones(10)], 3)
    assert not recycler._made


def test_no_more_than_two_sets_are_held():
    recycler = Recycler()
    for n in (1, 4, 2):
        held = [recycler.columns([large(0)] * n, 3) for _ in range(5)]
        kept = [x for made in recycler._made for x in made if x is not None]
        assert len(recycler._made) == 2 and len(kept) <= 2 * 3 * max(n, 1)
        del held


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_in_modes(mode: Callable[[], Any]):
    with mode():
        run(4, lambda *_: None)


def test_without_the_private_helpers(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(recycle, "_nobody", lambda: ())
    recycler = Recycler()
    for _ in range(4):
        recycler.columns([large(0)], 2)
    assert not recycler._made


def test_two_threads_never_get_the_same_buffer():
    """One optimizer, one tree: each thread's results are those of a run of its own."""
    opt = fo.adam(lr=0.1)

    def worker(seed: int) -> Tensor:
        p = large(seed)
        state = opt.init(p)
        for step in range(10):
            p, state = opt.update(large(seed + step + 1), state, p)
        return p

    expected = [worker(seed) for seed in (0, 50, 100, 150)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(worker, (0, 50, 100, 150)))
    assert all(map(torch.equal, found, expected))
