"""Sums over the whole tree that a rule asks for: measured, then given as numbers."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from funcopt.errors import HyperparameterError
from funcopt.execution import dispatch
from funcopt.execution.executor import Column
from funcopt.execution.fast_path import FastPath
from funcopt.execution.leaves import Leaves
from funcopt.execution.rule import Rule
from funcopt.spec import Spec, Totals
from funcopt.types import Tensor


class Measure:
    """One of a `Spec`'s ``totals`` mappings: sums that one sweep of the leaves gives.

    ``arguments`` are the keywords that their functions get.
    """

    def __init__(
        self,
        spec: Spec,
        totals: Totals,
        scalar: tuple[bool, ...],
        arguments: tuple[str, ...],
    ) -> None:
        functions = [*totals.values()]

        def sums(*inputs: Any, **hyper: Any) -> tuple[Any, ...]:
            return tuple(function(*inputs, **hyper) for function in functions)

        self._names = [*totals]
        self._rule = Rule(
            sums,
            f"{spec.name}'s {', '.join(totals)}",
            scalar,
            arguments,
            elementwise=False,
            norms=spec.traceable,
            sums=len(totals),
        )

    def added_to(
        self, leaves: Leaves, execution: str | None
    ) -> tuple[Leaves, FastPath | None]:
        """The leaves with each sum over all of them among their hyperparameters.

        And a fast path for the sums of steps like this one.
        """
        sums, path = dispatch.step(replace(leaves, rule=self._rule), execution)
        return replace(leaves, hyper=self.added(leaves.hyper, sums)), path

    def added(
        self, hyper: Sequence[dict[str, Any]], sums: Sequence[Column]
    ) -> list[dict[str, Any]]:
        """The hyperparameters of all leaves, with the totals of their sums."""
        totals = {name: self._total(name, sum_) for name, sum_ in zip(self._names, sums)}
        spread = {id(row): {**row, **totals} for row in hyper}
        return [spread[id(row)] for row in hyper]

    def _total(self, name: str, sums: Column) -> Tensor:
        """A 0-d float64 tensor, so that no total is ever taken for a constant."""
        if all(isinstance(x, float) for x in sums):
            return torch.tensor(sum(sums), dtype=torch.float64, device="cpu")
        device = next(x.device for x in sums if isinstance(x, Tensor))
        scalars = [torch.as_tensor(x, dtype=torch.float64, device=device) for x in sums]
        for x in scalars:
            if x.ndim:
                raise HyperparameterError(
                    f"{self._rule.name}: the total '{name}' is one number, but of a leaf "
                    f"it has shape {tuple(x.shape)}; .sum() is missing, or a "
                    "hyperparameter with a value per element is outside of it"
                )
        return torch.stack(scalars).sum()
