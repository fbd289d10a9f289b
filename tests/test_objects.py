"""What C does with Python's objects is what the same in Python does."""

import ctypes
import shutil
import subprocess
import sys
from array import array
from collections import OrderedDict, namedtuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import funcopt as fo
from funcopt import tree
from funcopt.execution.executor import BuildError
from funcopt.execution.native import objects

Pair = namedtuple("Pair", "first second")


def leaf(size: int = 2) -> torch.Tensor:
    return torch.zeros(size)


def both() -> list[objects.Objects]:
    found = objects.load()
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")
    assert not isinstance(found, objects.InPython)
    return [found, objects.InPython()]


TREES: dict[str, Any] = {
    "leaf": leaf(),
    "dict": {"b": leaf(), "a": leaf()},
    "numbers as keys": {2: leaf(), 1: leaf()},
    "nested": {"a": {"x": leaf()}, "b": [leaf(), (leaf(),)], "c": ()},
    "namedtuple": {"a": Pair(leaf(), {"x": leaf()}), "b": leaf()},
    "ordered": OrderedDict(b=leaf(), a=leaf()),
    "parameter": [torch.nn.Parameter(leaf())],
}

#: no tree of these may pass for one of those above, nor one above for another
OTHERS: dict[str, Any] = {
    "none": None,
    "number": 1.0,
    "none within": {"b": leaf(), "a": None},
    "another key": {"b": leaf(), "c": leaf()},
    "one more": {"b": leaf(), "a": leaf(), "c": leaf()},
    "deeper": {"b": leaf(), "a": [leaf()]},
    "a subclass": OrderedDict(a=leaf(), b=leaf(), c=leaf()),
    "longer": [torch.nn.Parameter(leaf()), leaf()],
}


@pytest.mark.parametrize("name", TREES)
def test_leaves_are_those_of_the_form_and_of_no_other(name: str):
    given = TREES[name]
    expected, structure = tree.flatten(given)
    form = tree.form(structure, [True] * structure.num_leaves)
    for found in both():
        leaves = found.leaves(form, given)
        assert leaves is not None and list(map(id, leaves)) == list(map(id, expected))
        for other, value in (TREES | OTHERS).items():
            assert other == name or found.leaves(form, value) is None


@pytest.mark.parametrize("name", TREES)
def test_leaves_among_gaps(name: str):
    """Of every kind of container; a gap more or less makes another form."""
    tensors, structure = tree.flatten(TREES[name])
    for gap in range(len(tensors)):
        some = [None if i == gap else x for i, x in enumerate(tensors)]
        form = tree.form(structure, [x is not None for x in some])
        for found in both():
            leaves = found.leaves(form, tree.unflatten(structure, some))
            assert leaves is not None
            assert [*map(id, leaves)] == [id(x) for x in some if x is not None]
            assert found.leaves(form, TREES[name]) is None
            assert found.leaves(form, tree.unflatten(structure, some[::-1])) is None or (
                some[::-1].index(None) == gap
            )


@pytest.mark.parametrize("name", TREES)
def test_a_tree_in_another_order_has_the_same_leaves(name: str):
    given = TREES[name]
    structure = tree.flatten(given)[1]
    form = tree.form(structure, [True] * structure.num_leaves)
    if type(given) is dict:
        given = dict(reversed(given.items()))
    expected = [id(x) for x in tree.leaves(given)]
    for found in both():
        leaves = found.leaves(form, given)
        assert leaves is not None and list(map(id, leaves)) == expected


class _Rude:
    """A key that empties the dict it is looked for in."""

    def __init__(self, victim: dict[Any, Any]) -> None:
        self.victim = victim

    def __hash__(self) -> int:
        return 1

    def __eq__(self, other: object) -> bool:
        if self is not other:
            self.victim.clear()
        return True


def test_a_key_that_changes_the_tree():
    for found in both():
        victim: dict[Any, Any] = {}
        victim[_Rude(victim)] = leaf()
        form = {_Rude({}): None}
        assert found.leaves((form, form), (victim, victim)) is None


def test_an_error_of_a_container_is_not_hidden():
    def of_a_container(given: Any) -> list[Any]:
        raise ZeroDivisionError

    for found in both():
        with pytest.raises(ZeroDivisionError):
            found.leaves({"a": of_a_container}, {"a": 1})


def test_addresses():
    base = torch.arange(12.0).reshape(3, 4)
    lists = [[base, base[1:], base.T[1:]], (torch.nn.Parameter(leaf()), leaf(0))]
    expected = array("Q", [x.data_ptr() for each in lists for x in each]).tobytes()
    for found in both():
        assert found.addresses(*lists) == expected
        assert found.addresses() == b""
        for wrong in ([1.0], [None], [base, "x"]):
            with pytest.raises(TypeError):
                found.addresses(wrong)
    fast, _ = both()
    with pytest.raises(TypeError, match="lists of tensors"):
        fast.addresses(base)
    with pytest.raises(RuntimeError, match="without memory"):
        fast.addresses([torch.eye(2).to_sparse()])


