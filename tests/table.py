"""The optimizers under test, a row each: every property is asked of every row."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch

import funcopt as fo

Flags = Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """What the tests need to know of one optimizer."""

    factory: Callable[..., fo.Optimizer]
    twin: Callable[..., torch.optim.Optimizer]  #: the same rule in torch.optim
    combinations: list[Flags]  #: keyword arguments of both; every valid mix of flags
    floats: Mapping[str, Any]  #: hyperparameters to differentiate, and values for that
    smooth: bool = True  #: whether the step has a derivative almost everywhere

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


def _mixes(**choices: tuple[Any, ...]) -> list[Flags]:
    return [dict(zip(choices, values)) for values in product(*choices.values())]


OFF_ON = (False, True)

ROWS = [
    Row(
        fo.sgd,
        torch.optim.SGD,
        [
            flags
            for flags in _mixes(
                maximize=OFF_ON,
                weight_decay=(0.0, 0.1),
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
        _mixes(
            maximize=OFF_ON,
            weight_decay=(0.0, 0.1),
            amsgrad=OFF_ON,
            decoupled_weight_decay=OFF_ON,
        ),
        {"lr": 0.1, "betas": (0.8, 0.9), "eps": 0.01, "weight_decay": 0.1},
    ),
    Row(
        fo.adamw,
        torch.optim.AdamW,
        _mixes(maximize=OFF_ON, weight_decay=(0.0, 0.1), amsgrad=OFF_ON),
        {"lr": 0.1, "betas": (0.8, 0.9), "eps": 0.01, "weight_decay": 0.1},
    ),
]

#: every row with every combination of its flags
CASES = [Case(row, flags) for row in ROWS for flags in row.combinations]
#: those that have a derivative
SMOOTH = [case for case in CASES if case.row.smooth]
#: every row with none of its flags, and with the last combination, for what is costly
ENDS = [Case(row, row.combinations[i]) for row in ROWS for i in (0, -1)]
