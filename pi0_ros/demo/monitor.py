"""Watches a running demo from its ROS topics and talks to its services."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from diagnostic_msgs.msg import DiagnosticArray
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from sensor_msgs.msg import JointState
from std_msgs.msg import String
from std_srvs.srv import Trigger

from pi0_ros.demo.recorder import LATCHED_QOS
from pi0_ros.msg import ActionChunk, PlayerStatus
from pi0_ros.ros.conversions import stamp_ns
from pi0_ros.srv import EpisodeOutcome, ResetEpisode, SetPrompt

RESTING = 0.05  # rad/s, of every joint


class DemoFailed(RuntimeError):
    """The system as a whole did not work; the message says which part."""


@dataclass
class Seen:
    """What the demo's topics have shown so far."""

    chunks: int = 0
    prefix_reused: int = 0
    continued: int = 0  # chunks that begin with what is executed meanwhile
    tick_latency: list[float] = field(default_factory=list)  # seconds, observation taken up to actions ready
    checkpoint: str = ""
    player: PlayerStatus | None = None
    diagnostics: dict[str, dict[str, str]] = field(default_factory=dict)  # status name -> its values
    lowest: np.ndarray | None = None  # joint positions, per episode
    highest: np.ndarray | None = None
    stamps: list[int] = field(default_factory=list)  # of joint states, ns, per episode
    velocities: list[np.ndarray] = field(default_factory=list)  # rad/s
    speed: float = 0.0  # rad/s, of the fastest joint


class Monitor(Node):
    """The demo's own node. `until` spins it; everything else happens in its callbacks.

    Args:
        prompt_topic: where the instruction is published, beside the service call: it belongs into recordings.
        alive: called while waiting; raises when a process of the demo has died.
        on_chunk: called with each ActionChunk.
    """

    def __init__(self, prompt_topic: str, alive: Callable[[], None], on_chunk: Callable[[ActionChunk], None]) -> None:
        super().__init__("demo")
        self.seen = Seen()
        self._alive, self._on_chunk = alive, on_chunk
        self._executor = SingleThreadedExecutor()
        self._executor.add_node(self)
        self.create_subscription(ActionChunk, "action_chunk", self._chunk, 10)
        self.create_subscription(PlayerStatus, "chunk_player/status", self._status, LATCHED_QOS)
        self.create_subscription(JointState, "joint_states", self._joints, 10)
        self.create_subscription(DiagnosticArray, "/diagnostics", self._diagnostics, 10)
        self._reset = self.create_client(ResetEpisode, "reset_episode")
        self._outcome = self.create_client(EpisodeOutcome, "episode_outcome")
        self._prompt = self.create_client(SetPrompt, "policy_node/set_prompt")
        self._forget = self.create_client(Trigger, "policy_node/reset")
        self._prompt_topic = self.create_publisher(String, prompt_topic, LATCHED_QOS)
        self._player = {verb: self.create_client(Trigger, f"chunk_player/{verb}") for verb in ("start", "stop")}

    def _chunk(self, chunk: ActionChunk) -> None:
        if not chunk.horizon:  # says only that older ones are void
            return
        begin, end = (stamp.sec + stamp.nanosec * 1e-9 for stamp in (chunk.inference_begin, chunk.inference_end))
        self.seen.chunks += 1
        self.seen.prefix_reused += chunk.prefix_reused
        self.seen.continued += chunk.frozen > 0
        self.seen.tick_latency.append(end - begin)
        self.seen.checkpoint = chunk.checkpoint
        self._on_chunk(chunk)

    def _status(self, status: PlayerStatus) -> None:
        self.seen.player = status

    def _joints(self, state: JointState) -> None:
        position = np.asarray(state.position)
        seen = self.seen
        seen.lowest = position if seen.lowest is None else np.minimum(seen.lowest, position)
        seen.highest = position if seen.highest is None else np.maximum(seen.highest, position)
        seen.stamps.append(stamp_ns(state.header.stamp))
        seen.velocities.append(np.asarray(state.velocity))
        seen.speed = float(np.abs(state.velocity).max(initial=0.0))

    def _diagnostics(self, array: DiagnosticArray) -> None:
        for status in array.status:
            self.seen.diagnostics[status.name] = {pair.key: pair.value for pair in status.values}

    def until(self, condition: Callable[[], bool], seconds: float, what: str) -> None:
        """Spin until `condition` holds. Raises DemoFailed, naming `what`, after `seconds`."""
        deadline = time.monotonic() + seconds
        while not condition():
            self._executor.spin_once(timeout_sec=0.05)
            self._alive()
            if time.monotonic() > deadline:
                blame = [values["blame"] for values in self.seen.diagnostics.values() if "blame" in values]
                raise DemoFailed("; ".join([f"{what}: not within {seconds:g} s", *blame]))

    def call(self, client: Any, request: Any, seconds: float = 20.0) -> Any:
        """The answer of a service; DemoFailed if it does not come, or says no."""
        self.until(client.service_is_ready, seconds, f"service {client.srv_name} to appear")
        future = client.call_async(request)
        self.until(future.done, seconds, f"answer of {client.srv_name}")
        answer = future.result()
        if getattr(answer, "success", True) is False and hasattr(answer, "message"):
            raise DemoFailed(f"{client.srv_name}: {answer.message}")
        return answer

    def begin_episode(self, seed: int, prompt: str, instruction: str) -> str:
        """Stop the player, reset the scene, tell the policy its prompt, start again; returns the scene's task.

        `prompt` is the scene's task ("" draws it from the seed); `instruction` what the policy is told ("" the task).
        """
        self.stop_player()
        task = self.call(self._reset, ResetEpisode.Request(seed=seed, prompt=prompt)).prompt
        self.call(self._forget, Trigger.Request())  # another scene: nothing that was seen counts
        self._prompt_topic.publish(String(data=instruction or task))
        self.call(self._prompt, SetPrompt.Request(prompt=instruction or task, drop_current=True))
        self.seen.lowest = self.seen.highest = None
        self.seen.stamps, self.seen.velocities = [], []
        self.call(self._player["start"], Trigger.Request())
        return task

    def stop_player(self) -> None:
        """The arm holds until the next episode begins. Returns when it is at rest: in a scene that changed before, it
        would still carry out what it was told last."""
        self.call(self._player["stop"], Trigger.Request())
        settled = time.monotonic() + 0.2  # the command to brake is on its way
        self.until(lambda: time.monotonic() > settled and self.seen.speed < RESTING, 5, "the arm to come to rest")

    def outcome(self) -> EpisodeOutcome.Response:
        """How the episode stands."""
        return self.call(self._outcome, EpisodeOutcome.Request())
