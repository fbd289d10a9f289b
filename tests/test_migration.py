"""The page for those who come from another library: both sides of every pair agree.

A pair is a block of their code (a ``py`` fence), and the block of ours that follows it.
"""

from __future__ import annotations

import doctest
import re
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from test_docs import read

import funcopt as fo

#: why a library may be absent; torch is always there
ABSENT = {
    "torch.optim": "",
    "higher": "in the rivals extra",
    "TorchOpt": "in the rivals extra",
    "learn2learn": "builds its extension with Cython, for releases of torch before 2",
    "optax": "in the rivals extra",
}
MODULES = {"torch.optim": "torch"}
#: TorchOpt and optax make schedules and bias corrections in float32
RTOL = {"TorchOpt": 1e-3, "optax": 1e-6}

rivals_warn = pytest.mark.filterwarnings("ignore")


class Pair(NamedTuple):
    section: str
    title: str
    theirs: str
    ours: int  #: which of the page's own blocks


def parsed() -> tuple[list[str], list[Pair]]:
    """The code of our blocks in their order, and the pairs."""
    own: list[str] = []
    pairs: list[Pair] = []
    section, theirs, title = "", None, ""
    pattern = r"^## ([^\n]+)$|^```(py|python)\n(.*?)^```$|^([A-Z][^\n]*:)$"
    for heading, kind, code, words in re.findall(
        pattern, read("docs/migration.md"), re.M | re.S
    ):
        if heading:
            section = heading
        elif words:
            title = words.rstrip(":")
        elif kind == "py":
            assert theirs is None, "their code without ours"
            theirs = code
        else:
            if theirs is not None:
                pairs.append(Pair(section, title, theirs, len(own)))
                theirs = None
            examples = doctest.DocTestParser().get_examples(code)
            own.append("".join(example.source for example in examples))
    return own, pairs


OWN, PAIRS = parsed()


def module(section: str) -> None:
    name = MODULES.get(section, section.lower())
    pytest.importorskip(name, reason=f"{section}: {ABSENT[section]}")


@pytest.fixture(scope="module")
def ours() -> list[Any]:
    """What ``result`` is after each of our blocks."""
    names: dict[str, Any] = {}
    found = []
    for code in OWN:
        exec(code, names)
        found.append(names.get("result"))
    return found


def test_every_library_has_its_pairs() -> None:
    assert {*ABSENT} == {pair.section for pair in PAIRS}
    assert len(PAIRS) == read("docs/migration.md").count("```py\n")


@rivals_warn
@pytest.mark.slow
@pytest.mark.parametrize(
    "pair",
    [pytest.param(pair, id=f"{pair.section}: {pair.title}") for pair in PAIRS],
)
def test_both_sides_of_a_pair_agree(pair: Pair, ours: list[Any]) -> None:
    module(pair.section)
    names: dict[str, Any] = {}
    before = [p for p in PAIRS[: PAIRS.index(pair)] if p.section == pair.section][:1]
    with in_float64(pair.section):
        for code in [*(p.theirs for p in before), pair.theirs]:
            exec(OWN[0], names)  # a fresh network
            exec(code, names)
    found, expected = ours[pair.ours], names["result"]
    assert len(found) == len(expected) > 0
    moved = 0.0
    for a, b in zip(found, expected):
        a, b = (np.asarray(v.detach() if hasattr(v, "detach") else v) for v in (a, b))
        rtol = RTOL.get(pair.section, 1e-10)
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol / 1e3)
        moved += float(np.abs(a).sum())
    assert moved > 1e-3
    start = sorted(names["start"].items())
    if np.shape(found[0]) == np.shape(start[0][1]):  # parameters, or their gradients
        assert not np.allclose(np.asarray(found[0].detach()), start[0][1])


def in_float64(section: str) -> Any:
    if section != "optax":
        return torch.enable_grad()
    return pytest.importorskip("jax").enable_x64(True)


