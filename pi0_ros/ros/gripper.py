"""A gripper that an action server drives: positions as goals (control_msgs, GripperCommand or ParallelGripperCommand).

A goal is a move that ends at rest, so a stream of them is no stream of positions: one goes out where the position has
changed by a share of the gripper's way, and stands or has moved on for a tenth of a second.
"""

from __future__ import annotations

from typing import Any

from action_msgs.msg import GoalStatus
from rclpy.action import ActionClient
from rclpy.node import Node
from rclpy.task import Future

from pi0_ros.robot import Command, Joint
from pi0_ros.ros.conversions import SECOND

PERIOD = SECOND // 10  # ns between two goals, at least; so long a change may go on before one goes out for it
ANSWER = SECOND  # ns; a server that takes longer to accept a goal is asked again
SILENCE = SECOND // 2  # ns without a position: meanwhile others may have moved the gripper
LOOK = SECOND // 2  # ns between two looks at which servers there are
AGAIN = SECOND  # ns until a goal that was refused or aborted goes out again
TRIES = 3  # times; servers abort a grasp, too, that ends elsewhere than at the goal
LEAST = 0.01  # of the way from open to closed; a smaller change waits until the position has stood still
STILL = SECOND // 2  # ns for that: what a policy wavers by is no reason to move
SAME = 0.001  # of that way: no change at all


class GripperError(RuntimeError):
    """Goals cannot be sent from here; the message is one line with the way out."""


class GripperGoals:
    """Positions of one joint, sent to its action server.

    Args:
        command: an entry of the robot file with one joint.
        joint: that one.

    Raises:
        GripperError: control_msgs is not installed, or too old.
    """

    def __init__(self, node: Node, command: Command, joint: Joint) -> None:
        self._node, self._command, self._joint = node, command, joint
        self._kind = _action(command)
        self._client = ActionClient(node, self._kind, command.topic)
        self._way = abs(joint.closed - joint.open)
        self._told: float | None = None  # the newest goal, while it stands
        self._last: float | None = None  # the position at the last call
        self._called = self._looked = self._sent_at = -SECOND  # ns
        self._anchor, self._still = 0.0, 0  # where the position has stood, and since when, ns
        self._changed: int | None = None  # ns, since when the position is another than the goal
        self._answer: Future | None = None
        self._servers: set[bytes] = set()
        self._silent = False  # whether the newest goal was answered by nobody
        self._refused: float | None = None  # the newest goal, where it was
        self._aborted: float | None = None  # the goal that was, the newest that ended
        self._tries, self._again = 0, 0  # how often that was, in a row; ns, when one of these may go out again

    def forget(self) -> None:
        """What was told no longer counts: others may have moved the gripper since."""
        self._told = None

    def send(self, position: float, now: int) -> None:
        """Have the gripper be at `position` (message units) at `now` (ns); what is too early or too little waits for a
        later call."""
        if not 0 <= now - self._called < SILENCE or self._another_server(now):
            self._told = self._aborted = self._refused = None
        stands = self._last is not None and self._near(position, self._last, SAME)
        self._called, self._last = now, position
        if not self._near(position, self._anchor, SAME) or now < self._still:
            self._anchor, self._still = position, now
        if self._answer is not None and not 0 <= now - self._sent_at < ANSWER:
            self._answer, self._told, self._silent = None, None, True
        failed = self._near(position, self._aborted, LEAST) or self._near(position, self._refused, LEAST)
        waits = failed and 0 <= self._again - now < AGAIN
        if waits or self._near(position, self._told, SAME) or not self._client.server_is_ready():
            self._changed = None
            return
        if self._changed is None or now < self._changed:
            self._changed = now
        if self._answer is not None or 0 <= now - self._sent_at < PERIOD:
            return
        little = self._near(position, self._told, LEAST)
        if now - self._still < STILL if little else not stands and now - self._changed < PERIOD:
            return
        self._told, self._sent_at, self._changed = position, now, None
        self._answer = self._client.send_goal_async(self._goal(position))
        self._answer.add_done_callback(lambda answer: self._answered(answer, position))
        self._servers |= self._offering()

    def _near(self, position: float, other: float | None, share: float) -> bool:
        return other is not None and abs(position - other) <= share * self._way

    def _another_server(self, now: int) -> bool:
        """Whether there is one that was not there before, and has heard nothing."""
        if 0 <= now - self._looked < LOOK:
            return False
        before, self._servers, self._looked = self._servers, self._offering(), now
        return bool(self._servers - before)

    def _offering(self) -> set[bytes]:
        offers = self._node.get_publishers_info_by_topic(f"{self._command.topic}/_action/status")
        return {bytes(offer.endpoint_gid) for offer in offers}

    def _goal(self, position: float) -> Any:
        goal, effort = self._kind.Goal(), self._command.max_effort
        if self._command.type == "GripperCommand":
            goal.command.position, goal.command.max_effort = position, effort
        else:
            goal.command.name, goal.command.position = [self._joint.name], [position]
            goal.command.effort = [effort] if effort else []
        return goal

    def _answered(self, answer: Future, position: float) -> None:
        handle, late = answer.result(), answer is not self._answer
        if late and not (handle.accepted and self._near(position, self._told, SAME)):
            return  # of a goal that no longer counts
        self._answer, self._silent, self._refused = None, False, None
        if not handle.accepted:
            self._told, self._refused, self._again = None, position, self._called + AGAIN
        else:
            handle.get_result_async().add_done_callback(lambda done: self._ended(position, done.result()))

    def _ended(self, position: float, end: Any) -> None:
        """A goal that was accepted came to its end. One that ended short of it by force has done what it could."""
        if position != self._told:  # a newer one is on its way
            return
        if end.status != GoalStatus.STATUS_ABORTED or end.result.stalled or end.result.reached_goal:
            self._aborted = None
            return
        self._tries = self._tries + 1 if self._near(position, self._aborted, LEAST) else 1
        self._aborted, self._again = position, self._called + AGAIN
        if self._tries < TRIES:
            self._told = None

    @property
    def fault(self) -> str:
        """What the server does instead of moving the gripper, or ""."""
        if self._silent or self._refused is not None:
            return f"{self.name} {'does not answer' if self._silent else 'refuses'} the gripper's goals"
        return f"{self.name} aborts the gripper's goal {self._aborted:g}" if self._aborted is not None else ""

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


def _action(command: Command) -> type:
    try:
        import control_msgs.action
    except ImportError:
        raise GripperError(
            f"commands {command.topic}: type {command.type} needs the package control_msgs, which comes with "
            "ros2_control: apt install ros-$ROS_DISTRO-control-msgs"
        ) from None
    kind = getattr(control_msgs.action, command.type, None)
    if kind is None:  # Humble's had no ParallelGripperCommand before 4.5
        raise GripperError(
            f"commands {command.topic}: the control_msgs that is installed is too old to have {command.type}: update "
            "it, or take the type that the gripper's driver has"
        )
    return kind
