"""The recordings of a run: decoded, checked against the robot file, and known again by their content."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pi0_ros.robot import Robot
from pi0_ros.training.bags import BagError, find_bags
from pi0_ros.training.build import build_cache
from pi0_ros.training.cache import FOLDER, Unit
from pi0_ros.training.episodes import Selection

EPISODES = "episodes.json"  # beside a checkpoint of `train`: what it was trained on
FEWEST_CHANGES = 10  # changes of a command from which its rate is judged
OUTSIDE_WARNING = 0.05

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
        BagError: no recording is usable, or actions were recorded at another rate than the robot file's.
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
    check_rate(cached.units, robot)
    for text in () if quiet else warnings(cached.units, robot):
        print(f"warning: {text}")
    return cached.units


def warnings(units: Sequence[Unit], robot: Robot) -> list[str]:
    """Why a policy trained on these recordings may not work on the robot."""
    found = counted([unit.index["warnings"] for unit in units])
    if silent := sum("" in unit.prompts for unit in units):
        found.append(f"{silent} recordings have no prompt, or none at first: give one with --prompt")
    arrays = [unit.arrays for unit in units]
    for what, rows in (
        ("state", [a["state"][a["usable"]] for a in arrays]),
        ("actions", [a["actions"][a["usable"] & a["known"]] for a in arrays]),
    ):
        for joint, values in zip(robot.joints, np.concatenate(rows).T, strict=True):
            found += limits_warning(what, joint.name, joint.position, outside_limits(values, joint.position))
    return found


def counted(by_recording: Sequence[Sequence[str]]) -> list[str]:
    """The lines said of any recording, every one once, with the number of recordings."""
    counts = Counter(text for lines in by_recording for text in lines)
    return [f"{text} ({count} recordings)" for text, count in counts.items()]


def outside_limits(values: np.ndarray, limits: Sequence[float]) -> float:
    """The share of float64 [T] positions outside a joint's limits, with some slack for what sensors say there."""
    low, high = limits
    slack = 1e-3 * (high - low)
    return float(((values < low - slack) | (values > high + slack)).mean()) if len(values) else 0.0


def limits_warning(what: str, joint: str, limits: Sequence[float], share: float) -> list[str]:
    """What is to be said of a `share` of positions outside a joint's limits: one line, or none."""
    if share <= OUTSIDE_WARNING:
        return []
    return [f"{what} of {joint}: {share:.0%} outside its limits {list(limits)}; other units (degrees?) or wrong limits"]


def _without(reason: str, bag: str) -> str:
    return reason.removeprefix(f"{bag}: ")


def check_rate(units: Sequence[Unit], robot: Robot) -> None:
    """BagError if commands came too slowly for the robot file's control rate, as `rate_fault` says."""
    gaps = [
        change_gaps(unit.arrays["actions"][window][unit.arrays["known"][window]])
        for unit in units
        for window in (slice(episode["begin"], episode["end"]) for episode in unit.episodes)
    ]
    if fault := rate_fault(gaps, robot):
        raise BagError(fault)


def change_gaps(actions: np.ndarray) -> np.ndarray:
    """Ticks from one change of any joint's action to the next, int64: of float64 [T, J] of an episode."""
    return np.diff(np.flatnonzero((np.diff(actions, axis=0) != 0).any(axis=1)))


def rate_fault(gaps: Sequence[np.ndarray], robot: Robot) -> str | None:
    """What is wrong if commands came at half the control rate or less: every other action of a chunk would repeat the
    one before, and the policy would learn to move in jerks. `gaps`: `change_gaps` of all episodes. Trajectories that
    lead from one to the next change at every tick, however seldom they come."""
    joined = np.concatenate([*gaps, np.empty(0)])
    if len(joined) < FEWEST_CHANGES or (median := float(np.median(joined))) < 2:
        return None
    topics = ", ".join(source.topic for source in robot.actions)
    return (
        f"actions on {topics} change {robot.control_rate / median:.3g} times a second, but the robot file's "
        f"control_rate is {robot.control_rate:g} Hz; set control_rate to the rate that commands were recorded at"
    )


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
