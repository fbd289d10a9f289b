"""The optimizers of torch.optim."""

from functools import partial

import torch
from row import DECAY, OFF_ON, Row, half, mixes

import funcopt as fo

ROWS = [
    Row(
        fo.sgd,
        [
            flags
            for flags in mixes(
                maximize=OFF_ON,
                weight_decay=DECAY,
                momentum=(0.0, 0.9),
                dampening=(0.0, 0.3),
                nesterov=OFF_ON,
            )
            # torch refuses nesterov without momentum, or with dampening
            if not flags["nesterov"] or (flags["momentum"] and not flags["dampening"])
        ],
        {"lr": 0.1, "weight_decay": 0.1, "momentum": 0.9, "dampening": 0.3},
        twin=torch.optim.SGD,
        arrives={"rosenbrock": {"lr": 0.003, "momentum": 0.9}},
    ),
    Row(
        fo.adam,
        half(weight_decay=DECAY, amsgrad=OFF_ON, decoupled_weight_decay=OFF_ON),
        {"lr": 0.1, "betas": (0.8, 0.9), "eps": 0.01, "weight_decay": 0.1},
        roots=2,
        powers=1,
        twin=torch.optim.Adam,
    ),
    Row(
        fo.amsgrad,
        mixes(maximize=OFF_ON, weight_decay=(0.1,), decoupled_weight_decay=OFF_ON),
        {"lr": 0.1, "betas": (0.8, 0.9), "eps": 0.01, "weight_decay": 0.1},
        roots=2,
        powers=1,
        twin=partial(torch.optim.Adam, amsgrad=True),
    ),
    Row(
        fo.adamw,
        mixes(maximize=OFF_ON, weight_decay=DECAY, amsgrad=OFF_ON),
        {"lr": 0.1, "betas": (0.8, 0.9), "eps": 0.01, "weight_decay": 0.1},
        roots=2,
        powers=1,
        twin=torch.optim.AdamW,
    ),
    Row(
        fo.adamax,
        mixes(maximize=OFF_ON, weight_decay=DECAY),
        {"lr": 0.1, "betas": (0.8, 0.9), "eps": 0.01, "weight_decay": 0.1},
        powers=1,
        twin=torch.optim.Adamax,
    ),
    Row(
        fo.adagrad,
        half(
            weight_decay=DECAY, lr_decay=(0.0, 0.1), initial_accumulator_value=(0.0, 0.1)
        ),
        {"lr": 0.1, "lr_decay": 0.1, "weight_decay": 0.1, "eps": 0.01},
        roots=2,
        first={"sum": "initial_accumulator_value"},
        twin=torch.optim.Adagrad,
        arrives={"": {"lr": 1.0}, "rosenbrock": {"steps": 3000}},
    ),
    Row(
        fo.adadelta,
        mixes(maximize=OFF_ON, weight_decay=DECAY, eps=(0.1,)),
        {"lr": 0.3, "rho": 0.8, "eps": 0.1, "weight_decay": 0.1},
        least={"eps": 1e-6},  # without it there is no first step
        ulps=3,  # torch rounds delta five times, and squares it
        roots=4,
        twin=torch.optim.Adadelta,
        arrives={
            "parabola": {"lr": 30.0},
            "": {"lr": 1.0, "steps": 600},
            "rosenbrock": {"lr": 0.1, "steps": 5000},
        },
    ),
    Row(
        fo.rmsprop,
        half(weight_decay=DECAY, momentum=(0.0, 0.9), centered=OFF_ON),
        {"lr": 0.01, "alpha": 0.9, "eps": 0.01, "weight_decay": 0.1, "momentum": 0.9},
        least={"alpha": 0.5},  # at 0 the centered mean square is 0
        roots=3,
        twin=torch.optim.RMSprop,
        arrives={"": {"lr": 0.03}, "rosenbrock": {"lr": 0.001, "steps": 3500}},
    ),
    Row(
        fo.radam,
        half(weight_decay=DECAY, decoupled_weight_decay=OFF_ON),
        {"lr": 0.1, "betas": (0.8, 0.9), "eps": 0.01, "weight_decay": 0.1},
        warm=5,  # the sixth step is the first that is rectified
        roots=2,
        powers=3,
        twin=torch.optim.RAdam,
    ),
    Row(
        fo.nadam,
        half(weight_decay=DECAY, decoupled_weight_decay=OFF_ON),
        {
            "lr": 0.1,
            "betas": (0.8, 0.9),
            "eps": 0.01,
            "weight_decay": 0.1,
            "momentum_decay": 0.5,
        },
        roots=2,
        first={"mu_product": 1.0},
        per_leaf=("betas", "momentum_decay"),
        twin=torch.optim.NAdam,
        arrives={"matrix": {"lr": 0.03}, "rosenbrock": {"lr": 0.01, "steps": 2000}},
    ),
    Row(
        fo.asgd,
        half(weight_decay=DECAY, lambd=(1e-4, 0.1), t0=(1e6, 0.5)),
        {"lr": 0.1, "lambd": 0.1, "alpha": 0.75, "t0": 0.5, "weight_decay": 0.1},
        per_leaf=("lr", "lambd", "alpha", "t0"),
        idle=("t0",),  # it is the average's alone
        first={"mu": 1.0},
        twin=torch.optim.ASGD,
        arrives={"rosenbrock": {"lr": 0.0015, "steps": 6000}},
    ),
    Row(
        fo.rprop,
        [
            {"maximize": False, "step_sizes": (0.0, 50.0)},
            {"maximize": True, "step_sizes": (1e-6, 50.0)},
            {"maximize": False, "step_sizes": (0.06, 0.15)},
            {"maximize": True, "step_sizes": (0.0, 0.15), "etas": (0.6, 1.4)},
        ],
        {"lr": 0.1, "etas": (0.5, 1.2), "step_sizes": (0.0, 50.0)},
        least={"etas": (0.1, 1.1), "step_sizes": (0.0, 0.2)},
        idle=("etas", "step_sizes"),
        moves=False,  # not past a minimum
        warm=1,  # then no gradient is 0 for having been reversed, where a step jumps
        smooth=False,
        twin=torch.optim.Rprop,
        arrives={"rosenbrock": {"lr": 0.1, "steps": 2000}},
    ),
]
