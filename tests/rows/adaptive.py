"""Rules past torch.optim that treat every element alike."""

from oracles import Lion
from row import DECAY, OFF_ON, Row, mixes

import funcopt as fo

ROWS = [
    Row(
        fo.lion,
        mixes(maximize=OFF_ON, weight_decay=DECAY),
        {"lr": 0.02, "betas": (0.8, 0.9), "weight_decay": 0.1},
        idle=("betas",),  # of whose product there is but the sign
        smooth=False,
        twin=Lion,
    ),
]
