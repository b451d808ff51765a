"""The demo robot, a simulated SO-101, with the policy node and the chunk player on it.

ros2 launch pi0_ros demo.launch.py                              # the policy that ships
ros2 launch pi0_ros demo.launch.py checkpoint:=my_checkpoint    # or another

Takes the arguments of policy.launch.py too.
"""

from pathlib import Path

from launch import LaunchDescription
from launch.actions import DeclareLaunchArgument, IncludeLaunchDescription
from launch.launch_description_sources import PythonLaunchDescriptionSource
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import Node

SHARE = Path(__file__).parents[1]


def generate_launch_description() -> LaunchDescription:
    return LaunchDescription(
        [
            DeclareLaunchArgument(
                "robot", default_value=str(SHARE / "config/so101_demo.yaml"), description="robot file of the demo arm"
            ),
            DeclareLaunchArgument(
                "checkpoint",
                default_value=str(SHARE / "config/demo_policy"),
                description="checkpoint folder; empty: random weights",
            ),
            DeclareLaunchArgument(
                "use_sim_time",
                default_value="false",
                choices=["true", "false"],
                description="the demo robot publishes /clock, and time comes from there",
            ),
            Node(
                package="pi0_ros",
                executable="demo_robot",
                name="demo_robot",
                output="screen",
                parameters=[{"use_sim_time": LaunchConfiguration("use_sim_time")}],
            ),
            IncludeLaunchDescription(
                PythonLaunchDescriptionSource(str(SHARE / "launch/policy.launch.py")),
                launch_arguments={
                    **{name: LaunchConfiguration(name) for name in ("robot", "checkpoint")},
                    "play_untrained": "true",
                }.items(),
            ),
        ]
    )
