"""An optimizer that moves only where its step and the gradient agree."""

from dataclasses import replace
from functools import partial
from typing import Any

from funcopt.errors import HyperparameterTypeError
from funcopt.execution import donation
from funcopt.optimizer import Optimizer, check_optimizer, from_spec
from funcopt.optimizers._parts import count
from funcopt.types import RuleFunction, Tensor


def _cautious(
    inner: RuleFunction, sign: float, g: Tensor, p: Tensor, *slots: Any, **given: Any
) -> tuple[Any, ...]:
    new, *state = inner(g, p, *slots, **given)
    agrees = ((p - new) * g * sign > 0).to(p.dtype)
    share = (agrees.sum() / count(p)).clamp(min=1e-3)
    return p + (new - p) * agrees / share, *state


def cautious(opt: Optimizer, *, maximize: bool = False) -> Optimizer:
    r"""Leave out the elements of a step that point against the gradient.

    .. math::
        u = p_{t-1} - p'_t, \qquad \phi = [u \cdot g > 0], \qquad
        p_t = p_{t-1} - u \cdot \phi / \max(\operatorname{mean}(\phi), 10^{-3})

    The mean is over a leaf, so that what is left makes up for what is not.

    Args:
        opt: an Optimizer with a rule: any but a partition and the like, of which the
            parts can be made cautious. Its weight decay is part of the step.
        maximize: that ``opt`` ascends.

    Returns:
        An Optimizer with the state and hyperparameters of ``opt``.

    Raises:
        HyperparameterTypeError: ``opt`` is not made of one rule, is `sparse_adam`, or
            keeps an average.

    Note:
        What is to hold after a step, as `project`, stands outside:
        ``chain(cautious(opt), project(...))``.

    Source:
        Liang, Chen, Liu, Liu, "Cautious optimizers: improving training with one line of
        code", 2024, algorithm 1.

    Example:
        >>> import torch, funcopt as fo
        >>> opt = fo.cautious(fo.sgd(lr=1.0, momentum=0.9))
        >>> p, state = torch.zeros(2), opt.init(torch.zeros(2))
        >>> for g in (torch.ones(2), torch.tensor([1.0, -0.5])):
        ...     p, state = opt.update(g, state, p)
        >>> p                                   # the second one's momentum goes down
        tensor([-4.8000, -1.0000])
    """
    check_optimizer(opt, "cautious")
    if opt.spec is None:
        raise HyperparameterTypeError(
            f"cautious needs an optimizer made of one rule, and {opt.name} is not; make "
            "its parts cautious"
        )
    if opt.spec.sparse == "only":
        raise HyperparameterTypeError(
            f"{opt.name} steps what a sparse gradient names, and cautious goes by all of "
            "a leaf; take fo.adam and dense gradients"
        )
    if opt.spec.evaluated is not None:
        raise HyperparameterTypeError(
            f"{opt.name} averages the steps that it makes, and cautious would change "
            "them behind it; let it average what cautious has made: "
            "fo.chain(fo.cautious(fo.adamw()), fo.ema(0.99))"
        )
    spec, sign = opt.spec, -1.0 if maximize else 1.0
    name = f"cautious({spec.name})"
    return from_spec(
        replace(
            spec,
            rule=partial(_cautious, donation.kept(spec.rule), sign),
            name=name,
            elementwise=False,
            norms=spec.traceable,
            # the mean is over all of a leaf, and no more
            stacks=0,
            sparse="dense" if spec.sparse == "dense" else "",
        )
    )
