"""The leaves of one step, as columns: what every executor starts from."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

from funcopt.execution.executor import Column, PerTask, as_vector
from funcopt.execution.rule import Kinds, Rule
from funcopt.types import Tensor


def identity(value: Any) -> Any:
    """What equal values share: of a tensor its id, for tensors are not compared."""
    return id(value) if isinstance(value, Tensor) else value


def put(
    columns: Sequence[list[Any]], which: Sequence[int], new: Sequence[Column]
) -> None:
    """Write what is new of some leaves, of these numbers, into columns of all.

    A column that is None or lacks at the end was written in place, and stays.
    """
    for column, values in zip(columns, new):
        for i, value in zip(which, values or ()):
            column[i] = value


@dataclass(frozen=True)
class Leaves:
    """A rule's arguments in columns: each has an entry for every leaf."""

    rule: Rule
    grads: Column
    params: Column
    slots: Sequence[Column]
    steps: Column  #: the number of the update, from 1: an int, or a 0-d float64 tensor
    hyper: Sequence[dict[str, Any]]  #: one object for leaves that share their values

    @property
    def state(self) -> list[Column]:
        """The slots that hold a tensor for each leaf."""
        return [c for c, scalar in zip(self.slots, self.rule.scalar) if not scalar]

    @property
    def numbers(self) -> list[Column]:
        """What is a number for each leaf: scalar slots, and the step."""
        return [*(c for c, s in zip(self.slots, self.rule.scalar) if s), self.steps]

    @cached_property
    def distinct_hyper(self) -> dict[int, dict[str, Any]]:
        """The hyperparameter dicts, each once, by ``id``: leaves may share one."""
        return dict(zip(map(id, self.hyper), self.hyper))

    @property
    def hyper_values(self) -> list[Any]:
        """What is in the hyperparameter dicts."""
        return [*chain.from_iterable(v.values() for v in self.distinct_hyper.values())]

    @property
    def tasks(self) -> int:
        """How many tasks the leading axis holds, if a scalar is each one's own; or 0."""
        values = self.hyper_values
        return next((len(x.values) for x in values if isinstance(x, PerTask)), 0)

    def streams(self, kinds: Kinds) -> list[Column]:
        """The streams that the rule's program takes."""
        hyper = [
            [v[name].expand_as(p) for v, p in zip(self.hyper, self.params)]
            for name in self.rule.streams(kinds)
        ]
        return [self.grads, self.params, *self.state, *hyper]

    def rows(
        self, kinds: Kinds, apart: bool = False
    ) -> tuple[list[tuple[Any, ...]], list[int]]:
        """The scalars that it takes: distinct rows, and the row of each leaf.

        With ``apart`` two dicts of hyperparameters are two rows, whatever is in them.
        """
        names, numbers = self.rule.scalars(kinds), self.numbers
        same = {
            key: key if apart else tuple(id(values[name]) for name in names)
            for key, values in self.distinct_hyper.items()
        }
        index: dict[Any, int] = {}
        rows: list[tuple[Any, ...]] = []
        which = []
        for values, *own in zip(self.hyper, *numbers):
            key = (same[id(values)], *map(identity, own))
            if key not in index:
                index[key] = len(rows)
                rows.append((*own, *(as_vector(values[name]) for name in names)))
            which.append(index[key])
        return rows, which

    def scalars(self) -> list[Any]:
        """What is not a tensor for each leaf: numbers, and hyperparameters."""
        return [*chain(*self.numbers), *self.hyper_values]

    def tensors(self) -> list[Any]:
        """All that may be differentiated, numbers among it."""
        return [*chain(self.grads, self.params, *self.state), *self.scalars()]

    def pick(self, which: Sequence[int]) -> "Leaves":
        """Those of the given numbers."""
        if len(which) == len(self.params):
            return self

        def some(column: Column) -> Column:
            return [column[i] for i in which]

        return Leaves(
            self.rule,
            some(self.grads),
            some(self.params),
            [*map(some, self.slots)],
            some(self.steps),
            some(self.hyper),
        )
