"""The demo robot over real topics: what a policy, a player and a recorder would see."""

import os
import signal
import subprocess
import sys

import cv2
import numpy as np
import pytest

pytest.importorskip("rclpy", reason="needs ROS 2")
from rclpy.parameter import Parameter
from rclpy.qos import DurabilityPolicy, QoSProfile, qos_profile_sensor_data
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import CameraInfo, CompressedImage, Image, JointState
from std_msgs.msg import Float64MultiArray, String
from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint

from pi0_ros.demo.robot_node import RobotNode
from pi0_ros.demo.scene import JOINTS
from pi0_ros.policy.images import decode_image
from pi0_ros.ros.conversions import stamp_ns, to_stamp
from pi0_ros.ros.parameters import ParameterError
from pi0_ros.ros.qos import PROFILES, room_for_images
from pi0_ros.srv import EpisodeOutcome, ResetEpisode


class Bench:
    """A demo robot and a node that listens to it."""

    def __init__(self, ros, **parameters) -> None:
        self.ros = ros
        overrides = [Parameter(name, value=value) for name, value in parameters.items()]
        self.robot = ros.add(RobotNode(parameter_overrides=overrides))
        self.node = ros.node("bench")
        self.warnings: list[str] = []
        self.robot.get_logger().warning = lambda text, **_: self.warnings.append(text)
        self.states = self.listen(JointState, "joint_states")
        self.trajectories = self.node.create_publisher(
            JointTrajectory, "joint_trajectory_controller/joint_trajectory", 10
        )
        self.positions = self.node.create_publisher(Float64MultiArray, "forward_position_controller/commands", 10)
        self.reset_client = self.node.create_client(ResetEpisode, "reset_episode")
        self.outcome_client = self.node.create_client(EpisodeOutcome, "episode_outcome")
        ros.spin_until(lambda: self.states and self.trajectories.get_subscription_count())

    def listen(self, kind, topic, qos=10) -> list:
        heard = []
        self.node.create_subscription(kind, topic, heard.append, qos)
        return heard

    def state(self) -> np.ndarray:
        return np.array(self.states[-1].position)

    def send(self, positions, seconds=0.3, names=JOINTS, stamp=0) -> None:
        point = JointTrajectoryPoint(positions=[float(value) for value in positions])
        point.time_from_start.nanosec = round(seconds * 1e9)
        message = JointTrajectory(joint_names=list(names), points=[point])
        message.header.stamp = to_stamp(stamp)
        self.trajectories.publish(message)

    def reset(self, seed: int, prompt: str = "") -> ResetEpisode.Response:
        return self.ros.call(self.reset_client, ResetEpisode.Request(seed=seed, prompt=prompt))

    def outcome(self) -> EpisodeOutcome.Response:
        return self.ros.call(self.outcome_client, EpisodeOutcome.Request())


@pytest.fixture
def bench(ros):
    return Bench(ros, width=96, height=64, rate=30.0)


def test_a_trajectory_and_a_position_command_move_the_arm(ros, bench):
    start = bench.state()
    target = start + [0.2, 0.1, -0.1, -0.1, 0.2, 0.1]
    bench.send(target[::-1], names=JOINTS[::-1])
    ros.spin_until(lambda: np.abs(bench.state() - target).max() < 0.02, what="the trajectory is followed")
    bench.positions.publish(Float64MultiArray(data=start.tolist()))
    ros.spin_until(lambda: np.abs(bench.state() - start).max() < 0.02, what="the position command is followed")
    assert bench.states[-1].name == list(JOINTS)
    stamps = np.array([stamp_ns(state.header.stamp) for state in bench.states])
    assert set(np.diff(stamps)) == {20_000_000}
    assert not bench.warnings


