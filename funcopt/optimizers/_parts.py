"""Formulas that several rules share: averages, decay, steps, roots with a derivative."""

import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from numbers import Real
from typing import Any

import torch

from funcopt import tree
from funcopt.errors import HyperparameterError
from funcopt.execution import donation
from funcopt.hyper import Hyper
from funcopt.types import HyperValue, SlotStart, Tensor

Number = Any  # float, 0-d float64 tensor, or a tensor that broadcasts to the leaf


def average(mean: Tensor, value: Tensor, beta: Number, **out: Any) -> Tensor:
    """The exponential moving average β·mean + (1 - β)·value."""
    return towards(mean, value, 1 - beta, **out)


def average_of_squares(mean: Tensor, x: Tensor, beta: Number) -> Tensor:
    """The exponential moving average β·mean + (1 - β)·x².

    With torch.optim's rounding, and as far as torch.optim goes: x² itself may overflow.
    """
    weight = 1 - beta
    if isinstance(weight, Tensor):
        return torch.addcmul(beta * mean, weight * x, x)
    return torch.addcmul(beta * mean, x, x, value=weight)  # an op less


def towards(start: Tensor, end: Tensor, weight: Number, **out: Any) -> Tensor:
    """start + weight·(end - start), and exactly ``end`` where the weight is 1."""
    if isinstance(weight, Tensor):
        weight = weight.to(start.dtype)  # lerp promotes no dtypes
    # torch.optim's rounding, and one op for three
    return torch.lerp(start, end, weight, **out)


def coupled_decay(g: Tensor, p: Tensor, weight_decay: Number) -> Tensor:
    """The gradient with the L2 penalty's added: g + λ·p."""
    return g if is_zero(weight_decay) else g + weight_decay * p


def decoupled_decay(p: Tensor, lr: Number, weight_decay: Number, **out: Any) -> Tensor:
    """The parameter shrunk past the gradient: (1 - γλ)·p (Loshchilov, Hutter, 2019)."""
    return p if is_zero(weight_decay) else torch.mul(p, 1 - lr * weight_decay, **out)


def decayed(
    g: Tensor, p: Tensor, lr: Number, weight_decay: Number, decoupled: bool
) -> tuple[Tensor, Tensor]:
    """Gradient and parameter, one of them with the decay in it."""
    if decoupled:
        return g, decoupled_decay(p, lr, weight_decay)
    return coupled_decay(g, p, weight_decay), p


def adam_step(
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Any,
    lr: Number,
    beta1: Number,
    beta2: Number,
    eps: Number,
) -> Tensor:
    """γ·m̂/(√v̂ + ε), with m̂ = m/(1 - β₁ᵗ) and v̂ = v/(1 - β₂ᵗ) (Kingma, Ba, 2015)."""
    # Both corrections in the scalars, which costs no division of a leaf's elements
    # (the end of their section 2, with an eps that makes it the same step).
    correction = (1 - beta2**step) ** 0.5
    step_size = lr * correction / (1 - beta1**step)
    return step_size * (exp_avg / (root(exp_avg_sq) + eps * correction))


def schedule_free_step(
    g: Tensor,
    y: Tensor,
    z: Tensor,
    weight_sum: Number,
    lr_max: Number,
    *,
    step: Any,
    lr: Number,
    beta: Number,
    warmup_steps: Number,
    r: Number,
    weight_lr_power: Number,
) -> tuple[Any, ...]:
    """y, z, weight_sum and lr_max, after a step by g (Defazio et al., 2024).

    y lies between z, which steps, and x, the weighted average of all z so far: it moves
    as x does without x being kept.
    """
    lr = lr * (step / where(step < warmup_steps, warmup_steps, step))
    lr_max = where(lr > lr_max, lr, lr_max)
    largest = where(lr_max > 0, lr_max, sys.float_info.min)  # whose power has a slope
    weight = step**r * largest**weight_lr_power
    weight_sum = weight_sum + weight
    some = weight_sum > 0
    share = where(some, weight / where(some, weight_sum, 1.0), 0.0)
    # Not by lerp, whose derivative would round 1 - share as the leaf is.
    y = y + share * (z - y) + lr * (beta * (1 - share) - 1) * g
    return y, z - lr * g, weight_sum, lr_max


def schedule_free_average(y: Tensor, z: Tensor, beta: Number) -> Tensor:
    """x, from y = βx + (1 - β)z; y itself at β = 0, where x left no trace in it."""
    some = beta > 0
    return towards(y, z, where(some, 1 - 1 / where(some, beta, 1.0), 0.0))


def root(x: Tensor) -> Tensor:
    """√x for a denominator √x + ε, with derivative 0 where x is 0.

    There torch's derivative is ∞, and with x = β·x + (1-β)·g² at g = 0 the chain rule
    makes ∞·0 = NaN of every meta-gradient. The root of the least normal number stands
    for √0: 1e-19 in float32, 1e-154 in float64. ε swallows it, so that √x + ε is
    bit-equal (down to ε = 1e-11 in float32).
    """
    return torch.sqrt(x.clamp(min=torch.finfo(x.dtype).tiny))


