"""Schedule-free AdamW, by its authors."""

from functools import partial
from importlib.metadata import version
from typing import Any

from schedulefree import AdamWScheduleFree

from published.record import ascending, schedule_free_stepper, write

RUNS: list[dict[str, Any]] = [
    {"lr": 0.02},
    {
        "lr": 0.05,
        "betas": [0.8, 0.95],
        "eps": 1e-3,
        "weight_decay": 0.1,
        "warmup_steps": 8,
        "r": 1.0,
    },
    {"lr": 0.05, "warmup_steps": 5, "weight_lr_power": 0.5},
]
UP: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.1}

if __name__ == "__main__":
    write(
        "schedule_free_adamw",
        f"schedulefree {version('schedulefree')}: AdamWScheduleFree",
        [
            *(
                (run, schedule_free_stepper(partial(AdamWScheduleFree, **run)))
                for run in RUNS
            ),
            (
                UP | {"maximize": True},
                ascending(schedule_free_stepper(partial(AdamWScheduleFree, **UP))),
            ),
        ],
        evaluated=True,
    )
