"""The program of a rule, or of its derivative: the rule is called, and written down.

Once on tensors of three elements; what reaches the dispatcher is the program.
(``make_fx`` does the same, but its first call takes over a second.)
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from funcopt.bits import INTEGERS
from funcopt.execution.program import Function, Op, Program
from funcopt.types import Tensor

_LENGTH = 3  # of a traced stream; one element would be a scalar


class UntraceableError(Exception):
    """Why a function is no program of known operations, as a sentence."""


def trace(function: Function, inputs: Sequence[bool], dtype: torch.dtype) -> Program:
    """``function`` of streams (True) and scalars (False) as a program.

    Raises:
        UntraceableError: it does what no kernel is printed for; the message says what.
    """
    first, second = (_recorded(function, inputs, dtype, x) for x in (1.0, 2.0))
    if first != second:
        raise UntraceableError("it looks into a tensor, and does what it finds there")
    return first


def _recorded(
    function: Function, inputs: Sequence[bool], dtype: torch.dtype, value: float
) -> Program:
    """What runs where every input is ``value``."""
    tensors = [
        torch.full((_LENGTH,), value, dtype=dtype, device="cpu")
        if stream
        else torch.full((), value, dtype=torch.float64, device="cpu")
        for stream in inputs
    ]
    recorder = _Recorder(tensors, dtype)
    try:
        with recorder:
            outputs = function(*tensors)
        return recorder.program(function, outputs)
    except UntraceableError:
        raise
    except Exception as error:  # whatever a rule does with tensors where it had floats
        raise UntraceableError(f"it cannot be called on tensors: {error}") from error


# What the dispatcher sees → the name of the operation.
_SAME = {
    "add", "sub", "mul", "div", "neg", "abs", "sqrt", "rsqrt", "sign", "exp", "log",
    "tanh", "atan2", "maximum", "minimum", "where", "lt", "le", "gt", "ge", "eq", "ne",
    "logical_and", "logical_or", "logical_not", "reciprocal", "pow", "lerp", "sum",
    "sigmoid", "addcmul",
}  # fmt: skip
_OTHER = {"sgn": "sign", "bitwise_and": "logical_and", "bitwise_or": "logical_or",
          "bitwise_not": "logical_not"}  # fmt: skip
# The value is the argument's: shapes and dtypes of streams and scalars are known.
_UNCHANGED = {
    "detach", "alias", "to", "clone", "contiguous", "_to_copy", "view", "_unsafe_view",
    "squeeze", "unsqueeze", "lift_fresh", "expand", "reshape", "view_as",
}  # fmt: skip
_FILLED = {
    "zeros_like": 0.0, "ones_like": 1.0, "zeros": 0.0, "ones": 1.0, "new_zeros": 0.0,
    "new_ones": 1.0, "empty_like": 0.0, "_efficientzerotensor": 0.0,
}  # fmt: skip


_OF_THREE = {"lerp", "where", "addcmul"}
_SPECIAL = {
    "full", "full_like", "fill", "scalar_tensor", "copy", "rsub", "masked_fill", "clamp",
    "clamp_min", "clamp_max", "linalg_vector_norm", "tanh_backward", "sigmoid_backward",
}  # fmt: skip
_KNOWN = _SAME | _SPECIAL | _UNCHANGED | _FILLED.keys() | _OTHER.keys()


def _is_of_numbers(value: Any) -> bool:
    """Whether it is a stream that says which dtype a result has."""
    return isinstance(value, Tensor) and value.ndim > 0 and value.dtype is not torch.bool


class _Recorder(TorchDispatchMode):
    """Writes down each operation while it runs."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else the first call imports all of Dynamo: a second

    def __init__(self, inputs: Sequence[Tensor], dtype: torch.dtype) -> None:
        super().__init__()
        self.streams = [x.ndim > 0 for x in inputs]
        self.dtype = dtype
        self.ops: list[Op] = []
        self.number: dict[int, int] = {id(x): i for i, x in enumerate(inputs)}
        self.known: dict[Any, int] = {}  # one value for equal operations
        self.bits: set[int] = set()  # ids of integers that are a float's
        self.alive = list(inputs)  # an id stays a tensor's own only while it lives

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        inplace = name.endswith("_") and not name.endswith("__")
        name = name.rstrip("_") if inplace else name
        if name == "_local_scalar_dense":
            raise UntraceableError("it reads a tensor's value (.item(), float(), an if)")
        if name not in _KNOWN:  # not even run: it might draw random numbers
            raise UntraceableError(f"aten.{name} is not among the operations of kernels")
        if "out" in kwargs:
            raise UntraceableError(f"{func} writes into a tensor that it is given")
        out = func(*args, **kwargs)
        if out.shape not in ((), (1,), (_LENGTH,)):
            raise UntraceableError(f"{func} changes the leaf's shape")
        value = self._value(name, args, kwargs, out)
        if inplace:
            self._written(out, value, func)
        self.number[id(out)] = value
        self.alive.append(out)
        return out

    def _written(self, out: Tensor, value: int, func: Any) -> None:
        """Every tensor on this memory has the new value; no argument may."""
        memory = out.untyped_storage()._cdata
        for i, x in enumerate(self.alive):
            if x.untyped_storage()._cdata == memory:
                if i < len(self.streams):
                    raise UntraceableError(f"{func} writes into an argument")
                self.number[id(x)] = value

    def program(self, function: Function, outputs: Sequence[Any]) -> Program:
        found = tuple(self._number(out) for out in outputs)
        streams, ops = tuple(self.streams), tuple(self.ops)
        return Program(streams, ops, found, self.dtype, function).without_dead()

    def _value(self, name: str, args: Any, kwargs: Any, out: Tensor) -> int:
        stream, boolean = out.shape == (_LENGTH,), out.dtype is torch.bool
        if name in _FILLED:
            return self._filled(_FILLED[name], stream)
        if name in ("full", "full_like", "fill", "scalar_tensor"):
            filling = args[0] if name == "scalar_tensor" else args[1]
            if isinstance(filling, Tensor):
                return self._as(self._number(filling), stream)
            return self._filled(float(filling), stream)
        if name in _UNCHANGED or name == "copy":
            given = args[1] if name == "copy" else args[0]
            pair = given.dtype, out.dtype
            if stream and INTEGERS[self.dtype] in pair:
                return self._recast(name == "view", given, out)
            value = self._as(self._number(given), stream)
            if pair[0] is not pair[1]:
                self._check_cast(*pair, stream)
                if stream and pair[0] is torch.bool:  # lists add truths as truths
                    both = self._filled(1.0, False), self._filled(0.0, False)
                    return self._op("where", (value, *both), True)
            return value
        if stream and not boolean and not any(map(_is_of_numbers, args)):
            self._check_promotion()
        name = _OTHER.get(name, name)
        if name == "add" and boolean and stream:
            name = "logical_or"  # two truths are one
        if name == "rsub":
            name, args = "sub", (args[1], args[0], *args[2:])
        if name == "masked_fill":
            name, args = "where", (args[1], args[2], args[0])
        if name in ("clamp", "clamp_min", "clamp_max"):
            return self._clamped(name, args, kwargs, stream)
        if name == "linalg_vector_norm":
            return self._norm(args, stream)
        if name in ("tanh_backward", "sigmoid_backward"):
            return self._slope(name, args, stream)
        if name == "sum":
            value = self._number(args[0])
            return (
                value if not self._is_stream(value) else self._op("sum", (value,), False)
            )
        alpha = kwargs.get(
            "alpha", args[2] if name in ("add", "sub") and len(args) > 2 else 1
        )
        alpha = kwargs.get("value", alpha)  # addcmul's name for it
        numbers = [self._number(a) for a in args[: 3 if name in _OF_THREE else 2]]
        if kwargs.get("rounding_mode") is not None:
            raise UntraceableError("a rounded division is not among the operations")
        if alpha != 1:
            scaled = stream if name != "addcmul" else self._is_stream(numbers[1])
            numbers[1] = self._op("mul", (numbers[1], self._number(alpha)), scaled)
        if name == "addcmul":  # of lists there is none with numbers
            numbers = [self._as(number, stream) for number in numbers]
        return self._op(name, tuple(numbers), stream, boolean)

    def _check_cast(self, old: torch.dtype, new: torch.dtype, stream: bool) -> None:
        """A leaf is computed in one dtype, and a scalar in float64 whatever is cast."""
        kept = new is self.dtype if stream else new.is_floating_point
        if not kept:
            raise UntraceableError(
                f"a cast from {old} to {new} is not among the operations"
            )

    def _check_promotion(self) -> None:
        """Truths and Python numbers make tensors of torch's default dtype."""
        made = torch.get_default_dtype()
        if made is not self.dtype:
            raise UntraceableError(
                f"it makes numbers of truths alone, which torch keeps in {made}"
            )

    def _recast(self, view: bool, given: Tensor, out: Tensor) -> int:
        """`bits` and `of_bits`, of two steps each; nothing else is done with integers."""
        value, are_bits = self._number(given, integers=True), id(given) in self.bits
        if out.dtype in INTEGERS.values():
            first = view and given.dtype is self.dtype
            if first or are_bits:
                self.bits.add(id(out))
            return self._op("bits", (value,), True) if first else value
        self._check_cast(given.dtype, out.dtype, stream=True)
        if view == are_bits:
            raise UntraceableError("a rounded number is not among the operations")
        return self._op("of_bits", (value,), True) if view else value

    def _clamped(self, name: str, args: Any, kwargs: Any, stream: bool) -> int:
        value = self._number(args[0])
        bounds = {"clamp": ("min", "max"), "clamp_min": ("min",), "clamp_max": ("max",)}
        for i, bound in enumerate(bounds[name], 1):
            limit = args[i] if len(args) > i else kwargs.get(bound)
            if limit is not None:
                which = "maximum" if bound == "min" else "minimum"
                # Of equals, zeros of either sign, kernels give the second: as a clamp.
                value = self._op(which, (self._number(limit), value), stream)
        return value

    def _norm(self, args: Any, stream: bool) -> int:
        order = args[1] if len(args) > 1 else 2
        if order not in (1, 2) or stream:
            raise UntraceableError(f"a norm of order {order} is not among the operations")
        value = self._number(args[0])
        if order == 1:
            return self._op("sum", (self._op("abs", (value,), True),), False)
        squares = self._op("sum", (self._op("mul", (value, value), True),), False)
        return self._op("sqrt", (squares,), False)

    def _slope(self, name: str, args: Any, stream: bool) -> int:
        """c · (1 - y²) of tanh, c · (1 - y) · y of sigmoid, in torch's order."""
        c, y, one = map(self._number, (*args, 1.0))
        inner = self._is_stream(y)
        if name == "tanh_backward":
            square = self._op("mul", (y, y), inner)
            return self._op("mul", (c, self._op("sub", (one, square), inner)), stream)
        c = self._op("mul", (c, self._op("sub", (one, y), inner)), stream)
        return self._op("mul", (c, y), stream)

    def _number(self, value: Any, integers: bool = False) -> int:
        """The number of a tensor's value, or of a literal."""
        if isinstance(value, Tensor):
            # A sum of truths is an integer, too, and as good a number as any.
            if value.ndim and value.dtype in INTEGERS.values() and not integers:
                raise UntraceableError(f"there are no operations on {value.dtype}")
            if id(value) in self.number:
                return self.number[id(value)]
            raise UntraceableError("it uses a tensor that is no argument of the rule")
        if isinstance(value, (bool, int, float)):
            return self._filled(float(value), False)
        raise UntraceableError(f"{value!r} is neither a tensor nor a number")

    def _filled(self, literal: float, stream: bool) -> int:
        return self._as(self._op("const", (), False, literal=literal), stream)

    def _as(self, value: int, stream: bool) -> int:
        """A scalar where a stream is called for is spread over the leaf."""
        if stream and not self._is_stream(value):
            return self._op("spread", (value,), True)
        return value

    def _is_stream(self, value: int) -> bool:
        inputs = len(self.streams)
        return self.streams[value] if value < inputs else self.ops[value - inputs].stream

    def _op(
        self,
        name: str,
        args: tuple[int, ...],
        stream: bool,
        boolean: bool = False,
        literal: float = 0.0,
    ) -> int:
        op = Op(name, args, stream, boolean, literal)
        key = op, math.copysign(1.0, literal)  # -0.0 equals 0.0
        if key not in self.known:
            self.known[key] = len(self.streams) + len(self.ops)
            self.ops.append(op)
        return self.known[key]
