"""AdEMAMix, by optax, with the paper's warm-ups."""

from importlib.metadata import version
from typing import Any

import jax.numpy as jnp
import optax

from published.record import optax_stepper, write

#: betas, alpha, eps, weight decay, and the lengths of both warm-ups
RUNS = [
    (0.9, 0.999, 0.9999, 2.0, 1e-8, 0.0, None, None),
    (0.8, 0.95, 0.99, 5.0, 1e-8, 0.1, 20, 30),
    (0.8, 0.95, 0.99, 5.0, 0.01, 0.0, None, 8),
]


def transform(
    b1: float,
    b2: float,
    b3: float,
    alpha: float,
    eps: float,
    decay: float,
    alpha_warmup: int | None,
    beta3_warmup: int | None,
) -> Any:
    def steps(count: Any) -> Any:
        return jnp.asarray(count + 1, jnp.float64)  # an int32 would divide to float32

    def rising_alpha(count: Any) -> Any:
        return jnp.minimum(steps(count) / alpha_warmup * alpha, alpha)

    def rising_b3(count: Any) -> Any:
        """Equation 4 of the paper, in its words: ln β₁ · ln β₃ over a mixture."""
        done = jnp.minimum(steps(count) / beta3_warmup, 1.0)
        mixture = (1 - done) * jnp.log(b3) + done * jnp.log(b1)
        return jnp.minimum(jnp.exp(jnp.log(b1) * jnp.log(b3) / mixture), b3)

    return optax.contrib.ademamix(
        0.02,
        b1,
        b2,
        rising_b3 if beta3_warmup else b3,
        rising_alpha if alpha_warmup else alpha,
        eps=eps,
        weight_decay=decay,
    )


if __name__ == "__main__":
    write(
        "ademamix",
        f"optax {version('optax')}: optax.contrib.ademamix, with the warm-ups of "
        "Pagliardini, Ablin, Grangier, 2024, written down again",
        [
            (
                {
                    "lr": 0.02,
                    "betas": [b1, b2, b3],
                    "alpha": alpha,
                    "eps": eps,
                    "weight_decay": decay,
                    "alpha_warmup": warmups[0],
                    "beta3_warmup": warmups[1],
                },
                optax_stepper(transform(b1, b2, b3, alpha, eps, decay, *warmups)),
            )
            for b1, b2, b3, alpha, eps, decay, *warmups in RUNS
        ],
    )
