"""Time and launches on a GPU; on the CPU, for rehearsals, the same by its clock."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch._C._autograd import DeviceType

import measure

Step: TypeAlias = Callable[[], Any]

_CYCLES = 20_000_000  # 10 ms at 2 GHz


def poison(device: str) -> None:
    """Leave NaN in the memory that is given out next."""
    for size in (64, 1000, 50_000, 300_000):
        kept = [torch.full((size,), float("nan"), device=device) for _ in range(40)]
        del kept


def captured(step: Step, device: str) -> Step:
    """The step as a CUDA graph, to be replayed."""
    if device == "cpu":
        return step
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def medians(
    calls: Mapping[str, Step], device: str, repeats: int, ahead: bool = False
) -> dict[str, float]:
    """Milliseconds of each call on the device, the calls in turn.

    With ``ahead`` the device is kept busy until the host, which must take less than 10 ms
    for a call, has queued all of it; else what the device waits for the host counts.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for k in range(repeats + 3):
        for name, call in calls.items():
            value = _milliseconds(call, device, ahead)
            if k >= 3:  # the first compile, and fill the allocator's pool
                samples[name].append(value)
    return {name: statistics.median(values) for name, values in samples.items()}


def _milliseconds(call: Step, device: str, ahead: bool) -> float:
    if device == "cpu":
        begin = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - begin)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    if ahead:
        torch.cuda._sleep(_CYCLES)
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def host_time(step: Step, device: str, repeats: int) -> float:
    """Microseconds of a call on the CPU's clock, while the device keeps up."""
    count, samples = (50, []) if device == "cuda" else (1, [])
    for _ in range(repeats):
        begin = time.perf_counter()
        for _ in range(count):
            step()
        samples.append(1e6 * (time.perf_counter() - begin) / count)
        if device == "cuda":
            torch.cuda.synchronize()
    return statistics.median(samples)


def launches(step: Step, device: str) -> int | None:
    """How many kernels a call launches."""
    if device == "cpu":
        return None
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CUDA]
    ) as seen:
        step()
        torch.cuda.synchronize()
    kinds = ("Memcpy", "Memset")
    # The calls of CUDA's functions, cudaLaunchKernel and others, are events as well.
    found = [e for e in seen.key_averages() if e.device_type == DeviceType.CUDA]
    return sum(e.count for e in found if not e.key.startswith(kinds))


def environment() -> dict[str, Any]:
    import triton

    card = torch.cuda.get_device_properties(0)
    return measure.environment() | {
        "device": card.name,
        "device_memory_gib": round(card.total_memory / 2**30),
        "processors": card.multi_processor_count,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
    }
