"""Prodigy: Adam that finds its learning rate from how far gradients have led."""

from functools import partial
from typing import Any

import torch

from funcopt.hyper import Hyper
from funcopt.optimizer import Optimizer, elementwise
from funcopt.optimizers._parts import Number, decayed, larger, root, where
from funcopt.types import HyperValue, Tensor


def advanced(
    g: Tensor,
    p: Tensor,
    s: Tensor,
    d: Number,
    *,
    step: Any,
    lr: Number,
    beta1: Number,
    beta2: Number,
    weight_decay: Number,
    d0: Number,
    beta3: Number = None,
    maximize: bool,
    decoupled_weight_decay: bool,
    use_bias_correction: bool,
    **_: Any,
) -> tuple[Tensor, Tensor, Tensor, Number, Number]:
    """Gradient and parameter with their decay, the next s, d, and the step size."""
    d = where(step > 1, d, d0)
    step_size = d * lr
    if use_bias_correction:
        step_size = step_size * (1 - beta2**step) ** 0.5 / (1 - beta1**step)
    g = -g if maximize else g
    g, p = decayed(g, p, step_size, weight_decay, decoupled_weight_decay)
    s = (beta2**0.5 if beta3 is None else beta3) * s + d / d0 * step_size * g
    return g, p, s, d, step_size


def rule(
    g: Tensor,
    p: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    s: Tensor,
    initial: Tensor,
    d: Number,  # a number for the whole tree, as the next two
    d_max: Number,
    d_numerator: Number,
    *,
    progress: Tensor,  # over the whole tree, as the next
    size: Tensor,
    d_coef: Number,
    growth_rate: Number = None,
    eps: Number,
    **given: Any,
) -> tuple[Any, ...]:
    step, d0, beta1, beta2 = (given[name] for name in ("step", "d0", "beta1", "beta2"))
    g, shrunk, s, d, step_size = advanced(g, p, s, d, **given)
    exp_avg = beta1 * exp_avg + (1 - beta1) * d * g
    exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * (d * g) * (d * g)
    beta3 = given.get("beta3", beta2**0.5)
    moves = size > 0  # else no gradient has been but 0
    d_numerator = where(moves, beta3 * d_numerator + progress, d_numerator)
    d_hat = d_coef * d_numerator / where(moves, size, 1.0)
    d_max = larger(where(step > 1, d_max, d0), where(moves, d_hat, 0.0))
    if growth_rate is None:
        d = d_max
    else:  # but free to grow at first
        d = growth_rate * where(d == d0, larger(d, where(moves, d_hat, 0.0)), d)
        d = where(d < d_max, d, d_max)
    p = where(moves, shrunk - step_size * exp_avg / (root(exp_avg_sq) + d * eps), p)
    return p, exp_avg, exp_avg_sq, s, initial, d, d_max, d_numerator


def progress_of(g: Tensor, p: Tensor, *slots: Any, **given: Any) -> Tensor:
    _, _, s, initial, d, *_ = slots
    g, _, _, d, step_size = advanced(g, p, s, d, **given)
    return (g * (initial - p)).sum() * (d / given["d0"] * step_size)


def size_of(g: Tensor, p: Tensor, *slots: Any, **given: Any) -> Tensor:
    _, _, s, _, d, *_ = slots
    return advanced(g, p, s, d, **given)[2].abs().sum()


