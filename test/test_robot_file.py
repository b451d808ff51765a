"""Every rule of the robot file: a valid file loads, each fault is one line that says what and where."""

import copy
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from pi0_ros.robot import CAMERA_SLOTS, Joint, Turns
from pi0_ros.robot_file import RobotFileError, config_folder, load_robot, parse_robot

CONFIG = Path(__file__).parents[1] / "config"

SMALL = {
    "name": "arm",
    "control_rate": 20,
    "cameras": {"base_0_rgb": {"topic": "/cam"}, "left_wrist_0_rgb": {"topic": "/wrist"}},
    "joints": [
        {"name": "a", "position": [-1.0, 1.0], "velocity": 1.0, "acceleration": 2.0},
        {
            "name": "g",
            "kind": "gripper",
            "position": [0.0, 0.8],
            "velocity": 1.0,
            "acceleration": 2.0,
            "open": 0.8,
            "closed": 0.0,
        },
    ],
    "actions": {"topic": "/recorded", "type": "JointState"},
    "commands": [{"topic": "/command", "type": "JointTrajectory"}],
}


def changed(path: str, value: object) -> dict:
    """SMALL with the field at the dotted path set, or removed when value is `...`."""
    data = copy.deepcopy(SMALL)
    *way, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    section = data
    for part in way:
        section = section.setdefault(part, {}) if isinstance(section, dict) else section[part]
    if value is ...:
        del section[last]
    else:
        section[last] = value
    return data


def fault(data: object) -> str:
    with pytest.raises(RobotFileError) as caught:
        parse_robot(data if isinstance(data, str) else yaml.safe_dump(data), "arm.yaml")
    message = str(caught.value)
    assert message.startswith("arm.yaml: ")
    return message.removeprefix("arm.yaml: ")


def test_small_robot_loads_with_the_defaults_that_the_schema_promises():
    robot = parse_robot(yaml.safe_dump(SMALL))
    assert robot.dt == 0.05
    assert robot.joint_names == ("a", "g")
    assert [joint.relative for joint in robot.joints] == [True, False]  # grippers are absolute
    assert list(robot.cameras) == list(CAMERA_SLOTS)
    assert robot.cameras["right_wrist_0_rgb"] is None
    assert list(robot.present_cameras) == ["base_0_rgb", "left_wrist_0_rgb"]
    assert robot.state.topics == ("joint_states",)
    assert robot.prompt.topic == "prompt"
    assert robot.clock == "header"


def test_recorded_actions_are_one_source_or_a_list_and_are_written_as_they_were_read():
    one, none = parse_robot(yaml.safe_dump(SMALL)), parse_robot(yaml.safe_dump(SMALL | {"actions": None}))
    assert [source.topic for source in one.actions] == ["/recorded"] and none.actions == ()
    assert yaml.safe_load(one.to_yaml())["actions"]["topic"] == "/recorded"
    sources = [
        {"topic": "/r", "type": "JointTrajectory"},
        {"topic": "/s", "type": "Float64MultiArray", "joints": ["g"], "latency": 0.1},
    ]
    two = parse_robot(yaml.safe_dump(SMALL | {"actions": sources}))
    assert two.action_sources == {"actions[0]": two.actions[0], "actions[1]": two.actions[1]}
    assert one.action_sources == {"actions": one.actions[0]}
    for robot in (one, none, two):
        assert parse_robot(robot.to_yaml()) == robot


