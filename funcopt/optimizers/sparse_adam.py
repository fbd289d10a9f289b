"""SparseAdam: Adam for the rows that a sparse gradient names."""

from functools import partial
from typing import Any

import torch

from funcopt.hyper import Hyper
from funcopt.optimizer import Optimizer, from_spec
from funcopt.optimizers._parts import Number, average, root
from funcopt.spec import Spec
from funcopt.types import HyperValue, Tensor


def rule(
    g: Tensor,
    p: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: Any,
    lr: Number,
    beta1: Number,
    beta2: Number,
    eps: Number,
    maximize: bool,
) -> tuple[Tensor, ...]:
    g = -g if maximize else g
    exp_avg = average(exp_avg, g, beta1)
    exp_avg_sq = average(exp_avg_sq, g * g, beta2)
    step_size = lr * (1 - beta2**step) ** 0.5 / (1 - beta1**step)
    return p - step_size * exp_avg / (root(exp_avg_sq) + eps), exp_avg, exp_avg_sq


def sparse_adam(
    lr: HyperValue = 1e-3,
    betas: tuple[HyperValue, HyperValue] = (0.9, 0.999),
    eps: HyperValue = 1e-8,
    *,
    maximize: bool = False,
) -> Optimizer:
    r"""Lazy Adam for sparse gradients; equal to ``torch.optim.SparseAdam``.

    For the rows that :math:`g_t` names, and no others:

    .. math::
        \text{exp\_avg}_t &= \beta_1 \, \text{exp\_avg}_{t-1} + (1 - \beta_1) \, g_t \\
        \text{exp\_avg\_sq}_t &= \beta_2 \, \text{exp\_avg\_sq}_{t-1}
            + (1 - \beta_2) \, g_t^2 \\
        p_t &= p_{t-1} - \text{lr} \, \frac{\sqrt{1 - \beta_2^t}}{1 - \beta_1^t} \,
            \frac{\text{exp\_avg}_t}{\sqrt{\text{exp\_avg\_sq}_t} + \text{eps}}

    Args:
        lr: learning rate, > 0 (as in torch; a schedule may end at 0).
        betas: decay rates of the two averages, each in [0, 1).
        eps: added to the root, which is not corrected for the start, > 0.
        maximize: ascend.

    Returns:
        An `Optimizer`; state ``step, exp_avg, exp_avg_sq``, dense, of each parameter's
        shape and dtype.

    Raises:
        HyperparameterError: a number out of its range.
        LeafError: by ``update``, a dense gradient.

    Note:
        ``step`` counts the steps of a leaf, not those of a row, as in torch.

    Source:
        Kingma, Ba, "Adam: a method for stochastic optimization", 2015, algorithm 1, done
        to the rows at hand.

    Example:
        >>> import torch, funcopt as fo
        >>> opt = fo.sparse_adam(lr=0.1)
        >>> p = torch.tensor([1.0, -0.2])
        >>> state = opt.init(p)
        >>> for _ in range(5):
        ...     g = torch.sparse_coo_tensor(
        ...         [[0]], 2 * p[:1], (2,), check_invariants=True)
        ...     p, state = opt.update(g, state, p)
        >>> p
        tensor([ 0.5080, -0.2000])
    """
    return from_spec(
        Spec(
            partial(rule, maximize=maximize),
            "sparse_adam",
            dict.fromkeys(("exp_avg", "exp_avg_sq"), torch.zeros_like),
            {
                "lr": Hyper(lr, over=True),
                "betas": Hyper(betas, below=1.0, parts=("beta1", "beta2")),
                "eps": Hyper(eps, over=True),
            },
            sparse="only",
        )
    )
