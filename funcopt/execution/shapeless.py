"""A rule watched for looks at the shape of its leaf, which a program has no part of."""

from collections.abc import Sequence
from typing import Any, NoReturn

from torch.overrides import TorchFunctionMode

from funcopt.execution.program import Function
from funcopt.execution.trace import UntraceableError
from funcopt.types import Tensor


class ShapeError(UntraceableError):
    """That what a rule does depends on the shape of its leaf, as a sentence."""


def shapeless(function: Function) -> Function:
    """``function``, which raises `ShapeError` where it asks for the shape of a stream.

    Whether a tensor has axes it may ask: streams have some, and scalars none.
    """

    def watched(*inputs: Tensor) -> Sequence[Tensor]:
        with _Watch():
            return function(*inputs)

    return watched


_ASKING = {"shape", "size", "numel", "__len__", "nbytes", "stride"}
#: what takes axes, and how many arguments it has before those
_ALONG = {"sum": 1, "norm": 2, "linalg_vector_norm": 2}


class _Watch(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name, named = func.__name__, kwargs or {}
        if name == "__get__":  # of a property
            name = func.__self__.__name__
        if args and isinstance(args[0], Tensor) and args[0].ndim:
            if name in ("ndim", "dim"):
                return _Some()
            most = _ALONG.get(name, len(args))
            along = len(args) > most or not named.keys().isdisjoint(("dim", "axis"))
            if name in _ASKING or along:
                _refuse()
        return func(*args, **named)


class _Some:
    """How many axes a stream has: not none, and more is not known."""

    def __eq__(self, other: object) -> NoReturn:
        _refuse()

    __lt__ = __le__ = __gt__ = __ge__ = __index__ = __eq__


def _refuse() -> NoReturn:
    raise ShapeError("it looks at the shape of its leaf, or sums along some of its axes")
