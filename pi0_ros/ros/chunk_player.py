"""chunk_player: action chunks in, commands to the robot's controllers out, and the arm held when anything is wrong.

A lifecycle node around `player.Player`, which decides; this file only moves messages.

Topics, relative to the namespace:
    action_chunk (pi0_ros/ActionChunk): the chunks. One of a newer epoch, with actions or without, drops what is left of
        the current one at once.
    the robot file's JointState topics in, its command topics out.
    ~/status (pi0_ros/PlayerStatus, latched): on every change of state or reason, and at 10 Hz while active.
Services (std_srvs/Trigger): ~/stop brakes and plays nothing until ~/start.
"""

from __future__ import annotations

import math
import re
import sys
import time
from typing import Any

import numpy as np
from rclpy.clock import Clock, ClockType
from rclpy.lifecycle import LifecycleState, TransitionCallbackReturn
from sensor_msgs.msg import JointState
from std_srvs.srv import Trigger

from pi0_ros.msg import ActionChunk, PlayerStatus
from pi0_ros.robot import Robot
from pi0_ros.robot_file import load_robot
from pi0_ros.ros.conversions import SECOND, stamp_ns, to_stamp
from pi0_ros.ros.diagnostics import DiagnosticsPublisher, Report, Window, title
from pi0_ros.ros.judging import Offer, Settings
from pi0_ros.ros.outputs import Outputs, streamed_joints
from pi0_ros.ros.parameters import Spec, no_robot_file
from pi0_ros.ros.player import STATES, Player
from pi0_ros.ros.program import ManagedNode, run_node
from pi0_ros.ros.qos import LATCHED, NEWEST, SENSOR

STATUS_PERIOD = SECOND // 10  # ns
LOG_PERIOD = 1.0  # s between two lines of the same state and reason
NUMBERS = re.compile(r"(?<!\w)-?\d+(\.\d+)?(e[-+]?\d+)?(?!\w)")  # not those of names
STANDS_STILL = SECOND  # ns; a clock that says the same for so long has stopped
UNTRAINED = "random"  # the digest of a policy without a checkpoint
STOPPED_BY_CALL = "stopped by ~/stop; call ~/start to resume"


def _set(name: str, default: Any, description: str, *bounds: float, **more: Any) -> Spec:
    return Spec(name, default, description, *bounds, configured=True, **more)


SPECS = (
    _set("robot_file", "", "path of the robot file, or of a checkpoint folder with one; '' takes that of `checkpoint`"),
    _set("checkpoint", "", "the policy's checkpoint folder, for its robot file"),
    _set("rate", 100.0, "control rate: how often commands are computed, Hz", 20, 1000),
    _set("interpolation", "linear", "between two actions of a chunk", choices=("linear", "cubic")),
    _set("handover", "blend", "how a chunk follows another", choices=("blend", "ensemble", "switch")),
    _set("blend_time", 0.3, "how long a hand-over fades, s", 0, 2),
    _set("ensemble_decay", 0.01, "ensemble: chunk i (0 the oldest) weighs exp(-decay * i)", 0, 10),
    _set("hold_after", 0.0, "how long a chunk's last action stands before holding counts, s", 0, 60),
    _set(
        "policy_timeout",
        1.0,
        "hold when nothing came from the policy for this many seconds; 0: not before the chunk ends, for policies that "
        "take longer than that for one",
        0,
        3600,
    ),
    _set("chunk_max_age", 1.0, "refuse a chunk whose observation is older when it comes, s", 0.001, 3600),
    _set("chunk_max_ahead", 0.05, "refuse a chunk whose stamp is further in the future, s", 0, 60),
    _set("play_untrained", False, "play chunks of untrained random weights, for a simulated arm"),
    _set("limits", "clamp", "what happens to actions beyond the robot's limits", choices=("clamp", "refuse")),
    _set("velocity_scale", 1.0, "share of the robot file's velocity limits to use", 0.01, 1),
    _set("acceleration_scale", 1.0, "share of the robot file's acceleration limits to use; braking uses all", 0.01, 1),
    _set(
        "approach_threshold",
        0.25,
        "a joint further from where a chunk begins goes there slowly, rad; for prismatic joints a fifth of it, m",
        0.001,
        100,
    ),
    _set("approach_speed", 0.2, "share of the velocity limits to use for that", 0.01, 1),
    _set(
        "following_error",
        0.5,
        "stop until ~/start when a joint is further from its command, rad; for prismatic joints a fifth of it, m; or "
        "stands still while chunks lead away from it; 0: never",
        0,
        100,
    ),
    _set("trajectory.window", 0.4, "JointTrajectory: how far ahead is sent before coming to rest, s", 0.05, 10),
    _set("trajectory.rate", 10.0, "JointTrajectory: how often it is sent again, Hz", 0.5, 100),
    _set("trajectory.lead", 0.02, "JointTrajectory: its first point is at least so far ahead, s", 0, 0.2),
    _set("trajectory.velocities", True, "JointTrajectory: send velocities too"),
    _set("dry_run", False, "judge and sample chunks, send nothing"),
    Spec("start_on_activate", True, "play at once; false: wait for ~/start"),
    Spec("autostart", False, "configure and activate without being told to", read_only=True),
)


