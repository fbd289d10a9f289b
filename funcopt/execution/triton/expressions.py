"""A program's operations as expressions of Triton."""

import math
from dataclasses import dataclass

from funcopt.execution.program import Op, Program

_FORMS = {
    "add": "{0} + {1}", "sub": "{0} - {1}", "mul": "{0} * {1}", "neg": "-{0}",
    "div": "divide({0}, {1})", "reciprocal": "divide({one}, {0})", "sqrt": "root({0})",
    "rsqrt": "divide({one}, root({0}))", "abs": "tl.abs({0})", "sign": "sign({0})",
    "maximum": "larger({0}, {1})", "minimum": "smaller({0}, {1})",
    "lerp": "interpolate({0}, {1}, {2})", "addcmul": "tl.fma({1}, {2}, {0})",
    "where": "tl.where({0} != 0, {1}, {2})", "spread": "tl.full([BLOCK], {0}, {dtype})",
    "lt": "{0} < {1}", "le": "{0} <= {1}", "gt": "{0} > {1}", "ge": "{0} >= {1}",
    "eq": "{0} == {1}", "ne": "{0} != {1}", "logical_not": "{0} == 0",
    "logical_and": "({0} != 0) & ({1} != 0)", "logical_or": "({0} != 0) | ({1} != 0)",
    "exp": "exponential({0})", "log": "logarithm({0})", "sigmoid": "sigmoid({0})",
    "pow": "power({0}, {1})", "tanh": "hyperbolic_tangent({0})",
    "atan2": "angle({0}, {1})", "bits": "bits({0})", "of_bits": "of_bits({0})",
}  # fmt: skip
_POWERS = {
    0.5: "root({0})", 1.0: "{0}", 2.0: "{0} * {0}", -0.5: "divide({one}, root({0}))",
    -1.0: "divide({one}, {0})",
}  # fmt: skip
_OF_TRUTHS = {"where", "logical_and", "logical_or", "logical_not"}
# A bare number beside an operator takes its dtype from the other side. Not so beside a
# comparison in Triton 3.6, which torch 2.11 brings: it is rounded to float32 first.
_OPERATORS = {"add", "sub", "mul"}


@dataclass(frozen=True)
class Expressions:
    """What the values of a program are called in a kernel, and how they are computed.

    Args:
        program: whose values they are.
        letter: what names begin with; the value's number follows.
        dtype: what they are computed in, as Triton calls it.
    """

    program: Program
    letter: str
    dtype: str

    def name(self, value: int) -> str:
        """A variable, or a literal."""
        if self.program.is_literal(value):
            return _literal(self.program.op(value).literal, self.dtype)
        return f"{self.letter}{value}"

    def expression(self, op: Op) -> str:
        """The operation, of values by their names."""
        form = _FORMS[op.name]
        if op.name == "pow" and self.program.is_literal(op.args[1]):
            form = _POWERS.get(self.program.op(op.args[1]).literal, form)
        names = [self.name(a) for a in op.args]
        if op.name not in _OF_TRUTHS:
            names = [
                f"{text}.to({self.dtype})" if self.is_truth(a) else text
                for text, a in zip(names, op.args)
            ]
        literal = [self.program.is_literal(a) for a in op.args]
        if op.name in _OPERATORS and literal.count(True) == 1:
            k = literal.index(True)
            names[k] = _number(self.program.op(op.args[k]).literal)
        return form.format(*names, dtype=self.dtype, one=_literal(1.0, self.dtype))

    def is_truth(self, value: int) -> bool:
        """Whether it is the outcome of a comparison, which Triton holds in one bit."""
        return not self.program.is_input(value) and self.program.op(value).boolean


def _literal(value: float, dtype: str) -> str:
    """A number in its full precision: a bare one might be taken for a float32."""
    return f"tl.full((), {_number(value)}, {dtype})"


def _number(value: float) -> str:
    return repr(value) if math.isfinite(value) else f"float('{value}')"
