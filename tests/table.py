"""The optimizers under test, a row each: every property is asked of every row."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from oracles import Lion

import funcopt as fo
from funcopt.execution import choice
from funcopt.execution.rule import Rule
from funcopt.types import State

Flags = Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """What the tests need to know of one optimizer."""

    factory: Callable[..., fo.Optimizer]
    twin: Callable[..., torch.optim.Optimizer]  #: the same rule in torch.optim
    combinations: list[Flags]  #: keyword arguments of both; every valid mix of flags
    floats: Mapping[str, Any]  #: hyperparameters to differentiate, and values for that
    least: Flags = field(default_factory=dict)  #: below which a float makes no sense
    idle: tuple[str, ...] = ()  #: floats that parameters may not depend on at first
    ulps: int = 2  #: of a half-precision step that torch rounds differently
    warm: int = 2  #: steps after which the rule does all that it ever does
    moves: bool = True  #: whether a step moves every number that has a gradient
    smooth: bool = True  #: whether the step depends smoothly on the gradient

    @property
    def name(self) -> str:
        return self.factory.__name__


@dataclass(frozen=True)
class Case:
    """A row with one combination of its flags."""

    row: Row
    flags: Flags

    def __str__(self) -> str:
        words = [
            k if v is True else f"{k}={v}" for k, v in self.flags.items() if v not in (0,)
        ]
        return "-".join([self.row.name, *words])

    def optimizer(self, **hyper: Any) -> fo.Optimizer:
        return self.row.factory(**{"lr": self.row.floats["lr"], **self.flags, **hyper})

    def twin(self, params: Any, **hyper: Any) -> torch.optim.Optimizer:
        hyper = {"lr": self.row.floats["lr"], **self.flags, **hyper}
        return self.row.twin(params, foreach=False, **hyper)

    def drives(self, path: str) -> bool:
        """Whether some steps surely depend on the input ``path``.

        Uphill nothing is sure: gradients grow, and adamax has no use for beta2.
        """
        name = path.removeprefix("hyper.").split(".")[0]
        return name not in self.row.idle and not self.flags["maximize"]

    def floats(self) -> dict[str, Any]:
        """The float hyperparameters that this combination has, with their values."""
        known = self.optimizer().hyper
        values = {**self.row.floats, **self.flags}
        return {name: values[name] for name in self.row.floats if name in known}

    def tensors(self, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
        """The same values as 0-d tensors."""
        return {
            name: tuple(torch.tensor(v, dtype=dtype) for v in value)
            if isinstance(value, tuple)
            else torch.tensor(value, dtype=dtype)
            for name, value in self.floats().items()
        }


#: slots that hold a number per leaf
SCALAR = {"eta", "mu", "mu_product"}


def slots_of(state: State) -> list[str]:
    """The slots that are trees like params."""
    return [name for name in state if name != "step" and name not in SCALAR]


def rule_of(optimizer: fo.Optimizer) -> Rule:
    """The rule by which it makes its steps."""
    params = [torch.ones(1)]
    with choice.observed() as groups:
        optimizer.update(params, optimizer.init(params), params)
    return groups[0].rule


def _mixes(**choices: tuple[Any, ...]) -> list[Flags]:
    return [dict(zip(choices, values)) for values in product(*choices.values())]


def _half(**choices: tuple[Any, Any]) -> list[Flags]:
    """Half of all mixes with maximize, in which any two flags meet in every way."""
    return [
        {"maximize": sum(v == choices[k][1] for k, v in flags.items()) % 2 == 1, **flags}
        for flags in _mixes(**choices)
    ]


OFF_ON = (False, True)
DECAY = (0.0, 0.1)

ROWS = [
    Row(
        fo.sgd,
        torch.optim.SGD,
        [
            flags
            for flags in _mixes(
                maximize=OFF_ON,
                weight_decay=DECAY,
                momentum=(0.0, 0.9),
                dampening=(0.0, 0.3),
                nesterov=OFF_ON,
            )
            # torch refuses nesterov without momentum, or with dampening
            if not flags["nesterov"] or (flags["momentum"] and not flags["dampening"])
        ],
        {"lr": 0.1, "weight_decay": 0.1, "momentum": 0.9, "dampening": 0.3},
    ),
    Row(
        fo.adam,
        torch.optim.Adam,
        _half(weight_decay=DECAY, amsgrad=OFF_ON, decoupled_weight_decay=OFF_ON),
        {"lr": 0.1, "betas": (0.8, 0.9), "eps": 0.01, "weight_decay": 0.1},
    ),
    Row(
        fo.adamw,
        torch.optim.AdamW,
        _mixes(maximize=OFF_ON, weight_decay=DECAY, amsgrad=OFF_ON),
        {"lr": 0.1, "betas": (0.8, 0.9), "eps": 0.01, "weight_decay": 0.1},
    ),
    Row(
        fo.adamax,
        torch.optim.Adamax,
        _mixes(maximize=OFF_ON, weight_decay=DECAY),
        {"lr": 0.1, "betas": (0.8, 0.9), "eps": 0.01, "weight_decay": 0.1},
    ),
    Row(
        fo.adagrad,
        torch.optim.Adagrad,
        _half(
            weight_decay=DECAY, lr_decay=(0.0, 0.1), initial_accumulator_value=(0.0, 0.1)
        ),
        {"lr": 0.1, "lr_decay": 0.1, "weight_decay": 0.1, "eps": 0.01},
    ),
    Row(
        fo.adadelta,
        torch.optim.Adadelta,
        _mixes(maximize=OFF_ON, weight_decay=DECAY, eps=(0.1,)),
        {"lr": 0.3, "rho": 0.8, "eps": 0.1, "weight_decay": 0.1},
        least={"eps": 1e-6},  # without it there is no first step
        ulps=3,  # torch rounds delta five times, and squares it
    ),
    Row(
        fo.rmsprop,
        torch.optim.RMSprop,
        _half(weight_decay=DECAY, momentum=(0.0, 0.9), centered=OFF_ON),
        {"lr": 0.01, "alpha": 0.9, "eps": 0.01, "weight_decay": 0.1, "momentum": 0.9},
        least={"alpha": 0.5},  # at 0 the centered mean square is 0
    ),
    Row(
        fo.radam,
        torch.optim.RAdam,
        _half(weight_decay=DECAY, decoupled_weight_decay=OFF_ON),
        {"lr": 0.1, "betas": (0.8, 0.9), "eps": 0.01, "weight_decay": 0.1},
        warm=5,  # the sixth step is the first that is rectified
    ),
    Row(
        fo.nadam,
        torch.optim.NAdam,
        _half(weight_decay=DECAY, decoupled_weight_decay=OFF_ON),
        {
            "lr": 0.1,
            "betas": (0.8, 0.9),
            "eps": 0.01,
            "weight_decay": 0.1,
            "momentum_decay": 0.5,
        },
    ),
    Row(
        fo.asgd,
        torch.optim.ASGD,
        _half(weight_decay=DECAY, lambd=(1e-4, 0.1), t0=(1e6, 0.5)),
        {"lr": 0.1, "lambd": 0.1, "alpha": 0.75, "t0": 0.5, "weight_decay": 0.1},
        idle=("t0",),  # it is the average's alone
    ),
    Row(
        fo.rprop,
        torch.optim.Rprop,
        [
            {"maximize": False, "step_sizes": (0.0, 50.0)},
            {"maximize": True, "step_sizes": (1e-6, 50.0)},
            {"maximize": False, "step_sizes": (0.06, 0.15)},
            {"maximize": True, "step_sizes": (0.0, 0.15), "etas": (0.6, 1.4)},
        ],
        {"lr": 0.1, "etas": (0.5, 1.2), "step_sizes": (0.0, 50.0)},
        least={"etas": (0.1, 1.1), "step_sizes": (0.0, 0.2)},
        idle=("etas", "step_sizes"),
        moves=False,  # not past a minimum
        warm=1,  # then no gradient is 0 for having been reversed, where a step jumps
        smooth=False,
    ),
    Row(
        fo.lion,
        Lion,
        _mixes(maximize=OFF_ON, weight_decay=DECAY),
        {"lr": 0.02, "betas": (0.8, 0.9), "weight_decay": 0.1},
        idle=("betas",),  # of whose product there is but the sign
        smooth=False,
    ),
]

#: every row with every combination of its flags
CASES = [Case(row, flags) for row in ROWS for flags in row.combinations]
#: those with a derivative by the gradient
SMOOTH = [case for case in CASES if case.row.smooth]
#: every row with none of its flags, and with the last combination, for what is costly
ENDS = [Case(row, row.combinations[i]) for row in ROWS for i in (0, -1)]
