"""The tasks: sine waves, each known from a few of its points.

The family of Meta-SGD (Li et al., 2017): y = A sin(ωx + φ) on [-5, 5], with amplitude,
frequency and phase drawn for each task. (Finn et al., 2017, keep ω at 1.)
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

AMPLITUDE = 0.1, 5.0
FREQUENCY = 0.8, 1.2
PHASE = 0.0, math.pi
DOMAIN = -5.0, 5.0


class Points(NamedTuple):
    """Points of one wave, or of many: x and y are [..., points, 1]."""

    x: Tensor
    y: Tensor


class Wave(NamedTuple):
    """One task, or many with a leading axis: points to learn from, points to predict."""

    support: Points
    query: Points


def sample(tasks: int, shots: int, queries: int, generator: torch.Generator) -> Wave:
    """Draws ``tasks`` waves; all points are uniform on the domain, without noise."""

    def uniform(low: float, high: float, points: int = 1) -> Tensor:
        return low + (high - low) * torch.rand(tasks, points, 1, generator=generator)

    amplitude, frequency = uniform(*AMPLITUDE), uniform(*FREQUENCY)
    phase = uniform(*PHASE)
    x = uniform(*DOMAIN, points=shots + queries)
    y = amplitude * torch.sin(frequency * x + phase)
    return Wave(Points(x[:, :shots], y[:, :shots]), Points(x[:, shots:], y[:, shots:]))