SPANS: dict[str, tuple[list[tuple[int, int]], bool]] = {
    "none": ([], True),
    "one": ([(8, 100)], True),
    "side by side, in no order": ([(64, 8), (0, 32), (32, 32)], True),
    "a byte shared": ([(64, 8), (0, 33), (32, 32)], False),
    "the same": ([(64, 8), (16, 4), (64, 8)], False),
    "one within another, not its neighbour": ([(0, 90), (80, 4), (8, 4)], False),
    "nothing lies nowhere": ([(0, 0), (4, 16), (8, 0), (0, 0)], True),
    "at the top": ([(2**64 - 16, 8), (2**63, 8)], True),
}


@pytest.mark.parametrize("what", SPANS)
def test_apart(what: str):
    spans, expected = SPANS[what]
    addresses, extents = (
        array("Q", [span[k] for span in spans]).tobytes() for k in range(2)
    )
    for found in both():
        assert found.apart(addresses, extents) is expected
        assert found.apart(addresses + extents, extents) is expected
    fast: Any = both()[0]
    if spans:
        for wrong in ((b"", extents), (addresses, None), (spans, extents)):
            with pytest.raises(TypeError, match="addresses and extents"):
                fast.apart(*wrong)


LOOKS: dict[str, list[list[Any]]] = {
    "alike": [[leaf(), leaf(3)], [leaf().view(2, 1)]],
    "none": [],
    "of two dtypes": [[leaf()], [leaf(), leaf().double()]],
    "of two devices": [[leaf(), torch.empty(2, device="meta")]],
    "one requires grad": [[leaf()], [leaf().requires_grad_()]],
    "a parameter": [[leaf(), torch.nn.Parameter(leaf())]],
    "a parameter of another dtype": [[torch.nn.Parameter(leaf().half()), leaf()]],
    "a buffer": [[leaf(), torch.nn.Buffer(leaf())]],
    "a subclass": [[leaf(), leaf().as_subclass(torch.nn.Parameter)]],
    "an own subclass": [[leaf(), leaf().as_subclass(type("Own", (torch.Tensor,), {}))]],
    "a number": [[leaf().double(), 1.0], [leaf().requires_grad_()]],
    "sparse": [[leaf(), torch.eye(2).to_sparse()]],
}


@pytest.mark.parametrize("what", LOOKS)
def test_look(what: str):
    fast, slow = both()
    found = fast.look(*LOOKS[what])
    assert found == slow.look(*LOOKS[what]) and all(type(x) is bool for x in found)
    assert fast.look(*map(tuple, LOOKS[what])) == found
    alike = what in ("alike", "none", "one requires grad", "a parameter", "sparse")
    assert found[1] is (alike or what in ("a buffer", "a subclass"))
    with pytest.raises(TypeError, match="lists of tensors"):
        fast.look(leaf())


def test_look_within_transforms():
    def seen(x: torch.Tensor) -> torch.Tensor:
        fast, slow = both()
        assert fast.look([x, leaf()]) == slow.look([x, leaf()])
        return x.sum()

    for x in (leaf(), leaf().double().requires_grad_()):
        torch.func.grad(seen)(x)
        torch.vmap(torch.func.grad(seen))(x.view(2, 1))
        torch.func.jvp(seen, (x,), (x,))


def test_written_counts_versions():
    for found in both():
        base, parameter = leaf(4), torch.nn.Parameter(leaf())
        with torch.inference_mode():
            inferred = leaf()
        tensors = [leaf(), base[1:], parameter, inferred, leaf()]
        found.written(tensors, 1, 4)
        found.written(tensors, 2, 2)
        counted = [x._version for x in (*tensors[:3], base, tensors[4])]
        assert counted == [0, 1, 1, 1, 0] and inferred.is_inference()
        found.written(tensors, 3, 9)
        assert tensors[4]._version == 1
    fast, _ = both()
    wrong: Any = [1.0]
    with pytest.raises(TypeError, match="no version"):
        fast.written(wrong, 0, 1)


def test_counted_is_one_more_and_one_version_later():
    every = torch.arange(12)
    with torch.inference_mode():
        inferred = torch.arange(3)
    for found in both():
        some = [x.clone() for x in (every[:5], every[1::4], every[:0])]
        for steps in (*some, *(x.float() for x in some), torch.tensor([2.0**24, 1.5])):
            expected, version = steps + 1, steps._version
            assert found.counted(steps) is steps and torch.equal(steps, expected)
            assert steps._version == version + 1
        strided = every.clone()
        assert found.counted(strided[1::4]).tolist() == [2, 6, 10]
        assert strided.tolist() == [0, 2, 2, 3, 4, 6, 6, 7, 8, 10, 10, 11]
        for other in (torch.ones(2).half(), torch.ones(2, 2).long(), torch.tensor(3)):
            expected = other + 1
            assert torch.equal(found.counted(other), expected)
        assert found.counted(torch.arange(3, device="meta")).is_meta
    with torch.inference_mode():
        for found in both():
            found.counted(inferred)
    assert inferred.tolist() == [2, 3, 4]


