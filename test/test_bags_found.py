"""Recordings that other people made, and what is odd about each, said in plain words."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pi0_ros.policy.images import decode_image
from pi0_ros.robot_file import parse_robot
from pi0_ros.training.bags import Bag, decode, find_bags
from pi0_ros.training.episodes import Selection
from pi0_ros.training.recording import read_recording
from pi0_ros.training.report import inspect_bag

BAGS = Path(__file__).parent / "data" / "bags"


def robot_of(names, clock="header", state="/joint_states", camera="/camera/image_raw"):
    # some of them are wheels, which have turned often
    limits = "kind: prismatic, position: [-10000, 10000], velocity: 1, acceleration: 1"
    joints = "\n".join(f"  - {{name: {name}, {limits}}}" for name in names)
    return parse_robot(
        f"name: found\ncontrol_rate: 20\nclock: {clock}\ncameras: {{base_0_rgb: {{topic: {camera}}}}}\n"
        f"joints:\n{joints}\nstate: {{topics: [{state}]}}\nactions: {{topic: {state}, type: JointState}}\n"
        "commands: [{topic: /c, type: JointTrajectory}]\n"
    )


def read(folder, robot):
    (files,) = find_bags(BAGS / folder)
    with Bag(files) as bag:
        return read_recording(bag, robot)


def notes(folder, robot):
    (files,) = find_bags(BAGS / folder)
    return inspect_bag(files, robot, Selection(), 32, 1).numbers


def test_kuka_joint_names_out_of_order_are_read_by_name():
    folder = "KCL-BMEIS__trajectory_replay"
    recording = read(folder, robot_of([f"lbr_joint_{i}" for i in range(7)]))
    (state,) = recording.states
    assert state.joints == (0, 1, 2, 3, 4, 5, 6) and state.positions.shape == (403, 7)
    (files,) = find_bags(BAGS / folder)
    with Bag(files) as bag:
        _, _, data = next(bag.messages({"/joint_states"}))
    message = decode(data, "sensor_msgs/msg/JointState")
    assert [name[-1] for name in message.name] == list("1230456")
    assert state.positions[0, 0] == message.position[3] and state.positions[0, 1] == message.position[0]
    delay = (state.bag_ns - state.header_ns) / 1e6
    assert delay.min() >= 0.1 and 13 < delay.max() < 14
    found = notes(folder, robot_of([f"lbr_joint_{i}" for i in range(7)]))
    assert "/joint_states: joints are not in the robot file's order; read by name" in found["notes"]
    assert any("the arm stands still" in note and "blows up normalisation" in note for note in found["notes"])
    assert found["refused"].startswith("camera base_0_rgb: topic /camera/image_raw is not in the recording")


def test_turtlebot_clocks_that_drift_apart_are_named():
    robot = robot_of(["wheel_left_joint", "wheel_right_joint"])
    recording = read("Sameer-Arjun-S__Turtlebot_Walker_Algorithm_ROS2", robot)
    assert "/joint_states: header and bag clocks drift 7.44 s apart; aligned by header time" in recording.notes
    by_bag = robot_of(["wheel_left_joint", "wheel_right_joint"], clock="bag")
    other = read("Sameer-Arjun-S__Turtlebot_Walker_Algorithm_ROS2", by_bag)
    spans = [np.ptp(r.states[0].time_ns) / 1e9 for r in (recording, other)]
    assert spans[1] - spans[0] == pytest.approx(7.44, abs=0.01)


def test_gazebo_metadata_that_names_another_file_and_simulated_time():
    robot = robot_of(["wheel_left_joint", "wheel_right_joint"])
    recording = read("tathya7__my_gazebo_tutorials", robot)
    missing = "rosbag2_2024_11_24-17_59_42_0.db3"
    assert f"metadata.yaml names {missing}, which is not there; read my_bag.db3" in recording.notes
    assert "/joint_states: header stamps near 0: simulated or monotonic time" in recording.notes
    assert recording.states[0].positions.shape == (579, 2)


def test_amber_split_files_missing_and_a_type_of_ros_1_spelling():
    (files,) = find_bags(BAGS / "rosbag-sharing-community__amber")
    robot = robot_of(["a"])
    with Bag(files) as bag:
        recording = read_recording(bag, robot)
        ((topic, _, data),) = bag.messages({"/camera/image_raw"})
        image = decode_image(decode(data, bag.topics[topic].type))
    assert image.shape == (480, 640, 3) and image.std() > 10
    assert "12 of 13 split files are missing (soccer_goal_0.mcap, ...), the rest is read" in recording.notes
    assert "/camera/image_raw: type written 'sensor_msgs/Image', read as sensor_msgs/msg/Image" in recording.notes
    assert "metadata.yaml counts 251 messages, the files hold 1" in recording.notes
    assert recording.cameras["base_0_rgb"].header_ns.tolist() == [8297777777]
    assert "state: topic /joint_states is not in the recording; no topic has JointState" in recording.problems


def test_header_stamps_of_zero_cannot_be_aligned_and_the_way_out_is_named():
    folder = "jinbeizame007__rosbag2parquet"
    robot = robot_of(["joint1", "joint2", "joint3"], state="/one_shot/joint_state")
    recording = read(folder, robot)
    way_out = "set `clock: bag` in the robot file to align by time of recording"
    assert f"/one_shot/joint_state: every header stamp is 0; {way_out}" in recording.problems
    by_bag = read(folder, robot_of(["joint1", "joint2", "joint3"], clock="bag", state="/one_shot/joint_state"))
    assert not any("header stamp" in problem for problem in by_bag.problems)
    assert by_bag.states[0].positions.shape == (1, 3)
