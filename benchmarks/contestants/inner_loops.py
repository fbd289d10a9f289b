"""Long inner loops of Adam in three libraries: what they hold, and how long they take.

Each contender makes K steps and returns the loss on the last parameters, from which the
gradient with respect to the first is taken. The networks have no unit without a gradient,
and no parameter that the loss does not see: TorchOpt's Adam gives NaN there.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import funcopt as fo
from workloads.problems import EPS

LR = 1e-3

#: → the loss after K steps, and the parameters it started from
Forward: TypeAlias = Callable[[], tuple[Tensor, Sequence[Tensor]]]


class Block(nn.Module):
    """Attention as products and a softmax, which has all derivatives; and an MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value = (
            nn.Linear(width, width, bias=bias) for bias in (True, False, True)
        )
        self.out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = (
            each(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for each in (self.query, self.key, self.value)
        )
        weights = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1)
        x = x + self.out((weights @ v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def transformer(width: int = 32, heads: int = 4) -> nn.Module:
    """Two blocks on sequences of vectors, and a linear head at each place."""
    return nn.Sequential(
        nn.Linear(16, width),
        Block(width, heads),
        Block(width, heads),
        nn.Linear(width, 8),
    )


def mlp(width: int = 64) -> nn.Module:
    """Four hidden layers with tanh."""
    sizes = (16, width, width, width, width)
    layers = [nn.Sequential(nn.Linear(a, b), nn.Tanh()) for a, b in zip(sizes, sizes[1:])]
    return nn.Sequential(*layers, nn.Linear(width, 8))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "transformer, 2 layers": (transformer, (8, 16)),  # sequences, places
    "MLP, 4 layers": (mlp, (256,)),
}


@dataclass(frozen=True)
class Loop:
    """A network, the data of all its steps, and how many steps there are."""

    name: str
    net: nn.Module
    x: Tensor
    y: Tensor
    query_x: Tensor
    query_y: Tensor
    steps: int

    def loss(self, out: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(out.flatten(0, -2), y.flatten())


def loop(name: str, steps: int, dtype: torch.dtype = torch.float32) -> Loop:
    torch.manual_seed(0)
    make, shape = NETWORKS[name]
    net = make().to(dtype)
    x, query_x = (torch.randn(*shape, 16, dtype=dtype) for _ in range(2))
    y, query_y = (torch.randint(8, shape) for _ in range(2))
    return Loop(name, net, x, y, query_x, query_y, steps)


def with_funcopt(problem: Loop, **how: Any) -> Forward:
    net = problem.net
    opt = fo.adam(lr=LR, eps=EPS)
    start = {name: p.detach().requires_grad_() for name, p in net.named_parameters()}

    def loss(params: Any, batch: Any) -> Tensor:
        x, y = batch
        return problem.loss(torch.func.functional_call(net, params, (x,)), y)

    def forward() -> tuple[Tensor, Sequence[Tensor]]:
        batch = (problem.x, problem.y)
        run = fo.unroll(opt, loss, start, batch, steps=problem.steps, **how)
        query = loss(run.params, (problem.query_x, problem.query_y))
        return query, list(start.values())

    return forward


def with_higher(problem: Loop) -> Forward:
    import higher

    net = problem.net
    opt = torch.optim.Adam(net.parameters(), lr=LR, eps=EPS)

    def forward() -> tuple[Tensor, Sequence[Tensor]]:
        with higher.innerloop_ctx(net, opt, copy_initial_weights=False) as (fast, step):
            for _ in range(problem.steps):
                step.step(problem.loss(fast(problem.x), problem.y))
            query = problem.loss(fast(problem.query_x), problem.query_y)
        return query, list(net.parameters())

    return forward


def with_torchopt(problem: Loop) -> Forward:
    import torchopt

    net = problem.net
    opt = torchopt.MetaAdam(net, lr=LR, eps=EPS)
    start = list(net.parameters())

    def forward() -> tuple[Tensor, Sequence[Tensor]]:
        net_state = torchopt.extract_state_dict(net, by="reference")
        opt_state = torchopt.extract_state_dict(opt, by="reference")
        for _ in range(problem.steps):
            opt.step(problem.loss(net(problem.x), problem.y))
        query = problem.loss(net(problem.query_x), problem.query_y)
        torchopt.recover_state_dict(net, net_state)
        torchopt.recover_state_dict(opt, opt_state)
        return query, start

    return forward


def contenders(problem: Loop) -> dict[str, Forward]:
    """By name; of our own, those that this version has."""
    own: dict[str, dict[str, Any]] = {"reverse": {}}
    if "remat" in inspect.signature(fo.unroll).parameters:
        own["mixed"] = {"grad_mode": "mixed"}
        own["mixed, sqrt"] = {"grad_mode": "mixed", "remat": "sqrt"}
    ours = {name: with_funcopt(problem, **how) for name, how in own.items()}
    return {**ours, "higher": with_higher(problem), "torchopt": with_torchopt(problem)}


def gradient(forward: Forward) -> list[Tensor]:
    loss, start = forward()
    return list(torch.autograd.grad(loss, start))
