"""What each process does in test_torch_optim_distributed.py.

Loops that torch.distributed surrounds, each with our class and with torch.optim's, on a
rank's part of every batch; and the same by one process, on all of it.
"""

from collections.abc import Callable, Iterable, Sequence
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
        opt = make(getattr(library, name), model.parameters(), lr=0.1, **kwargs)
        train(model, opt, part(rank), range(steps))
        found.append(weights(model))
    alone = network()
    start = weights(alone)
    train(
        alone,
        getattr(torch_optim, name)(alone.parameters(), lr=0.1, **kwargs),
        WHOLE,
        range(steps),
    )
    return {
        "theirs": distance(found[0], found[-1]),
        "alone": distance(found[0], weights(alone)),
        "moved": distance(found[0], start),
    }


# The cases -----------------------------------------------------------------------------


def ddp(rank: int, group: Any) -> Any:
    return {
        f"{name}, views {views}": compared(
            name,
            kwargs,
            rank,
            lambda model, views=views: DistributedDataParallel(
                model, gradient_as_bucket_view=views
            ),
        )
        for name, kwargs in {**ELEMENTWISE, "Adafactor": {}}.items()
        for views in (False, True)
    }


if __name__ == "__main__":
    ranks.main(globals())
