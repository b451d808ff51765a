"""Normalisation statistics in one form, whoever computed them: openpi, lerobot, transformers, or this package.

State and actions each have mean and standard deviation, and the 1 % and 99 % quantiles where they were computed. All
in the units that the policy's transforms see: model order, radians or metres, grippers 0 (open) to 1 (closed), actions
relative where the robot file says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pi0_ros.model.files import CheckpointError, inside, open_safetensors, read_header, read_json, write_json
from pi0_ros.wording import shown

FILE_NAME = "norm_stats.json"
_FIELDS = ("mean", "std", "q01", "q99")


class StatisticsError(CheckpointError):
    """Statistics that cannot be used; the message names the field, what was found and what is allowed."""


@dataclass(frozen=True, eq=False)
class Stats:
    """Statistics of one vector of D numbers: each float64 [D]. Quantiles come in pairs or not at all.

    Raises StatisticsError when lengths differ, a number is not finite, std is negative, or q01 is above q99.
    """

    mean: np.ndarray
    std: np.ndarray
    q01: np.ndarray | None = None
    q99: np.ndarray | None = None

    def __post_init__(self) -> None:
        for name in _FIELDS:
            value = getattr(self, name)
            if value is None and name in ("q01", "q99"):
                continue
            try:
                array = np.array(value, dtype=np.float64)
            except (TypeError, ValueError):
                raise StatisticsError(f"{name} must be a list of numbers, found {shown(value)}") from None
            if array.ndim != 1 or not len(array):
                raise StatisticsError(f"{name} must be a list of numbers, found shape {list(array.shape)}")
            if bad := np.flatnonzero(~np.isfinite(array)).tolist():
                raise StatisticsError(f"{name}{bad} must be finite, found {array[bad].tolist()}")
            if len(array) != len(self):
                raise StatisticsError(f"{name} has {len(array)} numbers where mean has {len(self)}")
            array.setflags(write=False)
            object.__setattr__(self, name, array)
        if bad := np.flatnonzero(self.std < 0).tolist():
            raise StatisticsError(f"std{bad} must not be negative, found {self.std[bad].tolist()}")
        if (self.q01 is None) != (self.q99 is None):
            raise StatisticsError(f"{'q01' if self.q01 is None else 'q99'} is missing where its partner is given")
        if self.q01 is not None and (bad := np.flatnonzero(self.q01 > self.q99).tolist()):
            raise StatisticsError(f"q01{bad} must not be above q99, found {self.q01[bad].tolist()}")

    def __len__(self) -> int:
        return len(self.mean)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stats) and self.to_dict() == other.to_dict()

    def to_dict(self) -> dict[str, list[float] | None]:
        """Plain lists, None for quantiles that were not computed."""
        values = {name: getattr(self, name) for name in _FIELDS}
        return {name: None if value is None else value.tolist() for name, value in values.items()}

    @classmethod
    def from_dict(cls, data: Any) -> Stats:
        """The inverse of `to_dict`. StatisticsError for missing or unknown fields too."""
        if not isinstance(data, Mapping):
            raise StatisticsError(f"expected a mapping with mean and std, found {shown(data)}")
        if missing := [name for name in ("mean", "std") if data.get(name) is None]:
            raise StatisticsError(f"{' and '.join(missing)} missing")
        if unknown := sorted(map(str, set(data) - set(_FIELDS))):
            raise StatisticsError(f"unknown field {', '.join(unknown)}, allowed: {', '.join(_FIELDS)}")
        return cls(**data)


@dataclass(frozen=True)
class NormStats:
    """Statistics of the state and of the actions (over every step of the chunks)."""

    state: Stats
    actions: Stats

    def constant(self) -> list[str]:
        """What never changed in the data, such as 'actions[5]', or so seldom that its quantiles are the same:
        normalising divides by nearly nothing there."""
        faults = []
        for name in ("state", "actions"):
            stats = getattr(self, name)
            flat = stats.std <= 0 if stats.q01 is None else (stats.std <= 0) | (stats.q99 <= stats.q01)
            faults += [f"{name}[{i}]" for i in np.flatnonzero(flat)]
        return faults

    def require(self, normalisation: str, joints: int | None = None) -> None:
        """StatisticsError unless these statistics serve 'zscore' or 'quantile' for that many joints.

        More numbers than joints are fine: openpi pads to 32 and reads the first ones.
        """
        for name in ("state", "actions"):
            stats = getattr(self, name)
            if normalisation == "quantile" and stats.q01 is None:
                raise StatisticsError(f"{name}: quantile normalisation needs q01 and q99, which are missing")
            if joints is not None and len(stats) < joints:
                raise StatisticsError(f"{name}: statistics of {len(stats)} numbers for a robot of {joints} joints")

    def to_dict(self) -> dict[str, Any]:
        """openpi's form: {"norm_stats": {"state": {mean, std, q01, q99}, "actions": {...}}}."""
        return {"norm_stats": {"state": self.state.to_dict(), "actions": self.actions.to_dict()}}

    @classmethod
    def from_dict(cls, data: Any, source: object = FILE_NAME) -> NormStats:
        """The inverse of `to_dict`; `source` names the file in errors."""
        inner = data.get("norm_stats") if isinstance(data, Mapping) else None
        if not isinstance(inner, Mapping):
            raise StatisticsError(f"{source}: expected a mapping 'norm_stats', found {shown(data)}")
        if missing := [name for name in ("state", "actions") if name not in inner]:
            raise StatisticsError(f"{source}: {' and '.join(missing)} missing, found {sorted(map(str, inner))}")
        return cls(**{name: _named(inner[name], f"{source}: {name}") for name in ("state", "actions")})

    def save(self, path: Path) -> None:
        """Write norm_stats.json, as openpi does."""
        write_json(path, self.to_dict())


