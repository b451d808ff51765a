"""The policy node and the chunk player on a robot.

ros2 launch pi0_ros policy.launch.py robot:=my_arm.yaml checkpoint:=my_checkpoint
"""

from pathlib import Path

from launch import LaunchContext, LaunchDescription
from launch.actions import DeclareLaunchArgument, OpaqueFunction
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import Node

DEFAULTS = str(Path(__file__).parents[1] / "config/launch.params.yaml")
ARGUMENTS = [
    DeclareLaunchArgument("robot", default_value="", description="robot file; empty: the one in the checkpoint folder"),
    DeclareLaunchArgument(
        "checkpoint",
        default_value="",
        description="checkpoint folder; empty: random weights, which the player refuses unless it is a dry run",
    ),
    DeclareLaunchArgument("params_file", default_value="", description="node parameters (config/policy.params.yaml)"),
    DeclareLaunchArgument("namespace", default_value="", description="namespace of both nodes"),
    DeclareLaunchArgument(
        "dry_run", default_value="false", choices=["true", "false"], description="judge chunks, send no commands"
    ),
    DeclareLaunchArgument(
        "play_untrained",
        default_value="false",
        choices=["true", "false"],
        description="play random weights too: on a simulated arm",
    ),
    DeclareLaunchArgument(
        "only",
        default_value="",
        choices=["", "policy_node", "chunk_player"],
        description="this node alone, where GPU and arm have machines of their own",
    ),
    DeclareLaunchArgument(
        "autostart",
        default_value="",
        choices=["", "true", "false"],
        description="configure and activate both nodes; empty: as params_file says, else true",
    ),
    DeclareLaunchArgument(
        "use_sim_time",
        default_value="",
        choices=["", "true", "false"],
        description="time comes from /clock; empty: as params_file says, else false",
    ),
]


def nodes(context: LaunchContext) -> list[Node]:
    given = {argument.name: LaunchConfiguration(argument.name).perform(context) for argument in ARGUMENTS}
    # What is not given here is left to the parameter file, and what that leaves out to the defaults. In this order: of
    # the entries that match a node the last wins, and a dictionary before a file would be one with that after it.
    told = {name: given[name] == "true" for name in ("autostart", "use_sim_time") if given[name]}
    told |= {"robot_file": given["robot"]} if given["robot"] else {}
    told |= {"checkpoint": given["checkpoint"]} if given["checkpoint"] else {}  # the player's robot file may be there
    files = [DEFAULTS, *([given["params_file"]] if given["params_file"] else [])]
    played = {name: True for name in ("dry_run", "play_untrained") if given[name] == "true"}
    common = {"package": "pi0_ros", "namespace": given["namespace"], "output": "screen"}
    if not (given["robot"] or given["checkpoint"] or given["params_file"]):
        raise RuntimeError("give robot:=FILE (config/ has examples to copy), checkpoint:=FOLDER, or both")
    both = [
        Node(executable="policy_node", name="policy_node", parameters=[*files, told], **common),
        Node(executable="chunk_player", name="chunk_player", parameters=[*files, told | played], **common),
    ]
    return [node for node in both if given["only"] in ("", node.node_executable)]


def generate_launch_description() -> LaunchDescription:
    return LaunchDescription([*ARGUMENTS, OpaqueFunction(function=nodes)])
