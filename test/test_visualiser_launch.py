"""What opens RViz: the configuration's displays and topics, and what view.launch.py starts."""

import importlib.util
import tempfile
from pathlib import Path

import pytest
import yaml

from pi0_ros.robot import load_robot

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "config/so101_demo.yaml"
# rviz_default_plugins/plugins_description.xml and rviz_common/src/rviz_common/panel_factory.cpp, Jazzy and later.
DISPLAYS = {f"rviz_default_plugins/{name}" for name in ("Grid", "RobotModel", "MarkerArray", "Path", "Image")}
PANELS = {"rviz_common/Displays", "rviz_common/Views", "rviz_common/Time"}

needs_launch = pytest.mark.skipif(
    importlib.util.find_spec("launch_ros") is None,
    reason="launch_ros cannot be imported: it comes with a ROS 2 distribution, not as a wheel",
)


def displays(path: Path) -> dict[str, dict]:
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    return {display["Name"]: display for display in config["Visualization Manager"]["Displays"]}


def topics(path: Path) -> dict[str, str]:
    found = {name: d.get("Topic") or d.get("Description Topic") for name, d in displays(path).items()}
    return {name: topic["Value"] for name, topic in found.items() if topic}


def launch_file():
    spec = importlib.util.spec_from_file_location("view_launch", ROOT / "launch/view.launch.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def started(**arguments: str) -> list[dict]:
    """What view.launch.py would give launch_ros for each node that it starts."""
    from launch import LaunchContext

    module, context = launch_file(), LaunchContext(argv=[])
    module.Node = dict
    for argument in module.ARGUMENTS:
        argument.visit(context) if argument.name not in arguments else None
    context.launch_configurations.update(arguments)
    return module.nodes(context)


def test_the_configuration_names_displays_and_panels_that_rviz_has():
    config = yaml.safe_load((ROOT / "config/pi0.rviz").read_text(encoding="utf-8"))
    assert {display["Class"] for display in displays(ROOT / "config/pi0.rviz").values()} <= DISPLAYS
    assert {panel["Class"] for panel in config["Panels"]} <= PANELS


def test_the_configuration_as_it_is_fits_the_demo_robot_and_the_visualisers_own_topics():
    robot = load_robot(DEMO)
    assert topics(ROOT / "config/pi0.rviz") == {
        "Robot": "/robot_description",
        "Ghost": "/ghost/robot_description",
        "Chunk": "/visualiser/markers",
        "Trace": "/visualiser/trace",
        "right_wrist_0_rgb": "",
    } | {slot: camera.topic for slot, camera in robot.present_cameras.items()}


@pytest.fixture
def own_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


@needs_launch
def test_rviz_is_given_the_topics_of_the_robot_file_and_the_namespace(own_temporary_folder):
    path = Path(launch_file().rviz_config(load_robot(ROOT / "config/bimanual.yaml"), "/arm"))
    assert topics(path) == {
        "Robot": "/robot_description",
        "Ghost": "/arm/ghost/robot_description",
        "Chunk": "/arm/visualiser/markers",
        "Trace": "/arm/visualiser/trace",
        "base_0_rgb": "/cam_high/image_raw/compressed",
        "left_wrist_0_rgb": "/cam_left_wrist/image_raw/compressed",
        "right_wrist_0_rgb": "/cam_right_wrist/image_raw/compressed",
    }
    assert displays(path)["right_wrist_0_rgb"]["Enabled"]


@needs_launch
def test_the_ghost_hangs_on_the_robots_root_and_listens_to_the_visualiser(own_temporary_folder):
    viewer, ghost, joined, rviz = started(robot=str(DEMO), namespace="arm")
    assert (viewer["executable"], viewer["namespace"]) == ("visualiser", "arm")
    assert (ghost["executable"], ghost["namespace"]) == ("robot_state_publisher", "/arm/ghost")
    assert ghost["remappings"] == [("joint_states", "/arm/visualiser/ghost_joint_states")]
    assert {"frame_prefix": "ghost/"} in ghost["parameters"]
    assert joined["arguments"] == ["--frame-id", "base_link", "--child-frame-id", "ghost/base_link"]
    assert rviz["arguments"][2:] == ["-f", "base_link"]
    assert topics(Path(rviz["arguments"][1]))["Ghost"] == "/arm/ghost/robot_description"


@needs_launch
def test_a_robot_without_its_own_state_publisher_gets_one_and_rviz_can_stay_away():
    nodes = started(robot=str(DEMO), publish_robot="true", rviz="false")
    assert [node["executable"] for node in nodes] == [
        "visualiser",
        "robot_state_publisher",
        "static_transform_publisher",
        "robot_state_publisher",
    ]
    assert nodes[-1]["remappings"] == [("joint_states", "/joint_states")]
