"""Estimators at the end of the training alone: implicit differentiation."""

from typing import Any, Literal

import torch

from funcopt import tree
from funcopt.checks import check_count
from funcopt.derivatives import Trees, vjp_apart, widened
from funcopt.errors import HyperparameterError
from funcopt.inner.loop import CARRY
from funcopt.inner.loss import InnerLoss
from funcopt.inner.step import Step
from funcopt.meta.dependence import check_buffers, moving_leaves
from funcopt.meta.estimate import Estimate, check_eta
from funcopt.meta.linear import conjugate_gradients, neumann, norm, plus, relative_norm
from funcopt.meta.problem import (
    Carry,
    Problem,
    batch_at,
    inputs_at,
    meta_of,
    outer_vjp,
    ready,
    standing,
    stands_at,
)
from funcopt.meta.rollout import advance
from funcopt.types import Tree


def implicit(
    problem: Problem,
    eta: Tree,
    *,
    carry: Carry | None = None,
    solver: Literal["cg", "neumann", "identity"] = "cg",
    iterations: int = 10,
    damping: float = 0.0,
    step_size: float = 1.0,
) -> Estimate:
    r"""The derivative of a minimum: implicit differentiation where the training ends.

    .. math::
        \text{grads} = \frac{\partial V}{\partial \eta} - v^\top
        \frac{\partial^2 L}{\partial \theta \, \partial \eta}, \qquad
        (H + \lambda I) \, v \approx \frac{\partial V}{\partial \theta}, \qquad
        H = \frac{\partial^2 L}{\partial \theta^2}

    Memory of one gradient's graph, however long the training, which may be of any kind.
    Exact where the inner loss has a minimum at the end, and the solver comes to its own.
    Buffers are taken as they are at the end; leaves that the optimizer leaves alone
    (`freeze`) are constants, and no part of θ. v is

    - "cg": conjugate gradients, for H + λI positive (iMAML, HOAG);
    - "neumann": :math:`\alpha \sum_{j<k} (I - \alpha (H + \lambda I))^j \,
      \partial V / \partial \theta` with k = ``iterations`` and α = ``step_size``, which
      has to be below 2/λ_max; of a minimum, the last k steps of gradient descent;
    - "identity": :math:`\alpha \, \partial V / \partial \theta`, its first term (T1-T2).

    Args:
        problem: a `Problem`; its objective counts as "last". H is taken on ``batch``, or
            the last of ``batches``.
        eta: ``{"meta": ...}``: a minimum knows no other meta-parameters.
        carry: where to begin; None, or a carry at the end, is the start.
        solver: "cg", "neumann" or "identity".
        iterations: products with H, ≥ 1; none are made by "identity".
        damping: λ ≥ 0.
        step_size: α > 0, of "neumann" and "identity".

    Returns:
        An `Estimate`; diagnostics: ``gradient_norm``, the inner loss's at the end, 0 at a
        minimum; ``residual``, the norm of ∂V/∂θ - (H + λI)v relative to ∂V/∂θ (above 1
        "neumann" diverges); ``indefinite``, whether "cg" met a direction of curvature
        ≤ 0, to rounding, before it was done, where it stops (damp then).

    Raises:
        HyperparameterError: an option out of its range.
        MetaParameterError: "init" or "hyper" in eta, or other keys.
        GradientLostError: a loss reads buffers that follow the parameters (torch's norm
            layers write theirs without a graph, and are none of these).
        Whatever else `unroll` raises.

    Source:
        Pedregosa, "Hyperparameter optimization with approximate gradient", 2016 (CG);
        Rajeswaran, Finn, Kakade, Levine, "Meta-learning with implicit gradients", 2019;
        Lorraine, Vicol, Duvenaud, "Optimizing millions of hyperparameters by implicit
        differentiation", 2020 (Neumann); Luketina, Berglund, Greff, Raiko, "Scalable
        gradient-based tuning of continuous regularization hyperparameters", 2016.

    Example:
        >>> import torch, funcopt as fo
        >>> def ridge(p, batch, meta):
        ...     return 0.5 * (p - 3.0) ** 2 + 0.5 * meta["l2"] * p**2
        >>> problem = fo.meta.Problem(
        ...     fo.sgd(lr=0.5), ridge, lambda p, batch, meta: 0.5 * (p - 1.0) ** 2,
        ...     steps=100, params=torch.tensor(0.0))
        >>> eta = {"meta": {"l2": torch.tensor(0.5)}}            # the minimum is 3 / 1.5
        >>> fo.meta.implicit(problem, eta).grads["meta"]["l2"]   # -(2 - 1) 3 / 1.5²
        tensor(-1.3333)
    """
    check_eta("implicit", problem, eta, carry)
    if solver not in ("cg", "neumann", "identity"):
        raise HyperparameterError(
            f"solver is 'cg', 'neumann' or 'identity', not {solver!r}"
        )
    check_count("iterations", iterations)
    if not 0 <= damping < float("inf"):
        raise HyperparameterError(f"damping must be in [0, inf), got {damping!r}")
    if not 0 < step_size < float("inf"):
        raise HyperparameterError(f"step_size must be positive, got {step_size!r}")
    with torch.no_grad():
        eta = tree.detach(eta)
        end = _end(problem, eta, carry)
        batch, loss = batch_at(problem, problem.steps), InnerLoss(problem.inner_loss)
        value, slopes = outer_vjp(problem, eta, end, problem.steps)
        params, buffers = end["params"], end["buffers"]
        moving = moving_leaves(problem, eta, end)
        wanted = _kept(slopes["params"], moving)

        def gradient(given: Trees) -> Trees:
            at = tree.map(lambda p, new: p if new is None else new, params, given["kept"])
            meta = meta_of(ready(problem, given["eta"]))
            return {"grads": _kept(loss.grad(at, batch, meta, buffers)[0], moving)}

        if buffers is not None:
            check_buffers(problem, eta, end)
        # One graph for all products: each is a pass back through it.
        inner, pullback = vjp_apart(gradient, {"kept": _kept(params, moving), "eta": eta})

        def product(v: Tree) -> Tree:
            return plus(pullback({"grads": v})["kept"], damping, v)

        diagnostics: dict[str, Any] = {}
        if solver == "cg":
            v, diagnostics["indefinite"] = conjugate_gradients(
                product, wanted, iterations
            )
        elif solver == "neumann":
            v = neumann(product, wanted, iterations, step_size)
        else:
            v = tree.map(lambda x: step_size * x, wanted)
        back = pullback({"grads": v})
        grads = tree.map(torch.sub, slopes["eta"], back["eta"])
        # Of what was found, not as the solver has it: its own strays from that.
        left = plus(plus(wanted, -1.0, back["kept"]), -damping, v)
        diagnostics["residual"] = relative_norm(left, wanted)
        diagnostics["gradient_norm"] = norm(inner["grads"])
    return Estimate(value, grads, diagnostics, end)


