"""What is in recordings, as numbers: for a person before training, and to say no when nothing can be learnt."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pi0_ros.robot import Robot
from pi0_ros.training.bags import Bag, BagError, BagFiles
from pi0_ros.training.cache import image_messages, model_frame, require_usable
from pi0_ros.training.episodes import Episode, Selection, cut_episodes
from pi0_ros.training.plausibility import (
    NEAR_CONSTANT,
    Motion,
    counted,
    judge,
    measured_state,
    near_constant,
    outside_limits,
)
from pi0_ros.training.recording import Recording, Stream, read_recording

PAUSE = 1.0  # s; in longer silences a recorder or a driver was paused
LOST = 0.1  # of a stream's messages, at the rate that most of them have; more is no jitter
WAYS = {  # out of lost frames
    "raw": "the middleware needs room for raw images (robot.md, QoS), or record compressed ones",
    "compressed": "is the driver or the network too slow?",
}
GAP_FACTOR = 3.0  # a gap is a silence longer than this many usual periods


@dataclass
class BagReport:
    """One bag. `numbers` is plain JSON; the arrays serve plots and the statistics of all bags together."""

    numbers: dict[str, Any]
    state: np.ndarray  # float64 [T, J] at usable ticks
    actions: np.ndarray
    motions: list[Motion] = field(default_factory=list)  # of each episode
    episode: dict[str, np.ndarray] | None = None  # seconds, state, actions, usable of the first episode
    skew_ms: np.ndarray = field(default_factory=lambda: np.empty(0))
    samples: list[tuple[str, float, np.ndarray]] = field(default_factory=list)  # slot, seconds, uint8 [S, S, 3]


def inspect_bag(files: BagFiles, robot: Robot, selection: Selection, image_size: int, samples: int) -> BagReport:
    """The report of one bag, with `samples` frames a camera; one that cannot be trained on has a `refused` reason."""
    joints = len(robot.joints)
    numbers: dict[str, Any] = {"bag": str(files.path), "refused": None, "notes": list(files.notes)}
    report = BagReport(numbers, np.empty((0, joints)), np.empty((0, joints)))
    try:
        with Bag(files) as bag:
            recording = read_recording(bag, robot)
            episodes = cut_episodes(recording, robot, selection)
            numbers |= _numbers(bag, recording, episodes, robot)
            numbers["notes"] = recording.notes + _still(recording, robot)
            numbers["warnings"] = recording.warnings
            require_usable(recording, episodes)
            _require_pictures(bag, recording, episodes, robot, image_size)
            report.state = np.concatenate([e.state[e.usable] for e in episodes])
            report.actions = np.concatenate([e.actions[e.usable & e.known] for e in episodes])
            report.motions = [(e.state, e.actions, e.known) for e in episodes]
            report.skew_ms = np.concatenate([e.skew_ns[e.usable] for e in episodes]) / 1e6
            report.episode = _curve(next(e for e in episodes if e.usable.any()))
            if samples:
                report.samples = _samples(bag, recording, episodes, robot, image_size, samples)
    except BagError as error:
        numbers["refused"] = str(error).removeprefix(f"{files.path}: ")
    return report


def _numbers(bag: Bag, recording: Recording, episodes: list[Episode], robot: Robot) -> dict[str, Any]:
    streams = {s.name: _stream(s) for s in recording.observed if len(s.bag_ns)}
    for name, times in recording.commands_ns.items():
        topic = recording.topics[robot.action_sources[name].topic]
        streams[name] = {"topic": topic, **_pace(np.sort(times))}
    usable = sum(int(e.usable.sum()) for e in episodes)
    return {
        "duration": bag.seconds,
        "messages": sum(topic.count for topic in bag.topics.values()),
        "topics": {name: topic for name, topic in recording.topics.items()},
        "missing": [name for name, topic in recording.topics.items() if topic is None],
        "streams": streams,
        "problems": recording.problems,
        "nan": {f"{what} of {joint}": n for (what, joint), n in recording.nan.items()},
        "bad_messages": {f"{where}: {reason}": n for (where, reason), n in recording.faults.items()},
        "ticks": sum(len(e.ticks_ns) for e in episodes),
        "kept": usable,
        "dropped": dict(sum((e.dropped for e in episodes), Counter())),
        "skew_ms": _percentiles(np.concatenate([e.skew_ns[e.usable] for e in episodes]) / 1e6) if usable else None,
        "episodes": [
            {
                "label": e.label,
                "seconds": len(e.ticks_ns) / robot.control_rate,
                "kept": int(e.usable.sum()),
                "idle_start": e.idle_start,
                "idle_end": e.idle_end,
                "waited": e.waited,
                "without_action": int((e.usable & ~e.known).sum()),
                "prompts": list(dict.fromkeys(e.prompts)),
            }
            for e in episodes
        ],
    }


def _stream(stream: Stream) -> dict[str, Any]:
    numbers = {"topic": stream.topic, **_pace(np.sort(stream.time_ns if len(stream.time_ns) else stream.bag_ns))}
    stamped = stream.header_ns != 0
    if stamped.any():
        delay = (stream.bag_ns - stream.header_ns)[stamped] / 1e6
        numbers["bag_minus_header_ms"] = _percentiles(delay)
    return numbers


def _pace(times_ns: np.ndarray) -> dict[str, Any]:
    """Messages, true rate (one over the median period), silences longer than three periods, and the share that is
    missing at that rate, but for pauses."""
    periods = np.diff(times_ns) / 1e9
    periods = periods[periods > 0]
    if not len(periods):
        return {"messages": len(times_ns), "duration": 0.0, "rate": None, "gaps": 0, "longest_gap": None, "lost": 0.0}
    usual = float(np.median(periods))
    return {
        "messages": len(times_ns),
        "duration": float(times_ns[-1] - times_ns[0]) / 1e9,
        "rate": 1.0 / usual,
        "gaps": int((periods > GAP_FACTOR * usual).sum()),
        "longest_gap": float(periods.max()),
        "lost": _lost(periods[periods < PAUSE], usual),
    }


def _lost(periods: np.ndarray, usual: float) -> float:
    share = 1.0 - usual / periods.mean() if len(periods) else 0.0
    return float(share) if 0.0 < share < 0.7 else 0.0  # with more, the usual period is none: stamps come in pairs, say


def _percentiles(values: np.ndarray) -> dict[str, float]:
    p50, p95, p99 = np.percentile(values, [50, 95, 99])
    return {
        "p50": float(p50),
        "p95": float(p95),
        "p99": float(p99),
        "max": float(values.max()),
        "min": float(values.min()),
    }


def _still(recording: Recording, robot: Robot) -> list[str]:
    """Said of an arm that never moves, whether the recording can be trained on or not."""
    spans = np.array([joint.position[1] - joint.position[0] for joint in robot.joints])
    spread = np.full(len(spans), np.nan)
    for stream in recording.states:
        if len(stream.positions) > 1:
            joints = list(stream.joints)
            spread[joints] = np.fmax(spread[joints], stream.positions.std(axis=0))  # of several streams the livelier
    if not (spread < NEAR_CONSTANT * spans).all():
        return []
    return [f"the arm stands still: standard deviation at most {spread.max():.2g}, which blows up normalisation"]


def _curve(episode: Episode) -> dict[str, np.ndarray]:
    return {
        "seconds": (episode.ticks_ns - episode.ticks_ns[0]) / 1e9,
        "state": episode.state,
        "actions": np.where(episode.known[:, None], episode.actions, np.nan),
        "usable": episode.usable,
    }


def _samples(
    bag: Bag, recording: Recording, episodes: list[Episode], robot: Robot, image_size: int, count: int
) -> list[tuple[str, float, np.ndarray]]:
    """Frames from the beginning, the middle, ... of the first episode that has any, as the model will see them."""
    episode = next(e for e in episodes if e.usable.any())
    ticks = np.flatnonzero(episode.usable)
    ticks = ticks[np.unique(np.linspace(0, len(ticks) - 1, count).round().astype(int))]
    seconds = {
        (slot, int(episode.frames[slot][tick])): float(episode.ticks_ns[tick] - episode.ticks_ns[0]) / 1e9
        for slot in recording.cameras
        for tick in ticks
    }
    needed = {slot: {ordinal for where, ordinal in seconds if where == slot} for slot in recording.cameras}
    found = []
    for slot, ordinal, kind, raw in image_messages(bag, recording, needed):
        frame = model_frame(raw, kind, robot.present_cameras[slot], image_size)
        if not isinstance(frame, str):
            found.append((slot, seconds[slot, ordinal], frame))
    return sorted(found, key=lambda item: item[:2])


def _require_pictures(bag: Bag, recording: Recording, episodes: list[Episode], robot: Robot, image_size: int) -> None:
    """BagError unless some frame of each camera can be decoded: of each the first that can is enough."""
    needed = {
        slot: set(np.concatenate([e.frames[slot][e.usable] for e in episodes]).tolist()) for slot in recording.cameras
    }
    faults: dict[str, str] = {}
    missing = set(needed)
    for slot, _, kind, raw in image_messages(bag, recording, needed):
        frame = model_frame(raw, kind, robot.present_cameras[slot], image_size)
        if isinstance(frame, str):
            faults.setdefault(slot, frame)
            continue
        needed[slot] = set()
        missing.discard(slot)
        if not missing:
            return
    raise BagError("; ".join(f"no frame of {slot} can be decoded: {faults[slot]}" for slot in sorted(missing)))


def summarise(reports: list[BagReport], robot: Robot, horizon: int, selection: Selection) -> dict[str, Any]:
    """Totals, statistics of every joint, warnings, and `refused`: why this data cannot be trained on, or None."""
    good = [r for r in reports if r.numbers["refused"] is None]
    numbers = [r.numbers for r in good]
    state = np.concatenate([r.state for r in good]) if good else np.empty((0, len(robot.joints)))
    actions = np.concatenate([r.actions for r in good]) if good else np.empty((0, len(robot.joints)))
    skew = np.concatenate([r.skew_ms for r in good]) if good else np.empty(0)
    joints = [_joint(robot, i, state, actions, good) for i in range(len(robot.joints))] if len(state) else []
    episodes = [episode for n in numbers for episode in n["episodes"]]
    refused, warnings = None, []
    if not good:
        reasons = Counter(r.numbers["refused"] for r in reports)
        reason, count = reasons.most_common(1)[0]
        refused = f"none of {len(reports)} recordings can be trained on; {count} of them: {reason}"
        if len(reports) == 1:
            refused = f"the recording cannot be trained on: {reason}"
    else:
        refused, warnings = judge(state, actions, [motion for r in good for motion in r.motions], robot)
    return {
        "robot": robot.name,
        "refused": refused,
        "bags": len(reports),
        "usable_bags": len(good),
        "episodes": sum(episode["kept"] > 0 for episode in episodes),
        "hours": sum(n["duration"] for n in numbers) / 3600,
        "ticks": sum(n["ticks"] for n in numbers),
        "kept": int(len(state)),
        "dropped": dict(sum((Counter(n["dropped"]) for n in numbers), Counter())),
        "idle_threshold": selection.idle,
        "idle_seconds": sum(e["idle_start"] + e["idle_end"] for e in episodes),
        "skew_ms": _percentiles(skew) if len(skew) else None,
        "chunk": {"horizon": horizon, "seconds": horizon * robot.dt, "control_rate": robot.control_rate},
        "prompts": dict(Counter(prompt for e in episodes if e["kept"] for prompt in e["prompts"])),
        "joints": joints,
        "warnings": _warnings(robot, numbers, joints, episodes) + warnings,
    }


def _joint(robot: Robot, i: int, state: np.ndarray, actions: np.ndarray, good: list[BagReport]) -> dict[str, Any]:
    joint = robot.joints[i]
    numbers: dict[str, Any] = {
        "name": joint.name,
        "kind": joint.kind,
        "unit": joint.unit,
        "limits": list(joint.position),
    }
    for name, rows in (("state", state), ("actions", actions)):
        nan = sum(r.numbers["nan"].get(f"{name} of {joint.name}", 0) for r in good)
        numbers[name] = _column(rows[:, i], joint.position) | {"nan": nan} if len(rows) else None
    if joint.kind == "gripper":
        numbers["gripper"] = _polarity(robot, i, good)
    return numbers


def _column(values: np.ndarray, limits: tuple[float, float]) -> dict[str, Any]:
    q01, q99 = np.quantile(values, [0.01, 0.99])
    return {
        "mean": float(values.mean()),
        "std": float(values.std()),
        "q01": float(q01),
        "q99": float(q99),
        "min": float(values.min()),
        "max": float(values.max()),
        "outside_limits": outside_limits(values, limits),
        "near_constant": near_constant(values, limits),
    }


def _polarity(robot: Robot, i: int, good: list[BagReport]) -> dict[str, Any]:
    """Where the gripper starts. Usually that is open: if it starts at `closed`, the ends may be swapped. In between it
    says nothing."""
    joint = robot.joints[i]
    starts = np.array([r.episode["state"][0, i] for r in good if r.episode is not None])
    unit = float(np.median((starts - joint.open) / (joint.closed - joint.open)))  # 0 open, 1 closed
    guess = (
        "as the robot file says" if unit < 0.15 else "perhaps swapped" if unit > 0.85 else "unclear, compare by hand"
    )
    start = float(np.median(starts))
    ends = f"open {joint.open:g}, closed {joint.closed:g}"
    return {
        "open": joint.open,
        "closed": joint.closed,
        "start": start,
        "closed_at_start": unit,
        "polarity": guess,
        "remark": f"starts at {start:.2f}, {unit:.0%} closed by the robot file's {ends}: {guess}",
    }


def _warnings(
    robot: Robot,
    numbers: list[dict[str, Any]],
    joints: list[dict[str, Any]],
    episodes: list[dict[str, Any]],
) -> list[str]:
    found = counted([bag["warnings"] for bag in numbers]) + measured_state(robot)
    for joint in joints:
        if joint.get("gripper", {}).get("polarity") == "perhaps swapped":
            found.append(f"gripper {joint['name']} starts closed; are open and closed swapped in the robot file?")
    slow, lost = Counter(), defaultdict(float)
    planned = {name for name, source in robot.action_sources.items() if source.type == "JointTrajectory"}
    for bag in numbers:
        for name, stream in bag["streams"].items():
            if name not in planned and stream.get("rate") and stream["rate"] < 0.9 * robot.control_rate:
                slow[
                    f"{name} at {stream['rate']:.1f} Hz is slower than the control rate of {robot.control_rate:g} Hz"
                ] += 1
            if name in robot.present_cameras and stream["lost"] > LOST:
                lost[name] = max(lost[name], stream["lost"])
    found += [f"{text} ({count} recordings)" for text, count in slow.most_common(6)]
    found += [
        f"up to {100 * share:.0f} % of {name}'s frames are missing between others, unless its rate changes: "
        f"{WAYS[robot.present_cameras[name].transport]}"
        for name, share in lost.items()
    ]
    if any(not prompt for episode in episodes for prompt in episode["prompts"]):
        found.append("some episodes have no prompt: give one with --prompt or as prompt.default of the robot file")
    if without := sum(e["without_action"] for e in episodes):
        kept = sum(e["kept"] for e in episodes)
        found.append(f"at {without} of {kept} ticks kept some joint has no known command: no chunk holds them")
    if waits := [e["waited"] for e in episodes if e["waited"] > 1.0]:
        found.append(f"{len(waits)} episodes lose up to {max(waits):.1f} s until every stream has begun")
    return found
