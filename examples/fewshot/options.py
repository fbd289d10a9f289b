"""The command line of few-shot runs: options, and what a resumed run keeps of them."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from fewshot import checkpoint
from fewshot.methods import METHODS
from fewshot.training import Progress

# Inner steps and inner learning rate, where the command line gives none.
INNER = {
    "maml": (1, 0.4),
    "fomaml": (1, 0.4),
    "anil": (1, 3.0),
    "metasgd": (1, 0.4),
    "lslr": (3, 0.4),
    "reptile": (5, 0.1),
}
MINUTES = 3.0  # where neither --iterations nor --minutes is given

# What a checkpoint was trained with: with other values it would be another run.
FIXED = (
    *("method", "net", "filters", "ways", "shots", "queries", "seed"),
    *("inner_steps", "inner_lr", "outer_lr", "meta_batch"),
)


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong, without a list of all options."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def parser(description: str) -> Parser:
    p = Parser(description=description)
    add = p.add_argument
    add("--data", type=Path, help="folder with Omniglot's two archives (default: glyphs)")
    add("--ways", type=whole, default=5, help="classes of a task (5)")
    add("--shots", type=whole, default=1, help="images of each to learn from (1)")
    add("--queries", type=whole, default=15, help="images of each to judge by (15)")
    add("--method", choices=METHODS, default="maml", help="how to meta-learn (maml)")
    steps, lr = "1; lslr 3; reptile 5", "0.4; anil 3; reptile 0.1"
    add("--inner-steps", type=whole, help=f"gradient steps on a task ({steps})")
    add("--inner-lr", type=positive, help=f"their learning rate ({lr})")
    add("--net", choices=("conv", "mlp"), default="conv", help="the network (conv)")
    add("--filters", type=whole, default=32, help="of each convolution (32; paper: 64)")
    add("--meta-batch", type=whole, default=8, help="tasks of a meta-gradient (8)")
    add("--outer-lr", type=positive, default=3e-3, help="learning rate of Adam (0.003)")
    add("--iterations", type=whole, help="train so many")
    add("--minutes", type=positive, help=f"or so long ({MINUTES:g}, if neither is given)")
    add("--eval-tasks", type=whole, default=600, help="test tasks (600)")
    add("--seed", type=int, default=0, help="of the first weights and of all tasks (0)")
    add("--device", type=device, default="cpu", help="cpu, cuda, cuda:1, … (cpu)")
    add("--threads", type=whole, help="CPU threads (as torch chooses)")
    add("--out", type=Path, metavar="DIR", help="where results go (runs/<kind of run>)")
    add("--checkpoint", type=Path, metavar="FILE", help="(<out>/checkpoint.pt)")
    add("--resume", type=Path, metavar="FILE", help="checkpoint to go on from")
    return p


def parse(p: Parser, argv: Sequence[str] | None) -> tuple[Any, Progress | None]:
    """The settings, and the progress of the run to be resumed.

    Raises:
        OSError, ValueError: the checkpoint cannot be read, or is of another run.
    """
    args, progress = p.parse_args(argv), None
    if args.resume:
        saved, progress = checkpoint.load(args.resume)
        if args.iterations or args.minutes:  # a new limit stands for both old ones
            saved |= {"iterations": None, "minutes": None}
        saved["checkpoint"] = str(args.resume)  # it may have been moved
        p.set_defaults(**saved)  # as text: argparse reads it as if it had been typed
        args = p.parse_args(argv)
        for name in FIXED:
            if getattr(args, name) != saved[name]:
                raise ValueError(
                    f"{args.resume} was trained with {option(name)} {saved[name]}; to "
                    "change it, start a new run"
                )
        if (args.data is None) != (saved["data"] is None):
            raise ValueError(f"{args.resume} was trained on other data")
    if args.eval_tasks < 2:
        raise ValueError("--eval-tasks: an interval needs at least 2")
    steps, lr = INNER[args.method]
    args.inner_steps = args.inner_steps or steps
    args.inner_lr = args.inner_lr or lr
    if not (args.iterations or args.minutes):
        args.minutes = MINUTES
    if args.out is None:
        data = "omniglot" if args.data else "glyphs"
        args.out = Path("runs", f"{data}-{args.ways}way-{args.shots}shot-{args.method}")
    args.checkpoint = args.checkpoint or args.out / "checkpoint.pt"
    return args, progress


def as_data(args: Any) -> dict[str, Any]:
    """The settings as numbers and text, for a checkpoint or a JSON file."""
    plain = (bool, int, float, str, type(None))
    return {
        name: value if isinstance(value, plain) else str(value)
        for name, value in vars(args).items()
        if name != "resume"
    }


def option(name: str) -> str:
    return "--" + name.replace("_", "-")


def whole(text: str) -> int:
    """A whole number from 1."""
    try:
        if (value := int(text)) >= 1:
            return value
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"wants a whole number from 1, not {text!r}")


def positive(text: str) -> float:
    """A finite number above 0."""
    try:
        if 0 < (value := float(text)) < math.inf:
            return value
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"wants a number above 0, not {text!r}")


def device(text: str) -> torch.device:
    """A device that this machine and this torch have."""
    try:
        found = torch.device(text)
        torch.zeros(1, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise argparse.ArgumentTypeError(f"cannot use {text!r}: {reason}") from error
    return found
