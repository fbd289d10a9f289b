"""What every benchmark needs: time, memory, the machine, and a file for each result."""

from __future__ import annotations

import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import metadata
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

RESULTS = Path(__file__).parent / "results"

#: Milliseconds: median, min, max over ``repeats`` calls.
Times: TypeAlias = dict[str, float]


def interleaved(
    calls: Mapping[str, Callable[[], Any]],
    *,
    repeats: int,
    fill: float = 0.1,
    bar: tqdm[Any] | None = None,
) -> dict[str, Times]:
    """Time the calls in turn, A B C A B C, so that a slow moment of the machine hits all.

    A sample is the mean over as many consecutive calls as fill about ``fill`` seconds, as
    in training; garbage of the one before it is collected first. One round is untimed.
    """
    alone = {name: _seconds(call) for name, call in calls.items()}
    numbers = {name: max(1, round(fill / time)) for name, time in alone.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    gc.collect()
    gc.freeze()  # what is there now is no garbage: to look through it takes 0.1 s
    for _ in range(repeats):
        for name, call in calls.items():
            gc.collect()
            samples[name].append(1e3 * _seconds(call, numbers[name]))
            if bar is not None:
                bar.update()
    gc.unfreeze()
    return {name: summary(values) for name, values in samples.items()}


def _seconds(call: Callable[[], Any], number: int | None = None) -> float:
    if number is None:
        call()  # the first is slower
        number = 1
    start = time.perf_counter()
    for _ in range(number):
        call()
    return (time.perf_counter() - start) / number


def summary(values: list[float]) -> Times:
    """Median, least and greatest of the samples."""
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "repeats": len(values),
    }


def widen_heap() -> None:
    """Have the C library keep more of what is freed, as it does after large tensors.

    glibc gives freed memory back to the system from a bound on, and raises that to twice
    the largest block freed so far: 64 MiB at most. What comes back is paid for page by
    page: temporaries of a few million elements may take twice as long before as after.
    """
    torch.empty(7 << 20)


def on_threads(
    script: str, counts: Sequence[int] = (1, 2), more: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """The results that the script prints as JSON when it is run with ``--threads`` 1, 2.

    Each process is pinned to as many cores before it loads anything, since libraries
    take the size of their pools (OpenMP's, XLA's) from that. ``others`` in a result says
    how much of a core other processes used meanwhile, on the whole machine.
    """
    results: list[dict[str, Any]] = []
    for count in counts:
        cores = sorted(os.sched_getaffinity(0))[:count]
        if len(cores) < count:
            raise RuntimeError(f"{count} threads need {count} cores, there are {cores}")
        start, foreign = time.perf_counter(), _foreign_seconds()
        done = subprocess.run(
            [sys.executable, script, "--threads", str(count), *more],
            stdout=subprocess.PIPE,
            check=True,
            env={**os.environ, "OMP_NUM_THREADS": str(count)},
            preexec_fn=lambda cores=cores: os.sched_setaffinity(0, cores),
        )
        others = (_foreign_seconds() - foreign) / (time.perf_counter() - start)
        results += [{**r, "others": round(others, 3)} for r in json.loads(done.stdout)]
    return results


def _foreign_seconds() -> float:
    """Processor time that neither this process nor its children have used, on Linux."""
    kinds = Path("/proc/stat").read_text(encoding="utf-8").split("\n")[0].split()[1:]
    user, nice, system, _, _, *interrupts = map(int, kinds[:8])  # idle and waiting: none
    used = sum((user, nice, system, *interrupts)) / os.sysconf("SC_CLK_TCK")
    return used - sum(os.times()[:4])


def difference(found: Iterable[Tensor], exact: Iterable[Tensor]) -> float:
    """The greatest difference of two lists, relative to a tensor's greatest entry."""
    return max(
        ((a.double() - b).abs().max() / b.abs().max()).item()
        for a, b in zip(found, exact)
    )


def peak_bytes(call: Callable[[], Any]) -> int:
    """The most bytes that tensors allocated in a call held at one time.

    Counted from each allocation and release that torch's allocator reports. The same at
    every run; without Python objects, code, and memory that the system keeps in reserve.
    """
    call()

    def twice() -> None:  # what the first leaves behind counts against the second
        call()
        call()

    return max(accumulate(_changes(twice)[0], initial=0))


def first_call_bytes(call: Callable[[], Any]) -> tuple[int, int]:
    """What the result of a first call keeps alive, graph included; and the peak.

    The first, since an optimizer makes its next results in the memory of its last ones.
    """

    def kept() -> Any:
        result = call()
        gc.collect()  # a cycle is no part of the result
        return result

    changes, result = _changes(kept)
    del result  # alive until here
    return sum(changes), max(accumulate(changes, initial=0))


def _changes(call: Callable[[], Any]) -> tuple[list[int], Any]:
    """The bytes of each allocation, and less than 0 of each release; and the result."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        result = call()
    assert record.profiler is not None and record.profiler.kineto_results is not None
    events: Any = record.profiler.kineto_results.events()
    changes = [
        (event.start_ns(), event.nbytes())
        for event in events
        if event.name() == "[memory]"
    ]
    return [change for _, change in sorted(changes, key=lambda pair: pair[0])], result


def environment() -> dict[str, Any]:
    """The machine and the versions that a measurement belongs to."""
    packages = ("torch", "funcopt", "higher", "torchopt", "optree", "optax", "jax")
    return {
        "date": time.strftime("%Y-%m-%d"),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gib": _memory_gib(),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        **{name: _version(name) for name in packages},
        "device": "cpu",
    }


def save(name: str, result: Any, *, measured: bool = True) -> None:
    """Write ``results/name.json``, and beside it the environment it was measured in."""
    RESULTS.mkdir(exist_ok=True)
    files = {name: result} | ({"environment": environment()} if measured else {})
    for stem, content in files.items():
        text = json.dumps(content, indent=1, ensure_ascii=False)
        (RESULTS / f"{stem}.json").write_text(text + "\n", encoding="utf-8")


def load(name: str) -> Any:
    """What `save` wrote, or None."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":")[1].strip() for line in lines if "model name" in line]
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{names[0] if names else platform.machine()} ({capability})"


def _memory_gib() -> float | None:
    if not hasattr(os, "sysconf"):
        return None
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
