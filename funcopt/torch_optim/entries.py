"""The numbers of a state, as entries of vectors: one operation steps all."""

from collections.abc import Sequence
from typing import Any

import torch

from funcopt.execution.native import objects
from funcopt.types import Tensor


class Entries:
    """What some states hold under one key: 0-d tensors, views of vectors from now on.

    Those that are such views stay what they are, whatever other parameters share their
    vector: another plan may count by it.
    """

    def __init__(self, states: Sequence[dict[str, Any]], key: str) -> None:
        alone = [state for state in states if not _is_entry(state[key])]
        if alone:
            with torch.inference_mode(False):  # whose tensors no step outside may write
                vector = torch.stack([state[key] for state in alone])
                for state, entry in zip(alone, vector.unbind()):
                    state[key] = entry
        found: dict[int, tuple[Tensor, list[int]]] = {}
        self._order: list[tuple[int, int]] = []
        for state in states:
            vector = state[key]._base
            _, places = found.setdefault(id(vector), (vector, []))
            self._order.append(([*found].index(id(vector)), len(places)))
            places.append(state[key].storage_offset() - vector.storage_offset())
        #: with the places of the entries, None for all in their order
        self._vectors = [(x, _places(x, places)) for x, places in found.values()]
        #: what counts the entries with such places among others
        self._ones = [
            None if places is None else torch.zeros_like(vector).index_fill_(0, places, 1)
            for vector, places in self._vectors
        ]

    def read(self) -> list[Any]:
        """The numbers, in the order of the states."""
        columns = [
            (vector if places is None else vector[places]).tolist()
            for vector, places in self._vectors
        ]
        if len(columns) == 1:
            return columns[0]
        return [columns[k][i] for k, i in self._order]

    def write(self, numbers: Sequence[float]) -> None:
        """Replace the numbers."""
        for k, (vector, places) in enumerate(self._vectors):
            own = [x for x, (owner, _) in zip(numbers, self._order) if owner == k]
            new = torch.tensor(own, dtype=vector.dtype, device=vector.device)
            vector.copy_(new) if places is None else vector.index_copy_(0, places, new)

    def count(self) -> None:
        """Add one to each."""
        for (vector, _), one in zip(self._vectors, self._ones):
            objects.load().counted(vector) if one is None else vector.add_(one)


def _is_entry(number: Tensor) -> bool:
    vector = number._base
    return vector is not None and vector.ndim == 1 and vector.is_contiguous()


def _places(vector: Tensor, places: list[int]) -> Tensor | None:
    if places == [*range(len(vector))]:
        return None
    return torch.tensor(places, device=vector.device)
