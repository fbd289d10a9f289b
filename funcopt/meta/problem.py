"""A bilevel problem as a value, and its inner loop from where it stands."""

from collections.abc import Callable
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, Literal, TypeAlias, final

import torch

from funcopt import tree
from funcopt.derivatives import Pullback, Trees, vjp
from funcopt.errors import HyperparameterError, StructureError
from funcopt.inner.per_step import PerStep, per_step
from funcopt.inner.unroll import unroll
from funcopt.optimizer import Optimizer, check_optimizer
from funcopt.types import LossFunction, State, Tensor, Tree

#: Where an inner loop stands: ``{"params", "state", "step"}``, and more.
Carry: TypeAlias = dict[str, Any]


@final
@dataclass(frozen=True, eq=False)
class Problem:
    r"""What is trained, what is learned about the training, and what that is good for.

    .. math::
        V(\eta) = \text{outer\_loss}(\theta_K(\eta)), \qquad
        (\theta_{k+1}, s_{k+1}) = \text{update}\big(\nabla_\theta
            \text{inner\_loss}(\theta_k, \text{batch}_k, \eta_{\text{meta}}),
            s_k, \theta_k; \eta_{\text{hyper}}\big), \qquad
        \theta_0 = \eta_{\text{init}}

    A value that says nothing of how :math:`dV/d\eta` is found: every estimator of
    ``fo.meta`` takes the same one. The meta-parameters ``eta`` are a dict with any of the
    keys ``"init"`` (a tree like params, where training starts), ``"hyper"``
    (hyperparameters of ``opt``, as `unroll` takes them) and ``"meta"`` (a tree that the
    losses get as their third argument: loss and data weights, a learned loss). What
    stands in it is what is learned; all leaves are floating-point tensors.

    Args:
        opt: the inner optimizer.
        inner_loss: what is trained: ``inner_loss(params, batch)`` → a 0-d tensor, with
            ``eta["meta"]`` as a third argument where eta has one.
        outer_loss: what it is trained for: ``outer_loss(params, outer_batch)``, with
            ``eta["meta"]`` likewise. None: the inner loss, on the batch of the step that
            follows (after the last step, on its own).
        steps: how many inner steps K ≥ 1 there are; windows are parts of them.
        params: where training starts; ``eta["init"]`` stands in its place.
        state: the optimizer's state to start with; by default ``opt.init(params)``.
        batch: a tree that every step uses.
        batches: a tree of tensors [K, ...], entry k for step k. Not with ``batch``.
        outer_batch: what ``outer_loss`` gets.
        objective: "last" is the outer loss after the last step; "mean" and "sum" are
            over the outer losses after each step.
        constrain: applied to ``eta`` before it is used: `constrained`, or any
            differentiable function of it with a result of the same keys, such as one that
            marks values `per_step`.

    Raises:
        HyperparameterError: ``steps`` or ``objective`` out of range.
        StructureError: batch and batches both given, batches of another length.

    Source:
        The bilevel form: Franceschi, Frasconi, Salzo, Grazzi, Pontil, "Bilevel
        programming for hyperparameter optimization and meta-learning", 2018.

    Example:
        >>> import torch, funcopt as fo
        >>> def loss(p, target):
        ...     return 0.5 * ((p - target) ** 2).sum()
        >>> problem = fo.meta.Problem(
        ...     fo.sgd(), loss, loss, steps=2, params=torch.zeros(1),
        ...     batch=torch.ones(1), outer_batch=torch.ones(1))
        >>> fo.meta.reverse(problem, {"hyper": {"lr": torch.tensor(0.5)}}).grads
        {'hyper': {'lr': tensor(-0.2500)}}
    """

    opt: Optimizer
    inner_loss: LossFunction
    outer_loss: LossFunction | None
    steps: int
    params: Tree = None
    state: State | None = None
    batch: Tree = None
    batches: Tree = None
    outer_batch: Tree = None
    objective: Literal["last", "mean", "sum"] = "last"
    constrain: Callable[[Tree], Tree] | None = None

    def __post_init__(self) -> None:
        check_optimizer(self.opt, "Problem")
        if not isinstance(self.steps, int) or self.steps < 1:
            raise HyperparameterError(
                f"steps must be a whole number ≥ 1, got {self.steps!r}"
            )
        if self.objective not in ("last", "mean", "sum"):
            raise HyperparameterError(
                f"objective is 'last', 'mean' or 'sum', not {self.objective!r}"
            )
        if self.batches is None:
            return
        if self.batch is not None:
            raise StructureError(
                "give batch (every step's) or batches (one each), not both"
            )
        length = tree.leading_axis(self.batches, "batches")
        if length != self.steps:
            raise StructureError(
                f"batches hold {length} steps, but steps={self.steps} was asked"
            )


