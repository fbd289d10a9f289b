"""Leaves that step, among those without a gradient, or without a parameter."""

from collections.abc import Iterable, Sequence
from typing import Any

from funcopt.execution.leaves import put


def which_step(grads: Sequence[Any], params: Sequence[Any]) -> list[int] | None:
    """Which leaves have a gradient; None says all."""
    if all(g is not None for g in grads) and all(p is not None for p in params):
        return None
    return [i for i, g in enumerate(grads) if g is not None]


def picked(column: Sequence[Any], live: list[int] | None) -> Sequence[Any]:
    return column if live is None else [column[i] for i in live]


def merged(
    columns: Iterable[Sequence[Any]],
    new: Sequence[Sequence[Any]],
    live: list[int] | None,
) -> Sequence[Sequence[Any]]:
    """The columns with the live leaves' new values in them."""
    if live is None:
        return new
    whole = [list(column) for column in columns]
    put(whole, live, new)
    return whole


class Gaps:
    """Where leaves lie in a list of those that are there, gradients before the others.

    Args:
        live: the leaves that have gradients.
        there: whether each leaf has a parameter.
    """

    def __init__(self, live: Sequence[int], there: Sequence[bool]) -> None:
        self._places = [i for i, is_there in enumerate(there) if is_there]
        self._count, self._first = len(there), len(live)
        place = {i: k for k, i in enumerate(self._places)}
        self._own = [place[i] for i in live]

    def _columns(self, tensors: Sequence[Any]) -> Iterable[Sequence[Any]]:
        size = len(self._places)
        for k in range(self._first, len(tensors), size):
            yield tensors[k : k + size]

    def live(self, tensors: Sequence[Any]) -> list[Any]:
        """Those of the leaves that step."""
        found = [*tensors[: self._first]]
        for column in self._columns(tensors):
            found += map(column.__getitem__, self._own)
        return found

    def whole(self, tensors: Sequence[Any]) -> list[list[Any]]:
        """The columns behind the gradients, with None where nothing is there."""
        found = []
        for column in self._columns(tensors):
            found.append([None] * self._count)
            for i, x in zip(self._places, column):
                found[-1][i] = x
        return found
