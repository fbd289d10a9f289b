"""Schedule-free AdamW: an average of iterates in place of a falling learning rate."""

from functools import partial
from typing import Any

import torch

from funcopt.hyper import Hyper
from funcopt.optimizer import Optimizer, from_spec
from funcopt.optimizers._parts import (
    Number,
    average_of_squares,
    coupled_decay,
    root,
    schedule_free_average,
    schedule_free_step,
)
from funcopt.spec import Spec
from funcopt.types import HyperValue, Tensor


def rule(
    g: Tensor,
    p: Tensor,
    z: Tensor,
    exp_avg_sq: Tensor,
    weight_sum: Number,  # a number for the whole leaf, as lr_max is
    lr_max: Number,
    *,
    step: Any,
    beta1: Number,
    beta2: Number,
    eps: Number,
    weight_decay: Number,
    maximize: bool,
    **rest: Any,
) -> tuple[Any, ...]:
    exp_avg_sq = average_of_squares(exp_avg_sq, g, beta2)
    correction = (1 - beta2**step) ** 0.5
    g = correction * ((-g if maximize else g) / (root(exp_avg_sq) + eps * correction))
    g = coupled_decay(g, p, weight_decay)
    p, z, *numbers = schedule_free_step(
        g, p, z, weight_sum, lr_max, step=step, beta=beta1, **rest
    )
    return p, z, exp_avg_sq, *numbers


def evaluated(p: Tensor, z: Tensor, *_: Any, beta1: Number, **__: Any) -> Tensor:
    return schedule_free_average(p, z, beta1)


def schedule_free_adamw(
    lr: HyperValue = 2.5e-3,
    betas: tuple[HyperValue, HyperValue] = (0.9, 0.999),
    eps: HyperValue = 1e-8,
    weight_decay: HyperValue = 0.0,
    warmup_steps: HyperValue = 0.0,
    r: HyperValue = 0.0,
    weight_lr_power: HyperValue = 2.0,
    *,
    maximize: bool = False,
) -> Optimizer:
    r"""Schedule-free AdamW; the parameters are y, where gradients are taken.

    .. math::
        g_t &= \nabla f(y_{t-1}) \\
        \text{exp\_avg\_sq}_t &= \beta_2 \, \text{exp\_avg\_sq}_{t-1}
            + (1 - \beta_2) \, g_t^2 \\
        d_t &= \frac{g_t}{\sqrt{\text{exp\_avg\_sq}_t / (1 - \beta_2^t)} + \text{eps}}
            + \text{weight\_decay} \cdot y_{t-1} \\
        z_t &= z_{t-1} - \text{lr}_t \, d_t \\
        x_t &= (1 - c_t) \, x_{t-1} + c_t \, z_t \\
        y_t &= \beta_1 \, x_t + (1 - \beta_1) \, z_t

    with ``lr_t`` and ``c_t`` as in `schedule_free_sgd`.

    Args:
        lr: learning rate, ≥ 0; one to ten times that of `adamw`.
        betas: the share of the average in the parameter, and the decay rate of
            ``exp_avg_sq``, each in [0, 1).
        eps: added to the root, ≥ 0.
        weight_decay: the share of ``lr`` by which the parameter pulls at itself, ≥ 0.
        warmup_steps: as in `schedule_free_sgd`, ≥ 0; so are the next two.
        r: power of t in a step's weight, ≥ 0.
        weight_lr_power: power of the largest lr so far in it, ≥ 0.
        maximize: ascend.

    Returns:
        An `Optimizer`; state ``step, z, exp_avg_sq`` (of each parameter's shape and
        dtype) and ``weight_sum, lr_max`` (float64, one entry per leaf).

    Raises:
        HyperparameterError: a number out of its range, or by ``update``, where a
            hyperparameter that must be one number per leaf has one for each weight.

    Note:
        Take gradients at the parameters, and evaluate and keep the model at
        ``opt.eval_params(state, params)``, which is x. It goes by the betas that the
        optimizer was made with; at 0 the average is lost.

    Source:
        Defazio, Yang, Mehta, Mishchenko, Khaled, Cutkosky, "The road less scheduled",
        2024, algorithm 1; warm-up and weights as in their package.

    Example:
        >>> import torch, funcopt as fo
        >>> opt = fo.schedule_free_adamw(lr=0.1)
        >>> p = torch.tensor([1.0, -0.2])
        >>> state = opt.init(p)
        >>> for _ in range(5):
        ...     p, state = opt.update(2 * p, state, p)      # the gradient of p²
        >>> opt.eval_params(state, p)
        tensor([ 0.7157, -0.0053])
    """
    spec = Spec(
        partial(rule, maximize=maximize),
        name="schedule_free_adamw",
        slots={
            "z": torch.clone,
            "exp_avg_sq": torch.zeros_like,
            "weight_sum": 0.0,
            "lr_max": 0.0,
        },
        hyper={
            "lr": Hyper(lr, scalar=(0,)),
            "betas": Hyper(betas, below=1.0, parts=("beta1", "beta2")),
            "eps": Hyper(eps),
            "weight_decay": Hyper(weight_decay),
            "warmup_steps": Hyper(warmup_steps, scalar=(0,)),
            "r": Hyper(r, scalar=(0,)),
            "weight_lr_power": Hyper(weight_lr_power, scalar=(0,)),
        },
        evaluated=evaluated,
    )
    return from_spec(spec)
