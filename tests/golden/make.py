"""Writes checkpoints as they are today: later releases must load them.

Of torch.optim's classes by torch.optim itself, of the others by funcopt.

``python tests/golden/make.py`` makes those that are missing; one that was ever released
is not made anew.
"""

import copy
from pathlib import Path
from typing import Any

import torch

from funcopt import torch_optim

FOLDER = Path(__file__).parent
CASES: dict[str, dict[str, Any]] = {
    "ASGD": {"t0": 2.0},
    "Adadelta": {},
    "Adafactor": {},
    "Adagrad": {"initial_accumulator_value": 0.1},
    "Adam": {"amsgrad": True},
    "AdamW": {},
    "Adamax": {},
    "LBFGS": {"max_iter": 3},
    "Muon": {},
    "NAdam": {},
    "RAdam": {},
    "RMSprop": {"momentum": 0.9},
    "Rprop": {},
    "SGD": {"lr": 0.01, "momentum": 0.9, "nesterov": True},
    "SparseAdam": {},
}
#: those that torch.optim does not have
OWN: dict[str, dict[str, Any]] = {
    name: {} for name in torch_optim.FACTORIES if name not in CASES
}
OWN["SGLD"] = {"temperature": 0.0}  # without noise
OWN["ScheduleFreeSGD"] = {"lr": 0.01}
OWN["DoG"] = {"reps_rel": 0.01}  # or it would hardly move
Params = dict[str, torch.nn.Parameter]


def start(name: str) -> Params:
    generator = torch.Generator().manual_seed(1)
    shapes = {"weight": (2, 3), "bias": (2,)}
    if name == "Muon":
        shapes = {"weight": (2, 3)}
    return {
        key: torch.nn.Parameter(torch.randn(shape, generator=generator))
        for key, shape in shapes.items()
    }


def steps(optimizer: Any, params: Params, count: int) -> None:
    """Steps of the gradient of Σ(p - 1)⁴, in torch's own operations."""

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = torch.stack([((p - 1) ** 4).sum() for p in params.values()]).sum()
        loss.backward()
        if type(optimizer).__name__ == "SparseAdam":
            for p in params.values():
                assert p.grad is not None
                p.grad[1:] = 0  # rows that a sparse gradient does not name
                p.grad = p.grad.to_sparse(1)
        return loss

    for _ in range(count):
        optimizer.step(closure)


def main() -> None:
    for name, kwargs in {**CASES, **OWN}.items():
        file = FOLDER / f"{name}.pt"
        if file.exists():
            continue
        params = start(name)
        library = torch.optim if name in CASES else torch_optim
        optimizer = getattr(library, name)(params.items(), **kwargs)
        steps(optimizer, params, 3)
        saved = {
            "optimizer": optimizer.state_dict(),
            "params": {key: p.detach().clone() for key, p in params.items()},
        }
        saved = copy.deepcopy(saved)  # no longer the running state
        steps(optimizer, params, 3)
        saved["after"] = {key: p.detach().clone() for key, p in params.items()}
        torch.save(saved, file)


if __name__ == "__main__":
    main()
