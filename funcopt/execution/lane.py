"""A step like an earlier one: what was decided then holds, and is not asked again."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd import forward_ad

from funcopt.execution import layout
from funcopt.execution.executor import Column, Executor
from funcopt.execution.leaves import Leaves
from funcopt.execution.rule import Kinds
from funcopt.types import Tensor

try:
    # What Dynamo's compiled code asks on entry, of all tensors in one call: the type,
    # shape, strides, dtype, device and requires_grad; and whether the same modes are in
    # force and levels of torch.func open. 0.07 µs a tensor.
    from torch._C._dynamo.guards import TensorGuards as _TensorGuards
except ImportError:  # a private helper: without it every step is looked at anew
    _TensorGuards = None


class Lane:
    """One executor for all leaves of a step, for as long as the tensors are alike.

    Args:
        kinds: of the hyperparameters, which all leaves share.
        executor: what runs the step.
        leaves: the step that was taken.
        vectors: what the state holds for all leaves at once: steps, scalar slots.
    """

    def __init__(
        self, kinds: Kinds, executor: Executor, leaves: Leaves, vectors: Sequence[Tensor]
    ) -> None:
        columns = [leaves.grads, leaves.params, *leaves.state]
        tensors = [x for column in columns for x in column] + [*vectors]
        self._executor = executor
        self._rule = leaves.rule
        self._kinds = kinds
        self._names = leaves.rule.scalars(kinds)
        self._direct = executor.direct(leaves.params)
        shapes: list[Any] = [list(x.shape) for x in tensors]
        strides: list[Any] = [list(x.stride()) for x in tensors]
        self._guard = _TensorGuards and _TensorGuards(
            *tensors, dynamic_dims_sizes=shapes, dynamic_dims_strides=strides
        )
        self._needs_no_grad = any(x.requires_grad for x in tensors)
        self._numbers: dict[str, Any] | None = None  # values that were looked at before
        self._apart: list[int] = []  # addresses of which no two tensors overlap

    def admits(self, tensors: Sequence[Any]) -> bool:
        """Whether these are like those that the lane was made for."""
        return (
            self._guard is not None
            and forward_ad._current_level < 0
            and not (self._needs_no_grad and torch.is_grad_enabled())
            and self._guard.check(*tensors)
        )

    def run(
        self,
        streams: Sequence[Column],
        numbers: Sequence[list[Any]],
        hyper: Sequence[dict[str, Any]],
        donate: bool,
    ) -> Sequence[Column] | None:
        """The columns ``p, *slots``; None where this step needs to be looked at.

        ``streams`` are gradients, parameters and slots; ``numbers`` the scalar slots and
        the steps.
        """
        values = hyper[0]
        if values is not self._numbers and not self._takes(values):
            return None
        if any(row is not values for row in hyper):
            return None
        if any(column.count(column[0]) != len(column) for column in numbers):
            return None
        addresses = [address for column in streams for address in map(_address, column)]
        if donate and addresses != self._apart:
            if layout.overlap(streams) or layout.folded(streams[1:]):
                return None
            self._apart = addresses
        out = (
            streams[1:]
            if donate
            else self._rule.recycler.columns(streams[1], len(streams) - 1)
        )
        row = [column[0] for column in numbers]
        row += map(values.__getitem__, self._names)
        columns = self._direct(streams, addresses, row, out)
        if columns is not None and donate:
            torch.autograd.graph.increment_version(
                [x for column in streams[1:] for x in column]
            )
        return columns

    def _takes(self, values: dict[str, Any]) -> bool:
        """Whether the hyperparameters are of the kinds that the lane was made for."""
        if self._rule.kinds(values) != self._kinds:
            return False
        tensors = [x for x in values.values() if isinstance(x, Tensor)]
        if any(type(x) is not Tensor or x.requires_grad for x in tensors):
            return False
        if not tensors:
            self._numbers = values
        return True


_address = Tensor.data_ptr
