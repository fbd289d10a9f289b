"""One inner step as a function of everything it depends on."""

from collections.abc import Callable, Mapping
from copy import copy
from typing import Any, Literal, NamedTuple, TypeAlias

from funcopt import tree
from funcopt.errors import GradientLostError, HyperparameterError
from funcopt.execution.levels import is_tracked
from funcopt.inner import custom_vjp, mixed
from funcopt.inner.loss import ARGUMENTS, InnerLoss
from funcopt.optimizer import Optimizer, check_optimizer
from funcopt.types import LossFunction, State, Tensor, Tree

GradMode: TypeAlias = Literal["reverse", "mixed", "first_order"]


class Stepped(NamedTuple):
    """What one inner step gives: the view's outputs, by these names."""

    params: Tree  #: parameters after the step
    state: State  #: the optimizer's state after the step
    loss: Tensor  #: 0-d, before the update
    aux: Tree  #: the loss's auxiliary output, None without
    buffers: Tree  #: buffers after the step, None without


class Step:
    r"""``step = update ∘ grad``, called with what it depends on, by name.

    These are the keys of ``given``: ``params, state, batch, hyper, meta, buffers``. The
    values are trees; nothing else reaches the step but what functions close over.
    """

    def __init__(
        self,
        opt: Optimizer,
        loss_fn: LossFunction,
        has_aux: bool = False,
        grad_mode: GradMode = "reverse",
    ) -> None:
        check_optimizer(opt, "a step of the inner loop")
        if grad_mode not in ("reverse", "mixed", "first_order"):
            raise HyperparameterError(
                f"grad_mode is 'reverse', 'mixed' or 'first_order', not {grad_mode!r}"
            )
        self.asks_for_loss = asks_for_loss(opt)
        if grad_mode == "first_order" and self.asks_for_loss:
            raise HyperparameterError(
                f"{opt.name} takes gradients of its own, which grad_mode='first_order' "
                "cannot take as constants; use 'reverse'"
            )
        self.update = opt.update
        self.by_rule = opt.spec is not None
        self.loss = InnerLoss(loss_fn, has_aux)
        self.first_order = grad_mode == "first_order"
        self.mixed = grad_mode == "mixed"

    def __call__(self, given: Mapping[str, Tree], own: bool = False) -> Stepped:
        """One step; ``own`` says that the loss cannot close over these parameters."""
        grads, loss, aux, buffers = self.gradient(given, own)
        if self.first_order:
            _refuse_lost_gradients(grads)
        params, state = self.updated(grads, given)
        return Stepped(params, state, loss, aux, buffers)

    def plain(self) -> "Step":
        """The same step without mixed mode, for where nothing keeps its graph."""
        step = copy(self)
        step.mixed = False
        return step

    def results(self, given: Mapping[str, Tree]) -> tuple[Tensor, Tree, Tree]:
        """The loss, aux, and buffers."""
        return self.loss(**{name: given[name] for name in ARGUMENTS})

    def gradient(
        self, given: Mapping[str, Tree], own: bool = False
    ) -> tuple[Tree, Tensor, Tree, Tree]:
        """∇L, the loss, aux and buffers."""
        of_loss = {name: given[name] for name in ARGUMENTS}
        if self.first_order:
            of_loss["params"] = tree.detach(of_loss["params"])
        if self.mixed and custom_vjp.is_possible():
            return tuple(mixed.gradient(self.loss, of_loss).values())
        grads, results = self.loss.grad(**of_loss, own=own)
        return grads, *results

    def updated(self, grads: Tree, given: Mapping[str, Tree]) -> tuple[Tree, State]:
        """What the optimizer makes of the gradient."""
        hyper: dict[str, Any] = dict(given["hyper"] or {})
        if self.asks_for_loss:
            hyper["loss_fn"] = self._loss_of_params([given[n] for n in ARGUMENTS[1:]])
        return self.update(grads, given["state"], given["params"], **hyper)

    def _loss_of_params(self, rest: list[Tree]) -> Callable[[Tree], Tensor]:
        return lambda params: self.loss(params, *rest)[0]


def asks_for_loss(opt: Optimizer) -> bool:
    """Whether ``update`` is to be given ``loss_fn``, a function of params."""
    return "loss_fn" in opt.hyper


def _refuse_lost_gradients(grads: Tree) -> None:
    # The parameters were detached, so whatever the gradient still follows is elsewhere.
    if any(is_tracked(g) for g in tree.leaves(grads) if g is not None):
        raise GradientLostError(
            "the inner loss depends on meta, batch or a closed-over tensor that requires "
            "grad; grad_mode='first_order' would drop that gradient. Use "
            "grad_mode='reverse', or pass fo.detach(...) of it"
        )
