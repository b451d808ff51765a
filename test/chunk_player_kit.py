"""For tests of chunk_player: an arm with simple controllers, and a policy that publishes chunks, as plain nodes."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import yaml
from rclpy.node import Node
from rclpy.parameter import Parameter
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import JointState
from std_msgs.msg import Float64MultiArray
from std_srvs.srv import Trigger
from trajectory_msgs.msg import JointTrajectory

from pi0_ros.msg import ActionChunk, PlayerStatus
from pi0_ros.robot import Robot
from pi0_ros.robot_file import parse_robot
from pi0_ros.ros.chunk_player import ChunkPlayer
from pi0_ros.ros.conversions import SECOND, stamp_ns, to_stamp, void_message

STOPPED, HOLDING, PLAYING, APPROACHING, DRY_RUN = range(5)
START = (0.1, 0.5, 0.5)
LATCHED = QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.TRANSIENT_LOCAL)

TEXT = """
name: two
control_rate: 20
cameras: {base_0_rgb: {topic: /c}}
joints:
  - {name: a, position: [-1.0, 1.0], velocity: 2.0, acceleration: 10.0}
  - {name: b, position: [-0.5, 2.0], velocity: 1.0, acceleration: 4.0}
  - {name: g, kind: gripper, position: [0, 1], velocity: 3.0, acceleration: 20.0, open: 1, closed: 0}
