"""MADGRAD: dual averaging with a cube root for a denominator, and momentum."""

import math
from functools import partial
from itertools import accumulate
from operator import mul
from typing import Any

import torch

from funcopt.bits import bits, of_bits
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

    The bits of x begin with its exponent: a third of them gives z ≈ x^(-1/3) to 4 %, and
    then ∛x = xz²·(1 - h)^(-2/3) with h = 1 - xz³, a binomial series. By sums and products
    alone, which every executor rounds alike; torch's power of a tensor depends on its
    layout, and is no vector operation in C. Within two units in the last place. For ∛0
    stands 9e-16 in float32, 1e-108 in float64, which an ε down to 1e-8 swallows.
    """
    dtype = torch.finfo(x.dtype)
    digits = -round(math.log2(dtype.eps))
    up = math.ceil(digits / 3)  # powers of 8 change no digit
    small = x < dtype.tiny  # and has fewer digits
    x = torch.where(small, x * 8.0**up, x).clamp(min=dtype.tiny)
    one = (1 - round(math.log2(dtype.tiny))) / dtype.eps  # the bits of 1
    z = of_bits(4 / 3 * one - 0.068 / dtype.eps - bits(x) * (1 / 3))
    root = x * z * z
    h = 1 - root * z  # at most 0.103
    series, *coefficients = _BINOMIAL[: 16 if x.dtype is torch.float64 else 8][::-1]
    for coefficient in coefficients:
        series = series * h + coefficient
    root = root + root * (h * series)
    return torch.where(small, root * 2.0**-up, root)


#: of hᵏ in (1 - h)^(-2/3), k from 1
_BINOMIAL = [*accumulate(((k + 2 / 3) / (k + 1) for k in range(16)), mul)]


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
