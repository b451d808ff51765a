"""visualiser: shows in RViz what the policy wants and what the player makes of it.

A plain node beside policy_node and chunk_player. Without a subscriber it listens to nothing and computes nothing.

Topics, relative to the namespace:
    action_chunk, chunk_player/status, /diagnostics and the robot file's JointState topics in.
    ~/markers (visualization_msgs/MarkerArray): namespaces `chunk` (fingertip path of the newest chunk, yellow for now
        to pink for its end; grey when the arm is held, red when the chunk was refused), `actions` (a dot for each
        action), `executed` (where the fingertip was, blue) and `status` (a text).
    ~/trace (nav_msgs/Path): the executed path with orientations.
    ~/ghost_joint_states (sensor_msgs/JointState): the chunk `ghost_lead` seconds ahead of the arm, for a second
        robot_state_publisher with a frame_prefix.
Frame: the URDF's root link.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from builtin_interfaces.msg import Duration
from diagnostic_msgs.msg import DiagnosticArray
from geometry_msgs.msg import Point, PoseStamped
from nav_msgs.msg import Path as PathMessage
from rclpy.clock import Clock, ClockType
from rclpy.node import Node
from scipy.spatial.transform import Rotation
from sensor_msgs.msg import JointState
from std_msgs.msg import ColorRGBA
from visualization_msgs.msg import Marker, MarkerArray

from pi0_ros.msg import ActionChunk, PlayerStatus
from pi0_ros.robot import Robot
from pi0_ros.robot_file import RobotFileError, load_robot, robot_path
from pi0_ros.ros.conversions import chunk_actions, stamp_ns, to_stamp
from pi0_ros.ros.kinematics import Kinematics, KinematicsError, find_urdf
from pi0_ros.ros.markers import Player, Shape, View
from pi0_ros.ros.parameters import Parameters, Spec, no_robot_file
from pi0_ros.ros.program import run_node
from pi0_ros.ros.qos import LATCHED, NEWEST, SENSOR

KINDS = {"line": Marker.LINE_STRIP, "dots": Marker.SPHERE_LIST, "text": Marker.TEXT_VIEW_FACING}
OURS = ("policy_node", "chunk_player")  # whose diagnostics the text shows, in its own namespace

SPECS = (
    Spec("robot_file", "", "path of the robot file, or of a checkpoint folder with one", read_only=True),
    Spec("urdf", "", "URDF: path or package://PACKAGE/PATH; empty: the robot file's", read_only=True),
    Spec("tip_link", "", "link whose path is shown; empty: the robot file's", read_only=True),
    Spec("rate", 20.0, "how often markers and ghost are published, Hz", 0.5, 100, read_only=True),
    Spec("trail_seconds", 10.0, "how long the executed path stays, s", 0, 3600),
    Spec("ghost_lead", 0.5, "how far the ghost is ahead of the arm, s", 0, 60),
    Spec("line_width", 0.004, "of the paths, m", 1e-4, 1),
    Spec("text_size", 0.02, "height of the status text's letters, m", 1e-3, 1),
    Spec("text_height", 0.45, "of the status text above the root link, m", -10, 10),
)


def load_kinematics(robot_file: str, urdf: str = "", tip_link: str = "") -> tuple[Robot, Kinematics, Path]:
    """Robot, kinematics and the URDF's path; `urdf` and `tip_link` come before the robot file's.

    Raises:
        ParameterError, RobotFileError, KinematicsError: one line on what is wrong.
    """
    if not robot_file:
        raise no_robot_file()
    path = robot_path(robot_file)
    robot = load_robot(path)
    found = find_urdf(urdf, Path.cwd()) if urdf else find_urdf(robot.urdf or "", path.parent)
    grippers = [joint.name for joint in robot.joints if joint.kind == "gripper"]
    return robot, Kinematics(found, robot.joint_names, tip_link or robot.tip_link or "", grippers), found


class Visualiser(Node):
    """The node.

    Raises:
        ParameterError, RobotFileError, KinematicsError: it cannot start.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__("visualiser", **options)
        try:
            self._settings = Parameters(self, SPECS)
            given = (self._settings[name] for name in ("robot_file", "urdf", "tip_link"))
            self._robot, kinematics, _ = load_kinematics(*given)
        except BaseException:
            self.destroy_node()
            raise
        self.frame = kinematics.root
        namespace = self.get_namespace().strip("/")
        self._ours = tuple(f"{namespace}/{name}:".lstrip("/") for name in OURS)
        self.view = View(kinematics, self._robot.joint_names)
        self._listening: list[Any] = []  # subscriptions, while somebody looks
        self._last = 0  # ns, of the last redraw
        self._markers = self.create_publisher(MarkerArray, "~/markers", NEWEST)
        self._trace = self.create_publisher(PathMessage, "~/trace", LATCHED)
        self._ghost = self.create_publisher(JointState, "~/ghost_joint_states", NEWEST)
        # On the steady clock: a viewer also shows that a simulated clock stands still.
        self.create_timer(1.0 / self._settings["rate"], self._redraw, clock=Clock(clock_type=ClockType.STEADY_TIME))

    @property
    def listening(self) -> bool:
        """Whether somebody looks."""
        return bool(self._listening)

    def _redraw(self) -> None:
        wanted = [p.get_subscription_count() > 0 for p in (self._markers, self._trace, self._ghost)]
        if any(wanted) != self.listening:
            self._listen() if any(wanted) else self._stop_listening()
        if not any(wanted):
            return
        now = self.get_clock().now().nanoseconds
        if now < self._last:
            self.view.set_back()
        self._last, self.view.trail = now, self._settings["trail_seconds"]
        moved = (wanted[0] or wanted[1]) and self.view.move(now)
        if wanted[0]:
            self._markers.publish(MarkerArray(markers=[self._marker(shape) for shape in self.view.shapes(now)]))
        if wanted[1] and moved:
            self._trace.publish(self._path(now))
        if wanted[2] and (ghost := self.view.ghost(now, self._settings["ghost_lead"])):
            message = JointState(name=list(ghost), position=list(ghost.values()))
            message.header.stamp = to_stamp(now)
            self._ghost.publish(message)

    # What arrives, while somebody looks

    def _listen(self) -> None:
        for kind, topic, callback, qos in (
            (ActionChunk, "action_chunk", self._chunk_came, NEWEST),
            (PlayerStatus, "chunk_player/status", self._status_came, LATCHED),
            (DiagnosticArray, "/diagnostics", self._diagnostics_came, SENSOR),
            *((JointState, topic, self._state_came, SENSOR) for topic in self._robot.state.topics),
        ):
            self._listening.append(self.create_subscription(kind, topic, callback, qos))

    def _stop_listening(self) -> None:
        for subscription in self._listening:
            self.destroy_subscription(subscription)
        self._listening.clear()
        self.view.clear()

    def _chunk_came(self, message: ActionChunk) -> None:
        try:
            actions = chunk_actions(message)
        except ValueError as error:
            self.get_logger().warning(str(error), throttle_duration_sec=5.0)
            return
        stamp = stamp_ns(message.header.stamp)
        self.view.hear_chunk(
            stamp, message.dt, message.sequence, message.joint_names, actions, message.prompt, message.epoch
        )

    def _status_came(self, message: PlayerStatus) -> None:
        stamp = stamp_ns(message.header.stamp)
        refused = message.refused_sequence if message.newest_refused else None
        said = message.state, message.reason, message.sequence, message.seconds_left, refused
        self.view.hear_player(Player(stamp, *said))

    def _state_came(self, message: JointState) -> None:
        pairs = zip(message.name, message.position, strict=False)  # some drivers leave positions out
        self.view.hear_joints({name: position for name, position in pairs if np.isfinite(position)})

    def _diagnostics_came(self, message: DiagnosticArray) -> None:
        for status in message.status:
            if status.name.startswith(self._ours):
                self.view.problems.pop(status.name, None)
                if status.level != status.OK:
                    level = "ERROR" if status.level == status.ERROR else "WARN"
                    self.view.problems[status.name] = f"{level} {status.name}: {status.message}"

    # What goes out

    def _marker(self, shape: Shape) -> Marker:
        marker = Marker(ns=shape.name, type=KINDS[shape.kind], action=Marker.ADD)
        marker.header.frame_id = self.frame  # without a stamp: by the newest transform
        if len(shape.points) < (2 if shape.kind == "line" else 1):
            marker.action = Marker.DELETE
            return marker
        marker.pose.orientation.w = 1.0
        marker.lifetime = Duration(sec=max(1, round(5 / self._settings["rate"])))  # gone soon after this node
        if shape.kind == "text":
            marker.text, marker.scale.z = shape.text, self._settings["text_size"]
            marker.pose.position.z = self._settings["text_height"]
            marker.color = _colour(shape.colours[0])
            return marker
        width = self._settings["line_width"]
        marker.scale.x = width
        if shape.kind == "dots":
            marker.scale.x = marker.scale.y = marker.scale.z = 1.6 * width
        marker.points = [Point(x=x, y=y, z=z) for x, y, z in shape.points.tolist()]
        marker.colors = [_colour(colour) for colour in shape.colours]
        return marker

    def _path(self, now: int) -> PathMessage:
        path = PathMessage()
        path.header.frame_id, path.header.stamp = self.frame, to_stamp(now)
        executed = self.view.executed()
        if not executed:
            return path
        turns = Rotation.from_matrix([pose[:3, :3] for _, pose in executed]).as_quat().tolist()
        for (stamp, pose), turn in zip(executed, turns, strict=True):
            posed = PoseStamped()
            posed.header.frame_id, posed.header.stamp = self.frame, to_stamp(stamp)
            at, orientation = posed.pose.position, posed.pose.orientation
            at.x, at.y, at.z = pose[:3, 3].tolist()
            orientation.x, orientation.y, orientation.z, orientation.w = turn
            path.poses.append(posed)
        return path


def _colour(rgba: np.ndarray) -> ColorRGBA:
    r, g, b, a = rgba.tolist()
    return ColorRGBA(r=r, g=g, b=b, a=a)


def main(args: list[str] | None = None) -> int:
    """Run the node until it is told to end; 1 and one line on stderr when it cannot start."""
    return run_node("visualiser", SPECS, Visualiser, errors=(RobotFileError, KinematicsError), args=args)


if __name__ == "__main__":
    sys.exit(main())
