"""One optimizer step in each library, over and over.

Each maker takes the name of a rule in `RULES`, parameters and gradients, and returns a
`Stepper` whose ``step`` goes on from what the last one made, as in training, but always
with the same gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

import funcopt as fo


@dataclass
class Stepper:
    """``step()`` makes one step; ``params()`` gives the parameters it has come to."""

    step: Callable[[], Any]
    params: Callable[[], list[Tensor]]


@dataclass(frozen=True)
class Rule:
    """A rule, ours and torch's, and how many bytes a float32 parameter's step moves."""

    ours: Callable[..., fo.Optimizer]
    theirs: Callable[..., torch.optim.Optimizer]
    bytes: int
    options: dict[str, Any] = field(default_factory=dict)


class ForeachLion(torch.optim.Optimizer):
    """Lion by ``torch._foreach_*``, in place: torch has none (Chen et al., 2023)."""

    def __init__(
        self,
        params: Any,
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
        foreach: bool = True,
    ) -> None:
        defaults = dict(lr=lr, betas=betas, weight_decay=weight_decay)
        super().__init__(params, defaults)
        for p in self.param_groups[0]["params"]:
            self.state[p] = torch.zeros_like(p)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        (group,) = self.param_groups
        lr, (beta1, beta2) = group["lr"], group["betas"]
        params = group["params"]
        grads, averages = [p.grad for p in params], [self.state[p] for p in params]
        t: Any = torch  # its lists are private, and lack types
        signs = t._foreach_lerp(averages, grads, 1 - beta1)
        t._foreach_sign_(signs)
        t._foreach_mul_(params, 1 - lr * group["weight_decay"])
        t._foreach_add_(params, signs, alpha=-lr)
        t._foreach_lerp_(averages, grads, 1 - beta2)


_ADAM = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8}

RULES: dict[str, Rule] = {
    "adamw": Rule(fo.adamw, torch.optim.AdamW, 28, _ADAM | {"weight_decay": 1e-2}),
    "rmsprop": Rule(fo.rmsprop, torch.optim.RMSprop, 20),
    "amsgrad": Rule(
        partial(fo.adam, amsgrad=True), partial(torch.optim.Adam, amsgrad=True), 36, _ADAM
    ),
    "nadam": Rule(fo.nadam, torch.optim.NAdam, 28),
    "radam": Rule(fo.radam, torch.optim.RAdam, 28),
    "adadelta": Rule(fo.adadelta, torch.optim.Adadelta, 28),
    "adamax": Rule(fo.adamax, torch.optim.Adamax, 28),
    "rprop": Rule(fo.rprop, torch.optim.Rprop, 28),
    "lion": Rule(
        fo.lion, ForeachLion, 20, {"lr": 1e-4, "betas": (0.9, 0.99), "weight_decay": 1e-2}
    ),
}


def ours(
    name: str, params: list[Tensor], grads: list[Tensor], *, donate: bool = False
) -> Stepper:
    """funcopt's update, pure or donated."""
    opt = RULES[name].ours(**RULES[name].options)
    run: dict[str, Any] = {"params": [p.clone() for p in params]}
    run["state"] = opt.init(run["params"])
    update = opt.update

    def step() -> None:
        run["params"], run["state"] = update(
            grads, run["state"], run["params"], donate=donate
        )

    return Stepper(step, lambda: list(run["params"]))


def torch_optim(
    name: str, params: list[Tensor], grads: list[Tensor], **options: Any
) -> Stepper:
    """torch.optim, in place; ``fused=True`` or ``foreach=True``."""
    held = [torch.nn.Parameter(p.clone()) for p in params]
    for p, g in zip(held, grads):
        p.grad = g
    opt = RULES[name].theirs(held, **RULES[name].options, **options)
    return Stepper(opt.step, lambda: [p.detach() for p in held])


def torchopt(name: str, params: list[Tensor], grads: list[Tensor]) -> Stepper:
    """TorchOpt's functional optimizer, pure."""
    import torchopt

    opt = getattr(torchopt, name)(**RULES[name].options)
    run: dict[str, Any] = {"params": tuple(p.clone() for p in params)}
    run["state"] = opt.init(run["params"])
    given = tuple(grads)

    def step() -> None:
        updates, run["state"] = opt.update(
            given, run["state"], params=run["params"], inplace=False
        )
        run["params"] = torchopt.apply_updates(run["params"], updates, inplace=False)

    return Stepper(step, lambda: list(run["params"]))


def optax(name: str, params: list[Tensor], grads: list[Tensor]) -> Stepper:
    """optax under ``jax.jit``, pure."""
    import jax
    import numpy as np
    import optax

    options = dict(RULES[name].options)
    b1, b2 = options.pop("betas")
    opt = getattr(optax, name)(options.pop("lr"), b1=b1, b2=b2, **options)

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


def exact(name: str, params: list[Tensor], grads: list[Tensor]) -> Stepper:
    """torch.optim without its fused kernels, in float64: what the others are held to."""
    wide, given = [[x.double() for x in column] for column in (params, grads)]
    return torch_optim(name, wide, given, foreach=True)
