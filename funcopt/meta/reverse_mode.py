"""Estimators that go back through every step: exact, first order, Reptile."""

from typing import Any, Literal

import torch

from funcopt import tree
from funcopt.derivatives import vjp
from funcopt.flat_function import FlatFunction
from funcopt.meta.estimate import Estimate, check_eta, check_no_level
from funcopt.meta.problem import (
    Carry,
    Problem,
    go_on,
    ready,
    standing,
    stands_at,
    window_of,
)
from funcopt.meta.rollout import roll
from funcopt.types import Tree


def reverse(
    problem: Problem,
    eta: Tree,
    *,
    carry: Carry | None = None,
    remat: Literal["step", "sqrt"] | int | None = None,
) -> Estimate:
    r"""The exact derivative, back through every step that is left.

    .. math:: \text{grads} = \frac{dV(\theta_K(\eta))}{d\eta}

    Time: that of the training, and two to three times it on the way back. Memory: K
    times parameters, state, and what the graph of one inner gradient keeps.

    Args:
        problem: a `Problem`.
        eta: a dict with any of "init", "hyper", "meta": see `Problem`.
        carry: where to begin; None, or a carry at the end, is the start. What lies before
            it is constant.
        remat: as for `unroll`: which states are kept, all others being made again, and
            of objectives over all steps the outer losses, too.

    Returns:
        An `Estimate`; diagnostics: ``losses`` [K], the inner losses before each update.

    Raises:
        MetaParameterError: eta of other keys, or "init" beside a carry.
        StructureError, LeafError: what `unroll` raises; a leaf of eta that is not of
            floating-point numbers; an outer loss that is not 0-d.
        GradientLostError: ``torch.func`` asks for a derivative of the estimate itself.

    Source:
        Domke, "Generic methods for optimization-based modeling", 2012; Maclaurin,
        Duvenaud, Adams, 2015.

    Example:
        >>> import torch, funcopt as fo
        >>> problem = fo.meta.Problem(
        ...     fo.sgd(), lambda p, _: 0.5 * p**2, lambda p, _: 0.5 * p**2, steps=2)
        >>> eta = {"init": torch.tensor(1.0), "hyper": {"lr": torch.tensor(0.5)}}
        >>> fo.meta.reverse(problem, eta).grads    # of ½ (1 - lr)⁴ init²
        {'init': tensor(0.0625), 'hyper': {'lr': tensor(-0.2500)}}
    """
    check_eta("reverse", problem, eta, carry)
    return back(problem, eta, carry, None, remat=remat)


def mixed(
    problem: Problem,
    eta: Tree,
    *,
    carry: Carry | None = None,
    remat: Literal["step", "sqrt"] | int | None = None,
) -> Estimate:
    r"""The exact derivative, where nothing of second order is stored (MixFlow-MG).

    As `reverse`, but the way back through each inner gradient needs what that was
    computed from and nothing else: one pass of forward over reverse mode on accelerators,
    the gradient made again on a CPU (see `unroll`). Memory: K times parameters and state,
    and one gradient's.

    Args:
        problem: a `Problem`.
        eta: a dict with any of "init", "hyper", "meta": see `Problem`.
        carry: where to begin; None, or a carry at the end, is the start.
        remat: as for `unroll`: which states are kept, all others being made again, and
            of objectives over all steps the outer losses, too.

    Returns:
        An `Estimate`; diagnostics: ``losses`` [K], the inner losses before each update.

    Raises:
        Whatever `reverse` raises.

    Source:
        Kemaev, Calian, Zintgraf, Farquhar, van Hasselt, "Scalable meta-learning via
        mixed-mode differentiation", 2025.

    Example:
        >>> import torch, funcopt as fo
        >>> problem = fo.meta.Problem(
        ...     fo.sgd(), lambda p, _: 0.5 * p**2, lambda p, _: 0.5 * p**2, steps=2)
        >>> eta = {"init": torch.tensor(1.0), "hyper": {"lr": torch.tensor(0.5)}}
        >>> fo.meta.mixed(problem, eta).grads
        {'init': tensor(0.0625), 'hyper': {'lr': tensor(-0.2500)}}
    """
    check_eta("mixed", problem, eta, carry)
    return back(problem, eta, carry, None, grad_mode="mixed", remat=remat)


