"""Rules that step by a sign, or by what is clipped to its size."""

from row import DECAY, OFF_ON, Row, mixes

import funcopt as fo

ROWS = [
    Row(
        fo.signsgd,
        mixes(maximize=OFF_ON, weight_decay=DECAY),
        {"lr": 0.02, "weight_decay": 0.1},
        smooth=False,
        arrives={"": {"lr": 0.01}, "rosenbrock": None},
    ),
    Row(
        fo.signum,
        mixes(maximize=OFF_ON, weight_decay=DECAY),
        {"lr": 0.02, "beta": 0.8, "weight_decay": 0.1},
        idle=("beta",),  # the average's size does not count
        smooth=False,
        arrives={
            "parabola": {"lr": 0.01},
            "": {"lr": 0.003, "steps": 1000},
            "rosenbrock": {"lr": 0.001, "steps": 1800},
        },
    ),
    Row(
        fo.sophia_g,
        [
            {"maximize": up, "weight_decay": decay, "rho": 8.0, "hessian": 0.8}
            for up, decay in ((False, 0.0), (False, 0.1), (True, 0.1))
        ],
        {
            "lr": 0.05,
            "betas": (0.8, 0.9),
            "rho": 8.0,
            "eps": 0.01,
            "weight_decay": 0.1,
            "hessian": 0.8,
        },
        idle=("eps",),  # the least curvature, of which there is more
        arrives={"": {"lr": 0.01}, "rosenbrock": {"lr": 0.015, "steps": 6000}},
    ),
]
