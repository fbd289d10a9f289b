"""NovoGrad, by optax."""

from importlib.metadata import version

import optax

from published.record import optax_stepper, write

RUNS = [(0.95, 0.98, 1e-8, 0.0), (0.8, 0.25, 1e-3, 0.1)]

if __name__ == "__main__":
    write(
        "novograd",
        f"optax {version('optax')}: optax.novograd",
        [
            (
                {"lr": 0.02, "betas": [b1, b2], "eps": eps, "weight_decay": decay},
                optax_stepper(optax.novograd(0.02, b1, b2, eps, weight_decay=decay)),
            )
            for b1, b2, eps, decay in RUNS
        ],
    )
