"""Rules that average iterates, or gradients since the start."""

from row import DECAY, Row, half

import funcopt as fo

ROWS = [
    Row(
        fo.madgrad,
        half(weight_decay=DECAY, momentum=(0.9, 0.0)),
        {"lr": 0.1, "momentum": 0.8, "weight_decay": 0.1, "eps": 0.1},
        roots=1,
    ),
]
