"""Whether an arm stands still although chunks move it: an emergency stop, a controller that is off, an obstacle.

A policy plans from where it sees the arm, so the command of an arm that cannot move never gets far from it, and a limit
of that distance alone would not notice. When such an arm is released it would move at once.
"""

from __future__ import annotations

import numpy as np

from pi0_ros.ros.judging import SECOND

SPAN = 1.0  # s; so long an arm may take to follow
PAUSE = 0.2  # s; a longer time between two looks, when nothing is played, does not count
LAPSE = 3.0  # s; after an even longer one it begins anew
AHEAD = 0.1  # rad; how far chunks lead away from where a joint is, a second later, at least
FURTHER = 0.08  # rad; how far they lead beyond its command at some time: one that waits is not led on
GAP = 0.03  # rad; the mean distance from the command, at least
TOLD = 0.06  # rad; the way that the command went in that time, at least: friction holds a joint back for less
FAR = 0.1  # rad; the way of a command in each of two spans, wherever it led, that no joint can leave alone
SHARE = 0.2  # of what chunks had before them: less is standing still
OWN = 0.25  # of the way of its command: more is following, however little was commanded
NOTHING = 0.1  # of that way: less is not following at all


class Stall:
    """Watches joints that follow chunks, in spans of a second.

    A joint stands still when all the time chunks lead away from it, to the same side, at some time from its command as
    well, and the command goes a way, while the joint goes nearly nowhere; or when in two spans its command goes far, to
    whatever side, and it does not follow. One that waits at its goal with a steady error, by a load or what it presses
    on, is not led on; one whose command is slow goes as far as that.

    Args:
        arm: bool [J], the joints that count (a gripper may close on what it holds).
        unit: [J], what a joint has for a radian.
    """

    def __init__(self, arm: np.ndarray, unit: np.ndarray) -> None:
        self._arm, self._unit = arm, unit
        self.begin_anew()

    def begin_anew(self) -> None:
        """The arm was stopped."""
        self._last = -1  # ns
        self._before: tuple[np.ndarray, ...] | None = None

    def watch(
        self,
        now: int,
        measured: np.ndarray,
        measured_at: np.ndarray,
        commanded: np.ndarray,
        ahead: np.ndarray,
    ) -> int | None:
        """At each tick that follows a chunk: positions [J] and when they were measured, ns; the command [J], and where
        the chunk is a second later [J].

        Returns the joint that stands still, if one does.
        """
        looked = np.stack([measured, commanded, ahead - measured, ahead - commanded])
        if self._last < 0 or not self._last < now <= self._last + LAPSE * SECOND:
            self.begin_anew()
            self._begin_span(now, looked)
            return None
        seconds, self._last = (now - self._last) / SECOND, now
        if seconds > PAUSE:
            return None
        self._watched += seconds
        if self._watched < SPAN / 2:
            self._middle = now
        self._gaps += np.abs(measured - commanded) * seconds
        self._low, self._high = np.minimum(self._low, looked), np.maximum(self._high, looked)
        if self._watched < SPAN:
            return None
        (went, told, _, _), unit = self._high - self._low, self._unit
        led = np.maximum(self._low[2], -self._high[2])  # negative where chunks led to both sides
        further = np.where(self._low[2] > 0, self._high[3], -self._low[3])
        stuck = (led > AHEAD * unit) & (further > FURTHER * unit) & (told > TOLD * unit)
        stuck &= (self._gaps > GAP * unit * self._watched) & (went < SHARE * led) & (went < OWN * told)
        if self._before is not None:
            far, low, high = self._before
            both, far = np.maximum(high, self._high[0]) - np.minimum(low, self._low[0]), np.minimum(far, told)
            stuck |= (far > FAR * unit) & (both < NOTHING * far)
        stuck &= self._arm & (measured_at > self._middle)  # joint states may be rare
        self._before = told, self._low[0], self._high[0]
        self._begin_span(now, looked)
        return int(np.argmax(stuck * told)) if stuck.any() else None

    def _begin_span(self, now: int, looked: np.ndarray) -> None:
        self._middle = self._last = now
        self._watched = 0.0  # s
        self._low = self._high = looked  # of what is measured, commanded, and what is before either
        self._gaps = np.zeros(looked.shape[1])  # rad s
