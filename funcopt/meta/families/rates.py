"""θ of the families that learn rates: the parameters, and the rates beside them."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from funcopt import select, tree
from funcopt.checks import check_params
from funcopt.errors import HyperparameterError, StructureError
from funcopt.optimizer import Optimizer, check_optimizer
from funcopt.types import Tensor, Tree


def with_rates(params: Tree, inner: Optimizer, shape_of: Callable[[Tensor], Any]) -> Tree:
    """The first θ: a tensor of rates for each leaf, filled with the inner ``lr``."""
    check_optimizer(inner, "a family that learns rates")
    leaves, structure = tree.flatten(params)
    check_params(leaves, structure)
    values = select.per_leaf(inner.hyper.get("lr"), structure, "lr")
    for path, value in zip(tree.paths(structure), values):
        if not isinstance(value, float | int) and not (
            isinstance(value, Tensor) and not value.ndim
        ):
            raise HyperparameterError(
                f"the learned rate of '{path}' starts from a number, not {value!r}; make "
                "the inner optimizer with one: fo.sgd(lr=0.1)"
            )

    def filled(p: Tensor, value: Any) -> Tensor:
        return torch.zeros(shape_of(p), dtype=p.dtype, device=p.device) + value

    rates = tree.map(filled, params, tree.unflatten(structure, values))
    return {"params": params, "lr": rates}


def parts(theta: Tree) -> tuple[Tree, Tree]:
    """The parameters, and the rates that are learned beside them."""
    if not isinstance(theta, Mapping) or theta.keys() != {"params", "lr"}:
        raise StructureError(
            "theta holds 'params' and 'lr', as family.init(params) makes it; this is "
            + (f"{sorted(theta)}" if isinstance(theta, Mapping) else type(theta).__name__)
        )
    return theta["params"], theta["lr"]


def network(theta: Tree) -> Tree:
    """The parameters of the unadapted network."""
    return parts(theta)[0]
