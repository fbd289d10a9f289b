"""A call like an earlier one goes straight to the kernel."""

from collections.abc import Sequence
from itertools import chain
from typing import Any

from funcopt.execution.executor import Column, Direct, Executor, empty_like, read_number
from funcopt.execution.guard import Known
from funcopt.types import Tensor


class Ready:
    """An executor's shortest way, for streams like those of earlier calls."""

    def __init__(self, outputs: int) -> None:
        self._outputs = outputs  # how many of them are streams
        self._known: Known[Direct] = Known()

    def learn(
        self, executor: Executor, streams: Sequence[Column], which: Sequence[int]
    ) -> None:
        """Remember these streams, which lie in memory as the executor takes them."""
        direct = executor.direct(streams[0], which, pooled=True)
        self._known.put([*chain(*streams)], direct)

    def run(
        self,
        streams: Sequence[Column],
        rows: Sequence[Sequence[Any]],
        out: Sequence[Column] | None,
    ) -> Sequence[Column] | None:
        """The outputs; None where these streams, or scalars, need to be looked at."""
        tensors = [*chain(*streams)]
        direct = self._known.get(tensors)
        if direct is None:
            return None
        if out is None:
            out = [empty_like(streams[0]) for _ in range(self._outputs)]
        numbers = [[*map(read_number, row)] for row in rows]
        return direct(streams, [*map(Tensor.data_ptr, tensors)], numbers, out)
