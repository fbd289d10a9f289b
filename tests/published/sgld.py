"""SGLD, in NumPy: of equation 4, with half the ε for lr, and a temperature."""

import numpy as np

from published.problem import Arrays, noise, start
from published.record import Stepper, write

RUNS = [
    {"lr": 0.02},
    {"lr": 0.02, "temperature": 0.1, "weight_decay": 0.1},
    {"lr": 0.02, "temperature": 0.5, "maximize": True},
]


def sgld(
    lr: float,
    temperature: float = 1.0,
    weight_decay: float = 0.0,
    maximize: bool = False,
) -> Stepper:
    theta, epsilon, done = start(), 2 * lr, 0

    def step(grads: Arrays) -> Arrays:
        nonlocal done, theta
        done += 1
        eta = [np.sqrt(epsilon * temperature) * n for n in noise(done)]
        likelihood = [g if maximize else -g for g in grads]
        prior = [-weight_decay * t for t in theta]
        theta = [
            t + epsilon / 2 * (a + b) + e
            for t, a, b, e in zip(theta, prior, likelihood, eta)
        ]
        return theta

    return step


if __name__ == "__main__":
    write(
        "sgld",
        "Welling, Teh, 2011, equation 4, once more in NumPy: tests/published/sgld.py",
        [(run, sgld(**run)) for run in RUNS],
        given=["noise"],
    )
