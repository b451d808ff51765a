"""Commands as messages: JointTrajectory for a trajectory controller, Float64MultiArray for a position controller,
JointState for drivers that go by names, goals for a gripper's action server."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np
from builtin_interfaces.msg import Duration
from rclpy.node import Node
from rclpy.qos import QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import JointState
from std_msgs.msg import Float64MultiArray
from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint

from pi0_ros.robot import Command, Robot
from pi0_ros.ros.conversions import SECOND, to_stamp
from pi0_ros.ros.gripper import GripperGoals
from pi0_ros.ros.motion import Commands
from pi0_ros.ros.player import Player

RELIABLE = QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE)
KINDS = {"JointTrajectory": JointTrajectory, "Float64MultiArray": Float64MultiArray, "JointState": JointState}


def position_message(positions: np.ndarray) -> Float64MultiArray:
    """Positions [j], in the order of the controller's joints."""
    return Float64MultiArray(data=array("d", positions.tobytes()))


def named_message(names: Sequence[str], positions: np.ndarray, now: int) -> JointState:
    """Positions [j] of the joints `names`, stamped with the time of publication (ns)."""
    message = JointState(name=list(names), position=array("d", positions.tobytes()))
    message.header.stamp = to_stamp(now)
    return message


def trajectory_message(
    names: Sequence[str], times: np.ndarray, positions: np.ndarray, velocities: np.ndarray | None, now: int, ahead: int
) -> JointTrajectory:
    """A trajectory that joint_trajectory_controller takes up without a step.

    It is stamped with the time of publication, so that it starts at once. What lies less than `ahead` in the future is
    left out: a first point that is past would be entered without a bridge (joint_trajectory_controller from Humble to
    Kilted). From its last command the controller moves to the first point, which lies on the way that the trajectory
    before took; set its `interpolate_from_desired_state`, on Humble its `open_loop_control`.

    Args:
        times: int64 [n] ns, strictly increasing; a last point less than `ahead` in the future is sent for then.
        positions: [n, j].
        velocities: [n, j], the last row zero; None sends positions alone, between which controllers go straight.
        now: ns; ahead: ns, at least one control period.
    """
    first = min(int(np.searchsorted(times, now + ahead)), len(times) - 1)
    message = JointTrajectory(joint_names=list(names))
    message.header.stamp = to_stamp(now)
    for k in range(first, len(times)):
        seconds, rest = divmod(max(int(times[k]) - now, ahead), SECOND)
        point = JointTrajectoryPoint(time_from_start=Duration(sec=seconds, nanosec=rest))
        point.positions = array("d", positions[k].tobytes())
        if velocities is not None:
            point.velocities = array("d", velocities[k].tobytes())
        message.points.append(point)
    return message


class Outputs:
    """The publishers to the controllers of a robot file, each with its joints."""

    def __init__(self, node: Node, robot: Robot, player: Player, period: float, velocities: bool) -> None:
        """`period` in s: trajectories begin at least so far ahead. GripperError: see `GripperGoals`."""
        self._player, self._ahead, self._velocities = player, round(period * SECOND), velocities
        self._groups = [
            (
                command,
                node.create_publisher(KINDS[command.type], command.topic, RELIABLE),
                _places(command, robot, player),
            )
            for command in robot.commands
            if not command.action
        ]
        self._grippers: list[tuple[GripperGoals, int]] = []
        for command in robot.commands:
            if command.action:
                place = robot.joint_names.index(command.joints[0])
                self._grippers.append((GripperGoals(node, command, robot.joints[place]), place))

    def send(self, commands: Commands, now: int) -> None:
        """Publish what is to be sent at `now` (ns)."""
        turns = self._player.turns
        for command, publisher, (names, joints, places) in self._groups:
            if command.type == "JointTrajectory":
                if (plan := commands.plan) is not None:
                    positions = plan.positions[:, places] + turns[joints]
                    velocities = plan.velocities[:, places] if self._velocities else None
                    publisher.publish(trajectory_message(names, plan.times, positions, velocities, now, self._ahead))
            elif commands.stream:
                positions = (self._player.commanded + turns)[joints]
                named = command.type == "JointState"
                publisher.publish(named_message(names, positions, now) if named else position_message(positions))
        for gripper, place in self._grippers:
            if commands.begins:
                gripper.forget()
            if commands.stream:
                gripper.send(float(self._player.commanded[place]), now)

    def faults(self) -> list[str]:
        """What keeps commands from having an effect, one line each."""
        unheard = [publisher.topic_name for _, publisher, _ in self._groups if not publisher.get_subscription_count()]
        unheard += [gripper.name for gripper, _ in self._grippers if not gripper.heard]
        faults = [gripper.fault for gripper, _ in self._grippers if gripper.fault]
        if unheard:
            faults.append(f"no controller listens on {', '.join(unheard)}: is it loaded, and is that its topic?")
        return faults

    def close(self, node: Node) -> None:
        """Destroy the publishers."""
        for _, publisher, _ in self._groups:
            node.destroy_publisher(publisher)
        for gripper, _ in self._grippers:
            gripper.close()


def streamed_joints(robot: Robot) -> list[str]:
    """Names of the joints that have a position each tick: their controllers take no trajectories."""
    groups = [command.joints or robot.joint_names for command in robot.commands if command.type != "JointTrajectory"]
    return [name for group in groups for name in group]


def _places(command: Command, robot: Robot, player: Player) -> tuple[tuple[str, ...], list[int], list[int]]:
    """The controller's joints, and where they stand: among all joints, and for trajectories among the planned ones."""
    names = command.joints or robot.joint_names
    joints = [robot.joint_names.index(name) for name in names]
    planned = player.window.joints.tolist()
    return names, joints, [planned.index(joint) for joint in joints] if command.type == "JointTrajectory" else []
