"""A parameter stage that bounds the length of a step by that of the parameter."""

from typing import Any

from funcopt.hyper import Hyper
from funcopt.optimizers._parts import Number, root
from funcopt.spec import Spec
from funcopt.transforms.stage import ParameterStage
from funcopt.types import HyperValue, Tensor


def _trust_region(
    new: Tensor, old: Tensor, *, step: Any, ratio: Number, floor: Number
) -> tuple[Tensor, ...]:
    moved = new - old
    longest = ratio * root((old * old).sum()).clamp(min=floor)
    scale = (longest / root((moved * moved).sum())).clamp(max=1.0)
    return (old + scale * moved,)


def trust_region(ratio: HyperValue, floor: HyperValue = 1e-3) -> ParameterStage:
    r"""Shorten each leaf's step to a share of the leaf's own length.

    .. math::
        d = p'_t - p_{t-1}, \qquad
        p_t = p_{t-1} + \min\left(1, \text{ratio} \,
            \frac{\max(\lVert p_{t-1} \rVert_2, \text{floor})}{\lVert d \rVert_2}
            \right) d

    Args:
        ratio: the longest step, as a share of the parameter's 2-norm, ≥ 0.
        floor: the norm that a smaller parameter is taken to have, ≥ 0.

    Returns:
        A parameter stage for `chain`; no state.

    Raises:
        HyperparameterError: a number out of its range.

    Source:
        The ratio of norms is that of You, Gitman, Ginsburg, "Large batch training of
        convolutional networks", 2017 (LARS), here as a bound (Bernstein, Vahdat, Yue,
        Liu, "On the distance between two neural networks", 2020).

    Example:
        >>> import torch, funcopt as fo
        >>> opt = fo.chain(fo.sgd(lr=1.0), fo.trust_region(0.1))
        >>> p = torch.tensor([3.0, 4.0])
        >>> opt.update(torch.tensor([5.0, 0.0]), opt.init(p), p)[0]
        tensor([2.5000, 4.0000])
    """
    hyper = {"ratio": Hyper(ratio), "floor": Hyper(floor)}
    spec = Spec(_trust_region, "trust_region", {}, hyper, elementwise=False, norms=True)
    return ParameterStage(spec)
