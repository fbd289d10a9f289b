"""Rules of a leaf's matrices."""

import torch
from oracles import Muon
from row import DECAY, Row, half

import funcopt as fo

MATRICES = ((4, 3), (2, 5), (1, 3), (3, 3), (0, 3))

ROWS = [
    Row(
        fo.muon,
        # In bfloat16 the step is a staircase, and a stack of leaves rounds in another
        # order: what is asked of derivatives and batches is asked of the leaf's dtype.
        [
            {**flags, "ns_dtype": None}
            for flags in half(
                weight_decay=DECAY,
                nesterov=(True, False),
                adjust_lr_fn=(None, "match_rms_adamw"),
            )
        ],
        {"lr": 0.1, "weight_decay": 0.1, "momentum": 0.8},
        twin=Muon,
        ulps=8,  # a bit that is rounded the other way, five iterations on
        like_twin={"ns_dtype": torch.bfloat16},
        shapes=MATRICES,
        few=((2, 2), (2, 2)),
        elementwise=False,
    ),
]
