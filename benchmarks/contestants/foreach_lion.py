"""Lion by lists of tensors, as torch.optim would have it."""

from __future__ import annotations

from typing import Any

import torch


class ForeachLion(torch.optim.Optimizer):
    """Lion by ``torch._foreach_*``, in place: torch has none (Chen et al., 2023)."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
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
