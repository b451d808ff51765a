"""The recordings of a run: decoded, checked against the robot file, and known again by their content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pi0_ros.robot import Robot
from pi0_ros.training.bags import BagError, find_bags
from pi0_ros.training.build import build_cache
from pi0_ros.training.cache import FOLDER, Unit
from pi0_ros.training.episodes import Selection
from pi0_ros.training.plausibility import counted, judge, measured_state

EPISODES = "episodes.json"  # beside a checkpoint of `train`: what it was trained on

Episodes = list[tuple[int, int]]  # (unit, episode of the unit)


def load_units(
    bags: Path,
    robot: Robot,
    image_size: int,
    *,
    cache: Path | None = None,
    prompt: str | None = None,
    idle: float = Selection.idle,
    jobs: int | None = None,
    quiet: bool = False,
) -> list[Unit]:
    """The usable recordings at `bags`, decoded into the cache (by default `.pi0_cache` beside them).

    One that cannot be read, or contradicts the robot file in joints or cameras, is named with its reason (unless
    `quiet`) and left out. `prompt` and `idle` as in `Selection`.

    Raises:
        BagError: no recording is usable, or they are not of the robot file's rate or units.
        CacheError: the cache cannot be written.
    """
    root = bags if bags.is_dir() and not (bags / "metadata.yaml").is_file() else bags.parent
    found = find_bags(bags)
    cached = build_cache(found, robot, image_size, cache or root / FOLDER, selection=Selection(idle, prompt), jobs=jobs)
    if not cached.units:
        bag, reason = next(iter(cached.skipped.items()))
        others = f" (and {len(cached.skipped) - 1} more)" if len(cached.skipped) > 1 else ""
        raise BagError(f"none of {len(found)} recordings fits {robot.name!r}: {_without(reason, bag)}: {bag}{others}")
    for bag, reason in () if quiet else cached.skipped.items():
        print(f"left out {bag}: {_without(reason, bag)}")
    odd = require_plausible(cached.units, robot)
    for text in () if quiet else [*warnings(cached.units, robot), *odd]:
        print(f"warning: {text}")
    return cached.units


def warnings(units: Sequence[Unit], robot: Robot) -> list[str]:
    """Why a policy trained on these recordings may not work on the robot, but for their numbers."""
    found = counted([unit.index["warnings"] for unit in units]) + measured_state(robot)
    if silent := sum("" in unit.prompts for unit in units):
        found.append(f"{silent} recordings have no prompt, or none at first: give one with --prompt")
    return found


def _without(reason: str, bag: str) -> str:
    return reason.removeprefix(f"{bag}: ")


def require_plausible(units: Sequence[Unit], robot: Robot) -> list[str]:
    """What `judge` has to say of these recordings. BagError if they are refused: commands came too slowly for the robot
    file's control rate, or most positions are beyond its limits."""
    arrays = [unit.arrays for unit in units]
    motions = [
        (a["state"][here], a["actions"][here], a["known"][here])
        for unit, a in zip(units, arrays, strict=True)
        for here in (slice(episode["begin"], episode["end"]) for episode in unit.episodes)
    ]
    state = np.concatenate([a["state"][a["usable"]] for a in arrays])
    actions = np.concatenate([a["actions"][a["usable"] & a["known"]] for a in arrays])
    fault, odd = judge(state, actions, motions, robot)
    if fault:
        raise BagError(fault)
    return odd


def names(units: Sequence[Unit], episodes: Episodes) -> list[list[Any]]:
    """Episodes by content: [digest of the recording, number of the episode in it], whatever folder it lies in."""
    return [[units[unit].index["digest"], episode] for unit, episode in episodes]


def trained_on(checkpoint: Path) -> set[tuple[str, int]] | None:
    """Episodes, named as by `names`, that a checkpoint of `train` has seen, in runs that it began from, too; None where
    no record of them lies beside it."""
    try:
        record = json.loads((checkpoint.resolve().parent / EPISODES).read_text())
        return {(digest, episode) for digest, episode in (*record["train"], *record.get("earlier", ()))}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def fingerprint(units: Sequence[Unit], train: Episodes, held_out: Episodes) -> str:
    """Changes with anything that the samples of a run depend on: 16 hex digits."""
    content = [[unit.folder.name for unit in units], train, held_out]  # a unit's folder is named by its content
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