def settings_from(values: dict[str, Any]) -> Settings:
    """The player's settings from the node's parameters."""
    plain = {name: values[name] for name in Settings.__dataclass_fields__ if name in values}
    return Settings(
        **plain,
        window=values["trajectory.window"],
        lead=values["trajectory.lead"],
        resend=1.0 / values["trajectory.rate"],
    )


def load_robot_file(robot_file: str, checkpoint: str) -> Robot:
    """The robot of the two parameters."""
    if not (value := robot_file or checkpoint):
        raise no_robot_file()
    return load_robot(value)


class ChunkPlayer(ManagedNode):
    """The node."""

    def __init__(self, **options: Any) -> None:
        super().__init__("chunk_player", SPECS, **options)
        self._player: Player | None = None
        self._outputs: Outputs | None = None
        self._robot: Robot | None = None
        self._subscriptions_made: list[Any] = []
        self._ticking: list[Any] = []
        # What the node's clock said last, and the steady time at which it began to, ns.
        self._read = 0, time.monotonic_ns()
        self._logged: tuple[int, str] | None = None  # state and reason, without that of a refused chunk, or numbers
        self._logged_at: dict[tuple[int, str], float] = {}  # s, monotonic
        self._said: tuple[int, str] | None = None  # state and reason of the last status
        self._said_at = 0  # ns
        self._active = False
        self._stopped = ""  # why, until ~/start: activating again does not undo it
        self._cost, self._interval, self._ticked = Window(), Window(), 0.0
        self._status = self.create_publisher(PlayerStatus, "~/status", LATCHED)
        self._diagnostics = DiagnosticsPublisher(self, self._reports, self.get_name())
        self.create_service(Trigger, "~/start", self._start)
        self.create_service(Trigger, "~/stop", self._stop)

    # Transitions. rclpy swallows what they raise, so each says itself what went wrong.

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Read the robot file, connect."""
        self._teardown()
        try:
            self._robot = robot = load_robot_file(self._settings["robot_file"], self._settings["checkpoint"])
            settings = settings_from(self._settings.values())
            self._player = Player(robot, settings, streamed_joints(robot))
            period = 1.0 / settings.rate
            self._outputs = Outputs(self, robot, self._player, period, self._settings["trajectory.velocities"])
            for kind, topic, callback, qos in (
                (ActionChunk, "action_chunk", self._chunk_came, NEWEST),
                *((JointState, topic, self._state_came, SENSOR) for topic in robot.state.topics),
            ):
                self._subscriptions_made.append(self.create_subscription(kind, topic, callback, qos))
        except Exception as error:  # noqa: BLE001 - whatever it is, it is the reason why configure fails
            return self._configure_failed(error)
        self._failure, self._settings.frozen = "", True
        scales = f"velocity x {settings.velocity_scale:g}, acceleration x {settings.acceleration_scale:g}"
        self.get_logger().info(f"configured for robot '{robot.name}', {scales}")
        self._say()
        return super().on_configure(state)

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Tick, and play unless `start_on_activate` is false or ~/stop was the last word."""
        self._active, self._ticked = True, 0.0
        if self._stopped:
            self._player.stop(self._stopped)
        elif self._settings["start_on_activate"]:
            self._player.start()
        else:
            self._player.stop("not started: start_on_activate is false, call ~/start")
        # Steady: a timer of the system's clock would pause for as long as that is set back. Simulated time has a pace
        # of its own, and whoever stops it must not leave the arm moving.
        period, steady = 1.0 / self._settings["rate"], Clock(clock_type=ClockType.STEADY_TIME)
        if self.get_parameter("use_sim_time").value:
            self._ticking.append(self.create_timer(period, self._tick))
            self._ticking.append(self.create_timer(period, self._go_on, clock=steady))
        else:
            self._ticking.append(self.create_timer(period, self._tick, clock=steady))
        self._say()
        return super().on_activate(state)

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Come to rest, send nothing more."""
        self._come_to_rest("deactivated")
        return super().on_deactivate(state)

    def _teardown(self) -> bool:
        self._come_to_rest("shut down")
        self._settings.frozen = False
        for subscription in self._subscriptions_made:
            self.destroy_subscription(subscription)
        self._subscriptions_made.clear()
        if self._outputs is not None:
            self._outputs.close(self)
        self._player = self._outputs = self._robot = None
        return True

    def _come_to_rest(self, why: str) -> None:
        """Brake, if active. Blocks for as long as braking takes."""
        while self._ticking:
            self.destroy_timer(self._ticking.pop())
        if not self._active:
            return
        self._active = False
        self._player.stop(why)
        period, limits = 1.0 / self._settings["rate"], self._player.limits
        now = self._time()
        # Counted, not read from the clock: simulated time stands still while this callback has the executor.
        for _ in range(math.ceil(float(np.max(limits.velocity / limits.braking)) / period) + 10):
            now += round(period * SECOND)
            self._command(now)
            if self._player.at_rest:
                break
            time.sleep(period)
        self._say()

    # What arrives

    def _chunk_came(self, message: ActionChunk) -> None:
        if not self._active:
            return
        offer = Offer(
            stamp_ns(message.header.stamp),
            message.sequence,
            message.epoch,
            tuple(message.joint_names),
            message.horizon,
            message.dt,
            np.array(message.actions, dtype=np.float64),
            message.checkpoint == UNTRAINED,
        )
        if refusal := self._player.offer(offer, self._now()):
            self.get_logger().warning(refusal, throttle_duration_sec=1.0)

    def _state_came(self, message: JointState) -> None:
        now = self._now()
        # Some drivers leave the stamp empty; with `clock: bag` the time of arrival counts, as for the policy.
        stamp = 0 if self._robot.clock == "bag" else stamp_ns(message.header.stamp)
        self._player.observe(message.name, message.position, stamp or now, now)

    def _start(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        response.success = self._active
        response.message = (
            "plays from the next chunk on" if self._active else "the node is not active: activate it first"
        )
        if self._active:
            self._stopped = ""
            self._player.start()
            self._say()
        return response

    def _stop(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        response.success, response.message, self._stopped = True, "stopped; call ~/start to resume", STOPPED_BY_CALL
        if self._active:
            self._player.stop(STOPPED_BY_CALL)
            self._say()
        else:
            response.message = "the node is not active: nothing is played, nor when it is activated before ~/start"
        return response

    # What goes out

    def _tick(self) -> None:
        began = time.perf_counter()
        now = self._time()
        self._command(now)
        if self._player.lost and not self._stopped:
            self._stopped = self._player.lost
            self.get_logger().error(self._stopped)
        if (self._player.state, self._player.reason) != self._said or not 0 <= now - self._said_at < STATUS_PERIOD:
            self._say()
        self._cost.add(began, time.perf_counter() - began)
        if self._ticked:
            self._interval.add(began, began - self._ticked)
        self._ticked = began

    def _go_on(self) -> None:
        """Tick where the node's clock does not."""
        if self._time() != self._now():
            self._tick()

    def _time(self) -> int:
        """The node's clock; where that stands still, it goes on at its usual pace: joint states age, the arm brakes."""
        now, steady = self._now(), time.monotonic_ns()
        if now != self._read[0]:
            self._read = now, steady
        still = steady - self._read[1]
        return now + still if still > STANDS_STILL else now

    def _command(self, now: int) -> None:
        commands = self._player.tick(now)
        if commands is not None and not self._player.settings.dry_run:
            self._outputs.send(commands, max(now, self._now()))  # computing them takes milliseconds

    def _say(self) -> None:
        """Publish the status."""
        player, now = self._player, self._now()
        message = PlayerStatus(
            state=player.state,
            reason=player.reason,
            sequence=player.sequence,
            epoch=player.epoch,
            seconds_left=player.seconds_left(now),
            handover_delay=player.handover_delay,
            chunks_played=player.played,
            chunks_refused=player.refused,
            newest_refused=player.refused_sequence is not None,
            refused_sequence=player.refused_sequence or 0,
            holds=player.holds,
            joint_names=list(player.joint_names),
            commanded=[] if player.commanded is None else player.commanded.tolist(),
        )
        message.header.stamp = to_stamp(now)
        self._log(f"{STATES[player.state]}: {player.reason}".removesuffix(": "), player)
        self._said, self._said_at = (player.state, player.reason), self._time()
        self._status.publish(message)

    def _log(self, told: str, player: Player) -> None:
        """A state or reason that is new, but for its numbers, and not one of the last second: some go to and fro."""
        key, now = (player.state, NUMBERS.sub("", player.why)), time.monotonic()
        if key == self._logged:
            return
        self._logged = key
        if now - self._logged_at.get(key, -math.inf) > LOG_PERIOD:
            self._logged_at[key] = now
            self.get_logger().info(told)

    def _reports(self) -> list[Report]:
        report, player = Report(f"{title(self)}: player"), self._player
        report.add("lifecycle", self.lifecycle)
        if player is None:
            if self._failure:
                report.error(self._failure)
            return [report]
        now, clock = self._now(), time.perf_counter()
        if self._active and player.reason:
            judge = report.error if player.blind or player.lost else report.warn
            judge(f"{STATES[player.state].lower()}: {player.reason}")
        for fault in self._outputs.faults():
            report.warn(fault)
        if (policies := self.count_publishers("action_chunk")) > 1:
            report.warn(f"{policies} nodes publish chunks: the arm would follow all of them in turn")
        report.add("state", STATES[player.state])
        report.add("robot", self._robot.name)
        for name in ("epoch", "sequence", "played", "refused", "holds", "handover_delay"):
            report.add(name, getattr(player, name))
        report.add("seconds_left", player.seconds_left(now))
        report.add("joint_state_age", player.state_age(now))
        report.window("tick_cost_us", self._cost.summary(clock), 1e6)
        report.window("tick_interval_ms", self._interval.summary(clock), 1e3)
        return [report]


def main(args: list[str] | None = None) -> int:
    """Run the node until it is told to end, then brake; 1 and one line on stderr when it cannot start."""
    return run_node("chunk_player", SPECS, ChunkPlayer, start=ChunkPlayer.autostart, args=args)


if __name__ == "__main__":
    sys.exit(main())
