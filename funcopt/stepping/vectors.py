"""What a state holds for all leaves at once: the steps and scalar slots."""

from collections.abc import Sequence
from typing import Any

import torch

from funcopt import tree
from funcopt.errors import HyperparameterError
from funcopt.types import Tensor


def filled(leaves: Sequence[Any], value: float, dtype: torch.dtype) -> Tensor:
    """A vector with ``value`` for each leaf."""
    return torch.full((len(leaves),), value, dtype=dtype, device=device_of(leaves))


def device_of(leaves: Sequence[Any]) -> torch.device:
    """Where what is kept for all leaves at once is: their one device, or the CPU."""
    devices = {p.device for p in leaves if p is not None}
    return devices.pop() if len(devices) == 1 else torch.device("cpu")


def of_column(
    column: Sequence[Any], old: Tensor, what: str, structure: tree.Structure
) -> Tensor:
    """The numbers of a scalar slot, floats or 0-d tensors, as the next ``old``."""
    like = {"dtype": torch.float64, "device": old.device}
    if all(isinstance(x, float) for x in column):
        return torch.tensor(column, **like)
    for i, x in enumerate(column):
        if isinstance(x, Tensor) and x.ndim:
            raise HyperparameterError(
                f"{what} is one number per leaf, but at '{tree.paths(structure)[i]}' it "
                f"would have shape {tuple(x.shape)}: the hyperparameters that it is made "
                "of must be floats or 0-d tensors"
            )
    return torch.stack([torch.as_tensor(x, **like) for x in column])


def next_steps(steps: Tensor, live: list[int] | None) -> Tensor:
    """Steps count per leaf: a leaf without a gradient does not step."""
    if live is None:
        return steps + 1
    new = steps.clone()
    for begin, end in _runs(live):  # a mask would have to be sent to the device
        new[begin:end] += 1
    return new


def _runs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """The spans, end excluded, that rising numbers fill."""
    begins = [i for k, i in enumerate(numbers) if not k or numbers[k - 1] != i - 1]
    ends = [i + 1 for i, after in zip(numbers, [*numbers[1:], -1]) if after != i + 1]
    return [*zip(begins, ends)]
