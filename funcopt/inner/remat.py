"""Rematerialization: a loop that keeps few states, and makes the others again.

One autograd.Function is the whole loop. Forward it keeps the state at the start of each
segment. Backward it goes from the last segment to the first: it makes the segment's
states again, and takes the adjoint of the carry back through its steps one by one.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from functools import cached_property
from typing import Any

import torch

from funcopt import tree
from funcopt.derivatives import SmoothLeaves, Trees, added, widened
from funcopt.execution import pullback
from funcopt.inner import mixed
from funcopt.inner.custom_vjp import CallContext, CustomVJP, distinct
from funcopt.inner.loop import CARRY, Loop, Record, Unrolled, carried
from funcopt.inner.rng_state import RngState, check_alike, drawing_again
from funcopt.types import Tensor, Tree

Tensors = Sequence[Tensor]
Bars = Sequence[Tensor | None]


def rematerialized(loop: Loop, carry: Trees, shared: Trees, segment: int) -> Unrolled:
    """As ``loop.run``, with the states kept at every ``segment`` steps only."""
    given = {**carry, **shared}
    call = _LoopCall(loop, SmoothLeaves(given), segment)
    values, others = call.inputs.split(given)
    found = _RematLoop.apply(call, *values, *others)
    return Unrolled(**call.outputs.filled(*call.parts(found)[::2]))


class _RematLoop(CustomVJP):
    """The loop. The states it keeps are outputs: only those and inputs can be saved."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.call, *tensors = inputs
        _, kept, _, kept_others = ctx.call.parts(output)
        losses = output[ctx.call.carried]
        ctx.save_for_backward(losses, *tensors, *kept, *kept_others)
        ctx.set_materialize_grads(False)


