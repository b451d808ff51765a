"""Whether an arm that is commanded to rest was moved by others: by hand, by another program, by a simulator's reset."""

from __future__ import annotations

import numpy as np

from pi0_ros.ros.judging import SECOND

SETTLING = 1.0  # s; so long after its command came to rest an arm catches up, swings and sags by itself
GIVE = 0.05  # rad; by so much a joint at rest may change its place by itself
STANDING = 0.2  # s; within these an arm that goes on by more than CREEP rad is on its way
CREEP = 0.005
HABIT = 5.0  # s; what an arm did for so long under way is its way


class Rest:
    """Watches joints at rest.

    An arm is never quite where it is commanded: it lags behind, and at rest it sags by its weight; commanding where it
    sags to would let it sag again. So what counts is the place where a joint settled, and until it has, that it comes
    no further away from its command than when it was last seen under way.

    Args:
        arm: bool [J], the joints that count (a gripper may close on what it holds).
        far: [J], how far from its command a joint may settle.
        unit: [J], what a joint has for a radian.

    Attributes:
        moved: somebody moved the arm; so it stays until the arm is commanded anew.
        on_its_way: the arm did not stand still yet since its command came to rest; for SETTLING seconds at most.
        stayed: bool [J], the joints that are not known to have left the place where they settled.
    """

    def __init__(self, arm: np.ndarray, far: np.ndarray, unit: np.ndarray) -> None:
        self._arm, self._far, self._give, self._creep = arm, far, GIVE * unit, CREEP * unit
        self._gap = np.zeros(len(arm))  # from the command, as it was last seen while commands moved the arm
        self._usual, self._seen = np.zeros(len(arm)), -1  # the same over the last seconds; ns
        self.begin_anew()

    def begin_anew(self) -> None:
        """Commands move the arm."""
        self._since = -1  # ns
        self._place: np.ndarray | None = None  # [J], where it settled
        self._stands: tuple[np.ndarray, int] | None = None  # [J], and ns since when it is there
        self.on_its_way = True
        self.moved = False
        self.stayed = np.ones(len(self._arm), bool)

    def lags(self, now: int, measured: np.ndarray, commanded: np.ndarray) -> None:
        """What was measured at `now` (ns) while commands move the arm: positions [J]."""
        self._gap = np.abs(measured - commanded)
        seconds, self._seen = max(now - self._seen, 0) / SECOND, now
        self._usual += (self._gap - self._usual) * min(seconds, 0.1) / HABIT

    def watch(self, now: int, measured: np.ndarray, commanded: np.ndarray) -> None:
        """What was measured at `now` (ns) while the command rests: positions [J]."""
        if not 0 <= self._since <= now:
            self._since = now
        gap, settled = np.abs(measured - commanded), now - self._since > SETTLING * SECOND
        if self._stands is None or (np.abs(measured - self._stands[0]) > self._creep)[self._arm].any():
            self._stands = measured.copy(), now
        if settled or now - self._stands[1] > STANDING * SECOND:
            self.on_its_way = False
        if self._place is None:
            away = gap > self._gap + self._give
            if settled:
                self._place = measured.copy()
        else:
            self.stayed = np.abs(measured - self._place) <= self._give
            away = ~self.stayed | (gap > self._far)
        self.moved = self.moved or bool((away & self._arm).any())

    def off(self, measured: np.ndarray, commanded: np.ndarray) -> bool:
        """Whether the arm is further from its command than it usually lags and sags, and may move by itself."""
        return bool(((np.abs(measured - commanded) > self._usual + self._give) & self._arm).any())

    def far(self, measured: np.ndarray, commanded: np.ndarray) -> bool:
        """Whether the arm is too far from its command to go on from there, moved or only late."""
        return bool(((np.abs(measured - commanded) > self._far) & self._arm).any())
