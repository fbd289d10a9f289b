"""A parameter stage that keeps parameters in a set."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from funcopt import projections
from funcopt.errors import HyperparameterTypeError
from funcopt.hyper import Hyper
from funcopt.spec import Spec
from funcopt.transforms.stage import ParameterStage
from funcopt.types import HyperValue, Tensor


def _project(
    onto: Callable[..., Tensor], new: Tensor, old: Tensor, *, step: Any, **values: Any
) -> tuple[Tensor, ...]:
    return (onto(new, **values),)


def project(onto: Callable[..., Tensor], **hyper: HyperValue) -> ParameterStage:
    r"""Put each leaf back into a set after every step.

    .. math:: p_t = \text{onto}(p'_t)

    Args:
        onto: a function of one leaf, as those of ``fo.projections``: ``non_negative``,
            ``box``, ``l2_ball``, ``l1_ball``, ``simplex``; or your own, of plain
            arithmetic.
        hyper: its keyword arguments, which become hyperparameters.

    Returns:
        A parameter stage for `chain`; no state.

    Raises:
        HyperparameterTypeError: ``onto`` is no function.

    Source:
        Goldstein, "Convex programming in Hilbert space", 1964 (gradient projection).

    Example:
        >>> import torch, funcopt as fo
        >>> onto = fo.project(fo.projections.box, low=-0.5, high=0.5)
        >>> opt = fo.chain(fo.sgd(lr=1.0), onto)
        >>> p = torch.zeros(2)
        >>> opt.update(torch.tensor([2.0, 0.25]), opt.init(p), p)[0]
        tensor([-0.5000, -0.2500])
    """
    if not callable(onto):
        raise HyperparameterTypeError(
            f"project takes a function of a leaf, as fo.projections.box, not {onto!r}"
        )

    elementwise, norms = projections.KINDS.get(onto, (False, False))
    declared = {name: Hyper(value, low=-math.inf) for name, value in hyper.items()}
    name = f"project_{getattr(onto, '__name__', 'own')}"
    rule = partial(_project, onto)
    return ParameterStage(Spec(rule, name, {}, declared, elementwise, norms))
