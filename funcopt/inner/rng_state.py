"""Random numbers that are drawn again as they were, where a function is run once more."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from funcopt.execution import levels
from funcopt.types import Tensor


class RngState:
    """The states of torch's random generators, of the CPU and of the tensors' devices."""

    def __init__(self, tensors: Iterable[Any]) -> None:
        self.states: dict[Any, Tensor] = {None: torch.get_rng_state()}
        devices = {x.device for x in tensors if isinstance(x, Tensor)}
        for device in devices - {torch.device("cpu")}:
            module = torch.get_device_module(device)
            if hasattr(module, "get_rng_state"):
                self.states[device] = module.get_rng_state(device)

    def has_advanced(self) -> bool:
        """Whether numbers have been drawn since."""
        with levels.outside():
            now = RngState([])._of(self.states)
            return not all(torch.equal(now[d], s) for d, s in self.states.items())

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Draw the same numbers within; the generators go on as if nothing were drawn."""
        now = self._of(self.states)
        self._restore(self.states)
        try:
            yield
        finally:
            self._restore(now)

    @staticmethod
    def _of(devices: Iterable[Any]) -> dict[Any, Tensor]:
        return {
            d: torch.get_rng_state()
            if d is None
            else torch.get_device_module(d).get_rng_state(d)
            for d in devices
        }

    @staticmethod
    def _restore(states: dict[Any, Tensor]) -> None:
        for device, state in states.items():
            if device is None:
                torch.set_rng_state(state)
            else:
                torch.get_device_module(device).set_rng_state(state, device)