def stands_at(problem: Problem, carry: Carry | None) -> int:
    """The step at which to go on; a carry at the end starts anew, as none does."""
    return 0 if carry is None else carry["step"] % problem.steps


def ready(problem: Problem, eta: Tree) -> Tree:
    """``eta`` as the losses and the optimizer take it; what the functions below get."""
    return eta if problem.constrain is None else problem.constrain(eta)


def go_on(problem: Problem, eta: Tree, carry: Carry | None) -> Carry:
    """``carry``; or the start, a function of eta, for none or one at the end."""
    if carry is not None and stands_at(problem, carry):
        return carry
    params = eta["init"] if "init" in eta else problem.params
    if params is None:
        raise StructureError(
            "nothing to start from: give Problem(params=...), or eta['init']"
        )
    state = problem.opt.init(params) if problem.state is None else problem.state
    return {"params": params, "state": state, "step": 0}


def window_of(problem: Problem, start: int, window: int | None) -> int:
    """How many steps a window has that begins at ``start``; None is all that are left."""
    left = problem.steps - start
    if window is None:
        return left
    if not isinstance(window, int) or window < 1:
        raise HyperparameterError(f"window must be a whole number ≥ 1, got {window!r}")
    return min(window, left)


def batch_at(problem: Problem, k: int) -> Tree:
    if problem.batches is None:
        return problem.batch
    return tree.map(itemgetter(min(k, problem.steps - 1)), problem.batches)


def hyper_at(problem: Problem, eta: Tree, k: int) -> dict[str, Any]:
    """What ``opt.update`` takes in step ``k``."""

    def entry(value: Any) -> Any:
        if isinstance(value, PerStep):
            return tree.map(itemgetter(k), value.values)
        return value

    return tree.map(entry, dict(eta.get("hyper", {})))


def settings_at(problem: Problem, eta: Tree, k: int) -> tuple[Trees, Pullback]:
    """What step ``k`` takes of eta, and what brings its gradients back to that."""

    def settings(given: Trees) -> Trees:
        at = ready(problem, given["eta"])
        return {"hyper": hyper_at(problem, at, k), "meta": meta_of(at)}

    return vjp(settings, {"eta": eta})


def meta_of(eta: Tree) -> Tree:
    return eta.get("meta")


def outer_value(problem: Problem, eta: Tree, params: Tree, k: int) -> Tensor:
    """The outer loss after ``k`` steps."""
    extra = () if meta_of(eta) is None else (meta_of(eta),)
    if problem.outer_loss is None:
        value = problem.inner_loss(params, batch_at(problem, k), *extra)
    else:
        value = problem.outer_loss(params, problem.outer_batch, *extra)
    if not isinstance(value, Tensor) or value.ndim:
        what = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value)
        raise StructureError(f"outer_loss must return a 0-d tensor, got {what}")
    return value


def outer_vjp(
    problem: Problem, eta: Tree, params: Tree, k: int
) -> tuple[Tensor, dict[str, Tree]]:
    """The outer loss after ``k`` steps, and its gradients by ``params`` and ``eta``."""

    def value(given: Trees) -> Trees:
        at = ready(problem, given["eta"])
        return {"value": outer_value(problem, at, given["params"], k)}

    out, pullback = vjp(value, {"params": params, "eta": eta})
    return out["value"], pullback({"value": torch.ones_like(out["value"])})


