"""What a chunk means at a time: sampling chunks, joining one to the next.

Pure numpy; times are nanoseconds of the node's clock. Action k of a chunk is meant for `stamp + k * dt`, so where a
chunk stands does not depend on how long it took to come.
"""

from __future__ import annotations

import math

import numpy as np

from pi0_ros.ros.judging import SECOND, Offer
from pi0_ros.ros.limiter import Limits

MOST_MEMBERS = 16  # chunks that an ensemble averages over


class TimedActions:
    """An accepted chunk: positions and velocities at any time.

    Before its first and after its last action it stands still there.
    """

    def __init__(self, offer: Offer, limits: Limits, interpolation: str) -> None:
        """`interpolation`: "linear", or "cubic" (Hermite through the actions with central differences as slopes)."""
        actions = offer.actions.reshape(offer.horizon, len(offer.joint_names))
        self.actions = np.clip(actions, limits.low, limits.high)  # [H, J]
        self.stamp, self.dt, self.sequence, self.epoch = offer.stamp, offer.dt, offer.sequence, offer.epoch
        self.last = offer.horizon - 1
        self.end = offer.stamp + round(self.last * offer.dt * SECOND)  # ns, time of the last action
        self._steps = np.diff(self.actions, axis=0)  # [H - 1, J]
        self._slopes = None
        if interpolation == "cubic" and self.last > 0:
            ends = np.concatenate([self._steps[:1], self._steps, self._steps[-1:]])
            self._slopes = 0.5 * (ends[:-1] + ends[1:])  # [H, J] per dt
        self._still = np.zeros(self.actions.shape[1])

    def past(self, time: int) -> float:
        """How many actions lie before `time`, with fraction; 0 when none does."""
        return max(0.0, (time - self.stamp) / SECOND / self.dt)

    def at(self, time: int) -> tuple[np.ndarray, np.ndarray]:
        """[J] position and [J] velocity at `time`."""
        x = (time - self.stamp) / SECOND / self.dt
        if x < 0.0 or x >= self.last:
            return self.actions[0 if x < 0.0 else self.last], self._still
        k = int(x)
        u, base, step = x - k, self.actions[k], self._steps[k]
        if self._slopes is None:
            return base + u * step, step / self.dt
        m0, m1 = self._slopes[k], self._slopes[k + 1]
        bend, twist = 3.0 * step - 2.0 * m0 - m1, m0 + m1 - 2.0 * step
        position = base + u * (m0 + u * (bend + u * twist))
        return position, (m0 + u * (2.0 * bend + 3.0 * u * twist)) / self.dt


class Playback:
    """The motion that the accepted chunks ask for.

    `handover` says how one chunk follows another:
        "blend": at the hand-over the difference to the motion so far, in position and velocity, is added to the new
            chunk and fades out within `blend_time` (cubic Hermite): no step, and after it the new chunk alone.
        "ensemble": the mean over all chunks that reach the time, with weights exp(-decay * i), i = 0 for the oldest
            (temporal ensembling: Zhao et al., "Learning Fine-Grained Bimanual Manipulation with Low-Cost Hardware",
            2023). A chunk's weight grows from its arrival and fades before its end, within `blend_time` each.
        "switch": the new chunk at once; the limiter alone smooths the step.
    """

    def __init__(self, fastest: np.ndarray, handover: str, blend_time: float, decay: float) -> None:
        """`fastest` [J]: the velocity limits."""
        joints, self._fastest = len(fastest), fastest
        self._handover, self._fade, self._decay = handover, max(1, round(blend_time * SECOND)), decay
        self._members: list[tuple[TimedActions, int]] = []  # oldest first, with the time of arrival
        self._joined = 0  # ns, when the offsets below were taken
        self._offset = np.zeros(joints)
        self._offset_velocity = np.zeros(joints)

    @property
    def chunk(self) -> TimedActions | None:
        """The newest chunk."""
        return self._members[-1][0] if self._members else None

    def clear(self) -> None:
        """Forget all chunks."""
        self._members = []
        self._no_offset()

    def push(self, chunk: TimedActions, at: int) -> None:
        """Take a chunk over at time `at`; call `join` after it where the motion must not step."""
        if self._handover != "ensemble":
            self._members = []
            self._no_offset()
        kept = [member for member in self._members if member[0].end > at]
        self._members = [*kept[-MOST_MEMBERS + 1 :], (chunk, at)]

    def alone(self) -> None:
        """Forget all chunks but the newest."""
        self._members = self._members[-1:]

    def join(self, at: int, position: np.ndarray, velocity: np.ndarray) -> None:
        """Let the motion pass through a state at time `at` and fade from there into the chunks: [J], [J]."""
        self._no_offset()
        if self._handover == "switch":
            return
        here, moving = self.at(at)
        # A chunk that jumps (a gripper that closes within one action) has a velocity there that nothing will ever have:
        # making up for it would begin with a move the other way, and keeping it up would lead beyond the jump's end.
        moving, velocity = (np.clip(v, -self._fastest, self._fastest) for v in (moving, velocity))
        self._joined = at
        self._offset, self._offset_velocity = position - here, velocity - moving

    def at(self, time: int) -> tuple[np.ndarray, np.ndarray]:
        """[J] position and [J] velocity at `time`. There must be a chunk."""
        position, velocity = self._mean(time) if len(self._members) > 1 else self._members[-1][0].at(time)
        u = (time - self._joined) / self._fade
        if u >= 1.0 or self._handover == "switch":
            return position, velocity
        u, span, before = max(u, 0.0), self._fade / SECOND, min(time - self._joined, 0) / SECOND
        # Hermite basis from (offset, offset velocity) at u = 0 to rest at u = 1, and its derivatives.
        h0, h1 = 1.0 + u * u * (2.0 * u - 3.0), u * (1.0 + u * (u - 2.0)) * span
        d0, d1 = 6.0 * u * (u - 1.0) / span, 1.0 + u * (3.0 * u - 4.0)
        return (
            position + h0 * self._offset + (h1 + before) * self._offset_velocity,
            velocity + d0 * self._offset + d1 * self._offset_velocity,
        )

    def _mean(self, time: int) -> tuple[np.ndarray, np.ndarray]:
        position, velocity, total = 0.0, 0.0, 0.0
        newest = len(self._members) - 1
        for i, (chunk, arrived) in enumerate(self._members):
            grown, left = (time - arrived) / self._fade, (chunk.end - time) / self._fade
            weight = math.exp(-self._decay * i) * min(max(grown, 0.0 if i else 1.0), max(left, 0.0), 1.0)
            weight = max(weight, 1e-9) if i == newest else weight  # when all have faded the newest remains
            if weight > 0.0:
                here, moving = chunk.at(time)
                position, velocity, total = position + weight * here, velocity + weight * moving, total + weight
        return position / total, velocity / total

    def _no_offset(self) -> None:
        self._joined = -(1 << 62)