def test_camera_slots_come_out_in_model_order_whatever_the_file_says():
    cameras = {slot: {"topic": f"/{slot}"} for slot in reversed(CAMERA_SLOTS)}
    robot = parse_robot(yaml.safe_dump(SMALL | {"cameras": cameras}))
    assert tuple(robot.present_cameras) == CAMERA_SLOTS


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("control_rat", 20, "control_rat: unknown field, allowed: name, control_rate, cameras, joints, state"),
        ("cameras.base_0_rgb.rotat", 90, "cameras.base_0_rgb.rotat: unknown field, allowed: topic, transport, rotate"),
        ("joints.0.min", 0, "joints.0.min: unknown field, allowed: name, kind, position, velocity"),
        ("state.topic", "/x", "state.topic: unknown field, allowed: topics, max_age, latency"),
        ("actions.rate", 2, "actions.rate: unknown field, allowed: topic, type, latency, joints"),
        ("commands.0.rate", 2, "commands.0.rate: unknown field, allowed: topic, type, joints, max_effort"),
        ("prompt.text", "x", "prompt.text: unknown field, allowed: default, topic"),
        ("name", ..., "name: missing, this field is required"),
        ("control_rate", ..., "control_rate: missing"),
        ("cameras", ..., "cameras: missing"),
        ("joints", ..., "joints: missing"),
        ("commands", ..., "commands: missing"),
        ("joints.0.velocity", ..., "joints.0.velocity: missing"),
        ("control_rate", 0, "control_rate: found 0; input should be greater than 0"),
        ("control_rate", -5, "control_rate: found -5; input should be greater than 0"),
        ("control_rate", float("inf"), "control_rate: found inf; input should be a finite number"),
        ("control_rate", "fast", "control_rate: found 'fast'; input should be a valid number"),
        ("cameras.top", {"topic": "/x"}, "cameras: unknown camera slot 'top', allowed: base_0_rgb, left_wrist_0_rgb"),
        ("cameras", {"base_0_rgb": None}, "cameras: no camera given, at least one of base_0_rgb"),
        ("cameras.left_wrist_0_rgb.topic", "/cam", "cameras: two camera slots share a topic: /cam, /cam"),
        ("cameras.base_0_rgb.transport", "h264", "transport: found 'h264'; input should be 'raw' or 'compressed'"),
        ("cameras.base_0_rgb.rotate", 45, "rotate: found 45; input should be 0, 90, 180 or 270"),
        ("cameras.base_0_rgb.flip", "both", "flip: found 'both'; input should be 'none', 'horizontal' or 'vertical'"),
        ("cameras.base_0_rgb.max_age", 0, "cameras.base_0_rgb.max_age: found 0; input should be greater than 0"),
        ("cameras.base_0_rgb.max_age", 300, "max_age: found 300 s, at most 30 s are allowed; are these milliseconds?"),
        ("cameras.base_0_rgb.latency", 20, "latency: found 20 s, at most 5 s are allowed; are these milliseconds?"),
        ("max_skew", 50, "max_skew: found 50 s, at most 30 s are allowed; are these milliseconds?"),
        ("cameras.base_0_rgb.latency", -0.1, "latency: found -0.1; input should be greater than or equal to 0"),
        ("cameras.base_0_rgb.topic", "/my cam", "cameras.base_0_rgb.topic: '/my cam' is not a topic name"),
        ("cameras.base_0_rgb.topic", "/cam/compressed", "give it without /compressed, and transport: compressed"),
        ("joints.0.position", [-360, 360], "must be in radians, within 30 rad and 50 rad/s; are these degrees?"),
        ("joints.0.velocity", 180, "velocity 180 must be in radians"),
        ("cameras.base_0_rgb.topic", "/2cam", "cameras.base_0_rgb.topic: '/2cam' is not a topic name"),
        ("cameras.base_0_rgb.topic", "/cam/", "cameras.base_0_rgb.topic: '/cam/' is not a topic name"),
        ("cameras.base_0_rgb.topic", "", "cameras.base_0_rgb.topic: '' is not a topic name"),
        ("joints", [], "joints: at least one is needed, found none"),
        ("joints.1.name", "a", "joints: names must differ, found ['a', 'a']"),
        ("joints.0.kind", "linear", "kind: found 'linear'; input should be 'revolute', 'continuous', 'prismatic' or"),
        ("joints.0.position", [1.0, -1.0], "joint 'a': position [1.0, -1.0] must be [lowest, highest]"),
        ("joints.0.position", [1.0, 1.0], "joint 'a': position [1.0, 1.0] must be [lowest, highest]"),
        ("joints.0.position", [float("nan"), 1.0], "joints.0.position.0: found nan; input should be a finite number"),
        ("joints.0.position", [1.0], "joints.0.position.1: missing"),
        ("joints.0.velocity", 0, "joints.0.velocity: found 0; input should be greater than 0"),
        ("joints.0.acceleration", -1, "joints.0.acceleration: found -1; input should be greater than 0"),
        ("joints.0.action", "delta", "action: found 'delta'; input should be 'relative' or 'absolute'"),
        ("joints.0.open", 0.5, "joint 'a': 'open' and 'closed' are for kind: gripper, found kind: revolute"),
        (
            "joints.1.open",
            ...,
            "joint 'g': a gripper needs 'open' and 'closed', two different positions, found open=None",
        ),
        (
            "joints.1.closed",
            0.8,
            "joint 'g': a gripper needs 'open' and 'closed', two different positions, found open=0.8",
        ),
        ("joints.1.open", 0.9, "joint 'g': open 0.9 lies outside position [0.0, 0.8]"),
        ("joints.1.closed", -0.1, "joint 'g': closed -0.1 lies outside position [0.0, 0.8]"),
        ("state.topics", [], "state.topics: needs at least one JointState topic, found none"),
        ("state.topics", ["a b"], "state.topics.0: 'a b' is not a topic name"),
        ("state.max_age", 0, "state.max_age: found 0; input should be greater than 0"),
        ("state.latency", -1, "state.latency: found -1; input should be greater than or equal to 0"),
        ("actions.type", "Twist", "actions.type: found 'Twist'; input should be 'JointState', 'JointTrajectory' or"),
        ("actions.joints", ["a", "b"], "actions.joints: unknown joints ['b'], allowed: ['a', 'g']"),
        (
            "actions.joints",
            ["a", "a"],
            "actions.joints: every joint must be there exactly once, but g is missing and a is there twice",
        ),
        ("actions", [{"topic": "/r", "type": "Twist"}], "actions.0.type: found 'Twist'; input should be"),
        ("actions", "/recorded", "actions: found '/recorded'; input should be a list"),
        (
            "actions",
            [{"topic": "/r", "type": "JointState"}, {"topic": "/r", "type": "JointState"}],
            "actions: two sources share a topic: /r, /r",
        ),
        (
            "actions",
            [{"topic": "/r", "type": "JointState"}, {"topic": "/s", "type": "JointState", "joints": ["b"]}],
            "actions[1].joints: unknown joints ['b'], allowed: ['a', 'g']",
        ),
        (
            "actions",
            [{"topic": t, "type": "Float64MultiArray", "joints": [j]} for t, j in (("/r", "a"), ("/s", "a"))],
            "actions: every joint must be there exactly once, but g is missing and a is there twice",
        ),
        (
            "actions",
            [{"topic": "/r", "type": "Float64MultiArray"}, {"topic": "/s", "type": "JointState", "joints": ["g"]}],
            "actions: every joint must be there exactly once, but g is there twice",
        ),
        ("commands", [], "commands: at least one controller is needed, found none"),
        (
            "commands.0.type",
            "Image",
            "found 'Image'; input should be 'JointTrajectory', 'Float64MultiArray', 'JointState', 'GripperCommand' or",
        ),
        (
            "commands",
            [{"topic": "/joint_states", "type": "JointState"}],
            "commands[0]: /joint_states is where the driver tells joint states, its commands have another topic",
        ),
        (
            "commands.0.type",
            "GripperCommand",
            "commands[0]: type GripperCommand is for one joint of kind: gripper, found a (revolute), g (gripper)",
        ),
        (
            "commands.0.max_effort",
            40,
            "commands[0]: max_effort is for GripperCommand and ParallelGripperCommand, found type: JointTrajectory",
        ),
        ("commands.0.joints", ["a", "b"], "commands[0]: unknown joints ['b'], allowed: ['a', 'g']"),
        ("commands.0.joints", ["a"], "commands: every joint must be commanded exactly once, but g is missing"),
        ("max_skew", 0, "max_skew: found 0; input should be greater than 0"),
        ("clock", "wall", "clock: found 'wall'; input should be 'header' or 'bag'"),
        ("episode_topic", "an episode", "episode_topic: 'an episode' is not a topic name"),
        ("prompt.topic", "/prompt/", "prompt.topic: '/prompt/' is not a topic name"),
    ],
)
def test_a_broken_rule_is_one_line_with_field_value_and_what_is_allowed(path, value, message):
    found = fault(changed(path, value))
    assert message in found
    assert "\n" not in found


