"""A program's scalars: float64 numbers, computed before its streams.

On Python floats where the numbers can be read, as the reference does, and on tensors
where they cannot: shape (), or one entry for each task of a batch.
"""

import math
import operator
from collections.abc import Callable
from typing import Any

import torch

from funcopt.execution.trace import Pass, Program
from funcopt.types import Tensor

_INFIX = {"add": "+", "sub": "-", "mul": "*", "div": "/"}


def evaluator(program: Program, sweep: Pass) -> Callable[[list[Any]], None]:
    """What fills in the scalars ``sweep.before``, in a list with a place per value."""
    lines = [f"v[{value}] = {_expression(program, value)}" for value in sweep.before]
    source = "def compute(v):\n " + "\n ".join(lines or ["pass"])
    namespace: dict[str, Any] = dict(_FUNCTIONS)
    exec(source, namespace)  # of our own making: no text of a user's is in it
    fast: Callable[[list[Any]], None] = namespace["compute"]

    def compute(values: list[Any]) -> None:
        try:
            fast(values)
        except (ArithmeticError, ValueError):
            # Python raises where IEEE has an infinity or NaN that a where may discard.
            wide = [_as_tensor(v) if isinstance(v, (int, float)) else v for v in values]
            fast(wide)
            values[:] = [
                v.item()
                if isinstance(v, Tensor) and not isinstance(old, Tensor) and not v.ndim
                else v
                for v, old in zip(wide, values)
            ]

    return compute


def _expression(program: Program, value: int) -> str:
    op = program.op(value)
    args = [f"v[{a}]" for a in op.args]
    if op.name == "const":
        literal = op.literal
        return repr(literal) if math.isfinite(literal) else f"float('{literal}')"
    if op.name in _INFIX:
        return f"{args[0]} {_INFIX[op.name]} {args[1]}"
    return f"{op.name}({', '.join(args)})"


def _either(on_floats: Callable[..., Any], on_tensors: Callable[..., Any]) -> Any:
    def function(*args: Any) -> Any:
        if any(isinstance(a, Tensor) for a in args):
            # A truth is a number, too: bool tensor times float would be float32.
            return on_tensors(*map(_as_tensor, args)).to(torch.float64)
        return on_floats(*args)

    return function


def _as_tensor(value: Any) -> Tensor:
    return (
        value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
    )


def _where(condition: Any, a: Any, b: Any) -> Any:
    if isinstance(condition, Tensor):
        return torch.where(condition != 0, _as_tensor(a), _as_tensor(b))
    return a if condition else b


def _power(base: float, exponent: float) -> float:
    result = base**exponent
    return math.nan if isinstance(result, complex) else result


_FUNCTIONS: dict[str, Any] = {
    "neg": lambda x: -x,
    "abs": abs,
    "reciprocal": lambda x: 1 / x,
    "lerp": lambda a, b, w: a + w * (b - a),
    "where": _where,
    "pow": _either(_power, torch.pow),
    "sqrt": _either(math.sqrt, torch.sqrt),
    "rsqrt": _either(lambda x: 1 / math.sqrt(x), torch.rsqrt),
    "exp": _either(math.exp, torch.exp),
    "log": _either(math.log, torch.log),
    "tanh": _either(math.tanh, torch.tanh),
    "sigmoid": _either(lambda x: 1 / (1 + math.exp(-x)), torch.sigmoid),
    "atan2": _either(math.atan2, torch.atan2),
    "sign": _either(lambda x: float((x > 0) - (x < 0)), torch.sign),
    "maximum": _either(lambda a, b: a if a > b or a != a else b, torch.maximum),
    "minimum": _either(lambda a, b: a if a < b or a != a else b, torch.minimum),
    "lt": _either(operator.lt, torch.lt),
    "le": _either(operator.le, torch.le),
    "gt": _either(operator.gt, torch.gt),
    "ge": _either(operator.ge, torch.ge),
    "eq": _either(operator.eq, torch.eq),
    "ne": _either(operator.ne, torch.ne),
    "logical_and": _either(lambda a, b: bool(a and b), torch.logical_and),
    "logical_or": _either(lambda a, b: bool(a or b), torch.logical_or),
    "logical_not": _either(operator.not_, torch.logical_not),
}
