"""Hypergradient descent: what the last update should have been."""

import torch

from funcopt import tree
from funcopt.derivatives import Trees, vjp_apart
from funcopt.inner.step import Step
from funcopt.meta.estimate import Estimate, check_eta
from funcopt.meta.problem import (
    Carry,
    Problem,
    go_on,
    inputs_at,
    outer_vjp,
    ready,
    standing,
    stands_at,
)
from funcopt.types import Tree


def hypergradient_descent(
    problem: Problem, eta: Tree, *, carry: Carry | None = None
) -> Estimate:
    r"""One step of the training, and how it should have been made.

    .. math::
        \text{grads} = \frac{\partial V(\theta_{t+1})}{\partial \theta_{t+1}}
        \frac{\partial \, \text{update}(g_t, s_t, \theta_t; \eta)}{\partial \eta}

    Of SGD's learning rate that is :math:`-\nabla V(\theta_{t+1}) \cdot g_t`. Change eta
    by it and call again with the carry: eta is tuned while the training runs, at the cost
    of one gradient per step where ``outer_loss`` is None and there are no buffers, and of
    two elsewhere. Greedy: a setting is judged by the very next loss. A loss's weights are
    seen through one mixed second derivative of the step (T1-T2).

    Args:
        problem: a `Problem`; its objective counts as "last". With ``outer_loss`` None, V
            is the inner loss on the next step's batch, whose gradient makes that step.
        eta: a dict with "hyper", "meta" or both: see `Problem`.
        carry: that of the last call; None, or a carry at the end, is the start.

    Returns:
        An `Estimate` of one step; diagnostics: none. The carry holds ``"grads"``, the
        inner gradient of the step to come, where it is known already.

    Raises:
        MetaParameterError: "init" in eta, or other keys.
        Whatever else `unroll` raises.

    Source:
        Almeida, Langlois, Amaral, Plakhov, "Parameter adaptation in stochastic
        optimization", 1998; Baydin, Cornish, Martínez Rubio, Schmidt, Wood, "Online
        learning rate adaptation with hypergradient descent", 2018; for any optimizer:
        Chandra, Xie, Ragan-Kelley, Meijer, "Gradient descent: the ultimate optimizer",
        2022; for the loss: Luketina, Berglund, Greff, Raiko, 2016.

    Example:
        >>> import torch, funcopt as fo
        >>> problem = fo.meta.Problem(
        ...     fo.sgd(), lambda p, _: 0.5 * p**2, None, steps=20,
        ...     params=torch.tensor(1.0))
        >>> lr, carry = torch.tensor(0.01), None
        >>> for _ in range(20):
        ...     estimate = fo.meta.hypergradient_descent(
        ...         problem, {"hyper": {"lr": lr}}, carry=carry)
        ...     carry, lr = estimate.carry, lr - 0.1 * estimate.grads["hyper"]["lr"]
        >>> estimate.value < 0.001                # 0.3345 with the rate it started with
        tensor(True)
    """
    check_eta("hypergradient_descent", problem, eta, carry)
    step = Step(problem.opt, problem.inner_loss)
    with torch.no_grad():
        eta = tree.detach(eta)
        at = go_on(problem, ready(problem, eta), carry)
        k = stands_at(problem, at)
        # A gradient depends on eta through the loss's weights alone.
        known, buffers = None, at.get("buffers")
        if "meta" not in eta:
            known = at.get("grads")
            if known is None:
                here = inputs_at(problem, {**at, "eta": eta}, k)
                known, _, _, buffers = step.gradient(here)

        def stepped(given: Trees) -> Trees:
            here = inputs_at(problem, {**at, **given}, k)
            if known is None:
                return standing(step(here)._asdict())
            params, state = step.updated(known, here)
            return {"params": params, "state": state, "buffers": buffers}

        out, pullback = vjp_apart(stepped, {"eta": eta})
        carried = {**out, "step": k + 1}
        value, slopes = outer_vjp(problem, eta, carried, k + 1)
        through = pullback({name: slopes[name] for name in ("params", "buffers")})
        total = tree.map(torch.add, slopes["eta"], through["eta"])
    alone = "meta" not in eta and problem.buffers is None
    if problem.outer_loss is None and alone:
        carried["grads"] = slopes["params"]
    return Estimate(value, total, {}, carried)