def test_a_command_for_the_scene_before_a_reset_moves_nothing(ros, bench):
    sent = bench.robot.get_clock().now().nanoseconds
    bench.reset(7)
    after = bench.robot.get_clock().now().nanoseconds
    ros.spin_until(lambda: stamp_ns(bench.states[-1].header.stamp) > after, what="a joint state of the new scene")
    start = bench.state()
    bench.send(start + 0.3, seconds=0.05, stamp=sent)
    bench.send(start - [0, 0, 0, 0, 0, 0.1], seconds=0.05, stamp=bench.robot.get_clock().now().nanoseconds)
    begin = len(bench.states)

    def arrived() -> bool:  # the gripper's start shakes the arm a little
        return bench.state()[5] < start[5] - 0.08 and np.abs(bench.state()[:5] - start[:5]).max() < 0.02

    ros.spin_until(arrived, what="the gripper alone has moved")
    way = np.array([state.position[:5] for state in bench.states[begin:]])
    assert np.abs(way - start[:5]).max() < 0.1  # of the 0.3 of the command before


def test_bad_commands_are_refused_in_one_line_each_and_the_arm_stays(ros, bench):
    start = bench.state()
    bench.send(start + 1, names=("a", *JOINTS[1:]))
    bench.send([float("nan")] * 6)
    bench.trajectories.publish(JointTrajectory(joint_names=list(JOINTS)))
    bench.positions.publish(Float64MultiArray(data=[1.0]))
    ros.spin_until(lambda: len(bench.warnings) == 4, what="four refusals")
    assert sorted(line.partition(":")[0] for line in bench.warnings) == [
        "position command refused", "trajectory refused", "trajectory refused", "trajectory refused",
    ]  # fmt: skip
    assert not any("\n" in line for line in bench.warnings)
    heard = len(bench.states)
    ros.spin_until(lambda: len(bench.states) > heard + 10)
    np.testing.assert_allclose(bench.state(), start, atol=0.02)


@pytest.mark.parametrize(
    ("distribution", "name"),
    [("", "FASTDDS_DEFAULT_PROFILES_FILE"), ("jazzy", "FASTRTPS_DEFAULT_PROFILES_FILE")],
)
def test_raw_images_get_room_by_the_name_that_fast_dds_reads_unless_somebody_chose(distribution, name, monkeypatch):
    for chosen in (*PROFILES, "FASTDDS_BUILTIN_TRANSPORTS"):
        monkeypatch.delenv(chosen, raising=False)
    monkeypatch.setenv("ROS_DISTRO", distribution)
    ((key, path),) = room_for_images().items()
    assert key == name and os.path.isfile(path)
    monkeypatch.setenv("FASTDDS_BUILTIN_TRANSPORTS", "LARGE_DATA")
    assert room_for_images() == {}


def test_cameras_publish_raw_and_compressed_of_the_same_moment_with_their_geometry(ros, bench):
    raw = bench.listen(Image, "base_camera/image_raw", qos_profile_sensor_data)
    jpeg = bench.listen(CompressedImage, "base_camera/image_raw/compressed", qos_profile_sensor_data)
    info = bench.listen(CameraInfo, "base_camera/camera_info", qos_profile_sensor_data)
    wrist = bench.listen(Image, "wrist_camera/image_raw", qos_profile_sensor_data)

    def same_moment():
        frames = {stamp_ns(message.header.stamp): message for message in raw}
        return next(((frames[s], m) for m in jpeg if (s := stamp_ns(m.header.stamp)) in frames), None)

    image, compressed = ros.spin_until(same_moment, what="a raw and a compressed image of one moment")
    ros.spin_until(lambda: wrist, what="an image of the other camera, too")
    assert (image.width, image.height, image.encoding, image.header.frame_id) == (96, 64, "rgb8", "base_camera")
    pixels = decode_image(image)
    assert pixels.shape == (64, 96, 3) and 40 < pixels.mean() < 220
    assert np.abs(decode_image(compressed).astype(int) - pixels).mean() < 6  # red and blue not swapped
    assert cv2.imdecode(np.array(compressed.data, np.uint8), cv2.IMREAD_COLOR) is not None
    age = bench.robot.get_clock().now().nanoseconds - stamp_ns(image.header.stamp)
    assert 0 <= age < 20e9
    camera = ros.spin_until(lambda: info and info[-1])
    focal = 32 / np.tan(np.radians(40) / 2)
    np.testing.assert_allclose(camera.k, [focal, 0, 48, 0, focal, 32, 0, 0, 1])


