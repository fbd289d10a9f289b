"""Leaves that have a gradient and so step: picked out of their columns, and put back."""

from collections.abc import Sequence
from typing import Any


def which_step(grads: Sequence[Any], params: Sequence[Any]) -> list[int] | None:
    """Which leaves have a gradient; None says all."""
    if all(g is not None for g in grads) and all(p is not None for p in params):
        return None
    return [i for i, g in enumerate(grads) if g is not None]


def picked(column: Sequence[Any], live: list[int] | None) -> Sequence[Any]:
    return column if live is None else [column[i] for i in live]


def merged(
    columns: Sequence[Sequence[Any]],
    new: Sequence[Sequence[Any]],
    live: list[int] | None,
) -> Sequence[Sequence[Any]]:
    """The columns with the live leaves' new values in them."""
    if live is None:
        return new
    whole = [list(column) for column in columns]
    for column, values in zip(whole, new):
        for i, value in zip(live, values):
            column[i] = value
    return whole
