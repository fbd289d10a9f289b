"""Nearest points of convex sets: plain functions of one tensor, for `project`."""

from typing import Any

import torch

from funcopt.optimizers._parts import Number, root
from funcopt.types import Tensor

__all__ = ["box", "l1_ball", "l2_ball", "non_negative", "simplex"]


def non_negative(x: Tensor) -> Tensor:
    r"""max(x, 0) for each element.

    Args:
        x: a tensor.

    Returns:
        A tensor like ``x``.

    Raises:
        Nothing of its own.

    Source:
        Parikh, Boyd, "Proximal algorithms", 2014, section 6.2.

    Example:
        >>> import torch, funcopt as fo
        >>> fo.projections.non_negative(torch.tensor([-1.0, 2.0]))
        tensor([0., 2.])
    """
    return x.clamp(min=0.0)


def box(x: Tensor, low: Number = 0.0, high: Number = 1.0) -> Tensor:
    r"""Each element clamped to [low, high].

    Args:
        x: a tensor.
        low: a number, a 0-d tensor, or a tensor that broadcasts to ``x``.
        high: as ``low``.

    Returns:
        A tensor like ``x``.

    Raises:
        Nothing of its own.

    Source:
        Parikh, Boyd, "Proximal algorithms", 2014, section 6.2.

    Example:
        >>> import torch, funcopt as fo
        >>> fo.projections.box(torch.tensor([-1.0, 0.5]), low=0.0, high=1.0)
        tensor([0.0000, 0.5000])
    """
    return x.clamp(low, high)


def l2_ball(x: Tensor, radius: Number = 1.0) -> Tensor:
    r"""The nearest tensor whose 2-norm is at most the radius.

    .. math:: x \cdot \min(1, \text{radius} / \lVert x \rVert_2)

    Args:
        x: a tensor.
        radius: ≥ 0.

    Returns:
        A tensor like ``x``.

    Raises:
        Nothing of its own.

    Source:
        Parikh, Boyd, "Proximal algorithms", 2014, section 6.5.

    Example:
        >>> import torch, funcopt as fo
        >>> fo.projections.l2_ball(torch.tensor([3.0, 4.0]))
        tensor([0.6000, 0.8000])
    """
    return x * (radius / root((x * x).sum())).clamp(max=1.0)


def simplex(x: Tensor, total: Number = 1.0) -> Tensor:
    r"""The nearest tensor of elements ≥ 0 that sum to ``total``.

    .. math:: \max(x - \theta, 0), \qquad \theta \text{ such that the sum is total}

    Args:
        x: a tensor.
        total: > 0.

    Returns:
        A tensor like ``x``.

    Raises:
        Nothing of its own.

    Source:
        Duchi, Shalev-Shwartz, Singer, Chandra, "Efficient projections onto the l1-ball
        for learning in high dimensions", 2008, figure 1.

    Example:
        >>> import torch, funcopt as fo
        >>> fo.projections.simplex(torch.tensor([0.5, 1.0, -3.0]))
        tensor([0.2500, 0.7500, 0.0000])
    """
    flat = x.flatten()
    if not flat.numel():
        return x
    ordered = flat.sort(descending=True).values
    rank = torch.arange(1, flat.numel() + 1, dtype=x.dtype, device=x.device)
    theta = (ordered.cumsum(0) - total) / rank
    last = (ordered > theta).sum() - 1  # as a gather, which vmap follows
    return (x - theta.gather(0, last.clamp(min=0).reshape(1))).clamp(min=0.0)


def l1_ball(x: Tensor, radius: Number = 1.0) -> Tensor:
    r"""The nearest tensor whose elements' absolute values sum to at most the radius.

    .. math::
        x \text{ where } \lVert x \rVert_1 \le \text{radius, else }
        \operatorname{sign}(x) \cdot \text{simplex}(|x|, \text{radius})

    Args:
        x: a tensor.
        radius: > 0.

    Returns:
        A tensor like ``x``.

    Raises:
        Nothing of its own.

    Source:
        Duchi, Shalev-Shwartz, Singer, Chandra, 2008, section 4.

    Example:
        >>> import torch, funcopt as fo
        >>> fo.projections.l1_ball(torch.tensor([2.0, -1.0, 0.5]))
        tensor([1., -0., 0.])
    """
    inside = x.abs().sum() <= radius
    return torch.where(inside, x, x.sign() * simplex(x.abs(), radius))


#: of each that is one: whether it is elementwise, or else has sums over the leaf alone
KINDS: dict[Any, tuple[bool, bool]] = {
    non_negative: (True, False),
    box: (True, False),
    l2_ball: (False, True),
}
