"""Rules of a leaf's matrices."""

import torch
from oracles import Muon
from row import DECAY, OFF_ON, Row, half, mixes

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
        arrives={"": {"lr": 0.01}, "rosenbrock": {"lr": 0.003}},
    ),
    Row(
        fo.adafactor,
        # At d = 1 a step lies at the edge of its bound: test_matrix_rules goes over it.
        half(weight_decay=DECAY, d=(1.5, 2.0)),
        {"lr": 0.1, "beta2_decay": -0.8, "eps": (1e-3, 0.01), "d": 1.5}
        | {"weight_decay": 0.1},
        least={"d": 1.0},
        idle=("eps", "d"),  # bounds
        twin=torch.optim.Adafactor,
        shapes=((4, 3), (5,), (2, 3, 2), (2,), (2, 2)),
        few=((2,), (2, 2)),
        elementwise=False,
        arrives={
            "": {"lr": 0.03},
            "mixed": {"lr": 0.03, "steps": 600},
            "rosenbrock": {"lr": fo.schedules.exponential(0.1, 0.999), "steps": 5000},
        },
    ),
    Row(
        fo.shampoo,
        mixes(
            maximize=OFF_ON, weight_decay=DECAY, precondition_frequency=(1, 2), eps=(0.1,)
        )[::3],
        {"lr": 0.3, "weight_decay": 0.1},
        shapes=((4, 3), (5,), (2, 3, 2), (), (0, 3)),
        few=((2,), (2, 2)),
        rounding=1e-12,
        elementwise=False,
        arrives={"": {"lr": 1.0}, "rosenbrock": {"lr": 0.1, "steps": 1500}},
    ),
    Row(
        fo.soap,
        [
            {"maximize": False, "precondition_frequency": 2, "weight_decay": 0.0},
            {"maximize": True, "precondition_frequency": 1, "weight_decay": 0.1},
            {
                "maximize": False,
                "precondition_frequency": 1,
                "weight_decay": 0.1,
                "shampoo_beta": 0.8,
                "precondition_1d": True,
                "merge_dims": True,
                "max_precond_dim": 2,
            },
        ],
        {"lr": 0.1, "betas": (0.8, 0.7), "eps": 0.1, "weight_decay": 0.1}
        | {"shampoo_beta": 0.8},
        least={"eps": 1e-3},  # a second gradient like the first is rounding off its axes
        warm=3,  # a basis of two gradients that differ
        moves=False,  # the first step makes the bases
        # Of sides that lack one eigenvector at most: rounding would pick among more.
        shapes=((4, 3), (2,), (2, 1, 2), (), (0, 3)),
        few=((2,), (2, 2)),
        rounding=1e-12,
        elementwise=False,
    ),
]
