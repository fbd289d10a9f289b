"""One meta-step in three libraries, each as its own documentation writes it.

Every function takes a `Problem` and returns a meta-step without arguments: it gives the
mean query loss and the meta-gradient, in the order of ``net.parameters()``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from workloads.problems import Problem

MetaStep: TypeAlias = Callable[[], tuple[float, list[Tensor]]]


def with_funcopt(
    problem: Problem,
    *,
    tasks: Literal["vmap", "loop", "auto"] = "auto",
    compile: bool = False,
) -> MetaStep:
    import funcopt as fo

    opt = {"sgd": fo.sgd, "adam": fo.adam}[problem.inner](
        lr=problem.lr, **problem.options
    )

    def loss(params, batch):
        x, y = batch
        return problem.loss(problem.apply(params, x), y)

    def task_loss(theta, task):
        support, query = (task["x"], task["y"]), (task["query_x"], task["query_y"])
        run = fo.unroll(opt, loss, theta, support, steps=problem.steps)
        return loss(run.params, query)

    theta = problem.theta
    value_and_grad = fo.meta.value_and_grad(task_loss, tasks=tasks, compile=compile)

    def meta_step() -> tuple[float, list[Tensor]]:
        value, grads = value_and_grad(theta, problem.tasks)
        return value.item(), list(grads.values())

    return meta_step


def with_higher(problem: Problem) -> MetaStep:
    import higher

    net = problem.net
    kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[problem.inner]
    opt = kind(net.parameters(), lr=problem.lr, **problem.options)

    def meta_step() -> tuple[float, list[Tensor]]:
        net.zero_grad()
        total = 0.0
        for x, y, query_x, query_y in zip(*problem.tasks.values()):
            with higher.innerloop_ctx(net, opt, copy_initial_weights=False) as (
                fast_net,
                fast_opt,
            ):
                for _ in range(problem.steps):
                    fast_opt.step(problem.loss(fast_net(x), y))
                query_loss = problem.loss(fast_net(query_x), query_y) / problem.count
                query_loss.backward()
            total += query_loss.item()
        return total, _gradients(net)

    return meta_step


def with_torchopt(problem: Problem) -> MetaStep:
    import torchopt

    net = problem.net
    kind = {"sgd": torchopt.MetaSGD, "adam": torchopt.MetaAdam}[problem.inner]
    opt = kind(net, lr=problem.lr, **problem.options)

    def meta_step() -> tuple[float, list[Tensor]]:
        net.zero_grad()
        total = 0.0
        net_state = torchopt.extract_state_dict(net, by="reference")
        opt_state = torchopt.extract_state_dict(opt, by="reference")
        start = list(net.parameters())
        for x, y, query_x, query_y in zip(*problem.tasks.values()):
            for _ in range(problem.steps):
                opt.step(problem.loss(net(x), y))
            query_loss = problem.loss(net(query_x), query_y) / problem.count
            query_loss.backward()
            total += query_loss.item()
            torchopt.recover_state_dict(net, net_state)
            torchopt.recover_state_dict(opt, opt_state)
        assert all(a is b for a, b in zip(start, net.parameters()))
        return total, _gradients(net)

    return meta_step


CONTENDERS: dict[str, Callable[[Problem], MetaStep]] = {
    "funcopt": with_funcopt,
    "higher": with_higher,
    "torchopt": with_torchopt,
}


def _gradients(net: torch.nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in net.parameters() if p.grad is not None]
