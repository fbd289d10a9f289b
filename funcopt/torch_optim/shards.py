"""DTensors: what of them lies on this rank, which is all that most rules need."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from funcopt.errors import ExecutionError
from funcopt.spec import Spec
from funcopt.types import PLAIN, Tensor


def are_among(tensors: Iterable[Any]) -> bool:
    """Whether one of them is a DTensor."""
    if {*map(type, tensors)} <= PLAIN:
        return False
    from torch.distributed.tensor import DTensor  # no import for those who have none

    return any(isinstance(x, DTensor) for x in tensors)


def goes_by_parts(spec: Spec) -> bool:
    """Whether the rule may step what lies on a rank by itself."""
    return spec.elementwise and not spec.totals


def check(
    spec: Spec, params: Sequence[Tensor], slots: Mapping[str, Sequence[Any]]
) -> None:
    """Whether the rule can step these, and the state lies as the parameters do.

    Norms, totals and Muon's products are right by DTensor's own operations. Other rules
    of whole leaves reshape them, or keep slots of forms of their own.

    Raises:
        ExecutionError: a rule that needs a leaf whole, or a state that is.
    """
    if not spec.traceable and not spec.matrices:
        raise ExecutionError(
            f"{spec.name} needs each parameter whole, and there are DTensors, which are "
            "split over ranks: keep parameters whole by DistributedDataParallel, and "
            "split the state alone by ZeroRedundancyOptimizer; or take another rule"
        )
    for slot, column in slots.items():
        for p, value in zip(params, column):
            if callable(spec.slots[slot]) and _places(value) != _places(p):
                raise ExecutionError(
                    f"'{slot}' of a DTensor of shape {tuple(p.shape)} is not split over "
                    "ranks as that is: load a checkpoint by torch.distributed."
                    "checkpoint.state_dict.set_optimizer_state_dict"
                )


def here(column: Sequence[Any], params: Sequence[Any]) -> list[Any]:
    """What of each tensor lies on this rank: plain tensors in the same memory.

    A gradient that is split otherwise than its parameter is split anew.
    """
    return [
        x if _places(p) is None else _split_as(x, p).to_local()
        for x, p in zip(column, params)
    ]


def write_over(old: Tensor, new: Tensor) -> None:
    """``old.copy_(new)``, of DTensors that may be split otherwise."""
    old.copy_(_split_as(new, old) if _places(new) is not None else new)


def whole(x: Tensor) -> Tensor:
    """The value that all ranks have together."""
    return x.full_tensor() if are_among([x]) else x  # pyright: ignore


def _split_as(x: Any, p: Any) -> Any:
    return x if _places(x) == _places(p) else x.redistribute(p.device_mesh, p.placements)


def _places(x: Any) -> Any:
    """Where the parts lie; None of a tensor that is whole."""
    if type(x) in PLAIN or not isinstance(x, Tensor) or not are_among([x]):
        return None
    it: Any = x
    return it.device_mesh, it.placements
