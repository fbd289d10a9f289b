"""The driver of kernels: what goes over the leaves, on torch's threads."""

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch

from funcopt.execution.native import source
from funcopt.execution.native.build import library


@cache
def load() -> ctypes.CDLL:
    """What goes over the leaves for every kernel, on torch's threads.

    Raises:
        BuildError: it cannot be built.
    """
    built = library(source.print_driver(), ["-O1"])  # in half the time, and as fast
    try:
        built.keep()
    finally:
        built.discard()
    built.loaded.bind.argtypes = [ctypes.c_void_p] * 3
    built.loaded.bind(*_openmp() or [None] * 3)
    return built.loaded


@cache
def _openmp() -> tuple[Any, ...] | None:
    """torch's own OpenMP, as pointers to functions; None where it has another kind.

    A second library would keep a second pool of threads, and the two would fight for
    the cores.
    """
    for path in sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*")):
        names = ("omp_get_thread_num", "omp_get_num_threads", "GOMP_parallel")
        try:
            gomp = ctypes.CDLL(str(path))
            return tuple(ctypes.cast(gomp[name], ctypes.c_void_p) for name in names)
        except (OSError, AttributeError):
            continue
    return None
