"""Shampoo, by its algorithm in NumPy: the roots from eigenvalues."""

import numpy as np

from published.problem import Arrays, start
from published.record import Stepper, write

SHAPES = ((3, 2), (4,), (2, 3, 2))
RATE = 0.1


def root(x: np.ndarray, power: int) -> np.ndarray:
    values, vectors = np.linalg.eigh(x)
    return vectors @ np.diag(values ** (-1 / power)) @ vectors.T


def stepper(eps: float, decay: float, every: int) -> Stepper:
    """Algorithm 1; vectors have one side, with the power -1/2."""
    weights, count = start(SHAPES), 0
    sides = [w.reshape(w.shape[0], -1) for w in weights]
    sums = [[eps * np.eye(x.shape[0]), eps * np.eye(x.shape[1])] for x in sides]
    roots: list[list[np.ndarray]] = [[], [], []]

    def step(grads: Arrays) -> Arrays:
        nonlocal count
        for i, g in enumerate(grads):
            x = g.reshape(g.shape[0], -1) + decay * weights[i].reshape(g.shape[0], -1)
            sums[i] = [sums[i][0] + x @ x.T, sums[i][1] + x.T @ x]
            if count % every == 0:
                roots[i] = [root(s, 2 if g.ndim == 1 else 4) for s in sums[i]]
            move = roots[i][0] @ x
            move = move if g.ndim == 1 else move @ roots[i][1]
            weights[i] = weights[i] - RATE * move.reshape(g.shape)
        count += 1
        return weights

    return step


if __name__ == "__main__":
    write(
        "shampoo",
        "algorithm 1 of Gupta, Koren, Singer (2018), in float64 NumPy",
        [
            (
                {
                    "lr": RATE,
                    "eps": eps,
                    "weight_decay": decay,
                    "precondition_frequency": every,
                },
                stepper(eps, decay, every),
            )
            for eps, decay, every in ((0.5, 0.0, 1), (1.0, 0.1, 3))
        ],
        SHAPES,
    )
