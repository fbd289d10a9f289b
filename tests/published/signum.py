"""Signum, by pytorch_optimizer."""

from functools import partial
from importlib.metadata import version

from pytorch_optimizer import SignSGD

from published.record import torch_stepper, write

#: beta, weight_decay, maximize
RUNS = [(0.9, 0.0, False), (0.6, 0.1, False), (0.8, 0.1, True)]

if __name__ == "__main__":
    write(
        "signum",
        f"pytorch_optimizer {version('pytorch_optimizer')}: SignSGD",
        [
            (
                {"lr": 0.02, "beta": beta, "weight_decay": decay, "maximize": up},
                torch_stepper(
                    partial(
                        SignSGD, lr=0.02, momentum=beta, weight_decay=decay, maximize=up
                    )
                ),
            )
            for beta, decay, up in RUNS
        ],
    )
