"""Choose what runs a rule: the one place that knows every executor."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

from funcopt.errors import ExecutionError
from funcopt.execution import fused_autograd, levels, reference
from funcopt.execution.build import BuildError
from funcopt.execution.call import Call, Engine
from funcopt.execution.executor import Column
from funcopt.execution.foreach import Foreach
from funcopt.execution.native import Native
from funcopt.execution.rule import Kinds, Rule
from funcopt.execution.trace import UntraceableError
from funcopt.types import Tensor

_ENGINES: dict[str, Engine] = {"native": Native, "foreach": Foreach}
#: what `execution` and ``execution=`` take
NAMES = (*_ENGINES, "reference")

_forced: ContextVar[str | None] = ContextVar("execution", default=None)

# Of fewer operations torch's own derivative is as fast.
_WORTH = 4
_PLAIN = {Tensor, torch.nn.Parameter}


@contextmanager
def execution(name: str) -> Iterator[None]:
    """..."""
    token = _forced.set(_known(name))
    try:
        yield
    finally:
        _forced.reset(token)


def _known(name: str) -> str:
    if name not in NAMES:
        raise ExecutionError(f"there is no execution '{name}', only {', '.join(NAMES)}")
    return name


@dataclass(frozen=True)
class Choice:
    """What runs some leaves, and why what would be faster does not."""

    name: str  #: "native", "foreach" or "reference"
    derivative: bool = False  #: by kernels with a derivative of their own
    refused: tuple[tuple[str, str], ...] = ()  #: (name, sentence) of those before it


@dataclass(frozen=True)
class Leaves:
    """One step of one optimizer, as lists: a column holds something for each leaf."""

    rule: Rule
    grads: Column
    params: Column
    slots: Sequence[Column]
    steps: Column
    hyper: Sequence[dict[str, Any]]

    def tensors(self) -> list[Tensor]:
        """The leaves' tensors, and those among the hyperparameters and scalars."""
        found = [*self.grads, *self.params]
        for column, scalar in zip(self.slots, self.rule.scalar):
            found += [x for x in column if isinstance(x, Tensor)] if scalar else column
        found += [x for x in self.steps if isinstance(x, Tensor)]
        for values in {id(v): v for v in self.hyper}.values():
            found += [x for x in values.values() if isinstance(x, Tensor)]
        return found

    def pick(self, which: Sequence[int]) -> "Leaves":
        def some(column: Column) -> Column:
            return [column[i] for i in which]

        return Leaves(
            self.rule,
            some(self.grads),
            some(self.params),
            [some(column) for column in self.slots],
            some(self.steps),
            some(self.hyper),
        )


def step(leaves: Leaves, donate: bool = False, name: str | None = None) -> list[Column]:
    """One update of every leaf: the columns ``p, *slots``.

    By the fastest executor that may run it, or by the one that is named.
    """
    forced = _known(name) if name else _forced.get()
    columns: list[list[Any]] = [[None] * len(leaves.params) for _ in leaves.rule.outputs]
    for which, kinds, choice in _groups(leaves, forced):
        some = leaves.pick(which)
        for column, values in zip(columns, _run(some, kinds, choice, donate)):
            for i, value in zip(which, values):
                column[i] = value
    return list(columns)


def _groups(
    leaves: Leaves, forced: str | None
) -> Iterator[tuple[list[int], Kinds, Choice]]:
    """The leaves that run together: of one dtype and device, and kinds of values."""
    reason = _untouchable(leaves)
    differentiating = reason is None and levels.differentiating(leaves.tensors())
    groups: dict[Any, list[int]] = {}
    kinds = {id(v): leaves.rule.kinds(v) for v in leaves.hyper}
    for i, (p, values) in enumerate(zip(leaves.params, leaves.hyper)):
        groups.setdefault((p.dtype, p.device, kinds[id(values)]), []).append(i)
    for (dtype, device, kind), which in groups.items():
        choice = choose(leaves.rule, kind, dtype, device, differentiating, reason, forced)
        yield which, kind, choice


