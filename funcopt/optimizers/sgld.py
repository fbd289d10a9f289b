"""SGLD: descent with noise, whose iterates are samples."""

from functools import partial
from math import inf
from typing import Any

from funcopt.hyper import Hyper
from funcopt.optimizer import Optimizer, elementwise
from funcopt.optimizers._parts import Number, coupled_decay, sqrt
from funcopt.types import HyperValue, Tensor


def rule(
    g: Tensor,
    p: Tensor,
    *,
    step: Any,
    lr: Number,
    temperature: Number,
    weight_decay: Number,
    noise: Number,
    maximize: bool,
) -> tuple[Tensor, ...]:
    del step  # a chain has no memory
    g = coupled_decay(-g if maximize else g, p, weight_decay)
    variance = 2 * lr * temperature
    return (p - lr * g + sqrt(variance) * noise,)


def sgld(
    lr: HyperValue = 1e-3,
    temperature: HyperValue = 1.0,
    weight_decay: HyperValue = 0.0,
    noise: HyperValue | None = None,
    *,
    maximize: bool = False,
) -> Optimizer:
    r"""Stochastic gradient Langevin dynamics; the noise is data.

    .. math::
        g_t &= \nabla f(p_{t-1}) + \text{weight\_decay} \cdot p_{t-1} \\
        p_t &= p_{t-1} - \text{lr} \cdot g_t
            + \sqrt{2 \cdot \text{lr} \cdot \text{temperature}} \;\, \text{noise}_t

    Args:
        lr: step size, ≥ 0; half the paper's ε.
        temperature: T, ≥ 0: the samples' density goes to exp(-f/T) as lr goes to 0. For
            a posterior, f is its negative logarithm with T = 1, or the mean loss over N
            data with T = 1/N.
        weight_decay: the precision of a normal prior around 0, ≥ 0, in the units of f.
        noise: standard normals, a tree like the parameters that each ``update`` is given
            (`normal_like` draws it), unless set here. `unroll` takes those of K steps,
            each [K, ...]: ``hyper={"noise": per_step(noise)}``.
        maximize: f is what ascends: the density goes to exp(f/T).

    Returns:
        An `Optimizer`; state ``step`` alone.

    Raises:
        HyperparameterError: a number out of its range; by ``update``, no noise.

    Note:
        With the noise as an argument a step is pure: it repeats, has a derivative by
        ``temperature``, and runs under vmap. Where lr or temperature is 0 there is no
        noise, and the derivative of its size is taken as 0.

    Source:
        Welling, Teh, "Bayesian learning via stochastic gradient Langevin dynamics",
        2011, equation 4.

    Example:
        >>> import torch, funcopt as fo
        >>> opt = fo.sgld(lr=0.1, temperature=0.01)
        >>> p, generator = torch.tensor([1.0, -0.2]), torch.Generator().manual_seed(0)
        >>> state = opt.init(p)
        >>> for _ in range(5):
        ...     noise = fo.normal_like(p, generator)
        ...     p, state = opt.update(2 * p, state, p, noise=noise)  # the gradient of p²
        >>> p
        tensor([ 0.2572, -0.0860])
    """
    return elementwise(
        partial(rule, maximize=maximize),
        name="sgld",
        slots={},
        hyper={
            "lr": Hyper(lr),
            "temperature": Hyper(temperature),
            "weight_decay": Hyper(weight_decay),
            "noise": Hyper(
                noise, low=-inf, wanted="as fo.normal_like(params, generator) draws it"
            ),
        },
    )