# What the page says of them -----------------------------------------------------------


@rivals_warn
@pytest.mark.slow
def test_highers_adam_has_a_larger_eps_in_its_first_steps() -> None:
    higher = pytest.importorskip("higher")
    net = torch.nn.Linear(1, 1, bias=False).double()
    p, eps = net.weight.detach().clone(), 0.1
    optimizer = torch.optim.Adam(net.parameters(), lr=1.0, eps=eps)
    with higher.innerloop_ctx(net, optimizer) as (patched, inner):
        inner.step(patched(torch.ones(1, 1).double()).sum())  # the gradient is 1
        theirs = (p - next(iter(patched.parameters()))).item()
    adam = fo.adam(lr=1.0, eps=eps)
    ours = (p - adam.update(torch.ones_like(p), adam.init(p), p)[0]).item()
    assert ours == pytest.approx(1 / (1 + eps))
    assert theirs == pytest.approx(1 / (1 + eps / 0.001**0.5))  # 32 times as large


@rivals_warn
@pytest.mark.slow
def test_torchopts_adam_has_no_derivative_where_a_gradient_is_0() -> None:
    torchopt = pytest.importorskip("torchopt")
    p = torch.zeros(2, dtype=torch.float64)

    def moved(update: Any, g: torch.Tensor) -> torch.Tensor:
        return update(g).sum()

    g = torch.tensor([0.0, 1.0], dtype=torch.float64)
    theirs, ours = torchopt.adam(lr=0.1, moment_requires_grad=True), fo.adam(lr=0.1)

    def by_theirs(g: torch.Tensor) -> torch.Tensor:
        return theirs.update(g, theirs.init(p), params=p, inplace=False)[0]

    def by_ours(g: torch.Tensor) -> torch.Tensor:
        return ours.update(g, ours.init(p), p)[0]

    for step, finite in (by_theirs, False), (by_ours, True):
        leaf = g.clone().requires_grad_()
        (slope,) = torch.autograd.grad(moved(step, leaf), leaf)
        assert bool(slope.isfinite().all()) is finite


@rivals_warn
@pytest.mark.slow
def test_torchopt_takes_another_first_step_when_it_is_initialised_again() -> None:
    torchopt = pytest.importorskip("torchopt")
    p = torch.ones(1)
    tx = torchopt.sgd(lr=0.1, momentum=0.9, dampening=0.5)
    theirs = [tx.update(p, tx.init(p), params=p, inplace=False)[0] for _ in range(2)]
    assert not torch.equal(*theirs)
    opt = fo.sgd(lr=0.1, momentum=0.9, dampening=0.5)
    assert torch.equal(*(opt.update(p, opt.init(p), p)[0] for _ in range(2)))


@rivals_warn
@pytest.mark.slow
def test_torchopts_clipping_has_another_derivative() -> None:
    torchopt = pytest.importorskip("torchopt")
    g = torch.tensor([3.0, 4.0], dtype=torch.float64)
    clip, opt = torchopt.clip_grad_norm(1.0), fo.clip_by_global_norm(1.0)
    chain = fo.chain(opt, fo.sgd(lr=1.0))

    def by_theirs(g: torch.Tensor) -> torch.Tensor:
        return clip.update(g, clip.init(g), inplace=False)[0][0]

    def by_ours(g: torch.Tensor) -> torch.Tensor:
        p = torch.zeros_like(g)
        return -chain.update(g, chain.init(p), p)[0][0]

    exact = torch.tensor([1 / 5 - 9 / 125, -12 / 125], dtype=torch.float64)
    for clipped, right in (by_theirs, False), (by_ours, True):
        leaf = g.clone().requires_grad_()
        (slope,) = torch.autograd.grad(clipped(leaf), leaf)
        assert clipped(g).item() == pytest.approx(0.6, rel=1e-5)
        assert torch.allclose(slope, exact, rtol=1e-5) is right
