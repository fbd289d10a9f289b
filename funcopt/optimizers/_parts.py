"""Formulas that several rules share: averages, decay, roots with a finite derivative."""

from typing import Any

import torch

from funcopt.types import Tensor

Number = Any  # float, 0-d float64 tensor, or a tensor that broadcasts to the leaf


def average(mean: Tensor, value: Tensor, beta: Number) -> Tensor:
    """The exponential moving average β·mean + (1 - β)·value."""
    weight = 1 - beta
    if isinstance(weight, Tensor):
        weight = weight.to(mean.dtype)  # lerp promotes no dtypes
    return torch.lerp(mean, value, weight)  # torch.optim's rounding, and one op for three


def coupled_decay(g: Tensor, p: Tensor, weight_decay: Number) -> Tensor:
    """The gradient with the L2 penalty's added: g + λ·p."""
    return g if is_zero(weight_decay) else g + weight_decay * p


def decoupled_decay(p: Tensor, lr: Number, weight_decay: Number) -> Tensor:
    """The parameter shrunk past the gradient: (1 - γλ)·p (Loshchilov, Hutter, 2019)."""
    return p if is_zero(weight_decay) else p * (1 - lr * weight_decay)


def root(x: Tensor) -> Tensor:
    """√x for a denominator √x + ε, with derivative 0 where x is 0.

    There torch's derivative is ∞, and with x = β·x + (1-β)·g² at g = 0 the chain rule
    makes ∞·0 = NaN of every meta-gradient. The root of the least normal number stands
    for √0: 1e-19 in float32, 1e-154 in float64. ε swallows it, so that √x + ε is
    bit-equal (down to ε = 1e-11 in float32).
    """
    return torch.sqrt(x.clamp(min=torch.finfo(x.dtype).tiny))


def is_zero(value: Number) -> bool:
    """Whether it is the float 0: a tensor's value is not looked at."""
    return isinstance(value, float) and value == 0
