"""Two optimizers side by side: a generator of digits, and a discriminator."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from digits.data import Digits
from funcopt import torch_optim as optim

NOISE, WIDTH, BATCH = 16, 128, 64
LOOK_BACK = 0.998  # of the average of the generator's weights


class Labelled(nn.Module):
    """A network of two hidden layers that is told the digit, too."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(inputs + 10, WIDTH),
            nn.LeakyReLU(0.2),
            nn.Linear(WIDTH, WIDTH),
            nn.LeakyReLU(0.2),
            nn.Linear(WIDTH, outputs),
        )

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return self.layers(torch.cat([x, F.one_hot(labels, 10).to(x)], 1))


class Adversaries(NamedTuple):
    generator: nn.Module  #: the average of its weights over the last steps
    losses: list[tuple[float, float]]  #: of generator and discriminator


def train(data: Digits, *, steps: int, seed: int) -> Adversaries:
    """Each has its own optimizer and its own rate, and steps once in a round."""
    torch.manual_seed(seed)
    generator, discriminator = Labelled(NOISE, 64), Labelled(64, 1)
    makes = optim.Adam(generator.parameters(), lr=1e-3, betas=(0.5, 0.99))
    judges = optim.Adam(discriminator.parameters(), lr=1e-3, betas=(0.5, 0.99))
    average = torch.optim.swa_utils.AveragedModel(
        generator, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(LOOK_BACK)
    )
    losses = []
    for _ in tqdm(range(steps), desc="generator and discriminator", leave=False):
        rows = torch.randint(len(data.y), (BATCH,))
        real, labels = data.x[rows].flatten(1), data.y[rows]
        made = torch.sigmoid(generator(torch.randn(BATCH, NOISE), labels))

        judges.zero_grad()
        doubt = F.softplus(-discriminator(real, labels)).mean()
        belief = F.softplus(discriminator(made.detach(), labels)).mean()
        (doubt + belief).backward()
        judges.step()

        makes.zero_grad()
        found_out = F.softplus(-discriminator(made, labels)).mean()
        found_out.backward()  # it reaches the discriminator too, which zeroes it first
        makes.step()
        average.update_parameters(generator)
        losses.append((found_out.item(), (doubt + belief).item()))
    return Adversaries(average.module, losses)


def draw(generator: nn.Module, labels: Tensor, seed: int) -> Tensor:
    """A digit for each label, [n, 1, 8, 8]."""
    noise = torch.randn(len(labels), NOISE, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return torch.sigmoid(generator(noise, labels)).view(-1, 1, 8, 8)


def recognised(classifier: nn.Module, generator: nn.Module, count: int = 1000) -> float:
    """Part of the drawn digits that a classifier of real ones takes for the right one."""
    labels = torch.arange(count) % 10
    classifier.eval()
    with torch.no_grad():
        found = classifier(draw(generator, labels, seed=0)).argmax(1)
    return (found == labels).float().mean().item()
