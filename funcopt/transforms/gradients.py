"""Gradient stages that change what a gradient says, whatever its size."""

from math import inf
from typing import Any

import torch

from funcopt.hyper import Hyper
from funcopt.optimizers._parts import Number, coupled_decay, sqrt
from funcopt.spec import Spec
from funcopt.transforms.stage import GradientStage
from funcopt.types import HyperValue, Tensor


def _zero_nans(g: Tensor, p: Tensor, *, step: Any) -> tuple[Tensor, ...]:
    return (torch.where(g == g, g, 0.0),)


def zero_nans() -> GradientStage:
    r"""Put 0 for every element of a gradient that is not a number.

    .. math:: g' = 0 \text{ where } g \text{ is NaN, else } g

    Infinities stay; `skip_nonfinite` leaves out the whole step for either.

    Returns:
        A gradient stage for `chain`; no state.

    Raises:
        Nothing of its own.

    Source:
        optax's ``zero_nans`` (DeepMind, 2020).

    Example:
        >>> import torch, funcopt as fo
        >>> opt = fo.chain(fo.zero_nans(), fo.sgd(lr=1.0))
        >>> p = torch.zeros(2)
        >>> opt.update(torch.tensor([float("nan"), 1.0]), opt.init(p), p)[0]
        tensor([ 0., -1.])
    """
    return GradientStage(Spec(_zero_nans, "zero_nans", slots={}, hyper={}, sparse="rows"))


def _centralize(g: Tensor, p: Tensor, *, step: Any) -> tuple[Tensor, ...]:
    if g.ndim < 2:
        return (g,)
    return (g - g.mean(tuple(range(1, g.ndim)), keepdim=True),)


def centralize() -> GradientStage:
    r"""Take from each output's weights the mean of their gradient.

    .. math:: g'_{i\cdot} = g_{i\cdot} - \operatorname{mean}_j(g_{ij})

    For a leaf of two axes or more the mean is over all but the first; others stay.

    Returns:
        A gradient stage for `chain`; no state. The rule it becomes part of needs each
        leaf whole.

    Raises:
        Nothing of its own.

    Source:
        Yong, Huang, Hua, Zhang, "Gradient centralization: a new optimization technique
        for deep neural networks", 2020, equation 1.

    Example:
        >>> import torch, funcopt as fo
        >>> opt = fo.chain(fo.centralize(), fo.sgd(lr=1.0))
        >>> p = torch.zeros(1, 2)
        >>> opt.update(torch.tensor([[1.0, 3.0]]), opt.init(p), p)[0]
        tensor([[ 1., -1.]])
    """
    return GradientStage(
        Spec(_centralize, "centralize", slots={}, hyper={}, elementwise=False)
    )


def _add_noise(
    g: Tensor, p: Tensor, *, step: Any, eta: Number, gamma: Number, noise: Number
) -> tuple[Tensor, ...]:
    return (g + sqrt(eta / step**gamma) * noise,)


def add_noise(
    eta: HyperValue, gamma: HyperValue = 0.55, noise: HyperValue | None = None
) -> GradientStage:
    r"""Add normal noise that fades from step to step; the noise is data.

    .. math:: g' = g + \sqrt{\text{eta} / t^\text{gamma}} \;\, \text{noise}_t

    Args:
        eta: the variance in the first step, ≥ 0.
        gamma: how fast it fades, ≥ 0.
        noise: standard normals, a tree like the parameters that each ``update`` is given
            (`normal_like` draws it), unless set here.

    Returns:
        A gradient stage for `chain`; no state.

    Raises:
        HyperparameterError: a number out of its range; by ``update``, no noise.

    Source:
        Neelakantan, Vilnis, Le, Sutskever, Kaiser, Kurach, Martens, "Adding gradient
        noise improves learning for very deep networks", 2015, section 3.

    Example:
        >>> import torch, funcopt as fo
        >>> opt = fo.chain(fo.add_noise(eta=0.01), fo.sgd(lr=1.0))
        >>> p, generator = torch.zeros(2), torch.Generator().manual_seed(0)
        >>> noise = fo.normal_like(p, generator)
        >>> opt.update(torch.ones(2), opt.init(p), p, noise=noise)[0]
        tensor([-1.1541, -0.9707])
    """
    hyper = {
        "eta": Hyper(eta),
        "gamma": Hyper(gamma),
        "noise": Hyper(
            noise, low=-inf, wanted="as fo.normal_like(params, generator) draws it"
        ),
    }
    return GradientStage(Spec(_add_noise, "add_noise", slots={}, hyper=hyper))


def _add_decayed_weights(
    g: Tensor, p: Tensor, *, step: Any, weight_decay: Number
) -> tuple[Tensor, ...]:
    return (coupled_decay(g, p, weight_decay),)


def add_decayed_weights(weight_decay: HyperValue) -> GradientStage:
    r"""Add the gradient of an L2 penalty.

    .. math:: g' = g + \text{weight\_decay} \cdot p

    Args:
        weight_decay: factor of the penalty, ≥ 0.

    Returns:
        A gradient stage for `chain`; no state. Its place tells whether the penalty is
        clipped with the rest.

    Raises:
        HyperparameterError: a number out of its range.

    Source:
        optax's ``add_decayed_weights`` (DeepMind, 2020).

    Example:
        >>> import torch, funcopt as fo
        >>> opt = fo.chain(fo.add_decayed_weights(0.5), fo.sgd(lr=1.0))
        >>> p = torch.ones(2)
        >>> opt.update(torch.zeros(2), opt.init(p), p)[0]
        tensor([0.5000, 0.5000])
    """
    hyper = {"weight_decay": Hyper(weight_decay)}
    return GradientStage(
        Spec(_add_decayed_weights, "add_decayed_weights", slots={}, hyper=hyper)
    )
