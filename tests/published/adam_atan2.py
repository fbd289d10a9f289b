"""Adam-atan2, by adam-atan2-pytorch."""

from functools import partial
from importlib.metadata import version

from adam_atan2_pytorch.adam_atan2 import (  # pyright: ignore[reportMissingImports]
    AdamAtan2,
)

from published.record import torch_stepper, write

RUNS = [(0.9, 0.99, 1.27, 1.0, 0.0), (0.8, 0.95, 1.5, 0.7, 0.1)]

if __name__ == "__main__":
    write(
        "adam_atan2",
        f"adam-atan2-pytorch {version('adam-atan2-pytorch')}: AdamAtan2",
        [
            (
                arguments := {
                    "lr": 0.02,
                    "betas": [b1, b2],
                    "a": a,
                    "b": b,
                    "weight_decay": decay,
                },
                torch_stepper(partial(AdamAtan2, **arguments)),
            )
            for b1, b2, a, b, decay in RUNS
        ],
    )
