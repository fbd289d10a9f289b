"""Episodes: meta-batches of N-way K-shot tasks, drawn from classes of images."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Batch(NamedTuple):
    """Images float32 ``[tasks, n, 1, side, side]``, labels int64 ``[tasks, n]``."""

    x: Tensor
    y: Tensor


class Tasks(NamedTuple):
    """A meta-batch: a tree whose leaves all have a leading task axis."""

    support: Batch
    query: Batch


class Distortion(NamedTuple):
    """The widest random affine change of an image; each value is drawn from ±."""

    degrees: float = 8.0
    shear: float = 0.1
    scale: float = 0.1
    shift: float = 1.5  # pixels

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Changes every image of ``[n, side, side]`` in its own way; paper stays 0."""
        n, side = len(images), images.shape[-1]
        draw = torch.rand(6, n, generator=generator, device=generator.device)
        turn, shear, wide, high, right, down = (2 * draw - 1).to(images.device)
        turn, shear = turn * math.radians(self.degrees), shear * self.shear
        wide, high = 1 + wide * self.scale, 1 + high * self.scale
        cos, sin = turn.cos(), turn.sin()
        shift = 2 * self.shift / side  # affine_grid's image is 2 wide
        # Rows of rotation · shear · scale: where an output pixel is read from.
        rows = (
            torch.stack([cos * wide, (shear * cos - sin) * high, right * shift], -1),
            torch.stack([sin * wide, (shear * sin + cos) * high, down * shift], -1),
        )
        grid = F.affine_grid(torch.stack(rows, 1), [n, 1, side, side], False)
        return F.grid_sample(images[:, None], grid, align_corners=False)[:, 0]


@dataclass(frozen=True, eq=False)
class Episodes:
    """A source of random tasks: N classes, K support and Q query images of each.

    Which class bears which label is drawn anew for every task. No image is in both
    support and query. Where a class has fewer than K + Q images, its non-support images
    serve as queries several times, each time distorted anew.

    All randomness comes from ``generator``: ``generator.get_state()`` before a sample
    and ``generator.set_state(...)`` after a restart give that sample bit for bit.

    Args:
        images: float32 ``[classes, examples, side, side]``, as in a :class:`Split`.
        ways: N, the classes of a task.
        shots: K, the support images of a class.
        queries: Q, the query images of a class.
        distort: applied to all images, support and query; None leaves them as they are.
        generator: may live on the CPU while the images are on a GPU.

    Example:
        >>> images = torch.rand(30, 20, 28, 28)
        >>> generator = torch.Generator().manual_seed(0)
        >>> episodes = Episodes(images, ways=5, shots=1, generator=generator)
        >>> support, query = episodes.sample(16)
        >>> tuple(support.x.shape), tuple(query.y.shape)
        ((16, 5, 1, 28, 28), (16, 75))
    """

    images: Tensor
    ways: int
    shots: int
    queries: int = 15
    distort: Distortion | None = None
    generator: torch.Generator = field(kw_only=True)

    def __post_init__(self) -> None:
        if self.images.dim() != 4:
            shape = list(self.images.shape)
            raise ValueError(
                f"images must be [classes, examples, side, side], got {shape}"
            )
        classes, examples = self.images.shape[:2]
        if min(self.ways, self.shots, self.queries) < 1:
            asked = f"{self.ways} ways, {self.shots} shots, {self.queries} queries"
            raise ValueError(f"a task needs at least one of each, got {asked}")
        if self.ways > classes:
            raise ValueError(f"{self.ways} ways, but there are {classes} classes")
        if self.shots >= examples:
            raise ValueError(
                f"{self.shots} shots leave no query images: a class has {examples}"
            )
        if self.shots + self.queries > examples and self.distort is None:
            raise ValueError(
                f"{self.shots} shots and {self.queries} queries, but a class has only "
                f"{examples} images: ask for at most {examples - self.shots} queries, "
                "or pass distort=Distortion() so that repeated ones differ"
            )

    def sample(self, tasks: int) -> Tasks:
        """Draws ``tasks`` independent tasks; images of a class stand side by side."""
        classes, examples = self.images.shape[:2]
        device, k, q = self.images.device, self.shots, self.queries
        # The indices of the largest uniforms are a random subset in random order:
        # position in the task = label, so labels are random too.
        chosen = self._uniform(tasks, classes).topk(self.ways).indices
        order = self._uniform(tasks, self.ways, examples).argsort(-1)
        rest = k + torch.arange(q, device=order.device) % (examples - k)
        order = torch.cat([order[..., :k], order[..., rest]], -1)
        x = self.images[chosen[..., None].to(device), order.to(device)]
        if self.distort is not None:
            x = self.distort(x.flatten(0, 2), self.generator).view(x.shape)
        labels = torch.arange(self.ways, device=device)
        support, query = (
            Batch(
                part.flatten(1, 2).unsqueeze(2),
                labels.repeat_interleave(part.shape[2]).repeat(tasks, 1),
            )
            for part in (x[:, :, :k], x[:, :, k:])
        )
        return Tasks(support, query)

    def _uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, device=self.generator.device)
