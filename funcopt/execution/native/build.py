"""C source → a loaded library: the system's compiler, and the user's cache folder.

The folder belongs to the user alone. An entry is a shared library that ends in the
SHA-256 of what stands before: one that is cut short, altered, or not the user's own is
built again and never loaded.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from funcopt.execution.executor import BuildError

# No contraction: a fused multiply-add stands only where the source says so. Errors of
# math functions are not looked at, which leaves roots and comparisons to vectors; and a
# choice by a scalar stays in its loop, since gcc makes no vectors of a loop split by it.
_FLAGS = (
    "-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math",
    "-fno-unswitch-loops", "-fopenmp-simd", "-fPIC", "-shared", "-std=gnu11", "-w",
    "-x", "c",
)  # fmt: skip
# Vectors as wide as torch's own: compilers by themselves take half of what there is.
if torch.backends.cpu.get_cpu_capability() == "AVX512":
    _FLAGS += ("-mprefer-vector-width=512",)
_DIGEST = 32  # bytes of a SHA-256
_SECONDS = 60  # a compiler that takes longer than this hangs


@dataclass
class Library:
    """A loaded library, and if it is new what is to become its entry in the cache."""

    loaded: ctypes.CDLL
    made: Path | None  #: a new library's file, None for one from the cache
    entry: Path

    def keep(self) -> None:
        """Put a new library into the cache: whole or not at all, whoever else does so.

        Raises:
            BuildError: the folder cannot be written to.
        """
        if self.made:
            try:
                os.replace(self.made, self.entry)
            except OSError as error:
                raise BuildError(f"{self.entry} cannot be written: {error}") from error
            self.made = None

    def discard(self) -> None:
        if self.made:
            self.made.unlink(missing_ok=True)
            self.made = None


def library(source: str, flags: Sequence[str] = ()) -> Library:
    """The library of ``source``, from the cache or built with these ``flags``, too.

    Raises:
        BuildError: there is no compiler, it fails, or the folder cannot be written to.
    """
    folder, compiler, kernel = _folder(), _compiler(), _key(source, flags)
    entry = folder / f"{kernel}-{_key_of(compiler) if compiler else '*'}.so"
    for found in [entry] if compiler else sorted(folder.glob(entry.name)):
        if _is_whole(found):
            try:
                return Library(ctypes.CDLL(str(found)), None, found)
            except OSError:
                pass  # made for another system that shares the folder: built again
    if compiler is None:
        raise BuildError(
            "no C compiler was found (cc, gcc, clang, or the one named by CC)"
        )
    try:
        handle, name = tempfile.mkstemp(suffix=".so", dir=folder)  # the user's alone
        os.close(handle)
    except OSError as error:
        raise BuildError(f"nothing can be written to {folder}: {error}") from error
    made = Path(name)
    try:
        _compile(compiler, source, made, flags)
        made.chmod(0o600)  # the linker made a file of its own
        content = made.read_bytes()
        made.write_bytes(content + hashlib.sha256(content).digest())
        return Library(ctypes.CDLL(name), made, entry)
    except (OSError, BuildError) as error:
        made.unlink(missing_ok=True)
        raise BuildError(str(error)) from error


def _compile(compiler: str, source: str, target: Path, flags: Sequence[str]) -> None:
    command = [compiler, *_FLAGS, *flags, "-o", str(target), "-", "-lm"]
    try:
        done = subprocess.run(
            command, input=source.encode(), capture_output=True, timeout=_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"the compiler {compiler} did not run: {error}") from error
    if done.returncode:
        words = done.stderr.decode(errors="replace").strip().splitlines()
        raise BuildError(f"the compiler {compiler} failed: {words[0] if words else '?'}")


def _compiler() -> str | None:
    for name in (os.environ.get("CC"), "cc", "gcc", "clang"):
        found = name and shutil.which(name)
        if found:
            return found  # not what a link leads to: ccache goes by its name
    return None


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


def _key(source: str, flags: Sequence[str]) -> str:
    """Of all but the compiler: where none is at hand, what another built will do."""
    versions = torch.__version__, _own_version()
    return _hash(source, *_FLAGS, *flags, _machine(), *versions)


def _key_of(compiler: str) -> str:
    binary = os.stat(compiler)  # its version, without the time that asking takes
    return _hash(compiler, str(binary.st_mtime_ns), str(binary.st_size))[:16]


def _hash(*parts: str) -> str:
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