def weight_update_implicit(
    problem: Problem,
    eta: Tree,
    *,
    carry: Carry | None = None,
    iterations: int = 10,
) -> Estimate:
    r"""Implicit differentiation of the update: sees learning rates and momentum.

    .. math::
        \text{grads} = \frac{\partial V}{\partial \eta} + \sum_{j < k}
        \frac{\partial V}{\partial \theta}
        \left(\frac{\partial u}{\partial w}\right)^j \frac{\partial u}{\partial \eta},
        \qquad w' = u(w, \eta), \quad w = (\theta, s)

    The last step is taken for each of the last k: as if the training had stood where it
    ends. Biased, more so the more it still moves; and where it moves no more a rate has
    no influence. Memory of one step.

    Args:
        problem: a `Problem`; its objective counts as "last".
        eta: a dict with "hyper", "meta" or both: see `Problem`. Of values `per_step`
            those of the last step are seen.
        carry: where to begin; None, or a carry at the end, is the start.
        iterations: how many steps k ≥ 1 to look back.

    Returns:
        An `Estimate`; diagnostics: ``cotangent_ratio``, the norm of what reaches the
        k-th step back relative to ∂V/∂θ: small where the sum has converged.

    Raises:
        HyperparameterError: ``iterations`` below 1.
        MetaParameterError: "init" in eta, or other keys.
        Whatever else `unroll` raises.

    Source:
        Clarke, Oldewage, Hernández-Lobato, "Scalable one-pass optimisation of
        high-dimensional weight-update hyperparameters by implicit differentiation", 2022.

    Example:
        >>> import torch, funcopt as fo
        >>> problem = fo.meta.Problem(
        ...     fo.sgd(), lambda p, _: 0.5 * p**2, lambda p, _: 0.5 * p**2, steps=2,
        ...     params=torch.tensor(1.0))
        >>> eta = {"hyper": {"lr": torch.tensor(0.5)}}
        >>> fo.meta.weight_update_implicit(problem, eta, iterations=2).grads
        {'hyper': {'lr': tensor(-0.0938)}}
    """
    check_eta("weight_update_implicit", problem, eta, carry)
    check_count("iterations", iterations)
    step = Step(problem.opt, problem.inner_loss)
    with torch.no_grad():
        eta = tree.detach(eta)
        end = _end(problem, eta, carry)
        value, slopes = outer_vjp(problem, eta, end, problem.steps)

        def last_step(given: Trees) -> Trees:
            stepped = step(inputs_at(problem, given, problem.steps - 1))
            return standing(stepped._asdict())

        _, pullback = vjp_apart(last_step, {**standing(end), "eta": eta})
        at = {"params": slopes["params"], "buffers": slopes["buffers"]}
        grads = tree.map(widened, slopes["eta"])
        for _ in range(iterations):
            back = pullback(at)
            grads = tree.map(torch.add, grads, back["eta"])
            at = {name: back[name] for name in CARRY}
        grads = tree.map(lambda g, x: g.to(x.dtype), grads, eta)
        ratio = relative_norm(at["params"], slopes["params"])
    return Estimate(value, grads, {"cotangent_ratio": ratio}, end)


def _kept(params: Tree, moving: Tree) -> Tree:
    return tree.map(lambda x, moves: x if moves else None, params, moving)


def _end(problem: Problem, eta: Tree, carry: Carry | None) -> Carry:
    left = problem.steps - stands_at(problem, carry)
    return advance(problem, eta, left, carry=carry)