def first_order(problem: Problem, eta: Tree, *, carry: Carry | None = None) -> Estimate:
    r"""The derivative with every inner gradient taken as a constant (FOMAML).

    .. math:: \theta_{k+1} = \text{update}(\operatorname{stop}(\nabla L(\theta_k)), s_k,
        \theta_k; \eta)

    No second derivative, and memory of first order. Good for initialisations; of a
    learning rate it is exact in the last step only.

    Args:
        problem: a `Problem`.
        eta: a dict with "init", "hyper" or both: see `Problem`.
        carry: where to begin; None, or a carry at the end, is the start.

    Returns:
        An `Estimate`; diagnostics: ``losses`` [K], the inner losses before each update.

    Raises:
        MetaParameterError: "meta" in eta: it acts through the gradient alone; other
            keys; "init" beside a carry.
        Whatever else `reverse` raises.

    Source:
        Finn, Abbeel, Levine, "Model-agnostic meta-learning", 2017, section 5.2.

    Example:
        >>> import torch, funcopt as fo
        >>> problem = fo.meta.Problem(
        ...     fo.sgd(lr=0.5), lambda p, _: 0.5 * p**2, lambda p, _: 0.5 * p**2, steps=2)
        >>> fo.meta.first_order(problem, {"init": torch.tensor(1.0)}).grads
        {'init': tensor(0.2500)}
    """
    check_eta("first_order", problem, eta, carry)
    return back(problem, eta, carry, None, grad_mode="first_order")


def reptile_gradient(
    problem: Problem, eta: Tree, *, carry: Carry | None = None
) -> Estimate:
    r"""The way back from the end of the training to its start, as Reptile takes it.

    .. math:: \text{grads}_{\text{init}} = \theta_0 - \theta_K

    `reptile` is the same for few-shot tasks.

    Args:
        problem: a `Problem`; the outer loss is evaluated, and else plays no part.
        eta: ``{"init": params}``.
        carry: None, or a carry at the end: it begins at the start.

    Returns:
        An `Estimate`; diagnostics: ``losses`` [K], the inner losses before each update.

    Raises:
        MetaParameterError: eta of other keys; a carry that is not at the end.
        Whatever else `reverse` raises.

    Source:
        Nichol, Achiam, Schulman, "On first-order meta-learning algorithms", 2018.

    Example:
        >>> import torch, funcopt as fo
        >>> problem = fo.meta.Problem(
        ...     fo.sgd(lr=0.5), lambda p, _: 0.5 * p**2, lambda p, _: 0.5 * p**2, steps=2)
        >>> fo.meta.reptile_gradient(problem, {"init": torch.tensor(1.0)}).grads
        {'init': tensor(0.7500)}
    """
    check_eta("reptile_gradient", problem, eta, carry)
    with torch.no_grad():
        at, pullback = vjp(
            lambda given: ready(problem, given["eta"]), {"eta": tree.detach(eta)}
        )
        value, end, losses = roll(problem, at, go_on(problem, at, carry), problem.steps)
        way = tree.map(torch.sub, at["init"], end["params"])
        grads = pullback({"init": way})["eta"]
    return Estimate(value, grads, {"losses": losses}, end)


def back(
    problem: Problem, eta: Tree, carry: Carry | None, window: int | None, **how: Any
) -> Estimate:
    """Back through ``window`` steps from where the carry stands; None is all left."""
    start = stands_at(problem, carry)
    count = window_of(problem, start, window)

    def objective(eta: Tree) -> tuple[Any, ...]:
        eta = ready(problem, eta)
        value, end, losses = roll(problem, eta, go_on(problem, eta, carry), count, **how)
        return value, standing(end), losses

    flat = FlatFunction(objective, eta)
    grads, out = flat.grad(*flat.inputs)
    check_no_level("an estimate", [grads, out])  # by what a loss closes over
    value, end, losses = tree.detach(flat.rebuild(out))
    end = {**end, "step": start + count}
    return Estimate(value, tree.detach(flat.like_first(grads)), {"losses": losses}, end)
