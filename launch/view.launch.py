"""RViz with the robot, a ghost of it that is ahead on the chunk, the fingertip's path, the cameras and the status.

ros2 launch pi0_ros view.launch.py robot:=my_arm.yaml

Run it beside policy.launch.py. The robot's own robot_state_publisher is expected to run, as it does with ros2_control;
for a robot without one, such as the demo's, add publish_robot:=true.
"""

import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from ament_index_python.packages import get_package_prefix
from launch import LaunchContext, LaunchDescription
from launch.actions import DeclareLaunchArgument, OpaqueFunction
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import Node
from launch_ros.parameter_descriptions import ParameterValue

SWITCH = ["true", "false"]
ARGUMENTS = [
    DeclareLaunchArgument("robot", description="robot file, or checkpoint folder with one"),
    DeclareLaunchArgument("urdf", default_value="", description="path or package://...; empty: the robot file's"),
    DeclareLaunchArgument("namespace", default_value="", description="namespace of policy_node and chunk_player"),
    DeclareLaunchArgument("publish_robot", default_value="false", choices=SWITCH, description="the robot's TF too"),
    DeclareLaunchArgument("rviz", default_value="true", choices=SWITCH, description="start RViz"),
    DeclareLaunchArgument("use_sim_time", default_value="false", choices=SWITCH, description="time from /clock"),
]


def written(config: str) -> str:
    """The path of a new file with this text, for rviz2 -d."""
    with tempfile.NamedTemporaryFile("w", prefix="pi0_", suffix=".rviz", delete=False, encoding="utf-8") as file:
        file.write(config)
    return file.name


def settings(*arguments: str) -> dict[str, Any]:
    """What view_settings says. RuntimeError with its reason."""
    program = Path(get_package_prefix("pi0_ros"), "lib/pi0_ros/view_settings")
    done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().removeprefix("error: "))
    return json.loads(done.stdout)


def nodes(context: LaunchContext) -> list[Node]:
    given = {argument.name: LaunchConfiguration(argument.name).perform(context) for argument in ARGUMENTS}
    namespace = given["namespace"].strip("/")
    inside = f"/{namespace}" if namespace else ""
    view = settings(given["robot"], given["urdf"], inside)
    common = {"output": "screen"}
    clock = {"use_sim_time": given["use_sim_time"] == "true"}
    description = {"robot_description": ParameterValue(view["robot_description"], value_type=str)}
    started = [
        Node(
            package="pi0_ros",
            executable="visualiser",
            name="visualiser",
            namespace=namespace,
            parameters=[clock, {"robot_file": given["robot"], "urdf": view["urdf"]}],
            **common,
        ),
        Node(
            package="robot_state_publisher",
            executable="robot_state_publisher",
            namespace=f"{inside}/ghost",
            parameters=[clock, description, {"frame_prefix": "ghost/"}],
            remappings=[("joint_states", f"{inside}/visualiser/ghost_joint_states")],
            **common,
        ),
        Node(
            package="tf2_ros",
            executable="static_transform_publisher",
            name="ghost_at_robot",
            namespace=namespace,
            arguments=["--frame-id", view["root"], "--child-frame-id", f"ghost/{view['root']}"],
            parameters=[clock],
            **common,
        ),
    ]
    if given["publish_robot"] == "true":
        started += [  # each publishes the frames of the joints that its topic tells of
            Node(
                package="robot_state_publisher",
                executable="robot_state_publisher",
                name="robot_state_publisher" + (f"_{number}" if number else ""),
                parameters=[clock, description],
                remappings=[("joint_states", topic)],
                **common,
            )
            for number, topic in enumerate(view["joint_states"])
        ]
    if given["rviz"] == "true":
        started.append(
            Node(
                package="rviz2",
                executable="rviz2",
                arguments=["-d", written(view["rviz"]), "-f", view["root"]],
                parameters=[clock],
                **common,
            )
        )
    return started


def generate_launch_description() -> LaunchDescription:
    return LaunchDescription([*ARGUMENTS, OpaqueFunction(function=nodes)])
