"""ANIL: almost no inner loop; only the last layer learns a task."""

from typing import Any

from funcopt.inner.unroll import Unrolled, unroll
from funcopt.meta.families.family import Family, learned, merged, split
from funcopt.optimizer import Optimizer
from funcopt.types import LossFunction, Tree


def anil(
    loss_fn: LossFunction,
    inner: Optimizer,
    *,
    steps: int,
    adapted: str = "head*",
    **options: Any,
) -> Family:
    r"""`maml` whose inner loop moves a part of the parameters only, the head.

    .. math::
        \theta = (b, h), \qquad h_{k+1} = \text{update}\big(
        \nabla_h L((b, h_k), \text{support}), h_k\big), \qquad
        V(\theta) = L\big((b, h_K), \text{query}\big)

    The meta-gradient is exact and reaches both parts.

    Args:
        loss_fn: as in `maml`, of the whole tree of parameters.
        inner: as in `maml`.
        steps: as in `maml`.
        adapted: a glob over the leaves' paths, as in `by_name`: what the inner loop
            moves.
        options: as in `maml`. ``grad_mode="first_order"`` raises: the body's gradient
            passes through the inner ones.

    Returns:
        A `Family`, as of `maml`; what ``adapt`` gives has the whole tree in ``params``.

    Raises:
        HyperparameterError: at use, when ``adapted`` fits no leaf.
        Whatever `maml` raises.

    Source:
        Raghu, Raghu, Bengio, Vinyals, "Rapid learning or feature reuse? Towards
        understanding the effectiveness of MAML", 2020.

    Example:
        >>> import torch, funcopt as fo
        >>> def loss(p, target):
        ...     return ((p["body"] * p["head"] - target) ** 2).sum()
        >>> family = fo.meta.anil(loss, fo.sgd(lr=0.25), steps=1)
        >>> theta = {"body": torch.ones(1), "head": torch.zeros(1)}
        >>> family.adapt(theta, torch.ones(1)).params
        {'body': tensor([1.]), 'head': tensor([0.5000])}
    """

    def adapt(theta: Tree, support: Tree, steps: int = steps) -> Unrolled:
        head, body = split(theta, adapted)

        def loss(head: Tree, batch: Tree, body: Tree = body, **buffers: Tree) -> Any:
            return loss_fn(merged(head, body), batch, **buffers)

        run = unroll(inner, loss, head, support, steps=steps, meta=body, **options)
        return run._replace(params=merged(run.params, body))

    return learned(adapt, loss_fn)
