"""Constraints with inverses: any number stands for one that is allowed."""

from collections.abc import Callable
from dataclasses import dataclass
from math import log
from typing import Any, final

import torch

from funcopt.errors import (
    HyperparameterError,
    LeafError,
    StructureError,
)
from funcopt.execution import concrete
from funcopt.types import Tensor


@final
@dataclass(frozen=True)
class Constraint:
    """A smooth map from all numbers onto those that are allowed, and its inverse.

    Those of tensors are made by `exp`, `softplus`, `sigmoid`, `one_minus_exp`, `box` and
    `simplex`, those of trees by `constrained`.

    Args:
        name: what it is called.
        forward: the map.
        back: its inverse.

    Raises:
        Whatever its functions raise.

    Source:
        funcopt.

    Example:
        >>> import torch, funcopt as fo
        >>> negative = fo.meta.Constraint(
        ...     "negative", lambda x: -x.exp(), lambda y: (-y).log())
        >>> negative(negative.inverse(torch.tensor(-2.0)))
        tensor(-2.)
    """

    name: str
    forward: Callable[[Any], Any]
    back: Callable[[Any], Any]

    def __call__(self, x: Any) -> Any:
        """What the unconstrained ``x`` stands for."""
        return self.forward(x)

    def inverse(self, y: Any) -> Any:
        """The unconstrained value that stands for ``y``."""
        return self.back(y)

    def __repr__(self) -> str:
        return self.name


def exp() -> Constraint:
    r"""Positive numbers, by their logarithm: steps are relative ones (a learning rate).

    .. math:: y = e^x, \qquad x = \log y

    Returns:
        A constraint; where y would overflow (x > 88.7 in float32) it is constant.

    Raises:
        HyperparameterError: by ``inverse``, for a number not positive, or infinite.

    Source:
        Bengio, "Gradient-based optimization of hyperparameters", 2000.

    Example:
        >>> import torch, funcopt as fo
        >>> lr = fo.meta.exp()
        >>> x = lr.inverse(torch.tensor(0.1))
        >>> x, lr(x)
        (tensor(-2.3026), tensor(0.1000))
    """

    return _of_tensors(
        "exp", lambda x: _below(x).exp(), lambda y: _inside("exp", y, y > 0).log()
    )


def softplus() -> Constraint:
    r"""Positive numbers, where large ones move by plain steps (eps, a penalty's weight).

    .. math:: y = \log(1 + e^x), \qquad x = y + \log(1 - e^{-y})

    Returns:
        A constraint.

    Raises:
        HyperparameterError: by ``inverse``, for a number not positive, or infinite.

    Source:
        Dugas, Bengio, Bélisle, Nadeau, Garcia, "Incorporating second-order functional
        knowledge for better option pricing", 2001.

    Example:
        >>> import torch, funcopt as fo
        >>> weight = fo.meta.softplus()
        >>> x = weight.inverse(torch.tensor([0.1, 30.0]))
        >>> x, weight(x)
        (tensor([-2.2522, 30.0000]), tensor([ 0.1000, 30.0000]))
    """

    def back(y: Tensor) -> Tensor:
        y = _inside("softplus", y, y > 0)
        return y + (-torch.expm1(-y)).log()

    def forward(x: Tensor) -> Tensor:
        # torch's own is linear from 20 on, where it is not the inverse's inverse; and
        # its logaddexp has no second derivative far below.
        above = x > 0
        small = torch.where(above, -x, x).exp().log1p()
        return torch.where(above, x, 0.0) + small

    return _of_tensors("softplus", forward, back)


def sigmoid() -> Constraint:
    r"""Numbers between 0 and 1 (momentum, a mixture's weight).

    .. math:: y = \frac{1}{1 + e^{-x}}, \qquad x = \log y - \log(1 - y)

    Returns:
        A constraint.

    Raises:
        HyperparameterError: by ``inverse``, for a number that is not in (0, 1).

    Source:
        The logistic function: Verhulst, 1838.

    Example:
        >>> import torch, funcopt as fo
        >>> momentum = fo.meta.sigmoid()
        >>> x = momentum.inverse(torch.tensor(0.9))
        >>> x, momentum(x)
        (tensor(2.1972), tensor(0.9000))
    """
    return box(0.0, 1.0)


