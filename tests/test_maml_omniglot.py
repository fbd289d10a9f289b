"""The few-shot example as a whole: its methods, its runs, its resumption, its errors."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import funcopt as fo
import maml_omniglot
from fewshot import checkpoint, glyphs, nets
from fewshot.episodes import Batch, Episodes, Tasks
from fewshot.evaluation import estimate
from fewshot.methods import METHODS, dealt, loss_of
from fewshot.split import Split
from fewshot.training import TAIL, Progress, beginning, iterations
from funcopt import tree

ROOT = Path(__file__).parents[1]
OMNIGLOT = ROOT.parent / "shared" / "data" / "omniglot"
ALL = list(METHODS)
TINY = (
    *("--ways", "3", "--queries", "2", "--filters", "4", "--meta-batch", "2"),
    *("--inner-steps", "2", "--eval-tasks", "5"),
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def blots(classes: int, seed: int) -> Split:
    """Classes of noisy copies of one random pattern each: 12 examples, as of glyphs."""
    patterns = torch.rand(classes, 1, 7, 7, generator=seeded(seed)).round()
    noise = torch.rand(classes, 12, 28, 28, generator=seeded(seed + 1))
    large = torch.nn.functional.interpolate(patterns, scale_factor=4.0)
    images = (large + 0.3 * noise) / 1.3
    return Split(images, [f"blot {i}" for i in range(classes)], ["Blots"] * classes)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., int]:
    """The program on blots, which need no rendering, in a folder of the test's own."""
    monkeypatch.setattr(glyphs, "load", lambda: (blots(12, seed=0), blots(6, seed=9)))
    monkeypatch.chdir(tmp_path)
    return lambda *options: maml_omniglot.main([*TINY, *map(str, options)])


def results(out: str) -> dict[str, Any]:
    return json.loads(Path(out, "results.json").read_text())


def progress(out: str) -> Progress:
    return checkpoint.load(Path(out, "checkpoint.pt"))[1]


def same(a: Any, b: Any) -> bool:
    """Bit for bit, NaN-free; leaf by leaf."""
    return all(map(torch.equal, tree.leaves(a), tree.leaves(b)))


def same_training(a: Progress, b: Progress) -> bool:
    untimed = (part._replace(seconds=0.0, iteration=0)[2:] for part in (a, b))
    return a.iteration == b.iteration and same(*untimed)


# Methods ----------------------------------------------------------------------------

STEPS, LR = 2, 0.3


@pytest.fixture
def setting() -> tuple[nets.Net, nets.Params, Tasks]:
    """A small float64 net, no leaf of it zero, and two tasks."""
    net = nets.conv4(3, filters=4)
    noise = seeded(5)
    params = {
        name: p.double() + 0.1 * torch.randn(p.shape, generator=noise).double()
        for name, p in net.init(seeded()).items()
    }
    tasks = Episodes(blots(8, 0).images, 3, 2, 4, generator=seeded(1)).sample(2)
    return net, params, tree.map(lambda x: x.double() if x.ndim > 2 else x, tasks)


def one_by_one(tasks: Tasks) -> list[Tasks]:
    return [tree.map(lambda x, i=i: x[i], tasks) for i in range(2)]


def descend(
    loss: Callable[[nets.Params, Batch], Tensor],
    params: nets.Params,
    batches: list[Batch],
    moving: str = "",
    create_graph: bool = True,
) -> nets.Params:
    """Gradient descent by torch.autograd, on the leaves whose names begin so."""
    for batch in batches:
        names = [name for name in params if name.startswith(moving)]
        grads = torch.autograd.grad(
            loss(params, batch), [params[n] for n in names], create_graph=create_graph
        )
        steps = dict(zip(names, grads, strict=True))
        params = {n: p - LR * steps[n] if n in steps else p for n, p in params.items()}
    return params


