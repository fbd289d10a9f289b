"""Lion, by optax."""

from importlib.metadata import version

import optax

from published.record import optax_stepper, write

RUNS = [(0.9, 0.99, 0.0), (0.8, 0.95, 0.1)]

if __name__ == "__main__":
    write(
        "lion",
        f"optax {version('optax')}: optax.lion",
        [
            (
                {"lr": 0.02, "betas": [b1, b2], "weight_decay": decay},
                optax_stepper(optax.lion(0.02, b1=b1, b2=b2, weight_decay=decay)),
            )
            for b1, b2, decay in RUNS
        ],
    )
