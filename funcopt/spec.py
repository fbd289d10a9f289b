"""A rule with all that is declared of it: what a step is made by."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from funcopt.hyper import Hyper
from funcopt.types import RuleFunction, SlotStart, Tensor

#: sums over a leaf, by name; each is added up over all leaves before the rule is called
Totals: TypeAlias = Mapping[str, Callable[..., Tensor]]


@dataclass(frozen=True)
class Spec:
    """A rule, its name, state and hyperparameters, and what it asks of its leaf.

    ``totals`` are sums over the whole tree, which the rule gets as keywords: functions
    of the rule's own arguments that give a 0-d sum over their leaf. Those of a later
    mapping get the totals of earlier ones.

    ``evaluated`` gives what to evaluate a model with, where that is not the parameter:
    ``(p, *slots, step=, **hyper)`` → p.
    """

    rule: RuleFunction
    name: str
    slots: Mapping[str, SlotStart]
    hyper: Mapping[str, Hyper]
    elementwise: bool = True  #: whether each element goes its own way
    norms: bool = False  #: if not: whether they meet in sums over the leaf alone
    matrices: bool = False  #: whether a leaf must have two axes
    #: whether a leaf may have axes in front, of leaves that are alike, as torch's matrix
    #: functions have (by its slots' shapes the rule tells them from the leaf's own):
    #: the number of elements up to which leaves are faster so on a CPU, else 0
    stacks: int = 0
    totals: Sequence[Totals] = ()
    evaluated: Callable[..., Any] | None = None
    #: what is done with a sparse gradient: "" refuses it, "rows" steps what it names (of
    #: a stage: makes zeros of zeros, which count for nothing), "dense" makes it dense;
    #: "only" steps what it names, and refuses dense ones
    sparse: Literal["", "rows", "dense", "only"] = ""

    @property
    def traceable(self) -> bool:
        """Whether it does the same whatever a leaf's shape, as a kernel does."""
        return self.elementwise or self.norms
