"""A step like an earlier one: what was decided then holds, and is not asked again."""

from array import array
from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd import forward_ad

from funcopt.execution import layout
from funcopt.execution.executor import Column, Executor
from funcopt.execution.leaves import Leaves
from funcopt.execution.recycle import Recycler
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
    """One executor for all leaves of a step, for as long as the tensors are alike."""

    def __init__(
        self, kinds: Kinds, executor: Executor, tensors: Sequence[Tensor]
    ) -> None:
        self.executor = executor
        self._kinds = kinds
        self._guard = _TensorGuards and _TensorGuards(
            *tensors,
            dynamic_dims_sizes=[list(x.shape) for x in tensors],
            dynamic_dims_strides=[list(x.stride()) for x in tensors],
        )
        self._needs_no_grad = any(x.requires_grad for x in tensors)
        self._recycler = Recycler()
        self._numbers: dict[str, Any] | None = None  # values that were looked at before
        self._apart = array("Q")  # addresses of which no two overlap

    def admits(self, tensors: Sequence[Any]) -> bool:
        """Whether these are like those that the lane was made for."""
        return (
            self._guard is not None
            and forward_ad._current_level < 0
            and not (self._needs_no_grad and torch.is_grad_enabled())
            and self._guard.check(*tensors)
        )

    def run(self, leaves: Leaves, donate: bool) -> list[Column] | None:
        """The columns ``p, *slots``; None where this step needs to be looked at."""
        if not self._takes(leaves):
            return None
        streams = [leaves.grads, leaves.params, *leaves.state]
        donated = streams[1:] if donate else None
        if donate and not self._are_apart(streams):
            return None
        first = [column[0] for column in leaves.numbers]
        if all(c.count(x) == len(c) for c, x in zip(leaves.numbers, first)):
            values = leaves.hyper[0]
            rows = [(*first, *(values[x] for x in leaves.rule.scalars(self._kinds)))]
            which = [0] * len(leaves.params)
        else:
            rows, which = leaves.rows(self._kinds)
        out = donated or self._recycler.columns(leaves.params, len(streams) - 1)
        columns = self.executor(streams, rows, which, out=out)
        if donated:
            torch.autograd.graph.increment_version([x for c in donated for x in c])
        return columns

    def _takes(self, leaves: Leaves) -> bool:
        """Whether all leaves share hyperparameters of the kinds the lane was made for."""
        values = leaves.hyper[0]
        if any(row is not values for row in leaves.hyper):
            return False
        if values is self._numbers:
            return True
        if leaves.rule.kinds(values) != self._kinds or "stream" in self._kinds:
            return False
        tensors = [x for x in values.values() if isinstance(x, Tensor)]
        if any(type(x) is not Tensor or x.requires_grad for x in tensors):
            return False
        if not tensors:
            self._numbers = values
        return True

    def _are_apart(self, columns: Sequence[Column]) -> bool:
        addresses = array("Q")
        for column in columns:
            addresses.extend(map(Tensor.data_ptr, column))
        if addresses != self._apart:
            if layout.overlap(columns) or layout.folded(columns[1:]):
                return False
            self._apart = addresses
        return True
