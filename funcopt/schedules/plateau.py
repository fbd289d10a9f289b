"""A value that falls when a metric stops getting better: state in, state out."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch

from funcopt.errors import HyperparameterError, HyperparameterTypeError
from funcopt.schedules._parts import Number, number, one_of, where, whole
from funcopt.types import State, Tensor


class Plateau(NamedTuple):
    """A value that follows a metric, as two pure functions: see `reduce_on_plateau`."""

    init: Callable[[], State]  #: ``init() -> state``, which holds the first value
    update: Callable[..., tuple[Tensor, State]]  #: ``(metric, state) -> (value, state)``


def reduce_on_plateau(
    value: Number,
    mode: Literal["min", "max"] = "min",
    factor: Number = 0.1,
    patience: int = 10,
    threshold: float = 1e-4,
    threshold_mode: Literal["rel", "abs"] = "rel",
    cooldown: int = 0,
    min_lr: Number = 0.0,
    eps: float = 1e-8,
) -> Plateau:
    r"""A value that is multiplied by a factor when a metric has stopped getting better.

    It depends on what was measured and not on the count alone, so it is no `Schedule` but
    two functions: call ``update`` where the metric is known (after an epoch), and give
    the value to ``opt.update``. After ``patience`` + 1 metrics in a row that were not
    better than the best,

    .. math::
        v \leftarrow \max(\text{factor} \cdot v, \text{min\_lr})

    unless that would change it by ``eps`` or less.

    Args:
        value: the first value, ≥ 0.
        mode: whether a smaller metric is better ("min") or a larger one ("max").
        factor: what the value is multiplied by, in [0, 1).
        patience: the metrics in a row, not better than the best, that are borne, ≥ 0.
        threshold: by how much a metric has to be better to count, ≥ 0.
        threshold_mode: as a share of the best ("rel"), or as it is ("abs").
        cooldown: the metrics after a fall that are not counted, ≥ 0.
        min_lr: the least value, ≥ 0.
        eps: the largest change that is left out, ≥ 0.

    Returns:
        A `Plateau`: ``init() -> state`` and ``update(metric, state) -> (value, state)``,
        with 0-d tensors ``value, best, cooldown_counter, num_bad_epochs``. Both are pure
        and branch on no tensor, so they work under vmap and ``torch.compile``; the value
        has derivatives with respect to ``value``, ``factor`` and ``min_lr``, none with
        respect to the metric.

    Raises:
        HyperparameterError, HyperparameterTypeError: a number out of its range, or none;
            by ``update``, for a metric that is no number.

    Source:
        ``torch.optim.lr_scheduler.ReduceLROnPlateau``.

    Example:
        >>> import torch, funcopt as fo
        >>> plateau = fo.schedules.reduce_on_plateau(0.4, factor=0.5, patience=1)
        >>> state, values = plateau.init(), []
        >>> for metric in (3.0, 2.0, 2.0, 2.0, 2.0):
        ...     lr, state = plateau.update(metric, state)
        ...     values.append(lr.item())
        >>> values
        [0.4, 0.4, 0.4, 0.2, 0.2]
    """
    factor = number("factor", factor, most=1.0)
    if isinstance(factor, float) and factor == 1:
        raise HyperparameterError("factor must be below 1, got 1")
    its = _Follower(
        value=number("value", value),
        sign=1 if one_of("mode", mode, ("min", "max")) == "min" else -1,
        factor=factor,
        patience=whole("patience", patience, low=0),
        threshold=number("threshold", threshold),
        relative=one_of("threshold_mode", threshold_mode, ("rel", "abs")) == "rel",
        cooldown=whole("cooldown", cooldown, low=0),
        min_lr=number("min_lr", min_lr),
        eps=number("eps", eps),
    )
    return Plateau(its.init, its.update)


@dataclass(frozen=True, eq=False)
class _Follower:
    """The functions of a `Plateau`."""

    value: Number
    sign: int  #: 1 where a smaller metric is better, else -1
    factor: Number
    patience: int
    threshold: float
    relative: bool
    cooldown: int
    min_lr: Number
    eps: float

    def init(self) -> State:
        # A copy: what its owner writes into a tensor is not this state's affair.
        first = torch.as_tensor(self.value, dtype=torch.float64).clone()
        zero = torch.zeros((), dtype=torch.int64, device=first.device)
        return {
            "value": first,
            "best": torch.full_like(first.detach(), self.sign * math.inf),
            "cooldown_counter": zero,
            "num_bad_epochs": zero.clone(),
        }

    def update(self, metric: Any, state: State) -> tuple[Tensor, State]:
        old, best, waiting, bad = (state[key] for key in _KEYS)
        metric = _measured(metric, best)
        margin = self.sign * self.threshold
        wanted = best * (1 - margin) if self.relative else best - margin
        better = metric < wanted if self.sign > 0 else metric > wanted
        bad = torch.where(better | (waiting > 0), 0, bad + 1)
        waiting = (waiting - 1).clamp(min=0)
        falls = bad > self.patience
        smaller = old * self.factor
        smaller = where(smaller > self.min_lr, smaller, self.min_lr)
        new = torch.where(falls & (old - smaller > self.eps), smaller, old)
        return new, {
            "value": new,
            "best": torch.where(better, metric, best),
            "cooldown_counter": torch.where(falls, self.cooldown, waiting),
            "num_bad_epochs": torch.where(falls, 0, bad),
        }


_KEYS = ("value", "best", "cooldown_counter", "num_bad_epochs")


def _measured(metric: Any, like: Tensor) -> Tensor:
    """The metric as a float64 number without a gradient: it only is compared."""
    try:
        found = torch.as_tensor(metric, dtype=torch.float64, device=like.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise HyperparameterTypeError(f"a metric is a number, not {metric!r}") from error
    if found.ndim:
        raise HyperparameterTypeError(
            f"a metric is one number, not a tensor of shape {tuple(found.shape)}"
        )
    return found.detach()