def test_two_controllers_may_not_command_a_joint_both():
    twice = [
        {"topic": "/one", "type": "JointTrajectory", "joints": ["a", "g"]},
        {"topic": "/two", "type": "Float64MultiArray", "joints": ["g"]},
    ]
    assert "every joint must be commanded exactly once, but g is there twice" in fault(SMALL | {"commands": twice})


def test_two_controllers_may_not_share_a_topic():
    shared = [{"topic": "/one", "type": "Float64MultiArray", "joints": [name]} for name in ("a", "g")]
    assert "commands: two controllers share a topic: /one, /one" in fault(SMALL | {"commands": shared})


def test_a_topic_without_names_has_one_order_for_recordings_and_for_the_robot():
    def both(recorded, kind="Float64MultiArray", **command):
        actions = {"topic": "/c", "type": kind, "joints": recorded}
        return SMALL | {"actions": actions, "commands": [{"topic": "/c", "type": kind, **command}]}

    said = "actions.joints and commands[0].joints must be the same, both are the order of /c: found "
    assert said + "['g', 'a'] and ['a', 'g']" in fault(both(["g", "a"]))
    assert said + "['a', 'g'] and ['g', 'a']" in fault(both(["a", "g"], joints=["g", "a"]))
    for sound in (
        both(None),
        both(["a", "g"]),
        both(["g", "a"], joints=["g", "a"]),
        both(["g", "a"], "JointTrajectory"),
    ):
        parse_robot(yaml.safe_dump(sound))


