"""Steps that are made or left out, by what the numbers say."""

from collections.abc import Callable

import torch

from funcopt import tree
from funcopt.execution import concrete
from funcopt.stepping import vectors
from funcopt.types import Tensor, Tree


def choose(
    condition: Tensor,
    then: Callable[[], Tree],
    otherwise: Callable[[], Tree],
    guarded: Callable[[], Tree] | None = None,
) -> Tree:
    """``then()`` or ``otherwise()``, and only that, where the condition can be read.

    It cannot be read under vmap, where tasks differ, nor on an accelerator without
    waiting. There both are computed, and ``torch.where`` chooses; ``guarded`` is called
    in place of ``then`` there, where that might give what is not finite when it is not
    chosen, and so a NaN derivative.
    """
    if concrete.readable(condition):
        return then() if bool(condition) else otherwise()

    def chosen(x: Tensor, y: Tensor) -> Tensor:
        if x is y:
            return x
        # What is kept on the CPU, as steps are, goes to the condition: to bring that to
        # the CPU would be to wait for it.
        x, y = (z.to(condition.device) if z.is_cpu else z for z in (x, y))
        return torch.where(condition, x, y)

    return tree.map(chosen, (guarded or then)(), otherwise())


def counter(params: Tree) -> Tensor:
    """A 0-d int64 zero where the parameters are."""
    device = vectors.device_of(tree.leaves(params))
    return torch.zeros((), dtype=torch.int64, device=device)
