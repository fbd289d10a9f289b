"""Adaptation to a task that is not to be differentiated: evaluation and use."""

import torch

from funcopt import tree
from funcopt.inner.unroll import Unrolled
from funcopt.meta.families.family import Family
from funcopt.types import Tree


def adapt(
    family: Family, theta: Tree, support: Tree, *, steps: int | None = None
) -> Unrolled:
    """Learn one task from θ without a graph, in any number of steps.

    No tensor of it is followed, so that the fastest executors make the steps and memory
    does not grow with them. Many tasks at once, with a leading axis each:
    ``vmap(lambda s: fo.meta.adapt(family, theta, s).params)(supports)``. Rates that were
    learned for K steps can be poor, or diverge, in more: evaluate at the steps that you
    will use.

    Args:
        family: what `maml` and the others give.
        theta: what was learned.
        support: the data of one task.
        steps: how many, ≥ 0; by default as in meta-training. Rates of single steps
            (`lslr`) go on with the last.

    Returns:
        `Unrolled`: the adapted network's ``params``, each step's loss in ``losses``.

    Raises:
        Whatever the family's ``adapt`` raises.

    Source:
        Finn, Abbeel, Levine, 2017, figure 3: more steps than in meta-training.

    Example:
        >>> import torch, funcopt as fo
        >>> family = fo.meta.maml(lambda p, x: (p - x).square().sum(), fo.sgd(lr=0.25),
        ...                       steps=1)
        >>> theta = torch.zeros(1, requires_grad=True)
        >>> fo.meta.adapt(family, theta, torch.ones(1), steps=3).params
        tensor([0.8750])
    """
    more = {} if steps is None else {"steps": steps}
    with torch.no_grad():
        return family.adapt(tree.detach(theta), tree.detach(support), **more)
