"""policy_node: cameras, joint states and a prompt in, action chunks out.

A lifecycle node. Its callbacks store messages and answer services; a worker thread (`worker.py`) owns the policy.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rclpy.clock import Clock, ClockType, JumpThreshold, TimeJump
from rclpy.duration import Duration
from rclpy.lifecycle import LifecycleState, TransitionCallbackReturn
from rclpy.parameter import Parameter
from rclpy.publisher import Publisher
from std_msgs.msg import String
from std_srvs.srv import SetBool, Trigger

from pi0_ros.model.config import PRESETS
from pi0_ros.msg import ActionChunk, PlayerStatus
from pi0_ros.policy.policy import Policy
from pi0_ros.policy.processor import DTYPES
from pi0_ros.policy.realtime import SCHEDULES, GuidanceSettings
from pi0_ros.robot_file import load_robot
from pi0_ros.ros.conversions import SECOND
from pi0_ros.ros.diagnostics import DiagnosticsPublisher, Report, title
from pi0_ros.ros.health import THRESHOLDS, gpu_memory
from pi0_ros.ros.parameters import Parameters, Spec, no_robot_file
from pi0_ros.ros.player import JUMP_BACK
from pi0_ros.ros.program import ManagedNode, RosLog, ending, run_node
from pi0_ros.ros.qos import LATCHED, NEWEST
from pi0_ros.ros.streams import Streams
from pi0_ros.ros.worker import Worker
from pi0_ros.srv import SetPrompt

MOST_PROMPT = 2000  # characters
DELIVERY = Duration(seconds=0.2)  # for the last chunk to reach whoever listens
HEARTBEAT = 5.0  # Hz: free-running ticks follow messages; this many a second come without any, to say what is missing

SPECS = (
    Spec(
        "robot_file",
        "",
        "path of the robot file, or of a checkpoint folder with one; '' takes that of `checkpoint`",
        configured=True,
    ),
    Spec("checkpoint", "", "checkpoint folder; empty: untrained random weights", configured=True),
    Spec("preset", "nano", "size of the model with random weights", choices=tuple(PRESETS), configured=True),
    Spec("device", "auto", "torch device: auto, cpu, cuda, cuda:0, ...", configured=True),
    Spec("dtype", "auto", "of the weights on the device", choices=("auto", *DTYPES), configured=True),
    Spec("threads", 0, "of torch; 0: one, but every core for a large model on a CPU", 0, 1024, configured=True),
    Spec("num_steps", 10, "denoising (Euler) steps", 1, 100, configured=True),
    Spec("rate", 10.0, "chunks per second, Hz; 0: as fast as new messages and the model allow", 0, 1000),
    Spec("on_demand_seconds", 0.0, "above 0: a chunk only when the player has less than this left, s", 0, 60),
    Spec("prompt", "", "the instruction; empty: the robot file's default; topic and service change it"),
    Spec(
        "seed",
        -1,
        "0 or more: every chunk starts from this seed's noise, for comparison; -1: fresh noise",
        -1,
        2**31 - 1,
    ),
    Spec("extra_latency", 0.0, "for rehearsal: inference takes so much longer on purpose, wall-clock s", 0, 5),
    Spec(
        "realtime_chunking",
        "auto",
        "keep the actions that will be executed before the new chunk arrives; auto: if the checkpoint was trained to, "
        "guided: by guided in-painting, whatever the checkpoint",
        choices=("auto", "guided", "never"),
    ),
    Spec(
        "guidance.schedule", "exp", "pull towards the old chunk after those actions", choices=SCHEDULES, configured=True
    ),
    Spec("guidance.max_weight", 10.0, "largest pull of guided in-painting", 0.001, 1000, configured=True),
    Spec("guidance.jacobian", True, "true: the published method; false: without its backward pass", configured=True),
    Spec("autostart", False, "configure and activate without being told to", read_only=True),
    *THRESHOLDS,
)


def load_policy(parameters: Parameters) -> Policy:
    """The policy that the parameters ask for: a checkpoint, or random weights."""
    robot = load_robot(parameters["robot_file"]) if parameters["robot_file"] else None
    common = {key: parameters[key] for key in ("device", "dtype", "num_steps")}
    common["guidance"] = GuidanceSettings(
        **{key: parameters[f"guidance.{key}"] for key in ("schedule", "max_weight", "jacobian")}
    )
    if parameters["checkpoint"]:
        policy = Policy.load(Path(parameters["checkpoint"]).expanduser(), robot=robot, **common)
    elif robot is not None:
        policy = Policy.random(robot, preset=parameters["preset"], **common)
    else:
        raise no_robot_file()
    if threads := parameters["threads"] or policy.threads:
        torch.set_num_threads(threads)
    return policy


def prompt_fault(prompt: str) -> str:
    """Why a prompt is not taken, or "": each chunk carries it."""
    if not prompt.strip():
        return "the prompt is empty"
    most = f"at most {MOST_PROMPT} are allowed"
    return f"the prompt has {len(prompt)} characters, {most}" if len(prompt) > MOST_PROMPT else ""


class PolicyNode(ManagedNode):
    """The node. `load` makes the policy from the parameters; tests give another."""

    def __init__(self, load: Callable[[Parameters], Policy] = load_policy, **options: Any) -> None:
        super().__init__("policy_node", SPECS, self._changed, **options)
        self._load = load
        self._worker: Worker | None = None
        self._streams: Streams | None = None
        self._entities: list[tuple[Callable[[Any], Any], Any]] = []  # how to destroy what configure made
        self._timer = None
        self._newest = 0  # ns, the latest time that the clock has told
        self._stopped = False  # by ~/stop, until ~/start: neither ~/pause nor activating again undoes it
        self._paused = False  # by ~/pause, until that or ~/start ends it
        # From the wall clock, so that a restarted node's epochs are newer than any that the player knows.
        self._epoch = int(time.time()) & 0x7FFFFFFF
        self._diagnostics = DiagnosticsPublisher(self, self._reports, self.get_name())
        self._log = RosLog(self)
        self._faulted = self.create_guard_condition(self._stop_after_fault)
        self._jumps = self.get_clock().create_jump_callback(
            JumpThreshold(min_forward=None, min_backward=Duration(nanoseconds=-1), on_clock_change=True),
            post_callback=self._clock_jumped,
        )
        self.create_service(Trigger, "~/start", self._start)
        self.create_service(Trigger, "~/stop", self._stop)
        self.create_service(Trigger, "~/reset", self._reset)
        self.create_service(SetBool, "~/pause", self._pause)
        self.create_service(SetPrompt, "~/set_prompt", self._set_prompt)

    # Transitions. rclpy swallows what they raise, so each says itself what went wrong.

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Load the policy, warm it up, subscribe."""
        self._teardown()
        try:
            self._worker = Worker(
                lambda: self._load(self._settings), self._now, self.get_logger(), self._faulted.trigger, self._epoch
            )
            policy = self._worker.wait_until_loaded(self._loading)
            self._connect(policy)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is the reason why configure fails
            return self._configure_failed(error)
        self._failure = ""
        self._settings.frozen = True
        if policy.digest == "random":
            self.get_logger().warning(
                "no checkpoint given: untrained random weights, whose chunks chunk_player refuses unless play_untrained"
            )
        self.get_logger().info(
            f"configured for robot '{policy.robot.name}', checkpoint {policy.digest} on {policy.runs_on}, prompt "
            f"'{self._worker.prompt}'"
        )
        if not self._worker.prompt.strip():
            self.get_logger().warning("the prompt is empty, what is the arm to do? ~/set_prompt and `prompt` tell it")
        return super().on_configure(state)

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Begin to tick."""
        self._worker.activate(running=not (self._stopped or self._paused))
        self._set_timer()
        return super().on_activate(state)

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Stop; a chunk that is being inferred is dropped, and the player told to hold."""
        self._worker.deactivate()
        self._drop_timer()
        return super().on_deactivate(state)

    def destroy_node(self) -> None:
        """Free the policy, then the node."""
        self._jumps.unregister()
        self._log.close()
        super().destroy_node()

    def _loading(self) -> bool:
        """Whether to go on waiting. Timers stand still meanwhile, so diagnostics are published from here."""
        self._diagnostics.publish_if_due()
        return self._wanted()

    def _wanted(self) -> bool:
        """Whether the process is to go on."""
        return self.context.ok() and not ending()

    def _connect(self, policy: Policy) -> None:
        publisher = self.create_publisher(ActionChunk, "action_chunk", NEWEST)
        self._entities.append((self._hang_up, publisher))
        self._streams = Streams(self, policy.robot, self._message_stored)
        self._worker.connect(self._streams, publisher.publish)
        self._apply(self._settings.values())
        for kind, topic, callback, qos in (
            (PlayerStatus, "chunk_player/status", self._player_spoke, LATCHED),
            (String, policy.robot.prompt.topic, self._prompt_heard, LATCHED),
        ):
            subscription = self.create_subscription(kind, topic, callback, qos)
            self._entities.append((self.destroy_subscription, subscription))

    def _hang_up(self, publisher: Publisher) -> None:
        """Destroy the publisher of chunks, the last one delivered: it tells the player that there are no more."""
        publisher.wait_for_all_acked(DELIVERY)
        self.destroy_publisher(publisher)

    def _teardown(self) -> bool:
        self._drop_timer()
        self._settings.frozen = False
        if self._worker is not None:
            self._worker.deactivate()  # before its publisher goes
            self._epoch = self._worker.epoch
        if self._streams is not None:
            self._streams.close()
        for destroy, entity in self._entities:
            destroy(entity)
        worker, self._worker, self._streams = self._worker, None, None
        self._entities.clear()
        # A load cannot be interrupted: a process that is told to end does not wait for it.
        if worker is None or worker.close(60.0 if self._wanted() else 3.0):
            return True
        if self._wanted():
            self.get_logger().error("the inference thread does not end, its memory is not freed; restart the process")
        return False

    # Ticks

    def _set_timer(self) -> None:
        self._drop_timer()
        rate = self._settings["rate"]
        tick = self._worker.tick_due if rate else self._worker.wake
        # Of the node's clock only where that is simulated: one of the system's pauses for as long as that is set back.
        simulated = self.get_parameter("use_sim_time").value
        clock = self.get_clock() if simulated else Clock(clock_type=ClockType.STEADY_TIME)
        self._timer = self.create_timer(1.0 / (rate or HEARTBEAT), tick, clock=clock)

    def _drop_timer(self) -> None:
        if self._timer is not None:
            self.destroy_timer(self._timer)
            self._timer = None

    def _message_stored(self, now: int) -> None:
        if now < self._newest - JUMP_BACK * SECOND:  # nobody tells of the system's clock, as of a simulated one
            self._set_back(now)
        self._newest = max(now, self._newest)
        if self._worker is not None and not self._settings["rate"]:
            self._worker.wake()

    def _player_spoke(self, status: PlayerStatus) -> None:
        self._worker.handover.heard(status, self._now())

    def _clock_jumped(self, jump: TimeJump) -> None:
        self._set_back(self._now())

    def _set_back(self, now: int) -> None:
        self._newest = now
        if self._worker is not None and self._streams is not None:
            self.get_logger().warning("the clock was set back: buffers cleared, chunks so far are void")
            self._worker.set_back()

    def _stop_after_fault(self) -> None:
        self._diagnostics.publish()
        if self.lifecycle == "active":
            self.trigger_deactivate()

    # Parameters, prompt, services

    def _changed(self, values: dict[str, Any]) -> None:
        if self._worker is not None:
            self._apply(values)
            if "rate" in values and self.lifecycle == "active":
                self._set_timer()

    def _apply(self, values: dict[str, Any]) -> None:
        if "prompt" in values:
            self._worker.set_prompt(values["prompt"] or self._worker.policy.robot.prompt.default)
        for name in ("on_demand_seconds", "realtime_chunking", "seed", "extra_latency"):
            if name in values:
                setattr(self._worker, name, values[name])

    def _prompt_heard(self, message: String) -> None:
        if fault := prompt_fault(message.data):
            stays = f"ignored, it stays '{self._worker.prompt:.80}'"
            self.get_logger().warning(f"{fault}: {stays}", throttle_duration_sec=1.0)
        else:
            self._keep_prompt(message.data)

    def _keep_prompt(self, prompt: str) -> None:
        # Through the parameter, so that `ros2 param get` tells the prompt however it was set.
        self.set_parameters([Parameter("prompt", value=prompt)])

    def _set_prompt(self, request: SetPrompt.Request, response: SetPrompt.Response) -> SetPrompt.Response:
        if fault := prompt_fault(request.prompt):
            response.message = fault
            return response
        self._keep_prompt(request.prompt)
        if request.drop_current and self._worker is not None:
            self._worker.bump()
        response.success, response.message = True, f"from the next tick on: {request.prompt}"
        return response

    def _answer(self, response: Any, act: Callable[[Worker], None], done: str) -> Any:
        response.success = self.lifecycle == "active"
        response.message = done if response.success else "the node is not active: configure and activate it first"
        if response.success:
            act(self._worker)
        return response

    def _start(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        def start(worker: Worker) -> None:
            self._stopped = self._paused = False
            worker.run(True)

        return self._answer(response, start, "ticking")

    def _stop(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        def stop(worker: Worker) -> None:
            self._stopped = True
            worker.run(False)
            worker.bump()

        return self._answer(response, stop, "stopped, chunks so far are void")

    def _pause(self, request: SetBool.Request, response: SetBool.Response) -> SetBool.Response:
        done = "paused, the player goes on to the end of its chunk or its policy_timeout" if request.data else "ticking"
        if self._stopped:
            done = "stopped by ~/stop; call ~/start to resume"

        def pause(worker: Worker) -> None:
            self._paused = request.data
            worker.run(not (self._stopped or self._paused))

        return self._answer(response, pause, done)

    def _reset(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        return self._answer(response, Worker.set_back, "buffers and caches cleared, chunks so far are void")

    # Diagnostics

    def _reports(self) -> list[Report]:
        name, now, worker = title(self), self._now(), self._worker
        if worker is None or self._streams is None:
            report = Report(f"{name}: policy")
            report.add("state", "loading" if worker is not None else self.lifecycle)
            if self._failure:
                report.error(self._failure)
            return [report]
        limits, robot = self._settings.values(), worker.policy.robot
        report = worker.health.report(f"{name}: policy", now, limits, robot.max_skew)
        report.add("state", self.lifecycle)
        report.add("running", worker.ticking)
        report.add("prompt", worker.prompt)
        report.add("checkpoint", worker.policy.digest)
        report.add("epoch", worker.epoch)
        left = worker.handover.seconds_left(now)
        report.add("player_seconds_left", "no player" if left is None else left)
        report.add("delay_actions", worker.handover.delay())
        gpu_memory(report, limits["diagnostics.gpu_warn"], limits["diagnostics.gpu_error"])
        return [report, *self._streams.reports(name, now, limits)]


def main(args: list[str] | None = None) -> int:
    """Run the node until it is told to end; 1 and one line on stderr when it cannot start."""
    return run_node("policy_node", SPECS, PolicyNode, start=PolicyNode.autostart, args=args)


if __name__ == "__main__":
    sys.exit(main())
