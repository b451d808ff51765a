"""Every robot file that comes with the package reads a recording of its own robot: what it names, and nothing else."""

from __future__ import annotations

import bag_kit as kit
import numpy as np
import pytest
import yaml

from pi0_ros.robot_file import config_folder, load_robot, parse_robot
from pi0_ros.training.data import load_units
from pi0_ros.training.dataset import Dataset
from pi0_ros.training.inspect_bags import main

FILES = sorted(path for path in config_folder().glob("**/*.yaml") if "joints:" in path.read_text())


def own_recording(robot, seconds=1.0, rate=50):
    """Its cameras, its joint states, and what its controllers are told, each on its own topic; every joint moves."""
    items = []
    for i in range(round(seconds * rate)):
        ns = kit.START + i * kit.SECOND // rate
        share = i / seconds / rate
        places = {j.name: j.position[0] + share * (j.position[1] - j.position[0]) for j in robot.joints}
        for camera in robot.present_cameras.values():
            if camera.transport == "raw":
                items.append(kit.raw(ns, kit.picture(i), camera.topic))
            else:
                items.append(kit.compressed(ns, kit.picture(i), topic=f"{camera.topic}/compressed"))
        arms = np.array_split(robot.joint_names, len(robot.state.topics))
        for topic, names in zip(robot.state.topics, arms, strict=True):
            items.append(kit.joint_state(ns, [places[name] for name in names], names.tolist(), topic))
        for command in robot.commands:
            if command.action:  # its goals are in no recording
                continue
            names = command.joints or robot.joint_names
            values = [places[name] for name in names]
            if command.type == "Float64MultiArray":
                items.append(kit.floats(ns, values, command.topic))
            elif command.type == "JointState":
                items.append(kit.joint_state(ns, values, list(names), command.topic))
            else:
                items.append(kit.trajectory(ns, [(0.0, values)], names=names))
                items[-1].topic = command.topic
    return items


def test_the_robot_files_are_found():
    assert {path.name for path in FILES} >= {
        "so101_demo.yaml",
        "six_joint_arm.yaml",
        "bimanual.yaml",
        "robot.yaml",
        "ur5e_robotiq_2f85.yaml",
        "piper.yaml",
    }


@pytest.mark.parametrize("path", FILES, ids=[f"{path.parent.name}/{path.stem}" for path in FILES])
def test_a_recording_of_the_robots_own_topics_can_be_trained_on(tmp_path, path):
    robot = load_robot(path)
    bag = kit.write_bag(tmp_path / "bag", own_recording(robot))
    assert main([str(bag), "--robot", str(path), "--jobs", "1"]) == 0
    dataset = Dataset(load_units(bag, robot, 28, cache=tmp_path / "cache", idle=0, jobs=1), horizon=4)
    sample = dataset.sample(3)
    assert sample["action_mask"].all()
    # Each joint's own, gripper and all; of one that is told by goals, where it is a moment later.
    ways = np.array([joint.position[1] - joint.position[0] for joint in robot.joints])
    later = np.zeros(len(ways))
    for source in robot.actions:
        if source.type == "JointState":
            later[[robot.joint_names.index(name) for name in source.joints or robot.joint_names]] = source.latency
    gaps = np.abs(sample["actions"][0] - sample["state"] - later * ways)
    assert (gaps <= np.where(later, 0.02 * ways, 0) + 1e-9).all()  # joint states are 0.02 s apart


SECTIONS = yaml.safe_load(kit.ROBOT)


def test_a_source_that_is_not_in_the_recording_is_named(tmp_path, capsys):
    sources = [{"topic": "/command", "type": "JointTrajectory"}, {"topic": "/hand", "type": "JointState"}]
    (tmp_path / "robot.yaml").write_text(yaml.safe_dump(SECTIONS | {"actions": sources}))
    bag = kit.write_bag(tmp_path / "bag", kit.episode(seconds=1.0))
    assert main([str(bag), "--robot", str(tmp_path / "robot.yaml"), "--jobs", "1"]) == 1
    assert "actions[1]: topic /hand is not in the recording" in capsys.readouterr().err


def test_of_a_source_with_joints_only_those_count(tmp_path):
    """The leader's joint states hold its own gripper, which is commanded elsewhere."""
    items = [i for i in kit.episode(seconds=1.0) if i.topic != "/command"]
    for k in range(10):
        ns = kit.START + k * kit.SECOND // 10
        items += [kit.joint_state(ns, [k / 10, k / 10, 0.9], topic="/leader"), kit.floats(ns, [k / 10], "/hand")]
    sources = [
        {"topic": "/leader", "type": "JointState", "joints": ["shoulder", "elbow"]},
        {"topic": "/hand", "type": "Float64MultiArray", "joints": ["grip"], "latency": -0.1},
    ]
    robot = parse_robot(yaml.safe_dump(SECTIONS | {"actions": sources}))
    bag = kit.write_bag(tmp_path / "bag", items)
    (unit,) = load_units(bag, robot, 28, cache=tmp_path / "cache", idle=0, jobs=1)
    np.testing.assert_allclose(unit.arrays["actions"], [[k / 10, k / 10, max(k - 1, 0) / 10] for k in range(10)])
    assert unit.arrays["known"].tolist() == [False] + [True] * 9


def test_each_source_has_its_own_rate_in_the_report(tmp_path, capsys):
    robot = load_robot(config_folder() / "six_joint_arm.yaml")
    bag = kit.write_bag(tmp_path / "bag", own_recording(robot))
    main([str(bag), "--robot", str(config_folder() / "six_joint_arm.yaml"), "--jobs", "1"])
    out = capsys.readouterr().out
    assert "actions[0] (/joint_trajectory_controller/joint_trajectory): 50 messages, 50.0 Hz" in out
    assert "actions[1] (/gripper_controller/commands): 50 messages, 50.0 Hz" in out