def test_more_joints_than_the_model_has_dimensions_are_refused():
    joints = [SMALL["joints"][0] | {"name": f"j{i}"} for i in range(33)]
    assert "the model has 32 action dimensions, found 33 joints" in fault(SMALL | {"joints": joints})
    assert len(parse_robot(yaml.safe_dump(SMALL | {"joints": joints[:32]})).joints) == 32


def test_every_fault_of_a_file_gets_its_own_line():
    data = changed("control_rate", 0) | {"nam": "x"}
    lines = fault(data).splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("control_rate: ")
    assert lines[1].startswith("arm.yaml: nam: unknown field")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: [arm", "not YAML at line 1, column 11: expected ',' or ']', but got '<stream end>'"),
        ("name: a\x00b", "not YAML: unacceptable character #x0000"),
        ("name: one\nname: two\n", "not YAML at line 2, column 1: 'name' is given twice"),
        ("", "expected a mapping of fields (name, joints, cameras, ...), found None"),
        ("- name", "expected a mapping of fields (name, joints, cameras, ...), found ['name']"),
    ],
)
def test_a_text_that_is_no_mapping_says_so_in_one_line(text, message):
    found = fault(text)
    assert message in found
    assert "\n" not in found


def test_a_camera_slot_given_twice_is_an_error():
    text = "cameras:\n  base_0_rgb: {topic: /a}\n  base_0_rgb: {topic: /b}\n"
    assert fault(text) == "not YAML at line 3, column 3: 'base_0_rgb' is given twice"


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(RobotFileError, match=re.escape(f"{tmp_path}/no.yaml: cannot be read: No such file")):
        load_robot(tmp_path / "no.yaml")
    with pytest.raises(RobotFileError, match=re.escape(f"{tmp_path}/robot.yaml: cannot be read: No such file")):
        load_robot(tmp_path)  # as a checkpoint folder that has none
    (tmp_path / "latin.yaml").write_bytes("name: Käfer".encode("latin-1"))
    with pytest.raises(RobotFileError, match="latin.yaml: cannot be read: 'utf-8' codec"):
        load_robot(tmp_path / "latin.yaml")


