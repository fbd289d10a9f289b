"""What a state holds for all leaves at once: the steps and scalar slots."""

from collections.abc import Sequence
from typing import Any

import torch

from funcopt import tree
from funcopt.errors import ExecutionError, HyperparameterError
from funcopt.types import Tensor


def filled(leaves: Sequence[Any], value: float, dtype: torch.dtype) -> Tensor:
    """A vector with ``value`` for each leaf."""
    return torch.full((len(leaves),), value, dtype=dtype, device=device_of(leaves))


def first_steps(leaves: Sequence[Any]) -> Tensor:
    """No step of any leaf: on the CPU, where the number is known without a wait.

    With the leaves where a graph is made, which is to be on one device.
    """
    traced = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack()
    together = traced or is_captured(leaves)
    device = device_of(leaves) if together else torch.device("cpu")
    return torch.zeros(len(leaves), dtype=torch.int64, device=device)


def is_captured(leaves: Sequence[Any]) -> bool:
    """Whether what is done with these is not done, but put into a CUDA graph."""
    if not any(isinstance(x, Tensor) and x.is_cuda for x in leaves):
        return False
    return torch.cuda.is_current_stream_capturing()


def check_captured(steps: Tensor, leaves: Sequence[Any]) -> None:
    """Raises if a CUDA graph would make the same step at each replay."""
    if steps.is_cpu and is_captured(leaves):
        raise ExecutionError(
            "a CUDA graph is captured, whose replays would all make the step of now: the "
            "state's 'step' is on the CPU; move it to the parameters' device before, as "
            "in state['step'] = state['step'].cuda(), in each part of the state"
        )


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
    # In parts, as a mask would have to be sent to the device; and none in place, which
    # torch.func.linearize does anew at each call (pytorch 2.13).
    parts, at = [], 0
    for begin, end in _runs(live):
        parts += [steps[at:begin], steps[begin:end] + 1]
        at = end
    return torch.cat([*parts, steps[at:]])


def _runs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """The spans, end excluded, that rising numbers fill."""
    begins = [i for k, i in enumerate(numbers) if not k or numbers[k - 1] != i - 1]
    ends = [i + 1 for i, after in zip(numbers, [*numbers[1:], -1]) if after != i + 1]
    return [*zip(begins, ends)]
