"""A call of a rule, or of its derivative: by kernels, or by torch's operations."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import is_
from typing import Any

import torch

from funcopt.execution import layout, reference
from funcopt.execution.form import Form, scalars_in
from funcopt.types import Tensor


@dataclass(frozen=True, eq=False)
class Call:
    """A form, and for each row its scalars: the numbers, None where one is a tensor."""

    form: Form
    rows: tuple[tuple[Any, ...], ...]

    def vjp(self, wanted: Sequence[bool]) -> "Call":
        """See `Form.vjp`."""
        form = self.form.vjp(tuple(wanted))
        more = (None,) * scalars_in(self.form.outputs)
        return Call(form, tuple(row + more for row in self.rows))

    def jvp(self) -> "Call":
        """See `Form.jvp`: a number has the tangent 0."""
        rows = tuple(
            (*row, *(None if value is None else 0.0 for value in row))
            for row in self.rows
        )
        return Call(self.form.jvp(), rows)

    def with_tasks(self, tasks: int) -> "Call":
        """See `Form.with_tasks`."""
        return replace(self, form=self.form.with_tasks(tasks))

    def execute(self, tensors: Sequence[Tensor], recycle: bool = False) -> list[Tensor]:
        """The outputs, by kernels; nothing is recorded for a derivative.

        With ``recycle`` they may take old buffers: right where no graph holds outputs.
        """
        form = self.form
        streams = [tensors[column] for column in form.columns]
        rows, device = self._rows(tensors), streams[0][0].device
        out = None
        if recycle:
            out = form.rule.recycler.columns(streams[1], sum(form.outputs))
        found = form.ready.run(streams, rows, out)
        if found is None:
            alike = layout.alike(streams)
            with torch.no_grad():
                found = form.executor(
                    alike, rows, form.which, out=out, tasks=form.tasks, pooled=True
                )
            if not form.tasks and all(map(is_, alike, streams)):
                form.ready.learn(form.executor, streams, form.which)
        outputs: list[Tensor] = []
        for column, stream, rows in zip(found, form.outputs, form.output_rows):
            outputs += (
                column if stream else [self._as_tensor(column[r], device) for r in rows]
            )
        return outputs

    def _as_tensor(self, value: Any, device: torch.device) -> Tensor:
        if not isinstance(value, Tensor):
            value = _float64(value, device)
        tasks = self.form.tasks
        if tasks and not value.ndim:
            return value.expand(tasks).clone()  # forward mode writes into it
        return value

    def plain(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The outputs by torch's own operations, which any transform follows."""
        form = self.form
        if form.of is None:
            return self._step(tensors)
        # The first scalars of each row are those of what this is a derivative of.
        of = Call(form.of, tuple(row[: scalars_in(form.of.inputs)] for row in self.rows))
        count = len(form.of.places)
        given, more = tensors[:count], tensors[count:]
        if form.what == "jvp":
            # Not torch.func.jvp: this may already be inside of forward mode.
            pulled: Any = torch.func.vjp(of.plain, *given)
            outputs, pull = pulled
            anything = tuple(map(torch.ones_like, outputs))
            return torch.func.vjp(lambda *u: pull(u), *anything)[1](more)
        found = torch.func.vjp(of.plain, *given)[1](more)
        return tuple(g for g, (i, _) in zip(found, form.of.places) if form.wanted[i])

    def _step(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        form, rows = self.form, self._rows(tensors)
        streams = [tensors[column] for column in form.columns]
        on_leaf = reference.on_leaf(
            form.rule.flat(form.kinds), form.inputs, form.rule.outputs
        )

        def function(*inputs: Any) -> tuple[Tensor, ...]:
            # Tensors alone: vmap takes no number, which a scalar slot may be.
            return tuple(
                x if isinstance(x, Tensor) else _float64(x, inputs[1].device)
                for x in on_leaf(*inputs)
            )

        made: list[Sequence[Any]] = []
        for leaf, row in enumerate(form.which):
            columns, scalars = iter(streams), iter(rows[row])
            inputs = [next(columns)[leaf] if s else next(scalars) for s in form.inputs]
            step = function
            if form.tasks:
                axes = tuple(
                    0 if isinstance(x, Tensor) and x.ndim else None for x in inputs
                )
                step = torch.vmap(function, in_dims=axes)
            made.append(step(*inputs))
        first = {row: leaf for leaf, row in reversed(list(enumerate(form.which)))}
        return tuple(
            made[at if form.outputs[i] else first[at]][i] for i, at in form.output_places
        )

    def _rows(self, tensors: Sequence[Tensor]) -> list[list[Any]]:
        """The rows with the tensors in them."""
        rows = [list(row) for row in self.rows]
        for k, row, place in self.form.scalars:
            rows[row][place] = tensors[k]
        return rows


def _float64(value: float, device: torch.device) -> Tensor:
    # Half the time of torch.tensor.
    return torch.scalar_tensor(value, dtype=torch.float64, device=device)
