"""Which executor may run: is a derivative asked for, and can a step count be read?"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functionalize, grad, jacrev, jvp, vjp, vmap
from torch.utils._python_dispatch import TorchDispatchMode

from funcopt.execution import concrete, levels
from funcopt.execution.concrete import readable, scalars_of
from funcopt.execution.levels import differentiating, is_tracked, may_be_tracked

Probe = Callable[..., Any]  #: asked of the tensors that the update would see
Context = Callable[[Probe], None]  #: sets up one situation and calls the probe in it


def plain() -> Tensor:
    return torch.tensor([1.0, 2.0])


def leaf() -> Tensor:
    return plain().requires_grad_()


def through(transform: Callable[..., Any], *arguments: Any) -> Context:
    """The probe called within a function that is transformed."""

    def context(probe: Probe) -> None:
        def function(x: Tensor) -> Tensor:
            probe(x)
            return x.sum()

        transform(function)(*arguments)

    return context


def pushed(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x: jvp(function, (x,), (x,))


@contextmanager
def dual_level() -> Iterator[None]:
    with forward_ad.dual_level():
        yield


def in_dual_level(probe: Probe) -> None:
    with dual_level():
        probe(forward_ad.make_dual(plain(), plain()))


def beside_dual_level(probe: Probe) -> None:
    with dual_level():
        probe(plain())


def without_grad(tensor: Callable[[], Tensor]) -> Context:
    def context(probe: Probe) -> None:
        with torch.no_grad():
            probe(tensor())

    return context


def in_inference_mode(probe: Probe) -> None:
    with torch.inference_mode():
        probe(plain())


def closed_over(probe: Probe) -> None:
    outside = leaf()

    def function(x: Tensor) -> Tensor:
        probe(outside)
        return x.sum()

    grad(function)(plain())


def closed_over_in_vmap(probe: Probe) -> None:
    outside = leaf()
    vmap(lambda x: (probe(outside), x)[1])(plain())


def no_grad_in_grad(probe: Probe) -> None:
    def function(x: Tensor) -> Tensor:
        with torch.no_grad():
            probe(x)
        return x.sum()

    grad(function)(plain())


def detached_in_grad(probe: Probe) -> None:
    grad(lambda x: (probe(x.detach()), x.sum())[1])(plain())


def outer_level(probe: Probe) -> None:
    """What only an outer transform follows."""

    def outer(y: Tensor) -> Tensor:
        def inner(x: Tensor) -> Tensor:
            probe(y)
            return (x * y).sum()

        return grad(inner)(plain()).sum()

    grad(outer)(plain())


def outer_tangent(probe: Probe) -> None:
    """What only an outer jvp follows."""
    pushed(lambda y: grad(lambda x: (probe(y), (x * y).sum())[1])(plain()))(plain())


def batched_in_a_tracked_tensor(probe: Probe) -> None:
    def outer(rows: Tensor) -> Tensor:
        return vmap(lambda x: (probe(x), x.sum())[1])(rows).sum()

    grad(outer)(torch.ones(3, 2))


def each_row(rows: Tensor, probe: Probe) -> None:
    vmap(lambda x: (probe(x), x)[1])(rows)


def batched_in_a_dual_tensor(probe: Probe) -> None:
    rows = torch.ones(3, 2)
    with dual_level():
        each_row(forward_ad.make_dual(rows, rows), probe)


def batched_beside_a_tangent(probe: Probe) -> None:
    """As the state is, where the parameters of all tasks have a tangent."""
    rows = torch.ones(3, 2)
    pushed(lambda x: (each_row(rows, probe), x)[1])(plain())


def after(probe: Probe) -> None:
    """A transform that has ended leaves nothing behind, not even by an error."""

    def fails(x: Tensor) -> Tensor:
        raise ZeroDivisionError

    for transform in (grad(fails), vmap(fails), pushed(fails)):
        with pytest.raises(ZeroDivisionError):
            transform(plain())
    probe(plain())


# situation: what `differentiating` must say, what `is_tracked`, and the situation
ROWS: dict[str, tuple[bool, bool, Context]] = {
    "plain tensors": (False, False, lambda probe: probe(plain())),
    "no tensors at all": (False, False, lambda probe: probe()),
    "what is no tensor": (False, False, lambda probe: probe(0.1, None, "adam")),
    "leaf parameter": (True, True, lambda probe: probe(leaf())),
    "leaf parameter, no_grad": (False, True, without_grad(leaf)),
    "what follows from a leaf": (True, True, lambda probe: probe(2 * leaf())),
    "detached leaf": (False, False, lambda probe: probe(leaf().detach())),
    "hyperparameter": (
        True,
        True,
        lambda probe: probe(plain(), 0.9, torch.tensor(0.1, requires_grad=True)),
    ),
    "inference mode": (False, False, in_inference_mode),
    "func.grad": (True, True, through(grad, plain())),
    "func.vjp": (True, True, through(lambda f: lambda x: vjp(f, x), plain())),
    "func.jacrev": (True, True, through(jacrev, plain())),
    "func.jvp": (True, True, through(pushed, plain())),
    "vmap": (True, False, through(vmap, torch.ones(3, 2))),
    "vmap of grad": (True, True, through(lambda f: vmap(grad(f)), torch.ones(3, 2))),
    "grad of vmap": (True, True, batched_in_a_tracked_tensor),
    "vmap of jvp": (True, True, through(lambda f: vmap(pushed(f)), torch.ones(3, 2))),
    "jvp of vmap": (True, True, through(lambda f: pushed(vmap(f)), torch.ones(3, 2))),
    "vmap of a dual tensor": (True, True, batched_in_a_dual_tensor),
    "vmap of no tangent, jvp": (True, False, batched_beside_a_tangent),
    "grad of grad": (
        True,
        True,
        through(lambda f: grad(lambda x: grad(f)(x).sum()), plain()),
    ),
    "an outer grad's tensor": (True, True, outer_level),
    "an outer jvp's tensor": (True, False, outer_tangent),
    "functionalize": (True, False, through(functionalize, plain())),
    "dual tensor": (True, True, in_dual_level),
    "plain tensor, dual level": (True, False, beside_dual_level),
    "closed over in grad": (True, True, closed_over),
    "closed over in vmap": (True, True, closed_over_in_vmap),
    "no_grad in grad": (True, True, no_grad_in_grad),
    "detached in grad": (True, False, detached_in_grad),
    "after transforms": (False, False, after),
}


def seen(context: Context, question: Callable[..., Any]) -> list[Any]:
    answers: list[Any] = []
    context(lambda *tensors: answers.append(question(tensors)))
    assert answers
    return answers


@pytest.mark.parametrize("row", ROWS)
def test_differentiating(row: str):
    expected, _, context = ROWS[row]
    assert set(seen(context, differentiating)) == {expected}


@pytest.mark.parametrize("row", ["hyperparameter", "what is no tensor", "plain tensors"])
def test_differentiating_without_the_private_helper(
    row: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(levels, "_any_requires_grad", levels._one_by_one)
    test_differentiating(row)


@pytest.mark.parametrize("row", ROWS)
def test_is_tracked(row: str):
    _, expected, context = ROWS[row]

    def any_tracked(tensors: tuple[Any, ...]) -> bool:
        return any(is_tracked(t) for t in tensors if isinstance(t, Tensor))

    assert set(seen(context, any_tracked)) == {expected}


@pytest.mark.parametrize("row", ROWS)
def test_may_be_tracked(row: str):
    """More than `is_tracked` where torch hides a tangent, and nowhere else."""
    _, expected, context = ROWS[row]

    def probe(tensors: tuple[Any, ...]) -> bool:
        return any(may_be_tracked(t) for t in tensors if isinstance(t, Tensor))

    assert set(seen(context, probe)) == {expected or row == "an outer jvp's tensor"}


def test_requires_grad_alone_would_not_do():
    """Why the predicate asks for the transform, and not for the tensors alone."""
    for row in ("func.jvp", "vmap", "dual tensor"):
        assert seen(ROWS[row][2], lambda tensors: tensors[0].requires_grad) == [False]


# Step counts ---------------------------------------------------------------------------


class Subclass(Tensor):
    pass


class Tracing(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ):
        return func(*args, **(kwargs or {}))


def traced(probe: Probe) -> None:
    with Tracing():
        probe(torch.tensor([3, 7]))


def counted(transform: Callable[..., Any]) -> Context:
    """The counts closed over: they belong to no level of the transform."""

    def context(probe: Probe) -> None:
        counts = torch.tensor([3, 7])
        transform(lambda x: (probe(counts), x.sum())[1])(plain())

    return context


def passed(transform: Callable[..., Any]) -> Context:
    """The counts given through the transform, beside what is differentiated."""

    def context(probe: Probe) -> None:
        def function(x: Tensor, counts: Tensor) -> Tensor:
            probe(counts)
            return x.sum()

        transform(function)(plain(), torch.tensor([3, 7]))

    return context


def batched(probe: Probe) -> None:
    counts = torch.tensor([[3, 7], [5, 9]])
    vmap(lambda row: (probe(row), row)[1])(counts)


def batched_in_grad(probe: Probe) -> None:
    def one(x: Tensor, counts: Tensor) -> Tensor:
        probe(counts)
        return x.sum()

    vmap(grad(one))(torch.ones(2, 2), torch.tensor([[3, 7], [5, 9]]))


READABLE: dict[str, tuple[bool, Context]] = {
    "plain": (True, lambda probe: probe(torch.tensor([3, 7]))),
    "closed over in grad": (True, counted(grad)),
    "closed over in vmap": (True, counted(vmap)),
    "given through grad": (True, passed(grad)),
    "shared by vmap": (True, passed(lambda f: vmap(f, in_dims=(0, None)))),
    "closed over in vmap of grad": (True, counted(lambda f: vmap(grad(f)))),
    "batched by vmap": (False, batched),
    "batched by vmap, in grad": (False, batched_in_grad),
    "on a device without values": (
        False,
        lambda probe: probe(torch.ones(2, dtype=torch.int64, device="meta")),
    ),
    "a subclass": (
        False,
        lambda probe: probe(torch.tensor([3, 7]).as_subclass(Subclass)),
    ),
    "while tracing": (False, traced),
}


@pytest.mark.parametrize("row", READABLE)
def test_readable(row: str):
    expected, context = READABLE[row]
    assert set(seen(context, lambda tensors: readable(tensors[0]))) == {expected}


@pytest.mark.parametrize("row", READABLE)
def test_steps_are_ints_where_readable_else_float64(row: str):
    is_int, context = READABLE[row]

    def question(tensors: tuple[Tensor, ...]) -> list[Any]:
        return scalars_of(tensors[0])

    for steps in seen(context, question):
        assert isinstance(steps, list) and len(steps) == 2
        if is_int:
            assert steps == [3, 7] and all(type(t) is int for t in steps)
        else:
            assert all(t.dtype == torch.float64 and t.ndim == 0 for t in steps)


def test_steps_batched_by_vmap_keep_their_values():
    counts = torch.tensor([[3, 7], [5, 9]])
    assert torch.equal(
        vmap(lambda row: torch.stack(scalars_of(row)))(counts), counts.double()
    )


def test_scalars_of_nothing_are_none():
    assert scalars_of(torch.zeros(0, dtype=torch.int64)) == []


def test_compiling_is_not_readable(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not concrete.readable(torch.tensor([3, 7]))
