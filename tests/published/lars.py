"""LARS, by optax, and where that differs from the paper by the paper's formula."""

from importlib.metadata import version

import numpy as np
import optax

from published.problem import Arrays, start
from published.record import Stepper, optax_stepper, write

RATE, TRUST = 0.5, 0.1


def paper_stepper(momentum: float, decay: float, nesterov: bool) -> Stepper:
    """Algorithm 1: the decay's share of the norm is a term of its own."""
    weights = start()
    velocities = [np.zeros_like(w) for w in weights]

    def step(grads: Arrays) -> Arrays:
        for i, g in enumerate(grads):
            size, slope = (np.sqrt(np.sum(x**2)) for x in (weights[i], g))
            local = TRUST * size / (slope + decay * size)
            move = RATE * local * (g + decay * weights[i])
            velocities[i] = momentum * velocities[i] + move
            ahead = momentum * velocities[i] + move
            weights[i] = weights[i] - (ahead if nesterov else velocities[i])
        return weights

    return step


if __name__ == "__main__":
    fixed = {"lr": RATE, "trust_coefficient": TRUST}
    write(
        "lars",
        f"optax {version('optax')}: optax.lars; with decay algorithm 1 in float64 NumPy",
        [
            (
                {**fixed, "momentum": momentum, "nesterov": nesterov},
                optax_stepper(
                    optax.lars(
                        RATE,
                        trust_coefficient=TRUST,
                        momentum=momentum,
                        nesterov=nesterov,
                    )
                ),
            )
            for momentum, nesterov in ((0.9, False), (0.8, True))
        ]
        + [
            (
                {**fixed, "momentum": 0.8, "nesterov": nesterov, "weight_decay": 0.1},
                paper_stepper(0.8, 0.1, nesterov),
            )
            for nesterov in (False, True)
        ],
    )
