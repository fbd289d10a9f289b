"""DoG: a step as long as the way so far over the root of the gradients' squares."""

from functools import partial
from typing import Any

import torch

from funcopt.hyper import Hyper
from funcopt.optimizer import Optimizer, elementwise
from funcopt.optimizers._parts import Number, coupled_decay, larger, root, where
from funcopt.types import HyperValue, Tensor


def rule(
    g: Tensor,
    p: Tensor,
    initial: Tensor,
    max_distance: Number,  # a number for the whole tree, as sum_sq is
    sum_sq: Number,
    *,
    step: Any,
    lr: Number,
    reps_rel: Number,
    eps: Number,
    weight_decay: Number,
    maximize: bool,
    distance_sq: Tensor,  # over the whole tree, as the other two
    norm_sq: Tensor,
    grad_sq: Tensor,
) -> tuple[Any, ...]:
    g = coupled_decay(-g if maximize else g, p, weight_decay)
    first = reps_rel * (1 + root(norm_sq))
    max_distance = where(step > 1, larger(max_distance, root(distance_sq)), first)
    sum_sq = where(step > 1, sum_sq, eps) + grad_sq
    p = p - lr * max_distance / root(sum_sq) * g
    return p, initial, max_distance, sum_sq


def distance_sq(g: Tensor, p: Tensor, initial: Tensor, *_: Any, **__: Any) -> Tensor:
    return ((p - initial) * (p - initial)).sum()


def norm_sq(g: Tensor, p: Tensor, *_: Any, **__: Any) -> Tensor:
    return (p * p).sum()


def grad_sq(
    g: Tensor, p: Tensor, *_: Any, weight_decay: Number, maximize: bool, **__: Any
) -> Tensor:
    g = coupled_decay(-g if maximize else g, p, weight_decay)
    return (g * g).sum()


def dog(
    lr: HyperValue = 1.0,
    reps_rel: HyperValue = 1e-6,
    eps: HyperValue = 1e-8,
    weight_decay: HyperValue = 0.0,
    *,
    maximize: bool = False,
) -> Optimizer:
    r"""Distance over gradients: SGD that finds its learning rate.

    .. math::
        g_t &= \nabla f(p_{t-1}) + \text{weight\_decay} \cdot p_{t-1} \\
        \text{max\_distance}_t &= \max(\text{max\_distance}_{t-1},
            \lVert p_{t-1} - p_0 \rVert_2), \qquad
            \text{max\_distance}_1 = \text{reps\_rel} \, (1 + \lVert p_0 \rVert_2) \\
        \text{sum\_sq}_t &= \text{sum\_sq}_{t-1} + \lVert g_t \rVert_2^2,
            \qquad \text{sum\_sq}_0 = \text{eps} \\
        p_t &= p_{t-1} - \text{lr} \,
            \frac{\text{max\_distance}_t}{\sqrt{\text{sum\_sq}_t}} \, g_t

    Norms are those of all leaves together.

    Args:
        lr: a factor of the step, ≥ 0; 1 is what the authors advise.
        reps_rel: the first distance, as a share of one plus the parameters' norm, ≥ 0.
        eps: the first sum of squares, ≥ 0.
        weight_decay: factor of the L2 penalty, ≥ 0.
        maximize: ascend.

    Returns:
        An `Optimizer`; state ``step``, ``initial``, the first parameters, of each
        parameter's shape and dtype, and ``max_distance, sum_sq`` (float64, one entry per
        leaf, alike for leaves that have always stepped together).

    Raises:
        HyperparameterError: a number out of its range.

    Note:
        Evaluate an average of the iterates: ``fo.chain(fo.dog(), fo.polyak())``. The
        norms cost a read more of gradients and parameters.

    Source:
        Ivgi, Hinder, Carmon, "DoG is SGD's best friend: a parameter-free dynamic step
        size schedule", 2023, equation 2; eps and the first distance as in their package.

    Example:
        >>> import torch, funcopt as fo
        >>> opt = fo.dog(reps_rel=0.1)
        >>> p = torch.tensor([1.0, -0.2])
        >>> state = opt.init(p)
        >>> for _ in range(5):
        ...     p, state = opt.update(2 * p, state, p)      # the gradient of p²
        >>> p
        tensor([ 0.2197, -0.0439])
    """
    return elementwise(
        partial(rule, maximize=maximize),
        name="dog",
        slots={"initial": torch.clone, "max_distance": 0.0, "sum_sq": 0.0},
        hyper={
            "lr": Hyper(lr),
            "reps_rel": Hyper(reps_rel, scalar=(0,)),
            "eps": Hyper(eps, scalar=(0,)),
            "weight_decay": Hyper(weight_decay),
        },
        totals={
            "distance_sq": distance_sq,
            "norm_sq": norm_sq,
            "grad_sq": partial(grad_sq, maximize=maximize),
        },
    )
