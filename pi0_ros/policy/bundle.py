"""The checkpoint folder: weights and all that gives their numbers a meaning, in one place.

    model.safetensors   weights, openpi's PyTorch names
    config.json         {"format": "pi0_ros/1", "model": {...}, "noise_source": {...}, ...}: `BundleSettings`
    robot.yaml          the robot file that it was trained with
    norm_stats.json     normalisation statistics, in openpi's form
    tokenizer/          the tokenizer's files (optional)
    manifest.json       sha256 and size of each of these; its own digest names the checkpoint

A folder made from published weights may lack robot.yaml and norm_stats.json: it can be trained from, not run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pi0_ros.model import flow
from pi0_ros.model.checkpoint import Checkpoint, from_state_dict, open_checkpoint
from pi0_ros.model.config import ConfigError, Pi0Config
from pi0_ros.model.files import (
    CheckpointError,
    inside,
    read_bytes,
    read_json,
    sha256,
    write_bytes,
    write_json,
    write_safetensors,
)
from pi0_ros.model.infer import FORMAT
from pi0_ros.model.pi0 import Pi0
from pi0_ros.policy import aloha
from pi0_ros.policy.prompt import PROMPT_FORMATS
from pi0_ros.policy.statistics import FILE_NAME, NormStats
from pi0_ros.robot import Robot
from pi0_ros.robot_file import RobotFileError, parse_robot

WEIGHTS, CONFIG, ROBOT, STATISTICS, TOKENIZER, MANIFEST = (
    "model.safetensors",
    "config.json",
    "robot.yaml",
    FILE_NAME,
    "tokenizer",
    "manifest.json",
)
NORMALISATIONS = ("zscore", "quantile")
ADAPTERS = ("none", "aloha")


@dataclass(frozen=True)
class BundleSettings:
    """What config.json holds besides its format: how the weights are to be used."""

    model: Pi0Config
    noise_source: Mapping[str, Any] = field(default_factory=lambda: flow.White().to_dict())
    rtc_max_delay: int = 0  # actions of prefix that training conditioned on; 0: none
    prompt_format: str = ""  # one of PROMPT_FORMATS; "": by the model
    normalisation: str = ""  # "zscore" or "quantile"; "": zscore for pi0, quantile for pi0.5, as openpi does
    adapter: str = "none"  # "aloha": joint flips and gripper curves of the published ALOHA policies
    loss_dims: int | None = None  # action dimensions that were trained; None: all
    trained_steps: int = 0

    def __post_init__(self) -> None:
        if not self.prompt_format:
            object.__setattr__(self, "prompt_format", "pi05" if self.model.pi05 else "pi0")
        if not self.normalisation:
            object.__setattr__(self, "normalisation", "quantile" if self.model.pi05 else "zscore")
        choices = {"prompt_format": PROMPT_FORMATS, "normalisation": NORMALISATIONS, "adapter": ADAPTERS}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise CheckpointError(f"{name} must be one of {', '.join(allowed)}, found {getattr(self, name)!r:.80}")
        if not self.model.pi05 and self.prompt_format != "pi0":  # pi0.5 without state (pi05_libero) does use pi0's
            raise CheckpointError(f"prompt_format {self.prompt_format!r} is not for pi0, whose suffix holds the state")
        limits = {"rtc_max_delay": (0, self.model.action_horizon - 1), "trained_steps": (0, 2**62)}
        if self.loss_dims is not None:
            limits["loss_dims"] = (1, self.model.action_dim)
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise CheckpointError(f"{name} must be a whole number from {low} to {high}, found {value!r:.80}")
        if not isinstance(self.noise_source, Mapping):
            raise CheckpointError(f"noise_source must be a mapping, found {self.noise_source!r:.80}")
        try:
            flow.noise_source_from_dict(dict(self.noise_source))
        except (ValueError, TypeError, KeyError) as error:
            raise CheckpointError(f"noise_source: {error}") from None

    def with_model(self, model: Pi0Config) -> BundleSettings:
        """The same for other sizes; a shorter horizon may leave less room for a delay."""
        return dataclasses.replace(self, model=model, rtc_max_delay=min(self.rtc_max_delay, model.action_horizon - 1))

    def to_dict(self) -> dict[str, Any]:
        """config.json."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {"format": FORMAT, **own, "model": self.model.to_dict(), "noise_source": dict(self.noise_source)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> BundleSettings:
        """The inverse of `to_dict`. CheckpointError for another format, missing or unknown fields, wrong values."""
        if data.get("format") != FORMAT:
            found = f"{data['format']!r:.80}" if "format" in data else "none"
            raise CheckpointError(
                f"format is {found}, this version reads {FORMAT!r}; other layouts are turned into it by pi0_ros convert"
            )
        known = [f.name for f in dataclasses.fields(cls)]
        if unknown := sorted(set(data) - {*known, "format"}):
            raise CheckpointError(f"unknown field {', '.join(unknown)}, allowed: {', '.join(known)}")
        if missing := [name for name in known if name not in data]:
            raise CheckpointError(f"missing field {', '.join(missing)}")
        try:
            model = Pi0Config.from_dict(data["model"])
        except (ConfigError, AttributeError, TypeError) as error:
            raise CheckpointError(f"model: {error}") from None
        return cls(**{**{name: data[name] for name in known}, "model": model})


