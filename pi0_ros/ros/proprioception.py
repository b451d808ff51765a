"""Where the arm is, as the joint states tell the player: joint by joint the newest, and for how long that counts."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Sequence

import numpy as np

from pi0_ros.robot import TURN, Robot, Turns
from pi0_ros.ros.judging import SECOND
from pi0_ros.ros.limiter import Limits

FUTURE_STATE = 0.5  # s; joint states stamped further ahead of the clock are from another clock
LEAP_SPEED = 3.0  # times a joint's velocity limit: faster than an arm goes, and a hand seldom does
LEAP = 0.05  # rad, or 0.01 m, beyond that: noise
ROUNDING = 0.01  # rad by which drivers tell more than a turn
LEAPS, LEAP_SPAN = 3, 1.0  # so many within so many seconds, and nobody knows where the arm is

# Of some joints [n]: positions, the same as their driver tells them, and when that was, ns (one stamp, or one each).
Place = tuple[np.ndarray, np.ndarray, int | np.ndarray]


class Proprioception:
    """Measured positions, put together from messages of some joints or all, in any order.

    What is measured becomes what is commanded when a motion begins, so a single wrong message must not count: of one
    in which a joint leaps further than it can go, the next must agree. Where both of two places are told again and
    again, as by a second publisher, neither counts.

    Attributes:
        positions: float64 [J], NaN where a joint was never seen.
        at: int64 [J], when each was measured, ns; -1: never, or not since a pause.
        told: float64 [J], the same as its driver tells it, which of a continuous joint may be whole turns away.
    """

    def __init__(self, robot: Robot, limits: Limits, arm: np.ndarray, unit: np.ndarray) -> None:
        """`arm` bool [J], the joints that may not leap: a gripper is told in one step, and moves nothing when it is.
        `unit` [J], what a joint has for a radian."""
        self._names, self._limits, self._max_age = robot.joint_names, limits, robot.state.max_age
        self.positions = np.full(len(self._names), np.nan)
        self.at = np.full(len(self._names), -1, dtype=np.int64)
        self.told, self.turns = self.positions.copy(), Turns(robot.joints)
        self._conceivable = np.array([joint.conceivable for joint in robot.joints]).T
        self._speed = LEAP_SPEED * np.array([joint.velocity for joint in robot.joints])
        self._arm, self._noise = arm, LEAP * unit
        self._leapt: dict[tuple[int, ...], Place] = {}  # not yet believed, by joints
        self._leaps: deque[tuple[int, str]] = deque(maxlen=LEAPS)  # ns, and what one was
        self._topics, self._came = robot.state.topics, False
        self._instead = ""  # what the last message was, where it said nothing
        self._note = ""  # what may be the reason where they are missing
        self._noted: set[int] = set()  # joints that it is about; those of other drivers say nothing of it

    def take(self, names: Sequence[str], positions: Sequence[float], stamp: int, now: int) -> bool:
        """Take in a message; whether it says anything. Left out, lest they become what is held, are positions that
        cannot be: not finite, or further outside a joint's limits than these are apart; and what is older than what is
        known."""
        self._came, self._instead = True, useless(names, positions, self._names)
        if self._instead:
            return False
        here, mine = joint_index(names, self._names)
        if stamp - now > FUTURE_STATE * SECOND:
            ahead = f"they are stamped {(stamp - now) / SECOND:.0f} s ahead of this node's clock"
            self._note = f"; {ahead}" if now else "; this node's clock stands at 0: use_sim_time without /clock?"
            return False
        told = np.asarray(positions, dtype=np.float64)[here]
        values = told - self.turns(told, mine)
        low, high = self._limits.low[mine], self._limits.high[mine]
        good = (values >= 2 * low - high) & (values <= 2 * high - low)  # false for NaN
        good &= (told >= self._conceivable[0, mine]) & (told <= self._conceivable[1, mine])
        at = min(stamp, now)  # a clock ahead of ours must not make them last longer
        self._store(mine[good], values[good], told[good], at)
        late = (now - stamp) / SECOND
        if not self._noted or self._noted.intersection(mine.tolist()):
            self._note, self._noted = "", set()
        if not good.all():
            self._noted = set(mine[~good].tolist())
            worst = int(np.argmin(good))
            limits = f"limits of {low[worst]:g} to {high[worst]:g}"
            value = f"{self._names[mine[worst]]!r} reads {told[worst]:.4g}"
            self._note = f"; {value}, impossible with {limits}: other units (degrees?)"
        elif late > self._max_age and not self._noted:
            self._note = f"; they come, stamped {late:.2g} s before this node's clock"
        return True

    def _store(self, joints: np.ndarray, values: np.ndarray, told: np.ndarray, stamp: int) -> None:
        new = stamp >= self.at[joints]
        joints, values, told = joints[new], values[new], told[new]
        key, here = tuple(joints.tolist()), (values, told, stamp)
        before = self.positions[joints], self.told[joints], self.at[joints]
        waiting = self._leapt.pop(key, None)
        if self._leaps_between(before, here, joints):
            if waiting is None or self._leaps_between(waiting, here, joints):
                self._leapt[key] = here
                return
        elif waiting is None:
            self.positions[joints], self.told[joints], self.at[joints] = here
            return
        worst = int(np.argmax(np.abs(waiting[1] - before[1]) * self._arm[joints]))
        places = f"{before[1][worst]:.3g} and {waiting[1][worst]:.3g}"
        self._leaps.append((stamp, f"joint {self._names[joints[worst]]!r} is told to be at {places} in turn"))
        self.positions[joints], self.told[joints], self.at[joints] = here

    def _leaps_between(self, before: Place, here: Place, joints: np.ndarray) -> bool:
        """Whether some joint of the arm cannot have gone from one place to the other meanwhile, or its driver changed
        the turn where none does."""
        (values_before, told_before, at), (values, told, stamp) = before, here
        reach = self._speed[joints] * (stamp - at) / SECOND + self._noise[joints]
        far, turned = np.abs(values - values_before) > reach, self.turns.between(told, told_before, joints) != 0.0
        if turned.any():
            # Drivers that tell angles within a turn have them from -pi to pi, or from 0 to 2 pi.
            low, high = np.minimum(told, told_before), np.maximum(told, told_before)
            far |= turned & ~(_in_turn(low, high, -TURN / 2) | _in_turn(low, high, 0.0))
        return bool((far & (at >= 0) & self._arm[joints]).any())  # of NaN: never seen

    def forget(self, until: int | None = None) -> None:
        """Nothing measured up to `until` (ns), or ever, counts any more."""
        self.at[self.at <= until if until is not None else slice(None)] = -1
        self._leapt.clear()
        self._leaps.clear()

    def age(self, now: int) -> float:
        """Of the oldest joint state, s; infinite while one is missing."""
        oldest = int(self.at.min())
        return (now - oldest) / SECOND if oldest >= 0 else math.inf

    def fault(self, now: int) -> str:
        """Why they cannot be relied on, or ""."""
        if len(self._leaps) == LEAPS and 0 <= now - self._leaps[0][0] <= LEAP_SPAN * SECOND:
            return f"{self._leaps[-1][1]}: do two programs publish joint states?"
        old = (self.at < 0) | (now - self.at > self._max_age * SECOND)
        if not old.any():
            return ""
        if not self._came:
            return f"no joint state yet on {', '.join(self._topics)}"
        missing = [name for name, late in zip(self._names, old, strict=True) if late]
        which = "" if len(missing) == len(old) else f" of {', '.join(missing)}"
        note = self._note or (f"; {self._instead}" if self._instead else "")
        return f"no joint state{which} for more than {self._max_age:g} s{note}"


def _in_turn(low: np.ndarray, high: np.ndarray, begin: float) -> np.ndarray:
    return (low > begin - ROUNDING) & (high < begin + TURN + ROUNDING)


def useless(names: Sequence[str], positions: Sequence[float], ours: Collection[str]) -> str:
    """Why a JointState tells nothing of our joints, or ""."""
    if not any(name in ours for name in names):
        return f"joints {', '.join(names[:6]) or 'without names'} came, none of this robot's"
    return f"{len(positions)} positions for {len(names)} names came" if len(positions) < len(names) else ""


def joint_index(names: Sequence[str], wanted: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Where the wanted joints stand in a message: ([n] places in `names`, [n] places in `wanted`)."""
    pairs = [(names.index(name), k) for k, name in enumerate(wanted) if name in names]
    return np.array([p for p, _ in pairs], dtype=np.intp), np.array([k for _, k in pairs], dtype=np.intp)
