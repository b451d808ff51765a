"""What opens RViz: the configuration's displays and topics, and what view.launch.py starts."""

import importlib.util
import json
import tempfile
from pathlib import Path

import pytest
import yaml

from pi0_ros.robot import CAMERA_SLOTS, Camera
from pi0_ros.robot_file import load_robot
from pi0_ros.ros.rviz import main, rviz_config

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "config/so101_demo.yaml"
# rviz_default_plugins/plugins_description.xml and rviz_common/src/rviz_common/panel_factory.cpp, Jazzy and later.
DISPLAYS = {f"rviz_default_plugins/{name}" for name in ("Grid", "RobotModel", "MarkerArray", "Path", "Image")}
PANELS = {"rviz_common/Displays", "rviz_common/Views", "rviz_common/Time"}

needs_launch = pytest.mark.skipif(
    importlib.util.find_spec("launch_ros") is None,
    reason="launch_ros cannot be imported: it comes with a ROS 2 distribution, not as a wheel",
)


CONFIG = (ROOT / "config/pi0.rviz").read_text(encoding="utf-8")


def displays(text: str) -> dict[str, dict]:
    config = yaml.safe_load(text)
    return {display["Name"]: display for display in config["Visualization Manager"]["Displays"]}


def topics(text: str) -> dict[str, str]:
    found = {name: d.get("Topic") or d.get("Description Topic") for name, d in displays(text).items()}
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
    assert {display["Class"] for display in displays(CONFIG).values()} <= DISPLAYS
    assert {panel["Class"] for panel in yaml.safe_load(CONFIG)["Panels"]} <= PANELS


def test_the_configuration_as_it_is_fits_the_demo_robot_and_the_visualisers_own_topics():
    robot = load_robot(DEMO)
    assert topics(CONFIG) == {
        "Robot": "/robot_description",
        "Ghost": "/ghost/robot_description",
        "Chunk": "/visualiser/markers",
        "Trace": "/visualiser/trace",
        "right_wrist_0_rgb": "",
    } | {slot: camera.topic for slot, camera in robot.present_cameras.items()}


def test_rviz_is_given_the_topics_of_the_robot_file_and_the_namespace():
    config = rviz_config(CONFIG, load_robot(ROOT / "config/bimanual.yaml"), "/arm")
    assert topics(config) == {
        "Robot": "/robot_description",
        "Ghost": "/arm/ghost/robot_description",
        "Chunk": "/arm/visualiser/markers",
        "Trace": "/arm/visualiser/trace",
        "base_0_rgb": "/cam_high/image_raw/compressed",
        "left_wrist_0_rgb": "/cam_left_wrist/image_raw/compressed",
        "right_wrist_0_rgb": "/cam_right_wrist/image_raw/compressed",
    }
    assert all(displays(config)[slot]["Enabled"] for slot in CAMERA_SLOTS)


def test_a_robot_file_without_a_camera_or_with_relative_topics_is_meant_too():
    relative = Camera(topic="eye/image", transport="compressed")
    robot = load_robot(DEMO)
    robot = robot.model_copy(update={"cameras": dict(robot.cameras, base_0_rgb=relative, left_wrist_0_rgb=None)})
    config = rviz_config(CONFIG, robot, "/arm")
    assert topics(config)["base_0_rgb"] == "/arm/eye/image/compressed"
    assert not displays(config)["left_wrist_0_rgb"]["Enabled"]
    assert displays(rviz_config(CONFIG, load_robot(DEMO), "")) == displays(CONFIG)


def test_what_the_launch_file_asks_for_is_told_as_json_and_mistakes_in_one_line(capsys, tmp_path):
    assert main([str(DEMO), "", "/arm"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["root"], told["joint_states"]) == ("base_link", ["/joint_states"])
    assert told["robot_description"].startswith("<robot") and Path(told["urdf"]).samefile(ROOT / "config/so101.urdf")
    assert topics(told["rviz"])["Ghost"] == "/arm/ghost/robot_description"
    for arguments, line in (
        ([str(tmp_path / "none.yaml")], f"error: {tmp_path}/none.yaml: cannot be read: No such file or directory"),
        ([""], "error: parameter 'robot_file': found '', give a robot file"),
        ([], "usage: view_settings ROBOT_FILE [URDF [NAMESPACE]]"),
    ):
        assert main(arguments)
        said = capsys.readouterr()
        assert said.out == "" and said.err.startswith(line) and said.err.count("\n") == 1


@needs_launch
def test_the_ghost_hangs_on_the_robots_root_and_listens_to_the_visualiser(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    viewer, ghost, joined, rviz = started(robot=str(DEMO), namespace="arm")
    assert (viewer["executable"], viewer["namespace"]) == ("visualiser", "arm")
    assert (ghost["executable"], ghost["namespace"]) == ("robot_state_publisher", "/arm/ghost")
    assert ghost["remappings"] == [("joint_states", "/arm/visualiser/ghost_joint_states")]
    assert {"frame_prefix": "ghost/"} in ghost["parameters"]
    assert joined["arguments"] == ["--frame-id", "base_link", "--child-frame-id", "ghost/base_link"]
    assert rviz["arguments"][2:] == ["-f", "base_link"]
    assert topics(Path(rviz["arguments"][1]).read_text(encoding="utf-8"))["Ghost"] == "/arm/ghost/robot_description"


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


@needs_launch
def test_every_joint_state_topic_of_the_robot_has_a_state_publisher(tmp_path):
    text = DEMO.read_text().replace("topics: [/joint_states]", "topics: [/joint_states, gripper/joint_states]")
    (tmp_path / "robot.yaml").write_text(text.replace("urdf: ", f"urdf: {DEMO.parent}/"))
    nodes = started(robot=str(tmp_path / "robot.yaml"), namespace="arm", publish_robot="true", rviz="false")
    assert [(node["name"], node["remappings"]) for node in nodes[3:]] == [
        ("robot_state_publisher", [("joint_states", "/joint_states")]),
        ("robot_state_publisher_1", [("joint_states", "/arm/gripper/joint_states")]),
    ]
