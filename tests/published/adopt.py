"""ADOPT, by optax."""

from importlib.metadata import version
from typing import Any

import jax
import optax

from published.record import optax_stepper, write

#: betas, eps, whether to clip, weight decay, and whether that is past the moments
RUNS = [
    (0.9, 0.9999, 1e-6, True, 0.0, False),
    (0.8, 0.95, 0.5, False, 0.1, False),
    (0.8, 0.95, 1e-6, True, 0.1, True),
]


def transform(
    b1: float, b2: float, eps: float, clip: bool, decay: float, decoupled: bool
) -> Any:
    """With a decay that like all else begins in the second step."""
    adopt = optax.contrib.scale_by_adopt(b1, b2, eps, use_clipping=clip)
    from_second = jax.numpy.array([0.0, decay])
    later = optax.add_decayed_weights(lambda count: from_second[count])  # the last stays
    coupled = optax.add_decayed_weights(decay)
    stages = (adopt, later) if decoupled else (coupled, adopt)
    return optax.chain(*stages, optax.scale(-0.02))


if __name__ == "__main__":
    write(
        "adopt",
        f"optax {version('optax')}: optax.contrib.scale_by_adopt, add_decayed_weights",
        [
            (
                {
                    "lr": 0.02,
                    "betas": [b1, b2],
                    "eps": eps,
                    "clip": clip,
                    "weight_decay": decay,
                    "decoupled_weight_decay": decoupled,
                },
                optax_stepper(transform(b1, b2, eps, clip, decay, decoupled)),
            )
            for b1, b2, eps, clip, decay, decoupled in RUNS
        ],
    )
