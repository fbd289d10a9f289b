"""Rules that step by a sign, or by what is clipped to its size."""

from row import DECAY, OFF_ON, Row, mixes

import funcopt as fo

ROWS = [
    Row(
        fo.signsgd,
        mixes(maximize=OFF_ON, weight_decay=DECAY),
        {"lr": 0.02, "weight_decay": 0.1},
        smooth=False,
    ),
    Row(
        fo.signum,
        mixes(maximize=OFF_ON, weight_decay=DECAY),
        {"lr": 0.02, "beta": 0.8, "weight_decay": 0.1},
        idle=("beta",),  # the average's size does not count
        smooth=False,
    ),
]
