"""Rules that find their learning rate, by sums over the whole tree."""

from row import DECAY, OFF_ON, Row, mixes

import funcopt as fo

ROWS = [
    Row(
        fo.dog,
        # as they come, the first steps would be too small to be seen
        mixes(maximize=OFF_ON, weight_decay=DECAY, reps_rel=(0.3,)),
        {"lr": 0.9, "reps_rel": 0.3, "eps": 0.01, "weight_decay": 0.1},
        elementwise=False,
        arrives={"": {"lr": 1.0}, "rosenbrock": {"lr": 0.5, "steps": 5000}},
    ),
    Row(
        fo.prodigy,
        [
            {**flags, "maximize": maximize, "d0": 0.7, "d_coef": 60.0}
            for maximize, flags in [
                (False, {"weight_decay": 0.0}),
                (True, {"weight_decay": 0.1, "growth_rate": 1.1}),
                (False, {"weight_decay": 0.1, "decoupled_weight_decay": False}),
                (False, {"weight_decay": 0.1, "beta3": 0.7}),
                (True, {"weight_decay": 0.1, "use_bias_correction": True}),
            ]
        ],
        {
            "lr": 0.2,
            "betas": (0.8, 0.9),
            "eps": 0.01,
            "weight_decay": 0.1,
            "d0": 0.7,
            "d_coef": 60.0,
            "beta3": 0.7,
            "growth_rate": 1.1,
        },
        elementwise=False,
        arrives={"": {"lr": 1.0}},
    ),
]