def load_statistics(path: str | Path, asset_id: str | None = None) -> NormStats:
    """Statistics from a norm_stats.json, or from a checkpoint folder of any of the layouts.

    Looked for in a folder, in this order: norm_stats.json; openpi's assets/<asset_id>/norm_stats.json (beside the
    folder, if that is openpi's params/); lerobot's policy_preprocessor.json and policy_postprocessor.json;
    transformers' processor_config.json.

    Raises:
        StatisticsError, CheckpointError: none found, several found and no `asset_id`, or unusable ones.
    """
    path = Path(path)
    if path.is_file():
        return NormStats.from_dict(read_json(path), path)
    found = find_statistics(path, asset_id)
    if found is None:
        raise StatisticsError(f"{path}: no statistics found (norm_stats.json, assets/, policy_preprocessor.json)")
    return found


def find_statistics(folder: Path, asset_id: str | None = None) -> NormStats | None:
    """As `load_statistics` of a folder; None where it holds none."""
    own = folder / FILE_NAME
    if own.is_file() and asset_id is None:
        return NormStats.from_dict(read_json(inside(folder, FILE_NAME)), own)
    if (asset := _openpi_asset(folder, asset_id)) is not None:
        return NormStats.from_dict(read_json(asset), asset)
    if (folder / "policy_preprocessor.json").is_file():
        return _lerobot(folder)
    for name in ("processor_config.json", "preprocessor_config.json"):
        if (folder / name).is_file() and (stats := _transformers(inside(folder, name))) is not None:
            return stats
    return None


def _openpi_asset(folder: Path, asset_id: str | None) -> Path | None:
    for assets in (folder / "assets", *([folder.parent / "assets"] if folder.name == "params" else [])):
        found = {str(path.parent.relative_to(assets)): path for path in sorted(assets.glob(f"**/{FILE_NAME}"))}
        if asset_id is not None and asset_id in found:
            return inside(assets, f"{asset_id}/{FILE_NAME}")
        if asset_id is not None and found:
            raise StatisticsError(f"{assets}: no asset {asset_id!r}, there are {', '.join(found)}")
        if len(found) > 1:
            raise StatisticsError(f"{assets}: statistics of several robots, name one: {', '.join(found)}")
        if found:
            return inside(assets, f"{next(iter(found))}/{FILE_NAME}")
    if asset_id is not None:
        raise StatisticsError(f"{folder}: no asset {asset_id!r}, there is no assets folder")
    return None


def _lerobot(folder: Path) -> NormStats | None:
    """lerobot: state statistics in the preprocessor's normaliser, action statistics in the postprocessor's inverse."""
    state = _lerobot_step(folder, "policy_preprocessor.json", "normalizer_processor", "observation.state")
    actions = _lerobot_step(folder, "policy_postprocessor.json", "unnormalizer_processor", "action")
    if state is None and actions is None:
        return None
    if state is None or actions is None:
        which = "observation.state" if state is None else "action"
        raise StatisticsError(f"{folder}: the processor files hold no statistics of {which}")
    return NormStats(state, actions)


def _lerobot_step(folder: Path, file: str, step_name: str, feature: str) -> Stats | None:
    path = inside(folder, file)
    steps = read_json(path).get("steps")
    if not isinstance(steps, list) or not all(isinstance(step, Mapping) for step in steps):
        raise StatisticsError(f"{path}: 'steps' must be a list of mappings, found {shown(steps)}")
    for step in steps:
        if step.get("registry_name") == step_name and "state_file" in step:
            weights = inside(folder, step["state_file"])
            keys = {name: f"{feature}.{name}" for name in _FIELDS}
            header = read_header(weights)
            with open_safetensors(weights) as reader:
                data = {
                    name: reader.get_tensor(key).double().flatten().tolist()
                    for name, key in keys.items()
                    if key in header
                }
            return _named(data, f"{weights}: {feature}") if data else None
    return None


def _transformers(path: Path) -> NormStats | None:
    data = read_json(path)
    fields = {name: {k: data.get(f"{name}_{k}") for k in ("mean", "std")} for name in ("state", "actions")}
    if all(value is None for stats in fields.values() for value in stats.values()):
        return None
    return NormStats(**{name: _named(stats, f"{path}: {name}") for name, stats in fields.items()})


def _named(data: Any, source: str) -> Stats:
    try:
        return Stats.from_dict(data)
    except StatisticsError as error:
        raise StatisticsError(f"{source}: {error}") from None
