"""Hyperparameters as functions of the step: those of torch.optim, and optax's."""

from funcopt.schedules.cosine import (
    cosine_annealing,
    cosine_decay,
    cosine_warm_restarts,
)
from funcopt.schedules.cyclic import cyclic, cyclic_momentum
from funcopt.schedules.decay import (
    exponential,
    exponential_decay,
    polynomial,
    polynomial_decay,
)
from funcopt.schedules.factors import constant, linear, multistep, step
from funcopt.schedules.joined import chained, lambda_, multiplicative, sequential
from funcopt.schedules.one_cycle import one_cycle, one_cycle_momentum
from funcopt.schedules.piecewise import (
    cosine_one_cycle,
    linear_one_cycle,
    piecewise_constant,
    piecewise_interpolate,
)
from funcopt.schedules.plateau import Plateau, reduce_on_plateau
from funcopt.schedules.warmup import (
    warmup_constant,
    warmup_cosine_decay,
    warmup_exponential_decay,
)

__all__ = [
    "Plateau",
    "chained",
    "constant",
    "cosine_annealing",
    "cosine_decay",
    "cosine_one_cycle",
    "cosine_warm_restarts",
    "cyclic",
    "cyclic_momentum",
    "exponential",
    "exponential_decay",
    "lambda_",
    "linear",
    "linear_one_cycle",
    "multiplicative",
    "multistep",
    "one_cycle",
    "one_cycle_momentum",
    "piecewise_constant",
    "piecewise_interpolate",
    "polynomial",
    "polynomial_decay",
    "reduce_on_plateau",
    "sequential",
    "step",
    "warmup_constant",
    "warmup_cosine_decay",
    "warmup_exponential_decay",
]
