"""The optimizers under test, a row each: every property is asked of every row."""

import torch
from row import Case, showing
from rows import (
    adaptive,
    averaging,
    layerwise,
    matrix,
    parameter_free,
    sign,
    torch_optim,
)

import funcopt as fo
from funcopt.execution import executor_choice
from funcopt.execution.rule import Rule
from funcopt.types import State

ROWS = [
    *torch_optim.ROWS,
    *adaptive.ROWS,
    *averaging.ROWS,
    *layerwise.ROWS,
    *matrix.ROWS,
    *parameter_free.ROWS,
    *sign.ROWS,
]

#: every row with every combination of its flags
CASES = [Case(row, flags) for row in ROWS for flags in row.combinations]
#: every row with none of its flags, and with the last combination, for what is costly
ENDS = [Case(row, row.combinations[i]) for row in ROWS for i in (0, -1)]
#: with the ends, what shows each value of each flag
EACH = showing([*ENDS, *CASES], 1)
_MEETING = showing(sorted(CASES, key=lambda case: case.flags["maximize"]), 2)
#: every mix downhill, and uphill the last, and what it takes for any two values to meet:
#: what a rule makes of the gradient's sign is shown by the trajectories of all CASES
MIXES = [c for c in CASES if not c.flags["maximize"] or c in ENDS or c in _MEETING]
#: those with a derivative by the gradient
SMOOTH = [case for case in MIXES if case.row.smooth]
#: what the quick run takes: the last of each, and the plainest two
QUICK = [
    *(Case(row, row.combinations[-1]) for row in ROWS),
    *(case for case in ENDS if str(case) in ("sgd", "adamw")),
]
#: what it takes of a costly test: one of each kind
PLAINEST = [
    case
    for case in QUICK
    if str(case) in ("sgd", "adamw")
    or case.row.name in ("rmsprop", "adadelta", "lamb", "muon", "prodigy")
]
#: those of kernels, of which every element goes its own way
ELEMENTWISE = [case for case in CASES if case.row.elementwise]
ELEMENTWISE_MIXES = [case for case in MIXES if case.row.elementwise]
ELEMENTWISE_EACH = [case for case in EACH if case.row.elementwise]
ELEMENTWISE_ENDS = [case for case in ENDS if case.row.elementwise]
#: those of rules that see their leaf in norms alone
NORMS = [case for case in CASES if case.row in layerwise.ROWS]
#: and those that kernels run by sums over the tree
TOTALS = [case for case in CASES if case.row in parameter_free.ROWS]
#: those of rules of matrices
MATRIX = [case for case in CASES if case.row in matrix.ROWS]
#: those with a twin to race with
TWINS = [
    Case(case.row, {**case.flags, **case.row.like_twin})
    for case in CASES
    if case.row.twin
]

_SPECS = [case.optimizer().spec for case in CASES]
_SLOTS = [slot for spec in _SPECS if spec for slot in spec.slots.items()]
#: slots that hold a number per leaf
SCALAR = {name for name, first in _SLOTS if not callable(first)}
#: slots that begin as the parameter
COPIES = {name for name, first in _SLOTS if first is torch.clone}


def slots_of(state: State) -> list[str]:
    """The slots that are trees like params."""
    return [name for name in state if name != "step" and name not in SCALAR]


def rule_of(optimizer: fo.Optimizer) -> Rule:
    """The rule by which it makes its steps."""
    params = [torch.ones(1)]
    with executor_choice.observed() as groups:
        optimizer.update(params, optimizer.init(params), params)
    return groups[0].rule
