"""A program's scalars: float64 numbers, computed before its streams.

On Python floats where the numbers can be read, as the reference does, and on tensors
where they cannot: shape (), or one entry for each task of a batch.
"""

import math
from collections.abc import Callable, Sequence
from struct import Struct
from typing import Any

import torch

from funcopt.execution.program import Pass, Program
from funcopt.types import Tensor

#: on Python's numbers; an error where IEEE has an infinity or NaN
_NUMBERS = {
    "add": "{} + {}", "sub": "{} - {}", "mul": "{} * {}", "div": "{} / {}", "neg": "-{}",
    "pow": "pow({}, {})", "sqrt": "sqrt({})", "rsqrt": "1 / sqrt({})", "abs": "abs({})",
    "reciprocal": "1 / {}", "exp": "exp({})", "log": "log({})", "tanh": "tanh({})",
    "sigmoid": "1 / (1 + exp(-{}))", "atan2": "atan2({}, {})",
    "where": "{1} if {0} else {2}", "lerp": "{0} + {2} * ({1} - {0})",
    "addcmul": "{0} + {1} * {2}",
    "sign": "float(({0} > 0) - ({0} < 0))", "lt": "{} < {}", "le": "{} <= {}",
    "maximum": "{0} if {0} > {1} or {0} != {0} else {1}", "gt": "{} > {}",
    "minimum": "{0} if {0} < {1} or {0} != {0} else {1}", "ge": "{} >= {}",
    "eq": "{} == {}", "ne": "{} != {}", "logical_and": "bool({} and {})",
    "logical_or": "bool({} or {})", "logical_not": "not {}",
}  # fmt: skip


def evaluator(program: Program, sweep: Pass) -> Callable[[list[Any]], None]:
    """What fills in the scalars ``sweep.before``, in a list with a place per value."""
    fast = _compiled(
        "values",
        [f"values[{v}] = {_number(program, v, 'values[{}]')}" for v in sweep.before],
    )
    own = set(sweep.before)
    given = list(
        dict.fromkeys(a for v in sweep.before for a in program.op(v).args if a not in own)
    )

    def compute(values: list[Any]) -> None:
        tensors = [i for i in given if isinstance(values[i], Tensor)]
        if not tensors:
            try:
                return fast(values)
            except (ArithmeticError, ValueError):
                pass  # an infinity or NaN that a where may discard
        for v in sweep.before:
            op = program.op(v)
            if op.name == "const":
                values[v] = op.literal
            else:
                values[v] = _TENSORS[op.name](*(_as_tensor(values[a]) for a in op.args))
        if not tensors:
            for v in sweep.before:
                if isinstance(values[v], Tensor):
                    values[v] = values[v].item()

    return compute


def on_numbers(
    program: Program,
    wanted: Sequence[int],
    sums: Sequence[int] = (),
    packed: bool = False,
) -> Callable[..., Any]:
    """A function from Python numbers to the scalars ``wanted``, Python numbers too.

    Its arguments are the input scalars and then the ``sums``. Where `evaluator` would
    find an infinity or NaN it raises ArithmeticError or ValueError. If ``packed`` the
    scalars come as bytes, eight for each: soonest made here.
    """
    given = [i for i, stream in enumerate(program.inputs) if not stream] + [*sums]
    needed, ahead = set(given), list(wanted)
    while ahead:
        value = ahead.pop()
        if value not in needed:
            needed.add(value)
            ahead += program.op(value).args
    lines = [f"v{v} = {_number(program, v, 'v{}')}" for v in sorted(needed - set(given))]
    results = "".join(f"v{v}, " for v in wanted)
    arguments = ", ".join(f"v{i}" for i in given)
    made = Struct(f"{len(wanted)}d").pack if packed else None
    return _compiled(arguments, [*lines, f"return {'made' * packed}({results})"], made)


def _compiled(
    arguments: str, lines: Sequence[str], made: Any = None
) -> Callable[..., Any]:
    source = f"def compute({arguments}):\n " + "\n ".join(lines or ["pass"])
    namespace: dict[str, Any] = {
        name: getattr(math, name)
        for name in ("pow", "sqrt", "exp", "log", "tanh", "atan2", "inf", "nan")
    }
    namespace["made"] = made
    exec(source, namespace)  # of our own making: no text of a user's is in it
    return namespace["compute"]


def _number(program: Program, value: int, name: str) -> str:
    op = program.op(value)
    if op.name == "const":
        return repr(op.literal)  # inf and nan are names, too
    return _NUMBERS[op.name].format(*(name.format(a) for a in op.args))


def _as_tensor(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value
    return torch.tensor(value, dtype=torch.float64, device="cpu")


def _float64(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """As numbers, if they are truth values: bool times float would be float32."""
    return lambda *args: function(*args).to(torch.float64)


_TENSORS: dict[str, Callable[..., Tensor]] = {
    name: getattr(torch, name)
    for name in (
        "add", "sub", "mul", "div", "neg", "pow", "sqrt", "rsqrt", "abs", "reciprocal",
        "exp", "log", "tanh", "sigmoid", "atan2", "lerp", "addcmul", "sign",
        "maximum", "minimum",
    )
} | {
    name: _float64(getattr(torch, name))
    for name in (
        "lt", "le", "gt", "ge", "eq", "ne", "logical_and", "logical_or", "logical_not",
    )
} | {
    "where": lambda condition, a, b: torch.where(condition != 0, a, b)
}  # fmt: skip
