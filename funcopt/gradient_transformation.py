"""Optimizers in the shape of optax's and TorchOpt's, which give updates; and back."""

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from funcopt import tree
from funcopt.errors import HyperparameterTypeError
from funcopt.optimizer import Optimizer, check_optimizer
from funcopt.types import Tree


class GradientTransformation(NamedTuple):
    """``init(params) -> state`` and ``update(grads, state, ...) -> (updates, state)``."""

    init: Callable[[Tree], Any]
    update: Callable[..., tuple[Tree, Any]]


def as_torchopt(opt: Optimizer) -> GradientTransformation:
    """An Optimizer in the shape of TorchOpt's and optax's: updates come out.

    Args:
        opt: any Optimizer.

    Returns:
        ``(init, update)`` with ``update(grads, state, params=None, *, inplace=False) ->
        (updates, state)``: what is to be added to the parameters, which it must be given,
        in the containers of grads. Nothing is written over; with ``inplace`` there is no
        graph, as in TorchOpt. To add and subtract rounds: parameters may differ from
        ``opt.update``'s in the last place. Where TorchOpt has been imported, the class is
        its own, which its ``FuncOptimizer``, ``Optimizer`` and ``MetaOptimizer`` ask for.

    Raises:
        HyperparameterTypeError: by ``update``, without params.

    Source:
        The shape is optax's (DeepMind, 2020), also TorchOpt's (Ren and others, 2022).

    Example:
        >>> import torch, funcopt as fo
        >>> init, update = fo.as_torchopt(fo.sgd(lr=0.5))
        >>> p = torch.ones(2)
        >>> update(p, init(p), params=p)[0]
        tensor([-0.5000, -0.5000])
    """
    check_optimizer(opt, "as_torchopt")
    torchopt = sys.modules.get("torchopt.base")
    made = torchopt.GradientTransformation if torchopt else GradientTransformation
    return made(opt.init, functools.partial(_updates, opt))


def _updates(
    opt: Optimizer,
    updates: Tree,
    state: Any,
    params: Tree = None,
    *,
    inplace: bool = False,
    **extra: Any,
) -> tuple[Tree, Any]:
    if params is None:
        raise HyperparameterTypeError(
            f"{opt.name} needs the parameters: update(grads, state, params=params)"
        )
    flat, containers = tree.flatten(updates)
    structure = tree.flatten(params)[1]
    if tree.paths(containers) == tree.paths(structure):  # a tuple beside a list, say
        updates = tree.unflatten(structure, flat)
    with torch.set_grad_enabled(torch.is_grad_enabled() and not inplace):
        new, state = opt.update(updates, state, params, **extra)
        moves = tree.leaves(tree.map(torch.sub, new, params))
    return tree.unflatten(containers, moves), state


def from_transform(tx: Any) -> Optimizer:
    """A transform in the shape of optax's or TorchOpt's as an Optimizer.

    Args:
        tx: an object with ``init(params)`` and ``update(grads, state, params=...)`` that
            gives updates, to be added to the parameters: TorchOpt's, or one's own.

    Returns:
        An Optimizer with that state; ``update`` takes ``donate`` for nothing.

    Raises:
        HyperparameterTypeError: an object without ``init`` and ``update``.

    Source:
        funcopt.

    Example:
        >>> import torch, funcopt as fo
        >>> tx = fo.as_torchopt(fo.sgd(lr=0.5))
        >>> opt = fo.from_transform(tx)
        >>> p = torch.ones(2)
        >>> opt.update(p, opt.init(p), p)[0]
        tensor([0.5000, 0.5000])
    """
    if not all(callable(getattr(tx, name, None)) for name in ("init", "update")):
        raise HyperparameterTypeError(
            f"from_transform takes an object with init and update, not {tx!r}"
        )
    transform = tx.update
    if "inplace" in inspect.signature(transform).parameters:
        # TorchOpt's writes over gradients.
        transform = functools.partial(transform, inplace=False)

    update = functools.partial(_applied, transform)
    return Optimizer(tx.init, update, type(tx).__name__)


def _applied(
    transform: Callable[..., Any],
    grads: Tree,
    state: Any,
    params: Tree,
    *,
    donate: bool = False,
    execution: str | None = None,
    **extra: Any,
) -> tuple[Tree, Any]:
    del donate
    if execution is not None:  # which wrappers hand on, and only ours knows
        extra["execution"] = execution
    updates, state = transform(grads, state, params=params, **extra)
    flat, structure = tree.flatten(params)
    moves = tree.flatten_like(structure, updates, "updates")
    new = [p if u is None else p + u for p, u in zip(flat, moves)]
    return tree.unflatten(structure, new), state
