"""signSGD, by optax."""

from importlib.metadata import version

import optax

from published.record import optax_stepper, write

if __name__ == "__main__":
    write(
        "signsgd",
        f"optax {version('optax')}: optax.sign_sgd, optax.add_decayed_weights",
        [
            ({"lr": 0.02}, optax_stepper(optax.sign_sgd(0.02))),
            (
                {"lr": 0.02, "weight_decay": 0.1},
                optax_stepper(
                    optax.chain(
                        optax.scale_by_sign(),
                        optax.add_decayed_weights(0.1),
                        optax.scale_by_learning_rate(0.02),
                    )
                ),
            ),
            (
                {"lr": 0.02, "maximize": True},
                optax_stepper(optax.chain(optax.scale(-1.0), optax.sign_sgd(0.02))),
            ),
        ],
    )
