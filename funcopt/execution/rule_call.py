"""A call of a rule, or of its derivative: by kernels, or by torch's operations."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import compress
from operator import is_
from typing import Any

import torch

from funcopt.execution import layout, own_dtype, reference
from funcopt.execution.call_signature import CallSignature, scalars_in
from funcopt.types import Tensor


@dataclass(frozen=True, eq=False)
class RuleCall:
    """A signature, and the scalars of each row: numbers, None where one is a tensor."""

    signature: CallSignature
    rows: tuple[tuple[Any, ...], ...]

    def vjp(self, wanted: Sequence[bool]) -> "RuleCall":
        """See `CallSignature.vjp`."""
        signature = self.signature.vjp(tuple(wanted))
        more = (None,) * scalars_in(self.signature.outputs)
        return RuleCall(signature, tuple(row + more for row in self.rows))

    def jvp(self) -> "RuleCall":
        """See `CallSignature.jvp`: a number beside tensors has the tangent 0."""
        signature = self.signature
        rows = tuple(
            (*row, *(x if x is None else 0.0 for x in signature.moving_scalars(row)))
            for row in self.rows
        )
        return RuleCall(signature.jvp(), rows)

    def with_tasks(self, tasks: int) -> "RuleCall":
        """See `CallSignature.with_tasks`."""
        return replace(self, signature=self.signature.with_tasks(tasks))

    def execute(self, tensors: Sequence[Tensor], recycle: bool = False) -> list[Tensor]:
        """The outputs, by kernels; nothing is recorded for a derivative.

        With ``recycle`` they may take old buffers: right where no graph holds outputs.
        """
        signature = self.signature
        streams = [tensors[column] for column in signature.columns]
        rows, device = self._rows(tensors), streams[0][0].device
        recycler = signature.rule.recycler if recycle else None
        found = signature.launches.run(streams, rows, recycler)
        if found is None:
            alike = layout.alike(streams)
            with torch.no_grad():
                run, tasks = signature.executor, signature.tasks
                found = run(alike, rows, signature.which, tasks=tasks, pooled=True)
            if not tasks and all(map(is_, alike, streams)):
                signature.launches.learn(signature.executor, streams, signature.which)
        outputs: list[Tensor] = []
        for column, stream, own in zip(found, signature.outputs, signature.output_rows):
            outputs += (
                column if stream else [self._as_tensor(column[r], device) for r in own]
            )
        return outputs

    def with_zeros(
        self, cotangents: Sequence[Tensor | None], tensors: Sequence[Tensor]
    ) -> list[Tensor]:
        """The cotangents of a step with these tensors, zeros for None."""
        signature, params = self.signature, tensors[self.signature.columns[1]]
        shape = (signature.tasks,) if signature.tasks else ()

        def zeros(output: int, at: int) -> Tensor:
            if signature.outputs[output]:
                return torch.zeros_like(params[at])
            return torch.zeros(shape, dtype=torch.float64, device=params[0].device)

        given = zip(cotangents, signature.output_places)
        return [zeros(*place) if c is None else c for c, place in given]

    def _as_tensor(self, value: Any, device: torch.device) -> Tensor:
        if not isinstance(value, Tensor):
            value = _float64(value, device)
        tasks = self.signature.tasks
        # Forward mode writes into it, and two outputs may be one: prodigy's d and d_max.
        return value.expand(tasks).clone() if tasks else value

    def plain(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The outputs by torch's own operations, which any transform follows."""
        signature = self.signature
        if signature.of is None:
            return self._step(tensors)
        # The first scalars of each row are those of what this is a derivative of.
        count, scalars = len(signature.of.places), scalars_in(signature.of.inputs)
        of = RuleCall(signature.of, tuple(row[:scalars] for row in self.rows))
        given, more = tensors[:count], tensors[count:]
        if signature.what == "jvp":
            moving = [signature.wanted[i] for i, _ in signature.of.places]

            def function(*some: Tensor) -> tuple[Tensor, ...]:
                rest = iter(some)
                return of.plain(*(next(rest) if m else x for x, m in zip(given, moving)))

            return own_dtype.pushed(function, [*compress(given, moving)], more)
        found = own_dtype.pulled(of.plain, given, more)
        return tuple(
            g for g, (i, _) in zip(found, signature.of.places) if signature.wanted[i]
        )

    def _step(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        signature, rows = self.signature, self._rows(tensors)
        streams = [tensors[column] for column in signature.columns]
        rule, outputs = signature.rule.flat(signature.kinds), signature.rule.outputs

        def function(*inputs: Any) -> tuple[Tensor, ...]:
            # Tensors alone: vmap takes no number, which a scalar slot may be.
            return tuple(
                x if isinstance(x, Tensor) else _float64(x, inputs[1].device)
                for x in reference.on_any_leaf(rule, signature.inputs, outputs, inputs)
            )

        made: list[Sequence[Any]] = []
        for leaf, row in enumerate(signature.which):
            columns, scalars = iter(streams), iter(rows[row])
            inputs = [
                next(columns)[leaf] if s else next(scalars) for s in signature.inputs
            ]
            step = function
            if signature.tasks:
                axes = tuple(
                    0 if isinstance(x, Tensor) and x.ndim else None for x in inputs
                )
                step = torch.vmap(function, in_dims=axes)
            made.append(step(*inputs))
        first = {row: leaf for leaf, row in reversed(list(enumerate(signature.which)))}
        return tuple(
            made[at if signature.outputs[i] else first[at]][i]
            for i, at in signature.output_places
        )

    def _rows(self, tensors: Sequence[Tensor]) -> list[list[Any]]:
        """The rows with the tensors in them."""
        rows = [list(row) for row in self.rows]
        for k, row, place in self.signature.scalars:
            rows[row][place] = tensors[k]
        return rows


def _float64(value: float, device: torch.device) -> Tensor:
    # Half the time of torch.tensor.
    return torch.scalar_tensor(value, dtype=torch.float64, device=device)
