"""What ``state[p]`` holds: slots and numbers, as torch.optim writes them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from funcopt.spec import Spec
from funcopt.stepping import complex_leaves
from funcopt.types import Tensor


@dataclass(frozen=True)
class StateLayout:
    """How one class writes the state of a parameter.

    ``counts`` says what holds the number of steps: a 0-d tensor, a Python int, or nothing
    (the rule asks at most whether there was a step, and slots tell). ``order`` is that of
    the slots where it is not the rule's. Slots that are one number are of the dtype that
    torch.optim gives them, or of float64 where only funcopt has the rule.
    """

    counts: Literal["tensor", "int", ""] = "tensor"
    order: tuple[str, ...] = ()
    own: bool = False  #: whether torch.optim has no such class
    early: bool = False  #: whether there is one before the first step

    def complete(
        self, state: dict[str, Any], p: Tensor, group: Mapping[str, Any], spec: Spec
    ) -> None:
        """Add what is missing, as it is before the first step."""
        if self.counts and "step" not in state:
            state["step"] = 0 if self.counts == "int" else _number(0.0, p, group)
        for slot in self.order or spec.slots:
            first = spec.slots.get(slot)
            if first is None or state.get(slot) is not None:
                continue
            if callable(first):
                value = complex_leaves.slot(first, p.detach())
                if value.numel() or not p.numel():  # else it has no use for the slot
                    state[slot] = value
            elif self.own:
                state[slot] = torch.tensor(first, dtype=torch.float64, device="cpu")
            else:
                state[slot] = _number(first, p, group)

    def steps(self, state: Mapping[str, Any], spec: Spec) -> int:
        """How many there were."""
        if self.counts:
            return int(state.get("step", 0))
        return int(any(state.get(slot) is not None for slot in spec.slots))


def _number(value: float, p: Tensor, group: Mapping[str, Any]) -> Tensor:
    """A 0-d tensor of the dtype and on the device that torch.optim would choose."""
    fused = group.get("fused")
    wide = torch.get_default_dtype() is torch.float64 and not fused
    return torch.tensor(
        value,
        dtype=torch.float64 if wide else torch.float32,
        device=p.device if fused or group.get("capturable") else "cpu",
    )