def choose(
    rule: Rule,
    kinds: Kinds,
    dtype: torch.dtype,
    device: torch.device,
    differentiating: bool,
    untouchable: str | None,
    forced: str | None,
) -> Choice:
    """The first executor that does not refuse.

    Raises:
        ExecutionError: the one that is forced refuses; the message says why.
    """
    refused = []
    for name in (forced,) if forced else NAMES:
        reason = None if name == "reference" else untouchable
        if name != "reference" and reason is None:
            reason = _refuses(name, rule, kinds, dtype, device, differentiating, forced)
        if reason is None:
            return Choice(name, differentiating and name != "reference", tuple(refused))
        if forced:
            raise ExecutionError(f"'{name}' cannot run {rule.name}: {reason}")
        refused.append((name, reason))
    raise AssertionError("the reference refuses nothing")


def _refuses(
    name: str,
    rule: Rule,
    kinds: Kinds,
    dtype: torch.dtype,
    device: torch.device,
    differentiating: bool,
    forced: str | None,
) -> str | None:
    if name == "native" and device.type != "cpu":
        return f"native kernels run on the CPU, not on {device.type}"
    try:
        program = rule.program(kinds, reference.computed(dtype))
        if differentiating and not forced:
            if name == "foreach":
                return "a derivative is asked for, which foreach makes no faster"
            if sum(op.stream for op in program.ops) < _WORTH:
                return "torch's own derivative of so short a rule is as fast"
        rule.executor(_ENGINES[name], program, dtype)
    except (UntraceableError, BuildError) as error:
        return str(error)
    return None


def _untouchable(leaves: Leaves) -> str | None:
    """Why only torch's own operations may touch these tensors, or None."""
    if torch.compiler.is_compiling():
        return "under torch.compile the plain rule is what fuses"
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return "a mode watches each operation"
    for x in (*leaves.grads, *leaves.params):
        if type(x) not in _PLAIN:
            return f"{type(x).__name__} is a tensor subclass"
    for column, scalar in zip(leaves.slots, leaves.rule.scalar):
        for x in () if scalar else column:
            if type(x) not in _PLAIN:
                return f"{type(x).__name__} is a tensor subclass"
    return None


def _run(leaves: Leaves, kinds: Kinds, choice: Choice, donate: bool) -> Sequence[Column]:
    if choice.name == "reference":
        return reference.step(
            leaves.rule,
            leaves.grads,
            leaves.params,
            leaves.slots,
            leaves.steps,
            leaves.hyper,
        )
    streams, rows, which = _inputs(leaves, kinds)
    engine = _ENGINES[choice.name]
    stored = leaves.params[0].dtype
    tensors: list[Tensor] = []
    numbers = [list(row) for row in rows]
    k = 0
    columns = iter(streams)
    for stream in leaves.rule.inputs(kinds):
        if stream:
            tensors += next(columns)
            continue
        for row in numbers:
            if isinstance(row[k], Tensor):
                tensors.append(row[k])
                row[k] = None
        k += 1
    call = Call(
        leaves.rule, kinds, engine, stored, len(leaves.params), which,
        tuple(map(tuple, numbers)),
    )  # fmt: skip
    found = fused_autograd.run(call, tensors)
    out: list[list[Any]] = [[None] * len(which) for _ in call.outputs]
    for x, (i, at) in zip(found, call.output_places):
        if call.outputs[i]:
            out[i][at] = x
        else:
            out[i] = [x if row == at else old for old, row in zip(out[i], which)]
    return list(out)


def _inputs(
    leaves: Leaves, kinds: Kinds
) -> tuple[list[Column], list[tuple[Any, ...]], list[int]]:
    """The streams, the distinct rows of scalars, and each leaf's row."""
    rule = leaves.rule
    streams: list[Column] = [leaves.grads, leaves.params]
    streams += [c for c, scalar in zip(leaves.slots, rule.scalar) if not scalar]
    for name in rule.streams(kinds):
        streams.append(
            [v[name].expand_as(p) for v, p in zip(leaves.hyper, leaves.params)]
        )
    names = rule.scalars(kinds)
    numbers = [c for c, scalar in zip(leaves.slots, rule.scalar) if scalar]
    index: dict[Any, int] = {}
    rows: list[tuple[Any, ...]] = []
    which = []
    for i, values in enumerate(leaves.hyper):
        own = (*(c[i] for c in numbers), leaves.steps[i])
        key = (id(values), *(id(x) if isinstance(x, Tensor) else x for x in own))
        if key not in index:
            index[key] = len(rows)
            rows.append((*own, *(values[name] for name in names)))
        which.append(index[key])
    return streams, rows, which
