"""The classic loop: micro-batches, clipping, a step, a scheduler; checkpoints."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from digits.data import Digits, seeded
from digits.network import Network, accuracy, cross_entropy, groups

BATCH, MICRO = 32, 8  # images of a step, and of a micro-batch
MAX_NORM = 2.0


@dataclass
class Curves:
    """What was seen, step by step."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)  #: of gradients, before clipping
    rates: list[list[float]] = field(default_factory=list)  #: of each group
    tested: list[int] = field(default_factory=list)  #: the steps after which
    accuracies: list[float] = field(default_factory=list)


class Training:
    """All that a run consists of. Any class of an optimizer will do: it is a loop's."""

    def __init__(
        self,
        optim: Callable[..., torch.optim.Optimizer],
        *,
        steps: int,
        seed: int,
        classes: int = 10,
        lr: float = 4e-3,
        backbone: float = 1.0,
        start_from: Network | None = None,
    ) -> None:
        torch.manual_seed(seed)
        self.net = Network(classes)
        if start_from is not None:
            self.net.load_state_dict(start_from.state_dict())
        self.optimizer = optim(groups(self.net, lr, backbone))
        self.scheduler = LambdaLR(self.optimizer, warmup_and_cosine(steps))
        self.generator = seeded(seed)  # draws the batches
        self.steps, self.curves = steps, Curves()

    @property
    def step(self) -> int:
        return len(self.curves.losses)

    def run(
        self,
        data: Digits,
        test: Digits,
        *,
        until: int | None = None,
        every: int = 5,
        title: str = "training",
        save_to: Path | None = None,
        save_at: int = 0,
    ) -> Training:
        """Go on until that step, or to the end; test after every few steps."""
        until = self.steps if until is None else until
        bar = tqdm(range(self.step, until), desc=title, leave=False)
        for _ in bar:
            self.one_step(data)
            if self.step % every == 0 or self.step == self.steps:
                self.curves.tested.append(self.step)
                self.curves.accuracies.append(accuracy(self.net, test))
                bar.set_postfix(loss=f"{self.curves.losses[-1]:.3f}")
            if save_to is not None and self.step == save_at:
                self.save(save_to)
        return self

    def one_step(self, data: Digits) -> None:
        batch = torch.randperm(len(data.y), generator=self.generator)[:BATCH]
        self.curves.rates.append([group["lr"] for group in self.optimizer.param_groups])
        self.optimizer.zero_grad()
        total = 0.0
        for rows in batch.split(MICRO):
            share = len(rows) / len(batch)
            loss = share * cross_entropy(self.net, data.rows(rows))
            loss.backward()  # adds to what the micro-batches before it left
            total += loss.item()
        norm = clip_grad_norm_(self.net.parameters(), MAX_NORM)
        self.optimizer.step()
        self.scheduler.step()
        self.curves.losses.append(total)
        self.curves.norms.append(norm.item())

    def save(self, path: Path) -> None:
        """All that the next step depends on; the file is written whole or not at all."""
        everything = {
            "net": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "batches": self.generator.get_state(),
            "dropout": torch.get_rng_state(),
            "curves": vars(self.curves),
        }
        draft = path.with_name(path.name + ".tmp")
        torch.save(everything, draft)
        os.replace(draft, path)

    def load(self, path: Path) -> Training:
        """Become the run that was saved."""
        saved: dict[str, Any] = torch.load(path, weights_only=True)
        self.net.load_state_dict(saved["net"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scheduler.load_state_dict(saved["scheduler"])
        self.generator.set_state(saved["batches"])
        torch.set_rng_state(saved["dropout"])
        self.curves = Curves(**saved["curves"])
        return self


def warmup_and_cosine(steps: int) -> Callable[[int], float]:
    """The share of its own rate that each group has at a step."""
    warm = max(steps // 10, 1)

    def share(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(steps - warm, 1)))

    return share


def differing(a: Training, b: Training) -> int:
    """How many numbers of parameters and optimizer state are not the same bits."""
    count = 0
    for p, q in zip(a.net.parameters(), b.net.parameters()):
        pairs = [(p, q)]
        one, other = a.optimizer.state[p], b.optimizer.state[q]
        assert one.keys() == other.keys()
        pairs += [(one[key], other[key]) for key in one]
        count += sum(int((x != y).sum()) for x, y in pairs)
    return count


def distance(a: nn.Module, b: nn.Module) -> float:
    """The largest difference of two networks' parameters."""
    pairs = zip(a.parameters(), b.parameters())
    return max((p - q).abs().max().item() for p, q in pairs)
