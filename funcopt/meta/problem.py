"""A bilevel problem as a value, and what of it each step takes."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, Literal, TypeAlias, final

import torch

from funcopt import tree
from funcopt.checks import check_count, check_function
from funcopt.derivatives import Trees, vjp_apart, widened
from funcopt.errors import (
    HyperparameterError,
    MetaParameterError,
    StructureError,
)
from funcopt.inner.loop import CARRY, is_absent
from funcopt.inner.loss import InnerLoss
from funcopt.inner.per_step import PerStep, per_step
from funcopt.inner.rng_state import RngState
from funcopt.inner.unroll import number_of_steps
from funcopt.optimizer import Optimizer, check_optimizer
from funcopt.types import LossFunction, State, Tensor, Tree

#: Where an inner loop stands: ``{"params", "state", "buffers", "step"}``, and more.
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
            ``eta["meta"]`` likewise. None: the inner loss, on the batch and on the random
            numbers of the step that follows; after the last step of a call it draws its
            own, and after step K it has that step's batch.
        steps: how many inner steps K ≥ 1 there are; windows are parts of them.
        params: where training starts; ``eta["init"]`` stands in its place.
        state: the optimizer's state to start with; by default ``opt.init(params)``.
        batch: a tree that every step uses.
        batches: a tree of tensors [K, ...], entry k for step k. Not with ``batch``.
        outer_batch: what ``outer_loss`` gets.
        buffers: where those of the inner loss start (batch-norm statistics), as for
            `unroll`; both losses then get the keyword ``buffers``. What the inner loss
            writes into its copy is carried on, what the outer loss writes is dropped.
        objective: "last" is the outer loss after the last step; "mean" and "sum" are
            over the outer losses after each step.
        constrain: applied to ``eta`` before it is used: `constrained`, or any
            differentiable function of it with a result of the same keys, such as one that
            marks values `per_step`.

    Raises:
        HyperparameterError: ``steps`` or ``objective`` out of range.
        HyperparameterTypeError: a loss or ``constrain`` that is no function.
        StructureError: batch and batches both given, batches of another length.
        MetaParameterError: by an estimator, where ``constrain`` changes eta's keys.

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
    buffers: Tree = None
    objective: Literal["last", "mean", "sum"] = "last"
    constrain: Callable[[Tree], Tree] | None = None

    def __post_init__(self) -> None:
        check_optimizer(self.opt, "Problem")
        check_count("steps", self.steps)
        for name in ("inner_loss", "outer_loss", "constrain"):
            function = getattr(self, name)
            if name == "inner_loss" or function is not None:
                check_function(name, function)
        if self.objective not in ("last", "mean", "sum"):
            raise HyperparameterError(
                f"objective is 'last', 'mean' or 'sum', not {self.objective!r}"
            )
        number_of_steps(self.batch, self.batches, self.steps)


def data_of(problem: Problem) -> list[Tree]:
    """The trees of tensors that a problem holds."""
    start = [problem.params, problem.state, problem.buffers]
    return [*start, problem.batch, problem.batches, problem.outer_batch]


def stands_at(problem: Problem, carry: Carry | None) -> int:
    """The step at which to go on; a carry at the end starts anew, as none does."""
    if carry is None:
        return 0
    if not isinstance(carry, Mapping) or not {"params", "state", "step"} <= carry.keys():
        raise StructureError(
            "one goes on from a carry, as estimate.carry or fo.meta.advance(...) is one, "
            f"with 'params', 'state' and 'step', not from this {type(carry).__name__}"
        )
    step = carry["step"]
    if not isinstance(step, int) or not 0 <= step <= problem.steps:
        raise StructureError(
            f"the carry stands at step {step}, and this problem has {problem.steps} "
            "steps: it is of another problem"
        )
    return step % problem.steps


def ready(problem: Problem, eta: Tree) -> Tree:
    """``eta`` after ``constrain``, as the losses, the optimizer and `go_on` take it."""
    found = eta if problem.constrain is None else problem.constrain(eta)
    if found.keys() != eta.keys():
        raise MetaParameterError(
            f"constrain made the keys {sorted(found)} of {sorted(eta)}; they have to be "
            "the same, for they say what an estimator sees"
        )
    if "hyper" in found:
        return {**found, "hyper": tree.map(widened, found["hyper"])}
    return found


def beside_params(problem: Problem, eta: Tree) -> Tree:
    """``eta`` for a vmap over it: on the device of the parameters, if they have one.

    torch lets a number on the CPU meet tensors of any device, but no batch of numbers.
    """
    devices = {p.device for p in tree.present(eta.get("init", problem.params))}
    if len(devices) != 1:
        return eta
    (device,) = devices

    def moved(x: Tensor) -> Tensor:
        return x if x.ndim else x.to(device)

    found = {key: tree.map(moved, values) for key, values in eta.items()}
    if "hyper" in eta:  # of which each step may take an entry
        found["hyper"] = tree.map(lambda x: x.to(device), eta["hyper"])
    return found


def alike(values: Tree, like: Tree) -> Tree:
    """The values in the dtypes, and on the devices, of ``like``."""
    return tree.map(torch.Tensor.to, values, like)


def as_given(eta: Tree, like: Tree) -> Tree:
    """``eta`` that was computed wider, in the dtypes in which it is given to `ready`.

    The optimizer's settings stay as wide: they are widened there anyway.
    """
    return {k: v if k == "hyper" else alike(v, like[k]) for k, v in eta.items()}


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
    return {"params": params, "state": state, "buffers": problem.buffers, "step": 0}


def standing(carry: Trees) -> dict[str, Tree]:
    """Of a carry what the next step takes: params, state and buffers."""
    at = {name: carry.get(name) for name in CARRY}
    return at | {"buffers": None} if is_absent(at["buffers"]) else at


def window_of(problem: Problem, start: int, window: int | None) -> int:
    """How many steps a window has that begins at ``start``; None is all that are left."""
    left = problem.steps - start
    if window is None:
        return left
    check_count("window", window)
    return min(window, left)


def batch_at(problem: Problem, k: int) -> Tree:
    if problem.batches is None:
        return problem.batch
    return tree.map(itemgetter(min(k, problem.steps - 1)), problem.batches)


def hyper_at(problem: Problem, eta: Tree, which: int | slice) -> dict[str, Any]:
    """What ``opt.update`` takes in one step, or `unroll` in a slice of them."""

    def entries(value: Any) -> Any:
        if not isinstance(value, PerStep):
            return value
        if tree.leading_axis(value.values, "per_step") != problem.steps:
            raise StructureError(
                f"per_step values must have one entry for each of {problem.steps} steps"
            )
        some = tree.map(itemgetter(which), value.values)
        return per_step(some) if isinstance(which, slice) else some

    return tree.map(entries, dict(eta.get("hyper", {})))


def inputs_at(problem: Problem, given: Trees, k: int) -> dict[str, Tree]:
    """What step ``k`` depends on, as a function of a carry and of eta.

    It has to run inside what is differentiated: ``constrain`` may put eta's tensors into
    selectors and schedules, whose tensors are no leaves of a tree.
    """
    eta = ready(problem, given["eta"])
    settings = {"hyper": hyper_at(problem, eta, k), "meta": meta_of(eta)}
    return {**standing(given), **settings, "batch": batch_at(problem, k)}


def meta_of(eta: Tree) -> Tree:
    return eta.get("meta")


def outer_value(problem: Problem, eta: Tree, carry: Trees, k: int) -> Tensor:
    """The outer loss after ``k`` steps."""
    loss_fn, batch = problem.outer_loss, problem.outer_batch
    if loss_fn is None:
        loss_fn, batch = problem.inner_loss, batch_at(problem, k)
    loss = InnerLoss(loss_fn, name="outer_loss")
    return loss(carry["params"], batch, meta_of(eta), carry.get("buffers"))[0]


def drawing_ahead(
    problem: Problem, carry: Trees, last: bool
) -> AbstractContextManager[Any]:
    """The judge draws what the next step will, where that step's loss is the judge."""
    if problem.outer_loss is not None or last:
        return nullcontext()
    return RngState(tree.leaves(carry["params"])).restored()


def outer_vjp(
    problem: Problem, eta: Tree, carry: Trees, k: int
) -> tuple[Tensor, dict[str, Tree]]:
    """The outer loss after ``k`` steps; its gradients by params, buffers and ``eta``."""

    def value(given: Trees) -> Trees:
        at = ready(problem, given["eta"])
        return {"value": outer_value(problem, at, given, k)}

    given = {"params": carry["params"], "buffers": carry.get("buffers"), "eta": eta}
    out, pullback = vjp_apart(value, given)
    return out["value"], pullback({"value": torch.ones_like(out["value"])})