def one_minus_exp() -> Constraint:
    r"""Numbers below 1, by the logarithm of what is missing (the betas of Adam).

    .. math:: y = 1 - e^x, \qquad x = \log(1 - y)

    A step of x changes the length 1/(1 − β) of an average's memory by a factor, as with
    0.9, 0.99, 0.999. Above x = 0 there is y < 0: `sigmoid` keeps out of it.

    Returns:
        A constraint; where y would overflow (x > 88.7 in float32) it is constant. Far
        down (x < -17) y is 1, rounded, which ``inverse`` refuses.

    Raises:
        HyperparameterError: by ``inverse``, for a number not below 1, or infinite.

    Source:
        Metz, Maheswaranathan, Sun, Freeman, Poole, Sohl-Dickstein, "Using a thousand
        optimization tasks to learn hyperparameter search strategies", 2020.

    Example:
        >>> import torch, funcopt as fo
        >>> beta = fo.meta.one_minus_exp()
        >>> x = beta.inverse(torch.tensor([0.9, 0.999]))
        >>> x, beta(x)
        (tensor([-2.3026, -6.9078]), tensor([0.9000, 0.9990]))
    """
    return _of_tensors(
        "one_minus_exp",
        lambda x: -torch.expm1(_below(x)),
        lambda y: torch.log1p(-_inside("one_minus_exp", y, y < 1)),
    )


def box(low: float, high: float) -> Constraint:
    r"""Numbers between two bounds, neither of which is reached.

    .. math:: y = \text{low} + (\text{high} - \text{low}) \, \sigma(x), \qquad
        x = \log(y - \text{low}) - \log(\text{high} - y)

    `projections.box` is the hard one: it clips, and has no derivative outside.

    Args:
        low: the lower bound.
        high: the upper bound, > ``low``.

    Returns:
        A constraint; far out (x > 17 in float32) y is a bound, rounded, which ``inverse``
        refuses.

    Raises:
        HyperparameterError: not low < high, both finite; by ``inverse``, for a number
            that is not between them.

    Source:
        Stan's reference manual, "Lower and upper bounded scalar" (2012).

    Example:
        >>> import torch, funcopt as fo
        >>> decay = fo.meta.box(0.0, 0.5)
        >>> x = decay.inverse(torch.tensor(0.1))
        >>> x, decay(x)
        (tensor(-1.3863), tensor(0.1000))
    """
    if not -float("inf") < low < high < float("inf"):
        raise HyperparameterError(f"a box needs low < high, got {low} and {high}")
    name = "sigmoid" if (low, high) == (0.0, 1.0) else f"box({low}, {high})"

    def back(y: Tensor) -> Tensor:
        y = _inside(name, y, (y > low) & (y < high))
        return (y - low).log() - (high - y).log()

    def forward(x: Tensor) -> Tensor:
        # From the nearer bound, of which no digits are lost so.
        up, down = (high - low) * x.sigmoid(), (high - low) * (-x).sigmoid()
        return torch.where(x < 0, low + up, high - down)

    return _of_tensors(name, forward, back)


def simplex() -> Constraint:
    r"""Positive numbers whose sum along the last axis is 1 (a mixture of data).

    .. math:: y = \operatorname{softmax}(x), \qquad x = \log y - \operatorname{mean}\log y

    A shift of x changes nothing: the inverse has mean 0. `projections.simplex` is the
    hard one, which gives zeros.

    Returns:
        A constraint, of tensors with one axis at least.

    Raises:
        StructureError: a 0-d tensor, of which softmax makes 1.
        HyperparameterError: by ``inverse``, for a number not positive, or infinite.

    Source:
        Bridle, "Probabilistic interpretation of feedforward classification network
        outputs", 1990.

    Example:
        >>> import torch, funcopt as fo
        >>> mixture = fo.meta.simplex()
        >>> x = mixture.inverse(torch.tensor([0.2, 0.3, 0.5]))
        >>> x, mixture(x)
        (tensor([-0.4406, -0.0351,  0.4757]), tensor([0.2000, 0.3000, 0.5000]))
    """

    def row(x: Tensor) -> Tensor:
        if not x.ndim:
            raise StructureError("simplex takes tensors with an axis, got a 0-d one")
        return x

    def back(y: Tensor) -> Tensor:
        x = _inside("simplex", row(y), y > 0).log()
        return x - x.mean(-1, keepdim=True)

    def forward(x: Tensor) -> Tensor:
        return row(x).softmax(-1)

    return _of_tensors("simplex", forward, back)


def _of_tensors(
    name: str, forward: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]
) -> Constraint:
    def checked(x: Any) -> Tensor:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise LeafError(f"{name} takes floating-point tensors, not {kind}")
        return x

    return Constraint(name, lambda x: forward(checked(x)), lambda y: back(checked(y)))


def _below(x: Tensor) -> Tensor:
    """What has an exponential: derivatives are to be finite at any number."""
    kind = torch.finfo(x.dtype)
    return x.clamp(max=log(kind.max) * (1 - kind.eps))  # to the last number, rounded


def _inside(name: str, y: Tensor, allowed: Tensor) -> Tensor:
    """``y``; raises where a value that can be seen is not allowed."""
    seen = concrete.peek(allowed & y.isfinite())
    if seen is not None and not bool(seen.all()):
        worst = concrete.peek(y)
        given = "" if worst is None else f": {worst[~seen].flatten()[0].item():g}"
        raise HyperparameterError(
            f"{name}.inverse got a value that {name} cannot give{given}"
        )
    return y
