"""Motion that never breaks a joint's limits of position, velocity and acceleration, whatever it is told to follow.

A motion is a row of states on a grid of equal time steps. Between two states the acceleration is constant, so the
limits hold between the grid points too, and a cubic through positions and velocities is the same curve.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from pi0_ros.robot import Robot


@dataclass(frozen=True)
class Limits:
    """Per joint, in message units (rad or m, per s, per s^2): float64 [J] each."""

    low: np.ndarray
    high: np.ndarray
    velocity: np.ndarray
    acceleration: np.ndarray
    braking: np.ndarray  # the acceleration of coming to rest, not below the other one

    def of(self, joints: np.ndarray) -> Limits:
        """The limits of some joints, by index [j]."""
        return Limits(*(getattr(self, field.name)[joints] for field in fields(self)))


def robot_limits(robot: Robot, velocity_scale: float = 1.0, acceleration_scale: float = 1.0) -> Limits:
    """The robot file's limits, velocity and acceleration times a scale in (0, 1]; braking keeps all of it."""
    position = np.array([joint.position for joint in robot.joints], dtype=np.float64)
    acceleration = np.array([joint.acceleration for joint in robot.joints])
    return Limits(
        low=position[:, 0].copy(),
        high=position[:, 1].copy(),
        velocity=velocity_scale * np.array([joint.velocity for joint in robot.joints]),
        acceleration=acceleration_scale * acceleration,
        braking=acceleration,
    )


class Limiter:
    """One step at a time from a state (position, velocity) towards a moving target, within `limits`.

    The state is kept so that the joint can always stop within its position limits: with h the step and a the
    largest acceleration, position + velocity * h / 2 + velocity^2 / (2 a) <= high (and the like below). Braking
    at a for a whole number of steps keeps that sum from growing, so a legal step always exists. A joint that
    starts outside its position limits, at rest, only ever moves back in.
    """

    def __init__(self, limits: Limits, step: float) -> None:
        """`step` in seconds."""
        self.limits, self.dt = limits, step
        self._a = limits.acceleration
        self._ah, self._bh = limits.acceleration * step, limits.braking * step
        # Following brakes a little less hard than it may, so that a target that moves as well is not overrun.
        self._soft = 0.8 * limits.acceleration
        # Gain of the last bit of following, 1/s: the largest at which braking from the curve below stays legal.
        self._gain = 1.5 / step / (1.0 + 0.75)

    def step(
        self, q: np.ndarray, v: np.ndarray, target: np.ndarray, target_velocity: np.ndarray, speed: float = 1.0
    ) -> tuple[np.ndarray, np.ndarray]:
        """The state one step later, as near to the target as the limits allow.

        Args:
            q, v: [J] position and velocity now.
            target, target_velocity: [J] where to be, and how fast to move, at the end of the step; finite.
            speed: in (0, 1], share of the velocity limits to use; a joint that is faster brakes to it.
        """
        h, limits = self.dt, self.limits
        target = np.minimum(np.maximum(target, limits.low), limits.high)
        most = limits.velocity * speed
        target_velocity = np.minimum(np.maximum(target_velocity, -most), most)
        # What is left to the target at the end of the step if the joint took up the target's velocity in it.
        left = target - q - (v + target_velocity) * (0.5 * h)
        # Speed relative to the target: proportional when near; else what can be braked away within what is left.
        size = np.abs(left)
        closing = np.minimum(
            self._gain * size, self._soft * (np.sqrt(0.25 * h * h + 2.0 * size / self._soft) - 0.5 * h)
        )
        wanted = target_velocity + np.copysign(closing, left)
        return self._move(q, v, np.minimum(np.maximum(wanted, -most), most), self._ah)

    def brake(self, q: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The state one step later when coming to rest as fast as is allowed: [J], [J]."""
        return self._move(q, v, np.zeros_like(v), self._bh)

    def _move(
        self, q: np.ndarray, v: np.ndarray, wanted: np.ndarray, change: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The step to the legal velocity nearest to `wanted`, at most by `change`."""
        h, limits, a = self.dt, self.limits, self._a
        high, low = np.maximum(limits.high, q), np.minimum(limits.low, q)
        # Largest w with (v + w) h / 2 + w h / 2 + w^2 / (2 a) <= room; room < 0 only by rounding.
        coast = q + v * (0.5 * h)
        up = a * np.maximum(np.sqrt(h * h + 2.0 * np.maximum(high - coast, 0.0) / a) - h, 0.0)
        down = a * np.maximum(np.sqrt(h * h + 2.0 * np.maximum(coast - low, 0.0) / a) - h, 0.0)
        top = np.minimum(np.minimum(v + change, limits.velocity), up)
        bottom = np.maximum(np.maximum(v - change, -limits.velocity), -down)
        w = np.minimum(np.maximum(wanted, bottom), top)
        return np.minimum(np.maximum(q + (v + w) * (0.5 * h), low), high), w
