"""What view.launch.py needs to know of a robot, and config/pi0.rviz for another one than the demo's."""

from __future__ import annotations

import json
import sys
from typing import Any

import yaml

from pi0_ros.robot import Robot
from pi0_ros.robot_file import RobotFileError, config_folder
from pi0_ros.ros.kinematics import KinematicsError, robot_description
from pi0_ros.ros.parameters import ParameterError
from pi0_ros.ros.visualiser import load_kinematics

IMAGE = "rviz_default_plugins/Image"  # such a display is named after its camera slot
OURS = ("/visualiser/", "/ghost/")  # topics of nodes that view.launch.py starts


def absolute(topic: str, namespace: str) -> str:
    """A robot file's topic as nodes in `namespace` ("" or "/name") mean it."""
    return topic if topic.startswith("/") else f"{namespace}/{topic}"


def rviz_config(shipped: str, robot: Robot, namespace: str) -> str:
    """The text `shipped` of config/pi0.rviz with the cameras of `robot` and our nodes in `namespace` ("" or "/name").

    RViz takes the image transport from the end of the topic (get_transport_from_topic.cpp), so a compressed camera is
    named with its /compressed.
    """
    config = yaml.safe_load(shipped)
    for display in config["Visualization Manager"]["Displays"]:
        topic = display.get("Topic") or display.get("Description Topic") or {}
        if topic.get("Value", "").startswith(OURS):
            topic["Value"] = namespace + topic["Value"]
        if display["Class"] == IMAGE:
            camera = robot.cameras[display["Name"]]
            display["Enabled"] = display["Value"] = camera is not None
            compressed = "/compressed" if camera and camera.transport == "compressed" else ""
            topic["Value"] = absolute(camera.topic, namespace) + compressed if camera else ""
    return yaml.safe_dump(config, sort_keys=False)


def view_settings(robot_file: str, urdf: str = "", namespace: str = "") -> dict[str, Any]:
    """Of a robot file, with `urdf` before that in it: the URDF's path, its text and root link, the topics of joint
    states, and RViz's configuration, for our nodes in `namespace` ("" or "/name").

    Raises:
        ParameterError, RobotFileError, KinematicsError: one line on what is wrong.
    """
    robot, kinematics, path = load_kinematics(robot_file, urdf)
    return {
        "urdf": str(path),
        "robot_description": robot_description(path),
        "root": kinematics.root,
        "joint_states": [absolute(topic, namespace) for topic in robot.state.topics],
        "rviz": rviz_config((config_folder() / "pi0.rviz").read_text(encoding="utf-8"), robot, namespace),
    }


def main(args: list[str] | None = None) -> int:
    """`view_settings ROBOT_FILE [URDF [NAMESPACE]]` prints them as JSON, for view.launch.py: launch files are read by
    the system's Python, as `ros2` itself is, which lacks what this needs."""
    given = sys.argv[1:] if args is None else args
    if not 1 <= len(given) <= 3:
        print("usage: view_settings ROBOT_FILE [URDF [NAMESPACE]]", file=sys.stderr)
        return 2
    try:
        print(json.dumps(view_settings(*given)))
    except (ParameterError, RobotFileError, KinematicsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
