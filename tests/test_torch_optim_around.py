"""What surrounds an optimizer works unmodified: torch's own tools, and killed runs."""

import io
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from golden import make as golden
from test_torch_optim import assert_like
from torch import Tensor, nn
from torch.optim import lr_scheduler as schedulers
from torch.optim import swa_utils

from funcopt import torch_optim

LIBRARIES = torch_optim, torch.optim
ALL = [*golden.CASES]


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(1)
    # no bias before the norm: its gradient is rounding, which Adam makes steps of
    layers = nn.Linear(3, 5, bias=False), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 2)
    return nn.Sequential(*layers).to(dtype)


def backward(model: nn.Module, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(8, 3, generator=generator).to(dtype)
    loss = (model(x) - x[:, :2].sin()).square().mean()
    loss.backward()
    return loss


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


# Checkpoints of today, for the releases to come ----------------------------------------


@pytest.mark.parametrize("name", [*ALL, *golden.OWN])
def test_an_old_checkpoint_is_loaded_and_goes_on(name: str):
    file = golden.FOLDER / f"{name}.pt"
    assert file.exists(), "python tests/golden/make.py writes it"
    saved = torch.load(file, weights_only=True)
    params = golden.start(name)
    for key, p in params.items():
        p.data.copy_(saved["params"][key])
    kwargs = {**golden.CASES, **golden.OWN}[name]
    opt = getattr(torch_optim, name)(params.items(), **kwargs)
    opt.load_state_dict(saved["optimizer"])
    assert {*opt.state_dict()["state"]} == {*saved["optimizer"]["state"]}
    for i, state in opt.state_dict()["state"].items():
        assert {*state} == {*saved["optimizer"]["state"][i]}
    golden.steps(opt, params, 3)
    limit = 1e-4 if name in ("Shampoo", "SOAP") else 2e-6  # of roots, on another machine
    for key, p in params.items():
        expected = saved["after"][key]
        torch.testing.assert_close(p.detach(), expected, rtol=limit, atol=limit / 10)


@pytest.mark.parametrize("saver, loader", [LIBRARIES, LIBRARIES[::-1]])
@pytest.mark.parametrize("name", ["LBFGS", "SparseAdam"])
def test_either_goes_on_by_a_closure_or_sparse_gradients(
    name: str, saver: Any, loader: Any
):
    straight, params = (golden.start(name) for _ in range(2))
    one = getattr(saver, name)(straight.values(), **golden.CASES[name])
    golden.steps(one, straight, 3)
    for p, q in zip(params.values(), straight.values()):
        p.data.copy_(q)
    torch.save(one.state_dict(), file := io.BytesIO())
    file.seek(0)
    other = getattr(loader, name)(params.values(), **golden.CASES[name])
    other.load_state_dict(torch.load(file, weights_only=True))
    golden.steps(one, straight, 3)
    golden.steps(other, params, 3)
    assert_like([*params.values()], [*straight.values()])
    assert_like(other.state_dict(), one.state_dict())


# Schedulers, averages, scales ----------------------------------------------------------

SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda t: 0.9**t),
    "MultiplicativeLR": lambda o: schedulers.MultiplicativeLR(o, lambda t: 0.9),
    "StepLR": lambda o: schedulers.StepLR(o, 2),
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, [2, 4]),
    "ConstantLR": lambda o: schedulers.ConstantLR(o, total_iters=3),
    "LinearLR": lambda o: schedulers.LinearLR(o, total_iters=3),
    "ExponentialLR": lambda o: schedulers.ExponentialLR(o, 0.9),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, 4),
    "PolynomialLR": lambda o: schedulers.PolynomialLR(o, total_iters=4),  # ends at 0
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 3),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, 0.01, 0.1, step_size_up=2),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, 0.1, total_steps=8),
    "ChainedScheduler": lambda o: schedulers.ChainedScheduler(
        [schedulers.ConstantLR(o), schedulers.ExponentialLR(o, 0.9)], optimizer=o
    ),
    "SequentialLR": lambda o: schedulers.SequentialLR(
        o, [schedulers.ConstantLR(o), schedulers.ExponentialLR(o, 0.9)], milestones=[2]
    ),
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=0),
    "SWALR": lambda o: swa_utils.SWALR(o, 0.05, anneal_epochs=3),
}


