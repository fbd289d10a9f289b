"""Run a step: each group of leaves by what was chosen for it."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from operator import is_
from typing import Any

import torch

from funcopt.errors import ExecutionError
from funcopt.execution import (
    concrete,
    donation,
    executor_choice,
    fused_autograd,
    layout,
    levels,
    reference,
    stacked,
)
from funcopt.execution.call_signature import CallSignature
from funcopt.execution.executor import Column, Executor, Maker, Rows
from funcopt.execution.executor_choice import ENGINES, LeafGroup
from funcopt.execution.executor_path import ExecutorPath
from funcopt.execution.fast_path import AutogradPath, FastPath, ReferencePath, WholePath
from funcopt.execution.group_paths import GroupPaths
from funcopt.execution.leaves import Leaves, put
from funcopt.execution.rule_call import RuleCall
from funcopt.types import Tensor

_MOST_SIGNATURES = 64  # of the calls of one rule


def step(
    leaves: Leaves,
    name: str | None = None,
    donate: bool = False,
    vectors: Sequence[Tensor] = (),
) -> tuple[Sequence[Column], FastPath | None]:
    """One update of every leaf: the columns ``p, *slots``, and a path for the next step.

    By the fastest executor that may run it, or by the one that is named. With ``donate``
    parameters and state are written over, and are what is returned. ``vectors`` are what
    the state holds for all leaves at once; where they cannot be read, no path is made.

    Raises:
        ExecutionError: the executor that is named refuses, or donated tensors may not
            be written over; nothing has changed then.
    """
    written = [leaves.params, *leaves.state, vectors]
    if torch.compiler.is_compiling():  # the plain rule is what the compiler fuses
        if name:
            executor_choice.known(name)
        if donate:
            # Dynamo cannot trace the lock of the cached property behind hyper_values.
            given = [x for values in leaves.hyper for x in values.values()]
            donation.check(leaves.grads, written, given)
        plain = reference.step(leaves)
        return (_written_over(leaves, plain) if donate else plain), None
    groups, tasks = executor_choice.groups(leaves, name), leaves.tasks
    choices = [group.choice for group in groups]
    if tasks and any(c.transformed or c.name not in ENGINES for c in choices):
        raise ExecutionError(f"{leaves.rule.name}'s tasks cannot be run together")
    if donate:
        donation.check(leaves.grads, written, leaves.hyper_values)
    readable = all(concrete.readable(x) and not levels.may_be_tracked(x) for x in vectors)
    free = readable and name is None and executor_choice.is_free()
    free = free and donation.permitted(chain(*written))  # a path does not look again
    if len(groups) == 1 and len(groups[0].which) == len(leaves.params):
        path = _path(leaves, groups[0]) if free else None
        return _run(leaves, groups[0], donate), path
    paths = _paths(leaves, groups, by_rows=False) if free else None
    columns: list[list[Any]] = [[None] * len(leaves.params) for _ in leaves.rule.outputs]
    for group in groups:
        put(columns, group.which, _run(leaves.pick(group.which), group, donate))
    if not paths:
        return columns, None
    in_place = partial(step, donate=True)
    return columns, GroupPaths(leaves.rule, paths, in_place)


def fast_paths(leaves: Leaves) -> list[tuple[list[int], FastPath]] | None:
    """The leaves that go one way, and a fast path for them; None if a leaf has none.

    It is given a row of scalars for each of ``leaves.rows``, of the leaves picked.
    """
    if not executor_choice.is_free():
        return None
    return _paths(leaves, executor_choice.groups(leaves), by_rows=True)


def _paths(
    leaves: Leaves, groups: Sequence[LeafGroup], by_rows: bool
) -> list[tuple[list[int], FastPath]] | None:
    """A fast path for each group, if all have one; ``by_rows`` as for `fast_paths`."""
    made = []
    for group in groups:
        some = leaves.pick(group.which)
        path = _path(
            some, group, some.rows(group.kinds, apart=True)[1] if by_rows else None
        )
        if path is None:
            return None
        made.append((group.which, path))
    return made


def _path(
    leaves: Leaves, group: LeafGroup, which: Sequence[int] | None = None
) -> FastPath | None:
    """A fast path for steps like this one, if its leaves go one way as they are."""
    elements = leaves.rule.streams(group.kinds)
    if levels.in_forward_mode() or executor_choice.untouchable(leaves):
        return None
    if group.choice.transformed and group.choice.name == "reference":
        return ReferencePath(leaves.rule, group.kinds, len(leaves.params))
    if levels.inside() or elements and which is not None:
        return None
    if group.choice.name not in ENGINES:
        if leaves.rule.sums or group.choice.transformed or elements:
            return None
        run = partial(_run_whole, group.choice.name)
        return WholePath(leaves.rule, group.kinds, len(leaves.params), run, which)
    columns = leaves.streams(group.kinds)
    alike, own = layout.alike(columns), len(leaves.state)
    if any(a is not b for a, b in zip(columns[1 : 2 + own], alike[1:])):
        return None
    pairs = enumerate(zip(chain(*columns), chain(*alike)))
    copied = {i: (new.shape, new.stride()) for i, (x, new) in pairs if x is not new}
    if copied and group.choice.transformed:
        return None
    given = [[values[name] for values in leaves.hyper] for name in elements]
    if group.choice.transformed:
        rows, _ = leaves.rows(group.kinds)
        return AutogradPath(_signature(leaves, group), rows, [*chain(*given)])
    tasks, spread = leaves.tasks, []
    if leaves.rule.elementwise and not tasks:
        tasks, spread = layout.spread(given, leaves.params)
        spread = [2 + own + k for k in spread]
    return ExecutorPath(
        _executor(group),
        group.kinds,
        leaves.params,
        leaves.rule,
        which,
        [*chain(*given)],
        tasks,
        {i: how for i, how in copied.items() if i // len(leaves.params) not in spread},
        spread,
    )


def _run(leaves: Leaves, group: LeafGroup, donate: bool) -> Sequence[Column]:
    if group.choice.name not in ENGINES:
        plain = not (group.choice.transformed or executor_choice.untouchable(leaves))
        return _run_whole(group.choice.name, leaves, donate, plain)
    streams = leaves.streams(group.kinds)
    rows, which = leaves.rows(group.kinds)
    if group.choice.transformed:
        columns = _transformed(_signature(leaves, group), streams, rows)
        # A level of forward mode that another thread has opened is this one's, too.
        return _written_over(leaves, columns) if donate else columns
    executor, alike = _executor(group), layout.alike(streams)
    donated = [leaves.params, *leaves.state]
    written = sum(map(executor.program.is_stream, executor.program.outputs))
    if written != len(donated):  # a number per leaf has elements: the stepper refuses it
        donate = False
    in_place = donate and all(map(is_, streams, alike))
    out = donated if in_place else None
    if out is None and group.choice.name == "native":  # what writes where it is told to
        out = leaves.rule.recycler.columns(Maker(alike[1]), written)
    columns = executor(alike, rows, which, out=out, tasks=leaves.tasks)
    if in_place:
        torch.autograd.graph.increment_version([x for c in donated for x in c])
    return _written_over(leaves, columns) if donate and not in_place else columns


def _run_whole(
    name: str, leaves: Leaves, donate: bool, plain: bool = True
) -> Sequence[Column]:
    with donation.running(given=donate if plain else None):
        if name == "reference":
            columns = reference.step(leaves)
        else:
            columns = stacked.step(leaves, apart=not donate)
    return _written_over(leaves, columns) if donate else columns


def _transformed(
    signature: CallSignature, streams: Sequence[Column], rows: Rows
) -> list[Column]:
    tensors = signature.arranged(streams, rows)
    numbers = tuple(
        tuple(None if isinstance(x, Tensor) else x for x in row) for row in rows
    )
    return signature.gather(fused_autograd.run(RuleCall(signature, numbers), tensors))


def _signature(leaves: Leaves, group: LeafGroup) -> CallSignature:
    rule, (rows, which) = leaves.rule, leaves.rows(group.kinds)
    given = tuple(tuple(isinstance(x, Tensor) for x in row) for row in rows)
    engine, stored = ENGINES[group.choice.name], group.params[0].dtype
    key = (group.kinds, engine, stored, tuple(which), given)
    signature = rule.signatures.get(key)
    if signature is None:
        if len(rule.signatures) >= _MOST_SIGNATURES:
            rule.signatures.clear()
        # One that holds no signatures: a rule that held itself would keep the buffers of
        # its results until the garbage is looked through.
        own = replace(rule, signatures={})
        signature = rule.signatures[key] = CallSignature(
            own, group.kinds, engine, stored, tuple(which), given
        )
    return signature


def _written_over(leaves: Leaves, columns: Sequence[Column]) -> list[Column]:
    """The old tensors with the new values in them; scalars as they are."""
    kept: list[Column] = []
    given = [leaves.params, *leaves.slots]
    with torch.no_grad():
        for old, new, stream in zip(given, columns, leaves.rule.outputs):
            if not stream:
                kept.append(new)
                continue
            pairs = [(a, b) for a, b in zip(old, new) if a is not b and a.numel()]
            if pairs:
                _copy(*map(list, zip(*pairs)))
            kept.append(old)
    return kept


def _copy(old: list[Tensor], new: list[Tensor]) -> None:
    """One by one where a compiler fuses them, and where one is negated lazily.

    The operation on lists refuses lazy negatives; Dynamo cannot ask whether one is.
    """
    if torch.compiler.is_compiling() or any(map(Tensor.is_neg, old)):
        for target, value in zip(old, new):
            target.copy_(value)
    else:
        torch._foreach_copy_(old, new)  # pyright: ignore[reportPrivateImportUsage]


def _executor(group: LeafGroup) -> Executor:
    stored = group.params[0].dtype
    program = group.rule.program(group.kinds, reference.computed(stored))
    return group.rule.executor(ENGINES[group.choice.name], program, stored)
