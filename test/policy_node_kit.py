"""For the tests of policy_node: a policy that is no network, and a robot that publishes what it is told to."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
from diagnostic_msgs.msg import DiagnosticArray
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.parameter import Parameter
from rclpy.qos import DurabilityPolicy, QoSProfile, qos_profile_sensor_data
from sensor_msgs.msg import Image, JointState

from pi0_ros.msg import ActionChunk, PlayerStatus
from pi0_ros.policy.policy import Chunk, RobotObservation
from pi0_ros.robot import Robot
from pi0_ros.robot_file import parse_robot
from pi0_ros.ros.conversions import to_stamp
from pi0_ros.ros.policy_node import PolicyNode

ROBOT = """
name: two_joints
control_rate: 20
cameras:
  base_0_rgb: {topic: base/image_raw, max_age: 30}
  left_wrist_0_rgb: {topic: wrist/image_raw, max_age: 30}
joints:
  - {name: shoulder, position: [-2, 2], velocity: 1, acceleration: 5}
  - {name: elbow, position: [-2, 2], velocity: 1, acceleration: 5}
state: {topics: [joint_states], max_age: 0.5}
commands: [{topic: commands, type: Float64MultiArray}]
max_skew: 30
prompt: {default: wave, topic: prompt}
"""
HORIZON = 10
LATCHED = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)


def robot(**changes) -> Robot:
    """The robot of these tests, with changed fields."""
    return parse_robot(ROBOT).model_copy(update=changes)


class StubPolicy:
    """Answers with the state plus 0.01 for each step; keeps what it was asked."""

    digest, num_steps, runs_on = "stub", 3, "nothing"

    def __init__(self, robot: Robot) -> None:
        self.robot, self.settings = robot, SimpleNamespace(rtc_max_delay=0)
        self.asked: list[RobotObservation] = []
        self.executed: list[np.ndarray | None] = []
        self.following: list[np.ndarray | None] = []
        self.threads: set[int] = set()
        self.resets = self.warm = self.closed = 0
        self.go = threading.Event()  # inference waits for it
        self.go.set()
        self.error: Exception | None = None
        self._frames: tuple | None = None

    def warm_up(self) -> None:
        self.warm += 1
        self.threads.add(threading.get_ident())

    def infer(self, observation: RobotObservation, executed: np.ndarray | None = None, following=None, **_) -> Chunk:
        self.threads.add(threading.get_ident())
        self.asked.append(observation)
        self.executed.append(executed)
        self.following.append(following)
        self.go.wait(20)
        if self.error is not None:
            raise self.error
        seen = (observation.frames, observation.prompt)
        reused, self._frames = seen == self._frames, seen
        steps = 0.01 * np.arange(HORIZON)[:, None]
        latency = {"vision": 0.001, "prefix": 0.001, "denoise": 0.002, "total": 0.004}
        frozen = 0 if executed is None else len(executed)
        return Chunk(observation.state + steps, reused, 0 if reused else len(observation.frames), 3, frozen, latency)

    def reset(self) -> None:
        self.resets += 1
        self._frames = None

    def close(self) -> None:
        self.closed += 1


class Bench:
    """The node under test and a node that plays robot and listener, spun together.

    Everything happens in `until`: it spins both until a condition holds.
    """

    def __init__(self, context, load: Callable[..., StubPolicy] | None = None, **parameters) -> None:
        self.policy: StubPolicy | None = None
        given = [Parameter(name.replace("__", "."), value=value) for name, value in parameters.items()]
        self.node = PolicyNode(load or self._stub, context=context, parameter_overrides=given)
        self.other = Node("other", context=context)
        self.executor = SingleThreadedExecutor(context=context)
        self.executor.add_node(self.node)
        self.executor.add_node(self.other)
        self.robot = robot()
        self.chunks: list[ActionChunk] = []
        self.levels: dict[str, int] = {}
        self.messages: dict[str, str] = {}
        self.values: dict[str, dict[str, str]] = {}
        self.other.create_subscription(ActionChunk, "action_chunk", self.chunks.append, 10)
        self.other.create_subscription(DiagnosticArray, "/diagnostics", self._diagnostics, 10)
        publish = self.other.create_publisher
        self.cameras = {
            slot: publish(Image, camera.topic, qos_profile_sensor_data)
            for slot, camera in self.robot.present_cameras.items()
        }
        self.joints = {"joint_states": publish(JointState, "joint_states", 10)}
        self.status = publish(PlayerStatus, "chunk_player/status", LATCHED)
        self.offset = 0  # ns, added to the stamps
        self.frame = 0

    def _stub(self, parameters) -> StubPolicy:
        self.policy = StubPolicy(self.robot)
        return self.policy

    def _diagnostics(self, array: DiagnosticArray) -> None:
        for status in array.status:
            self.levels[status.name] = status.level[0]
            self.messages[status.name] = status.message
            self.values[status.name] = {pair.key: pair.value for pair in status.values}

    def until(self, condition: Callable[[], bool], seconds: float = 30.0, doing: Callable[[], None] | None = None):
        """Spin, calling `doing` 50 times a second, until `condition` holds."""
        deadline, due = time.monotonic() + seconds, 0.0
        while not condition():
            assert time.monotonic() < deadline, f"not within {seconds} s: {self.values} {self.messages}"
            if doing is not None and time.monotonic() >= due:
                due = time.monotonic() + 0.02
                doing()
            self.executor.spin_once(timeout_sec=0.005)

    def now(self) -> int:
        return self.other.get_clock().now().nanoseconds

    def send_frame(self, slot: str, value: int | None = None, stamp: int | None = None) -> None:
        """An 8x6 frame in one colour."""
        self.frame += 1
        colour = self.frame % 256 if value is None else value
        data = np.full((6, 8, 3), colour, np.uint8).tobytes()
        message = Image(height=6, width=8, encoding="rgb8", step=24, data=data)
        message.header.stamp = to_stamp((self.now() if stamp is None else stamp) + self.offset)
        self.cameras[slot].publish(message)

    def send_joints(self, topic: str = "joint_states", stamp: int | None = None, **positions: float) -> None:
        positions = positions or {"elbow": 0.2, "shoulder": 0.1}
        message = JointState(name=list(positions), position=list(positions.values()))
        message.header.stamp = to_stamp((self.now() if stamp is None else stamp) + self.offset)
        self.joints[topic].publish(message)

    def send(self, **positions: float) -> None:
        """A frame of every camera and a joint state."""
        for slot in self.cameras:
            self.send_frame(slot)
        self.send_joints(**positions)

    def start(self) -> None:
        """Configure, activate, and wait until the first chunk is there."""
        assert self.node.trigger_configure().name == "SUCCESS"
        assert self.node.trigger_activate().name == "SUCCESS"
        self.until(lambda: self.chunks, doing=self.send)

    def hold(self) -> None:
        """Until the policy is at work on a chunk, at which it stays until `policy.go` is set."""
        self.policy.go.clear()
        asked = len(self.policy.asked)
        self.until(lambda: len(self.policy.asked) > asked, doing=self.send)

    def call(self, kind: type, name: str, request=None):
        """The answer of a service of the node."""
        client = self.other.create_client(kind, f"policy_node/{name}")
        self.until(client.service_is_ready)
        future = client.call_async(request or kind.Request())
        self.until(future.done)
        self.other.destroy_client(client)
        return future.result()

    def close(self) -> None:
        if self.policy is not None:
            self.policy.go.set()
        self.executor.shutdown()
        self.node.destroy_node()
        self.other.destroy_node()