@pytest.mark.parametrize(
    "tensor", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["float", "tensor"]
)
@pytest.mark.parametrize(
    "rule", ["AdamW", pytest.param("SGD", marks=pytest.mark.slow)]
)  # some turn beta1, or the momentum
@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler(name: str, rule: str, tensor: bool):
    both = []
    kwargs = {"momentum": 0.9} if rule == "SGD" else {}
    for library in LIBRARIES:
        model = network()
        lr: Any = torch.tensor(0.1) if tensor else 0.1
        opt = getattr(library, rule)(model.parameters(), lr=lr, **kwargs)
        scheduler = SCHEDULERS[name](opt)
        for step in range(6):
            opt.zero_grad()
            backward(model, step)
            opt.step()
            scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
        both.append((weights(model), opt.state_dict()["param_groups"]))
    assert_like(both[0], both[1])


def test_no_scheduler_of_torchs_is_left_out():
    assert {*schedulers.__all__} - {"LRScheduler"} == {*SCHEDULERS} - {"SWALR"}


def test_averages_of_weights():
    both = []
    for library in LIBRARIES:
        model = network()
        opt = library.SGD(model.parameters(), lr=0.1, momentum=0.9)
        swa = swa_utils.AveragedModel(model)
        ema = swa_utils.AveragedModel(
            model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9)
        )
        for step in range(5):
            opt.zero_grad()
            backward(model, step)
            opt.step()
            swa.update_parameters(model)
            ema.update_parameters(model)
        swa_utils.update_bn([torch.randn(8, 3, generator=torch.Generator())], swa)
        both.append([*weights(swa), *weights(ema)])
    assert_like(both[0], both[1])


@pytest.mark.parametrize("name", ["AdamW", "Adafactor", "Muon", "Shampoo", "SOAP"])
def test_a_step_within_autocast_is_the_step_outside(name: str):
    """Also one that goes as the step before."""

    def run(within: bool) -> Tensor:
        torch.manual_seed(2)
        w = nn.Parameter(torch.randn(5, 4))
        opt = getattr(torch_optim, name)([w], lr=0.05)
        for _ in range(4):
            w.grad = torch.randn(5, 4)
            with torch.autocast("cpu", torch.bfloat16, enabled=within):
                opt.step()
        return w.detach()

    assert torch.equal(run(True), run(False))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "Adagrad"])
def test_a_grad_scaler_skips_what_overflows(name: str, fused: bool):
    """The first step, too, which leaves garbage in the momentum of torch's fused SGD."""
    both = []
    for library in LIBRARIES:
        model = network()
        flags = {"fused": fused and library is torch_optim}  # torch's alone is not sound
        kwargs = {"momentum": 0.9} if name == "SGD" else {}
        opt = getattr(library, name)(model.parameters(), lr=0.1, **flags, **kwargs)
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=2)
        before = weights(model)
        for step in range(5):
            opt.zero_grad()
            generator = torch.Generator().manual_seed(step)
            loss = model(torch.randn(8, 3, generator=generator)).square().mean()
            scaler.scale(loss).backward()
            if step in (0, 3):
                next(model.parameters()).grad.fill_(torch.inf)  # pyright: ignore
            if step == 2:
                scaler.unscale_(opt)
                nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            scaler.step(opt)
            scaler.update()
            if not step:
                assert_like(weights(model), before)
                moved = [s for s in opt.state.values() if s.get("step")]
                assert not moved
        both.append(weights(model))
    for ours, theirs in zip(*both):
        torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=2e-7)


