"""Where the arm is, as the joint states tell the player: joint by joint the newest, and for how long that counts."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from pi0_ros.robot import Robot
from pi0_ros.ros.judging import SECOND
from pi0_ros.ros.limiter import Limits
from pi0_ros.ros.playback import joint_index

FUTURE_STATE = 0.5  # s; joint states stamped further ahead of the clock are from another clock


class Proprioception:
    """Measured positions, put together from messages of some joints or all, in any order.

    Attributes:
        positions: float64 [J], NaN where a joint was never seen.
        at: int64 [J], when each was measured, ns; -1: never, or not since a pause.
    """

    def __init__(self, robot: Robot, limits: Limits) -> None:
        self._names, self._limits, self._max_age = robot.joint_names, limits, robot.state.max_age
        self.positions = np.full(len(self._names), np.nan)
        self.at = np.full(len(self._names), -1, dtype=np.int64)
        self._topics, self._came = robot.state.topics, False
        self._note = ""  # what may be the reason where they are missing
        self._noted: set[int] = set()  # joints that it is about; those of other drivers say nothing of it

    def take(self, names: Sequence[str], positions: Sequence[float], stamp: int, now: int) -> bool:
        """Take in a message; whether it says anything. Left out, lest they become what is held, are positions that
        cannot be: not finite, or further outside a joint's limits than these are apart."""
        self._came = True
        if stamp - now > FUTURE_STATE * SECOND:
            self._note = f"; they are stamped {(stamp - now) / SECOND:.0f} s ahead of this node's clock"
            return False
        here, mine = joint_index(names, self._names)
        if not len(mine) or int(here.max()) >= len(positions):
            return False
        values = np.asarray(positions, dtype=np.float64)[here]
        low, high = self._limits.low[mine], self._limits.high[mine]
        good = (values >= 2 * low - high) & (values <= 2 * high - low)  # false for NaN
        self.positions[mine[good]] = values[good]
        self.at[mine[good]] = min(stamp, now)  # a clock ahead of ours must not make them last longer
        late = (now - stamp) / SECOND
        if not self._noted or self._noted.intersection(mine.tolist()):
            self._note, self._noted = "", set()
        if not good.all():
            self._noted = set(mine[~good].tolist())
            worst = int(np.argmin(good))
            limits = f"limits of {low[worst]:g} to {high[worst]:g}"
            value = f"{self._names[mine[worst]]!r} reads {values[worst]:.4g}"
            self._note = f"; {value}, which cannot be with {limits}: other units (degrees?)"
        elif late > self._max_age and not self._noted:
            self._note = f"; they come, stamped {late:.2g} s before this node's clock"
        return True

    def forget(self, until: int | None = None) -> None:
        """Nothing measured up to `until` (ns), or ever, counts any more."""
        self.at[self.at <= until if until is not None else slice(None)] = -1

    def age(self, now: int) -> float:
        """Of the oldest joint state, s; infinite while one is missing."""
        oldest = int(self.at.min())
        return (now - oldest) / SECOND if oldest >= 0 else math.inf

    def fault(self, now: int) -> str:
        """Why they cannot be relied on, or ""."""
        old = (self.at < 0) | (now - self.at > self._max_age * SECOND)
        if not old.any():
            return ""
        if not self._came:
            return f"no joint state yet on {', '.join(self._topics)}"
        missing = [name for name, late in zip(self._names, old, strict=True) if late]
        which = "" if len(missing) == len(old) else f" of {', '.join(missing)}"
        return f"no joint state{which} for more than {self._max_age:g} s{self._note}"
