"""Which executor runs which leaves, and why the faster ones do not."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import chain
from typing import Any, NamedTuple

import torch

from funcopt.errors import ExecutionError
from funcopt.execution import levels, reference, stacked
from funcopt.execution.executor import BuildError, Column, Engine, Executor, PerTask
from funcopt.execution.foreach import Foreach
from funcopt.execution.leaves import Leaves
from funcopt.execution.native import objects
from funcopt.execution.native.kernels import Native
from funcopt.execution.program import Program
from funcopt.execution.rule import Kinds, Rule
from funcopt.execution.trace import UntraceableError
from funcopt.types import PLAIN, Tensor


def _triton(program: Program, stored: torch.dtype) -> Executor:
    """Triton is imported when the first tensor on a GPU is stepped."""
    from funcopt.execution.triton.kernels import Triton

    return Triton(program, stored)


ENGINES: dict[str, Engine] = {"native": Native, "triton": _triton, "foreach": Foreach}
_DEVICES = {"native": "cpu", "triton": "cuda"}  # foreach runs on any
#: what `execution` and ``execution=`` take
NAMES = (*ENGINES, "stacked", "reference")

_forced: ContextVar[str | None] = ContextVar("execution", default=None)
_observer: ContextVar["list[LeafGroup] | None"] = ContextVar("observer", default=None)

# A derivative by kernels costs as much as torch's own of so many operations: in plain
# autograd, inside torch.func, in forward mode, and on leaves of _MANY elements, where
# arithmetic is what costs. Measured on steps of the sinusoid network, looped and vmapped.
_WORTH, _WORTH_INSIDE, _WORTH_FORWARD, _WORTH_LARGE = 6, 12, 5, 4
_MANY = 1 << 15

_VALUES = PLAIN | {int, float, PerTask}  # what a number or hyperparameter mostly is


@contextmanager
def execution(name: str) -> Iterator[None]:
    """Have every update within run by one executor, or raise with its reason.

    Args:
        name: ``"native"`` (C kernels, on a CPU), ``"triton"`` (on CUDA), ``"foreach"``
            (lists of tensors, on any device), ``"stacked"`` (leaves that are alike as
            one, for rules that need a leaf whole) or ``"reference"`` (the rule on each
            leaf, the definition of correct).

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
    token = _forced.set(known(name))
    try:
        yield
    finally:
        _forced.reset(token)


@contextmanager
def observed() -> Iterator[list["LeafGroup"]]:
    """Collects what is chosen for each group of leaves in the updates within."""
    seen: list[LeafGroup] = []
    token = _observer.set(seen)
    try:
        yield seen
    finally:
        _observer.reset(token)


def known(name: str) -> str:
    """The name, if it is one of `NAMES`; raises ExecutionError if not."""
    if name not in NAMES:
        raise ExecutionError(
            f"there is no execution '{name}'; it is one of {', '.join(NAMES)}"
        )
    return name


class Choice(NamedTuple):  # made at once, where a frozen dataclass takes a while
    """What runs some leaves, and why what would be faster does not."""

    name: str  #: one of `NAMES`
    derivative: bool = False  #: kernels compute the derivative, too
    transformed: bool = False  #: the derivative is asked for, or this is inside vmap
    refused: tuple[tuple[str, str], ...] = ()  #: (name, sentence) of those before it


class LeafGroup(NamedTuple):
    """Leaves that run together, and what runs them."""

    rule: Rule
    kinds: Kinds
    which: list[int]
    params: Column
    choice: Choice


def is_forced() -> bool:
    """Whether one executor is to run all updates."""
    return _forced.get() is not None


def is_free() -> bool:
    """Whether a fast path may be taken: none is forced, no mode or `observed` open."""
    return not _is_watched() and _forced.get() is None and _observer.get() is None


#: whether a mode, as make_fx's, watches each operation
_is_watched = torch._C._len_torch_dispatch_stack


