"""Kernels are built once, kept safely, and done without where they cannot be had."""

import hashlib
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import funcopt as fo
from funcopt.execution.native import build, driver, objects
from funcopt.execution.native import source as c_source
from funcopt.hyper import Hyper

pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="no C compiler"
)

P = torch.tensor([1.0, -2.0, 0.5])
EXPECTED = [0.5, -1.0, 0.25]


def opt(rate: float = 0.5) -> fo.Optimizer:
    """A new rule, which has built nothing yet."""

    def halved(g: Any, p: Any, *, step: Any, lr: Any) -> Any:
        return (p - lr * g,)

    return fo.elementwise(halved, name="halved", slots={}, hyper={"lr": Hyper(rate)})


def run(name: str | None = "native") -> None:
    made = opt()
    result, _ = made.update(P, made.init(P), P, execution=name)
    assert result.tolist() == EXPECTED


def why_not() -> str:
    """The reason that the plan gives for not running native kernels."""
    groups = fo.plan(opt(), P).groups
    assert groups[0].choice.name == "foreach"
    run(None)
    return dict(groups[0].choice.refused)["native"]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    objects.load()  # what all kernels share is in another folder
    driver.load()
    folder = tmp_path / "kernels"
    monkeypatch.setenv("FUNCOPT_CACHE", str(folder))
    return folder


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The compiler runs."""
    runs: list[Any] = []
    original = subprocess.run

    def spy(*args: Any, **kwargs: Any) -> Any:
        runs.append(args)
        return original(*args, **kwargs)

    monkeypatch.setattr(build.subprocess, "run", spy)
    return runs


def entry_of(cache: Path) -> Path:
    (entry,) = cache.iterdir()
    return entry


def is_whole(entry: Path) -> bool:
    content = entry.read_bytes()
    return hashlib.sha256(content[:-32]).digest() == content[-32:]


def test_built_once(cache: Path, compiled: list[Any]):
    run()
    assert len(compiled) == 1 and is_whole(entry_of(cache))
    run()
    assert len(compiled) == 1


def test_another_value_compiles_nothing(cache: Path, compiled: list[Any]):
    """Be it a number, learned, scheduled, each leaf's or task's own; or per element."""
    made, params = opt(), {"a": P, "b": 2 * P}
    state = made.init(params)

    def step(lr: Any, p: Any = params) -> torch.Tensor:
        return made.update(p, state, p, lr=lr, execution="native")[0]["a"]

    rates: list[Any] = [0.5, 0.25, torch.tensor(0.1), torch.tensor(0.2).double()]
    rates += [{"a": 0.3, "b": torch.tensor(0.4)}, fo.Schedule(lambda t: 0.6 / (1 + t))]
    found = [step(lr) for lr in rates]
    found += [*torch.vmap(step)(torch.tensor([0.7, 0.8]))]
    with torch.no_grad():
        found.append(step(torch.tensor(0.9, requires_grad=True)))
    assert len({tuple(p.tolist()) for p in found}) == len(found)
    assert len(compiled) == 1
    for factor in (0.1, 0.2):
        step({"a": factor * P.abs(), "b": factor * P.abs()})
    assert len(compiled) == 2


def test_the_users_alone(cache: Path):
    before = os.umask(0)
    try:
        run()
    finally:
        os.umask(before)
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    assert not entry_of(cache).stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO)


CHILD = """
import sys
sys.path.insert(0, {tests!r})
from test_native_build import run
run()
"""


def child(cache: Path, **environment: str) -> subprocess.Popen[str]:
    tests = str(Path(__file__).parent)
    env = {**os.environ, "FUNCOPT_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", CHILD.format(tests=tests)],
        env={**env, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_another_process_needs_no_compiler(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """What is in the cache is used though nothing could be built any more."""
    monkeypatch.setattr(driver, "load", driver.load.__wrapped__)
    run()
    (tmp_path / "nothing").mkdir()
    process = child(cache, PATH=str(tmp_path / "nothing"), CC="")
    _, errors = process.communicate()
    assert process.returncode == 0, errors


@pytest.mark.slow
def test_eight_at_once(cache: Path):
    """A good entry of the kernel, the driver and `objects` each, and nothing else."""
    processes = [child(cache) for _ in range(8)]
    for process in processes:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    assert [*map(is_whole, cache.iterdir())] == [True] * 3


def cut(entry: Path) -> None:
    entry.write_bytes(entry.read_bytes()[:1000])


def emptied(entry: Path) -> None:
    entry.write_bytes(b"")


def one_bit(entry: Path) -> None:
    content = bytearray(entry.read_bytes())
    content[len(content) // 2] ^= 1
    entry.write_bytes(bytes(content))


def foreign(entry: Path) -> None:
    os.chown(entry, 65534, 65534)


def linked(entry: Path) -> None:
    moved = entry.rename(entry.parent.parent / "elsewhere.so")
    entry.symlink_to(moved)


def no_library(entry: Path) -> None:
    """Signed, as by a machine that builds others."""
    content = b"\x7fELF of another kind"
    entry.write_bytes(content + hashlib.sha256(content).digest())


def a_folder(entry: Path) -> None:
    entry.unlink()
    entry.mkdir()


DAMAGES = [cut, emptied, one_bit, foreign, linked, no_library]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_entries_are_built_again(
    cache: Path, compiled: list[Any], damage: Callable[[Path], None]
):
    run()
    entry = entry_of(cache)
    # This process has the library mapped: what is written to stays another file.
    shutil.copy(entry, copy := entry.with_name("copy"))
    copy.replace(entry)
    if damage is foreign and os.getuid():
        pytest.skip("only root gives files away")
    damage(entry)
    run()
    assert len(compiled) == 2
    assert is_whole(entry) and not entry.is_symlink()
    assert entry.stat().st_uid == os.getuid()
    assert entry_of(cache) == entry


def test_an_entry_that_cannot_be_replaced(cache: Path):
    run()
    a_folder(entry_of(cache))
    (entry_of(cache) / "full").touch()
    assert str(cache) in why_not()


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777, 0o1777])
def test_a_folder_that_others_write_to_is_refused(cache: Path, mode: int):
    cache.mkdir()
    cache.chmod(mode)
    assert "others may write to the cache folder" in why_not()
    assert not list(cache.iterdir())


@pytest.mark.skipif(os.getuid() != 0, reason="only root gives folders away")
def test_anothers_folder_is_refused(cache: Path):
    cache.mkdir(mode=0o700)
    os.chown(cache, 65534, 65534)
    assert "belongs to another user" in why_not()


def test_a_file_in_place_of_the_folder(cache: Path):
    cache.touch()
    assert str(cache) in why_not()


def test_where_the_cache_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("FUNCOPT_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    run()
    assert list((tmp_path / "home/.cache/funcopt").iterdir())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    run()
    assert list((tmp_path / "xdg/funcopt").iterdir())


# --- no kernel


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o700)
    return str(path)


def without_compiler(tmp_path: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setenv("PATH", str(tmp_path))
    patch.delenv("CC", raising=False)


def failing(tmp_path: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setenv("CC", script(tmp_path / "bad", "echo no space left >&2; exit 3"))


def dying(tmp_path: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setenv("CC", script(tmp_path / "dies", "kill -9 $$"))


def writing_nothing(tmp_path: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setenv("CC", script(tmp_path / "lazy", "exit 0"))


def writing_nonsense(tmp_path: Path, patch: pytest.MonkeyPatch) -> None:
    text = 'while [ "$1" != -o ]; do shift; done; echo nonsense > "$2"'
    patch.setenv("CC", script(tmp_path / "odd", text))


def hanging(tmp_path: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(build, "_SECONDS", 0.05)
    patch.setenv("CC", script(tmp_path / "hangs", "exec sleep 5"))


def no_program(tmp_path: Path, patch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cc").write_bytes(b"\x00\x01")
    (tmp_path / "cc").chmod(0o700)
    patch.setenv("CC", str(tmp_path / "cc"))


def turned_off(tmp_path: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setenv("FUNCOPT_NATIVE", "0")


def computing_nonsense(tmp_path: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setitem(c_source._EXPRESSIONS, "sub", "{0} + {1}")


def without_driver(tmp_path: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(c_source, "print_driver", lambda: "#error no driver")
    patch.setattr(driver, "load", driver.load.__wrapped__)


HINDRANCES: dict[str, tuple[Callable[..., None], str]] = {
    "no compiler": (without_compiler, r"no C compiler was found"),
    "fails": (failing, "the compiler .*bad failed: no space left"),
    "dies": (dying, "the compiler .*dies failed"),
    "writes nothing": (writing_nothing, "."),
    "writes nonsense": (writing_nonsense, "."),
    "hangs": (hanging, "the compiler .*hangs did not run: .* timed out"),
    "no program": (no_program, "the compiler .*cc did not run"),
    "turned off": (turned_off, "turned off: FUNCOPT_NATIVE=0"),
    "no driver": (without_driver, "the compiler .* failed"),
    "computes nonsense": (computing_nonsense, "differs from the rule"),
}


@pytest.mark.parametrize("what", HINDRANCES)
def test_without_kernels_foreach_and_a_sentence(
    what: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    hinder, sentence = HINDRANCES[what]
    hinder(tmp_path, monkeypatch)
    reason = why_not()
    with pytest.raises(fo.ExecutionError, match=sentence):
        run("native")
    assert "\n" not in reason
    assert not cache.exists() or not list(cache.iterdir())  # nothing is left behind


def test_cc_is_asked_first_by_the_name_that_it_gives(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A link may lead to a program that is all compilers, as ccache, by their names."""
    found = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    log, mine = tmp_path / "log", tmp_path / "mine"
    mine.symlink_to(script(tmp_path / "all", f'echo $0 >> {log}; {found} "$@"'))
    monkeypatch.setenv("CC", str(mine))
    run()
    assert log.read_text().split() == [str(mine)]