@dataclass(frozen=True)
class Bundle:
    """A checkpoint folder whose small files were read and verified. Weights are read when asked for."""

    folder: Path
    settings: BundleSettings
    robot: Robot | None
    stats: NormStats | None
    digest: str  # 12 hex digits
    tokenizer: Path | None  # the folder

    def weights(self) -> Checkpoint:
        """The weights, checked against the config by name and shape. CheckpointError if they do not fit."""
        return open_checkpoint(self.folder / WEIGHTS, config=self.settings.model)

    def model(
        self, dtype: torch.dtype | None = None, device: torch.device | str = "cpu", progress: bool = False
    ) -> Pi0:
        """The model with its weights; see `Checkpoint.model`."""
        return self.weights().model(dtype, device, progress)


def save_bundle(
    folder: str | Path,
    weights: nn.Module | Mapping[str, torch.Tensor] | Checkpoint,
    settings: BundleSettings,
    robot: Robot | None,
    stats: NormStats | None,
    tokenizer_folder: str | Path | None = None,  # or a SentencePiece .model file
    *,
    dtype: torch.dtype | None = None,
    progress: bool = False,
) -> str:
    """Write a checkpoint folder and return its digest. It appears whole or not at all: written beside, then renamed.

    Args:
        weights: a `Pi0`, its state dict, or an open checkpoint of any layout (then one tensor at a time is in memory).
        dtype: of the weights written; None keeps them as they are.

    Raises:
        CheckpointError: weights or statistics do not fit the settings or the robot, the folder that stands there is
            no checkpoint folder (a checkpoint is replaced), or the tokenizer folder is none.
        OSError: the disk is full or not writable.
    """
    folder = Path(folder).absolute()
    if folder.exists() and not _replaceable(folder):
        raise CheckpointError(f"{folder}: exists and is no checkpoint folder, so it is not replaced; name another")
    if isinstance(weights, nn.Module):
        weights = weights.state_dict()
    checkpoint = weights if isinstance(weights, Checkpoint) else from_state_dict(weights, config=settings.model)
    if checkpoint.config != settings.model:
        raise CheckpointError(f"{folder}: the settings' model is not the one that the weights were opened with")
    _check_meaning(settings, robot, stats, str(folder))
    with whole_folder(folder) as temporary:
        write_json(temporary / CONFIG, settings.to_dict())
        if robot is not None:
            write_bytes(temporary / ROBOT, robot.to_yaml().encode())
        if stats is not None:
            stats.save(temporary / STATISTICS)
        if tokenizer_folder is not None:
            _copy_tokenizer(Path(tokenizer_folder), temporary / TOKENIZER)
        shapes = {key: (shape, dtype or checkpoint.stored_dtype(key)) for key, shape in checkpoint.shapes().items()}
        write_safetensors(temporary / WEIGHTS, shapes, checkpoint.tensors(dtype, progress=progress))
        listed = {name: {"sha256": sha256(path), "bytes": path.stat().st_size} for name, path in _files(temporary)}
        manifest = {"format": FORMAT, "files": listed}
        write_json(temporary / MANIFEST, manifest)
    return _digest(manifest)


def load_bundle(folder: str | Path, *, verify_weights: bool = False) -> Bundle:
    """Read a checkpoint folder. Small files are verified against the manifest; the weights' size is, and their sha256
    where `verify_weights` asks for it (some seconds for 7 GB).

    Raises:
        CheckpointError: one line: not a checkpoint folder, another format version, a file missing, changed, damaged or
            outside the folder, values that contradict one another.
    """
    folder = Path(folder)
    if not folder.is_dir():
        left = [path.name for path in folder.absolute().parent.glob(f".{glob.escape(folder.name)}.*.old")]
        hint = f"; {left[0]} beside it is the one from before an interrupted save" if left else ""
        raise CheckpointError(f"{folder}: no such folder{hint}")
    if not (folder / CONFIG).is_file():
        hint = f"; did you mean {folder / 'checkpoint'}?" if is_bundle(folder / "checkpoint") else ""
        raise CheckpointError(f"{folder}: not a checkpoint folder, it has no {CONFIG}{hint}")
    config = read_json(inside(folder, CONFIG))
    with _source(folder / CONFIG):
        settings = BundleSettings.from_dict(config)
    manifest = _verify(folder, verify_weights)
    robot = stats = None
    if ROBOT in manifest["files"]:
        text = read_bytes(folder / ROBOT).decode("utf-8", "replace")
        try:
            robot = parse_robot(text, str(folder / ROBOT))
        except RobotFileError as error:
            raise CheckpointError("; ".join(str(error).splitlines())) from None
    if STATISTICS in manifest["files"]:
        stats = NormStats.from_dict(read_json(folder / STATISTICS), folder / STATISTICS)
    _check_meaning(settings, robot, stats, str(folder))
    has_tokenizer = any(name.startswith(f"{TOKENIZER}/") for name in manifest["files"])
    return Bundle(folder, settings, robot, stats, _digest(manifest), folder / TOKENIZER if has_tokenizer else None)


