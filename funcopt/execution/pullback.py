"""The gradients of a function of a list of tensors, by whichever autograd does it."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from funcopt.execution import levels
from funcopt.types import Tensor


def pull(
    function: Callable[[Sequence[Tensor]], Sequence[Tensor]],
    values: Sequence[Tensor],
    cotangents: Sequence[Tensor | None],
    wanted: Sequence[int],
) -> list[Tensor | None]:
    """The gradients by ``wanted`` values, from cotangents of ``function(values)``.

    ``wanted`` are places in ``values``. There may be fewer cotangents than results; None
    stands for zero. By plain autograd, unless a derivative of the gradients may be asked
    for.
    """

    def of_wanted(chosen: Sequence[Tensor]) -> list[Tensor]:
        now = dict(zip(wanted, chosen))
        found = function([now.get(i, x) for i, x in enumerate(values)])
        return [x for x, c in zip(found, cotangents) if c is not None]

    given = [c for c in cotangents if c is not None]
    chosen = [values[i] for i in wanted]
    if not given or not chosen:
        return [None] * len(wanted)
    if levels.differentiating([*values, *given]) or levels.of_inference(chosen):
        made: Any = torch.func.vjp(of_wanted, chosen)
        return made[1](given)[0]
    with torch.enable_grad():
        chosen = [x.detach().requires_grad_() for x in chosen]
        found = [(x, c) for x, c in zip(of_wanted(chosen), given) if x.requires_grad]
    if not found:
        return [None] * len(wanted)
    outputs, given = zip(*found)
    return list(torch.autograd.grad(outputs, chosen, given, allow_unused=True))
