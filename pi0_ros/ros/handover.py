"""What the player does with the chunks: how much it has left, and what it will have executed by the next one.

Written by the executor's thread (status) and the worker's (published chunks), read by both; all under `_lock`.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from dataclasses import dataclass

import numpy as np

from pi0_ros.msg import PlayerStatus
from pi0_ros.ros.conversions import SECOND, actions_from, stamp_ns

HANDOVERS = 10  # the delay is the largest of so many hand-overs: a slow one is forgotten after as many
GRACE = 0.5  # seconds in which a published chunk counts before the player has said that it plays it
SILENCE = 1.0  # seconds after which a player that said that it moves, and no more, counts as gone
EXECUTING = (PlayerStatus.PLAYING, PlayerStatus.DRY_RUN)  # a dry run is asked for what a real one would be
MOVING = (PlayerStatus.PLAYING, PlayerStatus.APPROACHING, PlayerStatus.DRY_RUN)


@dataclass(frozen=True)
class Published:
    """The chunk that was published last."""

    sequence: int
    epoch: int
    prompt: str
    observed: int  # ns; the time of action 0
    published: int  # ns
    actions: np.ndarray  # float64 [H, J]
    dt: float


class Handover:
    """The newest chunk and the newest player status, seen together."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._status: PlayerStatus | None = None
        self._heard = 0
        self._last: Published | None = None
        self._delays: deque[tuple[tuple[int, int], float]] = deque(maxlen=HANDOVERS)

    def heard(self, status: PlayerStatus, now: int) -> None:
        """The player has spoken, at `now` (ns)."""
        key = (status.epoch, status.sequence)
        with self._lock:
            self._status, self._heard = status, now
            known = self._delays and self._delays[-1][0] == key
            if status.state in EXECUTING and not known and math.isfinite(status.handover_delay):
                self._delays.append((key, status.handover_delay))

    def published(self, chunk: Published) -> None:
        """A chunk went out."""
        with self._lock:
            self._last = chunk

    def forget(self) -> None:
        """The last chunk is void: new epoch. Delays stay, they are the machine's and not the chunk's."""
        with self._lock:
            self._last = None

    def forget_all(self) -> None:
        """The clock was set back, or a new activation begins."""
        with self._lock:
            self._last = self._status = None
            self._delays.clear()

    def seconds_left(self, now: int) -> float | None:
        """Seconds until the player has nothing left; None while no player is heard."""
        with self._lock:
            status, heard, last = self._status, self._heard, self._last
        if status is None or (status.state in MOVING and not 0 <= now - heard <= SILENCE * SECOND):
            return None
        if last is not None and status.sequence != last.sequence and now - last.published < GRACE * SECOND:
            return (last.observed - now) / SECOND + (len(last.actions) - 1) * last.dt
        return max(0.0, status.seconds_left - max(0, now - stamp_ns(status.header.stamp)) / SECOND)

    def delay(self) -> int:
        """Whole actions that pass between an observation and the hand-over to its chunk; 0 before the first."""
        with self._lock:
            return math.ceil(max((delay for _, delay in self._delays), default=0.0) - 1e-6)

    def executed(self, at: int, epoch: int, prompt: str) -> np.ndarray | None:
        """float64 [d < H, J]: what the player will execute from `at` (ns) until the chunk observed then takes over.

        None when nothing is known: no chunk of this epoch and prompt before, or the player is not playing it.
        """
        delay = self.delay()
        with self._lock:
            status, last = self._status, self._last
        if delay < 1 or last is None or (last.epoch, last.prompt) != (epoch, prompt):
            return None
        if status is None or status.state not in EXECUTING or status.epoch != epoch:
            return None
        rows = actions_from(last.actions, last.observed, last.dt, at, min(delay, len(last.actions) - 1))
        return rows if len(rows) else None
