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
SETTLED = 0.1  # seconds after which a chunk that the player does not name as its own was lost or refused
REMEMBERED = 32  # published chunks
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


@dataclass(frozen=True)
class Committed:
    """What the arm does while a chunk is computed: float64 [d, J], d from 1 to H - 1, and what its chunk would do then:
    float64 [n, J], nothing of a chunk for another prompt. In steps of the chunk's dt from the observation on."""

    executed: np.ndarray
    following: np.ndarray


class Handover:
    """The newest chunk and the newest player status, seen together."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._status: PlayerStatus | None = None
        self._heard = 0
        self._chunks: deque[Published] = deque(maxlen=REMEMBERED)  # of the present epoch, oldest first
        self._doubted = -1  # of the chunks up to this one, those that the player does not name do not count
        self._delays: deque[tuple[tuple[int, int], float]] = deque(maxlen=HANDOVERS)

    @property
    def _last(self) -> Published | None:
        return self._chunks[-1] if self._chunks else None

    def heard(self, status: PlayerStatus, now: int) -> None:
        """The player has spoken, at `now` (ns)."""
        key = (status.epoch, status.sequence)
        with self._lock:
            before, self._status, self._heard = self._status, status, now
            if before is not None and status.chunks_refused > before.chunks_refused:
                self._doubted = status.refused_sequence if status.newest_refused else self._doubted
            known = self._delays and self._delays[-1][0] == key
            # A chunk so late that the arm must approach it was taken over too: left out, it would happen again.
            if status.state in MOVING and not known and math.isfinite(status.handover_delay):
                self._delays.append((key, status.handover_delay))

    def published(self, chunk: Published) -> None:
        """A chunk went out."""
        with self._lock:
            self._chunks.append(chunk)

    def forget(self) -> None:
        """The last chunk is void: new epoch. Delays stay, they are the machine's and not the chunk's."""
        with self._lock:
            self._chunks.clear()

    def forget_all(self) -> None:
        """The clock was set back, or a new activation begins."""
        with self._lock:
            self._status, self._doubted = None, -1
            self._chunks.clear()
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

    def committed(self, at: int, now: int, epoch: int, prompt: str) -> Committed | None:
        """What the player will execute from `at` (ns) until the chunk observed then takes over; it is `now`.

        None when that is not known: no hand-over was seen yet, no chunk of this epoch went out, the player is silent,
        or does anything but play one of them.
        """
        delay = self.delay()
        with self._lock:
            status, heard, chunk = self._status, self._heard, self._played(epoch)
        if delay < 1 or chunk is None or status.state != PlayerStatus.PLAYING or abs(now - heard) > SILENCE * SECOND:
            return None
        rows = actions_from(chunk.actions, chunk.observed, chunk.dt, at, len(chunk.actions))
        # It hands over between two actions, on its way to the next: that one must stand, or there is a step.
        count = min(delay + 1, len(chunk.actions) - 1, len(rows))
        return Committed(rows[:count], rows[count:] if chunk.prompt == prompt else rows[:0]) if count else None

    def _played(self, epoch: int) -> Published | None:
        """The chunk that moves the arm, by the player's own word; newer ones count until it has had time to say so."""
        status = self._status
        if status is None or status.epoch != epoch:
            return None
        spoken = stamp_ns(status.header.stamp)
        for chunk in reversed(self._chunks):
            if chunk.epoch == epoch and (
                chunk.sequence == status.sequence
                or (
                    chunk.sequence > max(status.sequence, self._doubted) and spoken - chunk.published < SETTLED * SECOND
                )
            ):
                return chunk
        return None
