"""A cache of fast paths, for steps like an earlier one."""

from collections.abc import Mapping, Sequence
from operator import add
from typing import Any

import torch

from funcopt import tree
from funcopt.execution import concrete, levels
from funcopt.execution.fast_path import FastPath, Settled
from funcopt.execution.guarded_cache import GuardedCache
from funcopt.execution.native import objects
from funcopt.execution.outside import outside
from funcopt.stepping import complex_leaves, vectors
from funcopt.stepping.live import Gaps, merged, picked
from funcopt.stepping.per_leaf import LeafValues
from funcopt.stepping.totals import Measure
from funcopt.types import State, Tensor, Tree

_MOST = 64  # structures of params that one optimizer remembers


class _Paths:
    """How steps of tensors that are alike go: by a path for each total, and its own.

    ``were_complex`` says which leaves are complex, and step as their parts, if any are.
    """

    def __init__(self, paths: list[FastPath], were_complex: Sequence[bool]) -> None:
        self.paths, self.were_complex = paths, were_complex
        #: pure steps and those in place, where nothing changes but their count
        self.settled: list[Settled | None] = [None, None]


class Entry:
    """What is known of trees of one structure, where the same leaves step.

    ``live`` are those, None for all of them; ``there`` says which have a parameter, and
    ``order`` how the keys of dicts follow one another.
    """

    def __init__(
        self,
        structure: tree.Structure,
        live: list[int] | None,
        there: list[bool],
        order: tree.KeyOrder | None,
        scalar: Mapping[str, bool],
    ) -> None:
        self.structure, self.live, self.there = structure, live, there
        self.order = order
        self.count = count = structure.num_leaves
        self.gaps = None if live is None else Gaps(live, there)
        #: what is added to each leaf's step
        self.more = [1] * count if live is None else [0] * count
        for i in live or ():
            self.more[i] = 1
        self.paths: GuardedCache[_Paths] = GuardedCache()
        #: the last hyperparameters of all leaves, and of those that step
        self._hyper: tuple[Any, Sequence[dict[str, Any]]] = None, ()
        with outside():
            #: kept as a tensor: torch makes one of a number at each addition
            self.one = torch.tensor(self.more if live else 1, device="cpu")
        form = tree.form(structure, there)
        trees = {slot: form for slot, each in scalar.items() if not each}
        vectors = {"step": None} | {slot: None for slot, each in scalar.items() if each}
        #: whether all leaves step, and their state is tensors like them and the steps
        self.is_plain = live is None and len(vectors) == 1
        #: of grads, params and state
        self.form = tree.form(structure, map(bool, self.more)), form, trees | vectors

    def of_live(
        self, hyper: Sequence[dict[str, Any]], always: bool
    ) -> Sequence[dict[str, Any]]:
        """Those of the leaves that step.

        Of hyperparameters that are ``always`` the same, the same list for the same list,
        by which paths know that nothing changed; others may be tensors, with graphs.
        """
        known, found = self._hyper
        if hyper is not known:
            found = picked(hyper, self.live)
            if always:
                self._hyper = hyper, found
        return found


