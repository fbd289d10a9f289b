"""What a data set hands over: classes, each with the same number of images."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

SIDE = 28  # pixels; Omniglot's usual size in few-shot work


class Split(NamedTuple):
    """Classes for meta-training or for meta-testing, never for both.

    Attributes:
        images: float32 ``[classes, examples, 28, 28]`` in [0, 1]; ink is 1, paper 0.
        names: one name per class.
        alphabets: the alphabet or script each class comes from.
    """

    images: Tensor
    names: list[str]
    alphabets: list[str]


def rotated(split: Split) -> Split:
    """Each class at 0, 90, 180 and 270 degrees, every angle a class of its own.

    Santoro et al. (2016) began this for Omniglot, and published accuracies assume it.
    A letter that looks the same after a quarter turn (an O) becomes four equal classes.
    """
    turns = range(4)
    return Split(
        torch.cat([split.images.rot90(turn, (2, 3)) for turn in turns]),
        [f"{name}, {90 * turn}°" for turn in turns for name in split.names],
        split.alphabets * 4,
    )


def from_pixels(pixels: bytes | bytearray, *shape: int) -> Tensor:
    """8-bit grey values, 255 = ink, as float32 in [0, 1] of the given shape."""
    # bytearray: torch warns of undefined behaviour over read-only memory.
    return torch.frombuffer(bytearray(pixels), dtype=torch.uint8).view(shape) / 255
