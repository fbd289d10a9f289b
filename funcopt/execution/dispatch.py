"""Choose what runs a rule: the one place that knows every executor."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch

from funcopt.errors import ExecutionError
from funcopt.execution import fused_autograd, layout, levels, reference
from funcopt.execution.call import Call, Engine, Form
from funcopt.execution.executor import BuildError, Column, Executor
from funcopt.execution.foreach import Foreach
from funcopt.execution.lane import Lane
from funcopt.execution.leaves import Leaves
from funcopt.execution.native.kernels import Native
from funcopt.execution.rule import Kinds, Rule
from funcopt.execution.trace import Program, UntraceableError
from funcopt.types import Tensor


def _triton(program: Program, stored: torch.dtype) -> Executor:
    """Triton is imported when the first tensor on a GPU is stepped."""
    from funcopt.execution.triton.kernels import Triton

    return Triton(program, stored)


_ENGINES: dict[str, Engine] = {"native": Native, "triton": _triton, "foreach": Foreach}
_DEVICES = {"native": "cpu", "triton": "cuda"}  # foreach runs on any
#: what `execution` and ``execution=`` take
NAMES = (*_ENGINES, "reference")

_forced: ContextVar[str | None] = ContextVar("execution", default=None)
_observer: ContextVar["list[Group] | None"] = ContextVar("observer", default=None)

# A derivative by kernels costs as much as torch's own of so many operations: in plain
# autograd, inside torch.func, and on leaves of _MANY elements, where arithmetic is what
# costs. Measured on meta-steps of the sinusoid network, looped and vmapped.
_WORTH, _WORTH_INSIDE, _WORTH_LARGE = 6, 12, 4
_MANY = 1 << 15
_MOST_FORMS = 64  # of the calls of one rule
_PLAIN = {Tensor, torch.nn.Parameter}


@contextmanager
def execution(name: str) -> Iterator[None]:
    """Have every update within run by one executor, or raise with its reason.

    Args:
        name: ``"native"`` (C kernels, on a CPU), ``"triton"`` (on CUDA), ``"foreach"``
            (lists of tensors, on any device) or ``"reference"`` (the rule on each leaf,
            the definition of correct).

    Returns:
        A context manager. It holds for this thread, or this asyncio task.

    Raises:
        ExecutionError: there is no executor of that name; or, by ``update``, the one
            named cannot run the step.

    Source:
        funcopt.

    Example:
        >>> import torch, funcopt as fo
        >>> opt, p = fo.sgd(lr=0.5), torch.ones(2)
        >>> with fo.execution("reference"):
        ...     opt.update(p, opt.init(p), p)[0]
        tensor([0.5000, 0.5000])
    """
    token = _forced.set(_known(name))
    try:
        yield
    finally:
        _forced.reset(token)


@contextmanager
def observed() -> Iterator[list["Group"]]:
    """Collects what is chosen for each group of leaves in the updates within."""
    groups: list[Group] = []
    token = _observer.set(groups)
    try:
        yield groups
    finally:
        _observer.reset(token)


def _known(name: str) -> str:
    if name not in NAMES:
        raise ExecutionError(
            f"there is no execution '{name}'; it is one of {', '.join(NAMES)}"
        )
    return name


@dataclass(frozen=True)
class Choice:
    """What runs some leaves, and why what would be faster does not."""

    name: str  #: "native", "foreach" or "reference"
    derivative: bool = False  #: kernels compute the derivative, too
    transformed: bool = False  #: the derivative is asked for, or this is inside vmap
    refused: tuple[tuple[str, str], ...] = ()  #: (name, sentence) of those before it


@dataclass(frozen=True)
class Group:
    """Leaves that run together, and what runs them."""

    rule: Rule
    kinds: Kinds
    which: list[int]
    params: Column
    choice: Choice


def step(
    leaves: Leaves,
    name: str | None = None,
    donate: bool = False,
    vectors: Sequence[Tensor] = (),
) -> tuple[Sequence[Column], Lane | None]:
    """One update of every leaf: the columns ``p, *slots``, and a lane for the next step.

    By the fastest executor that may run it, or by the one that is named. With ``donate``
    parameters and state are written over, and are what is returned. ``vectors`` are what
    the state holds for all leaves at once.

    Raises:
        ExecutionError: the executor that is named refuses, or donated tensors may not
            be written over; nothing has changed then.
    """
    if torch.compiler.is_compiling():  # the plain rule is what the compiler fuses
        plain = _reference(leaves)
        return (_written_over(leaves, plain) if donate else plain), None
    forced = _known(name) if name else _forced.get()
    observer = _observer.get()
    groups = _groups(leaves, forced)
    if donate:
        _check_donation(leaves)
    if observer is not None:
        observer.extend(groups)
    if len(groups) == 1 and len(groups[0].which) == len(leaves.params):
        lane = _lane(leaves, groups[0], vectors) if is_free() else None
        return _run(leaves, groups[0], donate), lane
    columns: list[list[Any]] = [[None] * len(leaves.params) for _ in leaves.rule.outputs]
    for group in groups:
        some = leaves.pick(group.which)
        for column, values in zip(columns, _run(some, group, donate)):
            for i, value in zip(group.which, values):
                column[i] = value
    return columns, None


def is_free() -> bool:
    """Whether a lane may be taken: nothing is forced, nobody looks on."""
    return _forced.get() is None and _observer.get() is None


def _lane(leaves: Leaves, group: Group, vectors: Sequence[Tensor]) -> Lane | None:
    """A lane for steps like this one, if its leaves go one way as they are."""
    if group.choice.transformed or group.choice.name == "reference":
        return None
    columns = [leaves.grads, leaves.params, *leaves.state]
    alike = all(a is b for a, b in zip(columns, layout.alike(columns)))
    if not alike or "stream" in group.kinds or not all(map(levels.readable, vectors)):
        return None
    if len(leaves.rows(group.kinds)[0]) > 1:
        return None
    return Lane(group.kinds, _executor(leaves.rule, group), leaves, vectors)


def _groups(leaves: Leaves, forced: str | None) -> list[Group]:
    """The leaves that run together: of one dtype and device, and kinds of values."""
    reason = _untouchable(leaves)
    transformed = levels.differentiating(leaves.tensors())
    followed = transformed and levels.followed(leaves.tensors())
    found: dict[Any, list[int]] = {}
    kinds: dict[int, Kinds] = {}
    for i, (p, values) in enumerate(zip(leaves.params, leaves.hyper)):
        if id(values) not in kinds:
            kinds[id(values)] = leaves.rule.kinds(values)
        found.setdefault((p.dtype, p.device, kinds[id(values)]), []).append(i)
    groups = []
    for (dtype, device, kind), which in found.items():
        if transformed and not leaves.rule.elementwise:
            reason = f"{leaves.rule.name} needs each leaf, and each task's, whole"
        params = [leaves.params[i] for i in which]
        least = _least_worth(params) if followed and not forced else 0
        choice = choose(leaves.rule, kind, dtype, device, least, reason, forced)
        choice = replace(
            choice,
            transformed=transformed,
            derivative=followed and choice.name != "reference",
        )
        groups.append(Group(leaves.rule, kind, which, params, choice))
    return groups


def _least_worth(params: Column) -> int:
    """How many operations a rule must have for kernels to be the faster derivative."""
    if sum(p.numel() for p in params) >= _MANY:
        return _WORTH_LARGE
    return _WORTH_INSIDE if levels.inside() else _WORTH


def _check_donation(leaves: Leaves) -> None:
    if levels.differentiating(leaves.tensors()):
        raise ExecutionError(
            "donate=True would write over what a derivative still needs: call update "
            "under torch.no_grad(), outside of torch.func transforms, or without donate"
        )
    columns = [leaves.params, *leaves.state]
    if layout.overlap([leaves.grads, *columns]) or layout.folded(columns):
        raise ExecutionError(
            "donate=True: gradients, parameters and state must not share memory, and no "
            "element of a donated tensor may stand for several (clone() what is a view)"
        )


def choose(
    rule: Rule,
    kinds: Kinds,
    dtype: torch.dtype,
    device: torch.device,
    least: int,
    untouchable: str | None,
    forced: str | None,
) -> Choice:
    """The first executor that does not refuse.

    ``least`` is how many operations make a derivative by kernels worth while, 0 where
    none is asked for.

    Raises:
        ExecutionError: the one that is forced refuses; the message says why.
    """
    refused = []
    own = [name for name in NAMES if _DEVICES.get(name, device.type) == device.type]
    for name in (forced,) if forced else own:
        reason = None if name == "reference" else untouchable
        if name != "reference" and reason is None:
            reason = _refuses(name, rule, kinds, dtype, device, least)
        if reason is None:
            return Choice(name, refused=tuple(refused))
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
    least: int,
) -> str | None:
    if device.type != _DEVICES.get(name, device.type):
        return f"its kernels run on {_DEVICES[name]}, not on {device.type}"
    try:
        program = rule.program(kinds, reference.computed(dtype))
        if least and name == "foreach":
            return "a derivative is asked for, which foreach makes no faster"
        if sum(op.stream for op in program.ops) < least:
            return "torch's own derivative of so short a rule is as fast here"
        rule.executor(_ENGINES[name], program, dtype)
    except (UntraceableError, BuildError) as error:
        return str(error)
    return None


def _untouchable(leaves: Leaves) -> str | None:
    """Why only torch's own operations may touch these tensors, or None."""
    if torch._C._len_torch_dispatch_stack():
        return "a mode watches each operation"
    for x in (*leaves.grads, *leaves.params):
        if type(x) not in _PLAIN:
            return f"{type(x).__name__} is a tensor subclass"
    for column, scalar in zip(leaves.slots, leaves.rule.scalar):
        for x in () if scalar else column:
            if type(x) not in _PLAIN:
                return f"{type(x).__name__} is a tensor subclass"
    return None


