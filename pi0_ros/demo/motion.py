"""How smoothly an arm was commanded, from the recording of a demo run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rclpy.serialization import deserialize_message
from std_msgs.msg import String
from trajectory_msgs.msg import JointTrajectory

from pi0_ros.msg import ActionChunk, PlayerStatus
from pi0_ros.robot import Robot
from pi0_ros.ros.conversions import SECOND, stamp_ns
from pi0_ros.training.bags import Bag, find_bags

PERIOD = SECOND // 100  # ns, the player's control period in the demo


@dataclass(frozen=True)
class Trajectory:
    """One that was sent: when, and int64 [n] ns, float64 [n, J] positions from its first point on."""

    sent: int
    times: np.ndarray
    positions: np.ndarray


@dataclass(frozen=True)
class Motion:
    """One episode; step, jump and jerk from the second chunk's hand-over on. Angles in rad, times in s."""

    step: float  # largest, of any joint between two control periods
    velocity_jumps: list[float]  # of each hand-over: largest change of any joint's velocity within one action
    jerk: float  # root mean square over time and joints
    held: float  # time in HOLDING after the first movement
    approached: float  # time in APPROACHING
    inference: list[float]  # of each chunk, from observation to actions


@dataclass
class Episode:
    """What was said between two marks; times in ns."""

    begin: int
    end: int
    trajectories: list[Trajectory] = field(default_factory=list)
    states: list[tuple[int, int]] = field(default_factory=list)  # ns, PlayerStatus.state
    chunks: list[tuple[int, int]] = field(default_factory=list)  # ns: inference begin and end


def measure(bag: Path, robot: Robot) -> list[Motion | None]:
    """The motion of every episode that was marked; None where nothing was commanded. Raises BagError."""
    return [motion_of(episode, robot.dt) if episode.trajectories else None for episode in _episodes(bag, robot)]


def commanded(trajectories: list[Trajectory]) -> tuple[np.ndarray, np.ndarray]:
    """What a trajectory controller was to do: int64 [T] ns each control period, float64 [T, J].

    Each trajectory counts from its first point to the first point of the next; between points it goes straight, after
    the last it stands still.
    """
    times, positions = [], []
    ends = [int(trajectory.times[0]) for trajectory in trajectories[1:]] + [np.iinfo(np.int64).max]
    for trajectory, end in zip(trajectories, ends, strict=True):
        counts = trajectory.times < end
        times.append(trajectory.times[counts])
        positions.append(trajectory.positions[counts])
    known, path = np.concatenate(times), np.concatenate(positions)
    order = np.argsort(known, kind="stable")
    known, path = known[order], path[order]
    grid = np.arange(known[0], known[-1] + 1, PERIOD)
    seconds = (known - known[0]) / SECOND
    columns = [np.interp((grid - known[0]) / SECOND, seconds, path[:, joint]) for joint in range(path.shape[1])]
    return grid, np.stack(columns, axis=1)


def motion_of(episode: Episode, dt: float) -> Motion:
    """The figures of one episode; `dt` is the time between two actions, s."""
    grid, path = commanded(episode.trajectories)
    h, span = PERIOD / SECOND, round(dt * SECOND / PERIOD)
    velocity = np.diff(path, axis=0) / h  # [T - 1, J]
    handovers = [  # where on the grid; the first chunk finds the arm at rest and has to catch up: it is left out
        int(np.searchsorted(grid, after[0].times[0]))
        for _, ready in episode.chunks[1:]
        if (after := [trajectory for trajectory in episode.trajectories if trajectory.sent >= ready])
    ]
    jumps = [np.ptp(near, axis=0).max() for at in handovers if len(near := velocity[max(at - 1, 0) : at + span])]
    under_way = velocity[handovers[0] :] if handovers else velocity[:0]
    jerk = np.diff(under_way, n=2, axis=0) / h**2
    moving = episode.trajectories[0].sent
    return Motion(
        step=float(np.abs(under_way).max(initial=0.0)) * h,
        velocity_jumps=[float(jump) for jump in jumps],
        jerk=float(np.sqrt(np.mean(jerk**2))) if len(jerk) else 0.0,
        held=_time_in(episode, PlayerStatus.HOLDING, moving),
        approached=_time_in(episode, PlayerStatus.APPROACHING, moving),
        inference=[(end - begin) / SECOND for begin, end in episode.chunks],
    )


def _time_in(episode: Episode, state: int, begin: int) -> float:
    ends = [time for time, _ in episode.states[1:]] + [episode.end]
    spans = [
        max(0, end - max(time, begin))
        for (time, found), end in zip(episode.states, ends, strict=True)
        if found == state
    ]
    return sum(spans) / SECOND


def _episodes(path: Path, robot: Robot) -> list[Episode]:
    """What was said between the marks, by the messages' own stamps."""
    episodes: list[Episode] = []
    kinds = {
        robot.episode_topic: String,
        robot.commands[0].topic: JointTrajectory,
        "/chunk_player/status": PlayerStatus,
        "/action_chunk": ActionChunk,
    }
    with Bag(find_bags(path)[0]) as bag:
        read = [
            (time, kinds[topic], deserialize_message(raw, kinds[topic]))
            for topic, time, raw in bag.messages(set(kinds) & set(bag.topics))
        ]
    said = sorted(((_time(time, message), kind, message) for time, kind, message in read), key=lambda item: item[0])
    for time, kind, message in said:
        if kind is String:
            if message.data:
                episodes.append(Episode(time, np.iinfo(np.int64).max))
            elif episodes and time < episodes[-1].end:
                episodes[-1].end = time
        elif episodes and time < episodes[-1].end:
            _sort_in(episodes[-1], time, message)
    return [episode for episode in episodes if episode.end < np.iinfo(np.int64).max]


def _time(recorded: int, message: Any) -> int:
    if isinstance(message, ActionChunk):
        return stamp_ns(message.inference_end)
    return recorded if isinstance(message, String) else stamp_ns(message.header.stamp)


def _sort_in(episode: Episode, time: int, message: Any) -> None:
    if isinstance(message, PlayerStatus):
        episode.states.append((time, message.state))
    elif isinstance(message, ActionChunk):
        if message.horizon and stamp_ns(message.inference_begin) >= episode.begin:
            episode.chunks.append((stamp_ns(message.inference_begin), time))
    elif message.points:
        times = np.array([time + _duration(point.time_from_start) for point in message.points], np.int64)
        positions = np.array([point.positions for point in message.points])
        episode.trajectories.append(Trajectory(time, times, positions))


def _duration(duration: Any) -> int:
    return duration.sec * SECOND + duration.nanosec
