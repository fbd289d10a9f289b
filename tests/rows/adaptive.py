"""Rules past torch.optim that treat every element alike."""

from oracles import Lion
from row import DECAY, OFF_ON, Row, half, mixes

import funcopt as fo

WARMUP = {"maximize": False, "betas": (0.7, 0.9, 0.85), "weight_decay": 0.1}

ROWS = [
    Row(
        fo.lion,
        mixes(maximize=OFF_ON, weight_decay=DECAY),
        {"lr": 0.02, "betas": (0.8, 0.9), "weight_decay": 0.1},
        idle=("betas",),  # of whose product there is but the sign
        smooth=False,
        twin=Lion,
        arrives={
            "": {"lr": 0.01},
            "mixed": {"lr": 0.01, "steps": 500},
            "rosenbrock": {"lr": 0.001, "steps": 1600},
        },
    ),
    Row(
        fo.adabelief,
        mixes(maximize=OFF_ON, weight_decay=DECAY),
        {"lr": 0.1, "betas": (0.8, 0.9), "eps": 0.1, "weight_decay": 0.1},
        roots=2,
        powers=1,
    ),
    Row(
        fo.yogi,
        half(weight_decay=DECAY, initial_accumulator_value=(1e-6, 0.5)),
        {"lr": 0.1, "betas": (0.8, 0.9), "eps": 0.01, "weight_decay": 0.1},
        first={"exp_avg_sq": "initial_accumulator_value"},
        roots=2,
        powers=1,
    ),
    Row(
        fo.adan,
        mixes(maximize=OFF_ON, weight_decay=DECAY),
        {"lr": 0.1, "betas": (0.8, 0.7, 0.9), "eps": 0.01, "weight_decay": 0.1},
        roots=2,
        powers=1,
    ),
    Row(
        fo.adopt,
        half(weight_decay=DECAY, clip=OFF_ON, decoupled_weight_decay=OFF_ON),
        {"lr": 0.1, "betas": (0.8, 0.9), "eps": 0.01, "weight_decay": 0.1},
        idle=("eps",),  # the gradients are larger
        warm=3,  # the second gradient is the first one again: nothing has moved
        moves=False,  # not in the first step
        roots=2,
    ),
    Row(
        fo.ademamix,
        [
            {"maximize": False, "weight_decay": 0.0},
            # 1 - β₃ keeps the rounding of a warm-up's eˣ: betas for which that is none
            {**WARMUP, "alpha_warmup": 4, "beta3_warmup": 3},
            {**WARMUP, "alpha_warmup": 2, "beta3_warmup": 5, "maximize": True},
        ],
        {
            "lr": 0.1,
            "betas": (0.7, 0.9, 0.85),
            "alpha": 2.0,
            "eps": 0.01,
            "weight_decay": 0.1,
        },
        roots=2,
        powers=1,
        arrives={"parabola": {"lr": 1.0}},
    ),
    Row(
        fo.adam_atan2,
        mixes(maximize=OFF_ON, weight_decay=DECAY),
        {"lr": 0.1, "betas": (0.8, 0.9), "weight_decay": 0.1, "a": 1.3, "b": 0.9},
        functions=2,
        roots=2,
        powers=1,
    ),
]
