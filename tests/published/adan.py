"""Adan, by pytorch_optimizer."""

from functools import partial
from importlib.metadata import version

from pytorch_optimizer import Adan  # pyright: ignore[reportMissingImports]

from published.record import torch_stepper, write

RUNS = [(0.98, 0.92, 0.99, 1e-8, 0.0), (0.8, 0.7, 0.9, 0.01, 0.1)]

if __name__ == "__main__":
    write(
        "adan",
        f"pytorch_optimizer {version('pytorch_optimizer')}: Adan",
        [
            (
                arguments := {
                    "lr": 0.02,
                    "betas": [b1, b2, b3],
                    "eps": eps,
                    "weight_decay": decay,
                },
                torch_stepper(partial(Adan, **arguments)),
            )
            for b1, b2, b3, eps, decay in RUNS
        ],
    )
