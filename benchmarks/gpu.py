"""What a step costs on a GPU, against torch on the same card.

python benchmarks/gpu.py             (eight minutes at most)
python benchmarks/gpu.py --rehearse  (the same on the CPU in Triton's interpreter, tiny)

Every rule is first compared with float64, with NaN in the memory that its results are put
in. Then come the ratios: medians of events, the copy bandwidth of the card beside them.
Writes each line to ``results/gpu.json`` as it comes, and the table of README.md at the
end; a rehearsal writes nothing.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any, TypeAlias

import torch
from torch import Tensor

import cuda
import funcopt as fo
import measure
from contestants.meta_steps import with_funcopt
from contestants.rules import RULES as REGISTRY
from contestants.rules import Rule
from cuda import Step
from maml import agreement
from workloads.problems import sinusoid

Line = dict[str, Any]

#: of the registry those of kernels, each element going its own way
RULES = {name: rule for name, rule in REGISTRY.items() if rule.elementwise}
OMNIGLOT = [s for c in (1, 64, 64, 64) for s in ((64, c, 3, 3), (64,), (64,), (64,))]
OMNIGLOT += [(5, 64), (5,)]
L2 = 200e6  # bytes of buffers in turn, more than a card's cache holds


@dataclass(frozen=True)
class Sizes:
    device: str
    executor: str  #: that is to run all steps
    large: list[tuple[int, ...]]  #: 1e9 parameters
    medium: list[tuple[int, ...]]  #: 200 leaves of 1e6
    small: list[tuple[int, ...]]  #: 10,000 leaves of 64
    unrolled: list[tuple[int, ...]]  #: 1e7 parameters
    net: list[tuple[int, ...]]  #: the Omniglot net
    tasks: int
    inner_steps: int  #: of the meta-step that is compiled
    repeats: int


Part: TypeAlias = Callable[[Sizes], Iterator[Line]]

GPU = Sizes(
    "cuda", "triton", [(100_000_000,)] * 10, [(1_000_000,)] * 200, [(64,)] * 10_000,
    [(1_000_000,)] * 10, OMNIGLOT, 256, 5, 30,
)  # fmt: skip
REHEARSAL = Sizes(
    "cpu", "foreach", [(600,)] * 2, [(500,)] * 3, [(64,)] * 5, [(300,)] * 2,
    OMNIGLOT[-2:], 3, 1, 2,
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure steps on a GPU.")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, tiny")
    rehearse = parser.parse_args().rehearse
    if not rehearse and not torch.cuda.is_available():
        sys.exit("There is no GPU here that torch can use; --rehearse needs none.")
    lines: list[Line] = []
    with ExitStack() as stack:
        if rehearse:
            stack.enter_context(interpreted())
        result = {"environment": {} if rehearse else cuda.environment(), "lines": lines}
        sizes = REHEARSAL if rehearse else GPU
        for line in chain.from_iterable(_attempt(*part, sizes) for part in _parts()):
            print(_text(line), flush=True)
            lines.append(line)
            if not rehearse:  # at once: the machine may be taken away
                measure.save("gpu", result, measured=False)
    if not rehearse:
        import report

        report.write()


@contextmanager
def interpreted() -> Iterator[None]:
    """Triton's kernels on the CPU, in the place of foreach."""
    os.environ["TRITON_INTERPRET"] = "1"
    from funcopt.execution import executor_choice
    from funcopt.execution.triton.kernels import Triton

    engines: dict[str, Any] = executor_choice.ENGINES
    usual = engines["foreach"]
    engines["foreach"] = Triton
    try:
        with fo.execution("foreach"):
            yield
    finally:
        engines["foreach"] = usual


def _parts() -> Iterator[tuple[str, Part]]:
    """Everything that is measured, by name."""
    for each in (correctness, bandwidth):
        for name, rule in RULES.items():
            yield f"{name}: {each.__doc__}", partial(each, name, rule)
    for part in (medium, omniglot, small, unrolled, tasks, compiled):
        yield str(part.__doc__), part


def _attempt(name: str, part: Part, sizes: Sizes) -> Iterator[Line]:
    """The lines; what fails becomes a line that says so, and the others go on."""
    try:
        if sizes.device == "cuda":
            torch.cuda.empty_cache()
        yield from part(sizes)
    except Exception as error:
        words = str(error).splitlines() or ["?"]
        yield {"what": name, "error": f"{type(error).__name__}: {words[0]}"}


