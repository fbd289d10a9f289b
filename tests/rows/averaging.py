"""Rules whose last iterate alone is not the result: averages, samples."""

from row import DECAY, Row, half

import funcopt as fo

# Warming up: with a constant lr the largest so far has a kink. Powers near 1: a square of
# so small a rate is far more curved than a difference of 1e-6 sees.
WEIGHTS = {"lr": 0.5, "warmup_steps": 9.5, "r": 1.0, "weight_lr_power": 0.8}

ROWS = [
    Row(
        fo.madgrad,
        half(weight_decay=DECAY, momentum=(0.9, 0.0)),
        {"lr": 0.1, "momentum": 0.8, "weight_decay": 0.1, "eps": 0.1},
        arrives={"rosenbrock": {"lr": 0.01, "steps": 4000}},
    ),
    Row(
        fo.sgld,
        half(weight_decay=DECAY, temperature=(1.0, 0.3), noise=(0.7, -0.4)),
        {"lr": 0.1, "temperature": 0.3, "weight_decay": 0.1, "noise": 0.7},
        arrives={"rosenbrock": {"lr": 0.0015, "steps": 6000}},
    ),
    Row(
        fo.schedule_free_sgd,
        half(weight_decay=DECAY, warmup_steps=(9.5, 12.0), weight_lr_power=(0.8, 1.0)),
        WEIGHTS | {"momentum": 0.8, "weight_decay": 0.1},
        per_leaf=tuple(WEIGHTS),
        arrives={"rosenbrock": {"lr": 0.01, "steps": 3000}},
    ),
    Row(
        fo.schedule_free_adamw,
        half(weight_decay=DECAY, warmup_steps=(9.5, 12.0), weight_lr_power=(0.8, 1.0)),
        WEIGHTS | {"lr": 0.1, "betas": (0.8, 0.9), "eps": 0.01, "weight_decay": 0.1},
        per_leaf=tuple(WEIGHTS),
        roots=2,
        powers=2,
        arrives={"parabola": {"lr": 1.0}, "rosenbrock": {"steps": 2000}},
    ),
]
