"""The forward-mode estimator: how the training depends on eta is carried with it."""

import torch

from funcopt import tree
from funcopt.derivatives import Function, Trees, jvp
from funcopt.execution import autocast
from funcopt.flat_function import FlatFunction
from funcopt.list_vmap import list_vmap
from funcopt.meta.estimate import Estimate, check_eta, check_remembered
from funcopt.meta.problem import (
    Carry,
    Problem,
    beside_params,
    drawing_ahead,
    go_on,
    outer_vjp,
    ready,
    standing,
    stands_at,
    window_of,
)
from funcopt.meta.rollout import steps_on
from funcopt.stepping import complex_leaves
from funcopt.types import Tensor, Tree


def forward(
    problem: Problem,
    eta: Tree,
    *,
    carry: Carry | None = None,
    window: int | None = None,
) -> Estimate:
    r"""The exact derivative, carried forward with the training (RTRL).

    .. math::
        Z_{k+1} = \frac{\partial (\theta_{k+1}, s_{k+1})}{\partial (\theta_k, s_k)} Z_k
        + \frac{\partial (\theta_{k+1}, s_{k+1})}{\partial \eta}, \qquad
        \text{grads} = \frac{\partial V}{\partial \theta_K} Z_K
        + \frac{\partial V}{\partial \eta}

    One tangent for each of the H numbers of eta, all pushed at once by vmap. No graph is
    kept: memory is H + 1 times parameters and state, however many steps there are. For
    few meta-parameters and long trainings; ``"init"`` costs a tangent for each parameter.
    The inner loss needs forward derivatives.

    Args:
        problem: a `Problem`; its objective is that of the window's steps.
        eta: a dict with any of "init", "hyper", "meta": see `Problem`.
        carry: where to begin; None, or a carry at the end, is the start. One of
            ``forward`` holds Z, so that a window's derivative reaches back to the start
            (with the eta that each step was made with: RTHO).
        window: how many steps to make; None for all that are left.

    Returns:
        An `Estimate`; diagnostics: ``tangent_norms`` [H], of the parameters' tangents
        after the last step: what grows without bound here makes every exact estimator
        useless. The carry holds ``"tangents"``.

    Raises:
        HyperparameterError: a window below 1.
        MetaParameterError: eta of other keys.
        StructureError: a carry of ``forward`` with another eta.
        ExecutionError: an operation of the loss has no forward derivative.
        Whatever else `reverse` raises.

    Source:
        Williams, Zipser, "A learning algorithm for continually running fully recurrent
        neural networks", 1989; Franceschi, Donini, Frasconi, Pontil, "Forward and reverse
        gradient-based hyperparameter optimization", 2017, algorithm 2.

    Example:
        >>> import torch, funcopt as fo
        >>> problem = fo.meta.Problem(
        ...     fo.sgd(), lambda p, _: 0.5 * p**2, lambda p, _: 0.5 * p**2, steps=100,
        ...     params=torch.tensor(1.0))
        >>> eta = {"hyper": {"lr": torch.tensor(1e-2)}}
        >>> fo.meta.forward(problem, eta).grads              # -100 (1 - lr)¹⁹⁹
        {'hyper': {'lr': tensor(-13.5333)}}
    """
    check_eta("forward", problem, eta, carry)
    asked = tree.detach(eta)
    eta = beside_params(problem, asked)
    start = stands_at(problem, carry)
    count = window_of(problem, start, window)
    every = _basis(eta)
    z = {} if carry is None or not start else carry.get("tangents", {})
    if "eta" in z:
        check_remembered("tangents", z["eta"], eta)

    def pushed(function: Function, given: Trees, along: Trees) -> tuple[Trees, Trees]:
        """``function`` and its derivatives along all tangents at once."""
        flat = FlatFunction(lambda along: jvp(function, given, along), along)
        out = list_vmap(flat, randomness="same")(*flat.inputs)
        value, tangents = flat.rebuild(out)
        return tree.map(lambda x: x[0], value), tangents  # no value depends on them

    with torch.no_grad():
        at = carry
        if at is None or not start:
            at, z = pushed(
                lambda given: standing(
                    go_on(problem, ready(problem, given["eta"]), None)
                ),
                {"eta": eta},
                {"eta": every},
            )
        values: list[Tensor] = []
        grads = torch.zeros((), device="cpu")
        for k in range(start, start + count):

            def step(given: Trees, k: int = k) -> Trees:
                here = {**given, "step": k}
                return standing(
                    steps_on(problem, ready(problem, given["eta"]), here, 1)[0]
                )

            at, z = pushed(step, {**standing(at), "eta": eta}, {**z, "eta": every})
            if problem.objective != "last" or k + 1 == start + count:
                with drawing_ahead(problem, at, k + 1 == start + count):
                    value, slopes = outer_vjp(problem, eta, at, k + 1)
                values.append(value)
                for name in ("params", "buffers"):
                    grads = grads + _contracted(slopes[name], z[name])
                grads = grads + _flat(slopes["eta"], grads.device)
        total = torch.stack(values).sum()
        if problem.objective == "mean":
            total, grads = total / count, grads / count
        squares = (_rows(x).square().sum(1) for x in tree.present(z["params"]))
        norms = sum(squares, start=torch.zeros_like(grads)).sqrt()
    z = {**z, "eta": every}  # by which a later window knows whose tangents these are
    end = tree.detach({**at, "step": start + count, "tangents": z})
    return Estimate(total, _like(asked, grads), {"tangent_norms": norms}, end)


def _basis(eta: Tree) -> Tree:
    """A tangent of eta for each of its numbers: one there, zero elsewhere.

    One of nothing where there are none, for a vmap has to be of something.
    """
    found = tree.present(eta)
    sizes = [x.numel() for x in found]
    rows = torch.eye(max(sum(sizes), 1), sum(sizes)).split(sizes, 1)
    blocks = iter(zip(rows, found))
    return tree.map(lambda _: _block(*next(blocks)), eta)


def _block(rows: Tensor, like: Tensor) -> Tensor:
    return rows.reshape(len(rows), *like.shape).to(like)


def _contracted(slopes: Tree, tangents: Tree) -> Tensor:
    """How a value moves along each tangent."""
    parts = zip(tree.present(slopes), tree.present(tangents))
    with autocast.choosing(autocast.OFF):  # which is about the losses
        return sum(
            (_rows(z) @ complex_leaves.parts(g).flatten() for g, z in parts),
            start=torch.zeros((), device="cpu"),
        )


def _rows(tangents: Tensor) -> Tensor:
    """A row for each tangent; a complex number is two real ones."""
    tangents = complex_leaves.parts(tangents)
    return tangents.flatten(1) if tangents.ndim > 1 else tangents[:, None]


def _flat(values: Tree, device: torch.device) -> Tensor:
    return torch.cat([x.flatten().to(device) for x in tree.present(values)])


def _like(eta: Tree, flat: Tensor) -> Tree:
    parts = iter(flat.split([x.numel() for x in tree.present(eta)]))
    return tree.map(lambda x: next(parts).reshape(x.shape).to(x), eta)
