"""The foreach executor: a program walked with ``torch._foreach_*``, on any device.

One call does an operation for all leaves; a temporary that is needed no more is written
over. The operations are torch's own, so that each rounds as the reference does.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from funcopt.bits import bits, of_bits
from funcopt.execution.executor import Column
from funcopt.execution.program import Pass, Program
from funcopt.execution.sweeping import Sweeping
from funcopt.types import Tensor

_LEAF: dict[str, Callable[..., Tensor]] = {
    "atan2": torch.atan2, "div": torch.div, "sub": torch.sub, "lerp": torch.lerp,
    "addcmul": torch.addcmul,
    "pow": torch.pow, "lt": torch.lt, "le": torch.le, "gt": torch.gt, "ge": torch.ge,
    "eq": torch.eq, "ne": torch.ne, "logical_and": torch.logical_and,
    "logical_or": torch.logical_or, "logical_not": torch.logical_not,
    "where": lambda condition, a, b: torch.where(condition.bool(), a, b),
    "spread": lambda value, like: value.expand_as(like).clone(),
    "bits": bits, "of_bits": of_bits,
}  # fmt: skip
# torch has these for a list, for two lists, and for a list and a number for each leaf.
_LISTS = {
    "add", "sub", "mul", "div", "neg", "abs", "sqrt", "rsqrt", "reciprocal", "sign",
    "exp", "log", "tanh", "sigmoid", "maximum", "minimum", "pow", "lerp",
    "addcmul",
}  # fmt: skip
_COMMUTATIVE = {"add", "mul", "maximum", "minimum"}


class Foreach(Sweeping):
    """A program as a walk over lists."""

    def __init__(self, program: Program, stored: torch.dtype) -> None:
        super().__init__(program, stored)
        self._dying = [_last_uses(program, sweep) for sweep in program.passes]

    def _sweep(
        self,
        k: int,
        columns: dict[int, Column],
        env: Sequence[list[Any]],
        which: Sequence[int],
        out: Sequence[Column] | None,
        tasks: int,
    ) -> tuple[Sequence[Column], Sequence[Column]]:
        program, sweep = self.program, self.program.passes[k]
        live = {v: [self._widened(x) for x in columns[v]] for v in self._streams}
        like = live[self._streams[0]]

        def operand(value: int) -> list[Any]:
            if program.is_stream(value):
                return live[value]
            return [_beside(x, env[row][value], tasks) for x, row in zip(like, which)]

        for value, dying in zip(sweep.streams, self._dying[k]):
            op = program.op(value)
            args, free = [operand(a) for a in op.args], [a in dying for a in op.args]
            if op.name == "spread":
                args.append(like)
            live[value] = _apply(op.name, args, free, program.dtype)
            for name in dying:
                del live[name]
        sums = [
            [_total(x, tasks) for x in live[program.op(s).args[0]]] for s in sweep.sums
        ]
        first = columns[self._streams[0]]
        made: list[Column] = []
        for place, value in enumerate(sweep.outputs):
            results = [
                x.to(self.stored).view(y.shape) for x, y in zip(live[value], first)
            ]
            if out is not None:
                for target, result in zip(out[place], results):
                    target.copy_(result)
                results = out[place]
            elif program.is_input(value):
                results = [x.clone() for x in results]  # not the caller's own tensor
            made.append(results)
        return made, sums

    def _widened(self, leaf: Tensor) -> Tensor:
        """A half leaf in float32; a 0-d one as a vector, which promotes no scalar."""
        return (leaf if leaf.ndim else leaf.reshape(1)).to(self.program.dtype)


def _apply(
    name: str, args: list[list[Any]], free: list[bool], dtype: torch.dtype
) -> list[Any]:
    """One operation on all leaves; its first argument is written over if ``free``."""
    numbers = [not isinstance(column[0], Tensor) for column in args]
    if name in _COMMUTATIVE and numbers[0]:
        args, free, numbers = args[::-1], free[::-1], numbers[::-1]
    if name in _LISTS and not any(numbers[: max(1, len(args) - 1)]):
        if numbers[-1]:
            column = args[-1]
            same = all(number == column[0] for number in column)
            args = [*args[:-1], column[0] if same else column]
        if free[0] and args[0][0].dtype is dtype:  # a bool tensor holds no number
            getattr(torch, f"_foreach_{name}_")(*args)
            return args[0]
        return list(getattr(torch, f"_foreach_{name}")(*args))
    like = next(column for column, number in zip(args, numbers) if not number)
    return [
        _LEAF[name](*(_tensor(a, x, dtype) for a in row)) for x, *row in zip(like, *args)
    ]


def _beside(leaf: Tensor, value: Any, tasks: int) -> Any:
    """A scalar as it takes part in an operation with ``leaf``."""
    if not isinstance(value, Tensor):
        return value
    value = value.to(leaf.device, leaf.dtype)
    return value.view(tasks, *[1] * (leaf.ndim - 1)) if value.ndim else value


def _tensor(value: Any, like: Tensor, dtype: torch.dtype) -> Tensor:
    if isinstance(value, Tensor):
        return value
    return torch.tensor(value, dtype=dtype, device=like.device)


def _total(leaf: Tensor, tasks: int) -> Tensor:
    if not tasks:
        return leaf.sum(dtype=torch.float64)
    return leaf.reshape(tasks, -1).sum(1, dtype=torch.float64)


def _last_uses(program: Program, sweep: Pass) -> list[set[int]]:
    """For each stream in order, the temporaries that nothing needs after it."""
    kept = {*sweep.outputs, *(program.op(s).args[0] for s in sweep.sums)}
    temporary = set(sweep.streams) - kept
    dying: list[set[int]] = []
    for value in reversed(sweep.streams):
        dying.append(temporary & set(program.op(value).args))
        temporary -= dying[-1]
    return dying[::-1]
