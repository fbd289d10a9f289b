"""One step for the mean gradient of several calls."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from funcopt import tree
from funcopt.checks import check_count, check_gradients, check_keys
from funcopt.execution import concrete, donation
from funcopt.optimizer import Optimizer, check_optimizer, from_spec
from funcopt.optimizers._parts import towards
from funcopt.spec import Spec
from funcopt.transforms._conditional import choose, counter
from funcopt.types import State, Tensor, Tree


def accumulate(opt: Optimizer, k: int) -> Optimizer:
    r"""Take in the gradients of k calls, and make one step by their mean.

    .. math::
        \text{mean}_i = \text{mean}_{i-1} + (g_i - \text{mean}_{i-1}) / i
        \qquad \text{and after } i = k: \quad \text{step}(\text{mean}_k)

    For k - 1 calls parameters are returned as they are, the same tensors; what is given
    for hyperparameters is looked at, and counts, in the k-th.

    Args:
        opt: any Optimizer.
        k: calls for a step, ≥ 1.

    Returns:
        An Optimizer; state ``optimizer``, that of ``opt``, ``mean``, of each parameter's
        shape (float32 for half precision), ``given``, how many gradients each leaf has
        had, and ``calls``, an int64 0-d tensor. A leaf that has had none of the k does
        not step; where that is not read (under vmap, on an accelerator, while a graph is
        made), one that has none in the last.

    Raises:
        HyperparameterError: k is no whole number ≥ 1.

    Source:
        The mean: Welford, "Note on a method for calculating corrected sums of squares
        and products", 1962.

    Example:
        >>> import torch, funcopt as fo
        >>> opt = fo.accumulate(fo.sgd(lr=1.0), k=2)
        >>> p, state = torch.zeros(1), opt.init(torch.zeros(1))
        >>> p, state = opt.update(torch.tensor([1.0]), state, p)
        >>> p
        tensor([0.])
        >>> opt.update(torch.tensor([2.0]), state, p)[0]
        tensor([-1.5000])
    """
    check_optimizer(opt, "accumulate")
    check_count("accumulate's k", k)
    mean_of = from_spec(Spec(_towards_mean, "accumulate", {}, {}))
    its = _Accumulate(opt, k, mean_of)
    name = f"accumulate({opt.name})"
    return Optimizer(its.init, its.update, name, opt.hyper, eval_params=its.eval_params)


#: what its state holds
_KEPT = ("optimizer", "mean", "given", "calls")


@dataclass(frozen=True, eq=False)
class _Accumulate:
    """The functions of `accumulate`."""

    opt: Optimizer
    k: int
    #: the mean in the parameter's place, the gradients given to a leaf as its steps
    mean_of: Optimizer

    def init(self, params: Tree) -> State:
        mean = tree.map(_zeros, params)
        return {
            "optimizer": self.opt.init(params),
            "mean": mean,
            "given": self.mean_of.init(mean)["step"],
            "calls": counter(params),
        }

    def update(
        self,
        grads: Tree,
        state: State,
        params: Tree,
        *,
        donate: bool = False,
        **given: Any,
    ) -> tuple[Tree, State]:
        check_keys(state, _KEPT, "accumulate")
        check_gradients(grads)
        if donate:
            donation.check_trees(grads, state, params)
        wide = tree.map(lambda mean, g: None if g is None else g.to(mean.dtype),
                        state["mean"], grads)  # fmt: skip
        mean, counts = self.mean_of.update(wide, {"step": state["given"]}, state["mean"])
        calls = state["calls"] + 1

        def step(donate: bool) -> tuple[Tree, Sequence[Tree]]:
            ready = _ready(mean, counts["step"], grads, params)
            new, inner = self.opt.update(
                ready, state["optimizer"], params, donate=donate, **given
            )
            again = tree.map(torch.zeros_like, (mean, counts["step"], calls))
            return new, (inner, *again)

        new, kept = choose(
            calls >= self.k,
            lambda: step(donate),
            lambda: (params, (state["optimizer"], mean, counts["step"], calls)),
            lambda: step(False),  # what is not chosen must not have been written
        )
        new_state: State = dict(zip(_KEPT, kept))
        if donate:
            return donation.write_over((params, state), (new, new_state))
        return new, new_state

    def eval_params(self, state: State, params: Tree, **given: Any) -> Tree:
        check_keys(state, _KEPT, "accumulate")
        return self.opt.eval_params(state["optimizer"], params, **given)


def _towards_mean(g: Tensor, mean: Tensor, *, step: Any) -> tuple[Tensor, ...]:
    return (towards(mean, g, 1 / step),)


def _zeros(p: Tensor) -> Tensor:
    """In float32 at least: half precision would lose a mean's last increments."""
    return torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32))


def _ready(mean: Tree, given: Tensor, grads: Tree, params: Tree) -> Tree:
    """The mean gradients in the parameters' dtypes; ``None`` where there were none."""
    means, structure = tree.flatten(mean)
    rows = zip(
        means,
        concrete.scalars_of(given),
        tree.flatten_like(structure, grads, "grads"),
        tree.flatten_like(structure, params, "params"),
    )
    return tree.unflatten(
        structure,
        [
            None if (g is None if isinstance(n, Tensor) else not n) else x.to(p.dtype)
            for x, n, g, p in rows
        ],
    )