def correctness(name: str, rule: Rule, sizes: Sizes) -> Iterator[Line]:
    """three steps against float64"""
    opt = rule.optimizer
    shapes = [*OMNIGLOT[:2], (0,), (1,), (), (3, 1025), (333,)]
    wide = _tree(shapes, "cpu", torch.float64)
    grads = [_tree(shapes, "cpu", torch.float64, seed=i + 1) for i in range(3)]
    params = [x.to(sizes.device, torch.float32) for x in wide]
    params[-1] = torch.cat([params[-1][:1], params[-1]])[1:]  # off by 4 bytes
    expected, found = (wide, opt.init(wide)), (params, opt.init(params))
    data, own = rule.data(wide), rule.data(params)
    plan = fo.plan(opt, params, **own)
    if {group.choice.name for group in plan.groups} != {sizes.executor}:
        raise RuntimeError(f"not by Triton: {plan}".replace("\n", "; "))
    for g in grads:
        expected = opt.update(g, *expected[::-1], execution="reference", **data)
        cuda.poison(sizes.device)
        narrow = [x.to(sizes.device, torch.float32) for x in g]
        found = opt.update(narrow, *found[::-1], **own)
    gaps = [
        (x.cpu() - y).abs().max() / (1 + y.abs().max())
        for x, y in zip(found[0], expected[0])
        if x.numel()
    ]
    gap = float(torch.stack(gaps).max())  # torch's maximum: NaN is the largest
    yield {"what": f"{name}: largest error", "value": gap, "most": 1e-5}


def bandwidth(name: str, rule: Rule, sizes: Sizes) -> Iterator[Line]:
    """1e9 parameters, as a part of the copy bandwidth"""
    params, opt = _tree(sizes.large, sizes.device), rule.optimizer
    grads, state = _tree(sizes.large, sizes.device, seed=1), opt.init(params)
    data, moved = rule.data(params), rule.bytes(params)
    source = params[0]
    target = torch.empty_like(source)
    calls: dict[str, Step] = {
        "copy": lambda: target.copy_(source),
        "pure": lambda: opt.update(grads, state, params, **data),
        "donated": lambda: opt.update(grads, state, params, donate=True, **data),
    }
    with torch.no_grad():
        times = cuda.medians(calls, sizes.device, sizes.repeats, ahead=True)
    copied = 8 * source.numel() / times["copy"]
    for form in ("pure", "donated"):
        rate = moved / times[form]
        yield {
            "what": f"{name}, {form}: share of copy bandwidth",
            "value": rate / copied,
            "least": 0.95,
            "terabytes_per_second": 1e-9 * rate,
            "copy": 1e-9 * copied,
        }


def medium(sizes: Sizes) -> Iterator[Line]:
    """200 leaves of 1e6: times as fast as torch's fused AdamW"""
    yield from _against_fused(sizes, sizes.medium, 1.15, medium.__doc__, ahead=True)


def small(sizes: Sizes) -> Iterator[Line]:
    """10,000 leaves of 64: times as fast as torch's fused AdamW"""
    yield from _against_fused(sizes, sizes.small, 10, small.__doc__)


def omniglot(sizes: Sizes) -> Iterator[Line]:
    """Omniglot net in graph replay: part of the time of torch's fused AdamW"""
    count = 1 if sizes.device == "cpu" else round(L2 / (4 * 4 * 113_000))
    ours = [_ours(sizes.net, sizes.device, seed, graph=True) for seed in range(count)]
    theirs = [_fused(sizes.net, sizes.device, seed) for seed in range(count)]
    times = _medians(
        {
            "funcopt": cuda.captured(lambda: [step() for step in ours], sizes.device),
            "torch": cuda.captured(lambda: [step() for step in theirs], sizes.device),
        },
        sizes,
    )
    yield {
        "what": omniglot.__doc__,
        "value": times["funcopt"] / times["torch"],
        "most": 1 / 3,
        "microseconds": {name: 1e3 * t / count for name, t in times.items()},
    }
    host = {
        name: cuda.host_time(step, sizes.device, sizes.repeats)
        for name, step in (("funcopt", ours[0]), ("torch", theirs[0]))
    }
    yield {
        "what": "Omniglot net, called from Python: part of torch's time",
        "value": host["funcopt"] / host["torch"],
        "microseconds": host,
    }


def unrolled(sizes: Sizes) -> Iterator[Line]:
    """Differentiable AdamW at 1e7: times as fast as eager autograd"""
    opt, params = fo.adamw(), _tree(sizes.unrolled, sizes.device)
    params, state = opt.update(params, opt.init(params), params)  # moments that are not 0
    grads = [x.requires_grad_() for x in _tree(sizes.unrolled, sizes.device, seed=1)]
    names = {"lr": 1e-3, "eps": 1e-8, "weight_decay": 1e-2}
    hyper: dict[str, Any] = {
        name: torch.tensor(v, device=sizes.device, requires_grad=True)
        for name, v in names.items()
    }
    betas = [
        torch.tensor(b, device=sizes.device, requires_grad=True) for b in (0.9, 0.99)
    ]

    def both_ways(**how: Any) -> Sequence[Tensor]:
        new, _ = opt.update(grads, state, params, betas=betas, **hyper, **how)
        loss = torch.stack([(x * x).sum() for x in new]).sum()
        return torch.autograd.grad(loss, [*grads, *hyper.values(), *betas])

    for a, b in zip(both_ways(), both_ways(execution="reference")):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5 * float(b.abs().max()))
    times = _medians(
        {"funcopt": both_ways, "eager": lambda: both_ways(execution="reference")}, sizes
    )
    yield _ratio(unrolled.__doc__, times, "eager", 5)


