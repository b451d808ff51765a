"""Whether an arm stands still although chunks move it: an emergency stop, a controller that is off, an obstacle.

A policy plans from where it sees the arm, so the command of an arm that cannot move never gets far from it, and a limit
of that distance alone would not notice. When such an arm is released it would move at once.
"""

from __future__ import annotations

import numpy as np

from pi0_ros.ros.playback import SECOND

SPAN = 1.0  # s; so long an arm may take to follow
PAUSE = 0.2  # s; without a look for longer, it begins anew
MEANT = 0.1  # rad; the way that chunks meant in that time, at least
GAP = 0.03  # rad; the mean distance from the command, at least
SHARE = 0.2  # of the way that was meant: less is standing still


class Stall:
    """Watches joints that follow chunks, in spans of a second.

    Args:
        arm: bool [J], the joints that count (a gripper may close on what it holds).
        unit: [J], what a joint has for a radian.
    """

    def __init__(self, arm: np.ndarray, unit: np.ndarray) -> None:
        self._arm, self._unit = arm, unit
        self.begin_anew()

    def begin_anew(self) -> None:
        """Nothing is followed, or the arm was not seen."""
        self._last = -1  # ns

    def watch(self, now: int, measured: np.ndarray, commanded: np.ndarray, meant: np.ndarray) -> int | None:
        """At each tick: positions [J], and the velocity [J] that the chunk has now, no higher than the limits.

        Returns the joint that stands still, if one does.
        """
        if self._last < 0 or not self._last < now <= self._last + PAUSE * SECOND:
            self._begin, self._last, self._low, self._high = now, now, measured.copy(), measured.copy()
            self._way, self._gaps = np.zeros(len(measured)), np.zeros(len(measured))
            return None
        seconds, self._last = (now - self._last) / SECOND, now
        self._way += meant * seconds
        self._gaps += np.abs(measured - commanded) * seconds
        self._low, self._high = np.minimum(self._low, measured), np.maximum(self._high, measured)
        if now - self._begin < SPAN * SECOND:
            return None
        way, went = np.abs(self._way), self._high - self._low
        mean_gap = self._gaps * SECOND / (now - self._begin)
        self.begin_anew()
        stuck = self._arm & (way > MEANT * self._unit) & (mean_gap > GAP * self._unit) & (went < SHARE * way)
        return int(np.argmax(stuck * way)) if stuck.any() else None