def _run(leaves: Leaves, group: Group, donate: bool) -> Sequence[Column]:
    if group.choice.name == "reference":
        columns = _reference(leaves)
        return _written_over(leaves, columns) if donate else columns
    streams = leaves.streams(group.kinds)
    rows, which = leaves.rows(group.kinds)
    if group.choice.transformed:
        return _transformed(leaves.rule, group, streams, rows, tuple(which))
    executor = _executor(leaves.rule, group)
    alike = layout.alike(streams)
    if not donate:
        return executor(alike, rows, which)
    if any(a is not b for a, b in zip(streams, alike)):
        return _written_over(leaves, executor(alike, rows, which))
    donated = [leaves.params, *leaves.state]
    columns = executor(alike, rows, which, out=donated)
    torch.autograd.graph.increment_version([x for c in donated for x in c])
    return columns


def _transformed(
    rule: Rule,
    group: Group,
    streams: Sequence[Column],
    rows: Sequence[Sequence[Any]],
    which: tuple[int, ...],
) -> list[Column]:
    given = tuple(tuple(isinstance(x, Tensor) for x in row) for row in rows)
    engine, stored = _ENGINES[group.choice.name], streams[0][0].dtype
    key = (group.kinds, engine, stored, which, given)
    form = rule.forms.get(key)
    if form is None:
        if len(rule.forms) >= _MOST_FORMS:
            rule.forms.clear()
        form = rule.forms[key] = Form(rule, group.kinds, engine, stored, which, given)
    columns, scalars = iter(streams), iter(zip(*rows))
    tensors: list[Tensor] = []
    for stream in form.inputs:
        if stream:
            tensors += next(columns)
        else:
            tensors += [x for x in next(scalars) if isinstance(x, Tensor)]
    numbers = tuple(
        tuple(None if isinstance(x, Tensor) else x for x in row) for row in rows
    )
    return form.gather(fused_autograd.run(Call(form, numbers), tensors))


def _reference(leaves: Leaves) -> list[Column]:
    return reference.step(
        leaves.rule,
        leaves.grads,
        leaves.params,
        leaves.slots,
        leaves.steps,
        leaves.hyper,
    )


def _written_over(leaves: Leaves, columns: Sequence[Column]) -> list[Column]:
    """The old tensors with the new values in them; scalars as they are."""
    kept: list[Column] = []
    given = [leaves.params, *leaves.slots]
    with torch.no_grad():
        for old, new, stream in zip(given, columns, leaves.rule.outputs):
            if stream:
                for target, value in zip(old, new):
                    target.copy_(value)
            kept.append(old if stream else new)
    return kept


def _executor(rule: Rule, group: Group) -> Executor:
    stored = group.params[0].dtype
    program = rule.program(group.kinds, reference.computed(stored))
    return rule.executor(_ENGINES[group.choice.name], program, stored)
