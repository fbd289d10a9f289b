"""LSLR, the heart of MAML++: a learned rate for each leaf and step."""

from operator import itemgetter
from typing import Any

import torch

from funcopt import tree
from funcopt.checks import check_count
from funcopt.errors import HyperparameterError, StructureError
from funcopt.inner.per_step import per_step
from funcopt.inner.unroll import Unrolled, unroll
from funcopt.meta.families.family import Family, judged, learned, pair
from funcopt.meta.families.rates import network, parts, with_rates
from funcopt.optimizer import Optimizer
from funcopt.types import LossFunction, Tensor, Tree


def lslr(
    loss_fn: LossFunction, inner: Optimizer, *, steps: int, **options: Any
) -> Family:
    r"""`maml` that also learns a rate for each leaf and each step (MAML++).

    .. math::
        \theta^\ell_{k+1} = \theta^\ell_k - \alpha^\ell_k \nabla_{\theta^\ell}
        L(\theta_k, \text{support}), \qquad
        V = \sum_{k=1}^K w_k\, L(\theta_k, \text{query})

    θ is ``{"params": tree, "lr": tree of [K]}``. By default w is one at the last step.
    ``task_loss(theta, task, weights)`` takes any [K], for MAML++'s multi-step loss those
    of `step_weights`: ``value_and_grad(partial(family.task_loss, weights=w))``.

    Args:
        loss_fn: as in `maml`.
        inner: as in `metasgd`.
        steps: K ≥ 1, as in `maml`. ``adapt`` with more of them goes on with the last
            rates.
        options: as in `maml`. MAML++ trains its first epochs in first order:
            ``grad_mode="first_order"``; θ is the same.

    Returns:
        A `Family`, as of `maml`; with ``has_aux`` aux is of the query after K steps.

    Raises:
        HyperparameterError: ``steps`` below 1; by ``init``, an inner ``lr`` that is no
            number.
        LeafError: by ``init``, for a leaf that is no floating-point tensor.
        StructureError: by ``task_loss``, for weights that are not [K]; for rates of
            another number of steps.
        Whatever `maml` raises.

    Source:
        Antoniou, Edwards, Storkey, "How to train your MAML", 2019.

    Example:
        >>> import torch, funcopt as fo
        >>> def loss(p, target):
        ...     return ((p - target) ** 2).sum()
        >>> family = fo.meta.lslr(loss, fo.sgd(lr=0.25), steps=2)
        >>> theta = family.init(torch.zeros(1))
        >>> tasks = torch.tensor([[1.0], [3.0]]), torch.tensor([[1.0], [3.0]])
        >>> fo.meta.value_and_grad(family.task_loss)(theta, tasks)[1]
        {'params': tensor([-0.2500]), 'lr': tensor([-2.5000, -2.5000])}
    """
    check_count("steps", steps)

    def init(params: Tree) -> Tree:
        return with_rates(params, inner, lambda _: [steps])

    def of_its_steps(theta: Tree) -> tuple[Tree, Tree]:
        params, rates = parts(theta)
        found = tree.leading_axis(rates, "theta['lr']")
        if found != steps:
            raise StructureError(
                f"theta['lr'] holds the rates of {found} steps, and this lslr learns "
                f"those of {steps}: make it with steps={found}"
            )
        return params, rates

    def adapt(theta: Tree, support: Tree, steps: int = steps) -> Unrolled:
        check_count("steps", steps, least=0)
        params, rates = of_its_steps(theta)
        hyper = {"lr": per_step(_prolonged(rates, steps))}
        return unroll(
            inner, loss_fn, params, support, steps=steps, hyper=hyper, **options
        )

    last_step = learned(adapt, loss_fn, init, network)

    def task_loss(theta: Tree, task: Tree, weights: Tensor | None = None) -> Any:
        if weights is None:
            return last_step.task_loss(theta, task)
        shape = [*weights.shape] if isinstance(weights, Tensor) else repr(weights)
        if shape != [steps]:
            raise StructureError(
                f"weights must be a tensor [{steps}], one for each step, got {shape}"
            )
        support, query = pair(task)
        outs, on = [], dict(options)
        (params, every), window = of_its_steps(theta), options.get("window")
        for k in range(steps):
            rates = {"lr": tree.map(itemgetter(k), every)}
            run = unroll(inner, loss_fn, params, support, steps=1, hyper=rates, **on)
            carry = run.params, run.state, run.buffers
            cut = window and (k + 1) % window == 0
            params, on["state"], on["buffers"] = tree.detach(carry) if cut else carry
            outs.append(judged(loss_fn, run.params, query, run.buffers))
        if not options.get("has_aux"):
            return sum(w * loss for w, loss in zip(weights, outs))
        return sum(w * loss for w, (loss, _) in zip(weights, outs)), outs[-1][1]

    return last_step._replace(task_loss=task_loss)


def step_weights(steps: int, progress: float) -> Tensor:
    r"""The weights of MAML++'s multi-step loss, from equal ones to the last step alone.

    .. math::
        w_k = \frac{1 - t}{K} \;\; (k < K), \qquad w_K = 1 - \frac{(K - 1)(1 - t)}{K}

    (The authors' code holds the first K - 1 at 0.03/K or above until t = 1.)

    Args:
        steps: K ≥ 1.
        progress: t, the part of the annealing that is over: from 0 to 1, where it
            stays. In the paper t = 1 after 10 of 100 epochs.

    Returns:
        A tensor [K] that sums to one.

    Raises:
        HyperparameterError: ``steps`` below 1, a negative ``progress``.

    Source:
        Antoniou, Edwards, Storkey, "How to train your MAML", 2019, section 4.

    Example:
        >>> import torch, funcopt as fo
        >>> fo.meta.step_weights(2, 0.0), fo.meta.step_weights(2, 0.5)
        (tensor([0.5000, 0.5000]), tensor([0.2500, 0.7500]))
    """
    check_count("steps", steps)
    if not progress >= 0:
        raise HyperparameterError(f"progress must be at least 0, got {progress}")
    early = (1 - min(progress, 1.0)) / steps
    return torch.tensor([early] * (steps - 1) + [1 - (steps - 1) * early])


def _prolonged(rates: Tree, steps: int) -> Tree:
    """Rates for more steps, or fewer: past the last one, the last again."""

    def row(rate: Tensor) -> Tensor:
        if rate.shape[0] == steps:
            return rate
        chosen = torch.arange(steps, device=rate.device).clamp(max=rate.shape[0] - 1)
        return rate[chosen]

    return tree.map(row, rates)
