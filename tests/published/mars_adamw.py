"""MARS-AdamW, by pytorch_optimizer."""

from importlib.metadata import version
from typing import Any

from pytorch_optimizer import MARS  # pyright: ignore[reportMissingImports]

from published.record import torch_stepper, write

RUNS = [(0.95, 0.99, 1e-8, 0.0, 0.025), (0.8, 0.95, 0.01, 0.1, 0.2)]


class Mars(MARS):
    """As the authors': eps after the correction, and no 1e-15 added to the squares."""

    def optimize_mixed(self, *args: Any) -> Any:
        *rest, eps = args
        betas, step = args[5], args[9]
        return super().optimize_mixed(*rest, eps * (1 - betas[1] ** step) ** 0.5)

    @staticmethod
    def apply_ams_bound(*args: Any) -> Any:
        return MARS.apply_ams_bound(*args, exp_avg_sq_eps=0.0)


def make(params: Any, lr: float, **rest: Any) -> MARS:
    return Mars(params, lr, optimize_1d=True, foreach=False, **rest)


if __name__ == "__main__":
    write(
        "mars_adamw",
        f"pytorch_optimizer {version('pytorch_optimizer')}: MARS, for leaves of any "
        "shape, with eps where the authors add it",
        [
            (
                arguments := {
                    "lr": 0.02,
                    "betas": [b1, b2],
                    "eps": eps,
                    "weight_decay": decay,
                    "gamma": gamma,
                },
                torch_stepper(lambda params, a=arguments: make(params, **a)),
            )
            for b1, b2, eps, decay, gamma in RUNS
        ],
    )
