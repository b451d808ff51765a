"""What a ros2_control joint_trajectory_controller does with the trajectories that it gets, without ROS.

The rules are those of ros2_controllers in Jazzy and Kilted with `interpolate_from_desired_state: true`: a new
trajectory replaces the old one at once; stamp 0 means now; a trajectory whose end is past is refused; times from
start increase strictly; joint names must match; segments are linear between positions and cubic where both ends
have velocities; a first point ahead is approached from the last command, a first point past is entered where it
is now, without a bridge; after the last point the arm holds it. Times are integer nanoseconds, angles radians.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

AT_REST = 1.2e-7  # rad/s, the tolerance of the real controller (float32 epsilon)


class CommandError(ValueError):
    """A command that the controller refuses; the message is one line and names what was found."""


@dataclass(frozen=True)
class Point:
    """One trajectory point; velocities are empty or one per joint."""

    time_from_start: int  # ns
    positions: Sequence[float]
    velocities: Sequence[float] = ()
    accelerations: Sequence[float] = ()


class TrajectoryController:
    """Follows one trajectory of `joints`, beginning by holding `positions` [J]."""

    def __init__(self, joints: Sequence[str], positions: np.ndarray) -> None:
        self.joints = tuple(joints)
        self.hold(positions)

    def hold(self, positions: Sequence[float]) -> None:
        """Command `positions` [J] at once and keep them (what a forward position controller does).

        Raises:
            CommandError: not one finite number per joint; the old command stays.
        """
        self._times = np.zeros(1, np.int64)  # [K] ns
        self._positions = self._row(positions, "positions")[None]  # [K, J]
        self._velocities = np.full((1, len(self.joints)), np.nan)  # [K, J]; NaN where a point has none

    def accept(self, joints: Sequence[str], points: Sequence[Point], stamp: int, now: int) -> None:
        """Follow a new trajectory from `now` on; `stamp` 0 starts it now, else points are timed from the stamp.

        Raises:
            CommandError: the trajectory breaks a rule; the one that was followed goes on.
        """
        if sorted(joints) != sorted(self.joints):
            raise CommandError(f"joint names {list(joints)} are not the controller's {list(self.joints)}")
        if not points:
            raise CommandError("empty trajectory")
        order = [list(joints).index(name) for name in self.joints]
        positions = np.stack([self._row(point.positions, "positions")[order] for point in points])
        velocities = np.full_like(positions, np.nan)
        for row, point in zip(velocities, points, strict=True):
            if len(point.velocities):
                row[:] = self._row(point.velocities, "velocities")[order]
            if len(point.accelerations):
                raise CommandError("accelerations given, this controller takes positions and velocities")
        times = np.array([point.time_from_start for point in points], np.int64)
        if times[0] < 0 or (np.diff(times) <= 0).any():
            raise CommandError(f"time_from_start must increase strictly, found {(times / 1e9).tolist()} s")
        if (np.abs(velocities[-1]) > AT_REST).any():
            raise CommandError(f"the last point must be at rest, found velocities {velocities[-1].tolist()}")
        times = times + (stamp or now)
        if times[-1] < now:
            raise CommandError(f"the trajectory ended {(now - times[-1]) / 1e9:.3f} s ago")
        if times[0] > now:
            position, velocity = self.sample(now)
            times = np.concatenate([[now], times])
            positions = np.concatenate([position[None], positions])
            velocities = np.concatenate([velocity[None], velocities])
        self._times, self._positions, self._velocities = times, positions, velocities

    def sample(self, now: int) -> tuple[np.ndarray, np.ndarray]:
        """Position [J] and velocity [J] commanded at `now`."""
        times, last = self._times, len(self._times) - 1
        index = int(np.searchsorted(times, now, side="right")) - 1
        if index < 0 or index >= last:
            return self._positions[max(0, min(index, last))].copy(), np.zeros(len(self.joints))
        (p0, p1), (v0, v1) = self._positions[index : index + 2], self._velocities[index : index + 2]
        length = (times[index + 1] - times[index]) / 1e9  # s
        u = (now - times[index]) / 1e9 / length
        if np.isnan(v0).any() or np.isnan(v1).any():
            return p0 + (p1 - p0) * u, (p1 - p0) / length
        # Cubic Hermite segment: positions and velocities agree at both ends.
        d, m0, m1 = p1 - p0, v0 * length, v1 * length
        a, b = m0 + m1 - 2 * d, 3 * d - 2 * m0 - m1
        return p0 + u * (m0 + u * (b + u * a)), (m0 + u * (2 * b + 3 * u * a)) / length

    def _row(self, values: Sequence[float], what: str) -> np.ndarray:
        row = np.array(values, dtype=np.float64)
        if row.shape != (len(self.joints),):
            raise CommandError(f"{what}: {row.size} values for {len(self.joints)} joints")
        if not np.isfinite(row).all():
            raise CommandError(f"{what}: not finite, found {row.tolist()}")
        return row
