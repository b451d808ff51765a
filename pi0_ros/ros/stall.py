"""Whether an arm stands still although chunks move it: an emergency stop, a controller that is off, an obstacle.

A policy plans from where it sees the arm, so the command of an arm that cannot move never gets far from it, and a limit
of that distance alone would not notice. When such an arm is released it would move at once.
"""

from __future__ import annotations

import numpy as np

from pi0_ros.ros.judging import SECOND

SPAN = 1.0  # s; so long an arm may take to follow
PAUSE = 0.2  # s; without a look for longer, it begins anew
MEANT = 0.1  # rad; the way that chunks meant in that time, and what they have before them a second later, at least
GAP = 0.03  # rad; the mean distance from the command, at least
SHARE = 0.2  # of the way that was meant: less is standing still
OWN = 0.5  # of the way of its command: more is following, however little was commanded


class Stall:
    """Watches joints that follow chunks, in spans of a second.

    A joint stands still when chunks meant it to go, and all the time lead away from it, while it went nearly nowhere.
    One that waits at its goal with a steady error has nothing before it; one whose command is slow goes as far as that.

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

    def watch(
        self,
        now: int,
        measured: np.ndarray,
        measured_at: np.ndarray,
        commanded: np.ndarray,
        meant: np.ndarray,
        ahead: np.ndarray,
    ) -> int | None:
        """At each tick: positions [J] and when they were measured, ns; the velocity [J] that the chunk has now, no
        higher than the limits, and where it is a second later [J].

        Returns the joint that stands still, if one does.
        """
        left, both = np.abs(ahead - measured), np.stack([measured, commanded])
        if self._last < 0 or not self._last < now <= self._last + PAUSE * SECOND:
            self._begin, self._last, self._left = now, now, left
            self._low = self._high = both
            self._way, self._gaps = np.zeros(len(measured)), np.zeros(len(measured))
            return None
        seconds, self._last = (now - self._last) / SECOND, now
        self._way += meant * seconds
        self._gaps += np.abs(measured - commanded) * seconds
        self._left = np.minimum(self._left, left)
        self._low, self._high = np.minimum(self._low, both), np.maximum(self._high, both)
        if now - self._begin < SPAN * SECOND:
            return None
        way, (went, told) = np.abs(self._way), self._high - self._low
        mean_gap = self._gaps * SECOND / (now - self._begin)
        seen = measured_at > (self._begin + now) // 2  # joint states may be rare
        self.begin_anew()
        stuck = self._arm & seen & (way > MEANT * self._unit) & (self._left > MEANT * self._unit)
        stuck &= (mean_gap > GAP * self._unit) & (went < SHARE * way) & (went < OWN * told)
        return int(np.argmax(stuck * way)) if stuck.any() else None
