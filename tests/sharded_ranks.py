"""What each process does with FSDP2's parameters in test_ranks.py: see ranks.py."""

from typing import Any

import ranks
import torch
import torch.distributed as dist
from torch import Tensor

import funcopt as fo

WIDTHS = (3, 5, 2)  # of two ranks the first has more rows of the hidden layer
BATCH = ranks.f64(6, 3, seed=20), ranks.f64(6, 2, seed=21)
FSDP = ("sgd", "adamw")


def network() -> Any:
    from torch import nn

    torch.manual_seed(0)
    first, second = (nn.Linear(a, b) for a, b in zip(WIDTHS, WIDTHS[1:]))
    return nn.Sequential(first, nn.Tanh(), second).double()


def rule_of(name: str) -> fo.Optimizer:
    return getattr(fo, name)(lr=0.1, **({"momentum": 0.9} if name == "sgd" else {}))


def trained(net: Any, opt: fo.Optimizer, part: slice) -> dict[str, Tensor]:
    """Three steps as torch makes them: backward, an update, and the module's own."""
    params = dict(net.named_parameters())
    state = opt.init(params)
    for _ in range(3):
        x, y = (given[part] for given in BATCH)
        (net(x) - y).square().mean().backward()
        grads = {name: p.grad for name, p in params.items()}
        with torch.no_grad():
            new, state = opt.update(grads, state, params)
            for name, p in params.items():
                p.copy_(new[name])
        net.zero_grad()
    return {name: whole(p) for name, p in params.items()}


def whole(x: Tensor) -> Tensor:
    return getattr(x, "full_tensor", lambda: x)().detach()


def sharded(group: Any) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return fully_shard(network(), mesh=mesh), mesh


def fully_sharded(rank: int, group: Any) -> Any:
    """How far FSDP2's training, half of the batch on each rank, is from a whole one."""
    found = {}
    for name in FSDP:
        one = trained(network(), rule_of(name), slice(None))
        part = slice(0, 3) if rank == 0 else slice(3, 6)
        other = trained(sharded(group)[0], rule_of(name), part)
        found[name] = max((one[n] - other[n]).abs().max().item() for n in one)
    return found


def unrolled_shards(rank: int, group: Any) -> Any:
    """How far an inner loop on FSDP2's parameters is from one on whole ones."""
    from torch.distributed.tensor import distribute_tensor

    net, mesh = sharded(group)
    plain = network()

    def loss(p: Any, batch: Any) -> Tensor:
        x, y = batch
        out = torch.func.functional_call(plain, p, (x,))
        return (out - y).square().mean()

    found = {}
    for name in ("adamw",):
        ways: list[Any] = [{}, {"remat": "sqrt"}, {"grad_mode": "mixed"}]
        for way in ways:
            outcomes = []
            for params, batch in (
                (dict(plain.named_parameters()), BATCH),
                (
                    dict(net.named_parameters()),
                    [distribute_tensor(x, mesh) for x in BATCH],
                ),
            ):
                run = fo.unroll(rule_of(name), loss, params, batch, steps=3, **way)
                slopes = torch.autograd.grad(loss(run.params, batch), [*params.values()])
                outcomes.append([*run.params.values(), *slopes])
            distance = [(a - whole(b)).abs().max().item() for a, b in zip(*outcomes)]
            found[f"{name}, {way}"] = max(distance)
    return found


if __name__ == "__main__":
    ranks.main(globals())