def by_hand(name: str, net: nets.Net, params: nets.Params, tasks: Tasks) -> nets.Params:
    """Each paper's meta-gradient, from torch.autograd alone."""

    def loss(p: nets.Params, batch: Batch) -> Tensor:
        return loss_of(net.apply)(p, batch)[0]

    grads = {n: torch.zeros_like(p) for n, p in params.items()}
    for support, query in one_by_one(tasks):
        theta = {n: p.clone().requires_grad_() for n, p in params.items()}
        if name == "reptile":
            x, y = (torch.cat(pair) for pair in zip(support, query, strict=True))
            x, y = x[y.argsort(stable=True)], y.sort().values
            batches = [Batch(x[k::STEPS], y[k::STEPS]) for k in range(STEPS)]
            end = descend(loss, theta, batches, create_graph=False)
            parts = [theta[n] - end[n] for n in theta]
        else:
            moving = "head." if name == "anil" else ""
            end = descend(loss, theta, [support] * STEPS, moving, name != "fomaml")
            parts = torch.autograd.grad(loss(end, query), list(theta.values()))
        for n, part in zip(theta, parts, strict=True):
            grads[n] += part.detach() / 2
    return grads


@pytest.mark.parametrize("name", ALL)
def test_the_meta_gradient_is_the_papers(name: str, setting):
    net, params, tasks = setting
    method = METHODS[name](net.apply, STEPS, LR)
    theta = method.init(params)
    _, grads = fo.meta.value_and_grad(method.task_loss, has_aux=True)(theta, tasks)
    learned_rates = name in ("metasgd", "lslr")
    found = grads["params"] if learned_rates else grads
    expected = by_hand("maml" if learned_rates else name, net, params, tasks)
    assert found.keys() == params.keys()
    for n, gradient in expected.items():
        assert gradient.abs().max() > 1e-6, f"{n}: nothing to compare"
        torch.testing.assert_close(found[n], gradient, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["metasgd", "lslr"])
def test_the_gradient_of_learned_rates_is_the_slope(name: str, setting):
    net, params, tasks = setting
    method = METHODS[name](net.apply, STEPS, LR)
    theta = method.init(params)
    shapes = {n: r.shape for n, r in theta["lr"].items()}
    wanted = {n: p.shape if name == "metasgd" else (STEPS,) for n, p in params.items()}
    assert shapes == wanted
    value_and_grad = fo.meta.value_and_grad(method.task_loss, has_aux=True)
    _, grads = value_and_grad(theta, tasks)
    way = tree.map(torch.randn_like, theta["lr"])

    def loss(distance: float) -> Tensor:
        rates = tree.map(lambda r, w: r + distance * w, theta["lr"], way)
        return value_and_grad({**theta, "lr": rates}, tasks)[0][0]

    slope = (loss(1e-6) - loss(-1e-6)) / 2e-6
    along = sum((grads["lr"][n] * way[n]).sum() for n in way)
    torch.testing.assert_close(along, slope, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ALL)
def test_what_adapts(name: str, setting):
    net, params, tasks = setting
    method = METHODS[name](net.apply, STEPS, LR)
    adapted = method.adapt(method.init(params), one_by_one(tasks)[0].support).params
    moved = {n for n in params if not torch.equal(adapted[n], params[n])}
    assert moved == {n for n in params if name != "anil" or n.startswith("head.")}


@pytest.mark.parametrize("hands, share", [(5, 4), (4, 5), (18, 1), (40, 1)])
def test_dealt_images_are_fair_shares(hands: int, share: int):
    numbers = torch.arange(18.0)  # 3 support and 15 query images of 3 classes
    labels = torch.cat([torch.arange(3), torch.arange(3).repeat_interleave(5)])
    task = Tasks(*(Batch(numbers[i], labels[i]) for i in (slice(3), slice(3, 18))))
    x, y = dealt(task, hands)
    assert x.shape == y.shape == (hands, share)
    assert x.unique().numel() == min(18, hands * share)
    assert torch.equal(y.flatten(), labels[x.flatten().long()])
    if share > 2:
        assert all(set(part.tolist()) == {0, 1, 2} for part in y)


