"""What was commanded at every instant of a recording: the actions that a policy learns.

One rule for every kind of message. A command takes hold when it arrives; from where the command before it stands at
that moment it goes in straight lines through its points, each at its own time, and then holds its last point until the
next command. A JointState or Float64MultiArray is a command of one point, due at once, so it simply holds. A
JointTrajectory has its points at stamp + time_from_start (stamp 0: at arrival + time_from_start), which is how
joint_trajectory_controller reads positions. The action of a tick is therefore the position that was commanded *for*
that instant, and action k of a chunk the one for k control periods later, which is how the player plays it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Command:
    """One command: takes hold at `begin_ns`; `positions` [P, n] of `joints` (model indices) at `due_ns` int64 [P]."""

    begin_ns: int
    joints: tuple[int, ...]
    due_ns: np.ndarray
    positions: np.ndarray


def commanded(commands: Sequence[Command], ticks_ns: np.ndarray, joints: int) -> tuple[np.ndarray, np.ndarray]:
    """Commanded positions at ticks, int64 [T] ascending: (float64 [T, joints], bool [T, joints] whether known).

    A command exactly at a tick belongs to it. Before a joint's first command its value is that of its first point and
    not known; a joint that is never commanded is NaN.
    """
    values = np.full((len(ticks_ns), joints), np.nan)
    known = np.zeros((len(ticks_ns), joints), bool)
    ordered = sorted(commands, key=lambda command: command.begin_ns)  # stable: of equals the last recorded wins
    sets = {command.joints for command in ordered}
    if sum(len(group) for group in sets) > len(set().union(*sets)):  # overlapping sets: one joint at a time
        sets = {(joint,) for group in sets for joint in group}
    for group in sorted(sets):
        lane = [part for command in ordered if (part := _only(command, group)) is not None]
        columns = list(group)
        values[:, columns], begin = _lane(lane, ticks_ns)
        known[begin:, columns] = True
    return values, known


def _only(command: Command, group: tuple[int, ...]) -> Command | None:
    if command.joints == group:
        return command
    if not set(group) <= set(command.joints):
        return None
    at = [command.joints.index(joint) for joint in group]
    return Command(command.begin_ns, group, command.due_ns, command.positions[:, at])


def _lane(lane: list[Command], ticks: np.ndarray) -> tuple[np.ndarray, int]:
    begins = np.array([command.begin_ns for command in lane], np.int64)
    edges = np.searchsorted(ticks, begins, side="left")
    stops = np.append(edges[1:], len(ticks))
    out = np.empty((len(ticks), len(lane[0].joints)))
    out[: edges[0]] = lane[0].positions[0]
    if all(len(command.due_ns) == 1 and command.due_ns[0] <= command.begin_ns for command in lane):
        at = np.searchsorted(begins, ticks, side="right") - 1
        held = np.concatenate([command.positions for command in lane])
        out[edges[0] :] = held[at[edges[0] :]]
        return out, int(edges[0])
    current = lane[0].positions[0]
    for i, command in enumerate(lane):
        knots, points = _knots(command, current)
        out[edges[i] : stops[i]] = _straight(ticks[edges[i] : stops[i]] - command.begin_ns, knots, points)
        if i + 1 < len(lane):
            current = _straight(begins[i + 1 : i + 2] - command.begin_ns, knots, points)[0]
    return out, int(edges[0])


def _knots(command: Command, current: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Times in ns from its begin [K], positions [K, n]; a bridge from `current` until the first is due."""
    due = command.due_ns - command.begin_ns
    if due[0] <= 0:
        return due, command.positions
    return np.concatenate([[0], due]), np.concatenate([current[None], command.positions])


def _straight(times: np.ndarray, knots: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Linear interpolation of points [K, n] at times [M]; the ends are held."""
    if not len(times):
        return np.empty((0, points.shape[1]))
    return np.stack([np.interp(times, knots, column) for column in points.T], axis=1)
