"""Influence balancing (Tallec, Ollivier, 2017), where short windows mislead.

s' = A s + θ (1 x 10, -1 x 13), the loss ½ (s¹ - 1)². Where the state has come to rest
for θ = ½, a step's loss has the derivative 24; windows up to 100 get even its sign wrong.
"""

from typing import Any

import torch
from torch import Tensor

import funcopt as fo
from funcopt.hyper import Hyper

SIZE = 23
SHIFT = torch.diag(torch.full((SIZE - 1,), 0.5, dtype=torch.float64), 1)
TRANSITION = 0.5 * torch.eye(SIZE, dtype=torch.float64) + SHIFT
PUSH = torch.cat([torch.ones(10), -torch.ones(13)]).double()
START = torch.ones(SIZE, dtype=torch.float64)
THETA = torch.tensor(0.5, dtype=torch.float64)
#: the mean derivative of a step's loss, by the window; of two decimals
TRUNCATED = {1: -4.0, 10: -22.0, 20: -40.0, 50: -28.27, 100: -2.32, 150: 6.45}
TRUNCATED |= {200: 10.84, 500: 18.74}
#: by the number of steps from the start: the sum of losses and its derivative
TOTAL = {100: (994.7844, 3571.6306), 1000: (8194.7844, 25171.6306)}


def influence() -> fo.Optimizer:
    def rule(g: Tensor, s: Tensor, *, step: Any, theta: Tensor) -> tuple[Tensor]:
        return (TRANSITION @ s + theta * PUSH,)

    return fo.per_tensor(rule, name="influence", slots={}, hyper={"theta": Hyper(0.5)})


def influence_loss(s: Tensor, _: Any) -> Tensor:
    return 0.5 * (s[0] - 1) ** 2


def stationary() -> Tensor:
    return torch.linalg.solve(torch.eye(SIZE).double() - TRANSITION, THETA * PUSH)
