"""A cache of fast paths, for steps like an earlier one."""

from collections.abc import Sequence
from typing import Any

import torch

from funcopt import tree
from funcopt.execution import concrete, levels
from funcopt.execution.fast_path import FastPath, Settled
from funcopt.execution.guarded_cache import GuardedCache
from funcopt.execution.native import objects
from funcopt.stepping.per_leaf import LeafValues
from funcopt.stepping.totals import Measure
from funcopt.types import State, Tensor, Tree

_MOST = 64  # structures of params that one optimizer remembers


class _Paths:
    """How steps of tensors that are alike go: by a path for each total, and its own."""

    def __init__(self, paths: list[FastPath]) -> None:
        self.paths = paths
        self.settled: Settled | None = None  #: where nothing but the step changes


class _Entry:
    """What is known of trees of one structure."""

    def __init__(
        self, structure: tree.Structure, slots: Sequence[str], vectors: Sequence[str]
    ) -> None:
        self.structure, self.count = structure, structure.num_leaves
        self.paths: GuardedCache[_Paths] = GuardedCache()
        with levels.outside():
            #: kept as a tensor: torch makes one of a number at each addition
            self.one = torch.ones((), dtype=torch.int64, device="cpu")
        form = tree.form(structure)
        state = {**dict.fromkeys(slots, form), **dict.fromkeys(vectors)}
        #: of grads, params and state
        self.form = form, form, state


class StepCache:
    """The fast paths of one optimizer, those of its totals before those of its step.

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
        always: LeafValues | None,
    ) -> None:
        self._slots, self._vectors, self._measures = slots, vectors, measures
        self._always = always
        self._all: tuple[_Entry, ...] = ()  # the last found first

    def keep(
        self, structure: tree.Structure, tensors: Sequence[Tensor], paths: list[FastPath]
    ) -> None:
        """Remember how these went: gradients, parameters, slots, vectors."""
        for entry in self._all:
            if entry.structure == structure:
                break
        else:
            entry = _Entry(structure, self._slots, self._vectors)
            self._all = (entry, *self._all)[:_MOST]
        entry.paths.put(tensors, _Paths(paths))

    def step(
        self,
        grads: Tree,
        state: State,
        params: Tree,
        values: LeafValues,
        donate: bool,
    ) -> tuple[tree.Structure, Sequence[Any], Tensor] | None:
        """The structure, columns and steps; None where the step goes the long way."""
        if not self._all:
            return None
        given, leaves = (grads, params, state), objects.load().leaves
        for entry in self._all:
            tensors = leaves(entry.form, given)
            if tensors is not None:
                break
        else:
            return None
        if entry is not self._all[0]:
            self._all = (entry, *(x for x in self._all if x is not entry))
        ways = entry.paths.get(tensors)
        if ways is None:
            return None
        always = values is self._always
        if donate and always and ways.settled is not None:
            steps = tensors.pop()
            counts = steps.tolist()
            first = counts[0]
            if counts.count(first) == entry.count and ways.settled(tensors, first + 1):
                return entry.structure, (), steps.add_(entry.one)
            tensors.append(steps)
        some, count = len(tensors) - len(self._vectors), entry.count
        steps, *others = tensors[some:]
        del tensors[some:]
        read = concrete.scalars_of if levels.inside() else torch.Tensor.tolist
        counts = read(steps)
        first = counts[0]
        if type(first) is int and counts.count(first) == count:  # as mostly
            counts = [first + 1] * count
        else:
            counts = [t + 1 for t in counts]
        numbers = [*map(read, others), counts]
        hyper = values(entry.structure, tensors[count : 2 * count], counts)
        *of_totals, path = ways.paths
        for measure, own in zip(self._measures, of_totals):
            sums = own.run(tensors, numbers, hyper, False)
            if sums is None:
                return None
            hyper = measure.added(hyper, sums)
        columns = path.run(tensors, numbers, hyper, donate)
        if columns is None:
            return None
        if donate and always:
            ways.settled = path.settled(hyper)
        new = steps.add_(entry.one) if donate else steps + entry.one
        return entry.structure, columns, new