@settings(max_examples=30, deadline=None)
@given(st.recursive(st.none() | st.booleans() | st.floats() | st.text(), lambda inner: st.lists(inner)))
def test_any_value_in_any_field_loads_or_is_a_robot_file_error(value):
    for path in (
        "name",
        "cameras",
        "joints",
        "joints.0.position",
        "state",
        "state.topics",
        "commands.0.joints",
        "urdf",
    ):
        try:
            parse_robot(yaml.safe_dump(changed(path, value)))
        except RobotFileError as error:
            assert str(error)


ROBOT_FILES = sorted(
    path for path in (*CONFIG.glob("*.yaml"), *CONFIG.glob("arms/*.yaml")) if not path.name.endswith(".params.yaml")
)


@pytest.mark.parametrize("path", ROBOT_FILES, ids=lambda path: path.stem)
def test_shipped_robot_loads_and_its_yaml_loads_as_the_same_robot(path):
    robot = load_robot(path)
    assert parse_robot(robot.to_yaml()) == robot
    assert robot.name == path.stem
    assert robot.contradictions(robot) == []


def test_shipped_robots_are_the_ones_that_the_design_names():
    assert config_folder() == CONFIG
    demo, six, both = (load_robot(CONFIG / f"{name}.yaml") for name in ("so101_demo", "six_joint_arm", "bimanual"))
    assert len(demo.joints) == 6
    assert list(six.present_cameras) == ["base_0_rgb", "left_wrist_0_rgb"]
    assert len(both.joints) == 14
    assert tuple(both.present_cameras) == CAMERA_SLOTS


@pytest.mark.parametrize(
    ("path", "value", "line"),
    [
        ("control_rate", 50, "control_rate: 20 Hz in the checkpoint, 50 Hz in the robot file"),
        (
            "cameras",
            {"base_0_rgb": {"topic": "/cam"}},
            "cameras: ['base_0_rgb', 'left_wrist_0_rgb'] in the checkpoint, ['base_0_rgb'] in the robot file",
        ),
        ("joints.0.name", "b", "joints: ['a', 'g'] in the checkpoint, ['b', 'g'] in the robot file"),
        ("joints.0.kind", "prismatic", "joint 'a' kind: revolute in the checkpoint, prismatic in the robot file"),
        ("joints.0.action", "absolute", "joint 'a' relative: True in the checkpoint, False in the robot file"),
        ("joints.1.open", 0.7, "joint 'g' open: 0.8 in the checkpoint, 0.7 in the robot file"),
        ("joints.1.closed", 0.1, "joint 'g' closed: 0.0 in the checkpoint, 0.1 in the robot file"),
    ],
)
def test_what_changes_the_meaning_of_numbers_is_a_contradiction(path, value, line):
    mine, theirs = parse_robot(yaml.safe_dump(SMALL)), parse_robot(yaml.safe_dump(changed(path, value)))
    assert mine.contradictions(theirs) == [line]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("name", "other"),
        ("cameras.base_0_rgb.topic", "/elsewhere"),
        ("cameras.base_0_rgb.max_age", 0.5),
        ("joints.0.velocity", 0.1),
        ("joints.0.position", [-0.5, 0.5]),
        ("commands.0.type", "Float64MultiArray"),
        ("max_skew", 0.5),
    ],
)
def test_topics_ages_and_limits_may_differ_between_recording_and_robot(path, value):
    mine, theirs = parse_robot(yaml.safe_dump(SMALL)), parse_robot(yaml.safe_dump(changed(path, value)))
    assert mine.contradictions(theirs) == mine.differences(theirs) == []