def spare(*given: Any) -> Callable[..., dict[str, Any]]:
    """``over``, by which a result takes the memory of a tensor that is needed no more.

    ``torch.exp(x, **over(x))`` writes over x where no derivative, transform or mode sees
    it (`donation.is_plain`): over a temporary always, over what was ``given`` to the rule
    only in a donated step; of several tensors, over the first that may be. New memory is
    a third of an operation's traffic where it lies in no cache; and the pages of large
    blocks, which the system hands out anew, take up to half of a step's time. For rules
    of whole leaves.
    """
    if not donation.is_plain():
        return _over_none
    return _over_first if donation.is_given() else partial(_over_temporary, given)


def _over_first(x: Tensor, *_: Tensor) -> dict[str, Any]:
    return {"out": x}


def _over_temporary(given: Sequence[Any], *tensors: Tensor) -> dict[str, Any]:
    for x in tensors:
        if not any(x is y for y in given):
            return {"out": x}
    return {}


def _over_none(*_: Tensor) -> dict[str, Any]:
    return {}


def minus(
    p: Tensor, move: Tensor, size: Number, over: Callable[..., dict[str, Any]]
) -> Tensor:
    """p - size·move, by what `spare` gave."""
    if isinstance(size, Tensor) and not size.ndim:
        size = known(size)
    if isinstance(size, Tensor):
        return torch.sub(p, torch.mul(move, size, **over(move)), **over(p, move))
    return torch.sub(p, move, alpha=size, **over(p, move))


def known(x: Tensor) -> Number:
    """A 0-d tensor in float64: Python's number, where that waits for no device.

    And loses no derivative. Arithmetic with it is the same, in a tenth of the time. For
    rules of whole leaves: a kernel is printed of what happens to tensors.
    """
    if donation.is_plain() and x.is_cpu:
        return x.item()
    return x.to(torch.float64)


def sqrt(x: Number) -> Number:
    """√x, with derivative 0 where x is 0."""
    some = x > 0
    positive = where(some, x, 1.0)
    is_tensor = isinstance(positive, Tensor)
    return where(some, torch.sqrt(positive) if is_tensor else positive**0.5, 0.0)


def length(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    """‖x‖ along axes, which are kept, with derivative 0 where it is 0."""
    if donation.is_plain():
        return torch.linalg.vector_norm(x, dim=axes, keepdim=True)
    return sqrt((x * x).sum(axes, keepdim=True))


def count(x: Tensor) -> Tensor:
    """How many elements a leaf has, as a sum that is traced with the rule."""
    return torch.ones_like(x).sum()


def norm(x: Tensor) -> tuple[Tensor, Tensor]:
    """‖x‖, a float64 number with 1 in place of 0, and whether it is not 0.

    The caller says what stands in its place: there torch's second derivative is NaN.
    Squares are added in float64, as kernels add them.
    """
    squares = (x * x).sum(dtype=torch.float64)
    there = squares > 0
    return torch.sqrt(where(there, squares, 1.0)), there


def where(condition: Any, a: Number, b: Number) -> Number:
    """``a`` where ``condition`` holds, else ``b``, both computed; one may be a float.

    The derivative of what is not chosen is multiplied by 0: it has to be finite. A
    condition on numbers alone is a bool, or a 0-d tensor where the step is one.
    """
    if isinstance(condition, bool):
        return a if condition else b
    if isinstance(a, float) and isinstance(b, float):  # torch would make it float32
        a = torch.scalar_tensor(a, dtype=torch.float64, device=condition.device)
    elif isinstance(a, Tensor) and isinstance(b, Tensor):
        # A number for each task is no 0-d tensor to vmap's type promotion.
        dtype = a.dtype if a.ndim else b.dtype
        a, b = a.to(dtype), b.to(dtype)
    return torch.where(condition, a, b)


def larger(a: Number, b: Number) -> Number:
    """The larger of two numbers of a leaf."""
    return where(a > b, a, b)


def between(x: Tensor, low: Number, high: Number) -> Tensor:
    """x within [low, high], with derivative 0 by x where it is not."""
    x = where(x < low, low, x)
    return where(x > high, high, x)


def log(x: Number) -> Number:
    """ln x for x ≥ 0, finite at 0 and with derivative 0 there."""
    if isinstance(x, Tensor):
        return torch.log(x.clamp(min=torch.finfo(x.dtype).tiny))
    return math.log(max(x, sys.float_info.min))


def exp(x: Number) -> Number:
    """eˣ."""
    return torch.exp(x) if isinstance(x, Tensor) else math.exp(x)


def is_zero(value: Number) -> bool:
    """Whether it is the float 0: a tensor's value is not looked at."""
    return isinstance(value, float) and value == 0


def zero_everywhere(value: HyperValue) -> bool:
    """Whether it is the number 0, also as a tree with 0 for every group."""
    return all(isinstance(v, Real) and v == 0 for v in tree.leaves(value))


def filled(name: str, value: float) -> SlotStart:
    """A slot that starts as one number ≥ 0, the argument ``name``, for all parameters."""
    first = {*tree.leaves(value)}  # of every group
    if len(first) != 1 or not isinstance(start := first.pop(), Real):
        raise HyperparameterError(
            f"{name} must be one number for all parameters, got {value!r}; use "
            "fo.partition with one optimizer for each"
        )
    Hyper(start).checked(name, start)
    return partial(_filled, **{name: float(start)})


def _filled(p: Tensor, **value: float) -> Tensor:
    return torch.full_like(p, *value.values())
