"""MADGRAD, by its authors."""

from functools import partial
from importlib.metadata import version

from madgrad import MADGRAD

from published.record import ascending, torch_stepper, write

RUNS = [
    {"lr": 0.05, "momentum": 0.9, "eps": 1e-6},
    {"lr": 0.05, "momentum": 0.0, "weight_decay": 0.1, "eps": 1e-4},
]
UP = {"lr": 0.05, "momentum": 0.8, "weight_decay": 0.1}

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
