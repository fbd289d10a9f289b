"""Schedule-free SGD: an average of iterates in place of a falling learning rate."""

from functools import partial
from typing import Any

import torch

from funcopt.hyper import Hyper
from funcopt.optimizer import Optimizer, from_spec
from funcopt.optimizers._parts import (
    Number,
    coupled_decay,
    schedule_free_average,
    schedule_free_step,
)
from funcopt.spec import Spec
from funcopt.types import HyperValue, Tensor


def rule(
    g: Tensor,
    p: Tensor,
    z: Tensor,
    weight_sum: Number,  # a number for the whole leaf, as lr_max is
    lr_max: Number,
    *,
    momentum: Number,
    weight_decay: Number,
    maximize: bool,
    **average: Any,
) -> tuple[Any, ...]:
    g = coupled_decay(-g if maximize else g, p, weight_decay)
    return schedule_free_step(g, p, z, weight_sum, lr_max, beta=momentum, **average)


def evaluated(p: Tensor, z: Tensor, *_: Number, momentum: Number, **__: Any) -> Tensor:
    return schedule_free_average(p, z, momentum)


def schedule_free_sgd(
    lr: HyperValue = 1.0,
    momentum: HyperValue = 0.9,
    weight_decay: HyperValue = 0.0,
    warmup_steps: HyperValue = 0.0,
    r: HyperValue = 0.0,
    weight_lr_power: HyperValue = 2.0,
    *,
    maximize: bool = False,
) -> Optimizer:
    r"""Schedule-free SGD; the parameters are y, where gradients are taken.

    .. math::
        g_t &= \nabla f(y_{t-1}) + \text{weight\_decay} \cdot y_{t-1} \\
        \text{lr}_t &= \text{lr} \cdot \min(1, \, t / \text{warmup\_steps}) \\
        w_t &= t^r \, \bigl(\max_{s \leq t} \text{lr}_s\bigr)^\text{weight\_lr\_power},
            \qquad c_t = w_t \Big/ \sum_{s \leq t} w_s \\
        z_t &= z_{t-1} - \text{lr}_t \, g_t \\
        x_t &= (1 - c_t) \, x_{t-1} + c_t \, z_t \\
        y_t &= \text{momentum} \cdot x_t + (1 - \text{momentum}) \, z_t

    Args:
        lr: learning rate, ≥ 0; ten to fifty times that of plain SGD.
        momentum: the share of the average in the parameter, in [0, 1).
        weight_decay: factor of the L2 penalty, ≥ 0.
        warmup_steps: over so many steps lr rises from 0, linearly, ≥ 0: a float or a 0-d
            tensor for each leaf, as all that the weights are made of.
        r: the weight of step t in the average is t to this power, ≥ 0, times
        weight_lr_power: the largest lr so far to this one, ≥ 0.
        maximize: ascend.

    Returns:
        An `Optimizer`; state ``step, z`` (of each parameter's shape and dtype) and
        ``weight_sum, lr_max`` (float64, one entry per leaf).

    Raises:
        HyperparameterError: a number out of its range, or by ``update``, where a
            hyperparameter that must be one number per leaf has one for each weight.

    Note:
        Take gradients at the parameters, and evaluate and keep the model at
        ``opt.eval_params(state, params)``, which is x. It goes by the momentum that the
        optimizer was made with; at 0 the average is lost.

    Source:
        Defazio, Yang, Mehta, Mishchenko, Khaled, Cutkosky, "The road less scheduled",
        2024, equations 2 to 4; warm-up and weights as in their package.

    Example:
        >>> import torch, funcopt as fo
        >>> opt = fo.schedule_free_sgd(lr=0.2)
        >>> p = torch.tensor([1.0, -0.2])
        >>> state = opt.init(p)
        >>> for _ in range(5):
        ...     p, state = opt.update(2 * p, state, p)      # the gradient of p²
        >>> opt.eval_params(state, p)
        tensor([ 0.2174, -0.0435])
    """
    spec = Spec(
        partial(rule, maximize=maximize),
        name="schedule_free_sgd",
        slots={"z": torch.clone, "weight_sum": 0.0, "lr_max": 0.0},
        hyper={
            "lr": Hyper(lr, scalar=(0,)),
            "momentum": Hyper(momentum, below=1.0),
            "weight_decay": Hyper(weight_decay),
            "warmup_steps": Hyper(warmup_steps, scalar=(0,)),
            "r": Hyper(r, scalar=(0,)),
            "weight_lr_power": Hyper(weight_lr_power, scalar=(0,)),
        },
        evaluated=evaluated,
    )
    return from_spec(spec)
