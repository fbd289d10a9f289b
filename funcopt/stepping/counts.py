"""The steps of all leaves as Python's numbers, where they lie on an accelerator."""

from collections.abc import MutableMapping, Sequence

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from funcopt.execution import concrete, levels
from funcopt.types import Tensor

# Vectors that a CUDA graph was captured with: its replays count on in them, which neither
# the tensor nor its version tells.
_captured: MutableMapping[Tensor, bool] = WeakTensorKeyDictionary()


class Counts:
    """What the host knows of vectors of steps, without waiting for their device.

    What a step makes of numbers that are known is remembered for as long as the tensor
    lives and nobody writes to it. A vector that comes from elsewhere, from a checkpoint
    say, is waited for once.
    """

    def __init__(self) -> None:
        #: of each vector its version, and its numbers
        self._known: MutableMapping[Tensor, tuple[int, Sequence[int]]]
        self._known = WeakTensorKeyDictionary()

    def read(self, steps: Tensor) -> Sequence[int] | None:
        """The numbers; None where there are none to read, or a graph is captured."""
        if concrete.on_host(steps):
            return steps.tolist()
        if not concrete.has_values(steps):
            return None
        steps = levels.bottom(steps)
        if _is_capturing(steps):
            _captured[steps] = True
            return None
        version, numbers = self._known.get(steps, (None, ()))
        if version is None or version != _version(steps):
            return _waited_for(steps)
        return numbers

    def after(
        self, steps: Tensor, live: Sequence[int] | None = None
    ) -> Sequence[int] | None:
        """The numbers after one more step of the ``live`` leaves, or of all.

        None on the CPU, where they can be read then, and if these are not known.
        """
        known = None if concrete.on_host(steps) else self.read(steps)
        if known is None:
            return None
        numbers = [*known]
        for i in range(len(numbers)) if live is None else live:
            numbers[i] += 1
        return numbers

    def remember(self, steps: Tensor, numbers: Sequence[int] | None) -> None:
        """That a vector, just made or written to, has these numbers, if they are known.

        One on the CPU can be read.
        """
        if numbers is None or concrete.on_host(steps) or not concrete.has_values(steps):
            return
        steps = levels.bottom(steps)
        if _is_capturing(steps):
            _captured[steps] = True
        version = _version(steps)
        if version is not None and steps not in _captured:
            self._known[steps] = version, numbers

    def follow(self, steps: Tensor, other: Tensor) -> None:
        """That a vector has now the numbers of another, if those are known."""
        if steps is not other and other in self._known:
            self.remember(steps, self._known[other][1])


def _is_capturing(steps: Tensor) -> bool:
    return steps.is_cuda and torch.cuda.is_current_stream_capturing()


def _waited_for(steps: Tensor) -> list[int]:
    return steps.tolist()


def _version(steps: Tensor) -> int | None:
    """How often it was written to; None where nobody counts."""
    return None if steps.is_inference() else steps._version
