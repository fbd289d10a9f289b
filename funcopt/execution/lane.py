"""A step like an earlier one: what was decided then holds, and is not asked again."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch

from funcopt.execution import fused_autograd, layout
from funcopt.execution.call import Call
from funcopt.execution.executor import Column, Executor, read_number
from funcopt.execution.form import Form
from funcopt.execution.guard import Known
from funcopt.execution.rule import Kinds, Rule
from funcopt.types import Tensor


class Lane(ABC):
    """One way for all leaves of a step, for as long as the tensors are alike.

    Args:
        rule: that is run.
        kinds: of the hyperparameters, which all leaves share.
    """

    def __init__(self, rule: Rule, kinds: Kinds) -> None:
        self._rule = rule
        self._kinds = kinds
        self._names = rule.scalars(kinds)
        self._numbers: dict[str, Any] | None = None  # values that were looked at before

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
        if values is not self._numbers:
            if self._rule.kinds(values) != self._kinds:
                return None
            if not any(isinstance(x, Tensor) for x in values.values()):
                self._numbers = values
        if len({*map(id, hyper)}) > 1:
            return None
        if any(column.count(column[0]) != len(column) for column in numbers):
            return None
        row = [column[0] for column in numbers]
        row += map(values.__getitem__, self._names)
        return self._step(streams, row, donate)

    @abstractmethod
    def _step(
        self, streams: Sequence[Column], row: Sequence[Any], donate: bool
    ) -> Sequence[Column] | None:
        """The columns, of streams that are alike and the scalars of all leaves."""


class Plain(Lane):
    """For steps of which no derivative is asked: by one executor."""

    def __init__(
        self, executor: Executor, kinds: Kinds, params: Column, rule: Rule
    ) -> None:
        super().__init__(rule, kinds)
        self._direct = executor.direct(params, [0] * len(params))
        self._apart: list[int] = []  # addresses of which no two tensors overlap

    def _step(
        self, streams: Sequence[Column], row: Sequence[Any], donate: bool
    ) -> Sequence[Column] | None:
        given = [x for x in row if isinstance(x, Tensor)]
        if given:
            if any(type(x) is not Tensor or x.requires_grad for x in given):
                return None
            row = [*map(read_number, row)]
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
        columns = self._direct(streams, addresses, [row], out)
        if columns is not None and donate:
            torch.autograd.graph.increment_version([*chain(*streams[1:])])
        return columns


class Recorded(Lane):
    """For steps that autograd follows: by kernels that have a derivative."""

    def __init__(self, form: Form, row: Sequence[Any]) -> None:
        super().__init__(form.rule, form.kinds)
        self._form = form
        self._hyper: Known[Form] = Known()
        self._hyper.put([x for x in row if isinstance(x, Tensor)], form)

    def _step(
        self, streams: Sequence[Column], row: Sequence[Any], donate: bool
    ) -> Sequence[Column] | None:
        given = [x for x in row if isinstance(x, Tensor)]
        numbers = tuple(None if isinstance(x, Tensor) else x for x in row)
        alike = tuple(x is None for x in numbers) == self._form.given[0]
        form = self._hyper.get(given) if alike and not donate else None
        if form is None:
            return None
        call = Call(form, (numbers,))
        return form.gather(fused_autograd.record(call, [*chain(*streams), *given]))


_address = Tensor.data_ptr
