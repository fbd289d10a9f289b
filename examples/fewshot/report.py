"""What a run tells: a table for the eye, a dictionary for results.json."""

from __future__ import annotations

import os
import platform
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from fewshot.evaluation import Estimate
from fewshot.options import as_data
from fewshot.split import Split
from fewshot.training import Progress

RECENT = 100  # training figures are means over so many last iterations


def results(
    args: Any,
    splits: tuple[Split, Split],
    progress: Progress,
    interrupted: bool,
    before: Estimate,
    after: Estimate,
) -> dict[str, Any]:
    """Everything that a reader needs to judge the figures, or to repeat them."""
    loss, accuracy = recent(progress)
    train, test = splits
    return {
        "settings": as_data(args),
        "data": {
            "name": "omniglot" if args.data else "glyphs",
            "train_classes": dict(Counter(train.alphabets)),
            "test_classes": dict(Counter(test.alphabets)),
        },
        "training": {
            "iterations": progress.iteration,
            "seconds": round(progress.seconds, 3),
            "interrupted": interrupted,
            "loss": loss,
            "accuracy": accuracy,
        },
        "test": {
            "tasks": args.eval_tasks,
            "interval": "95 %, normal approximation over tasks",
            "batch_norm": "transductive: statistics of all query images of a task",
            "before": before._asdict(),
            "after": after._asdict(),
        },
        "environment": environment(),
    }


def table(
    args: Any,
    splits: tuple[Split, Split],
    progress: Progress,
    before: Estimate,
    after: Estimate,
) -> str:
    """The outcome in eight lines."""
    train, test = splits
    _, accuracy = recent(progress)
    steps = "1 step" if args.inner_steps == 1 else f"{args.inner_steps} steps"
    rows = {
        "trained on": classes(train),
        "tested on": f"{classes(test)}; {args.eval_tasks} tasks",
        "meta-training": f"{progress.iteration} iterations of {args.meta_batch} tasks "
        f"in {progress.seconds:.0f} s",
        "on training tasks": "-" if accuracy is None else f"{100 * accuracy:.2f} %",
        "before adaptation": str(before),
        f"after {steps}": f"{after}   (95 % interval)",
    }
    title = f"{args.method}, {args.ways}-way {args.shots}-shot"
    lines = [f"{name:<18}  {value}" for name, value in rows.items()]
    rule = "─" * max(map(len, lines))
    return "\n".join([f"\n{title}", rule, *lines, rule])


def classes(split: Split) -> str:
    alphabets = list(dict.fromkeys(split.alphabets))
    named = ", ".join(alphabets) if len(alphabets) < 4 else f"{len(alphabets)} alphabets"
    return f"{len(split.names)} classes ({named})"


def recent(progress: Progress) -> tuple[float, float] | tuple[None, None]:
    """Loss and accuracy of the last iterations; None before the first."""
    if not progress.iteration:
        return None, None
    loss, accuracy = progress.history[-RECENT:].mean(0).tolist()
    return loss, accuracy


def environment() -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,  # with its build
        **{name: version(name) for name in ("funcopt", "matplotlib", "pillow")},
    }


def processor() -> str:
    """The processor's name, which Linux tells in a file only."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(": ")[2] for line in lines if line.startswith("model name"))
    return next(names, platform.processor())
