"""Yogi, by optax."""

from importlib.metadata import version

import optax

from published.record import optax_stepper, write

RUNS = [(0.9, 0.999, 1e-3, 0.0, 1e-6), (0.8, 0.95, 0.1, 0.1, 0.5)]


def from_zero(transform: optax.GradientTransformation) -> optax.GradientTransformation:
    """With a first average of 0: optax starts both from the same number."""

    def init(params: optax.Params) -> optax.OptState:
        state = transform.init(params)
        return state._replace(mu=optax.tree.zeros_like(params))  # type: ignore

    return optax.GradientTransformation(init, transform.update)


if __name__ == "__main__":
    write(
        "yogi",
        f"optax {version('optax')}: optax.scale_by_yogi with a first average of 0, "
        "add_decayed_weights",
        [
            (
                {
                    "lr": 0.02,
                    "betas": [b1, b2],
                    "eps": eps,
                    "weight_decay": decay,
                    "initial_accumulator_value": start,
                },
                optax_stepper(
                    optax.chain(
                        from_zero(
                            optax.scale_by_yogi(
                                b1, b2, eps, initial_accumulator_value=start
                            )
                        ),
                        optax.add_decayed_weights(decay),
                        optax.scale(-0.02),
                    )
                ),
            )
            for b1, b2, eps, decay, start in RUNS
        ],
    )
