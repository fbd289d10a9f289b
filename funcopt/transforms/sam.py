"""Steps by the gradient at the worst point nearby."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from funcopt import tree
from funcopt.checks import check_keys
from funcopt.errors import HyperparameterTypeError
from funcopt.execution import donation
from funcopt.flat_function import FlatFunction
from funcopt.hyper import Hyper
from funcopt.optimizer import Optimizer, check_optimizer, from_spec
from funcopt.optimizers._parts import Number, root
from funcopt.spec import Spec
from funcopt.transforms.stage import joined
from funcopt.types import HyperValue, State, Tensor, Tree


def sam(opt: Optimizer, rho: HyperValue = 0.05, *, adaptive: bool = False) -> Optimizer:
    r"""Sharpness-aware minimisation.

    .. math::
        \epsilon = \rho \, g / \lVert g \rVert_2, \qquad
        p_t = \text{step}(\nabla f(p_{t-1} + \epsilon), p_{t-1})

    The norm is that of all leaves together. Adaptive:
    :math:`\epsilon = \rho \, p^2 g / \lVert |p| g \rVert_2`.

    Args:
        opt: the Optimizer that makes the step.
        rho: how far away, ≥ 0. Its name in ``update`` is ``sam_rho`` where ``opt`` has a
            ``rho`` of its own (`adadelta`, `sophia_g`).
        adaptive: in proportion to each parameter.

    Returns:
        An Optimizer; state ``optimizer``, that of ``opt``, and ``step``, by which a
        `Schedule` of ``rho`` goes. Its ``update`` takes a keyword more:
        ``loss_fn(params) -> 0-d loss``, whose gradient it takes once more, at
        p + ε; ``grads`` are those at p.

    Raises:
        HyperparameterError: a number out of its range.
        HyperparameterTypeError: by ``update``, without a ``loss_fn``.

    Note:
        A derivative through the step runs through ε, too: it is exact, and takes second
        derivatives of the loss. `skip_nonfinite` goes within: there it sees the gradient
        at p + ε, which is not finite where that at p is not; outside of `sam` it sees
        that at p alone.

    Source:
        Foret, Kleiner, Mobahi, Neyshabur, "Sharpness-aware minimization for efficiently
        improving generalization", 2021, algorithm 1; Kwon, Kim, Park, Choi, "ASAM",
        2021 (adaptive).

    Example:
        >>> import torch, funcopt as fo
        >>> opt = fo.sam(fo.sgd(lr=0.1), rho=0.5)
        >>> loss_fn = lambda p: (p**2).sum()
        >>> p = torch.tensor([3.0, 4.0])
        >>> opt.update(2 * p, opt.init(p), p, loss_fn=loss_fn)[0]
        tensor([2.3400, 3.1200])
    """
    check_optimizer(opt, "sam")

    rule = partial(_climbed, adaptive=adaptive)
    totals = [{"norm_sq": partial(_norm_sq, adaptive=adaptive)}]
    spec = Spec(rule, "sam", {}, {"rho": Hyper(rho)}, totals=totals)
    climb = from_spec(joined([spec], None, [], "sam", taken=opt.hyper))
    its = _Sam(opt, climb)
    hyper = {**opt.hyper, **climb.hyper, "loss_fn": None}
    name = f"sam({opt.name})"
    return Optimizer(its.init, its.update, name, hyper, eval_params=its.eval_params)


def _climbed(
    g: Tensor, p: Tensor, *, step: Any, rho: Number, norm_sq: Tensor, adaptive: bool
) -> tuple[Tensor, ...]:
    scale = rho * torch.where(norm_sq > 0, 1 / root(norm_sq), 0.0)
    return (p + (p * p * g if adaptive else g) * scale,)


def _norm_sq(g: Tensor, p: Tensor, *, adaptive: bool, **_: Any) -> Tensor:
    return (p * p * g * g if adaptive else g * g).sum()


@dataclass(frozen=True, eq=False)
class _Sam:
    """The functions of `sam`."""

    opt: Optimizer
    climb: Optimizer  #: whose step is uphill, by a rule that knows the common norm

    def init(self, params: Tree) -> State:
        return {"optimizer": self.opt.init(params), **self.climb.init(params)}

    def update(
        self,
        grads: Tree,
        state: State,
        params: Tree,
        *,
        donate: bool = False,
        loss_fn: Callable[[Tree], Tensor] | None = None,
        **given: Any,
    ) -> tuple[Tree, State]:
        if not callable(loss_fn):
            raise HyperparameterTypeError(
                "sam takes the gradient a second time: call update(grads, state, params, "
                f"loss_fn=a function of params that gives the loss), not {loss_fn!r}"
            )
        check_keys(state, ("optimizer", "step"), "sam")
        far = {name: given.pop(name) for name in self.climb.hyper if name in given}
        above, climbed = self.climb.update(grads, {"step": state["step"]}, params, **far)
        steep = _gradient(loss_fn, above, grads)
        if donate:
            donation.check_trees(steep, state, params)
        if "loss_fn" in self.opt.hyper:
            given["loss_fn"] = loss_fn
        new, inner = self.opt.update(
            steep, state["optimizer"], params, donate=donate, **given
        )
        made = new, {"optimizer": inner, **climbed}
        return donation.write_over((params, state), made) if donate else made

    def eval_params(self, state: State, params: Tree, **given: Any) -> Tree:
        check_keys(state, ("optimizer", "step"), "sam")
        climbed_by = *self.climb.hyper, "loss_fn"  # what is evaluated has not climbed
        given = {name: x for name, x in given.items() if name not in climbed_by}
        return self.opt.eval_params(state["optimizer"], params, **given)


def _gradient(loss_fn: Callable[[Tree], Tensor], params: Tree, like: Tree) -> Tree:
    """Of the leaves that have one in ``like``."""

    def loss(moving: Tree) -> Tensor:
        return loss_fn(tree.map(lambda p, x: p if x is None else x, params, moving))

    moving = tree.map(lambda p, g: p if g is not None else None, params, like)
    flat = FlatFunction(loss, moving)
    grads, _ = flat.grad(*flat.inputs)
    return flat.like_first(grads)
