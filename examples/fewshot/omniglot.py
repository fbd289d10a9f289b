"""Omniglot (Lake et al., 2015): 1,623 handwritten characters, each drawn by 20 people.

Reads the two official archives, or the folders extracted from them. The background
alphabets are for meta-training, the evaluation alphabets for meta-testing.
"""

from __future__ import annotations

import io
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from PIL import Image, ImageOps
from tqdm import tqdm

from fewshot.split import SIDE, Split, from_pixels, rotated

SOURCE = "https://github.com/brendenlake/omniglot/tree/master/python"
DRAWERS = 20


def load(data: str | Path, *, rotations: bool = True) -> tuple[Split, Split]:
    """The training and the test split, from a folder with the official archives.

    Args:
        data: folder with ``images_background`` and ``images_evaluation``, each as the
            official ``.zip`` or as the folder extracted from it.
        rotations: quarter turns are classes of their own, as in published results:
            3,856 training and 2,636 test classes instead of 964 and 659.

    Raises:
        FileNotFoundError: one of the two parts is missing.
        ValueError: a part is damaged, or is not the official one.
    """
    train = read(find(Path(data), "images_background"), characters=964)
    test = read(find(Path(data), "images_evaluation"), characters=659)
    return (rotated(train), rotated(test)) if rotations else (train, test)


def find(data: Path, part: str) -> Path:
    """The archive of ``part``, or else the folder that was extracted from it."""
    for path in (data / f"{part}.zip", data / part):
        if path.exists():
            return path
    raise FileNotFoundError(
        f"Omniglot is incomplete: neither {part}.zip nor a folder {part} in "
        f"{data.absolute()}. Download {part}.zip from {SOURCE} into it."
    )


def read(path: Path, characters: int) -> Split:
    """One part of Omniglot, 105 × 105 drawings averaged down to 28 × 28.

    Args:
        path: a ``.zip``, or a folder, of ``alphabet/character/drawing.png``.
        characters: how many characters the part must have; a folder that was
            extracted by half would otherwise pass for an easier data set.
    """
    pictures = _zip_members(path) if path.is_file() else _folder_members(path)
    drawings: dict[tuple[str, str], list[bytes]] = {}
    for name in tqdm(
        sorted(pictures), desc=path.name, unit=" drawings", leave=False, disable=None
    ):
        alphabet, character = PurePosixPath(name).parts[-3:-1]
        pixels = _pixels(pictures[name], path, name)
        drawings.setdefault((alphabet, character), []).append(pixels)
    if len(drawings) != characters:
        raise _unusable(path, f"{len(drawings)} characters, not {characters}")
    for (alphabet, character), of_one in drawings.items():
        if len(of_one) != DRAWERS:
            where = f"{alphabet}/{character}"
            raise _unusable(path, f"{len(of_one)} drawings of {where}, not {DRAWERS}")
    return Split(
        from_pixels(b"".join(sum(drawings.values(), [])), -1, DRAWERS, SIDE, SIDE),
        [f"{alphabet}/{character}" for alphabet, character in drawings],
        [alphabet for alphabet, _ in drawings],
    )


def _zip_members(path: Path) -> dict[str, bytes]:
    try:
        with zipfile.ZipFile(path) as archive:
            names = filter(_is_drawing, archive.namelist())
            return {name: archive.read(name) for name in names}
    # zlib.error, EOFError: a damaged member; RuntimeError: an encrypted one, or one
    # packed by a method unknown here (NotImplementedError).
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        raise _unusable(path, str(error) or type(error).__name__) from error


def _folder_members(path: Path) -> dict[str, bytes]:
    found = ((f.relative_to(path.parent).as_posix(), f) for f in path.rglob("*.png"))
    return {name: file.read_bytes() for name, file in found if _is_drawing(name)}


def _is_drawing(name: str) -> bool:
    """``.../alphabet/character/drawing.png``, not what macOS adds to archives."""
    parts = PurePosixPath(name).parts
    hidden = parts[0] == "__MACOSX" or parts[-1].startswith(".")
    return len(parts) >= 3 and parts[-1].endswith(".png") and not hidden


def _pixels(png: bytes, path: Path, name: str) -> bytes:
    try:
        with Image.open(io.BytesIO(png)) as image:
            if image.size != (105, 105):
                raise _unusable(path, f"{name} is {image.size}, not (105, 105)")
            ink = ImageOps.invert(image.convert("L"))  # the files are black on white
    except (OSError, SyntaxError) as error:  # Pillow's words for a damaged PNG
        raise _unusable(path, f"{name}: {error}") from error
    return ink.resize((SIDE, SIDE), Image.Resampling.BOX).tobytes()


def _unusable(path: Path, why: str) -> ValueError:
    return ValueError(
        f"{path} is not the official Omniglot archive, or is damaged: {why}. "
        f"Download it again from {SOURCE}."
    )