class _LoopCall:
    """One loop: the layout of its tensors, and the generators' states of each segment."""

    def __init__(self, loop: Loop, inputs: SmoothLeaves, segment: int) -> None:
        self.loop = loop
        self.inputs = inputs
        self.context = CallContext()
        names = inputs.names()
        self.count = len(names)
        self.carried = sum(name in CARRY for name in names)  #: they come first
        self.params = [i for i, name in enumerate(names) if name == "params"]
        self.starts = [*range(0, loop.steps, segment), loop.steps]
        self.rngs: list[RngState | None] = []

    def forward(self, tensors: Tensors) -> list[Tensor]:
        given = self.inputs.filled(tensors[: self.count], tensors[self.count :])
        step = self.loop.step.plain()  # no graph is kept of any gradient
        carry, record = {name: given[name] for name in CARRY}, Record()
        kept: list[Tree] = []
        for start, stop in zip(self.starts, self.starts[1:]):
            if start:  # in the order of the inputs: of a dict the keys are sorted
                kept.append([*carry.values()])
            rng = RngState(tensors)
            for k in range(start, stop):
                carry = record.add(step(self.loop.given(carry, given, k)))
            self.rngs.append(rng if rng.has_advanced() else None)
        losses, aux = record.stacked()
        found: Trees = {**carry, "losses": losses, "aux": aux}
        states: Trees = {"kept": kept}
        self.outputs, self.kept = SmoothLeaves(found), SmoothLeaves(states)
        (values, others), (kept_values, kept_others) = (
            self.outputs.split(found),
            self.kept.split(states),
        )
        self.sizes = len(values), len(kept_values), len(others), len(kept_others)
        return distinct([*values, *kept_values, *others, *kept_others], tensors)

    def parts(self, outputs: Sequence[Any]) -> list[Sequence[Any]]:
        """The smooth results, the states that are kept; what is not smooth of both."""
        found, start = [], 0
        for size in self.sizes:
            found.append(outputs[start : start + size])
            start += size
        return found

    def backward(
        self, saved: Tensors, cotangents: Bars, wanted: Sequence[bool]
    ) -> list[Tensor | None]:
        losses, inputs = saved[0], saved[1 : 1 + len(wanted)]
        kept = saved[1 + len(wanted) :]
        given = self.inputs.filled(inputs[: self.count], inputs[self.count :])
        states = self.kept.filled(kept[: self.sizes[1]], kept[self.sizes[1] :])["kept"]
        states = [dict(zip(CARRY, state)) for state in states]
        states = [{name: given[name] for name in CARRY}, *states]
        bars, kept_bars, _, _ = self.parts(cotangents)
        ahead = bars[: self.carried]
        of_steps = [
            [b if b is None else b[k] for b in bars[self.carried :]]
            for k in range(self.loop.steps)
        ]
        shared = [i for i in range(self.carried, self.count) if wanted[i]]
        sums: dict[int, Tensor | None] = dict.fromkeys(shared)
        entries: dict[int, list[Tensor | None]] = {i: [] for i in shared}
        again: dict[int, Tensor] = {}
        by_forward = self.loop.step.mixed and mixed.by_forward(inputs)
        pull = self._pull_mixed if by_forward else self._pull
        for i in reversed(range(len(states))):
            carries, rngs = self._made_again(i, states.pop(), given)
            for k in reversed(range(self.starts[i], self.starts[i + 1])):
                at = self.loop.given(carries.pop(), given, k)
                back = [] if self.loop.is_cut(k) else [*range(self.carried)]
                back = [j for j in back if k or wanted[j]] + shared
                made: list[Tensor] = []  # the loss, unless nothing is asked of the step
                own = self.loop.has_own_params(k)  # as in `Loop.run`, to the same bit
                found = pull(at, [*ahead, *of_steps[k]], back, rngs.pop(), made, own)
                again.update((k, loss) for loss in made)
                by_place = dict(zip(back, found))
                ahead = [by_place.get(j) for j in range(self.carried)]
                for j in shared:
                    entries[j].append(widened(by_place[j]))
                    if not self._sliced[j]:
                        (sums[j],) = added([sums[j]], entries[j][-1:])
                        entries[j].clear()
            if i:
                of_state = kept_bars[(i - 1) * self.carried : i * self.carried]
                ahead = added(ahead, of_state)
        check_alike(losses, again)
        for j in shared:
            if self._sliced[j]:
                sums[j] = _stacked(entries[j][::-1], inputs[j])
        first = {j: bar for j, bar in enumerate(ahead) if wanted[j]}
        found = [(first | sums).get(j) for j in range(len(wanted))]
        return [g if g is None else g.to(x.dtype) for g, x in zip(found, inputs)]

    @cached_property
    def _sliced(self) -> list[Any]:
        """Whether each input holds an entry for each step."""
        marks = {"hyper": self.loop.hyper.sliced()}
        by_hyper = self.inputs.aligned(marks, (), "")
        batch = [self.loop.batches and name == "batch" for name in self.inputs.names()]
        return [a or b for a, b in zip(by_hyper, batch)]

    def _made_again(
        self, i: int, carry: Tree, given: Trees
    ) -> tuple[list[Trees], list[RngState | None]]:
        """The states before each step of a segment, and the generators' states there."""
        start, stop = self.starts[i], self.starts[i + 1]
        carries, rngs = [self.loop.cut(carry, start)], [self.rngs[i]]
        step = self.loop.step.plain()
        with drawing_again(self.rngs[i]):
            for k in range(start, stop - 1):
                carry = carried(step(self.loop.given(carries[-1], given, k)))
                carries.append(self.loop.cut(carry, k + 1))
                rngs.append(self.rngs[i] and RngState(tree.leaves(carry["params"])))
        return carries, rngs

    def _pull(
        self,
        at: Trees,
        bars: Bars,
        back: list[int],
        rng: RngState | None,
        again: list[Tensor],
        own: bool,
    ) -> Bars:
        """The adjoints of a step's inputs; its loss is appended to ``again``."""
        values, others = self.inputs.split(at)
        plain = self.loop.step.plain()

        def step(values: Tensors) -> Tensors:
            stepped = plain(self.inputs.filled(values, others), own)
            again.append(stepped.loss.detach())
            return _smooth(stepped._asdict(), (*CARRY, "loss", "aux"))

        explained = mixed.explained() if self.loop.step.mixed else nullcontext()
        with drawing_again(rng), explained:
            return pullback.pull(step, values, bars, back)

    def _pull_mixed(
        self,
        at: Trees,
        bars: Bars,
        back: list[int],
        rng: RngState | None,
        again: list[Tensor],
        own: bool,
    ) -> Bars:
        """The same in two stages: of the update, and of the gradient in mixed mode."""
        step, count = self.loop.step.plain(), self.count
        values, others = self.inputs.split(at)
        with drawing_again(rng):
            grads, loss, *_ = step.gradient(at, own)
            of_grads: Trees = {"grads": grads}
            layout = SmoothLeaves(of_grads)
            slopes, _ = layout.split(of_grads)

            def update(values: Tensors) -> Tensors:
                given = self.inputs.filled(values[:count], others)
                grads = layout.filled(values[count:], ())["grads"]
                params, state = step.updated(grads, given)
                return _smooth({"params": params, "state": state}, ("params", "state"))

            # of the carry the buffers, which come last, are the loss's
            made = self.carried - self.inputs.names().count("buffers")
            wanted = [*back, *range(count, count + len(slopes))]
            first = pullback.pull(update, [*values, *slopes], bars[:made], wanted)
        again.append(loss)

        def results(values: Tensors) -> list[Tensor]:
            with drawing_again(rng):
                found = step.results(self.inputs.filled(values, others))
            names = ("loss", "aux", "buffers")
            return _smooth(dict(zip(names, found)), names)

        of_results = [*bars[self.carried :], *bars[made : self.carried]]
        second = mixed.pull(
            results, values, self.params, back, first[len(back) :], of_results
        )
        return added(first[: len(back)], second)


def _smooth(trees: Trees, names: Sequence[str]) -> list[Tensor]:
    """The smooth leaves of the trees, in the order of the names."""
    chosen = {name: trees[name] for name in names}
    return SmoothLeaves(chosen).split(chosen)[0]


def _stacked(entries: list[Tensor | None], like: Tensor) -> Tensor | None:
    if all(entry is None for entry in entries):
        return None
    rows = zip(entries, widened(like))
    return torch.stack([torch.zeros_like(x) if e is None else e for e, x in rows])
