"""Conditions and numbers of an algorithm in which each task may take its own branch.

Where a derivative, transform or mode takes part they are tensors, and a choice is made
for each task; else Python's, which cost next to nothing, and a choice is a branch.
"""

from typing import Any, TypeAlias, cast

import torch

from funcopt.execution import concrete, levels
from funcopt.types import Tensor

Condition: TypeAlias = Tensor | bool
Number: TypeAlias = Any  #: a 0-d tensor, or Python's


def everywhere(condition: Condition) -> bool:
    """Whether it is seen to hold, for every task of a batch; False if nothing is seen."""
    if isinstance(condition, bool):
        return condition
    found = concrete.peek(condition)
    return found is not None and bool(found.all())


def no(condition: Any) -> Any:
    """The opposite."""
    return not condition if isinstance(condition, bool) else ~condition


def decided(condition: Condition) -> bool | None:
    """The condition's value if it is the same for every task; else None.

    None also where values cannot be seen, or only by waiting for an accelerator.
    """
    if isinstance(condition, bool):
        return condition
    found = concrete.peek(condition)
    if found is None or not found.is_cpu:
        return None
    if not found.ndim:
        return bool(found)
    return bool(found.all()) or (None if found.any() else False)


def where(condition: Condition, a: Any, b: Any) -> Any:
    """``a`` where it holds, else ``b``: that very tensor, if all tasks agree."""
    known = decided(condition)
    if known is not None:
        return a if known else b
    return torch.where(cast(Tensor, condition), a, b)


def most(counts: Tensor, otherwise: int) -> int:
    """The largest number of all tasks; ``otherwise`` where none can be seen."""
    found = concrete.peek(counts)
    return otherwise if found is None or not found.numel() else int(found.max())


def alone(x: Tensor) -> bool:
    """Whether neither autograd nor a transform nor a mode follows what is computed."""
    followed = torch.is_grad_enabled() or levels.inside() or levels.in_forward_mode()
    return not followed and concrete.readable(x)
