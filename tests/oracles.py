"""Rules that torch.optim lacks, written once more from their papers, in place."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class Lion(torch.optim.Optimizer):
    """Algorithm 2 of "Symbolic discovery of optimization algorithms" (2023)."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        foreach: bool = False,
    ) -> None:
        super().__init__(params, dict(lr=lr, betas=betas, weight_decay=weight_decay))
        self.sign = -1 if maximize else 1

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._step(p, self.sign * p.grad, **group)

    def _step(
        self,
        p: Tensor,
        g: Tensor,
        *,
        lr: float,
        betas: Any,
        weight_decay: float,
        **_: Any,
    ) -> None:
        state, (beta1, beta2) = self.state[p], betas
        wide = torch.promote_types(p.dtype, torch.float32)  # a sign must not be rounded
        m = state.setdefault("exp_avg", torch.zeros_like(p)).to(wide)
        c = beta1 * m + (1 - beta1) * g
        p.sub_(lr * (c.sign() + weight_decay * p))
        state["exp_avg"] = (beta2 * m + (1 - beta2) * g).to(p.dtype)


class Muon(torch.optim.Muon):
    """torch's, which knows no ``maximize``; pytorch/pytorch#194664 is mended."""

    def __init__(
        self,
        params: Iterable[Any],
        *,
        maximize: bool = False,
        foreach: bool = False,
        **hyper: Any,
    ) -> None:
        super().__init__(params, **hyper)
        self.sign = -1 if maximize else 1

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        kept = {}
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                p.grad.mul_(self.sign)
                if p.dtype is torch.bfloat16 and not group["nesterov"]:
                    old = self.state[p].get("momentum_buffer", torch.zeros_like(p))
                    kept[p] = old.lerp(p.grad, 1 - group["momentum"])
        super().step()
        for p, buffer in kept.items():  # which torch has divided by its norm
            self.state[p]["momentum_buffer"] = buffer
