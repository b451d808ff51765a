"""Whether an arm stands still although chunks move it: an emergency stop, a controller that is off, an obstacle.

A policy plans from where it sees the arm, so the command of an arm that cannot move never gets far from it, and a limit
of that distance alone would not notice. When such an arm is released it would move at once.
"""

from __future__ import annotations

import numpy as np

from pi0_ros.ros.judging import SECOND

SPAN = 1.0  # s; so long an arm may take to follow
PAUSE = 0.2  # s; without a look for longer, it begins anew
AHEAD = 0.1  # rad; how far chunks lead away from where a joint is, a second later, at least
GAP = 0.03  # rad; the mean distance from the command, and the way that it went in that time, at least
FAR = 0.1  # rad; the way of a command, wherever it led, that no joint can leave alone
SHARE = 0.2  # of what chunks had before them: less is standing still
OWN = 0.25  # of the way of its command: more is following, however little was commanded
NOTHING = 0.1  # of that way, in that second and the next: less is not following at all


class Stall:
    """Watches joints that follow chunks, in spans of a second.

    A joint stands still when all the time chunks lead away from it, to the same side, and its command goes a way, while
    it goes nearly nowhere; or when its command goes far, to whatever side, and it does not follow in the next second
    either. One that waits at its goal with a steady error has nothing before it; one whose command is slow goes as far
    as that.

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
        self._before: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None

    def watch(
        self, now: int, measured: np.ndarray, measured_at: np.ndarray, commanded: np.ndarray, ahead: np.ndarray
    ) -> int | None:
        """At each tick: positions [J] and when they were measured, ns; the command [J], and where the chunk is a second
        later [J].

        Returns the joint that stands still, if one does.
        """
        looked = np.stack([measured, commanded, ahead - measured])
        if self._last < 0 or not self._last < now <= self._last + PAUSE * SECOND:
            self._before = None
            self._begin_span(now, looked)
            return None
        seconds, self._last = (now - self._last) / SECOND, now
        self._gaps += np.abs(measured - commanded) * seconds
        self._low, self._high = np.minimum(self._low, looked), np.maximum(self._high, looked)
        if now - self._begin < SPAN * SECOND:
            return None
        (went, told, _), unit = self._high - self._low, self._unit
        led = np.maximum(self._low[2], -self._high[2])  # negative where chunks led to both sides
        mean_gap = self._gaps * SECOND / (now - self._begin)
        stuck = (led > AHEAD * unit) & (mean_gap > GAP * unit) & (told > GAP * unit)
        stuck &= (went < SHARE * led) & (went < OWN * told)
        if self._before is not None:
            far, low, high = self._before
            both = np.maximum(high, self._high[0]) - np.minimum(low, self._low[0])
            stuck |= (far > FAR * unit) & (both < NOTHING * far)
        stuck &= self._arm & (measured_at > (self._begin + now) // 2)  # joint states may be rare
        self._before = told, self._low[0], self._high[0]
        self._begin_span(now, looked)
        return int(np.argmax(stuck * told)) if stuck.any() else None

    def _begin_span(self, now: int, looked: np.ndarray) -> None:
        self._begin = self._last = now
        self._low = self._high = looked  # of what is measured, commanded, and before it
        self._gaps = np.zeros(looked.shape[1])  # rad s
