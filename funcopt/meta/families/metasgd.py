"""Meta-SGD: learn, beside the start, a rate for every weight."""

from typing import Any

from funcopt.inner.unroll import Unrolled, unroll
from funcopt.meta.families.family import Family, learned
from funcopt.meta.families.rates import network, parts, with_rates
from funcopt.optimizer import Optimizer
from funcopt.types import LossFunction, Tree


def metasgd(
    loss_fn: LossFunction, inner: Optimizer, *, steps: int, **options: Any
) -> Family:
    r"""`maml` that also learns the rate of every single weight.

    .. math::
        \theta_{k+1} = \theta_k - \alpha \odot \nabla L(\theta_k, \text{support}),
        \qquad \text{learned: } (\theta_0, \alpha)

    θ is ``{"params": tree, "lr": tree}``, leaves of equal shapes. A rate may become
    negative, which then is what the tasks ask for.

    Args:
        loss_fn: as in `maml`.
        inner: as in `maml`; `sgd` in the paper. Its own ``lr`` (a number, or a tree or
            `by_name` selector of numbers; in a `partition` each part's) is where the
            rates start from.
        steps: as in `maml`; one in the paper.
        options: as in `maml`.

    Returns:
        A `Family`, as of `maml`.

    Raises:
        HyperparameterError: by ``init``, when the inner ``lr`` is no number.
        LeafError: by ``init``, for a leaf that is no floating-point tensor.
        Whatever `maml` raises.

    Source:
        Li, Zhou, Chen, Li, "Meta-SGD: learning to learn quickly for few-shot learning",
        2017.

    Example:
        >>> import torch, funcopt as fo
        >>> def loss(p, target):
        ...     return ((p - target) ** 2).sum()
        >>> family = fo.meta.metasgd(loss, fo.sgd(lr=0.25), steps=1)
        >>> theta = family.init(torch.zeros(1))
        >>> tasks = torch.tensor([[1.0], [3.0]]), torch.tensor([[1.0], [3.0]])
        >>> fo.meta.value_and_grad(family.task_loss)(theta, tasks)[1]
        {'params': tensor([-1.]), 'lr': tensor([-10.])}
    """

    def init(params: Tree) -> Tree:
        return with_rates(params, inner, lambda p: p.shape)

    def adapt(theta: Tree, support: Tree, steps: int = steps) -> Unrolled:
        params, rates = parts(theta)
        return unroll(
            inner, loss_fn, params, support, steps=steps, hyper={"lr": rates}, **options
        )

    return learned(adapt, loss_fn, init, network)
