"""Formulas that several rules share: averages, decay, roots with a finite derivative."""

from typing import Any

import torch

from funcopt.types import Tensor

Number = Any  # float, 0-d float64 tensor, or a tensor that broadcasts to the leaf


def average(mean: Tensor, value: Tensor, beta: Number) -> Tensor:
    """The exponential moving average β·mean + (1 - β)·value."""
    return beta * mean + (1 - beta) * value


def coupled_decay(g: Tensor, p: Tensor, weight_decay: Number) -> Tensor:
    """The gradient with the L2 penalty's added: g + λ·p."""
    return g if _is_zero(weight_decay) else g + weight_decay * p


def decoupled_decay(p: Tensor, lr: Number, weight_decay: Number) -> Tensor:
    """The parameter shrunk past the gradient: (1 - γλ)·p (Loshchilov, Hutter, 2019)."""
    return p if _is_zero(weight_decay) else p * (1 - lr * weight_decay)


def sqrt(x: Tensor) -> Tensor:
    """√x, bit-equal, with derivative 0 where x is 0.

    There torch's is ∞; with x = β·x + (1-β)·g² at g = 0 the chain rule would make
    ∞·0 = NaN of the meta-gradient of every hyperparameter.
    """
    # Two selects, for one would let the NaN of the unused branch through.
    zero = x == 0
    return torch.sqrt(x.masked_fill(zero, 1.0)).masked_fill(zero, 0.0)


def adam_direction(
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: Number,
    beta1: Number,
    beta2: Number,
    eps: Number,
) -> Tensor:
    """m̂ / (√v̂ + ε), both moments freed of their start at zero."""
    denom = sqrt(exp_avg_sq) / (1 - beta2**step) ** 0.5 + eps
    return exp_avg / (1 - beta1**step) / denom


def _is_zero(value: Number) -> bool:
    return isinstance(value, float) and value == 0