state: {topics: [/joint_states], max_age: 0.3}
commands: COMMANDS
"""
STREAMED = [{"topic": "/all/commands", "type": "Float64MultiArray"}]
NAMED = [{"topic": "/all/joint_commands", "type": "JointState", "joints": ["g", "b", "a"]}]
MIXED = [
    {"topic": "/arm/joint_trajectory", "type": "JointTrajectory", "joints": ["b", "a"]},
    {"topic": "/gripper/commands", "type": "Float64MultiArray", "joints": ["g"]},
]


def robot_text(commands: list[dict]) -> str:
    return TEXT.replace("COMMANDS", yaml.safe_dump(commands, default_flow_style=True).strip())


class Arm:
    """Joints that are where their controllers say at once; joint states at 100 Hz.

    A trajectory is taken up as joint_trajectory_controller does with `interpolate_from_desired_state`: it replaces the
    one before, and begins at what was commanded last.
    """

    def __init__(self, node: Node, robot: Robot, start: Sequence[float]) -> None:
        self.robot, self.node = robot, node
        self.position = np.array(start, dtype=np.float64)
        self.sensing = True
        self.stuck = False  # as after an emergency stop: it takes commands, and stays
        self.trail: list[tuple[float, np.ndarray]] = []  # (s, [J]) at 100 Hz
        self.streamed: list[tuple[float, np.ndarray]] = []  # (s, [j]) as it came
        self.trajectories: list[JointTrajectory] = []
        self._ways: dict[str, tuple[list[int], list[float], np.ndarray, np.ndarray]] = {}
        for command in robot.commands:
            places = [robot.joint_names.index(name) for name in command.joints or robot.joint_names]
            if command.type == "JointTrajectory":
                take = self._taker(command.topic, places)
                node.create_subscription(JointTrajectory, command.topic, take, 10)
            elif command.type == "Float64MultiArray":
                node.create_subscription(Float64MultiArray, command.topic, self._mover(places), 100)
            elif command.type == "JointState":
                node.create_subscription(JointState, command.topic, self._told_by_name, 100)
        self._states = node.create_publisher(JointState, "/joint_states", 10)
        node.create_timer(0.01, self._tick)

    def now(self) -> float:
        return self.node.get_clock().now().nanoseconds / SECOND

    def at_rest(self, seconds: float) -> bool:
        """Whether nothing moved for the last `seconds`."""
        recent = [position for time, position in self.trail if time > self.now() - seconds]
        return len(recent) > 3 and np.ptp(np.array(recent), axis=0).max() < 1e-9

    def _mover(self, places):
        def move(message: Float64MultiArray) -> None:
            self.position[places] = self.position[places] if self.stuck else message.data
            self.streamed.append((self.now(), np.array(message.data)))

        return move

    def _told_by_name(self, message: JointState) -> None:
        places = [self.robot.joint_names.index(name) for name in message.name]
        self.position[places] = message.position
        self.streamed.append((self.now(), self.position.copy()))

    def _taker(self, topic, places):
        def take(message: JointTrajectory) -> None:
            begin = stamp_ns(message.header.stamp) / SECOND
            times = [
                begin + point.time_from_start.sec + point.time_from_start.nanosec / SECOND for point in message.points
            ]
            assert [self.robot.joint_names[place] for place in places] == list(message.joint_names)
            positions = np.array([point.positions for point in message.points])
            velocities = np.array([point.velocities for point in message.points])
            self.trajectories.append(message)
            now = self.now()
            if times[-1] < now:  # joint_trajectory_controller refuses these
                return
            self._ways[topic] = (
                places,
                [now, *times],
                np.vstack([self.position[places], positions]),
                np.vstack([velocities[0], velocities]),
            )

        return take

    def _tick(self) -> None:
        now = self.now()
        for places, times, positions, velocities in self._ways.values():
            k = bisect_right(times, now) - 1
            if k >= len(times) - 1:
                self.position[places] = positions[-1]
                continue
            span = times[k + 1] - times[k]
            u = (now - times[k]) / span
            p0, p1, m0, m1 = positions[k], positions[k + 1], velocities[k] * span, velocities[k + 1] * span
            self.position[places] = p0 + u * (m0 + u * (3 * (p1 - p0) - 2 * m0 - m1 + u * (2 * (p0 - p1) + m0 + m1)))
        self.trail.append((now, self.position.copy()))
        if self.sensing:
            message = JointState(name=list(self.robot.joint_names)[::-1], position=self.position[::-1].tolist())
            message.header.stamp = self.node.get_clock().now().to_msg()
            self._states.publish(message)


class Policy:
    """Publishes chunks at 10 Hz, as from observations 0.1 s old: each joint on a sine of its own around `centre`."""

    def __init__(self, node: Node, robot: Robot, centre: Sequence[float], horizon: int = 20) -> None:
        self.node, self.robot, self.centre, self.horizon = node, robot, np.array(centre), horizon
        self.sequence, self.epoch, self.change = 0, 0, {}
        self._publisher = node.create_publisher(ActionChunk, "action_chunk", 1)
        self._timer = node.create_timer(0.1, self.publish)

    def motion(self, time: np.ndarray) -> np.ndarray:
        """[n, J] where the policy wants to be at times [n]."""
        size, rate = np.array([0.3, 0.2, 0.2]), np.array([2.5, 2.0, 3.0])
        return self.centre + size * np.sin(rate * np.asarray(time)[:, None])

    def publish(self) -> None:
        stamp = self.node.get_clock().now().nanoseconds - SECOND // 10
        times = stamp / SECOND + self.robot.dt * np.arange(self.horizon)
        message = ActionChunk(
            sequence=self.sequence,
            epoch=self.epoch,
            joint_names=list(self.robot.joint_names),
            horizon=self.horizon,
            dt=self.robot.dt,
            actions=self.motion(times).ravel().tolist(),
        )
        message.header.stamp = to_stamp(stamp)
        for name, value in self.change.items():
            setattr(message, name, value)
        self._publisher.publish(message)
        self.sequence += 1

    def announce(self, epoch: int) -> None:
        """A chunk without actions, which only says that older epochs are void."""
        self.epoch = epoch
        now = self.node.get_clock().now().nanoseconds
        void = void_message(self.robot, now=now, sequence=self.sequence, epoch=epoch, prompt="", checkpoint="")
        self._publisher.publish(void)
        self.sequence += 1

    def die(self) -> None:
        self.node.destroy_timer(self._timer)
        self.node.destroy_publisher(self._publisher)


class Watch:
    """What the player says: the newest status, and all (state, reason) in order."""

    def __init__(self, node: Node) -> None:
        self.status: PlayerStatus | None = None
        self.said: list[tuple[int, str]] = []
        node.create_subscription(PlayerStatus, "chunk_player/status", self._came, LATCHED)

    def _came(self, message: PlayerStatus) -> None:
        self.status = message
        self.said.append((message.state, message.reason))

    def is_in(self, state: int, words: str = ""):
        """A condition: the newest status has the state, and `words` in its reason."""

        def condition() -> bool:
            return self.status is not None and self.status.state == state and words in self.status.reason

        condition.__name__ = f"player says {state} {words!r}"
        return condition


def robot_of(commands: list[dict]) -> Robot:
    return parse_robot(robot_text(commands))


class Stage:
    """An arm, a policy, an ear for the player's status; and the player when asked."""

    def __init__(self, ros, tmp_path: Path, commands, policy=True) -> None:
        self.ros, self.robot = ros, robot_of(commands)
        self.file = tmp_path / "robot.yaml"
        self.file.write_text(robot_text(commands))
        self.node = ros.node("stage")
        self.arm = Arm(self.node, self.robot, START)
        self.policy = Policy(self.node, self.robot, START) if policy else None
        self.watch = Watch(self.node)

    def player(self, active=True, **parameters) -> ChunkPlayer:
        values = {"robot_file": str(self.file), "approach_threshold": 0.6, **parameters}
        overrides = [Parameter(name.replace("__", "."), value=value) for name, value in values.items()]
        node = self.ros.add(ChunkPlayer(parameter_overrides=overrides))
        node.trigger_configure()
        if active:
            node.trigger_activate()
        return node

    def call(self, name: str) -> Trigger.Response:
        client = self.node.create_client(Trigger, f"chunk_player/{name}")
        answer = self.ros.call(client, Trigger.Request())
        self.node.destroy_client(client)
        return answer

    def play(self, seconds: float = 0.5) -> None:
        """Until the player has played for `seconds`."""
        self.ros.spin_until(self.watch.is_in(PLAYING))
        begin = self.arm.now()
        self.ros.spin_until(lambda: self.arm.now() > begin + seconds)
        self.ros.spin_until(self.watch.is_in(PLAYING))

    def moving(self) -> bool:
        return len(self.arm.trail) > 5 and np.abs(self.arm.trail[-1][1] - self.arm.trail[-5][1]).max() > 0.02
