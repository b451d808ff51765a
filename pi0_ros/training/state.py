"""The state of a run on disk: whole or not there, and enough to go on to the very same numbers."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from pi0_ros.policy.bundle import whole_folder
from pi0_ros.wording import first_line

KEPT = 2  # states on disk


class StateError(RuntimeError):
    """A saved state that cannot be used; the message names it and the way out."""


def save_state(folder: Path, step: int, content: dict[str, Any]) -> None:
    """Write the state after `step` steps, then remove all but the newest `KEPT`.

    Raises:
        StateError, OSError: the disk is full or not writable; the states before stay.
    """
    with whole_folder(folder / f"step_{step:08d}") as partial, (partial / "state.pt").open("wb") as stream:
        try:
            torch.save(content, stream)
        except RuntimeError as error:  # torch's own for a write that fails
            raise StateError(f"{folder}: the state cannot be written ({first_line(error)}); make room") from None
        stream.flush()
        os.fsync(stream.fileno())  # a name must not outlive a power cut that its content does not
    for old in _saved(folder)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)


def newest_state(folder: Path) -> dict[str, Any] | None:
    """The newest whole state, or None. Nothing in it is run: `weights_only` loading.

    Raises:
        StateError: the file is damaged.
    """
    saved = _saved(folder)
    if not saved:
        return None
    path = saved[-1] / "state.pt"
    try:
        # Mapped, so that several processes of a machine share its pages.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # noqa: BLE001 - torch raises many kinds for a damaged file
        raise StateError(
            f"{path}: cannot be read ({first_line(error)}); remove {saved[-1]} to go on from the state before"
        ) from None


def remove_leftovers(folder: Path) -> None:
    """Delete what a killed run left half-written. Only for the process that writes."""
    for partial in folder.glob(".step_*") if folder.is_dir() else ():
        shutil.rmtree(partial, ignore_errors=True)


def _saved(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if re.fullmatch(r"step_\d{8}", path.name) and path.is_dir())
