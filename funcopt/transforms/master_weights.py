"""Half-precision parameters, stepped in float32."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from funcopt import tree
from funcopt.checks import check_gradients, check_keys
from funcopt.errors import HyperparameterTypeError, LeafError
from funcopt.execution import donation
from funcopt.optimizer import Optimizer, check_optimizer
from funcopt.types import HALF, State, Tensor, Tree


def master_weights(opt: Optimizer, *, stochastic: bool = False) -> Optimizer:
    r"""Keep float32 masters of half-precision parameters in the state, and step those.

    .. math::
        (w_t, s_t) = \text{step}(g, s_{t-1}, w_{t-1}), \qquad p_t = \text{round}(w_t)

    A step smaller than half a unit in the last place of p would be lost in p; in w it
    adds up. The optimizer's own state is float32, too.

    Args:
        opt: any Optimizer.
        stochastic: round up or down at random, so that p is w in the mean (bfloat16
            parameters alone). ``update`` then takes ``generator=``, the explicit
            ``torch.Generator`` that is drawn from.

    Returns:
        An Optimizer; state ``optimizer``, that of ``opt`` for the masters, and
        ``master``, float32 of each half-precision parameter's shape; ``None`` for
        others, which step as they are.

    Raises:
        HyperparameterTypeError: by ``update``, stochastic without a generator.
        LeafError: by ``init``, stochastic with float16 parameters.

    Note:
        The derivative of rounding is taken as 1. Parameters that are changed elsewhere
        go back to their masters with the next step; so the stages of a chain stand
        within: ``master_weights(chain(opt, lookahead()))``.

    Source:
        Micikevicius and others, "Mixed precision training", 2018, section 3.1; Gupta,
        Agrawal, Gopalakrishnan, Narayanan, "Deep learning with limited numerical
        precision", 2015, section 3 (stochastic rounding).

    Example:
        >>> import torch, funcopt as fo
        >>> opt = fo.master_weights(fo.sgd(lr=1e-3))
        >>> p = torch.ones(1, dtype=torch.bfloat16)
        >>> state = opt.init(p)
        >>> for _ in range(5):
        ...     p, state = opt.update(torch.ones_like(p), state, p)
        >>> p, state["master"]
        (tensor([0.9961], dtype=torch.bfloat16), tensor([0.9950]))
    """
    check_optimizer(opt, "master_weights")
    its = _MasterWeights(opt, stochastic)
    name = f"master_weights({opt.name})"
    hyper = {**opt.hyper, "generator": None} if stochastic else opt.hyper
    return Optimizer(its.init, its.update, name, hyper, eval_params=its.eval_params)


@dataclass(frozen=True, eq=False)
class _MasterWeights:
    """The functions of `master_weights`."""

    opt: Optimizer
    stochastic: bool

    def init(self, params: Tree) -> State:
        if self.stochastic:
            _check_rounding(params)
        master = tree.map(lambda p: p.float() if p.dtype in HALF else None, params)
        return {"optimizer": self.opt.init(_stepped(master, params)), "master": master}

    def update(
        self,
        grads: Tree,
        state: State,
        params: Tree,
        *,
        donate: bool = False,
        generator: torch.Generator | None = None,
        **given: Any,
    ) -> tuple[Tree, State]:
        if self.stochastic and not isinstance(generator, torch.Generator):
            raise HyperparameterTypeError(
                "master_weights(stochastic=True) draws from an explicit generator: "
                f"update(..., generator=torch.Generator()), not {generator!r}"
            )
        check_keys(state, ("optimizer", "master"), "master_weights")
        check_gradients(grads)
        if donate:
            donation.check_trees(grads, state, params)

        old = _stepped(state["master"], params)
        wide = tree.map(lambda w, g: None if g is None else g.to(w.dtype), old, grads)
        loss_fn = given.get("loss_fn")
        if callable(loss_fn):
            given["loss_fn"] = partial(_loss_of_masters, loss_fn, params)
        # What is drawn anew has to have moved, and the old one tells.
        new, inner = self.opt.update(
            wide, state["optimizer"], old, donate=donate and not self.stochastic, **given
        )

        def rounded(w: Tensor, was: Tensor, p: Tensor) -> Tensor:
            if w.dtype is p.dtype:
                return w
            if not self.stochastic:
                return w.to(p.dtype)
            return p if w is was else _at_random(w, generator)

        master = tree.map(lambda p, w: w if p.dtype in HALF else None, params, new)
        made = tree.map(rounded, new, old, params), {"optimizer": inner, "master": master}
        return donation.write_over((params, state), made) if donate else made

    def eval_params(self, state: State, params: Tree, **given: Any) -> Tree:
        check_keys(state, ("optimizer", "master"), "master_weights")
        given.pop("generator", None)
        master = _stepped(state["master"], params)
        found = self.opt.eval_params(state["optimizer"], master, **given)
        return tree.map(lambda x, p: x.to(p.dtype), found, params)


def _stepped(master: Tree, params: Tree) -> Tree:
    """The masters, and parameters that have none."""
    return tree.map(lambda p, w: p if w is None else w, params, master)


def _loss_of_masters(loss_fn: Callable[[Tree], Any], params: Tree, master: Tree) -> Any:
    """The loss is of parameters, in their dtypes: so are the data that it closes over."""
    return loss_fn(tree.map(lambda w, p: w.to(p.dtype), master, params))


def _check_rounding(params: Tree) -> None:
    leaves, structure = tree.flatten(params)
    for path, p in zip(tree.paths(structure), leaves):
        if p is not None and p.dtype is torch.float16:
            raise LeafError(
                f"params['{path}'] is torch.float16; stochastic rounding is to bfloat16"
            )


def _at_random(w: Tensor, generator: torch.Generator | None) -> Tensor:
    """To bfloat16, up with the probability of the part that is cut off.

    bfloat16 is the upper half of float32's bits: noise below it carries over.
    """
    value = w.detach()
    bits = value.view(torch.int32)
    noise = torch.randint(
        1 << 16, w.shape, generator=generator, dtype=torch.int32, device=w.device
    )
    change = ((bits + noise) & ~0xFFFF).view(torch.float32) - value  # exact, and small
    return (w + torch.where(value.isfinite(), change, 0.0)).to(torch.bfloat16)
