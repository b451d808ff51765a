"""Commanded motion of a group of joints, on a grid of control periods counted from 0.

`Stream` goes one period at a time (position commands); `Window` plans a short way ahead and always ends at rest
(trajectory commands): when nobody plans again, the joints stop by themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pi0_ros.ros.limiter import Limiter, Limits

# (grid index) -> position and velocity to be at, [J] of all joints, or None: come to rest.
Guide = Callable[[int], "tuple[np.ndarray, np.ndarray] | None"]

CATCH_UP = 5  # periods made up for at most when ticks come late; what is lost beyond is a pause, not a jump


@dataclass(frozen=True)
class Plan:
    """A trajectory for the joints of `Player.window`: [n] times in ns, [n, j] positions and velocities."""

    times: np.ndarray
    positions: np.ndarray
    velocities: np.ndarray


@dataclass(frozen=True)
class Commands:
    """What to send now."""

    stream: bool  # the position of `Player.commanded` to the joints of `Player.stream`
    plan: Plan | None
    begins: bool = False  # a motion, after a hold or a stop


class Stream:
    """Joints that get a position each period."""

    def __init__(self, limits: Limits, joints: np.ndarray, step: float) -> None:
        """`limits` of all joints, `joints` the indices of this group, `step` the control period in s."""
        self.joints = joints
        self._limiter = Limiter(limits.of(joints), step)
        self.q = np.zeros(len(joints))
        self.v = np.zeros(len(joints))

    def seed(self, position: np.ndarray) -> None:
        """Start at rest at `position` [J]."""
        self.q, self.v = position[self.joints], np.zeros(len(self.joints))

    def advance(self, index: int, steps: int, guide: Guide, speed: float) -> None:
        """Move on to grid `index`, `steps` after the last one."""
        steps = min(steps, CATCH_UP) if len(self.joints) else 0
        for k in range(index - steps + 1, index + 1):
            self.q, self.v = step(self._limiter, self.joints, self.q, self.v, guide(k), speed)


class Window:
    """Joints that get a trajectory: the next `window` periods and then to rest, from `lead` periods ahead on."""

    def __init__(self, limits: Limits, joints: np.ndarray, step: float, window: int, lead: int) -> None:
        """`limits` of all joints, `joints` the indices of this group, `step` in s, `window` and `lead` in periods."""
        self.joints = joints
        self._limiter = Limiter(limits.of(joints), step)
        self._window, self._lead = window, lead
        self._first = self._now = 0  # grid index of the plan's first row, and of now
        # [n, j] each; the last row is at rest
        self.positions = np.zeros((1, len(joints)))
        self.velocities = np.zeros((1, len(joints)))

    def seed(self, position: np.ndarray) -> None:
        """Be at rest at `position` [J], with nothing planned."""
        self._first = self._now
        self.positions, self.velocities = position[None, self.joints], np.zeros((1, len(self.joints)))

    def advance(self, index: int) -> None:
        """Now is grid `index`; what was planned is what has been commanded."""
        self._now = index

    def state(self, ahead: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """[j] position and velocity `ahead` periods from now."""
        row = min(max(self._now + ahead - self._first, 0), len(self.positions) - 1)
        return self.positions[row], self.velocities[row]

    def plan(self, guide: Guide, speed: float) -> int:
        """Plan again from `lead` periods ahead of now; returns the grid index of the new first row."""
        first = self._now + self._lead
        committed = [self.state(ahead) for ahead in range(self._lead)]
        q, v = self.state(self._lead)
        states = [(q, v)]
        for k in range(first + 1, first + 1 + self._window):
            q, v = step(self._limiter, self.joints, q, v, guide(k), speed)
            states.append((q, v))
        while v.any():
            q, v = self._limiter.brake(q, v)
            states.append((q, v))
        self.positions = np.array([q for q, _ in committed + states])
        self.velocities = np.array([v for _, v in committed + states])
        self._first = self._now
        return first

    def sent(self, first: int) -> tuple[np.ndarray, np.ndarray]:
        """[n, j] positions and velocities of the plan from grid `first` on."""
        return self.positions[first - self._first :], self.velocities[first - self._first :]


def step(
    limiter: Limiter, joints: np.ndarray, q: np.ndarray, v: np.ndarray, goal: tuple | None, speed: float
) -> tuple[np.ndarray, np.ndarray]:
    """One limited step of a group of joints towards a goal of all joints, or to rest without one."""
    if goal is None:
        return limiter.brake(q, v)
    return limiter.step(q, v, goal[0][joints], goal[1][joints], speed)
