"""``donate=True``: what a step may write over, and writing where no kernel does it."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from funcopt import tree
from funcopt.errors import ExecutionError
from funcopt.execution import layout, levels
from funcopt.types import PLAIN, RuleFunction, Tensor, Tree

#: of the rule that runs: None where what it computes may be differentiated or traced,
#: else whether it may write over parameter and state
_given: ContextVar[bool | None] = ContextVar("given", default=None)


@contextmanager
def running(given: bool | None) -> Iterator[None]:
    """Rules run within may write over temporaries; if ``given``, over arguments too.

    Never over gradients. With None they may write over nothing.
    """
    token = _given.set(given)
    try:
        yield
    finally:
        _given.reset(token)


def is_plain() -> bool:
    """Whether what the rule computes is plain arithmetic that nobody looks at.

    No derivative, transform, compiler, dispatch mode or tensor subclass takes part.
    """
    return not torch.compiler.is_compiling() and _given.get() is not None


def is_given() -> bool:
    """Whether the rule that runs may write over parameter and state."""
    return is_plain() and bool(_given.get())


def kept(rule: RuleFunction) -> RuleFunction:
    """The rule, for a caller that needs the arguments afterwards, unchanged."""
    return partial(_kept, rule)


def _kept(rule: RuleFunction, *args: Any, **given: Any) -> tuple[Any, ...]:
    if not is_given():
        return rule(*args, **given)
    with running(given=False):
        return rule(*args, **given)


def check(
    grads: Sequence[Tensor],
    columns: Sequence[Sequence[Tensor]],
    others: Sequence[Any] = (),
) -> None:
    """Whether the ``columns`` of tensors may be written over in a step.

    ``others`` are what else the step is a function of, and may share among themselves.

    Raises:
        ExecutionError: a derivative may be asked for, tensors share memory, or torch
            forbids to write to one here.
    """
    written = [x for column in columns for x in column]
    if _is_followed([*grads, *written, *others]):
        raise ExecutionError(
            "donate=True would write over what a derivative still needs: call update "
            "under torch.no_grad(), outside of torch.func transforms, or without donate"
        )
    if torch.compiler.is_compiling():
        return  # where there are no addresses to compare
    if not permitted(written):
        raise ExecutionError(
            "donate=True: a parameter or its state was made in inference mode, and must "
            "not be written to outside of it: clone() it here, or step in that mode, too"
        )
    grads, *columns = [[*_memory(column)] for column in (grads, *columns)]
    if layout.overlap([grads, *columns]) or layout.folded(columns):
        raise ExecutionError(
            "donate=True: gradients, parameters and state must not share memory, and no "
            "element of a donated tensor may stand for several (clone() what is a view)"
        )
    if layout.meets(_memory(x for x in others if isinstance(x, Tensor)), columns):
        raise ExecutionError(
            "donate=True: a hyperparameter is in memory that is written over; clone() it"
        )


def _is_followed(given: Sequence[Any]) -> bool:
    """Whether a derivative may be asked for; Dynamo sees a transform everywhere."""
    if not torch.compiler.is_compiling():
        return levels.differentiating(given)
    if not torch.is_grad_enabled():
        return False
    return any(isinstance(x, Tensor) and x.requires_grad for x in given)


def permitted(tensors: Iterable[Tensor]) -> bool:
    """Whether torch lets these be written to here: of inference mode only within it."""
    if torch.is_inference_mode_enabled():
        return True
    return not any(map(Tensor.is_inference, tensors))


def check_trees(grads: Tree, *donated: Tree, others: Tree = ()) -> None:
    """As `check`, of what tensors there are in whole trees; gradients may be sparse."""
    g, more, *columns = [
        [x for x in tree.leaves(t) if isinstance(x, Tensor)]
        for t in (grads, others, *donated)
    ]
    check(g, columns, more)


def _memory(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """The tensors in whose memory they lie: of sparse ones, of wrappers as DTensors."""
    for x in tensors:
        if type(x) not in PLAIN and is_traceable_wrapper_subclass(x):
            yield from _memory(getattr(x, name) for name in x.__tensor_flatten__()[0])
        elif x.layout is torch.strided:
            yield x
        elif x.layout is torch.sparse_coo:
            yield from (x._indices(), x._values())


def write_over(old: Tree, new: Tree) -> Tree:
    """``old``, its tensors holding the values of those of ``new``."""
    with torch.no_grad():
        for target, value in zip(tree.leaves(old), tree.leaves(new), strict=True):
            if target is not value:
                target.copy_(value)
    return old
