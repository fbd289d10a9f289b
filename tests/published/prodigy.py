"""Prodigy, by the authors' package."""

from importlib.metadata import version
from typing import Any

from prodigyopt import Prodigy

from published.record import torch_stepper, write

# Our arguments, and what the package calls them.
NAMES = {"decoupled_weight_decay": "decouple"}
RUNS: list[dict[str, Any]] = [
    {"d0": 0.01},
    {"d0": 0.02, "betas": [0.8, 0.95], "beta3": 0.9, "use_bias_correction": True},
    {"lr": 0.5, "d0": 0.02, "weight_decay": 0.1, "d_coef": 2.0, "growth_rate": 1.1},
    {"d0": 0.02, "weight_decay": 0.1, "decoupled_weight_decay": False, "eps": 0.01},
]

if __name__ == "__main__":
    write(
        "prodigy",
        f"prodigyopt {version('prodigyopt')}: Prodigy",
        [
            (
                run,
                torch_stepper(
                    lambda p, run=run: Prodigy(
                        p, **{NAMES.get(name, name): value for name, value in run.items()}
                    )
                ),
            )
            for run in RUNS
        ],
    )
