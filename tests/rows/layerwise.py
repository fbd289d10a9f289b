"""Rules that scale a step by norms of the leaf."""

from row import DECAY, OFF_ON, Row, half, mixes

import funcopt as fo

# Of a single number the direction is a sign: its derivative is 0, or what rounding makes
# of that. (test_norm_rules and the published trajectories have such leaves.)
SHAPES = ((4, 3), (5,), (2,), (2, 1, 2), (0, 3))
FEW = ((2,), (2,))

ROWS = [
    Row(
        fo.lamb,
        mixes(maximize=OFF_ON, weight_decay=DECAY),
        {"lr": 0.1, "betas": (0.8, 0.9), "eps": 0.01, "weight_decay": 0.1},
        shapes=SHAPES,
        few=FEW,
        elementwise=False,
        arrives={
            "": {"lr": 0.01},
            # At a constant rate it circles the minimum, as far as the rate is large.
            "mixed": {"lr": 0.005, "steps": 900},
            "rosenbrock": {"lr": 0.003, "steps": 3000},
        },
    ),
    Row(
        fo.lars,
        half(weight_decay=DECAY, nesterov=OFF_ON, trust_coefficient=(0.2, 0.1)),
        {"lr": 1.0, "momentum": 0.9, "weight_decay": 0.1, "trust_coefficient": 0.2},
        shapes=SHAPES,
        few=FEW,
        elementwise=False,
        arrives={"": {"lr": 1.0}},
    ),
    Row(
        fo.novograd,
        mixes(maximize=OFF_ON, weight_decay=DECAY),
        {"lr": 0.1, "betas": (0.8, 0.9), "eps": 0.01, "weight_decay": 0.1},
        shapes=SHAPES,
        few=FEW,
        elementwise=False,
        arrives={"": {"lr": 0.01}},
    ),
    Row(
        fo.mars_adamw,
        mixes(maximize=OFF_ON, weight_decay=DECAY),
        {
            "lr": 0.1,
            "betas": (0.8, 0.9),
            "eps": 0.1,
            "weight_decay": 0.1,
            "gamma": 0.1,
        },
        shapes=SHAPES,
        few=FEW,
        elementwise=False,
    ),
]
