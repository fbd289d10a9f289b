"""A rule with what executors need to know of it, and the programs traced from it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch

from funcopt.execution import trace
from funcopt.execution.executor import BuildError, Engine, Executor
from funcopt.execution.outside import undisturbed
from funcopt.execution.program import Function, Program
from funcopt.execution.recycle import Recycler
from funcopt.execution.rule_derivatives import jvp, vjp
from funcopt.execution.shapeless import ShapeError, shapeless
from funcopt.execution.trace import UntraceableError
from funcopt.types import RuleFunction, Tensor

#: of each hyperparameter: "zero" (the number 0, which may leave a term out), "scalar" or
#: "stream" (a value for every element)
Kinds: TypeAlias = tuple[str, ...]

_MOST = 256  # programs kept for one rule: kinds × dtypes × derivatives


@dataclass(frozen=True, eq=False)
class Rule:
    """One leaf's arithmetic: ``(g, p, *slots, step=, **hyper) -> (p, *slots)``.

    With ``sums`` the function gives that many sums over the leaf instead: the totals
    that are measured before a step.
    """

    function: RuleFunction
    name: str
    scalar: tuple[bool, ...] = ()  #: for each slot, whether it is a number per leaf
    hyper: tuple[str, ...] = ()  #: the names of the hyperparameters
    elementwise: bool = True  #: whether each element goes its own way
    norms: bool = False  #: if not: whether they meet in sums over the leaf alone
    stacks: int = 0  #: elements up to which leaves that are alike are given as one
    sums: int = 0  #: how many sums over the leaf it gives, and then nothing else
    _programs: dict[Any, Program | UntraceableError] = field(default_factory=dict)
    _executors: dict[Any, tuple[Program, Executor | BuildError]] = field(
        default_factory=dict
    )
    signatures: dict[Any, Any] = field(default_factory=dict)  #: of its calls
    recycler: Recycler = field(default_factory=Recycler)  #: of its steps' results

    def kinds(self, values: Mapping[str, Any]) -> Kinds:
        """What each hyperparameter is, of those of one leaf."""
        return tuple(map(_kind, map(values.__getitem__, self.hyper)))

    def scalars(self, kinds: Kinds) -> list[str]:
        """The hyperparameters that are input scalars of the program, in order."""
        return [name for name, kind in zip(self.hyper, kinds) if kind == "scalar"]

    def streams(self, kinds: Kinds) -> list[str]:
        """The hyperparameters that are input streams of the program, in order."""
        return [name for name, kind in zip(self.hyper, kinds) if kind == "stream"]

    def inputs(self, kinds: Kinds) -> tuple[bool, ...]:
        """Of ``g, p, *slots, step, *hyper`` without zeros, which are streams."""
        slots = (not scalar for scalar in self.scalar)
        hyper = (kind == "stream" for kind in kinds if kind != "zero")
        return (True, True, *slots, False, *hyper)

    @property
    def step_place(self) -> int:
        """Which of the inputs is the step: after ``g, p, *slots``."""
        return 2 + len(self.scalar)

    @property
    def outputs(self) -> tuple[bool, ...]:
        """Of ``p, *slots``, which are streams; a sum is none."""
        if self.sums:
            return (False,) * self.sums
        return (True, *(not scalar for scalar in self.scalar))

    def flat(self, kinds: Kinds) -> Function:
        """The rule as a function of its inputs alone, in their order."""
        names = [name for name, kind in zip(self.hyper, kinds) if kind != "zero"]
        zeros = {name: 0.0 for name, kind in zip(self.hyper, kinds) if kind == "zero"}
        # Not the Rule itself: it holds programs, which hold this, and buffers of results,
        # which would stay until the garbage is looked through.
        rule, state = self.function, self.step_place

        def function(*inputs: Tensor) -> Sequence[Tensor]:
            step, *values = inputs[state:]
            hyper = dict(zip(names, values))
            return rule(*inputs[:state], step=step, **hyper, **zeros)

        return function

    def program(self, kinds: Kinds, dtype: torch.dtype) -> Program:
        """What the rule computes of streams in ``dtype``.

        Raises:
            UntraceableError: no kernel can be printed for it.
        """
        return self._traced(
            ("step", kinds, dtype),
            lambda: (shapeless(self.flat(kinds)), self.inputs(kinds)),
            dtype,
        )

    def looks_at_shapes(self) -> bool:
        """Whether what it does depends on its leaf's shape: no axis may be added then."""
        try:
            self.program(("scalar",) * len(self.hyper), torch.float32)
        except UntraceableError as error:
            return isinstance(error, ShapeError)
        return False

    def vjp(self, kinds: Kinds, dtype: torch.dtype, wanted: tuple[bool, ...]) -> Program:
        """The gradients of the ``wanted`` inputs, from the inputs and the cotangents."""
        return self._traced(
            ("vjp", kinds, dtype, wanted),
            lambda: (
                vjp(self.flat(kinds), wanted),
                (*self.inputs(kinds), *self.outputs),
            ),
            dtype,
        )

    def jvp(self, kinds: Kinds, dtype: torch.dtype, moving: tuple[bool, ...]) -> Program:
        """The tangents of the outputs, from the inputs and those of the ``moving``."""
        inputs = self.inputs(kinds)
        return self._traced(
            ("jvp", kinds, dtype, moving),
            lambda: (
                jvp(self.flat(kinds), moving),
                (*inputs, *(stream for stream, m in zip(inputs, moving) if m)),
            ),
            dtype,
        )

    def second_vjp(
        self,
        kinds: Kinds,
        dtype: torch.dtype,
        first: tuple[bool, ...],
        wanted: tuple[bool, ...],
    ) -> Program:
        """The ``wanted`` gradients of what ``vjp(kinds, dtype, first)`` gives.

        From its inputs and a cotangent for each gradient that it gives.
        """
        inputs = self.inputs(kinds)
        asked = tuple(stream for stream, w in zip(inputs, first) if w)
        return self._traced(
            ("second_vjp", kinds, dtype, first, wanted),
            lambda: (
                vjp(vjp(self.flat(kinds), first), wanted),
                (*inputs, *self.outputs, *asked),
            ),
            dtype,
        )

    def executor(self, engine: Engine, program: Program, stored: torch.dtype) -> Executor:
        """The program made ready by ``engine``, once.

        Raises:
            BuildError: it cannot be.
        """
        key = engine, id(program), stored  # to compare programs would take long
        of, found = self._executors.get(key, (None, None))
        if found is None or of is not program:
            if len(self._executors) >= _MOST:
                self._executors.clear()
            try:
                with undisturbed():
                    found = engine(program, stored)
            except BuildError as error:
                found = error  # the compiler is not asked twice
            self._executors[key] = program, found
        if isinstance(found, BuildError):
            raise found
        return found

    def _traced(
        self,
        key: Any,
        what: Callable[[], tuple[Function, Sequence[bool]]],
        dtype: torch.dtype,
    ) -> Program:
        if not self.elementwise and not self.norms:
            raise UntraceableError(f"{self.name} needs each leaf whole")
        found = self._programs.get(key)
        if found is None:
            if len(self._programs) >= _MOST:
                self._programs.clear()
            try:
                with undisturbed():
                    found = trace.trace(*what(), dtype)
            except UntraceableError as error:
                found = error
            self._programs[key] = found
        if isinstance(found, UntraceableError):
            raise found
        return found


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return "stream" if value.ndim else "scalar"
    return "scalar" if value else "zero"
