"""What a guarded cache takes for alike is what Dynamo's guards of every tensor do."""

import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from funcopt.execution import guarded_cache
from funcopt.execution.guarded_cache import GuardedCache
from funcopt.execution.native import objects


def inferred(x: Tensor) -> Tensor:
    with torch.inference_mode():
        return x.clone()


MATRIX = torch.ones(2, 3)
PARAMETER = torch.nn.Parameter(MATRIX)
COMPLEX = torch.ones(2, 3, dtype=torch.complex64)

#: no two of them are alike, but for those of one set
KINDS: dict[str, list[Tensor]] = {
    "plain": [MATRIX, torch.zeros(2, 3), torch.ones(9, 3)[4:6], MATRIX.detach()],
    "transposed": [MATRIX.t().contiguous().t()],
    "another shape": [torch.ones(3, 2)],
    "one axis more": [torch.ones(2, 3, 1)],
    "one axis less": [torch.ones(2)],
    "no axes": [torch.ones(()), torch.tensor(2.0)],
    "seven": [torch.ones(1, 2, 1, 1, 3, 1, 2), torch.ones(2, 2, 1, 1, 3, 1, 2)[:1]],
    "seven others": [torch.ones(1, 2, 1, 1, 3, 2, 1)],
    "empty": [torch.ones(0, 3)],
    "of other strides": [torch.ones(2, 9)[:, ::3]],
    "float64": [MATRIX.double()],
    "bfloat16": [MATRIX.bfloat16()],
    "complex": [COMPLEX],
    "conjugate": [COMPLEX.conj()],
    "negative": [COMPLEX.conj().imag, (2 * COMPLEX).conj().imag],
    "its real part": [COMPLEX.real],
    "meta": [MATRIX.to("meta")],
    "inference": [inferred(MATRIX), inferred(torch.zeros(2, 3))],
    "requires grad": [torch.ones(2, 3, requires_grad=True), 2 * PARAMETER],
    "a parameter": [PARAMETER, torch.nn.Parameter(torch.zeros(2, 3))],
    "a fixed parameter": [torch.nn.Parameter(MATRIX, requires_grad=False)],
    "a subclass": [MATRIX.as_subclass(type("Own", (Tensor,), {}))],
}
OTHERS: list[Any] = [None, 1.0, "a tensor", torch.eye(2).to_sparse()]


@pytest.mark.parametrize("kind", KINDS)
def test_only_its_own_kind_is_alike(kind: str):
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")
    first = KINDS[kind][0]
    alike = guarded_cache._like([first])
    whole = guarded_cache._guards([first])
    for other, tensors in KINDS.items():
        for x in tensors:
            assert alike([x]) == whole(x) == (other == kind), other
    assert not any(alike([x]) for x in OTHERS)
    likeness = objects.load().likeness([first])
    assert (likeness is None) == (kind == "a subclass")


@pytest.mark.parametrize("count", [1, 2, 5])
def test_as_many_are_alike_each_in_its_place(count: int):
    some = [MATRIX, PARAMETER, MATRIX.double(), torch.ones(()), torch.ones(0, 3)][:count]
    cache: GuardedCache[str] = GuardedCache()
    cache.put(some, "known")
    assert cache.get([x.detach().clone() if i != 1 else x for i, x in enumerate(some)])
    for other in (some[:-1], [*some, some[-1]], [], [*some[:-1], torch.ones(7)]):
        assert cache.get(other) is None
    if count > 1:
        assert cache.get([*some[1:], some[0]]) is None


def test_the_latest_of_many_are_known():
    cache: GuardedCache[int] = GuardedCache()
    kinds = [[torch.ones(n)] for n in range(11)]
    for n, kind in enumerate(kinds):
        cache.put(kind, n)
    assert [*map(cache.get, kinds)] == [None] * 3 + [*range(3, 11)]


MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "none": nullcontext,
    "inference mode": torch.inference_mode,
    "autocast": partial(torch.autocast, "cpu", torch.bfloat16),
    "no autograd": torch._C._AutoDispatchBelowAutograd,
}


@pytest.mark.parametrize("first", [MATRIX, inferred(MATRIX)], ids=["plain", "inference"])
@pytest.mark.parametrize("known", MODES)
@pytest.mark.parametrize("asked", MODES)
def test_the_modes_in_force_are_part_of_what_is_alike(
    known: str, asked: str, first: Tensor
):
    tensors = [first, torch.ones(4), inferred(MATRIX)]
    cache: GuardedCache[str] = GuardedCache()
    with MODES[known]():
        cache.put(tensors, "known")
        whole = guarded_cache._guards(tensors)
    with MODES[asked]():
        assert (cache.get(tensors) == "known") == whole(*tensors) == (known == asked)


@pytest.mark.parametrize("memory", [False, True])
def test_a_level_of_torch_func_is_not_the_outside(memory: bool):
    cache: GuardedCache[str] = GuardedCache(memory)
    cache.put([MATRIX], "outside")

    def within(x: Tensor) -> Tensor:
        assert cache.get([x]) is None and cache.get([MATRIX]) is None
        inner: GuardedCache[str] = GuardedCache(memory)
        inner.put([x], "a wrapper")
        assert inner.get([x]) == "a wrapper" and inner.get([MATRIX]) is None
        return x.sum()

    torch.func.grad(within)(MATRIX)
    torch.vmap(within)(MATRIX[None])
    assert cache.get([MATRIX]) == "outside"
