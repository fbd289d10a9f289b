"""Gradient stages that bound the size of gradients."""

from typing import Any

import torch

from funcopt.hyper import Hyper
from funcopt.optimizers._parts import Number, count, root
from funcopt.spec import Spec
from funcopt.transforms.stage import GradientStage
from funcopt.types import HyperValue, Tensor


def _clip_by_global_norm(
    g: Tensor, p: Tensor, *, step: Any, max_norm: Number, eps: Number, norm_sq: Tensor
) -> tuple[Tensor, ...]:
    scale = max_norm / (root(norm_sq) + eps)
    return (g * scale.clamp(max=1.0),)


def clip_by_global_norm(max_norm: HyperValue, eps: HyperValue = 1e-6) -> GradientStage:
    r"""Scale all gradients alike where their common norm is too large.

    .. math::
        n = \sqrt{\textstyle\sum_\text{leaves} \lVert g \rVert_2^2}, \qquad
        g' = \min\left(1, \frac{\text{max\_norm}}{n + \text{eps}}\right) g

    The numbers are those of ``torch.nn.utils.clip_grad_norm_``. The norm costs one read
    of the gradients; the scaling is done by the kernel that makes the step.

    Args:
        max_norm: the largest norm that is left, ≥ 0.
        eps: added to the norm, ≥ 0.

    Returns:
        A gradient stage for `chain`; no state.

    Raises:
        HyperparameterError: a number out of its range.

    Note:
        The derivative runs through the norm, too. At zero gradients it is that of g' = g.

    Source:
        Pascanu, Mikolov, Bengio, "On the difficulty of training recurrent neural
        networks", 2013, algorithm 1.

    Example:
        >>> import torch, funcopt as fo
        >>> opt = fo.chain(fo.clip_by_global_norm(5.0), fo.sgd(lr=1.0))
        >>> params = {"a": torch.zeros(1), "b": torch.zeros(1)}
        >>> grads = {"a": torch.tensor([6.0]), "b": torch.tensor([8.0])}
        >>> opt.update(grads, opt.init(params), params)[0]
        {'a': tensor([-3.0000]), 'b': tensor([-4.0000])}
    """
    return GradientStage(
        Spec(
            _clip_by_global_norm,
            "clip_by_global_norm",
            slots={},
            hyper={"max_norm": Hyper(max_norm), "eps": Hyper(eps)},
            totals=[{"norm_sq": _squares}],
            sparse="rows",
        )
    )


def _clip_by_value(
    g: Tensor, p: Tensor, *, step: Any, max_value: Number
) -> tuple[Tensor, ...]:
    return (g.clamp(-max_value, max_value),)


def clip_by_value(max_value: HyperValue) -> GradientStage:
    r"""Clamp every element of a gradient to [-max_value, max_value].

    .. math:: g' = \max(-\text{max\_value}, \min(\text{max\_value}, g))

    Args:
        max_value: ≥ 0.

    Returns:
        A gradient stage for `chain`; no state.

    Raises:
        HyperparameterError: a number out of its range.

    Source:
        ``torch.nn.utils.clip_grad_value_``.

    Example:
        >>> import torch, funcopt as fo
        >>> opt = fo.chain(fo.clip_by_value(0.5), fo.sgd(lr=1.0))
        >>> p = torch.zeros(2)
        >>> opt.update(torch.tensor([3.0, -0.25]), opt.init(p), p)[0]
        tensor([-0.5000,  0.2500])
    """
    hyper = {"max_value": Hyper(max_value)}
    return GradientStage(
        Spec(_clip_by_value, "clip_by_value", slots={}, hyper=hyper, sparse="rows")
    )


def _clip_by_block_rms(
    g: Tensor, p: Tensor, *, step: Any, threshold: Number
) -> tuple[Tensor, ...]:
    rms = root((g * g).sum() / count(g))
    return (g / (rms / threshold).clamp(min=1.0),)


def clip_by_block_rms(threshold: HyperValue) -> GradientStage:
    r"""Scale each leaf's gradient where its root mean square is too large.

    .. math::
        r = \sqrt{\operatorname{mean}(g^2)}, \qquad
        g' = g / \max(1, r / \text{threshold})

    Args:
        threshold: the largest root mean square that is left, > 0.

    Returns:
        A gradient stage for `chain`; no state.

    Raises:
        HyperparameterError: a number out of its range.

    Source:
        Shazeer, Stern, "Adafactor: adaptive learning rates with sublinear memory cost",
        2018, section 6.

    Example:
        >>> import torch, funcopt as fo
        >>> opt = fo.chain(fo.clip_by_block_rms(1.0), fo.sgd(lr=1.0))
        >>> p = torch.zeros(2)
        >>> opt.update(torch.tensor([3.0, 3.0]), opt.init(p), p)[0]
        tensor([-1., -1.])
    """
    hyper = {"threshold": Hyper(threshold, over=True)}
    spec = Spec(
        _clip_by_block_rms, "clip_by_block_rms", {}, hyper, elementwise=False, norms=True
    )
    return GradientStage(spec)


def _normalize(g: Tensor, p: Tensor, *, step: Any, norm_sq: Tensor) -> tuple[Tensor, ...]:
    # Not g / root: what stands for √0 in float64 is nothing in float32.
    return (g * torch.where(norm_sq > 0, 1 / root(norm_sq), 0.0),)


def normalize() -> GradientStage:
    r"""Divide all gradients by their common norm; zeros stay zeros.

    .. math:: g' = g / \sqrt{\textstyle\sum_\text{leaves} \lVert g \rVert_2^2}

    Returns:
        A gradient stage for `chain`; no state.

    Raises:
        Nothing of its own.

    Source:
        Hazan, Levy, Shalev-Shwartz, "Beyond convexity: stochastic quasi-convex
        optimization", 2015, algorithm 1.

    Example:
        >>> import torch, funcopt as fo
        >>> opt = fo.chain(fo.normalize(), fo.sgd(lr=1.0))
        >>> p = torch.zeros(2)
        >>> opt.update(torch.tensor([3.0, 4.0]), opt.init(p), p)[0]
        tensor([-0.6000, -0.8000])
    """
    totals = [{"norm_sq": _squares}]
    return GradientStage(
        Spec(_normalize, "normalize", slots={}, hyper={}, totals=totals, sparse="rows")
    )


def _squares(g: Tensor, p: Tensor, *, step: Any, **hyper: Any) -> Tensor:
    return (g * g).sum()
