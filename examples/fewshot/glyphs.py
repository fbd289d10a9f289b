"""Printed letters: a data set that every machine with matplotlib already has.

matplotlib ships twelve DejaVu faces (sans, serif and mono; upright and slanted; book
and bold) which share about 1,400 letters of five scripts. A letter is a class, its
twelve faces are its examples. Training and test letters are of different scripts, so
that test accuracy is over alphabets never seen.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fewshot.split import SIDE, Split, from_pixels

TRAIN_SCRIPTS = ("LATIN", "GREEK")
TEST_SCRIPTS = ("CYRILLIC", "ARMENIAN", "GEORGIAN")

# Two letters closer than this are one class: below it lie homoglyphs (Greek and Latin
# A: 0.00) and accents that melt together at 28 pixels (ö and ő: 0.05); above it, pairs
# that a reader tells apart (Latin O and Greek Ω: 0.12).
NEAR = 0.1

_ZOOM = 4  # letters are drawn this much larger and averaged down: antialiasing
_POINT = 20 * _ZOOM  # the font size, at which a median letter is 12 by 16 pixels
_ROOM = 24 * _ZOOM  # the widest letters (Ж, Щ) shrink to this, leaving a margin


def faces() -> list[Path]:
    """The font files, in a fixed order. The two Display faces hold no letters."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return sorted(f for f in folder.glob("DejaVu*.ttf") if "Display" not in f.name)


def script(letter: str) -> str:
    """``LATIN`` for a letter that Unicode names LATIN SMALL LETTER A, and so on."""
    return unicodedata.name(letter, "").partition(" ")[0]


def letters(scripts: Sequence[str]) -> list[str]:
    """The letters of ``scripts`` that all faces can draw, in code-point order."""
    drawable = (set(FT2Font(str(face)).get_charmap()) for face in faces())
    shared = map(chr, sorted(set.intersection(*drawable)))
    return [
        letter
        for letter in shared
        if unicodedata.category(letter).startswith("L") and script(letter) in scripts
    ]


def render(characters: Sequence[str], face: Path) -> Tensor:
    """Characters in one face, centred: float32 ``[n, 28, 28]``, ink 1, paper 0."""
    # BASIC: the picture must not depend on whether Pillow was built with Raqm.
    font = ImageFont.truetype(str(face), _POINT, layout_engine=ImageFont.Layout.BASIC)
    drawings = bytearray()
    page = SIDE * _ZOOM
    for character in characters:
        fitted, (left, top, right, bottom) = font, font.getbbox(character)
        if (excess := max(right - left, bottom - top) / _ROOM) > 1:
            fitted = font.font_variant(size=int(_POINT / excess))
            left, top, right, bottom = fitted.getbbox(character)
        image = Image.new("L", (page, page))
        corner = ((page - left - right) // 2, (page - top - bottom) // 2)
        ImageDraw.Draw(image).text(corner, character, fill=255, font=fitted)
        drawings += image.tobytes()
    large = from_pixels(drawings, len(characters), page, page)
    return F.avg_pool2d(large, _ZOOM)


def distances(images: Tensor, others: Tensor) -> Tensor:
    """How unlike classes look, over all faces: 0 is the same ink, 1 no common ink.

    The squared distance ‖a − b‖² / (‖a‖² + ‖b‖²), relative to the ink so that small
    letters do not seem alike. ``[n, ...]`` and ``[m, ...]`` give ``[n, m]``.
    """
    a, b = images.flatten(1), others.flatten(1)
    ink = a.square().sum(1)[:, None] + b.square().sum(1)
    return 1 - 2 * (a @ b.T) / ink


def distinct(images: Tensor, seen: Tensor | None = None) -> list[int]:
    """Indices of classes that look like none of ``seen`` and no earlier one kept."""
    near = distances(images, images) < NEAR
    kept: list[int] = []
    fresh = torch.ones(len(images), dtype=torch.bool)
    if seen is not None:
        fresh = ~(distances(images, seen) < NEAR).any(1)
    for index in fresh.nonzero().flatten().tolist():
        if not near[index, kept].any():
            kept.append(index)
    return kept


def load() -> tuple[Split, Split]:
    """The training and the test split; about two seconds, nothing is downloaded.

    A test letter is left out when it looks like *any* letter of the training scripts,
    also one that training itself left out as a near-duplicate.
    """
    names = letters(TRAIN_SCRIPTS), letters(TEST_SCRIPTS)
    train, test = (
        torch.stack([render(part, face) for face in faces()], dim=1) for part in names
    )
    kept = distinct(train), distinct(test, seen=train)
    train, test = (
        Split(
            images[keep],
            [part[i] for i in keep],
            [script(part[i]).capitalize() for i in keep],
        )
        for images, part, keep in zip((train, test), names, kept, strict=True)
    )
    return train, test
