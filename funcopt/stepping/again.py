"""A cache of lanes, so that a step like an earlier one goes the fast path."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch

from funcopt import tree
from funcopt.execution import levels, reading
from funcopt.execution.guard import Known
from funcopt.execution.lane import Lane, Settled
from funcopt.execution.native import objects
from funcopt.stepping.totals import Measure
from funcopt.types import State, Tensor, Tree

#: from the structure, parameters and steps to the rule's keywords for each leaf
Values: TypeAlias = Callable[..., Sequence[dict[str, Any]]]

_MOST = 64  # structures of params that one optimizer remembers


class _Way:
    """How steps of tensors that are alike go."""

    def __init__(self, lanes: list[Lane]) -> None:
        self.lanes = lanes
        self.settled: Settled | None = None  #: where nothing but the step changes


class _Seen:
    """What is known of trees of one structure."""

    def __init__(
        self, structure: tree.Structure, slots: Sequence[str], vectors: Sequence[str]
    ) -> None:
        self.structure, self.count = structure, structure.num_leaves
        self.ways: Known[_Way] = Known()
        with levels.outside():
            #: kept as a tensor: torch makes one of a number at each addition
            self.one = torch.ones((), dtype=torch.int64, device="cpu")
        form = tree.form(structure)
        state = {**dict.fromkeys(slots, form), **dict.fromkeys(vectors)}
        #: of grads, params and state
        self.form = form, form, state


class Again:
    """The lanes of one optimizer, those of its totals before those of its step.

    Args:
        slots: the names of the state's trees.
        vectors: the names of what the state holds for all leaves at once, steps first.
        measures: of the totals.
        always: what gives the same hyperparameters at every step, if that is known.
    """

    def __init__(
        self,
        slots: Sequence[str],
        vectors: Sequence[str],
        measures: Sequence[Measure],
        always: Values | None = None,
    ) -> None:
        self._slots, self._vectors, self._measures = slots, vectors, measures
        self._always = always
        self._all: tuple[_Seen, ...] = ()  # the last found first

    def keep(
        self, structure: tree.Structure, tensors: Sequence[Tensor], lanes: list[Lane]
    ) -> None:
        """Remember how these went: gradients, parameters, slots, vectors."""
        for seen in self._all:
            if seen.structure == structure:
                break
        else:
            seen = _Seen(structure, self._slots, self._vectors)
            self._all = (seen, *self._all)[:_MOST]
        seen.ways.put(tensors, _Way(lanes))

    def step(
        self,
        grads: Tree,
        state: State,
        params: Tree,
        values: Values,
        donate: bool,
    ) -> tuple[tree.Structure, Sequence[Any], Tensor] | None:
        """The structure, columns and steps; None where the step goes the long way."""
        if not self._all:
            return None
        given, leaves = (grads, params, state), objects.load().leaves
        for seen in self._all:
            tensors = leaves(seen.form, given)
            if tensors is not None:
                break
        else:
            return None
        if seen is not self._all[0]:
            self._all = (seen, *(x for x in self._all if x is not seen))
        way = seen.ways.get(tensors)
        if way is None:
            return None
        always = values is self._always
        if donate and always and way.settled is not None:
            steps = tensors.pop()
            counts = steps.tolist()
            first = counts[0]
            if counts.count(first) == seen.count and way.settled(tensors, first + 1):
                return seen.structure, (), steps.add_(seen.one)
            tensors.append(steps)
        some, count = len(tensors) - len(self._vectors), seen.count
        steps, *others = tensors[some:]
        del tensors[some:]
        read = reading.scalars_of if levels.inside() else torch.Tensor.tolist
        counts = read(steps)
        first = counts[0]
        if type(first) is int and counts.count(first) == count:  # mostly, and soon told
            counts = [first + 1] * count
        else:
            counts = [t + 1 for t in counts]
        numbers = [*map(read, others), counts]
        hyper = values(seen.structure, tensors[count : 2 * count], counts)
        *of_totals, lane = way.lanes
        for measure, own in zip(self._measures, of_totals):
            sums = own.run(tensors, numbers, hyper, False)
            if sums is None:
                return None
            hyper = measure.added(hyper, sums)
        columns = lane.run(tensors, numbers, hyper, donate)
        if columns is None:
            return None
        if donate and always:
            way.settled = lane.settled(hyper)
        new = steps.add_(seen.one) if donate else steps + seen.one
        return seen.structure, columns, new