# Runs -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_a_run_of_every_method(name: str, run, capsys: pytest.CaptureFixture[str]):
    assert run("--method", name, "--iterations", 3, "--out", "o", "--seed", 7) == 0
    found = results("o")
    expected = {"method": name, "ways": 3, "seed": 7, "iterations": 3, "device": "cpu"}
    assert expected.items() <= found["settings"].items()
    assert found["data"]["name"] == "glyphs"
    assert found["data"]["test_classes"] == {"Blots": 6}
    assert found["training"]["iterations"] == 3
    assert found["training"]["seconds"] > 0
    assert not found["training"]["interrupted"]
    assert found["environment"]["torch"] == torch.__version__
    for when in ("before", "after"):
        figure = found["test"][when]
        assert 0 <= figure["mean"] <= 1 and figure["margin"] >= 0

    printed = capsys.readouterr().out
    assert f"{100 * found['test']['after']['mean']:.2f} %" in printed
    assert "before adaptation" in printed and "after 2 steps" in printed

    rates = {"rates.png"} if name in ("metasgd", "lslr") else set()
    files = {"results.json", "checkpoint.pt", "curve.png", "task.png"} | rates
    assert {path.name for path in Path("o").iterdir()} == files
    for picture in Path("o").glob("*.png"):
        with Image.open(picture) as image:
            assert min(image.size) > 200
            assert len(image.convert("RGB").getcolors(1 << 20)) > 20  # not blank

    last = progress("o")
    start = METHODS[name](nets.conv4(3, filters=4).apply, 2, 0.4).init(
        nets.conv4(3, filters=4).init(maml_omniglot.generators(7)[0])
    )
    for theta in (last.theta, last.average):
        pairs = zip(tree.leaves(theta), tree.leaves(start), strict=True)
        assert not any(torch.equal(new, old) for new, old in pairs)
    assert all(p.is_leaf and not p.requires_grad for p in tree.leaves(last.theta))


def test_fully_connected_net_and_more_shots(run):
    assert run("--net", "mlp", "--shots", 2, "--iterations", 2, "--out", "o") == 0
    assert "linear1.weight" in progress("o").theta


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["maml", pytest.param("reptile", marks=pytest.mark.slow)]
)
def test_blots_are_learned(name: str, run):
    wide = ("--filters", 16, "--iterations", 80, "--eval-tasks", 50)
    run("--method", name, *wide, "--out", "o")
    after = results("o")["test"]["after"]
    assert after["mean"] - after["margin"] > 0.6  # chance: 0.33


def test_the_average_weighs_late_iterations_most(setting):
    net, params, _ = setting
    params = tree.map(Tensor.float, params)
    method, outer = METHODS["maml"](net.apply, 1, LR), fo.adam(lr=0.01)
    episodes = Episodes(blots(8, 0).images, 3, 1, 2, generator=seeded())
    first = beginning(method.init(params), outer, episodes.generator)
    run = list(islice(iterations(method, outer, episodes, 2, first), 6))
    # s (s + 1) … (s + TAIL - 2), a power s^(TAIL - 1) for large s; the first θ has none.
    weights = [math.prod(range(s, s + TAIL - 1)) for s in range(1, 7)]
    for name, mean in run[-1].average.items():
        each = [w * p.theta[name].double() for w, p in zip(weights, run, strict=True)]
        expected = torch.stack(each).sum(0) / sum(weights)
        torch.testing.assert_close(mean.double(), expected, rtol=1e-5, atol=1e-6)
        assert not torch.equal(mean, run[-1].theta[name])


def test_default_folder_is_under_runs(run):
    run("--iterations", 1)
    assert Path("runs/glyphs-3way-1shot-maml/results.json").is_file()


def test_without_a_limit_three_minutes_are_meant():
    parser = maml_omniglot.options.parser("")
    limits = {
        options: maml_omniglot.options.parse(parser, options)[0].minutes
        for options in ((), ("--iterations", "9"), ("--minutes", "1.5"))
    }
    assert list(limits.values()) == [3.0, None, 1.5]


def test_estimate():
    mean, margin = estimate(torch.tensor([0.2, 0.4, 0.6, 0.8]))
    assert mean == pytest.approx(0.5)
    assert margin == pytest.approx(1.96 * (0.2 / 3) ** 0.5 / 2)


# Stopping and going on --------------------------------------------------------------


def one_quick(names: list[str]) -> list[Any]:
    """The names; runs with all but the first are slow."""
    return [names[0], *(pytest.param(name, marks=pytest.mark.slow) for name in names[1:])]


@pytest.mark.parametrize("name", one_quick(ALL))
def test_resumed_equals_uninterrupted_bit_for_bit(name: str, run):
    run("--method", name, "--iterations", 4, "--out", "whole")
    run("--method", name, "--iterations", 2, "--out", "halves")
    half = progress("halves")
    run("--resume", "halves/checkpoint.pt", "--iterations", 4)
    whole, halves = progress("whole"), progress("halves")
    assert same_training(whole, halves)
    assert results("whole")["test"] == results("halves")["test"]
    for part in ("theta", "average", "state", "random"):  # each one matters
        assert not same(getattr(half, part), getattr(whole, part)), part


