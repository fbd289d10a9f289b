"""AdaBelief, by optax."""

from importlib.metadata import version

import optax

from published.record import optax_stepper, write

RUNS = [(0.9, 0.999, 1e-16, 0.0), (0.8, 0.95, 1e-3, 0.1)]

if __name__ == "__main__":
    write(
        "adabelief",
        f"optax {version('optax')}: optax.scale_by_belief, add_decayed_weights",
        [
            (
                {"lr": 0.02, "betas": [b1, b2], "eps": eps, "weight_decay": decay},
                optax_stepper(
                    optax.chain(
                        optax.scale_by_belief(b1, b2, eps=eps, eps_root=eps),
                        optax.add_decayed_weights(decay),
                        optax.scale(-0.02),
                    )
                ),
            )
            for b1, b2, eps, decay in RUNS
        ],
    )