@pytest.mark.filterwarnings("ignore")  # of Dynamo's own
@pytest.mark.parametrize(
    "name", ["AdamW", *(pytest.param(x, marks=pytest.mark.slow) for x in ("SGD", "Muon"))]
)
def test_a_compiled_training_step(name: str):
    both = []
    torch._dynamo.reset()
    for compiled in (False, True):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Tanh())
        opt = getattr(torch_optim, name)(model.parameters(), lr=0.1)
        scheduler = schedulers.StepLR(opt, 2)

        def step(x: Tensor, model: Any = model, opt: Any = opt) -> Tensor:
            opt.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            opt.step()
            return loss

        run = torch.compile(step, backend="eager") if compiled else step
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(2))
        losses = []
        for _ in range(5):
            losses.append(run(x).item())
            scheduler.step()
        both.append(losses)
    torch._dynamo.reset()
    assert both[0] == both[1]


# Loss curves ---------------------------------------------------------------------------


class Transformer(nn.Module):
    """No bias of keys: its gradient is rounding, which Adafactor makes steps of."""

    def __init__(self, sparse: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8, sparse=sparse)
        self.layer = nn.TransformerEncoderLayer(
            8, 2, 16, 0.0, batch_first=True, bias=False
        )
        self.head = nn.Linear(8, 11)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.embed(x))).transpose(1, 2)


def transformer_task(name: str) -> tuple[nn.Module, Callable[[int], tuple[Any, Any]]]:
    def batch(step: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(step)
        x = torch.randint(11, (2, 5), generator=generator)
        return x, (3 * x + 1) % 11

    return Transformer(name == "SparseAdam"), batch


def conv_task(name: str) -> tuple[nn.Module, Callable[[int], tuple[Any, Any]]]:
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(64, 3),
    )

    def batch(step: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(step)
        y = torch.randint(3, (4,), generator=generator)
        x = torch.randn(4, 1, 6, 6, generator=generator) + y[:, None, None, None]
        return x, y

    return model, batch


def curve(library: Any, name: str, task: Any, dtype: torch.dtype) -> Tensor:
    """The losses of 200 steps: groups, a scheduler, clipping, accumulation, a scaler."""
    torch.manual_seed(1)
    model, batch = task(name)
    model = model.to(dtype)
    params = [*model.parameters()]
    if name == "Muon":
        params = [p for p in params if p.ndim == 2]
    if name == "SparseAdam":
        params = params[:1]
    lrs = {"LBFGS": 0.1, "Rprop": 1e-3, "Adadelta": 1.0, "RMSprop": 1e-3}
    lr = lrs.get(name, 0.01)
    groups: Any = [{"params": params[:1]}, {"params": params[1:], "lr": lr / 2}]
    if name in ("LBFGS", "SparseAdam"):
        groups = params
    opt = getattr(library, name)(groups, **{**golden.CASES[name], "lr": lr})
    scheduler = schedulers.CosineAnnealingLR(opt, 200)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=50)
    losses = []
    if name == "LBFGS":
        scaler = torch.amp.GradScaler("cpu", enabled=False)

    def gradients(step: int) -> Tensor:
        opt.zero_grad()
        total = torch.zeros((), dtype=dtype)
        for micro in range(2):
            x, y = batch(micro if name == "LBFGS" else 2 * step + micro)
            x = x.to(dtype) if x.is_floating_point() else x
            loss = nn.functional.cross_entropy(model(x), y) / 2
            scaler.scale(loss).backward()
            total += loss.detach()
        return total

    for step in range(200):
        if name == "LBFGS":
            losses.append(opt.step(lambda step=step: gradients(step)))
        else:
            losses.append(gradients(step))
            if name != "SparseAdam":  # whose gradients are not clipped, in torch neither
                scaler.unscale_(opt)
                nn.utils.clip_grad_norm_(params, 1.0)
            scaler.step(opt)
            scaler.update()
        scheduler.step()
    return torch.stack(losses)


