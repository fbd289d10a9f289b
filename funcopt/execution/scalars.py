"""A program's scalars: float64 numbers, computed before its streams.

On Python floats where the numbers can be read, as the reference does, and on tensors
where they cannot: shape (), or one entry for each task of a batch.
"""

import math
from collections.abc import Callable
from typing import Any

import torch

from funcopt.execution.trace import Pass, Program
from funcopt.types import Tensor

_INFIX = {
    "add": "+", "sub": "-", "mul": "*", "div": "/", "pow": "**", "lt": "<", "le": "<=",
    "gt": ">", "ge": ">=", "eq": "==", "ne": "!=", "logical_and": "&", "logical_or": "|",
}  # fmt: skip


def evaluator(program: Program, sweep: Pass) -> Callable[[list[Any]], None]:
    """What fills in the scalars ``sweep.before`` of a list with a place for each value."""
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
        if not any(isinstance(a, Tensor) for a in args):
            return on_floats(*args)
        return on_tensors(*(_as_tensor(a) for a in args))

    return function


def _as_tensor(value: Any) -> Tensor:
    return (
        value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
    )


def _where(condition: Any, a: Any, b: Any) -> Any:
    if isinstance(condition, Tensor):
        return torch.where(condition.bool(), a, b)
    return a if condition else b


_FUNCTIONS: dict[str, Any] = {
    "neg": lambda x: -x,
    "abs": abs,
    "sqrt": lambda x: x**0.5,
    "rsqrt": lambda x: 1 / x**0.5,
    "reciprocal": lambda x: 1 / x,
    "where": _where,
    "lerp": lambda a, b, w: a + w * (b - a),
    "logical_not": _either(lambda x: not x, torch.logical_not),
    "sign": _either(lambda x: float(x > 0) - float(x < 0), torch.sign),
    "exp": _either(math.exp, torch.exp),
    "log": _either(math.log, torch.log),
    "tanh": _either(math.tanh, torch.tanh),
    "sigmoid": _either(lambda x: 1 / (1 + math.exp(-x)), torch.sigmoid),
    "atan2": _either(math.atan2, torch.atan2),
    "maximum": _either(max, torch.maximum),
    "minimum": _either(min, torch.minimum),
}
