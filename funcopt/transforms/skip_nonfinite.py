"""Leave out a step whose gradients are not finite."""

from dataclasses import dataclass
from typing import Any

import torch

from funcopt import tree
from funcopt.checks import check_gradients, check_keys
from funcopt.execution import donation
from funcopt.optimizer import Optimizer, check_optimizer
from funcopt.stepping import sparse_rows
from funcopt.transforms._conditional import choose, counter
from funcopt.types import State, Tensor, Tree


def skip_nonfinite(opt: Optimizer) -> Optimizer:
    r"""Let parameters and state stay where a gradient holds an infinity or NaN.

    .. math::
        (p_t, s_t) = \begin{cases}
            \text{step}(g, s_{t-1}, p_{t-1}) & \text{all of } g \text{ is finite} \\
            (p_{t-1}, s_{t-1}) & \text{else}
        \end{cases}

    Values are chosen, never multiplied by a mask: nothing of a bad gradient is left, in
    a derivative neither. Under vmap each task decides for itself.

    Args:
        opt: any Optimizer.

    Returns:
        An Optimizer; state ``optimizer``, that of ``opt``, and ``skipped``, an int64 0-d
        tensor that counts the steps left out. A step left out counts in no ``step``.

    Raises:
        Nothing of its own; what ``opt`` raises.

    Source:
        optax's ``apply_if_finite`` (DeepMind, 2020); the loss scaling of Micikevicius
        and others, "Mixed precision training", 2018, section 3.2, skips steps so.

    Example:
        >>> import torch, funcopt as fo
        >>> opt = fo.skip_nonfinite(fo.sgd(lr=1.0))
        >>> p = torch.zeros(2)
        >>> new, state = opt.update(torch.tensor([1.0, torch.inf]), opt.init(p), p)
        >>> new, state["skipped"]
        (tensor([0., 0.]), tensor(1))
    """
    check_optimizer(opt, "skip_nonfinite")
    its = _SkipNonfinite(opt)
    name = f"skip_nonfinite({opt.name})"
    return Optimizer(its.init, its.update, name, opt.hyper, eval_params=its.eval_params)


@dataclass(frozen=True, eq=False)
class _SkipNonfinite:
    """The functions of `skip_nonfinite`."""

    opt: Optimizer

    def init(self, params: Tree) -> State:
        return {"optimizer": self.opt.init(params), "skipped": counter(params)}

    def update(
        self,
        grads: Tree,
        state: State,
        params: Tree,
        *,
        donate: bool = False,
        **given: Any,
    ) -> tuple[Tree, State]:
        check_keys(state, ("optimizer", "skipped"), "skip_nonfinite")
        check_gradients(grads)
        if donate:
            donation.check_trees(grads, state, params)
        finite = _all_finite(grads, state["skipped"].device)

        # Dynamo evaluates the annotations of an inner function, and knows no tuple[...].
        def step(grads: Tree, donate: bool) -> Any:
            return self.opt.update(
                grads, state["optimizer"], params, donate=donate, **given
            )

        def clean(g: Tensor) -> Tensor:
            return torch.where(finite, g, 0.0)

        new, inner = choose(
            finite,
            lambda: step(grads, donate),
            lambda: (params, state["optimizer"]),
            # The derivative of what is not chosen is 0 times it: it has to be finite.
            lambda: step(tree.map(clean, grads), False),
        )
        new_state = {"optimizer": inner, "skipped": state["skipped"] + ~finite}
        if donate:
            return donation.write_over((params, state), (new, new_state))
        return new, new_state

    def eval_params(self, state: State, params: Tree, **given: Any) -> Tree:
        check_keys(state, ("optimizer", "skipped"), "skip_nonfinite")
        return self.opt.eval_params(state["optimizer"], params, **given)


def _all_finite(grads: Tree, device: torch.device) -> Tensor:
    """A 0-d bool, for all leaves together."""
    given = [*map(sparse_rows.numbers, tree.present(grads))]
    each = [g.isfinite().all().to(device) for g in given]
    return torch.stack(each).all() if each else torch.ones((), dtype=torch.bool)
