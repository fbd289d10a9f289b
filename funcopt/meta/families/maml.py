"""MAML: learn where gradient descent starts; FOMAML, without second derivatives."""

from typing import Any

from funcopt.inner.unroll import Unrolled, unroll
from funcopt.meta.families.family import Family, learned
from funcopt.optimizer import Optimizer
from funcopt.types import LossFunction, Tree


def maml(
    loss_fn: LossFunction, inner: Optimizer, *, steps: int, **options: Any
) -> Family:
    r"""Learn the parameters from which K steps on a task lead to a low query loss.

    .. math::
        V(\theta) = L\big(\theta_K, \text{query}\big), \qquad \theta_0 = \theta, \quad
        \theta_{k+1} = \text{update}\big(\nabla L(\theta_k, \text{support}),
        \theta_k\big)

    The gradient is exact. θ is the tree of the network's parameters.

    Args:
        loss_fn: ``loss_fn(params, batch)`` → a 0-d loss, or ``(loss, aux)`` with
            ``has_aux=True``: of the inner loop and of the query alike.
        inner: the optimizer of the inner loop; any.
        steps: K ≥ 0, the inner steps of meta-training.
        options: what `unroll` takes beside: ``grad_mode``, ``window``, ``has_aux``,
            ``buffers``. With ``has_aux`` ``task_loss`` returns ``(loss, aux)``, aux of
            the query.

    Returns:
        A `Family`: ``init(params)`` → θ, ``adapt(theta, support, steps=K)`` →
        `Unrolled`, ``task_loss(theta, (support, query))`` for `value_and_grad`, and
        ``params(theta)``, the unadapted network.

    Raises:
        StructureError: by ``task_loss``, for a task that is no pair.
        Whatever `unroll` raises.

    Source:
        Finn, Abbeel, Levine, "Model-agnostic meta-learning for fast adaptation of deep
        networks", 2017.

    Example:
        >>> import torch, funcopt as fo
        >>> def loss(p, target):
        ...     return ((p - target) ** 2).sum()
        >>> family = fo.meta.maml(loss, fo.sgd(lr=0.25), steps=1)
        >>> theta = family.init(torch.zeros(1))
        >>> tasks = torch.tensor([[1.0], [3.0]]), torch.tensor([[1.0], [3.0]])
        >>> fo.meta.value_and_grad(family.task_loss)(theta, tasks)
        (tensor(1.2500), tensor([-1.]))
    """

    def adapt(theta: Tree, support: Tree, steps: int = steps) -> Unrolled:
        return unroll(inner, loss_fn, theta, support, steps=steps, **options)

    return learned(adapt, loss_fn)


def fomaml(
    loss_fn: LossFunction, inner: Optimizer, *, steps: int, **options: Any
) -> Family:
    r"""`maml` that takes each inner gradient as a constant.

    For SGD the meta-gradient is the query's at the adapted parameters:

    .. math:: \nabla_\theta V \approx \nabla L(\theta_K, \text{query})

    No second derivative is made, and the graph of an inner step is not kept.

    Args:
        loss_fn: as in `maml`.
        inner: as in `maml`.
        steps: as in `maml`.
        options: as in `maml`, but for ``grad_mode``.

    Returns:
        A `Family`, as of `maml`.

    Raises:
        GradientLostError: by ``task_loss``, when the inner loss closes over a tensor
            that requires grad.
        Whatever `maml` raises.

    Source:
        Finn, Abbeel, Levine, 2017, section 5.2.

    Example:
        >>> import torch, funcopt as fo
        >>> def loss(p, target):
        ...     return ((p - target) ** 2).sum()
        >>> family = fo.meta.fomaml(loss, fo.sgd(lr=0.25), steps=1)
        >>> tasks = torch.tensor([[1.0], [3.0]]), torch.tensor([[1.0], [3.0]])
        >>> fo.meta.value_and_grad(family.task_loss)(torch.zeros(1), tasks)
        (tensor(1.2500), tensor([-2.]))
    """
    return maml(loss_fn, inner, steps=steps, grad_mode="first_order", **options)
