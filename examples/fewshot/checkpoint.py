"""Checkpoints: a run's settings and progress, as plain data in one file."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch

from fewshot.training import Progress

FORMAT = "funcopt few-shot run, 1"


def prepare(path: Path) -> None:
    """Makes the folder for ``path``; raises OSError if nothing could be saved there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise IsADirectoryError(f"the checkpoint {path} is a folder")
    draft(path).touch()
    draft(path).unlink()


def draft(path: Path) -> Path:
    return path.with_name(path.name + ".tmp")


def save(path: Path, settings: dict[str, Any], progress: Progress) -> None:
    """Writes ``path`` whole or not at all: a crash leaves the older file as it was."""
    run = {"format": FORMAT, "settings": settings, "progress": progress._asdict()}
    torch.save(run, draft(path))
    os.replace(draft(path), path)


def load(path: Path) -> tuple[dict[str, Any], Progress]:
    """The settings and the progress, on the CPU; runs no code that the file holds.

    Raises:
        OSError: there is no such file, or it cannot be read.
        ValueError: it is not a checkpoint that `save` wrote, or is damaged.
    """
    with path.open("rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch guesses about a foreign file
        try:
            run = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # torch names no error for a file it cannot read
            raise ValueError(f"{path} is no checkpoint, or is damaged") from error
    try:
        settings, progress = run["settings"], Progress(**run["progress"])
        known = run["format"] == FORMAT
    except (KeyError, TypeError, IndexError):
        known = False
    if not known:
        raise ValueError(f"{path} is no checkpoint of this program and version")
    return settings, progress
