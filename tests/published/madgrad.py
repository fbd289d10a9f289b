"""MADGRAD, by its authors."""

from functools import partial
from importlib import import_module
from importlib.metadata import version
from typing import Any

from published.record import ascending, torch_stepper, write

MADGRAD: Any = import_module("madgrad").MADGRAD  # which this file's name hides

RUNS: list[dict[str, Any]] = [
    {"lr": 0.05, "momentum": 0.9, "eps": 1e-6},
    {"lr": 0.05, "momentum": 0.0, "weight_decay": 0.1, "eps": 1e-4},
]
UP: dict[str, Any] = {"lr": 0.05, "momentum": 0.8, "weight_decay": 0.1}

if __name__ == "__main__":
    write(
        "madgrad",
        f"madgrad {version('madgrad')}: MADGRAD",
        [
            *((run, torch_stepper(partial(MADGRAD, **run))) for run in RUNS),
            (
                {**UP, "maximize": True},
                ascending(torch_stepper(partial(MADGRAD, **UP))),
            ),
        ],
    )
