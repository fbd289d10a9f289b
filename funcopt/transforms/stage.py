"""Stages of a chain, and how they and an optimizer's rule become one rule."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, final

from funcopt.errors import HyperparameterTypeError
from funcopt.execution import donation
from funcopt.hyper import Hyper
from funcopt.spec import Spec
from funcopt.types import SlotStart, Tensor


@dataclass(frozen=True)
class Stage:
    """A link of a `chain` beside the optimizer."""

    spec: Spec

    def __repr__(self) -> str:
        values = ", ".join(f"{n}={h.value!r}" for n, h in self.spec.hyper.items())
        return f"{self.spec.name}({values})"


@final
class GradientStage(Stage):
    """What is done to gradients before the optimizer has them.

    The rule is ``(g, p, *slots, step=, **hyper) -> (g, *slots)``.
    """


@final
class ParameterStage(Stage):
    """What is done to the parameters that come out of the optimizer.

    The rule is ``(new, old, *slots, step=, **hyper) -> (new, *slots)``.
    """


@dataclass(frozen=True)
class _Part:
    """One rule of a joint rule, with the joint names of its slots and arguments."""

    spec: Spec
    slots: Sequence[str]
    arguments: Mapping[str, str]  #: its own name of each → the joint one

    def call(self, function: Any, first: Sequence[Any], held: Any, given: Any) -> Any:
        """``function`` of ``first``, of the slots that are held and the arguments."""
        own = {a: given[joint] for a, joint in self.arguments.items() if joint in given}
        slots = map(held.__getitem__, self.slots)
        return function(*first, *slots, step=given["step"], **own)

    def step(self, x: Tensor, p: Tensor, held: dict[str, Any], given: Any) -> Tensor:
        """What its rule makes of ``x``; its new slots are held in place of the old."""
        x, *new = self.call(donation.kept(self.spec.rule), (x, p), held, given)
        held.update(zip(self.slots, new))
        return x


class _Names:
    """The slots and hyperparameters of several rules, under one name each."""

    def __init__(self, taken: Iterable[str]) -> None:
        self.slots: dict[str, SlotStart] = {}
        self.hyper: dict[str, Hyper] = {}
        self._taken = {"step", *taken}

    def part(self, spec: Spec) -> _Part:
        """The rule with the names that are left for it."""
        slots = {self._free(slot, spec): first for slot, first in spec.slots.items()}
        self.slots |= slots
        arguments: dict[str, str] = {}
        for name, hyper in spec.hyper.items():
            parts = {part: self._free(part, spec) for part in hyper.parts}
            public = self._free(name, spec)
            self.hyper[public] = replace(hyper, parts=tuple(parts.values()))
            arguments |= parts or {name: public}
        for totals in spec.totals:
            arguments |= {total: self._free(total, spec) for total in totals}
        return _Part(spec, tuple(slots), arguments)

    def _free(self, name: str, spec: Spec) -> str:
        """``name``, or with its owner's before it, numbered if need be."""
        found, k = name, 1
        while found in self._taken:
            owner = spec.name if k == 1 else f"{spec.name}_{k}"
            found, k = f"{owner}_{name}", k + 1
        self._taken.add(found)
        return found


@dataclass(frozen=True, eq=False)
class _Joint:
    """Rules one after another, as the functions of one."""

    slots: Sequence[str]
    parts: Sequence[_Part]

    def rule(self, g: Tensor, p: Tensor, *state: Any, **given: Any) -> tuple[Any, ...]:
        held = dict(zip(self.slots, state))
        return self._through(self.parts, g, p, held, given), *held.values()

    def total(
        self,
        k: int,
        total: Callable[..., Tensor],
        g: Tensor,
        p: Tensor,
        *state: Any,
        **given: Any,
    ) -> Tensor:
        """A sum that the k-th asks for, of what comes to it."""
        held = dict(zip(self.slots, state))
        x = self._through(self.parts[:k], g, p, held, given)
        return self.parts[k].call(total, (x, p), held, given)

    def evaluated(self, p: Tensor, *state: Any, **given: Any) -> Tensor:
        held = dict(zip(self.slots, state))
        part = [part for part in self.parts if part.spec.evaluated][-1]
        return part.call(part.spec.evaluated, (p,), held, given)

    def _through(
        self, some: Sequence[_Part], x: Tensor, p: Tensor, held: Any, given: Any
    ) -> Tensor:
        for part in some:
            x = part.step(x, p, held, given)
        return x


def joined(
    before: Sequence[Spec],
    rule: Spec | None,
    after: Sequence[Spec],
    name: str,
    taken: Iterable[str] = (),
) -> Spec:
    """One rule that is all of them in turn: one kernel, one derivative, one state.

    The optimizer's slots and hyperparameters keep their names. So do a stage's, but for
    those that are taken, before which the stage's own name is put.
    """
    middle = [rule] if rule else []
    names = _Names(taken)
    own = [names.part(spec) for spec in middle]  # first, so that it keeps its names
    first, last = [[names.part(spec) for spec in specs] for specs in (before, after)]
    parts = [*first, *own, *last]
    joint = _Joint(tuple(names.slots), parts)
    specs = [part.spec for part in parts]
    return Spec(
        joint.rule,
        name,
        names.slots,
        names.hyper,
        elementwise=all(spec.elementwise for spec in specs),
        norms=all(spec.traceable for spec in specs),
        matrices=any(spec.matrices for spec in specs),
        totals=[
            {
                part.arguments[key]: partial(joint.total, k, total)
                for key, total in totals.items()
            }
            for k, part in enumerate(parts)
            for totals in part.spec.totals
        ],
        evaluated=joint.evaluated if any(spec.evaluated for spec in specs) else None,
        sparse=_sparse(before, rule, after),
    )


def _sparse(before: Sequence[Spec], rule: Spec | None, after: Sequence[Spec]) -> Any:
    """What the whole does with a sparse gradient: as the rule, if its stages can."""
    if rule is None:
        return ""
    whole = [spec for spec in (*before, *after) if spec.sparse != "rows"]
    if not whole or rule.sparse == "dense":
        return rule.sparse
    if rule.sparse == "only":
        raise HyperparameterTypeError(
            f"{rule.name} steps what a sparse gradient names, and {whole[0].name} goes "
            "by all of a leaf; leave it out, or take fo.adam and dense gradients"
        )
    return ""