@pytest.mark.parametrize(
    ("path", "value", "line"),
    [
        ("cameras.base_0_rgb.rotate", 180, "base_0_rgb.rotate: 0 in the checkpoint, 180 in the robot file"),
        (
            "cameras.left_wrist_0_rgb.flip",
            "vertical",
            "left_wrist_0_rgb.flip: none in the checkpoint, vertical in the robot file",
        ),
        ("cameras.base_0_rgb.latency", 0.1, "base_0_rgb.latency: 0.0 in the checkpoint, 0.1 in the robot file"),
        ("state", {"latency": 0.1}, "state.latency: 0.0 in the checkpoint, 0.1 in the robot file"),
    ],
)
def test_what_depends_on_how_a_camera_is_mounted_and_how_late_things_come_is_a_difference(path, value, line):
    mine, theirs = parse_robot(yaml.safe_dump(SMALL)), parse_robot(yaml.safe_dump(changed(path, value)))
    assert mine.differences(theirs) == [line] and mine.contradictions(theirs) == []


def test_cameras_in_one_anothers_slots_are_a_difference_and_other_topics_are_none():
    mine = parse_robot(yaml.safe_dump(SMALL))
    swapped = {"base_0_rgb": {"topic": "/wrist"}, "left_wrist_0_rgb": {"topic": "/cam"}}
    assert mine.differences(parse_robot(yaml.safe_dump(SMALL | {"cameras": swapped}))) == [
        "base_0_rgb.topic: /cam in the checkpoint, /wrist in the robot file",
        "left_wrist_0_rgb.topic: /wrist in the checkpoint, /cam in the robot file",
    ]
    others = {"base_0_rgb": {"topic": "/left/cam"}, "left_wrist_0_rgb": {"topic": "/left/wrist"}}
    assert mine.differences(parse_robot(yaml.safe_dump(SMALL | {"cameras": others}))) == []


def test_a_continuous_joint_is_meant_in_the_turn_around_the_middle_of_its_limits():
    joint = {"name": "a", "kind": "continuous", "position": [0.4, 5.9], "velocity": 1, "acceleration": 1}
    joints = [Joint(**joint), Joint(**joint | {"name": "b", "kind": "revolute"})]
    assert joints[0].unit == "rad" and joints[0].angle
    turns = Turns(joints)
    for told, meant in [(-3.0, 2 * np.pi - 3.0), (3.0, 3.0), (9.3, 9.3 - 2 * np.pi), (0.0, 2 * np.pi), (0.02, 0.02)]:
        np.testing.assert_allclose(told - turns(np.array([told, told])), [meant, told], atol=1e-12)
    assert turns(np.array([np.inf, np.nan]), [1, 1]).tolist() == [0.0, 0.0]
    assert turns(np.array([15.7]), [0]).tolist() == [4 * np.pi]


def test_limits_of_a_continuous_joint_are_within_a_turn():
    with pytest.raises(ValueError, match=r"joint 'a': position \[-3.0, 3.0\] of a continuous joint must leave 0.5 rad"):
        Joint(name="a", kind="continuous", position=(-3.0, 3.0), velocity=1, acceleration=1)
    with pytest.raises(ValueError, match="are these degrees"):
        Joint(name="a", kind="continuous", position=(177, 183), velocity=1, acceleration=1)


@pytest.mark.parametrize(("position", "fits"), [([-2.8, 2.8], True), ([0.0, 3.1], True), ([0.0, 3.2], False)])
def test_limits_of_a_continuous_joint_may_differ_from_a_checkpoints_while_its_angles_mean_the_same(position, fits):
    def robot(limits):
        data = copy.deepcopy(SMALL)
        data["joints"][0] |= {"kind": "continuous", "position": limits}
        return parse_robot(yaml.safe_dump(data))

    found = robot([-2.5, 2.5]).contradictions(robot(position))
    said = "joint 'a' position, which says what its angles mean: (-2.5, 2.5) in the checkpoint, (0.0, 3.2) in the robot"
    assert found == ([] if fits else [f"{said} file"])
