"""Whether an arm that is commanded to rest was moved by others: by hand, by another program, by a simulator's reset."""

from __future__ import annotations

import numpy as np

from pi0_ros.ros.playback import SECOND

SETTLING = 1.0  # s; so long after its command came to rest an arm sags or swings by itself
GIVE = 0.05  # rad; a settled joint that is further from where it settled was moved


class Rest:
    """Watches joints at rest.

    An arm is never quite where it is commanded, it sags by its weight; and commanding where it sags to would let it sag
    again. So a joint counts as moved when it leaves the place where it settled, and before that only when it is far
    from its command.

    Args:
        arm: bool [J], the joints that count (a gripper may close on what it holds).
        far: [J], how far from its command a joint that has not settled yet may be.
        unit: [J], what a joint has for a radian.
    """

    def __init__(self, arm: np.ndarray, far: np.ndarray, unit: np.ndarray) -> None:
        self._arm, self._far, self._give = arm, far, GIVE * unit
        self.begin_anew()

    def begin_anew(self) -> None:
        """Commands move the arm."""
        self._since = -1  # ns
        self._settled: np.ndarray | None = None  # [J]
        self.moved = False
        self.stayed = np.zeros(len(self._arm), bool)  # [J]: settled, and still there

    def watch(self, now: int, measured: np.ndarray, commanded: np.ndarray) -> None:
        """A moment of rest: `now` in ns, positions [J]. Once `moved`, it stays so until the arm is commanded anew."""
        if not 0 <= self._since <= now:
            self._since = now
        far = np.abs(measured - commanded) > self._far
        if self._settled is not None:
            self.stayed = np.abs(measured - self._settled) <= self._give
            far |= ~self.stayed
        elif now - self._since > SETTLING * SECOND:
            self._settled, self.stayed = measured.copy(), ~far
        self.moved = self.moved or bool((far & self._arm).any())