TASKS = {"transformer": transformer_task, "conv net": conv_task}
LIMITS = {torch.float32: 1e-5, torch.float64: 1e-12}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", ALL)
def test_curves_of_losses_are_torchs(name: str, task: str, dtype: torch.dtype):
    if name == "SparseAdam" and task == "conv net":
        pytest.skip("a conv net has no sparse gradients")
    make, limit = TASKS[task], LIMITS[dtype]
    if (name, dtype) == ("Muon", torch.float32):
        limit = 1e-3  # where an input differs in the last place, its bfloat16 may flip
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # in which torch keeps the scalars of its state
    try:
        ours, theirs = (curve(library, name, make, dtype) for library in LIBRARIES)
    finally:
        torch.set_default_dtype(default)
    assert ours[0] == theirs[0] and ours[-1] < ours[0]
    torch.testing.assert_close(ours, theirs, rtol=limit, atol=0)


# Killed runs ---------------------------------------------------------------------------

EVERY, LENGTH = 4, 25


def run(folder: Path, killed: int, stop: Callable[[], Any]) -> list[Tensor] | None:
    """A training that writes checkpoints, and goes on from the last that there is."""
    model = network()
    opt = torch_optim.AdamW(model.named_parameters(), lr=0.05, amsgrad=True)
    scheduler = schedulers.OneCycleLR(opt, 0.1, total_steps=LENGTH + 1)
    first, file = 0, folder / "last.pt"
    if file.exists():
        saved = torch.load(file, weights_only=True)
        model.load_state_dict(saved["model"])
        scheduler.load_state_dict(saved["scheduler"])
        opt.load_state_dict(saved["opt"])
        torch.set_rng_state(saved["rng"])
        first = saved["step"]
    else:
        torch.manual_seed(5)
    for step in range(first, LENGTH):
        if step == killed:
            return stop()
        opt.zero_grad()
        model(torch.randn(8, 3)).square().mean().backward()
        opt.step()
        scheduler.step()
        if step % EVERY == 0:
            saved = {
                "model": model.state_dict(),
                "opt": opt.state_dict(),
                "scheduler": scheduler.state_dict(),
                "rng": torch.get_rng_state(),
                "step": step + 1,
            }
            torch.save(saved, folder / "new.pt")
            (folder / "new.pt").replace(file)
    return weights(model)


def test_killed_at_any_step_and_resumed(tmp_path: Path):
    (tmp_path / "whole").mkdir()
    expected = run(tmp_path / "whole", -1, list)
    assert expected is not None
    for i, killed in enumerate(random.Random(0).choices(range(LENGTH), k=20)):
        (folder := tmp_path / str(i)).mkdir()
        assert run(folder, killed, lambda: None) is None
        resumed = run(folder, -1, list)
        assert resumed is not None
        assert all(map(torch.equal, resumed, expected)), killed


CHILD = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from test_torch_optim_around import run

def die():
    os.kill(os.getpid(), signal.SIGKILL)

folder, *steps = sys.argv[1:]
run(Path(folder) / "whole", -1, list)
for i, step in enumerate(steps):
    if os.fork():  # a process for each; torch is imported, and kernels loaded, once
        assert os.wait()[1] == signal.SIGKILL, step
        continue
    run(Path(folder) / str(i), int(step), die)
    os._exit(0)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there is no such signal")
def test_processes_that_are_killed(tmp_path: Path):
    steps = random.Random(1).choices(range(LENGTH), k=20)
    for name in ("whole", "here", *range(len(steps))):
        (tmp_path / str(name)).mkdir()
    expected = run(tmp_path / "here", -1, list)
    assert expected is not None
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CHILD, str(tmp_path), *map(str, steps)],
        env={**os.environ, "PYTHONPATH": ":".join(sys.path)},
        check=True,
    )
    for i, killed in enumerate(steps):
        folder = tmp_path / str(i)
        assert (folder / "last.pt").exists() is bool(killed)
        resumed = run(folder, -1, list)
        assert resumed is not None
        assert all(map(torch.equal, resumed, expected)), killed
