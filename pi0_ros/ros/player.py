"""What to command at a time, and why: the chunk player without ROS.

`Player` takes what arrives (chunks, joint states, epochs, start and stop) as plain values and says at each tick what to
send. Times are nanoseconds of the node's clock, positions in message units. One thread uses it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from pi0_ros.robot import GAP, Robot
from pi0_ros.ros.judging import SECOND, Offer, Settings, fault_of
from pi0_ros.ros.limiter import robot_limits
from pi0_ros.ros.motion import CATCH_UP, Commands, Plan, Stream, Window
from pi0_ros.ros.playback import Playback, TimedActions
from pi0_ros.ros.proprioception import Proprioception
from pi0_ros.ros.rest import Rest
from pi0_ros.ros.stall import Stall

# The numbers of PlayerStatus.
STOPPED, HOLDING, PLAYING, APPROACHING, DRY_RUN = range(5)
STATES = ("STOPPED", "HOLDING", "PLAYING", "APPROACHING", "DRY_RUN")

JUMP_BACK = 0.1  # s; less is a clock being adjusted, more is another time (bag loop, simulator reset)
PAUSE = 0.15  # s; ticks that stay away for longer are a pause, in which others may have moved the arm
RESUME = "call ~/start to resume"
METRES = 0.2  # thresholds are in rad; for a prismatic joint they count as this many m a rad


class Player:
    """Chunks in, commands out.

    Args:
        streamed: names of the joints that get a position each tick; the others get trajectories.
    """

    def __init__(self, robot: Robot, settings: Settings, streamed: Sequence[str]) -> None:
        self.settings = settings
        self.joint_names = robot.joint_names
        self.limits = robot_limits(robot, settings.velocity_scale, settings.acceleration_scale)
        self._hold_after = settings.hold_after * SECOND
        # Opening or closing a gripper at once is no jump of the arm: grippers start no approach.
        self._arm = np.array([joint.kind != "gripper" for joint in robot.joints])
        self._unit = np.array([METRES if joint.kind == "prismatic" else 1.0 for joint in robot.joints])  # [J]

        step = 1.0 / settings.rate
        self._period = round(step * SECOND)
        first = [k for k, name in enumerate(self.joint_names) if name in streamed]
        rest = [k for k, name in enumerate(self.joint_names) if name not in streamed]
        self.stream = Stream(self.limits, np.array(first, dtype=np.intp), step)
        # The grid lies up to half a period beside the clock: two periods ahead are never less than one.
        self._lead = max(2, math.ceil(settings.lead * settings.rate)) if rest else 0
        window = max(1, round(settings.window * settings.rate))
        self.window = Window(self.limits, np.array(rest, dtype=np.intp), step, window, self._lead)
        self._resend = max(1, round(settings.resend * settings.rate))
        # An arm on trajectories goes on by itself to the end of the last one.
        self._pause = round((PAUSE if self._arm[first].any() else max(PAUSE, settings.window)) * SECOND)

        self.playback = Playback(self.limits.velocity, settings.handover, settings.blend_time, settings.ensemble_decay)
        self.played = self.refused = self.holds = 0
        self.sequence = self.epoch = 0  # of the chunk that is played, or was last
        self.refused_sequence: int | None = None  # of the newest chunk, where that was refused
        self.handover_delay = 0.0  # actions of that chunk that were past when it took over
        self.commanded: np.ndarray | None = None  # [J]

        self._seen = Proprioception(robot, self.limits, self._arm, self._unit)
        self.blind = False  # holds because joint states are missing
        self.lost = ""  # why it stopped by itself: the arm does not follow
        self._mode, self.why, self._refusal = STOPPED, "not started", ""
        self._running = False  # between start and stop
        self._afresh = False  # not yet seen where the arm is, since it was started or not seen for a while
        self._anew = False  # started, and no chunk taken over since
        self._strayed = False  # it was far outside its limits, and did not stand still inside since
        self._short = False  # it did not follow, and no chunk was taken over since
        # A continuous joint that goes on outwards is soon at its other limit, the long way from where a chunk leads it.
        turns = np.array([joint.kind == "continuous" for joint in robot.joints])
        self._stray = np.minimum(settings.approach_threshold * self._unit, np.where(turns, GAP / 4, math.inf))
        far = min(settings.approach_threshold, settings.following_error or math.inf)
        self._rest = Rest(self._arm, far * self._unit, self._unit)
        self._stall = Stall(self._arm, self._unit)
        self._following = False  # a chunk moves the arm
        self._speed = 1.0
        self._pending: TimedActions | None = None  # accepted, taken over at the next tick
        self._heard = -1  # ns, when the last chunk was accepted; -1: none
        self._epoch, self._sequence = 0, -1  # of the last accepted
        self._dropped = ""  # why there is no chunk, where that is known
        self._last = -1  # ns, time of the last tick
        self._grid = 0  # ns, time of grid index 0
        self._index = 0  # grid index of now
        self._plan_at = 0  # grid index when to plan again
        self._plan_now = False

    # What arrives.

    def observe(self, names: Sequence[str], positions: Sequence[float], stamp: int, now: int) -> None:
        """Take in measured positions (`Proprioception.take`)."""
        self._watch_clock(now)
        if not self._seen.take(names, positions, stamp, now):
            return
        if self.commanded is None:
            return
        # Not in `tick`: an arm that is moved while nothing is played, or the node is inactive, must be noticed too.
        if self._following or not self.at_rest:
            if now - self._last <= self._pause:  # else it may be others who moved it
                self._rest.lags(now, self._seen.positions, self.commanded)
        else:
            self._rest.watch(now, self._seen.positions, self.commanded)

    def offer(self, offer: Offer, now: int) -> str:
        """Judge a chunk; it takes over at the next tick. Returns why it was refused, or ""."""
        self._watch_clock(now)
        if offer.horizon == 0 and offer.actions.size == 0:  # older epochs are void; the policy lives
            if offer.epoch > self._epoch:
                self.announce_epoch(offer.epoch)
            elif offer.epoch == self._epoch and self.playback.chunk is not None:
                self._heard = now
            return ""
        fault = self._out_of_order(offer, now)
        fault = fault or fault_of(offer, self.joint_names, self.limits, self.settings, now)
        if fault is None and offer.stamp + (offer.horizon - 1) * offer.dt * SECOND < now - self._hold_after:
            fault = "all its actions are past"
        if fault is not None:
            self.refused += 1
            self._refusal, self.refused_sequence = f"refused chunk {offer.sequence}: {fault}", offer.sequence
            return self._refusal
        if offer.epoch != self._epoch:
            self._drop("the policy started afresh")
        self._epoch, self._sequence, self._heard = offer.epoch, offer.sequence, now
        self._refusal, self.refused_sequence = "", None
        if self._running:
            self._pending = TimedActions(offer, self.limits, self.settings.interpolation)
        return ""

    def announce_epoch(self, epoch: int) -> None:
        """The policy says which epoch counts: chunks of others are dropped, and its sequence may start over."""
        if epoch != self._epoch:
            self._drop("the policy voided its chunks")
        self._epoch, self._sequence = epoch, -1
        self._heard = max(self._heard, self._last)  # from now on the order counts: see `_out_of_order`

    def start(self) -> None:
        """Play from the next chunk on."""
        if not self._running:
            self._running, self._afresh, self._anew, self.lost = True, True, True, ""
            self._refusal, self.refused_sequence = "", None
            self._drop("no chunk yet")
            self._halt(HOLDING, "no chunk yet")

    def stop(self, reason: str) -> None:
        """Come to rest and play nothing until `start`."""
        self._running = self.blind = False
        self.lost = ""
        self._drop(reason)
        self._halt(STOPPED, reason)

    # How it stands.

    @property
    def state(self) -> int:
        """One of the states of PlayerStatus."""
        return DRY_RUN if self.settings.dry_run and self._mode != STOPPED else self._mode

    @property
    def turns(self) -> np.ndarray:
        """float64 [J], rad: whole turns that commands are to be told in addition, which brings them next to what the
        joint's driver tells."""
        here = 0.0 if self.commanded is None else self.commanded
        return self._seen.turns.between(self._seen.told, here)

    @property
    def reason(self) -> str:
        """Why it holds, is stopped or approaches, and why the newest chunk was refused; empty while all is well."""
        return "; ".join(part for part in (self.why, self._refusal) if part)

    @property
    def at_rest(self) -> bool:
        """Whether nothing moves by command."""
        return not (self.stream.v.any() or self.window.state()[1].any())

    def seconds_left(self, now: int) -> float:
        """Until the last action of the newest accepted chunk, s; 0 without one."""
        chunk = self._pending or self.playback.chunk
        return max(0.0, (chunk.end - now) / SECOND) if chunk else 0.0

    def state_age(self, now: int) -> float:
        """Age of the oldest joint state, s; infinite while one is missing."""
        return self._seen.age(now)

    # What goes out.

    def tick(self, now: int) -> Commands | None:
        """What to send now; None when there is nothing to send. Call at about the control rate."""
        self._watch_clock(now)
        steps = self._due(now)
        if steps <= 0:
            return None
        self._index += steps
        self.window.advance(self._index)
        held_before = not self._following
        self._decide(now)
        if self.commanded is None:
            return None
        # Of an arm that was moved at rest, or is not seen, nothing is known that would make it safe to take it back.
        # And before a first chunk nobody asked for anything: a gripper holds what it was told, not where that ended.
        held = self._running and not (self._anew or self._afresh or self._rest.moved or self.blind)
        send = bool(len(self.stream.joints) and (held or self.stream.v.any()))
        self.stream.advance(self._index, steps, self._guide, self._speed)
        plan = self._plan()
        self.commanded[self.stream.joints] = self.stream.q
        self.commanded[self.window.joints] = self.window.state()[0]
        return Commands(send, plan, self._following and held_before)

    def _due(self, now: int) -> int:
        """Control periods since the last tick, to the nearest."""
        if self._last < 0:
            self._grid = now - (self._index + 1) * self._period
        before, self._last = self._last, now
        steps = (now - self._grid + self._period // 2) // self._period - self._index
        if steps * self._period > self._pause and steps > CATCH_UP and self.commanded is not None:
            # Paused: what takes positions has stood where it was told last, a trajectory has ended, and others may have
            # moved the arm since.
            self.stream.seed(self.commanded)
            self._afresh = self._anew = True
            self._seen.forget(before)
            if self._running:
                self._halt(HOLDING, "the control loop was interrupted")
        return steps

    def _time(self, index: int) -> int:
        return self._grid + index * self._period

    def _guide(self, index: int) -> tuple[np.ndarray, np.ndarray] | None:
        time = self._time(index)
        if not self._following or time > self.playback.chunk.end + self._hold_after:
            return None
        return self.playback.at(time)

    def _plan(self) -> Plan | None:
        due = self._plan_now or (self._following and self._index >= self._plan_at)
        if not (due and len(self.window.joints)):
            return None
        if not self._following and not self.window.state()[1].any():
            self._plan_now = False  # it rests where the last one ends; who has moved it since need not undo that
            return None
        self._plan_now, self._plan_at = False, self._index + self._resend
        first = self.window.plan(self._guide, self._speed)
        positions, velocities = self.window.sent(first)
        return Plan(self._time(first) + self._period * np.arange(len(positions)), positions, velocities)

    # How it is decided.

    def _decide(self, now: int) -> None:
        """Follow or hold, with the reason."""
        if self._following or not self.at_rest:
            self._rest.begin_anew()
        if not self._running:
            self._stall.begin_anew()
            return
        fault = self._seen.fault(now)
        self.blind = bool(fault)
        if fault:
            self._afresh = True
            self._halt(HOLDING, fault)
            return
        if self.commanded is None or (self._afresh and self._rest.moved):
            self._seed()
        elif self._away():
            self._afresh = True
            self._halt(HOLDING, "the arm is not yet at rest where it was told")
            return
        if not self._following:
            outside = self._outside()
            self._strayed = bool(outside) or (self._strayed and self._rest.on_its_way)  # by hand, until the hand rests
            if self._strayed:
                self._afresh = True
                self._halt(HOLDING, outside or "the arm is not yet at rest where it was moved to")
                return
        self._afresh = False
        if self._following and self.playback.chunk is not None and (lost := self._not_followed(now)):
            self.stop(lost)  # an emergency stop, a collision: who releases the arm says when it goes on
            self.lost, self._short = lost, True
            return
        chunk, self._pending = self._pending, None
        at = self._time(self._index + self._lead)
        if chunk is not None and chunk.end + self._hold_after >= now:
            self._take_over(chunk, at)
        if ended := self._ended(now):
            self.holds += self._following
            self._drop(ended)
            self._halt(HOLDING, ended)
        elif not self._following:  # a hold for another reason is over
            self._take_over(self.playback.chunk, at)
        elif self._mode == APPROACHING:
            self._approach(at)

    def _away(self) -> bool:
        """Whether the arm is far from a command at rest, and it is not known yet whether it only lags or was moved. An
        arm that is started anew begins from where it stands, so it must stand."""
        resting = self.at_rest and not (self._following or self._rest.moved or self.settings.dry_run)
        if not resting:
            return False
        coming = self._anew and self._rest.on_its_way and self._rest.off(self._seen.positions, self.commanded)
        return coming or self._rest.far(self._seen.positions, self.commanded)

    def _outside(self) -> str:
        """Why an arm is not played to that is far outside its limits, or "": every chunk would lead it back inside."""
        low, high = self.limits.low, self.limits.high
        beyond = np.abs(self._seen.positions - np.clip(self._seen.positions, low, high)) - self._stray
        beyond[~self._arm] = -math.inf
        worst = int(np.argmax(beyond))
        if beyond[worst] <= 0.0:
            return ""
        return (
            f"joint '{self.joint_names[worst]}' is at {self._seen.positions[worst]:.3g}, outside its limits "
            f"{low[worst]:g} to {high[worst]:g}: move it back, or correct the robot file"
        )

    def _not_followed(self, now: int) -> str:
        """Why the arm does not do what is commanded, or "": going on would let it jump when it is released."""
        most, (worst, gap) = self.settings.following_error, self._farthest(self._seen.positions, self.commanded)
        if not most or self.settings.dry_run:
            return ""
        if gap > most:
            name, allowed = self.joint_names[worst], most * self._unit[worst]
            return f"the arm does not follow: joint '{name}' is more than {allowed:g} from its command; {RESUME}"
        ahead = self.playback.chunk.at(now + SECOND)[0]
        stuck = self._stall.watch(now, self._seen.positions, self._seen.at, self.commanded, ahead)
        if stuck is None:
            return ""
        return f"the arm does not follow: joint '{self.joint_names[stuck]}' stands still; {RESUME}"

    def _farthest(self, here: np.ndarray, there: np.ndarray) -> tuple[int, float]:
        """The joint of the arm by which two positions [J] differ most, and by how much, in units of the thresholds."""
        gaps = np.abs(here - there) / self._unit * self._arm
        worst = int(np.argmax(gaps))
        return worst, float(gaps[worst])

    def _ended(self, now: int) -> str:
        """Why there is nothing to play, or ""."""
        chunk, timeout = self.playback.chunk, self.settings.policy_timeout
        if chunk is None:
            return self._dropped
        if now > chunk.end + self._hold_after:
            return "the chunk ended and no new one came"
        if timeout and now - self._heard > timeout * SECOND:
            return f"no chunk from the policy for {timeout:g} s"
        return ""

    def _take_over(self, chunk: TimedActions, at: int) -> None:
        """Follow `chunk` from time `at` on, or approach it when its position then is far away."""
        playing = self._following and self._mode == PLAYING and self.playback.chunk is not None
        if playing and not self.settings.dry_run:
            position, velocity = self.playback.at(at)
        else:
            position, velocity = self._commanded()
            self.playback.clear()
        if chunk is not self.playback.chunk:
            self.playback.push(chunk, at)
        if (chunk.epoch, chunk.sequence) != (self.epoch, self.sequence) or not self.played:
            self.played += 1
            self.epoch, self.sequence, self.handover_delay = chunk.epoch, chunk.sequence, chunk.past(at)
        self._following = self._plan_now = True
        self._anew = self._short = False
        most, (worst, gap) = self.settings.approach_threshold, self._farthest(chunk.at(at)[0], position)
        if gap > most:
            self.playback.alone()
            self._mode, self._speed, unit = APPROACHING, self.settings.approach_speed, self._unit[worst]
            self.why = (
                f"approaching at limited speed: joint '{self.joint_names[worst]}' is {gap * unit:.3g} from where "
                f"chunk {chunk.sequence} begins, more than {most * unit:g}"
            )
            return
        if not playing or self.settings.handover == "blend":
            self.playback.join(at, position, velocity)
        self._mode, self._speed, self.why = PLAYING, 1.0, ""

    def _approach(self, at: int) -> None:
        """Go over to playing when near enough."""
        position, velocity = self._commanded_at_lead()
        if self._farthest(self.playback.at(at)[0], position)[1] <= 0.25 * self.settings.approach_threshold:
            self.playback.join(at, position, velocity)
            self._mode, self._speed, self.why, self._plan_now = PLAYING, 1.0, "", True

    def _commanded(self) -> tuple[np.ndarray, np.ndarray]:
        """[J] position and velocity that a new motion starts from.

        What is commanded, unless the arm was moved while it rested (by hand or by another program, a simulator's
        reset), or is started anew and elsewhere (an emergency stop before): then where it is. A dry run always starts
        where the arm is.
        """
        left_short = self._short or self._rest.off(self._seen.positions, self.commanded)
        elsewhere = self._anew and self.at_rest and left_short
        if self.settings.dry_run or self._rest.moved or elsewhere:
            self._seed()
        return self._commanded_at_lead()

    def _commanded_at_lead(self) -> tuple[np.ndarray, np.ndarray]:
        position, velocity = self.commanded.copy(), np.zeros(len(self.commanded))
        # The stream's state is that of the tick before: so it would come to the lead.
        ahead = (self._lead + 1) * self._period / SECOND
        position[self.stream.joints] = self.stream.q + self.stream.v * ahead
        velocity[self.stream.joints] = self.stream.v
        position[self.window.joints], velocity[self.window.joints] = self.window.state(self._lead)
        return position, velocity

    def _seed(self) -> None:
        """Command from where the arm is, at rest. A gripper that stayed may be holding something: its command stays."""
        position = self._seen.positions.copy()
        if self.commanded is not None:
            kept = self._rest.stayed & ~self._arm
            position[kept] = self.commanded[kept]
        self.commanded = position
        self._rest.begin_anew()
        self.stream.seed(position)
        self.window.seed(position)

    def _halt(self, mode: int, why: str) -> None:
        """Brake and keep still."""
        self._plan_now = self._plan_now or self._following
        self._following, self._speed = False, 1.0
        self._mode, self.why = mode, why

    def _drop(self, why: str) -> None:
        self.playback.clear()
        self._pending, self._dropped = None, why

    def _watch_clock(self, now: int) -> None:
        """Forget what was meant for another time when the clock jumps back."""
        if self._last < 0 or now >= self._last - JUMP_BACK * SECOND:
            return
        self._drop("the clock jumped back")
        self._seen.forget()
        self._heard = min(self._heard, now)
        self._last = -1

    def _out_of_order(self, offer: Offer, now: int) -> str | None:
        quiet = max(self.settings.policy_timeout, self.settings.chunk_max_age) * SECOND
        if self._heard >= 0 and now - self._heard > quiet:
            return None  # a policy that started again counts from 0 again; what is on its way from before is too old
        if offer.epoch < self._epoch:
            return f"its epoch {offer.epoch} is older than {self._epoch}"
        if offer.epoch == self._epoch and offer.sequence <= self._sequence:
            return f"its sequence is not above {self._sequence}, the last one's"
        return None