def _verify(folder: Path, verify_weights: bool) -> dict[str, Any]:
    path = folder / MANIFEST
    manifest = read_json(inside(folder, MANIFEST))
    if manifest.get("format") != FORMAT:
        raise CheckpointError(f"{path}: format is {manifest.get('format')!r:.80}, this version reads {FORMAT!r}")
    entries = manifest.get("files")
    if not isinstance(entries, dict) or not all(
        isinstance(e, dict) and isinstance(e.get("sha256"), str) and isinstance(e.get("bytes"), int)
        for e in entries.values()
    ):
        raise CheckpointError(f"{path}: 'files' must be a mapping of names to sha256 and bytes")
    if absent := [name for name in (WEIGHTS, CONFIG) if name not in entries]:
        raise CheckpointError(f"{path}: does not list {', '.join(absent)}")
    for name, entry in entries.items():
        file = inside(folder, name)
        if not file.is_file():
            raise CheckpointError(f"{file}: missing, the manifest lists it")
        size = file.stat().st_size
        if size != entry["bytes"]:
            raise CheckpointError(f"{file}: {size} bytes, the manifest says {entry['bytes']}: truncated or changed")
        if (name != WEIGHTS or verify_weights) and sha256(file) != entry["sha256"]:
            raise CheckpointError(
                f"{file}: its sha256 is not the manifest's; the file was changed after it was written"
            )
    unlisted = [n for n, _ in _files(folder) if n not in entries and _ours(n)]
    if unlisted:
        raise CheckpointError(f"{folder}: {', '.join(unlisted)} not in {MANIFEST}; remove it, or write the folder anew")
    return manifest


def _check_meaning(settings: BundleSettings, robot: Robot | None, stats: NormStats | None, where: str) -> None:
    with _source(where):
        if stats is not None:
            stats.require(settings.normalisation, len(robot.joints) if robot else None)
        if robot is not None and (fault := misfit(settings, robot)):
            raise CheckpointError(fault)


def misfit(settings: BundleSettings, robot: Robot) -> str:
    """Why a robot has no place in a model of these settings, or ""."""
    joints, dims, model = len(robot.joints), settings.model.action_dim, settings.model
    if joints > dims:
        return f"robot {robot.name!r} has {joints} joints, the model {dims} action dimensions"
    if extra := [slot for slot in robot.present_cameras if slot not in model.cameras]:
        has = ", ".join(model.cameras)
        return f"camera {', '.join(extra)} of robot {robot.name!r} has no slot in the model, which has {has}"
    if settings.adapter == "aloha" and joints != aloha.JOINTS:
        return f"the aloha adapter is for two arms of six joints and a gripper; {robot.name!r} has {joints} joints"
    return ""


@contextlib.contextmanager
def _source(where: object) -> Iterator[None]:
    """Name the file in a CheckpointError that does not."""
    try:
        yield
    except CheckpointError as error:
        raise type(error)(f"{where}: {error}") from None


def _digest(manifest: Mapping[str, Any]) -> str:
    canonical = json.dumps(manifest, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def _files(folder: Path) -> list[tuple[str, Path]]:
    found = [path for path in sorted(folder.rglob("*")) if path.is_file() and path != folder / MANIFEST]
    return [(path.relative_to(folder).as_posix(), path) for path in found]


def _ours(name: str) -> bool:
    return name in (ROBOT, STATISTICS) or name.startswith(f"{TOKENIZER}/")


def _copy_tokenizer(source: Path, target: Path) -> None:
    """A SentencePiece file, or a folder's top-level files, links followed; weights beside them stay behind."""
    if not source.exists():
        raise CheckpointError(f"{source}: no such tokenizer file or folder")
    target.mkdir()
    for path in sorted(source.iterdir()) if source.is_dir() else [source]:
        if path.is_file() and path.suffix in (".json", ".model", ".txt", ".jinja"):
            shutil.copyfile(path, target / path.name)
    if not any(target.iterdir()):
        raise CheckpointError(f"{source}: holds no tokenizer files (.json, .model, .txt)")


def _replaceable(folder: Path) -> bool:
    if not folder.is_dir() or folder.is_symlink():
        return False
    return not any(folder.iterdir()) or is_bundle(folder)


def is_bundle(path: Path) -> bool:
    """Whether this is a checkpoint folder of ours, sound or not; other layouts have a config.json too."""
    return (path / MANIFEST).is_file() and (path / CONFIG).is_file()


def folder_of(path: Path) -> Path:
    """The checkpoint folder of ours whose weights file this is: alone they mean little. Any other path as it is."""
    return path.parent if path.name == WEIGHTS and is_bundle(path.parent) else path


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its place when the block ends well, and is removed when it fails.
    What stood there before is removed only once the new one stands."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = (folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.{end}") for end in ("part", "old"))
    temporary.mkdir()
    try:
        yield temporary
        if folder.exists():
            os.rename(folder, old)
        try:
            os.rename(temporary, folder)
        except OSError:
            if old.exists():
                os.rename(old, folder)
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