def groups(leaves: Leaves, name: str | None = None) -> list[LeafGroup]:
    """The leaves that run together: of one dtype and device, and kinds of values.

    By the fastest executor that may run them; or by the one of this ``name``, or else
    the one that `execution` forces.

    Raises:
        ExecutionError: that one refuses; the message says why.
    """
    forced = known(name) if name else _forced.get()
    look = objects.load().look
    plain, alike, asked = look(leaves.grads, leaves.params, *leaves.state)
    scalars = leaves.scalars()
    asked = asked or look(scalars)[2]
    plain = plain and {*map(type, scalars)} <= _VALUES
    forbidden = None if plain and not _is_watched() else untouchable(leaves)
    transformed = levels.differentiating(()) or (asked and torch.is_grad_enabled())
    followed = transformed and levels.followed(leaves.tensors())
    kernels, whole = forbidden, transformed and not leaves.rule.elementwise
    if whole:
        kernels = f"{leaves.rule.name} needs each leaf, and each task's, whole"
    if leaves.rule.sums and (whole or forced == "stacked"):
        forced = None  # what is forced is the step, not its totals
    made = []
    for (dtype, device, kind), which in _alike(leaves, alike).items():
        some, reasons = leaves.pick(which), dict.fromkeys(ENGINES, kernels)
        if not leaves.rule.elementwise or forced:
            reasons["stacked"] = forbidden or stacked.refuses(some, bool(forced))
        least = _least_worth(some) if followed and not forced else 0
        chosen, refused = _choose(
            leaves.rule, kind, dtype, device, least, reasons, forced
        )
        choice = Choice(chosen, followed and chosen in ENGINES, transformed, refused)
        made.append(LeafGroup(leaves.rule, kind, which, some.params, choice))
    observer = _observer.get()
    if observer is not None:
        observer.extend(made)
    return made


def _alike(
    leaves: Leaves, alike: bool
) -> dict[tuple[torch.dtype, torch.device, Kinds], list[int]]:
    """The leaves of each dtype, device, and kinds of hyperparameters.

    ``alike`` says that their dtype and device are known to be one.
    """
    kinds = {key: leaves.rule.kinds(v) for key, v in leaves.distinct_hyper.items()}
    if alike and len(kinds) == 1:  # most steps: no leaf is looked at by itself
        p, (kind,) = leaves.params[0], kinds.values()
        return {(p.dtype, p.device, kind): [*range(len(leaves.params))]}
    found: dict[Any, list[int]] = {}
    for i, (p, values) in enumerate(zip(leaves.params, leaves.hyper)):
        found.setdefault((p.dtype, p.device, kinds[id(values)]), []).append(i)
    return found


def _least_worth(leaves: Leaves) -> int:
    """How many operations a rule must have for kernels to be the faster derivative."""
    if sum(p.numel() for p in leaves.params) >= _MANY:
        return _WORTH_LARGE
    if levels.only_forward(leaves.tensors()):
        return _WORTH_FORWARD
    return _WORTH_INSIDE if levels.inside() else _WORTH


def _choose(
    rule: Rule,
    kinds: Kinds,
    dtype: torch.dtype,
    device: torch.device,
    least: int,
    reasons: Mapping[str, str | None],
    forced: str | None,
) -> tuple[str, tuple[tuple[str, str], ...]]:
    """The first executor that does not refuse, and why those before it do.

    ``least`` is how many operations make a derivative by kernels worth while, 0 where
    none is asked for; ``reasons`` say why an executor refuses these leaves, if it does.

    Raises:
        ExecutionError: the one that is forced refuses; the message says why.
    """
    refused, kind = [], device.type
    for name in (forced,) if forced else (*reasons, "reference"):
        if not forced and _DEVICES.get(name, kind) != kind:
            continue
        reason = reasons.get(name)
        if name in ENGINES and reason is None:
            reason = _refuses(name, rule, kinds, dtype, device, least)
        if reason is None:
            return name, tuple(refused)
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
        if least and sum(op.stream for op in program.ops) < least:
            return "torch's own derivative of so short a rule is as fast here"
        rule.executor(ENGINES[name], program, dtype)
    except (UntraceableError, BuildError) as error:
        return str(error)
    return None


def untouchable(leaves: Leaves) -> str | None:
    """Why only torch's own operations may touch these tensors, or None."""
    if _is_watched():
        return "a mode watches each operation"
    given = chain(leaves.grads, leaves.params, *leaves.state, leaves.scalars())
    types = {type(x) for x in given if isinstance(x, Tensor)} - PLAIN
    return f"{types.pop().__name__} is a tensor subclass" if types else None
