"""A gripper that an action server drives: positions as goals (control_msgs, GripperCommand or ParallelGripperCommand).

A goal is a move that ends at rest, so a stream of them is no stream of positions: one goes out where the position has
changed by a share of the gripper's way, at 10 Hz at most, and the next one when the server has answered.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from rclpy.action import ActionClient
from rclpy.node import Node
from rclpy.task import Future

from pi0_ros.robot import Command, Joint
from pi0_ros.ros.conversions import SECOND

PERIOD = SECOND // 10  # ns between two goals, at least
ANSWER = SECOND  # ns; a server that takes longer to accept a goal is asked again
LEAST = 0.01  # of the way from open to closed; a smaller change waits until the position stands still


class GripperError(RuntimeError):
    """Goals cannot be sent from here; the message is one line with the way out."""


class GripperGoals:
    """Positions of one joint, sent to its action server.

    Args:
        command: an entry of the robot file with one joint.
        joint: that one.

    Raises:
        GripperError: control_msgs is not installed.
    """

    def __init__(self, node: Node, command: Command, joint: Joint) -> None:
        self._command, self._joint = command, joint
        self._kind = getattr(_actions(command), command.type)
        self._client = ActionClient(node, self._kind, command.topic)
        self._least = LEAST * abs(joint.closed - joint.open)
        self._told = self._last = None  # the newest goal that was not refused, and the position at the last call
        self._sent_at = -PERIOD  # ns
        self._answer: Future | None = None
        self.refuses = False  # the newest goal was not accepted

    def send(self, position: float, now: int) -> None:
        """Have the gripper be at `position` (message units) at `now` (ns); what is too early or too little waits for a
        later call."""
        if not self._client.server_is_ready():
            self._told = None  # the next one has heard nothing
            return
        stands, self._last = position == self._last, position
        if 0 <= now - self._sent_at < (PERIOD if self._answer is None else ANSWER):
            return
        gap = abs(position - self._told) if self._told is not None else self._least
        if gap < self._least and not (stands and gap):
            return
        given_up, self._answer = self._answer, None
        if given_up is not None:
            given_up.cancel()
        self._told, self._sent_at = position, now
        self._answer = self._client.send_goal_async(self._goal(position))
        self._answer.add_done_callback(self._answered)

    def _goal(self, position: float) -> Any:
        goal, effort = self._kind.Goal(), self._command.max_effort
        if self._command.type == "GripperCommand":
            goal.command.position, goal.command.max_effort = position, effort
        else:
            goal.command.name, goal.command.position = [self._joint.name], [position]
            goal.command.effort = [effort] if effort else []
        return goal

    def _answered(self, answer: Future) -> None:
        if answer is not self._answer:  # given up
            return
        self._answer = None
        self.refuses = not answer.result().accepted
        if self.refuses:
            self._told = None  # asks again

    @property
    def name(self) -> str:
        """Of the action."""
        return self._command.topic

    @property
    def heard(self) -> bool:
        """Whether the action server is there."""
        return self._client.server_is_ready()

    def close(self) -> None:
        """Destroy the client."""
        self._client.destroy()


def _actions(command: Command) -> ModuleType:
    try:
        import control_msgs.action
    except ImportError:
        raise GripperError(
            f"commands {command.topic}: type {command.type} needs the package control_msgs, which comes with "
            "ros2_control: apt install ros-$ROS_DISTRO-control-msgs"
        ) from None
    return control_msgs.action
