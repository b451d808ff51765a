"""What was commanded at every instant of a recording: the actions that a policy learns.

One rule for every kind of message. A command takes hold when it arrives; from where the command before it stands at
that moment it goes in straight lines through its points, each at its own time, and then holds its last point until the
next command. A JointState or Float64MultiArray is a command of one point, due at once, so it simply holds. A
JointTrajectory has its points at stamp + time_from_start (stamp 0: at arrival + time_from_start), which is how
joint_trajectory_controller reads positions; one without points cancels the one before, and its joints hold where that
stands. The action of a tick is therefore the position that was commanded *for* that instant, and action k of a chunk
the one for k control periods later, which is how the player plays it.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

HOLD = np.nan  # the position of a command to stay where the one before has led


@dataclass(frozen=True)
class Commands:
    """M commands of one set of joints (model indices, n of them), all their points in one array: hours of them fit.

    Command i takes hold at begin_ns[i], int64 [M], and is points first[i] to first[i + 1], int64 [M + 1]: float64
    positions [P, n], HOLD where it says to stay, due at int64 due_ns [P]. `order` int64 [M]: of those that take hold at
    once the largest wins.
    """

    joints: tuple[int, ...]
    begin_ns: np.ndarray
    order: np.ndarray
    first: np.ndarray
    due_ns: np.ndarray
    positions: np.ndarray

    def take(self, at: np.ndarray) -> Commands:
        """The commands at indices int64 [K], in that order."""
        first = np.concatenate([[0], np.cumsum(np.diff(self.first)[at])])
        points = np.repeat(self.first[at] - first[:-1], np.diff(first)) + np.arange(first[-1])
        return Commands(
            self.joints, self.begin_ns[at], self.order[at], first, self.due_ns[points], self.positions[points]
        )

    def within(self, begin_ns: float, end_ns: float) -> Commands:
        """Those that take hold from `begin_ns` to `end_ns`, both included."""
        return self.take(np.flatnonzero((self.begin_ns >= begin_ns) & (self.begin_ns <= end_ns)))

    def of(self, group: tuple[int, ...]) -> Commands:
        """The same of some of its joints."""
        if group == self.joints:
            return self
        at = [self.joints.index(joint) for joint in group]
        return Commands(group, self.begin_ns, self.order, self.first, self.due_ns, self.positions[:, at])


class CommandRows:
    """Commands of one set of joints as they are read: 32 bytes each, and 8 more and 8 a joint for each point."""

    def __init__(self) -> None:
        self.times, self.due, self.positions = array("q"), array("q"), array("d")

    def add(self, stamp: int, header: int, order: int, positions: np.ndarray, due: Sequence[int] = (0,)) -> None:
        """positions float64 [P, n], due [P] in ns after the command's own time."""
        self.times.extend((stamp, header, order, len(due)))
        self.due.extend(due)
        self.positions.frombytes(positions.tobytes())

    def columns(self) -> np.ndarray:
        """int64 [4, M]: time of recording, header stamp (0: none), order, points."""
        return np.array(self.times, np.int64).reshape(-1, 4).T

    def commands(self, joints: tuple[int, ...], begin_ns: np.ndarray, base_ns: np.ndarray) -> Commands:
        """What takes hold at `begin_ns` and is due from `base_ns` on, int64 [M] both."""
        _, _, order, points = self.columns()
        first = np.concatenate([[0], np.cumsum(points)])
        due = np.array(self.due, np.int64) + np.repeat(base_ns, points)
        return Commands(joints, begin_ns, order, first, due, np.array(self.positions).reshape(-1, len(joints)))


def commanded(lanes: Sequence[Commands], ticks_ns: np.ndarray, joints: int) -> tuple[np.ndarray, np.ndarray]:
    """Commanded positions at ticks, int64 [T] ascending: (float64 [T, joints], bool [T, joints] whether known).

    A command exactly at a tick belongs to it. Before a joint's first command its value is that of its first point and
    not known; a joint that is never commanded is NaN.
    """
    values = np.full((len(ticks_ns), joints), np.nan)
    known = np.zeros((len(ticks_ns), joints), bool)
    lanes = [lane for lane in lanes if len(lane.begin_ns)]
    sets = {lane.joints for lane in lanes}
    if sum(len(group) for group in sets) > len(set().union(*sets)):  # overlapping sets: one joint at a time
        sets = {(joint,) for group in sets for joint in group}
    for group in sorted(sets):
        lane = _from_first(_joined([lane.of(group) for lane in lanes if set(group) <= set(lane.joints)]))
        if not len(lane.begin_ns):
            continue
        columns = list(group)
        values[:, columns], begin = _lane(lane, ticks_ns)
        known[begin:, columns] = True
    return values, known


def _joined(lanes: list[Commands]) -> Commands:
    """Commands of the same joints as one, in the order in which they take hold."""
    points = np.concatenate([[0], *(np.diff(lane.first) for lane in lanes)])
    columns = {
        name: np.concatenate([getattr(lane, name) for lane in lanes])
        for name in ("begin_ns", "order", "due_ns", "positions")
    }
    joined = Commands(lanes[0].joints, first=np.cumsum(points), **columns)
    return joined.take(np.lexsort((joined.order, joined.begin_ns)))


def _from_first(lane: Commands) -> Commands:
    """From the first command that leads somewhere on: before it there is nowhere to hold."""
    leads = np.flatnonzero(~_holding(lane))
    first = leads[0] if len(leads) else len(lane.begin_ns)
    return lane.take(np.arange(first, len(lane.begin_ns))) if first else lane


def _holding(lane: Commands) -> np.ndarray:
    """bool [M], True for commands to stay."""
    return np.isnan(lane.positions[lane.first[:-1], 0])


def _lane(lane: Commands, ticks: np.ndarray) -> tuple[np.ndarray, int]:
    edges = np.searchsorted(ticks, lane.begin_ns, side="left")
    stops = np.append(edges[1:], len(ticks))
    out = np.empty((len(ticks), len(lane.joints)))
    out[: edges[0]] = lane.positions[0]
    held = _holding(lane)
    if len(lane.due_ns) == len(lane.begin_ns) and (lane.due_ns <= lane.begin_ns).all() and not held.any():
        at = np.searchsorted(lane.begin_ns, ticks[edges[0] :], side="right") - 1
        out[edges[0] :] = lane.positions[at]
        return out, int(edges[0])
    current = lane.positions[0]
    for i, begin in enumerate(lane.begin_ns):
        points = slice(lane.first[i], lane.first[i + 1])
        knots, places = _knots(lane.due_ns[points] - begin, lane.positions[points], current)
        if held[i]:
            knots, places = np.zeros(1), current[None]
        out[edges[i] : stops[i]] = _straight(ticks[edges[i] : stops[i]] - begin, knots, places)
        if i + 1 < len(edges):
            current = _straight(lane.begin_ns[i + 1 : i + 2] - begin, knots, places)[0]
    return out, int(edges[0])


def _knots(due: np.ndarray, positions: np.ndarray, current: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Times in ns from a command's begin [K], positions [K, n]; a bridge from `current` until the first is due."""
    if due[0] <= 0:
        return due, positions
    return np.concatenate([[0], due]), np.concatenate([current[None], positions])


def _straight(times: np.ndarray, knots: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Linear interpolation of points [K, n] at times [M]; the ends are held."""
    if not len(times):
        return np.empty((0, points.shape[1]))
    return np.stack([np.interp(times, knots, column) for column in points.T], axis=1)
