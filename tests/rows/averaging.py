"""Rules whose last iterate alone is not the result: averages, samples."""

from row import DECAY, Row, half

import funcopt as fo

ROWS = [
    Row(
        fo.madgrad,
        half(weight_decay=DECAY, momentum=(0.9, 0.0)),
        {"lr": 0.1, "momentum": 0.8, "weight_decay": 0.1, "eps": 0.1},
        roots=1,
    ),
    Row(
        fo.sgld,
        half(weight_decay=DECAY, temperature=(1.0, 0.3), noise=(0.7, -0.4)),
        {"lr": 0.1, "temperature": 0.3, "weight_decay": 0.1, "noise": 0.7},
    ),
]
