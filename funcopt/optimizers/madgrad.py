"""MADGRAD: dual averaging with a cube root for a denominator, and momentum."""

import math
from functools import partial
from typing import Any

import torch

from funcopt.hyper import Hyper
from funcopt.optimizer import Optimizer, elementwise
from funcopt.optimizers._parts import Number, coupled_decay, towards, where
from funcopt.types import HyperValue, Tensor


def rule(
    g: Tensor,
    p: Tensor,
    grad_sum_sq: Tensor,
    s: Tensor,
    x0: Tensor,
    *,
    step: Any,
    lr: Number,
    momentum: Number,
    weight_decay: Number,
    eps: Number,
    maximize: bool,
) -> tuple[Tensor, ...]:
    g = coupled_decay(-g if maximize else g, p, weight_decay)
    lamb = where(lr == 0, lr, lr + eps) * step**0.5
    grad_sum_sq = grad_sum_sq + lamb * (g * g)
    s = s + lamb * g
    z = x0 - s / (cube_root(grad_sum_sq) + eps)
    return towards(p, z, 1 - momentum), grad_sum_sq, s, x0.clone()


def cube_root(x: Tensor) -> Tensor:
    """∛x for a denominator ∛x + ε, with derivative 0 where x is 0.

    By sums, products and one or two quotients, which every executor rounds alike;
    torch's power of a tensor depends on its layout, and is no vector operation in C. The
    root of the least number there is stands for ∛0: 1e-15 in float32, which an ε down to
    1e-8 swallows.
    """
    dtype = torch.finfo(x.dtype)
    x = x.clamp(min=dtype.tiny * dtype.eps)
    y = torch.ones_like(x)
    # Powers of 8 change no digit: x goes into [8^low, 8^(low + 1)), and y is 2^k for 8^k.
    low = math.floor(math.log(dtype.tiny * dtype.eps, 8))
    high = math.ceil(math.log(dtype.max, 8))
    up = high - 1  # the largest of which 8^up is a number
    low += up
    small = x < 8.0**low
    x, y = torch.where(small, x * 8.0**up, x), torch.where(small, y * 2.0**-up, y)
    width = high - low
    while width > 1:
        k = (width + 1) // 2
        large = x >= 8.0 ** (low + k)
        x, y = torch.where(large, x * 8.0**-k, x), torch.where(large, y * 2.0**k, y)
        width = k
    x = x * 8.0**-low
    root = _CUBE_ROOT[0]
    for coefficient in _CUBE_ROOT[1:]:
        root = root * x + coefficient
    for _ in range(2 if x.dtype is torch.float64 else 1):  # Halley's cubes the error
        cube = root * root * root
        root = root - root * ((cube - x) / (cube + cube + x))
    return root * (y * 2.0**low)


#: the quartic that is ∛x on [1, 8] but for a share of 0.0019
_CUBE_ROOT = (-0.00043210115, 0.009583824, -0.083775104, 0.44919377, 0.62729471)


def madgrad(
    lr: HyperValue = 1e-2,
    momentum: HyperValue = 0.9,
    weight_decay: HyperValue = 0.0,
    eps: HyperValue = 1e-6,
    *,
    maximize: bool = False,
) -> Optimizer:
    r"""MADGRAD, a momentumized, adaptive, dual averaged gradient method.

    .. math::
        g_t &= \nabla f(p_{t-1}) + \text{weight\_decay} \cdot p_{t-1} \\
        \lambda_t &= (\text{lr} + \text{eps}) \, \sqrt{t} \\
        \text{grad\_sum\_sq}_t &= \text{grad\_sum\_sq}_{t-1} + \lambda_t \, g_t^2 \\
        s_t &= s_{t-1} + \lambda_t \, g_t \\
        z_t &= x_0 - s_t \, / \,
            \bigl(\sqrt[3]{\text{grad\_sum\_sq}_t} + \text{eps}\bigr) \\
        p_t &= \text{momentum} \cdot p_{t-1} + (1 - \text{momentum}) \, z_t

    Args:
        lr: learning rate, ≥ 0; at 0 eps is not added to it.
        momentum: share of the old parameter in the new one, in [0, 1).
        weight_decay: factor of the L2 penalty, ≥ 0; often 0 is best.
        eps: added to the root, and to lr, ≥ 0.
        maximize: ascend.

    Returns:
        An `Optimizer`; state ``step, grad_sum_sq, s`` and ``x0``, the first parameter,
        of each parameter's shape and dtype.

    Raises:
        HyperparameterError: a number out of its range.

    Note:
        Steps start from ``x0``, not from the parameter before: a parameter that is
        changed between steps is drawn back. That lr has eps added is the authors'
        package's, not the paper's. Where ``grad_sum_sq`` is 0 the derivative of the root
        is taken as 0.

    Source:
        Defazio, Jelassi, "Adaptivity without compromise: a momentumized, adaptive, dual
        averaged gradient method for stochastic optimization", 2021, algorithm 1.

    Example:
        >>> import torch, funcopt as fo
        >>> opt = fo.madgrad(lr=0.1)
        >>> p = torch.tensor([1.0, -0.2])
        >>> state = opt.init(p)
        >>> for _ in range(5):
        ...     p, state = opt.update(2 * p, state, p)      # the gradient of p²
        >>> p
        tensor([ 0.7033, -0.0372])
    """
    return elementwise(
        partial(rule, maximize=maximize),
        name="madgrad",
        slots={
            "grad_sum_sq": torch.zeros_like,
            "s": torch.zeros_like,
            "x0": torch.clone,
        },
        hyper={
            "lr": Hyper(lr),
            "momentum": Hyper(momentum, below=1.0),
            "weight_decay": Hyper(weight_decay),
            "eps": Hyper(eps),
        },
    )
