"""Schedule: a hyperparameter that changes with the steps."""

from collections.abc import Callable
from typing import Any, final

from funcopt.errors import HyperparameterTypeError


@final
class Schedule:
    """A hyperparameter that is a function of the number of steps done.

    The value at a leaf's update number t (counted from 1) is ``function(t - 1)``: the
    first update sees 0, as in ``torch.optim.lr_scheduler``.

    Args:
        function: maps the count to a value ≥ 0. The count is an ``int`` where the step
            can be read, and a 0-d float64 tensor under vmap or ``torch.compile``, so
            ``function`` should be plain arithmetic (``torch.where``, no ``if``). What it
            returns is a float or a 0-d tensor, and may carry a gradient to the
            schedule's own parameters.

    Raises:
        HyperparameterTypeError: ``function`` is not callable.

    Source:
        Typed, and never a bare callable, because sniffing callables made optax take
        parameter trees for schedules (google-deepmind/optax#1373).

    Example:
        >>> import torch, funcopt as fo
        >>> opt = fo.sgd(lr=fo.Schedule(lambda count: 0.5**count))
        >>> p, state = torch.zeros(1), opt.init(torch.zeros(1))
        >>> for _ in range(3):
        ...     p, state = opt.update(torch.ones(1), state, p)
        >>> p                                                     # -(1 + 1/2 + 1/4)
        tensor([-1.7500])
    """

    __slots__ = ("function",)

    def __init__(self, function: Callable[[Any], Any]) -> None:
        if not callable(function):
            raise HyperparameterTypeError(
                f"a Schedule takes a function of the step, not {function!r}"
            )
        self.function = function

    def __call__(self, count: Any) -> Any:
        return self.function(count)

    def __repr__(self) -> str:
        return f"Schedule({getattr(self.function, '__name__', self.function)})"
