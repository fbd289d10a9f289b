"""C source → a loaded library, by the system's compiler, kept in the user's cache folder.

The folder belongs to the user alone. An entry is a shared library that ends in the SHA-256
of what stands before: one that is cut short, altered, or not the user's own is built again
and never loaded.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

# No contraction: a fused multiply-add stands only where the source says so. Errors of
# math functions are not looked at, which leaves roots and comparisons to vectors.
_FLAGS = (
    "-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math",
    "-fopenmp-simd", "-fPIC", "-shared", "-std=gnu11", "-w", "-x", "c",
)  # fmt: skip
_DIGEST = 32  # bytes of a SHA-256
_SECONDS = 60  # a compiler that takes longer than this hangs


class BuildError(Exception):
    """Why there is no library, as a sentence."""


def library(source: str, check: Callable[[ctypes.CDLL], None]) -> ctypes.CDLL:
    """The library of ``source``: from the cache, or built, checked and put there.

    ``check`` looks at a library before it is kept, and raises if it computes nonsense.

    Raises:
        BuildError: there is no compiler, it fails, or the folder cannot be written.
    """
    compiler = _compiler()
    folder = _folder()
    path = folder / f"{_key(source, compiler)}.so"
    if _is_whole(path):
        try:
            return ctypes.CDLL(str(path))
        except OSError:
            pass  # of another machine that shares the folder: built again
    handle, name = tempfile.mkstemp(suffix=".so", dir=folder)
    os.close(handle)
    made = Path(name)
    try:
        _compile(compiler, source, made)
        content = made.read_bytes()
        made.write_bytes(content + hashlib.sha256(content).digest())
        loaded = ctypes.CDLL(name)
        check(loaded)
        os.replace(made, path)  # whole or not at all, also with others building the same
        return loaded
    except OSError as error:
        raise BuildError(f"the kernel cannot be stored in {folder}: {error}") from error
    finally:
        made.unlink(missing_ok=True)


def _compile(compiler: str, source: str, target: Path) -> None:
    command = [compiler, *_FLAGS, "-o", str(target), "-", "-lm"]
    try:
        done = subprocess.run(
            command, input=source.encode(), capture_output=True, timeout=_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"the compiler {compiler} did not run: {error}") from error
    if done.returncode:
        words = done.stderr.decode(errors="replace").strip().splitlines()
        raise BuildError(f"the compiler {compiler} failed: {words[0] if words else '?'}")


def _compiler() -> str:
    for name in (os.environ.get("CC"), "cc", "gcc", "clang"):
        found = name and shutil.which(name)
        if found:
            return os.path.realpath(found)
    raise BuildError("no C compiler was found (cc, gcc, clang, or the one named by CC)")


def _folder() -> Path:
    """The cache folder, made if it is not there; the user's own, and nobody else's."""
    base = os.environ.get("FUNCOPT_CACHE") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "funcopt"
    )
    try:
        os.makedirs(base, mode=0o700, exist_ok=True)
        found = os.stat(base)
    except OSError as error:
        raise BuildError(f"the cache folder {base} cannot be made: {error}") from error
    if hasattr(os, "getuid") and found.st_uid != os.getuid():
        raise BuildError(f"the cache folder {base} belongs to another user")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise BuildError(f"others may write to the cache folder {base}: chmod go-w it")
    return Path(base)


def _key(source: str, compiler: str) -> str:
    binary = os.stat(compiler)
    parts = (
        source, compiler, str(binary.st_mtime_ns), str(binary.st_size), *_FLAGS,
        _machine(), torch.__version__, _own_version(),
    )  # fmt: skip
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


@cache
def _machine() -> str:
    """What -march=native looks at: a home folder may be shared by unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        features = next(x for x in lines if x.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        features = platform.processor()
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()} {features}"


@cache
def _own_version() -> str:
    try:
        return version("funcopt")
    except PackageNotFoundError:
        return "source"


def _is_whole(path: Path) -> bool:
    """Whether the entry is a file of this user's that ends in the digest of the rest."""
    try:
        found = path.lstat()
        if not stat.S_ISREG(found.st_mode):
            return False
        if hasattr(os, "getuid") and found.st_uid != os.getuid():
            return False
        content = path.read_bytes()
    except OSError:
        return False
    return hashlib.sha256(content[:-_DIGEST]).digest() == content[-_DIGEST:]
