"""What a chunk means at a time: judging chunks, sampling them, joining one to the next.

Pure numpy; times are nanoseconds of the node's clock. Action k of a chunk is meant for `stamp + k * dt`, so where a
chunk stands does not depend on how long it took to come.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pi0_ros.ros.limiter import Limits

SECOND = 1_000_000_000  # ns
LEAST_DT, MOST_DT = 0.001, 10.0  # s; another time between two actions is a fault, not a fast or a slow robot
MOST_MEMBERS = 16  # chunks that an ensemble averages over


@dataclass(frozen=True)
class Offer:
    """A chunk as it came, before anyone trusts it."""

    stamp: int  # ns
    sequence: int
    epoch: int
    joint_names: tuple[str, ...]
    horizon: int
    dt: float
    actions: np.ndarray  # float64 [horizon * joints], row-major
    untrained: bool = False  # made by random weights


@dataclass(frozen=True)
class Rules:
    """What a chunk must keep to."""

    joint_names: tuple[str, ...]
    limits: Limits
    max_age: float  # s, of its stamp when it arrives
    max_ahead: float  # s, of its stamp before now
    refuse_limits: bool  # refuse what breaks a limit instead of clamping it later
    untrained: bool = False  # play what random weights make


def fault_of(offer: Offer, rules: Rules, now: int) -> str | None:
    """Why a chunk is refused, in one line, or None."""
    if offer.untrained and not rules.untrained:
        return "untrained random weights made it (play_untrained allows that, on a simulated arm)"
    if offer.joint_names != rules.joint_names:
        return f"joints {list(offer.joint_names)} are not {list(rules.joint_names)}"
    if not (LEAST_DT <= offer.dt <= MOST_DT):
        return f"dt is {offer.dt} s, must be from {LEAST_DT:g} to {MOST_DT:g}"
    if offer.horizon < 1 or offer.actions.size != offer.horizon * len(offer.joint_names):
        return f"{offer.actions.size} values are not horizon {offer.horizon} times {len(offer.joint_names)} joints"
    finite = np.isfinite(offer.actions)
    if not finite.all():
        step, joint = divmod(int(np.argmin(finite)), len(offer.joint_names))
        return f"action {step} of joint '{offer.joint_names[joint]}' is {offer.actions[np.argmin(finite)]}"
    age = (now - offer.stamp) / SECOND
    if age > rules.max_age:
        return f"its observation is {age:.3f} s old, at most {rules.max_age:g} s are allowed"
    if -age > rules.max_ahead:
        return f"its stamp is {-age:.3f} s in the future, at most {rules.max_ahead:g} s are allowed"
    if rules.refuse_limits:
        return _broken_limit(offer, rules)
    return None


def _broken_limit(offer: Offer, rules: Rules) -> str | None:
    """The first limit that the actions themselves break, or None."""
    actions = offer.actions.reshape(offer.horizon, len(offer.joint_names))
    limits, slack = rules.limits, 1.0 + 1e-6
    with np.errstate(over="ignore", invalid="ignore"):  # finite but huge: the difference may not be
        velocity = np.diff(actions, axis=0) / offer.dt
        acceleration = np.diff(velocity, axis=0) / offer.dt
    span = limits.high - limits.low
    outside = np.maximum(limits.low - actions, actions - limits.high) - 1e-6 * span
    for what, excess, values, unit in (
        ("position", outside, actions, ""),
        ("velocity", np.abs(velocity) - slack * limits.velocity, velocity, "/s"),
        ("acceleration", np.abs(acceleration) - slack * limits.acceleration, acceleration, "/s^2"),
    ):
        broken = ~(excess <= 0)  # NaN is broken
        if broken.any():
            step, joint = np.unravel_index(int(np.argmax(broken)), broken.shape)
            name = rules.joint_names[joint]
            return f"{what} of joint '{name}' at action {step} is {values[step, joint]:.4g}{unit}, beyond its limit"
    return None


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
        # making up for it would begin with a move the other way.
        moving = np.clip(moving, -self._fastest, self._fastest)
        self._joined = at
        self._offset, self._offset_velocity = position - here, velocity - moving

    def at(self, time: int) -> tuple[np.ndarray, np.ndarray]:
        """[J] position and [J] velocity at `time`. There must be a chunk."""
        position, velocity = self._mean(time) if len(self._members) > 1 else self._members[-1][0].at(time)
        u = (time - self._joined) / self._fade
        if u >= 1.0 or self._handover == "switch":
            return position, velocity
        u, span = max(u, 0.0), self._fade / SECOND
        # Hermite basis from (offset, offset velocity) at u = 0 to rest at u = 1, and its derivatives.
        h0, h1 = 1.0 + u * u * (2.0 * u - 3.0), u * (1.0 + u * (u - 2.0)) * span
        d0, d1 = 6.0 * u * (u - 1.0) / span, 1.0 + u * (3.0 * u - 4.0)
        return (
            position + h0 * self._offset + h1 * self._offset_velocity,
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


def joint_index(names: Sequence[str], wanted: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Where the wanted joints stand in a message: ([n] places in `names`, [n] places in `wanted`)."""
    pairs = [(names.index(name), k) for k, name in enumerate(wanted) if name in names]
    return np.array([p for p, _ in pairs], dtype=np.intp), np.array([k for _, k in pairs], dtype=np.intp)