def roll(
    problem: Problem, eta: Tree, carry: Carry, count: int, **how: Any
) -> tuple[Tensor, Carry, Tensor]:
    """``count`` steps on: their objective, where they end, and the inner losses."""
    if problem.objective == "last":
        carry, losses = steps_on(problem, eta, carry, count, **how)
        return outer_value(problem, eta, carry["params"], carry["step"]), carry, losses
    values: list[Tensor] = []
    inner: list[Tensor] = []
    for _ in range(count):
        carry, loss = steps_on(problem, eta, carry, 1, **how)
        values.append(outer_value(problem, eta, carry["params"], carry["step"]))
        inner.append(loss)
    total = torch.stack(values).sum()
    if problem.objective == "mean":
        total = total / count
    return total, carry, torch.cat(inner)


def steps_on(
    problem: Problem, eta: Tree, carry: Carry, count: int, **how: Any
) -> tuple[Carry, Tensor]:
    """``count`` steps on: where they end, and the losses before each."""
    start = carry["step"]
    part = slice(start, start + count)

    def entries(value: Any) -> Any:
        if not isinstance(value, PerStep):
            return value
        if tree.leading_axis(value.values, "per_step") != problem.steps:
            raise StructureError(
                f"per_step values must have one entry for each of {problem.steps} steps"
            )
        return per_step(tree.map(itemgetter(part), value.values))

    run = unroll(
        problem.opt,
        problem.inner_loss,
        carry["params"],
        problem.batch,
        steps=count,
        batches=None
        if problem.batches is None
        else tree.map(itemgetter(part), problem.batches),
        state=carry["state"],
        hyper=tree.map(entries, dict(eta.get("hyper", {}))),
        meta=meta_of(eta),
        **how,
    )
    end = {"params": run.params, "state": run.state, "step": start + count}
    return end, run.losses


def advance(
    problem: Problem, eta: Tree, steps: int, *, carry: Carry | None = None
) -> Carry:
    r"""Make inner steps without a derivative, to where an estimator shall go on.

    Staggered starts are windows that begin at different steps; the last W of K steps
    (truncated reverse mode as Shaban et al. have it) are ``truncated`` after an advance
    by K − W. The steps keep no graph, and so run by the fast executors.

    Args:
        problem: a `Problem`.
        eta: the meta-parameters, as every estimator takes them.
        steps: how many steps, ≥ 0, at most those left.
        carry: where to begin; None, or a carry at the end, is the start.

    Returns:
        A carry for an estimator, ``{"params", "state", "step"}``, detached.

    Raises:
        HyperparameterError: more steps than are left, or fewer than 0.
        StructureError: no parameters to start from.

    Source:
        Vicol, Metz, Sohl-Dickstein, "Unbiased gradient estimation in unrolled
        computation graphs with persistent evolution strategies", 2021 (staggering).

    Example:
        >>> import torch, funcopt as fo
        >>> problem = fo.meta.Problem(
        ...     fo.sgd(lr=0.5), lambda p, _: 0.5 * p**2, lambda p, _: p**2, steps=9,
        ...     params=torch.tensor(8.0))
        >>> carry = fo.meta.advance(problem, {}, 3)
        >>> carry["params"], carry["step"]
        (tensor(1.), 3)
    """
    start = stands_at(problem, carry)
    if not 0 <= steps <= problem.steps - start:
        raise HyperparameterError(
            f"steps must be in [0, {problem.steps - start}], as {start} of "
            f"{problem.steps} are made; got {steps}"
        )
    with torch.no_grad():
        eta = ready(problem, tree.detach(eta))
        return tree.detach(steps_on(problem, eta, go_on(problem, eta, carry), steps)[0])