def prodigy(
    lr: HyperValue = 1.0,
    betas: tuple[HyperValue, HyperValue] = (0.9, 0.999),
    beta3: HyperValue | None = None,
    eps: HyperValue = 1e-8,
    weight_decay: HyperValue = 0.0,
    *,
    d0: HyperValue = 1e-6,
    d_coef: HyperValue = 1.0,
    growth_rate: HyperValue | None = None,
    decoupled_weight_decay: bool = True,
    use_bias_correction: bool = False,
    maximize: bool = False,
) -> Optimizer:
    r"""Prodigy: an estimate d of the distance to the solution scales Adam's step.

    .. math::
        \gamma_t &= d_{t-1} \, \text{lr} \\
        \text{exp\_avg}_t &= \beta_1 \, \text{exp\_avg}_{t-1}
            + (1 - \beta_1) \, d_{t-1} \, g_t \\
        \text{exp\_avg\_sq}_t &= \beta_2 \, \text{exp\_avg\_sq}_{t-1}
            + (1 - \beta_2) \, d_{t-1}^2 \, g_t^2 \\
        \text{d\_numerator}_t &= \beta_3 \, \text{d\_numerator}_{t-1}
            + \tfrac{d_{t-1}}{d_0} \gamma_t \, \langle g_t, p_0 - p_{t-1} \rangle,
            \qquad s_t = \beta_3 \, s_{t-1} + \tfrac{d_{t-1}}{d_0} \gamma_t \, g_t \\
        d_t &= \max\left(d_{t-1}, \text{d\_coef} \,
            \text{d\_numerator}_t / \lVert s_t \rVert_1 \right) \\
        p_t &= p_{t-1} - \gamma_t \, \frac{\text{exp\_avg}_t}
            {\sqrt{\text{exp\_avg\_sq}_t} + d_t \, \text{eps}}

    The product and the norm are over all leaves together.

    Args:
        lr: a factor of the step, ≥ 0; 1, or a schedule from 1 to 0, is what is meant.
        betas: decay rates of the two averages, each in [0, 1).
        beta3: decay rate of the estimate's sums, in [0, 1); √β₂ if None.
        eps: added to the root, as a share of d, ≥ 0.
        weight_decay: the share of γ by which a parameter shrinks, ≥ 0.
        d0: the first estimate, > 0.
        d_coef: a factor of the estimate, ≥ 0.
        growth_rate: the most by which d grows in a step, ≥ 1; None for no bound.
        decoupled_weight_decay: else an L2 penalty, whose gradient is added.
        use_bias_correction: with γ times √(1 - β₂ᵗ) / (1 - β₁ᵗ).
        maximize: ascend.

    Returns:
        An `Optimizer`; state ``step``, ``exp_avg, exp_avg_sq, s`` and ``initial``, the
        first parameters, of each parameter's shape and dtype, and ``d, d_max,
        d_numerator`` (float64, one entry per leaf, alike for leaves that have always
        stepped together).

    Raises:
        HyperparameterError: a number out of its range.

    Source:
        Mishchenko, Defazio, "Prodigy: an expeditiously adaptive parameter-free learner",
        2024, algorithm 4; β₃ and growth_rate as in their package.

    Example:
        >>> import torch, funcopt as fo
        >>> opt = fo.prodigy(d0=0.1)
        >>> p = torch.tensor([1.0, -0.2])
        >>> state = opt.init(p)
        >>> for _ in range(5):
        ...     p, state = opt.update(2 * p, state, p)      # the gradient of p²
        >>> p
        tensor([-0.7053, -0.0861])
    """
    flags = {
        "maximize": maximize,
        "decoupled_weight_decay": decoupled_weight_decay,
        "use_bias_correction": use_bias_correction,
    }
    optional: dict[str, Hyper] = {}
    if beta3 is not None:
        optional["beta3"] = Hyper(beta3, below=1.0, scalar=(0,))
    if growth_rate is not None:
        optional["growth_rate"] = Hyper(growth_rate, low=1.0, scalar=(0,))
    return elementwise(
        partial(rule, **flags),
        name="prodigy",
        slots={
            **dict.fromkeys(("exp_avg", "exp_avg_sq", "s"), torch.zeros_like),
            "initial": torch.clone,
            **dict.fromkeys(("d", "d_max", "d_numerator"), 0.0),
        },
        hyper={
            "lr": Hyper(lr, scalar=(0,)),
            "betas": Hyper(betas, below=1.0, parts=("beta1", "beta2"), scalar=(0, 1)),
            "eps": Hyper(eps),
            "weight_decay": Hyper(weight_decay),
            "d0": Hyper(d0, over=True, scalar=(0,)),
            "d_coef": Hyper(d_coef, scalar=(0,)),
            **optional,
        },
        totals={
            "progress": partial(progress_of, **flags),
            "size": partial(size_of, **flags),
        },
    )