class StepCache:
    """The fast paths of one optimizer, those of its totals before those of its step.

    Args:
        scalar: of each slot, whether it is one number for each leaf.
        measures: of the totals.
        always: what gives the same hyperparameters at every step, if that is known.
    """

    def __init__(
        self,
        scalar: Mapping[str, bool],
        measures: Sequence[Measure],
        always: LeafValues | None,
    ) -> None:
        self._scalar, self._measures, self._always = scalar, measures, always
        #: of the columns ``p, *slots``, which are numbers
        self._numbers = (False, *scalar.values())
        self._all: tuple[Entry, ...] = ()  # the last found first

    def keep(
        self,
        structure: tree.Structure,
        live: list[int] | None,
        there: list[bool],
        tensors: list[Tensor],
        paths: list[FastPath],
        were_complex: Sequence[bool],
    ) -> None:
        """Remember how these went: gradients, parameters, slots, vectors."""
        order = tree.key_order(tree.unflatten(structure, there))
        key = structure, live, there, order
        for entry in self._all:
            if (entry.structure, entry.live, entry.there, entry.order) == key:
                break
        else:
            entry = Entry(*key, self._scalar)
            self._all = (entry, *self._all)[:_MOST]
        entry.paths.put(tensors, _Paths(paths, were_complex))

    def step(
        self,
        grads: Tree,
        state: State,
        params: Tree,
        values: LeafValues,
        donate: bool,
    ) -> tuple[tree.Structure, Sequence[Any], Tensor] | None:
        """The structure, columns and steps; None where the step goes the long way."""
        found = self.find(grads, state, params)
        return found and self.run(*found, values, donate)

    def find(
        self, grads: Tree, state: State, params: Tree
    ) -> tuple[Entry, list[Tensor]] | None:
        """What is known of such trees; their tensors, column by column, then vectors."""
        given, leaves = (grads, params, state), objects.load().leaves
        for entry in self._all:
            tensors = leaves(entry.form, given)
            if tensors is not None and tree.has_order(entry.order, params):
                break
        else:
            return None
        if entry is not self._all[0]:
            self._all = (entry, *(x for x in self._all if x is not entry))
        return entry, tensors

    def run(
        self, entry: Entry, tensors: list[Tensor], values: LeafValues, donate: bool
    ) -> tuple[tree.Structure, Sequence[Any], Tensor] | None:
        """A step of what was found, or of what is like it."""
        ways = entry.paths.get(tensors)
        if ways is None or tensors[0].is_cuda and vectors.is_captured(tensors):
            return None
        always = values is self._always
        settled = ways.settled[donate] if always else None
        if settled is not None:
            found, steps = objects.load(), tensors.pop()
            counts, columns = steps.tolist(), None
            first = counts[0]
            if counts.count(first) == entry.count:
                columns = settled(tensors, first + 1)
            if columns is not None:
                new = found.counted(steps) if donate else steps + entry.one
                return entry.structure, columns, new
            tensors.append(steps)
        some, count = len(tensors) - 1 - sum(self._numbers), entry.count
        steps, *others = tensors[some:]
        del tensors[some:]
        read = concrete.scalars_of if levels.inside() else torch.Tensor.tolist
        counts = read(steps)
        first = counts[0]
        live, gaps, old = entry.live, entry.gaps, []
        if live is None and type(first) is int and counts.count(first) == count:
            counts = [first + 1] * count  # as mostly
        else:
            counts = [*map(add, counts, entry.more)]
        numbers = [*map(read, others), counts]
        if gaps is None:
            hyper = values(entry.structure, tensors[count : 2 * count], counts)
        else:
            old, tensors = gaps.whole(tensors), gaps.live(tensors)
            hyper = entry.of_live(values(entry.structure, old[0], counts), always)
            slots, scalars = iter(old), iter(numbers)
            old = [next(scalars if each else slots) for each in self._numbers]
            numbers = [[*picked(column, live)] for column in numbers]
        if ways.were_complex:
            if donate:
                complex_leaves.check_writable([tensors[len(ways.were_complex) :]])
            tensors = [*map(complex_leaves.parts, tensors)]
        *of_totals, path = ways.paths
        for measure, own in zip(self._measures, of_totals):
            sums = own.run(tensors, numbers, hyper, False)
            if sums is None:
                return None
            hyper = measure.added(hyper, sums)
        columns = path.run(tensors, numbers, hyper, donate)
        if columns is None:
            return None
        if ways.were_complex and not donate:
            columns = [
                column if number else complex_leaves.rejoined(column, ways.were_complex)
                for column, number in zip(columns, self._numbers)
            ]
        if always and live is None and not ways.were_complex:
            ways.settled[donate] = path.settled(hyper, donate)
        new = steps.add_(entry.one) if donate else steps + entry.one
        return entry.structure, merged(old, columns, live), new
