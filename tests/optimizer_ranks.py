"""What each process does in test_torch_optim_distributed.py.

Loops that torch.distributed surrounds, each with our class and with torch.optim's, on a
rank's part of every batch; and the same by one process, on all of it.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import ranks
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from funcopt import torch_optim

LIBRARIES = torch_optim, torch.optim
ELEMENTWISE = {"AdamW": {"amsgrad": True}, "SGD": {"momentum": 0.9}}
WHOLE = slice(None)


def network() -> nn.Module:
    """Rows that two ranks do not share evenly, and one that only the first has."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)).double()


def sharded(model: nn.Module) -> nn.Module:
    """FSDP2: every parameter a DTensor, its rows split over the ranks."""
    from torch.distributed.fsdp import fully_shard

    for module in (*model.children(), model):
        fully_shard(module)
    return model


def part(rank: int) -> slice:
    return slice(4 * rank, 4 * rank + 4)


def gradients(model: Any, step: int, rows: slice) -> None:
    """Of two micro-batches, each split over the ranks."""
    for micro in range(2):
        x = ranks.f64(8, 4, seed=2 * step + micro)[rows]
        loss = (model(x) - x[:, :1].sin()).square().mean() / 2
        if isinstance(model, DistributedDataParallel) and not micro:
            with model.no_sync():
                loss.backward()
        else:
            loss.backward()


def train(model: nn.Module, opt: Any, rows: slice, steps: Iterable[int]) -> None:
    scheduler = torch.optim.lr_scheduler.ExponentialLR(opt, 0.9)
    for step in steps:
        opt.zero_grad()
        gradients(model, step, rows)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        scheduler.step()


def weights(model: nn.Module) -> list[Tensor]:
    found: list[Any] = [p.detach() for p in model.parameters()]
    return [p.full_tensor() if hasattr(p, "full_tensor") else p.clone() for p in found]


def params(model: nn.Module, name: str) -> list[nn.Parameter]:
    """Those that it steps; no row for a rank is an error of DTensor in torch's Muon."""
    return [
        p for p in model.parameters() if name != "Muon" or (p.ndim == 2 and len(p) > 1)
    ]


def distance(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    return max((a - b).abs().max().item() for a, b in zip(found, expected, strict=True))


def compared(
    name: str,
    kwargs: Any,
    rank: int,
    surround: Callable[[nn.Module], nn.Module],
    make: Callable[..., Any] = lambda cls, params, **kwargs: cls(params, **kwargs),
    steps: int = 4,
) -> dict[str, float]:
    """How far our class is from torch's, and from one process; and how far it went."""
    found = []
    for library in LIBRARIES:
        if not hasattr(library, name):
            continue
        model = surround(network())
        opt = make(getattr(library, name), params(model, name), lr=0.1, **kwargs)
        train(model, opt, part(rank), range(steps))
        found.append(weights(model))
    alone = network()
    start, cls = weights(alone), getattr(torch_optim, name)
    train(alone, cls(params(alone, name), lr=0.1, **kwargs), WHOLE, range(steps))
    return {
        "theirs": distance(found[0], found[-1]),
        "alone": distance(found[0], weights(alone)),
        "moved": distance(found[0], start),
    }


# The cases -----------------------------------------------------------------------------


def ddp(rank: int, group: Any) -> Any:
    def surround(views: bool) -> Any:
        return partial(DistributedDataParallel, gradient_as_bucket_view=views)

    kinds = {**ELEMENTWISE, "Adafactor": {}}
    return {
        f"{name}, views {views}": compared(name, kinds[name], rank, surround(views))
        for name, views in (("AdamW", False), ("SGD", True), ("Adafactor", True))
    }


def fsdp2(rank: int, group: Any) -> Any:
    by_parts = {**ELEMENTWISE, "Lion": {}, "NAdam": {}}
    by_sums = {"LAMB": {}, "Prodigy": {}, "Muon": {}}
    return {
        name: compared(name, kwargs, rank, sharded)
        for name, kwargs in {**by_parts, **by_sums}.items()
    }


def refused(rank: int, group: Any) -> Any:
    found = {}
    alone = network()
    whole = torch.optim.AdamW(alone.parameters())
    train(alone, whole, WHOLE, range(1))
    for name in ("Adafactor", "Shampoo", "AdamW"):
        model = sharded(network())
        opt = getattr(torch_optim, name)(model.parameters())
        if name == "AdamW":
            opt.load_state_dict(whole.state_dict())
        gradients(model, 0, part(rank))
        found[name] = ranks.raised(opt.step)
    return found


def checkpoints(rank: int, group: Any) -> Any:
    """How far runs that went on from a checkpoint of two ranks are from straight ones."""
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
    from torch.distributed.checkpoint.state_dict_loader import load
    from torch.distributed.checkpoint.state_dict_saver import save

    def start(library: Any, name: str) -> tuple[nn.Module, Any]:
        model, cls = sharded(network()), getattr(library, name)
        return model, cls(model.parameters(), lr=0.1, **ELEMENTWISE[name])

    def state(model: nn.Module, opt: Any) -> dict[str, Any]:
        return dict(zip(("model", "opt"), get_state_dict(model, opt)))

    found = {}
    pairs: Any = {"AdamW": ((0, 0), (0, 1), (1, 0)), "SGD": ((1, 0),)}
    for name in pairs:
        for saver, loader in pairs[name]:
            key = f"{name} {saver} {loader}"
            model, opt = start(LIBRARIES[saver], name)
            train(model, opt, part(rank), range(2))
            save(state(model, opt), checkpoint_id=key)
            train(model, opt, part(rank), range(2, 4))
            other, second = start(LIBRARIES[loader], name)
            saved = state(other, second)
            load(saved, checkpoint_id=key)
            set_state_dict(
                other,
                second,
                model_state_dict=saved["model"],
                optim_state_dict=saved["opt"],
            )
            train(other, second, part(rank), range(2, 4))
            found[key] = distance(weights(other), weights(model))
    return found


def zero(rank: int, group: Any) -> Any:
    """ZeroRedundancyOptimizer; and how far its state is from that of one process."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    made = []

    def make(cls: Any, params: Any, **kwargs: Any) -> Any:
        made.append(ZeroRedundancyOptimizer(params, optimizer_class=cls, **kwargs))
        return made[-1]

    found = {
        name: compared(name, kwargs, rank, DistributedDataParallel, make)
        for name, kwargs in {**ELEMENTWISE, "Shampoo": {}}.items()
    }
    ours, theirs, *_ = made
    for opt in (ours, theirs):
        opt.consolidate_state_dict(to=0)
    if not rank:
        states = [opt.state_dict()["state"] for opt in (ours, theirs)]
        far = [
            distance([*a.values()], [*b.values()])
            for a, b in zip(*map(dict.values, states))
        ]
        found["AdamW"]["state"] = max(far)
    return found


if __name__ == "__main__":
    torch.set_default_dtype(torch.float64)  # in which torch keeps the scalars of a state
    ranks.main(globals())