def tasks(sizes: Sizes) -> Iterator[Line]:
    """256 tasks with their own lr: times as fast as vmap of the plain rule"""
    stacked = [(sizes.tasks, *shape) for shape in sizes.net]
    params, grads = (_tree(stacked, sizes.device, seed=i) for i in range(2))
    lr = torch.linspace(1e-4, 1e-2, sizes.tasks, dtype=torch.float64).to(sizes.device)
    opt = fo.adamw()
    state = torch.vmap(opt.init)(params)

    def step(**how: Any) -> Any:
        return torch.vmap(lambda g, s, p, a: opt.update(g, s, p, lr=a, **how))(
            grads, state, params, lr
        )

    with torch.no_grad():
        for a, b in zip(step()[0], step(execution="reference")[0]):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        times = _medians(
            {"funcopt": step, "vmap": lambda: step(execution="reference")}, sizes
        )
    yield _ratio(tasks.__doc__, times, "vmap", 6)
    launches = cuda.launches(step, sizes.device)
    if launches is not None:
        yield {"what": "256 tasks: kernel launches", "value": launches, "most": 1}


def compiled(sizes: Sizes) -> Iterator[Line]:
    """Sinusoid meta-step as a CUDA graph: times as fast as uncompiled"""
    problem = sinusoid("sgd", tasks=sizes.tasks)
    problem = replace(
        problem,
        net=problem.net.to(sizes.device),
        tasks={name: x.to(sizes.device) for name, x in problem.tasks.items()},
        steps=sizes.inner_steps,
    )
    calls = {
        "funcopt": with_funcopt(problem),
        "compiled": with_funcopt(problem, compile=True),
    }
    for _ in range(3):  # warm up, record, replay
        agreement(calls)
    times = _medians(calls, sizes)
    yield {
        "what": compiled.__doc__,
        "value": times["funcopt"] / times["compiled"],
        "milliseconds": times,
    }


def _against_fused(
    sizes: Sizes,
    shapes: list[tuple[int, ...]],
    least: float,
    what: str | None,
    ahead: bool = False,
) -> Iterator[Line]:
    calls = {
        "funcopt": _ours(shapes, sizes.device),
        "torch": _fused(shapes, sizes.device),
    }
    times = cuda.medians(calls, sizes.device, sizes.repeats, ahead=ahead)
    yield _ratio(what, times, "torch", least)


def _medians(calls: dict[str, Step], sizes: Sizes) -> dict[str, float]:
    return cuda.medians(calls, sizes.device, sizes.repeats)


def _ratio(what: str | None, times: dict[str, float], rival: str, least: float) -> Line:
    value = times[rival] / times["funcopt"]
    return {"what": what, "value": value, "least": least, "milliseconds": times}


def _ours(
    shapes: list[tuple[int, ...]], device: str, seed: int = 0, graph: bool = False
) -> Step:
    params, grads = (_tree(shapes, device, seed=2 * seed + i) for i in range(2))
    opt = fo.adamw()
    state = opt.init(params)
    if graph:  # whose replays count on
        state["step"] = state["step"].to(device)
    return torch.no_grad()(lambda: opt.update(grads, state, params, donate=True))


def _fused(shapes: list[tuple[int, ...]], device: str, seed: int = 0) -> Step:
    params, grads = (_tree(shapes, device, seed=2 * seed + i) for i in range(2))
    for p, g in zip(params, grads):
        p.grad = g
    return torch.optim.AdamW(params, fused=True, capturable=device == "cuda").step


def _tree(
    shapes: Sequence[tuple[int, ...]],
    device: str,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> list[Tensor]:
    generator = torch.Generator(device).manual_seed(seed)
    like: dict[str, Any] = {"device": device, "dtype": dtype}
    return [torch.randn(shape, generator=generator, **like) for shape in shapes]


def _text(line: Line) -> str:
    if "error" in line:
        return f"NOT MEASURED  {line['what']}: {line['error']}"
    limit = next((f"{k} {line[k]:.3g}" for k in ("least", "most") if k in line), "")
    return f"{line['value']:12.4g}  {line['what']}  ({limit or 'for information'})"


if __name__ == "__main__":
    main()
