"""SOAP, by the package pytorch_optimizer, with its QR in float64."""

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any
from unittest.mock import patch

import torch
from pytorch_optimizer import SOAP

from published.problem import Arrays
from published.record import Stepper, torch_stepper, write

#: two axes make one of at most four numbers; no sum lacks more than one eigenvector
SHAPES = ((3, 2), (2,), (2, 2, 3))

RUNS: list[dict[str, Any]] = [
    {"precondition_frequency": 1, "weight_decay": 0.0},
    {"precondition_frequency": 3, "shampoo_beta": 0.8, "eps": 1e-3},
    {"precondition_frequency": 2, "merge_dims": True, "max_precond_dim": 4},
    {"precondition_frequency": 2, "precondition_1d": True, "max_precond_dim": 2},
]
SHARED = {"lr": 0.05, "betas": [0.9, 0.95], "weight_decay": 0.1}
#: what they call otherwise
THEIRS = {"max_precond_dim": "max_precondition_dim"}


class Merging(SOAP):
    """Its own way to merge axes makes a vector a number, and fails."""

    def merge_dims(self, grad: torch.Tensor, max_precondition_dim: int) -> torch.Tensor:
        return grad if grad.ndim < 2 else super().merge_dims(grad, max_precondition_dim)


def stepper(arguments: Mapping[str, Any]) -> Stepper:
    given = {THEIRS.get(name, name): value for name, value in arguments.items()}
    step = torch_stepper(lambda params: Merging(params, **given), SHAPES)

    def exact(grads: Arrays) -> Arrays:
        with patch.object(torch, "float32", torch.float64):  # which they cast to
            return step(grads)

    return exact


if __name__ == "__main__":
    write(
        "soap",
        f"pytorch_optimizer {version('pytorch_optimizer')}: SOAP, with the QR that it "
        "casts to float32 in float64",
        [(run, stepper(run)) for run in ({**SHARED, **own} for own in RUNS)],
        SHAPES,
    )
