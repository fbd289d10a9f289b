"""Random numbers that are drawn again as they were, where a function is run once more."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from funcopt.errors import ExecutionError
from funcopt.execution import concrete
from funcopt.execution.outside import outside
from funcopt.types import Tensor


class RngState:
    """The states of torch's random generators, of the CPU and of the tensors' devices."""

    def __init__(self, tensors: Iterable[Any]) -> None:
        devices = {x.device for x in tensors if isinstance(x, Tensor)}
        #: what reads the state of each, and what sets it
        self._generators: list[Any] = [(torch.get_rng_state, torch.set_rng_state)]
        for device in devices - {torch.device("cpu"), torch.device("meta")}:
            module = torch.get_device_module(device)
            if hasattr(module, "get_rng_state"):
                read = partial(module.get_rng_state, device)
                self._generators.append(
                    (read, partial(module.set_rng_state, device=device))
                )
        self._states = self._now()

    def has_advanced(self) -> bool:
        """Whether numbers have been drawn since."""
        with outside(), _disable_current_modes():  # fake tensors know no numbers
            return not all(map(torch.equal, self._now(), self._states))

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Draw the same numbers within; the generators go on as if nothing were drawn."""
        now = self._now()
        self._set(self._states)
        try:
            yield
        finally:
            self._set(now)

    def _now(self) -> list[Tensor]:
        return [read() for read, _ in self._generators]

    def _set(self, states: Iterable[Tensor]) -> None:
        for (_, write), state in zip(self._generators, states):
            write(state)


def drawing_again(rng: RngState | None) -> AbstractContextManager[Any]:
    """``rng.restored()`` around one call of a function; none where it drew nothing."""
    return rng.restored() if rng else nullcontext()


def check_alike(losses: Tensor, again: Mapping[int, Tensor]) -> None:
    """The steps made again must have the losses that they had forward.

    Raises:
        ExecutionError: they have others: the gradients would be of another loop.
    """
    if not again:
        return
    made = torch.stack([*again.values()])
    then = losses.detach()  # by whole numbers: a DTensor takes no list of them
    difference = (made - torch.stack([then[k] for k in again])).abs()
    scale = torch.finfo(losses.dtype).eps ** 0.5 * then.abs().amax()
    wrong = concrete.peek(difference > 10 * scale)
    if wrong is not None and bool(wrong.any()):
        raise ExecutionError(
            "with remat and grad_mode='mixed', steps are made again on the way back, and "
            "a loss was not what it had been: loss_fn draws from a generator of its own, "
            "reads what changes outside, such as a variable of the loop around it, or "
            "changes it. torch's own generators are set back; hand "
            "other random numbers in as batches="
        )
