"""LAMB, by optax."""

from importlib.metadata import version

import optax

from published.record import optax_stepper, write

RUNS = [(0.9, 0.999, 1e-6, 0.0), (0.8, 0.95, 1e-3, 0.1)]

if __name__ == "__main__":
    write(
        "lamb",
        f"optax {version('optax')}: optax.lamb",
        [
            (
                {"lr": 0.02, "betas": [b1, b2], "eps": eps, "weight_decay": decay},
                optax_stepper(optax.lamb(0.02, b1, b2, eps, weight_decay=decay)),
            )
            for b1, b2, eps, decay in RUNS
        ],
    )
