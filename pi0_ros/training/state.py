"""The state of a run on disk: whole or not there, and enough to go on to the very same numbers."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

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
    for old in saved_states(folder)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)


def newest_state(folder: Path) -> dict[str, Any] | None:
    """The newest whole state, or None. Nothing in it is run: `weights_only` loading.

    Raises:
        StateError: the file is damaged.
    """
    saved = saved_states(folder)
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


@contextlib.contextmanager
def alone(output: Path) -> Iterator[None]:
    """Hold a run's folder for the time of the block; a killed holder lets go of it. One that was made for it, and into
    which nothing was written, is removed again.

    Raises:
        StateError: another trainer holds it.
    """
    made, lock = not output.exists(), output / ".lock"
    with _locked(output, lock):
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)
            if made:
                with contextlib.suppress(OSError):  # not empty
                    output.rmdir()


def _locked(output: Path, lock: Path) -> IO[str]:
    """The lock's file, open and held. A holder that goes removes it, so the one that was opened may be no more."""
    while True:
        output.mkdir(parents=True, exist_ok=True)
        try:
            stream = lock.open("w")
        except FileNotFoundError:  # the folder is no more
            continue
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if lock.exists() and lock.stat().st_ino == os.fstat(stream.fileno()).st_ino:
                return stream
        except BlockingIOError:
            stream.close()
            raise StateError(
                f"{output}: another trainer is at work in this folder; wait for its end, or use another --output"
            ) from None
        except OSError:
            return stream  # a file system without locks
        stream.close()


def remove_leftovers(output: Path) -> None:
    """Delete what a killed run left half-written in its folder. Only for the process that writes."""
    left = [*(output / "state").glob(".step_*"), *output.glob(".checkpoint.*.part")]
    if (output / "checkpoint").is_dir():
        left += output.glob(".checkpoint.*.old")
    for partial in left:
        shutil.rmtree(partial, ignore_errors=True)


def saved_states(folder: Path) -> list[Path]:
    """The whole states, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if re.fullmatch(r"step_\d{8}", path.name) and path.is_dir())
