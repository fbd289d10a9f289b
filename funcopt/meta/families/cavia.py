"""CAVIA: a task is learned in a few context parameters, which start from zero."""

from typing import Any

import torch

from funcopt import tree
from funcopt.inner.unroll import Unrolled
from funcopt.meta.families.anil import anil
from funcopt.meta.families.family import Family, learned, merged, split
from funcopt.optimizer import Optimizer
from funcopt.types import LossFunction, Tree


def cavia(
    loss_fn: LossFunction,
    inner: Optimizer,
    *,
    steps: int,
    adapted: str = "context*",
    **options: Any,
) -> Family:
    r"""Adapt only context parameters φ, from zero; learn the rest across tasks.

    .. math::
        \phi_0 = 0, \qquad \phi_{k+1} = \text{update}\big(
        \nabla_\phi L((\theta, \phi_k), \text{support}), \phi_k\big), \qquad
        V(\theta) = L\big((\theta, \phi_K), \text{query}\big)

    The context is an input beside the data, which tells the task; it is a leaf of
    params, so that the loss is called as in every family. Each task starts it from zero,
    whatever θ holds there, and its meta-gradient is zero: an outer optimizer leaves it.

    Args:
        loss_fn: as in `maml`, of the whole tree of parameters.
        inner: as in `maml`.
        steps: as in `maml`.
        adapted: a glob over the leaves' paths, as in `by_name`: the context.
        options: as in `anil`.

    Returns:
        A `Family`, as of `anil`.

    Raises:
        Whatever `anil` raises.

    Source:
        Zintgraf, Shiarlis, Kurin, Hofmann, Whiteson, "Fast context adaptation via
        meta-learning", 2019.

    Example:
        >>> import torch, funcopt as fo
        >>> def loss(p, target):
        ...     return ((p["weight"] + p["context"] - target) ** 2).sum()
        >>> family = fo.meta.cavia(loss, fo.sgd(lr=0.25), steps=1)
        >>> theta = family.init({"weight": torch.ones(1), "context": torch.zeros(1)})
        >>> family.adapt(theta, torch.zeros(1)).params
        {'weight': tensor([1.]), 'context': tensor([-0.5000])}
    """
    inside = anil(loss_fn, inner, steps=steps, adapted=adapted, **options)

    def start(theta: Tree) -> Tree:
        context, shared = split(theta, adapted)
        return merged(tree.map(torch.zeros_like, context), shared)

    def adapt(theta: Tree, support: Tree, steps: int = steps) -> Unrolled:
        return inside.adapt(start(theta), support, steps)

    return learned(adapt, loss_fn, params=start)