def test_time_limits_a_run_but_does_not_change_it(run):
    run("--minutes", "0.005", "--out", "timed")
    made = progress("timed").iteration
    assert made >= 1
    run("--iterations", made, "--out", "counted")
    assert same_training(progress("timed"), progress("counted"))


@pytest.mark.parametrize("where", one_quick(["sample", "update", "save"]))
def test_interrupt_keeps_whole_iterations(
    where: str, run, monkeypatch: pytest.MonkeyPatch, capsys
):
    run("--iterations", 5, "--out", "whole")
    owner, name = {
        "sample": (Episodes, "sample"),
        "update": (maml_omniglot.tqdm, "update"),
        "save": (checkpoint, "save"),
    }[where]
    intact = getattr(owner, name)
    calls = []

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return intact(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(maml_omniglot, "SAVE_EVERY", 0.0)
        patch.setattr(owner, name, interrupted)
        capsys.readouterr()
        assert run("--iterations", 5, "--out", "o") == 130
    made = {"sample": 2, "update": 3, "save": 3}[where]
    printed = capsys.readouterr().out
    assert "--resume o/checkpoint.pt" in printed
    assert f"{made} iterations of 2 tasks" in printed
    assert results("o")["training"]["interrupted"]
    assert progress("o").iteration == made
    run("--resume", "o/checkpoint.pt")
    assert same_training(progress("whole"), progress("o"))


def test_interrupt_before_the_first_iteration(run, monkeypatch: pytest.MonkeyPatch):
    sample = Episodes.sample

    def interrupted(self: Episodes, tasks: int) -> Tasks:
        monkeypatch.setattr(Episodes, "sample", sample)
        raise KeyboardInterrupt

    monkeypatch.setattr(Episodes, "sample", interrupted)
    assert run("--iterations", 5, "--out", "o") == 130
    assert progress("o").iteration == 0
    json.loads(
        Path("o/results.json").read_text(), parse_constant=pytest.fail
    )  # NaN is no JSON


def test_a_checkpoint_is_plain_data_and_its_folder_may_move(run):
    run("--iterations", 1, "--out", "o")
    shutil.move("o/checkpoint.pt", "elsewhere.pt")
    assert torch.load("elsewhere.pt", weights_only=True)["settings"]["ways"] == 3
    run("--resume", "elsewhere.pt", "--iterations", 2, "--out", "new")
    assert checkpoint.load(Path("elsewhere.pt"))[1].iteration == 2
    assert results("new")["training"]["iterations"] == 2


def test_a_failed_save_keeps_the_older_checkpoint(run, monkeypatch: pytest.MonkeyPatch):
    run("--iterations", 1, "--out", "o")
    before = Path("o/checkpoint.pt").read_bytes()

    def full_disk(_: Any, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="no space"):
        checkpoint.save(Path("o/checkpoint.pt"), {}, progress("o"))
    assert Path("o/checkpoint.pt").read_bytes() == before


# Errors -----------------------------------------------------------------------------


def bad_files() -> None:
    Path("file").write_text("no checkpoint")
    Path("empty").touch()
    torch.save({"weights": torch.zeros(2)}, "foreign")
    whole = Path("o/checkpoint.pt").read_bytes()
    Path("cut").write_bytes(whole[: len(whole) // 2])
    Path("pickled").write_bytes(b"cos\nsystem\n(S'touch hacked'\ntR.")
    Path("folder").mkdir()
    run = torch.load("o/checkpoint.pt", weights_only=True)
    del run["progress"]["state"]
    torch.save(run, "lacking")


ERRORS = [
    ("--ways 7", "7 ways, but there are 6 classes"),
    ("--shots 12", "12 shots leave no query images"),
    ("--data nowhere", "Omniglot is incomplete"),
    ("--data file", "Omniglot is incomplete"),
    ("--ways none", "--ways: wants a whole number from 1, not 'none'"),
    ("--shots 0", "--shots: wants a whole number from 1, not '0'"),
    ("--inner-lr nan", "--inner-lr: wants a number above 0, not 'nan'"),
    ("--minutes -1", "--minutes: wants a number above 0, not '-1'"),
    ("--eval-tasks 1", "needs at least 2"),
    ("--method mmal", "--method: invalid choice: 'mmal'"),
    ("--device nonsense", "--device: cannot use 'nonsense'"),
    ("--frobnicate", "unrecognized arguments: --frobnicate"),
    ("--out file", "exists"),
    ("--checkpoint folder", "the checkpoint folder is a folder"),
    ("--checkpoint file/c.pt", "exists"),
    ("--resume nowhere", "No such file"),
    ("--resume folder", "Is a directory"),
    ("--resume file", "file is no checkpoint, or is damaged"),
    ("--resume empty", "empty is no checkpoint, or is damaged"),
    ("--resume cut", "cut is no checkpoint, or is damaged"),
    ("--resume pickled", "pickled is no checkpoint, or is damaged"),
    ("--resume foreign", "foreign is no checkpoint of this program"),
    ("--resume lacking", "lacking is no checkpoint of this program"),
    ("--resume o/checkpoint.pt --ways 4", "trained with --ways 3"),
    ("--resume o/checkpoint.pt --method anil", "trained with --method maml"),
    ("--resume o/checkpoint.pt --inner-steps 3", "trained with --inner-steps 2"),
    ("--resume o/checkpoint.pt --data nowhere", "trained on other data"),
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run in o/ and with files that are no checkpoints."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(glyphs, "load", lambda: (blots(12, 0), blots(6, 9)))
        maml_omniglot.main([*TINY, "--iterations", "1", "--out", "o"])
        bad_files()
    return folder


@pytest.mark.parametrize("options, words", ERRORS, ids=[o for o, _ in ERRORS])
def test_errors_are_one_line_and_status_2(
    options: str, words: str, run, trained: Path, monkeypatch, capsys
):
    monkeypatch.chdir(trained)
    before = sorted(trained.rglob("*"))
    resumed = options.startswith("--resume o/")
    with pytest.raises(SystemExit) as stop:
        if resumed:  # the settings that matter are the checkpoint's
            maml_omniglot.main(options.split())
        else:
            run("--iterations", 1, *options.split())
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert words in captured.err
    assert captured.err.count("\n") == 1 and not captured.out
    assert sorted(trained.rglob("*")) == before  # nothing written


# The program as users start it ------------------------------------------------------


def start(*options: str, folder: Path) -> subprocess.Popen[str]:
    program = [sys.executable, str(ROOT / "examples" / "maml_omniglot.py"), *options]
    # A shell starts background jobs, and CI may start us, with Ctrl-C ignored.
    begin = "import os, sys; from signal import *; signal(SIGINT, SIG_DFL)"
    begin += "; os.execv(sys.argv[1], sys.argv[1:])"
    pipe = subprocess.PIPE
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", begin, *program],
        cwd=folder,
        env=environment,
        stdout=pipe,
        stderr=pipe,
        text=True,
    )


@pytest.mark.slow
def test_ctrl_c_on_glyphs_then_resume(tmp_path: Path):
    small = ("--filters", "8", "--meta-batch", "2", "--eval-tasks", "10")
    with start(*small, "--iterations", "100000", folder=tmp_path) as process:
        assert process.stderr is not None
        while "1 it" not in (text := process.stderr.readline(200)):
            assert text, "ended before training"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert "after 1 step" in out and "520 classes (Latin, Greek)" in out
    saved = tmp_path / "runs/glyphs-5way-1shot-maml/checkpoint.pt"
    made = checkpoint.load(saved)[1].iteration
    options = ("--resume", str(saved), "--iterations", str(made + 5))
    with start(*options, folder=tmp_path) as process:
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert f"{made + 5} iterations" in out


@pytest.mark.slow
@pytest.mark.skipif(not OMNIGLOT.is_dir(), reason=f"no Omniglot archives in {OMNIGLOT}")
def test_real_omniglot(tmp_path: Path):
    options = ("--filters", "16", "--iterations", "40", "--eval-tasks", "50")
    maml_omniglot.main([*options, "--data", str(OMNIGLOT), "--out", str(tmp_path)])
    found = results(str(tmp_path))
    assert found["data"]["name"] == "omniglot"
    assert sum(found["data"]["train_classes"].values()) == 4 * 964
    assert sum(found["data"]["test_classes"].values()) == 4 * 659
    test = found["test"]
    assert test["after"]["mean"] > test["before"]["mean"] + 0.15
