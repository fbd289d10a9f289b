"""``init`` and ``update`` of one rule: trees become lists of leaves, and trees again."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any

import torch

from funcopt import tree
from funcopt.checks import (
    SlotForm,
    check_leaves,
    check_matrices,
    check_params,
    check_real,
    check_state,
)
from funcopt.execution import (
    autocast,
    batched,
    concrete,
    dispatch,
    executor_choice,
    own_dtype,
)
from funcopt.execution.fast_path import FastPath
from funcopt.execution.leaves import Leaves
from funcopt.execution.rule import Rule
from funcopt.spec import Spec
from funcopt.stepping import complex_leaves, sparse_rows, vectors, vmapped
from funcopt.stepping.live import merged, picked, which_step
from funcopt.stepping.per_leaf import Hypers, LeafValues
from funcopt.stepping.step_cache import StepCache
from funcopt.stepping.totals import Measure
from funcopt.types import HyperValue, State, Tensor, Tree


class Stepper:
    """A rule, its slots and hyperparameters, and the cache of earlier steps."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.slots = slots = dict(spec.slots)
        self.scalar = {slot: not callable(first) for slot, first in slots.items()}
        self.trees = [slot for slot in slots if not self.scalar[slot]]
        #: what the state holds for all leaves at once, one vector each
        self.vectors = {"step": torch.int64} | {
            slot: torch.float64 for slot in slots if self.scalar[slot]
        }
        self.hypers = Hypers(spec.hyper, spec.name)
        self.values = partial(self.hypers.per_leaf, {})  # where update is given none
        scalar, arguments = tuple(self.scalar.values()), tuple(self.hypers.arguments)
        self.measures: list[Measure] = []
        for totals in spec.totals:  # a later one is given the earlier ones
            self.measures.append(Measure(spec, totals, scalar, arguments))
            arguments = (*arguments, *totals)
        self.rule = Rule(
            spec.rule,
            spec.name,
            scalar,
            arguments,
            spec.elementwise,
            spec.norms,
            spec.stacks,
        )
        #: slots that need not look like their parameters
        self.forms = {
            slot: SlotForm(first)
            for slot, first in slots.items()
            if callable(first) and not spec.traceable
        }
        #: whether all tasks of a vmap can be one step: no element depends on another
        self.separable = spec.elementwise and not spec.totals
        always = None if self.hypers.varying else self.values
        self.cache = StepCache(self.scalar, self.measures, always)
        #: what steps the entries of a sparse gradient
        self.lazy = Stepper(replace(spec, sparse="")) if spec.sparse else None

    def __reduce__(self) -> tuple[Any, ...]:
        return Stepper, (self.spec,)  # what it has beside is made of that

    def init(self, params: Tree) -> State:
        """The state before the first step; see `Optimizer`."""
        leaves, structure = tree.flatten(params)
        check_params(leaves, structure)
        self.hypers.check_start(leaves)
        if not self.spec.elementwise:
            check_real(leaves, structure, self.spec.name)
        if self.spec.matrices:
            check_matrices(leaves, structure, self.spec.name)
        state: State = {"step": vectors.first_steps(leaves)}
        for slot, first in self.slots.items():
            if callable(first):
                start = partial(complex_leaves.slot, first)
                values = [None if p is None else start(p) for p in leaves]
                state[slot] = tree.unflatten(structure, values)
            else:
                state[slot] = vectors.filled(leaves, first, torch.float64)
        return state

    def update(
        self,
        grads: Tree,
        state: State,
        params: Tree,
        *,
        donate: bool = False,
        execution: str | None = None,
        **overrides: HyperValue,
    ) -> tuple[Tree, State]:
        """One step; see `Optimizer`."""
        values = self.values
        if overrides or self.hypers.awaited:
            self.hypers.check_given(overrides)
            values = partial(self.hypers.per_leaf, overrides)
        return self.step(grads, state, params, values, donate, execution)

    def step(
        self,
        grads: Tree,
        state: State,
        params: Tree,
        values: LeafValues,
        donate: bool = False,
        execution: str | None = None,
    ) -> tuple[Tree, State]:
        """One step with the rule's keyword arguments that ``values`` gives each leaf."""
        free = not (execution or torch.compiler.is_compiling())
        under_vmap = free and not donate and self.separable and batched.is_vmapped()
        together = under_vmap and not self.rule.looks_at_shapes()
        if free and executor_choice.is_free():
            if together:
                done = vmapped.again(self.cache, grads, state, params, values)
            else:
                done = self.cache.step(grads, state, params, values, donate)
            if done is not None:
                return self._result(*done, params, state, donate)
        if autocast.is_on():  # chooses dtypes for a loss: a step is made in its leaves'
            with own_dtype.keeping():
                return self.step(grads, state, params, values, donate, execution)
        p, structure = tree.flatten(params)
        g = tree.flatten_like(structure, grads, "grads")
        check_state(state, ("step", *self.slots), self.vectors, structure, self.rule.name)
        trees = {
            slot: tree.flatten_like(structure, state[slot], f"state['{slot}']")
            for slot in self.trees
        }
        live = which_step(g, p)
        if self.lazy is not None:
            if self.spec.sparse == "only":
                sparse_rows.check_all(g, structure, self.spec.name)
            if sparse_rows.are_among(g):
                given = {"values": values, "execution": execution, "donate": donate}
                return self._lazily(g, p, structure, state, trees, live, given)
        if together and live != [] and not executor_choice.is_forced():
            held = {key: state[key] for key in self.vectors}
            done = vmapped.step(self.step, g, p, trees, held, structure, values)
            if done is not None:
                return done
        columns, steps = self._anew(
            g, p, structure, state, trees, live, values, donate, execution
        )
        return self._result(structure, columns, steps, params, state, donate)

    def _anew(
        self,
        g: list[Any],
        p: list[Any],
        structure: tree.Structure,
        state: State,
        trees: dict[str, list[Any]],
        live: list[int] | None,
        values: LeafValues,
        donate: bool,
        execution: str | None,
    ) -> tuple[Sequence[Any], Tensor]:
        """The columns and steps of a step that goes the long way; its paths are kept."""
        check_leaves(g, p, trees, live, structure, self.forms)
        vectors.check_captured(state["step"], p)
        old = {
            slot: concrete.scalars_of(state[slot]) if self.scalar[slot] else trees[slot]
            for slot in self.slots
        }
        steps = vectors.next_steps(state["step"], live)
        numbers = concrete.scalars_of(steps)
        hyper = values(structure, p, numbers)
        live_g, live_p, *slots = [
            picked(column, live) for column in (g, p, *old.values())
        ]
        were_complex = complex_leaves.among(live_p)
        if were_complex:
            if not self.spec.elementwise:
                check_real(p, structure, self.spec.name)
            if donate:
                complex_leaves.check_writable([live_p, *slots])
            live_g, live_p, *slots = [
                [*map(complex_leaves.parts, column)]
                for column in (live_g, live_p, *slots)
            ]
        leaves = Leaves(
            self.rule, live_g, live_p, slots, picked(numbers, live), picked(hyper, live)
        )
        paths: list[FastPath | None] = []
        for measure in self.measures:
            leaves, path = measure.added_to(leaves, execution)
            paths.append(path)
        held = [state[key] for key in self.vectors]
        columns, path = dispatch.step(leaves, execution, donate, held)
        paths.append(path)
        columns = [
            complex_leaves.rejoined(column, were_complex) if stream else column
            for column, stream in zip(columns, self.rule.outputs)
        ]
        if live != [] and None not in paths:
            given = chain(g, p, *map(trees.__getitem__, self.trees), held)
            tensors = [x for x in given if x is not None]
            there = [x is not None for x in p]
            known = [x for x in paths if x]
            self.cache.keep(structure, live, there, tensors, known, were_complex)
        return merged((p, *old.values()), columns, live), steps

    def _lazily(
        self,
        g: list[Any],
        p: list[Any],
        structure: tree.Structure,
        state: State,
        trees: dict[str, list[Any]],
        live: list[int] | None,
        given: dict[str, Any],
    ) -> tuple[Tree, State]:
        """A step by gradients of which some are sparse."""
        assert self.lazy is not None
        hyper = given["values"](structure, p, concrete.scalars_of(state["step"] + 1))
        g = sparse_rows.check(g, p, structure, hyper)
        here = [x if sparse_rows.are_among([y]) else y for x, y in zip(p, g)]
        check_leaves(here, p, trees, live, structure, self.forms)
        update = self.lazy.step
        if self.spec.sparse == "dense":
            columns = sparse_rows.dense(g), p
            grads, params = (tree.unflatten(structure, x) for x in columns)
            return update(grads, state, params, **given)
        return sparse_rows.step(update, g, p, state, trees, structure, hyper, given)

    def eval_params(self, state: State, params: Tree, **overrides: HyperValue) -> Tree:
        """What to evaluate with; see `Optimizer`. No derivative is lost."""
        evaluated = self.spec.evaluated
        if evaluated is None:
            self.hypers.check_known(overrides)
            return params
        p, structure = tree.flatten(params)
        check_state(state, ("step", *self.slots), self.vectors, structure, self.spec.name)
        vectors.check_captured(state["step"], p)
        columns = [
            concrete.scalars_of(state[slot])
            if self.scalar[slot]
            else tree.flatten_like(structure, state[slot], f"state['{slot}']")
            for slot in self.slots
        ]
        steps = concrete.scalars_of(state["step"])
        last = concrete.scalars_of(state["step"].clamp(min=1))  # a schedule's first is 0
        values = self.hypers.per_leaf(overrides, structure, p, last)
        parts = complex_leaves.parts
        new = [
            None if x is None else evaluated(*map(parts, (x, *slots)), step=t, **hyper)
            for x, t, hyper, *slots in zip(p, steps, values, *columns)
        ]
        were_complex = complex_leaves.among(p)
        return tree.unflatten(structure, complex_leaves.rejoined(new, were_complex))

    def _result(
        self,
        structure: tree.Structure,
        columns: Sequence[Any],
        steps: Tensor,
        params: Tree,
        state: State,
        donate: bool,
    ) -> tuple[Tree, State]:
        """The columns as trees and vectors; with ``donate`` the old trees hold them."""
        if donate and len(self.vectors) == 1 and steps is state["step"]:
            return params, state
        new = {"step": steps}
        for slot, column in zip(self.slots, columns[1:]):
            if self.scalar[slot]:
                what = f"{self.rule.name}'s '{slot}'"
                new[slot] = vectors.of_column(column, state[slot], what, structure)
            elif not donate:
                new[slot] = tree.unflatten(structure, column)
        if donate:
            for key, vector in new.items():
                if vector is not state[key]:
                    state[key].copy_(vector)
            return params, state
        return tree.unflatten(structure, columns[0]), new
