"""Schedule-free SGD, by its authors."""

from functools import partial
from importlib.metadata import version
from typing import Any

from schedulefree import SGDScheduleFree

from published.record import ascending, schedule_free_stepper, write

RUNS: list[dict[str, Any]] = [
    {"lr": 0.1},
    {"lr": 0.1, "momentum": 0.7, "weight_decay": 0.1, "warmup_steps": 8, "r": 1.0},
    {"lr": 0.2, "warmup_steps": 5, "weight_lr_power": 0.5},
]
UP: dict[str, Any] = {"lr": 0.1, "momentum": 0.8, "weight_decay": 0.1}

if __name__ == "__main__":
    write(
        "schedule_free_sgd",
        f"schedulefree {version('schedulefree')}: SGDScheduleFree",
        [
            *(
                (run, schedule_free_stepper(partial(SGDScheduleFree, **run)))
                for run in RUNS
            ),
            (
                UP | {"maximize": True},
                ascending(schedule_free_stepper(partial(SGDScheduleFree, **UP))),
            ),
        ],
        evaluated=True,
    )
