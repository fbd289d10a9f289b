"""Sophia, by pytorch_optimizer: its SophiaH, with the Hessian given."""

from importlib.metadata import version

import torch
from pytorch_optimizer import SophiaH

from published.problem import Arrays, hessian, start
from published.record import Stepper, write

RUNS = [
    {"lr": 0.02, "betas": [0.965, 0.99], "rho": 0.04, "weight_decay": 0.0},
    {"lr": 0.05, "betas": [0.8, 0.6], "rho": 2.0, "eps": 0.3, "weight_decay": 0.1},
    {"lr": 0.05, "betas": [0.8, 0.6], "rho": 3.0, "weight_decay": 0.0, "maximize": True},
]


def sophia(
    lr: float,
    betas: tuple[float, float],
    rho: float,
    weight_decay: float,
    eps: float = 1e-12,
    maximize: bool = False,
) -> Stepper:
    """Theirs clips m/max(h, ε) to ±p, and so is ours with p = ρ, lr/ρ and ε/ρ."""
    params = [torch.tensor(p, requires_grad=True) for p in start()]
    optimizer = SophiaH(
        params,
        lr=lr / rho,
        betas=betas,
        weight_decay=weight_decay * rho,
        p=rho,
        eps=eps / rho,
        maximize=maximize,
        update_period=10**9,
        foreach=False,
    )
    done = 0

    def step(grads: Arrays) -> Arrays:
        nonlocal done
        done += 1
        for p, g in zip(params, grads):
            p.grad = torch.tensor(g)
        estimate = hessian(done)
        optimizer.step(hessian=estimate and [torch.tensor(h) for h in estimate])
        return [p.detach().numpy() for p in params]

    return step


if __name__ == "__main__":
    write(
        "sophia_g",
        f"pytorch_optimizer {version('pytorch_optimizer')}: SophiaH, its clipping scaled",
        [(run, sophia(**run)) for run in RUNS],
        given=["hessian"],
    )
