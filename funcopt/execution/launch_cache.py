"""A cache by which a call like an earlier one goes straight to the kernel."""

from collections.abc import Sequence
from itertools import chain

from funcopt.execution.executor import Column, Direct, Executor, Maker, Rows, read_number
from funcopt.execution.guarded_cache import GuardedCache
from funcopt.execution.native import objects
from funcopt.execution.recycle import Recycler


class LaunchCache:
    """`Executor.direct` of earlier calls, by what their streams were like."""

    def __init__(self, outputs: int) -> None:
        self._outputs = outputs  # how many of the outputs are streams
        #: the function, and what makes a column of outputs
        self._known: GuardedCache[tuple[Direct, Maker]] = GuardedCache(memory=True)

    def learn(
        self, executor: Executor, streams: Sequence[Column], which: Sequence[int]
    ) -> None:
        """Remember streams like these, which `layout.alike` had to copy none of."""
        direct = executor.direct(streams[0], which, pooled=True)
        self._known.put([*chain(*streams)], (direct, Maker(streams[0])))

    def run(
        self,
        streams: Sequence[Column],
        rows: Rows,
        recycler: Recycler | None,
    ) -> Sequence[Column] | None:
        """The outputs; None where no call had such streams, or the scalars overflow.

        In old tensors if there is a ``recycler``.
        """
        tensors = [*chain(*streams)]
        known = self._known.get(tensors)
        if known is None:
            return None
        direct, make = known
        if recycler is None:
            out = [make() for _ in range(self._outputs)]
        else:
            out = recycler.columns(make, self._outputs)
        numbers = [[*map(read_number, row)] for row in rows]
        return direct(tensors, objects.load().addresses(tensors), numbers, out)