def test_same_is_the_same_object_and_not_an_equal_one():
    a, b, one = leaf(1), leaf(1), 1.5
    for found in both():
        assert found.same([], []) and found.same([a, one, b], [a, one, b])
        for other in ([a], [a, b, b], [b, a], [a.clone(), b], []):
            assert not found.same([a, b], other) and not found.same(other, [a, b])


def test_holds_is_by_keys_and_values_in_their_order():
    a, b, one = leaf(1), leaf(1), 1.5
    entries = {a: {"x": one, "y": b}, b: {}, "c": {"x": a}}
    flat = [a, one, b, b, "c", a]
    others = [flat[:-1], [*flat, a], [], [b, *flat[1:]], [*flat[:2], a, *flat[3:]]]
    for found in both():
        assert found.holds(entries, flat) and found.holds({}, [])
        assert not any(found.holds(entries, other) for other in others)
        assert not found.holds({a: [one]}, [a, one]) and not found.holds([a], [a])
        assert not found.holds({a: {"x": leaf(1)}}, [a, leaf(1)])


def test_a_kernel_writes_the_same(monkeypatch: pytest.MonkeyPatch):
    params = {"w": torch.linspace(-1, 1, 5000), "b": torch.ones(3)}
    results = []
    for found in both():
        monkeypatch.setattr(objects, "load", lambda found=found: found)
        opt, p = fo.chain(fo.clip_by_global_norm(0.5), fo.lamb(lr=0.1)), params
        state = opt.init(p)
        with fo.execution("native"):
            for _ in range(3):
                p, state = opt.update(params, state, p)
        results.append([*tree.leaves(p), *tree.leaves(state)])
    for a, b in zip(*results):
        assert torch.equal(a, b)


@pytest.mark.parametrize("masked", ["library", "sysconfig"])
def test_without_it_steps_are_the_same(
    masked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A torch that keeps tensors elsewhere, and no headers of Python's."""
    params = {"w": torch.linspace(-1, 1, 7), "b": torch.ones(())}
    expected = _two_steps(params)

    def missing(*given: Any, **named: Any) -> Any:
        raise BuildError("there is none")

    if masked == "library":
        monkeypatch.setattr(objects, "library", missing)
    else:
        monkeypatch.setattr(objects.sysconfig, "get_path", lambda *_: "/nowhere")
        monkeypatch.setenv("FUNCOPT_CACHE", str(tmp_path))
    monkeypatch.setattr(objects, "load", objects.load.__wrapped__)
    found = _two_steps(params)
    for a, b in zip(found, expected):
        assert torch.equal(a, b)


def test_tensors_may_be_larger_in_another_torch():
    """In 2.11 they hold one pointer more, before the dispatch keys: the last of all."""
    words = (ctypes.c_uint64 * 24)(*range(24))
    tensor: Any = SimpleNamespace(_cdata=ctypes.addressof(words))
    assert objects._offset([tensor], lambda _: 22) == 176


def _two_steps(params: Any) -> list[torch.Tensor]:
    opt, p = fo.adamw(lr=0.1), tree.map(torch.clone, params)
    state = opt.init(p)
    for donate in (False, True, False, True):
        p, state = opt.update(params, state, p, donate=donate)
    return [*tree.leaves(p), *tree.leaves(state)]


@pytest.mark.slow
def test_it_may_be_loaded_first_anywhere():
    """Within transforms and modes, where torch.ones makes other tensors."""
    program = """
import os, sys, torch, torch._dynamo, funcopt as fo
from funcopt.execution.native import objects

def step(p):
    opt = fo.adamw()
    for _ in range(3):
        p, _ = opt.update(p, opt.init(p), p)
    return p.sum()

p = torch.ones(4, 3)
for how in sys.argv[1:]:
    if os.fork():  # a process for each; torch is imported once
        assert os.wait()[1] == 0, how
        continue
    exec(how)
    objects.load()
    with torch.no_grad():
        step(p)
    assert not isinstance(objects.load(), objects.InPython)
    os._exit(0)  # to take torch apart takes a second
"""
    ways = (
        "torch.func.vmap(torch.func.grad(step))(p)",
        "torch.func.grad(lambda p: torch.func.vmap(step)(p).sum())(p)",
        "torch.func.grad(lambda p: objects.load() and p.sum())(p)",
        "with torch.inference_mode(): step(torch.ones(3))",
        "with torch.device('meta'): objects.load()",
        "with torch._subclasses.FakeTensorMode(): objects.load()",
        "torch.set_default_dtype(torch.float64); objects.load()",
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, *ways],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
