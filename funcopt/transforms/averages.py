"""Parameter stages that keep an average of the iterates beside them."""

from functools import partial
from typing import Any

import torch

from funcopt.checks import check_count
from funcopt.hyper import Hyper
from funcopt.optimizers._parts import Number, average, towards, where
from funcopt.spec import Spec
from funcopt.transforms.stage import ParameterStage
from funcopt.types import HyperValue, Tensor


def _ema(
    new: Tensor, old: Tensor, ema: Tensor, *, step: Any, decay: Number
) -> tuple[Tensor, ...]:
    return new, average(ema, new, decay)


def _weighted_ema(
    new: Tensor, old: Tensor, ema: Tensor, weight: Number, *, step: Any, decay: Number
) -> tuple[Any, ...]:
    return new, average(ema, new, decay), 1 - decay * (1 - weight)


def _debiased(
    p: Tensor, ema: Tensor, weight: Number, *, step: Any, decay: Number
) -> Tensor:
    some = weight > 0
    return where(some, ema / where(some, weight, 1.0), p)


def _average(p: Tensor, average: Tensor, *_: Any, **__: Any) -> Tensor:
    return average


def ema(decay: HyperValue, *, debias: bool = True) -> ParameterStage:
    r"""Keep an exponential moving average of the parameters.

    .. math::
        \text{ema}_t &= \text{decay} \cdot \text{ema}_{t-1} + (1 - \text{decay}) \, p_t \\
        \text{weight}_t &= \text{decay} \cdot \text{weight}_{t-1} + 1 - \text{decay} \\
        \hat p_t &= \text{ema}_t / \text{weight}_t

    Args:
        decay: in [0, 1); one number for each leaf where it is debiased.
        debias: start from nothing and divide by the weight of all iterates, of a decay
            that stays 1 - decayᵗ; else start from the first parameters.

    Returns:
        A parameter stage for `chain`; state ``ema``, of each parameter's shape and
        dtype, and if debiased ``ema_weight``, a number for each leaf. The parameters
        themselves are left as they are; ``eval_params`` gives the average.

    Raises:
        HyperparameterError: a number out of its range.

    Source:
        Tarvainen, Valpola, "Mean teachers are better role models", 2017; debiased as the
        moments of Kingma, Ba, "Adam", 2015, section 3.

    Example:
        >>> import torch, funcopt as fo
        >>> opt = fo.chain(fo.sgd(lr=1.0), fo.ema(0.5))
        >>> p, state = torch.zeros(1), opt.init(torch.zeros(1))
        >>> for _ in range(2):
        ...     p, state = opt.update(torch.ones(1), state, p)
        >>> p, opt.eval_params(state, p)        # (1/4 · -1 + 1/2 · -2) / (3/4)
        (tensor([-2.]), tensor([-1.6667]))
    """
    slots: dict[str, Any] = {"ema": torch.clone}
    if debias:
        slots = {"ema": torch.zeros_like, "ema_weight": 0.0}
    return ParameterStage(
        Spec(
            _weighted_ema if debias else _ema,
            "ema",
            slots,
            {"decay": Hyper(decay, below=1.0, scalar=(0,) if debias else ())},
            evaluated=_debiased if debias else _average,
        )
    )


def _polyak(
    new: Tensor, old: Tensor, mean: Tensor, *, step: Any, start: Number
) -> tuple[Tensor, ...]:
    since = step - start
    return new, towards(mean, new, 1 / where(since > 1, since, 1.0))


def polyak(start: HyperValue = 0.0) -> ParameterStage:
    r"""Keep the mean of the parameters since a step.

    .. math::
        \text{average}_t = \text{average}_{t-1}
            + \frac{p_t - \text{average}_{t-1}}{\max(1, t - \text{start})}

    Args:
        start: the number of steps after which iterates are averaged, ≥ 0.

    Returns:
        A parameter stage for `chain`; state ``average``, of each parameter's shape and
        dtype. The parameters themselves are left as they are; ``eval_params`` gives the
        average.

    Raises:
        HyperparameterError: a number out of its range.

    Source:
        Polyak, Juditsky, "Acceleration of stochastic approximation by averaging", 1992.

    Example:
        >>> import torch, funcopt as fo
        >>> opt = fo.chain(fo.sgd(lr=1.0), fo.polyak())
        >>> p, state = torch.zeros(1), opt.init(torch.zeros(1))
        >>> for _ in range(2):
        ...     p, state = opt.update(torch.ones(1), state, p)
        >>> p, opt.eval_params(state, p)
        (tensor([-2.]), tensor([-1.5000]))
    """
    return ParameterStage(
        Spec(
            _polyak, "polyak", {"average": torch.clone}, {"start": Hyper(start)},
            evaluated=_average,
        )
    )  # fmt: skip


def _lookahead(
    new: Tensor,
    old: Tensor,
    slow: Tensor,
    since: Number,
    *,
    step: Any,
    alpha: Number,
    k: int,
) -> tuple[Any, ...]:
    since = since + 1
    due = since >= k
    slow = where(due, towards(slow, new, alpha), slow)
    return where(due, slow, new), slow, where(due, 0.0, since)


def lookahead(k: int = 5, alpha: HyperValue = 0.5) -> ParameterStage:
    r"""Every k steps, go back part of the way, and start again from there.

    .. math::
        \text{slow} \leftarrow \text{slow} + \alpha \, (p - \text{slow}), \quad
        p \leftarrow \text{slow} \qquad \text{after every } k \text{ steps}

    Args:
        k: steps between, ≥ 1.
        alpha: the part of the way that is kept, in [0, 1].

    Returns:
        A parameter stage for `chain`; state ``slow``, of each parameter's shape and
        dtype, and ``since`` (float64, one entry per leaf): steps since the last time.
        ``eval_params`` gives ``slow``. The optimizer's own state is left as it is.

    Raises:
        HyperparameterError: a number out of its range.

    Source:
        Zhang, Lucas, Hinton, Ba, "Lookahead optimizer: k steps forward, 1 step back",
        2019, algorithm 1.

    Example:
        >>> import torch, funcopt as fo
        >>> opt = fo.chain(fo.sgd(lr=1.0), fo.lookahead(k=2))
        >>> p, state = torch.zeros(1), opt.init(torch.zeros(1))
        >>> for _ in range(2):
        ...     p, state = opt.update(torch.ones(1), state, p)
        >>> p
        tensor([-1.])
    """
    check_count("lookahead's k", k)
    return ParameterStage(
        Spec(
            partial(_lookahead, k=k), "lookahead", {"slow": torch.clone, "since": 0.0},
            {"alpha": Hyper(alpha, most=1.0)}, evaluated=_average,
        )
    )  # fmt: skip