def test_nothing_is_rendered_while_nobody_listens(ros, bench, monkeypatch):
    rendered = []
    monkeypatch.setattr(type(bench.robot._cameras), "offer", lambda self, stamp, qpos: rendered.append(stamp))
    heard = len(bench.states)
    ros.spin_until(lambda: len(bench.states) > heard + 10)
    assert not rendered
    bench.listen(Image, "wrist_camera/image_raw", qos_profile_sensor_data)
    ros.spin_until(lambda: rendered, what="a frame once somebody listens")


def test_an_episode_is_announced_judged_and_ended(ros, bench):
    latched = QoSProfile(depth=10, durability=DurabilityPolicy.TRANSIENT_LOCAL)
    marks = bench.listen(String, "episode", latched)
    ros.spin_until(lambda: marks)
    answer = bench.reset(7, "touch the blue cube")
    assert (answer.success, answer.prompt) == (True, "touch the blue cube")
    ros.spin_until(lambda: len(marks) >= 3)
    assert [mark.data for mark in marks][1:3] == ["", "touch the blue cube"]
    outcome = bench.outcome()
    assert (outcome.done, outcome.seed, outcome.prompt) == (False, 7, "touch the blue cube")
    assert 0 < outcome.closest < 0.5
    refused = bench.reset(8, "make coffee")
    assert not refused.success and "must name one cube" in refused.message
    assert bench.outcome().seed == 7


def test_simulated_time_runs_ahead_of_the_wall_and_comes_with_a_clock(ros):
    bench = Bench(ros, width=32, height=32, rate=10.0, realtime_factor=0.0)
    clock = bench.listen(Clock, "/clock")
    frames = bench.listen(Image, "wrist_camera/image_raw", qos_profile_sensor_data)
    ros.spin_until(frames.__len__)
    bench.reset(1)
    began = stamp_ns(bench.states[-1].header.stamp)
    ros.spin_until(lambda: stamp_ns(bench.states[-1].header.stamp) > began + 9e9, 60, "nine simulated seconds")
    assert clock and len(frames) > 20
    assert bench.outcome().reason == "time is up"
    stamps = np.array([stamp_ns(frame.header.stamp) for frame in frames])
    assert (np.diff(stamps) >= 100_000_000).all()
    assert set(stamps % 10_000_000) == {stamp_ns(clock[-1].clock) % 10_000_000}


def test_a_parameter_that_cannot_be_is_refused(ros):
    with pytest.raises(ParameterError, match="rate"):
        RobotNode(parameter_overrides=[Parameter("rate", value=-1.0)])


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
def test_the_program_ends_cleanly_when_told_to(ros, ending):
    command = [sys.executable, "-m", "pi0_ros.demo.robot_node", "--ros-args", "-p", "width:=64", "-p", "height:=48"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ)
    try:
        node = ros.node()
        states, frames = [], []
        node.create_subscription(JointState, "joint_states", states.append, 10)
        node.create_subscription(Image, "base_camera/image_raw", frames.append, qos_profile_sensor_data)
        ros.spin_until(lambda: states and frames, 60, "the robot is there")
        process.send_signal(ending)
        output, _ = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 0, output
    assert "Traceback" not in output and "Exception" not in output


def test_the_program_names_a_parameter_it_cannot_use():
    command = [sys.executable, "-m", "pi0_ros.demo.robot_node", "--ros-args", "-p", "prompt:=dance"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert lines == ["error: the prompt must name one cube (red, green, blue), found 'dance'"]
    assert "Traceback" not in done.stderr
