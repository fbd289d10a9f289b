"""One optimizer step in each library, over and over.

Each maker takes a `Rule`, parameters and gradients, and returns a `Stepper` whose
``step`` goes on from what the last one made, as in training, but always with the same
gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import funcopt as fo
from contestants.rules import Rule


@dataclass
class Stepper:
    """``step()`` makes one step; ``params()`` gives the parameters it has come to."""

    step: Callable[[], Any]
    params: Callable[[], list[Tensor]]


#: AdamW in words that all libraries share: torch's defaults
_ADAMW = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}


def ours(
    rule: Rule,
    params: list[Tensor],
    grads: list[Tensor],
    *,
    donate: bool = False,
    execution: str | None = None,
) -> Stepper:
    """funcopt's update, pure or donated."""
    opt = rule.optimizer
    if rule.takes_loss:
        return _ours_from_start(opt, params, grads, donate)
    run: dict[str, Any] = {"params": [p.clone() for p in params]}
    run["state"] = opt.init(run["params"])
    given = {**rule.data(params), "donate": donate, "execution": execution}
    update, grads = opt.update, rule.gradients(grads)

    def step() -> None:
        run["params"], run["state"] = update(grads, run["state"], run["params"], **given)

    return Stepper(step, lambda: list(run["params"]))


def torch_optim(
    rule: Rule, params: list[Tensor], grads: list[Tensor], **flags: Any
) -> Stepper:
    """torch.optim, in place; ``fused=True`` or ``foreach=True``."""
    assert rule.theirs is not None
    held = [torch.nn.Parameter(p.clone()) for p in params]
    for p, g in zip(held, rule.gradients(grads)):
        p.grad = g
    opt = rule.theirs(held, **rule.options, **flags)
    if rule.takes_loss:
        return _torch_from_start(opt, held, params, grads)
    return Stepper(opt.step, lambda: [p.detach() for p in held])


def quadratic(params: list[Tensor], centers: list[Tensor]) -> Tensor:
    """A loss whose curvatures are of all sizes, so that a few steps do not end."""
    total = params[0].new_zeros(())
    for p, center in zip(params, centers):
        curvature = torch.logspace(-1, 0, p.shape[0], dtype=p.dtype)
        away = (p - center).flatten(1) if p.ndim > 1 else p[:, None] - center[:, None]
        total = total + (curvature[:, None] * away * away).sum() / 2
    return total


def _ours_from_start(
    opt: fo.Optimizer, params: list[Tensor], centers: list[Tensor], donate: bool
) -> Stepper:
    """What makes many steps in one call: always the first call."""
    first = opt.init(params)
    held, state = [x.clone() for x in params], {k: v.clone() for k, v in first.items()}
    run: dict[str, Any] = {"params": held}
    vectors = ("d", "prev_flat_grad", "old_dirs", "old_stps")
    again = [key for key in first if key not in vectors]

    def loss(p: list[Tensor]) -> Tensor:
        return quadratic(p, centers)

    def step() -> None:
        p, s = params, first
        if donate:  # what is kept of no steps need not be written over
            p, s = held, state
            for x, start in zip(held, params):
                x.copy_(start)
            for key in again:
                s[key].copy_(first[key])
        with torch.enable_grad():
            asked = [x.requires_grad_() for x in map(Tensor.detach, p)]
            value = loss(asked)
            grads = list(torch.autograd.grad(value, asked))
        given = {"loss_fn": loss, "value": value.detach()}
        run["params"], _ = opt.update(grads, s, p, donate=donate, **given)

    return Stepper(step, lambda: list(run["params"]))


def _torch_from_start(
    opt: torch.optim.Optimizer,
    held: list[torch.nn.Parameter],
    params: list[Tensor],
    centers: list[Tensor],
) -> Stepper:
    def closure() -> Any:
        with torch.enable_grad():
            opt.zero_grad()
            loss = quadratic(list(held), centers)
            loss.backward()
        return loss

    def step() -> None:
        opt.state.clear()
        for p, start in zip(held, params):
            p.data.copy_(start)
        opt.step(closure)

    return Stepper(step, lambda: [p.detach() for p in held])


def torchopt(rule: Rule, params: list[Tensor], grads: list[Tensor]) -> Stepper:
    """TorchOpt's functional AdamW, pure."""
    import torchopt

    opt = torchopt.adamw(**_ADAMW)
    run: dict[str, Any] = {"params": tuple(p.clone() for p in params)}
    run["state"] = opt.init(run["params"])
    given = tuple(grads)

    def step() -> None:
        updates, run["state"] = opt.update(
            given, run["state"], params=run["params"], inplace=False
        )
        run["params"] = torchopt.apply_updates(run["params"], updates, inplace=False)

    return Stepper(step, lambda: list(run["params"]))


def optax(rule: Rule, params: list[Tensor], grads: list[Tensor]) -> Stepper:
    """optax's AdamW under ``jax.jit``, pure."""
    import jax
    import numpy as np
    import optax

    options: dict[str, Any] = dict(_ADAMW)
    b1, b2 = options.pop("betas")
    opt = optax.adamw(options.pop("lr"), b1=b1, b2=b2, **options)

    @jax.jit
    def update(grads: Any, state: Any, params: Any) -> Any:
        updates, state = opt.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    run: dict[str, Any] = {"params": [jax.numpy.asarray(p.numpy()) for p in params]}
    run["state"] = opt.init(run["params"])
    given = [jax.numpy.asarray(g.numpy()) for g in grads]

    def step() -> None:
        run["params"], run["state"] = jax.block_until_ready(
            update(given, run["state"], run["params"])
        )

    return Stepper(step, lambda: [torch.from_numpy(np.array(p)) for p in run["params"]])


def exact(rule: Rule, params: list[Tensor], grads: list[Tensor]) -> Stepper:
    """What the others are held to, in float64: torch.optim's loop, or else the rule."""
    wide, given = [[x.double() for x in column] for column in (params, grads)]
    if rule.theirs is None:
        return ours(rule, wide, given, execution="reference")
    flags = {"foreach": True} if "foreach" in rule.implementations else {}
    return torch_optim(rule, wide, given, **flags)
