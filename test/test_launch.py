"""The launch files: what they start and with which parameters, and that the lifecycle comes up by itself.

`launch` and `launch_ros` come with a ROS 2 distribution, not as wheels: most of this is skipped without one.
"""

import ast
import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from test_structure import PROGRAMS

ROOT = Path(__file__).parents[1]
LAUNCH_FILES = sorted((ROOT / "launch").glob("*.launch.py"))
DEMO_ROBOT = ROOT / "config/so101_demo.yaml"

needs_launch = pytest.mark.skipif(
    importlib.util.find_spec("launch_ros") is None,
    reason="launch_ros cannot be imported: it comes with a ROS 2 distribution, not as a wheel",
)
# Runs a launch file as `ros2 launch` does, without needing ros2cli.
RUN = """
import sys
from launch import LaunchDescription, LaunchService
from launch.actions import IncludeLaunchDescription
from launch.launch_description_sources import PythonLaunchDescriptionSource
service = LaunchService()
arguments = [tuple(argument.split(":=")) for argument in sys.argv[2:]]
source = PythonLaunchDescriptionSource(sys.argv[1])
service.include_launch_description(
    LaunchDescription([IncludeLaunchDescription(source, launch_arguments=arguments)])
)
sys.exit(service.run())
"""


@pytest.mark.parametrize("path", LAUNCH_FILES, ids=lambda path: path.stem)
def test_a_launch_file_starts_only_programs_of_the_list(path):
    calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    given = [{keyword.arg: keyword.value for keyword in call.keywords} for call in calls]
    # rviz2 and the like name the package that they come from.
    ours = [words for words in given if ast.unparse(words.get("package", ast.Constant("pi0_ros"))) == "'pi0_ros'"]
    executables = {words["executable"].value for words in ours if "executable" in words}
    assert executables
    assert executables <= set(PROGRAMS)


@pytest.mark.parametrize("path", LAUNCH_FILES, ids=lambda path: path.stem)
def test_a_launch_file_needs_nothing_that_the_systems_python_lacks(path):
    """`ros2 launch` reads it with the Python of the distribution, whatever environment is active."""
    found = {
        name.partition(".")[0]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        for name in (
            [alias.name for alias in node.names] if isinstance(node, ast.Import)
            else [node.module] if isinstance(node, ast.ImportFrom) else []
        )
    }  # fmt: skip
    assert found <= {"launch", "launch_ros", "ament_index_python"} | sys.stdlib_module_names


def test_the_parameter_file_names_parameters_that_the_nodes_have_with_values_that_they_take():
    pytest.importorskip("rclpy", reason="needs ROS 2")
    from pi0_ros.ros import chunk_player, policy_node

    content = yaml.safe_load((ROOT / "config/policy.params.yaml").read_text(encoding="utf-8"))
    specs = {"/**/policy_node": policy_node.SPECS, "/**/chunk_player": chunk_player.SPECS}
    assert content.keys() == specs.keys()
    for node, section in content.items():
        known = {spec.name: spec for spec in specs[node]}
        for name, value in section["ros__parameters"].items():
            assert known[name].fault(value) is None, name
            assert value == known[name].default, f"{name}: the file says that it shows the defaults"


def started(path: Path, **arguments: str) -> list[str]:
    """The executables of the nodes that a launch file would start, in order; nothing is started."""
    from launch import LaunchContext
    from launch_ros.actions import Node

    spec = importlib.util.spec_from_file_location(path.stem.split(".")[0], path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    context = LaunchContext(argv=[])
    context.launch_configurations.update(arguments)
    found, todo = [], list(module.generate_launch_description().entities)
    while todo:
        entity = todo.pop(0)
        if isinstance(entity, Node):
            found.append(entity.node_executable)
        else:
            todo = [*(entity.visit(context) or []), *todo]
    return found


@pytest.mark.parametrize("key", ["/**/chunk_player", "/**", "/chunk_player", "chunk_player"])
def test_a_parameter_file_counts_over_the_launch_files_defaults_and_its_arguments_over_both(tmp_path, key):
    """By the three files that launch gives a node, in policy.launch.py's order; however the middle one names it."""
    rclpy = pytest.importorskip("rclpy", reason="needs ROS 2")
    given, told = tmp_path / "given.yaml", tmp_path / "told.yaml"
    given.write_text(
        yaml.safe_dump({key: {"ros__parameters": {"dry_run": False, "autostart": False, "velocity_scale": 0.2}}})
    )
    told.write_text(yaml.safe_dump({"/chunk_player": {"ros__parameters": {"dry_run": True}}}))
    arguments = ["--ros-args"]
    for path in (ROOT / "config/launch.params.yaml", given, told):
        arguments += ["--params-file", str(path)]
    context = rclpy.Context()
    rclpy.init(args=arguments, context=context)
    node = rclpy.create_node("chunk_player", context=context, automatically_declare_parameters_from_overrides=True)
    found = {name: node.get_parameter(name).value for name in ("dry_run", "autostart", "velocity_scale")}
    node.destroy_node()
    rclpy.shutdown(context=context)
    assert found == {"dry_run": True, "autostart": False, "velocity_scale": 0.2}


@needs_launch
def test_policy_launch_without_robot_and_checkpoint_says_what_to_give():
    with pytest.raises(RuntimeError, match=r"give robot:=FILE .* checkpoint:=FOLDER, or both"):
        started(ROOT / "launch/policy.launch.py")


@needs_launch
def test_policy_launch_starts_node_and_player():
    assert started(ROOT / "launch/policy.launch.py", robot=str(DEMO_ROBOT)) == ["policy_node", "chunk_player"]


@needs_launch
@pytest.mark.parametrize("only", ["policy_node", "chunk_player"])
def test_policy_launch_starts_one_of_them_where_arm_and_gpu_have_machines_of_their_own(only):
    assert started(ROOT / "launch/policy.launch.py", robot=str(DEMO_ROBOT), only=only) == [only]


@needs_launch
def test_demo_launch_adds_the_demo_robot():
    assert started(ROOT / "launch/demo.launch.py") == ["demo_robot", "policy_node", "chunk_player"]


@needs_launch
def test_policy_launch_brings_both_nodes_to_active_and_ends_them(ros, tmp_path):
    from lifecycle_msgs.msg import State
    from lifecycle_msgs.srv import GetState

    path = ROOT / "launch/policy.launch.py"
    arguments = [f"robot:={DEMO_ROBOT}", "namespace:=arm", "dry_run:=true"]
    with open(tmp_path / "launch.log", "wb") as log:
        launch = subprocess.Popen(
            [sys.executable, "-c", RUN, str(path), *arguments],
            cwd=tmp_path,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"ROS_LOG_DIR": str(tmp_path)},
            start_new_session=True,
        )
        try:
            node = ros.node("watcher")
            for name in ("policy_node", "chunk_player"):
                client = node.create_client(GetState, f"/arm/{name}/get_state")
                what = f"{name} is active; {tmp_path}/launch.log has its words"

                def active(client=client):
                    assert launch.poll() is None, (tmp_path / "launch.log").read_text()
                    return ros.call(client, GetState.Request(), 60).current_state.id == State.PRIMARY_STATE_ACTIVE

                ros.spin_until(active, 60, what)
            launch.send_signal(signal.SIGINT)
            assert launch.wait(30) == 0
        finally:
            with contextlib.suppress(ProcessLookupError):  # launch and its nodes, should any be left
                os.killpg(launch.pid, signal.SIGKILL)
    ros.spin_until(lambda: not {"policy_node", "chunk_player"} & set(node.get_node_names()), 30, "both nodes are gone")