def test_another_compiler_is_another_kernel(
    cache: Path, compiled: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run()
    found = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    monkeypatch.setenv("CC", script(tmp_path / "mine", f'{found} "$@"'))
    run()
    assert len(compiled) == len(list(cache.iterdir())) == 2


def test_a_kernel_is_of_one_source_compiler_machine_and_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    compiler = tmp_path / "cc"
    compiler.touch()

    def key(source: str = "a", flags: Sequence[str] = ()) -> str:
        return build._key(source, flags) + build._key_of(str(compiler))

    keys = [key(), key("b"), key(flags=["-O1"])]
    for text, time in (("one", 1), ("another", 1), ("another", 2)):
        compiler.write_text(text)
        os.utime(compiler, (time, time))
        keys.append(key())
    for owner, name, other in (
        (torch, "__version__", "2.99.0"),
        (build, "_own_version", lambda: "99"),
        (build, "_machine", lambda: "another"),
        (build, "_FLAGS", ("-O2",)),
    ):
        monkeypatch.setattr(owner, name, other)
        keys.append(key())
    assert len({*keys}) == len(keys) == 10


def test_machines_differ_in_what_their_processors_can_do(monkeypatch: pytest.MonkeyPatch):
    """And where no file tells, as on a Mac, they are those of one kind."""
    found = []
    for text in ("model: x\nflags: sse2", "model: x\nflags: sse2 avx2", "model: x"):
        monkeypatch.setattr(Path, "read_text", lambda *_, text=text: text)
        found.append(build._machine.__wrapped__())
    monkeypatch.undo()
    monkeypatch.setattr(build, "Path", lambda name: Path("/nowhere"))
    found.append(build._machine.__wrapped__())
    assert len({*found}) == 3 and found[2] == found[3]


def test_without_torchs_openmp(cache: Path, monkeypatch: pytest.MonkeyPatch):
    """One thread then does it all, with the same numbers."""
    made, p = fo.adamw(lr=0.1), torch.linspace(-1, 1, 100_000)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        expected, _ = made.update(p, made.init(p), p, execution="native")
        monkeypatch.setattr(driver, "_openmp", lambda: None)
        monkeypatch.setattr(driver, "load", driver.load.__wrapped__)
        again = fo.adamw(lr=0.1)
        found, _ = again.update(p, again.init(p), p, execution="native")
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found, expected)


def test_a_sentence_for_a_folder_without_room(
    cache: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(*args: Any, **kwargs: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(build.tempfile, "mkstemp", full)
    assert "No space left on device" in why_not()
