"""The observation at an instant, from messages on real topics."""

import cv2
import numpy as np
import pytest
from rclpy.qos import QoSProfile, ReliabilityPolicy, qos_profile_sensor_data
from sensor_msgs.msg import CompressedImage, Image, JointState

from pi0_ros.policy.alignment import Rejected
from pi0_ros.robot_file import parse_robot
from pi0_ros.ros.conversions import SECOND, to_stamp
from pi0_ros.ros.streams import Frames, Snapshot, Streams

MS = 1_000_000
NOW = 1_000 * SECOND
LIMITS = {f"diagnostics.{what}_{level}": 0.0 for what in ("age", "rate") for level in ("warn", "error")}
ROBOT = """
name: arm
control_rate: 10
cameras: {base_0_rgb: {topic: camera/image, transport: TRANSPORT, max_age: 0.2, latency: 0.03, flip: horizontal}}
joints:
  - {name: shoulder, position: [-2, 2], velocity: 1, acceleration: 5}
  - {name: finger, position: [-2, 2], velocity: 1, acceleration: 5}
state: {topics: [arm/joint_states, gripper/joint_states], max_age: 0.1, latency: 0.01}
commands: [{topic: c, type: Float64MultiArray}]
max_skew: 0.1
"""


class World:
    """Publishes into a Streams and waits for what it sent."""

    def __init__(
        self, ros, transport: str = "raw", clock: str = "header", latency: float = 0.03, kind: str = "revolute"
    ) -> None:
        self.ros, self.transport = ros, transport
        self.robot = parse_robot(
            ROBOT.replace("TRANSPORT", transport)
            .replace("latency: 0.03", f"latency: {latency}")
            .replace("name: shoulder,", f"name: shoulder, kind: {kind},")
            + f"clock: {clock}\n"
        )
        self.stored, self.on_stored = 0, lambda: None
        self.streams = Streams(ros.node("reader"), self.robot, self._count)
        node = ros.node("sender")
        kind, topic = (
            (CompressedImage, "camera/image/compressed") if transport == "compressed" else (Image, "camera/image")
        )
        self.publishers = {"camera": node.create_publisher(kind, topic, qos_profile_sensor_data)}
        for topic in self.robot.state.topics:
            self.publishers[topic] = node.create_publisher(JointState, topic, 10)
        ros.spin_until(lambda: all(p.get_subscription_count() for p in self.publishers.values()))

    def _count(self, now: int) -> None:
        self.stored += 1
        self.on_stored()

    def send(self, where: str, message, stamp: int) -> None:
        message.header.stamp = to_stamp(stamp)
        before = self.stored
        self.publishers[where].publish(message)
        self.ros.spin_until(lambda: self.stored > before)

    def frame(self, stamp: int, value: int = 1) -> None:
        pixels = np.zeros((4, 6, 3), np.uint8)
        pixels[:, :3] = value  # the left half
        if self.transport == "compressed":
            data = cv2.imencode(".png", pixels[..., ::-1])[1].tobytes()
            return self.send("camera", CompressedImage(format="png", data=data), stamp)
        image = Image(height=4, width=6, encoding="rgb8", step=18, data=pixels.tobytes())
        return self.send("camera", image, stamp)

    def joints(self, where: str, stamp: int, **positions: float) -> None:
        self.send(where, JointState(name=list(positions), position=list(positions.values())), stamp)

    def observe(self, tick: int, now: int | None = None):
        return self.streams.observe(tick, tick if now is None else now)

    def all(self, stamp: int) -> None:
        self.frame(stamp)
        self.joints("arm/joint_states", stamp, wheel=9.0, shoulder=1.0)
        self.joints("gripper/joint_states", stamp, finger=0.5)


@pytest.fixture
def world(ros):
    return World(ros)


def test_joint_states_of_several_topics_are_merged_by_name_whatever_their_order(world):
    world.all(NOW)
    snapshot = world.observe(NOW + 50 * MS)
    assert isinstance(snapshot, Snapshot)
    assert snapshot.state.tolist() == [1.0, 0.5]


def test_two_drivers_on_one_topic_are_merged_too_and_the_newer_value_counts(world):
    world.frame(NOW)
    world.joints("arm/joint_states", NOW, shoulder=1.0)
    world.joints("arm/joint_states", NOW, finger=0.5)
    world.joints("gripper/joint_states", NOW + 20 * MS, finger=0.7)
    assert world.observe(NOW + 50 * MS).state.tolist() == [1.0, 0.7]


def test_a_joint_that_nobody_names_is_blamed_by_name(world):
    world.frame(NOW)
    world.joints("arm/joint_states", NOW, shoulder=1.0, fingr=0.5)
    rejected = world.observe(NOW + 50 * MS)
    assert rejected.stream == "arm/joint_states, gripper/joint_states"
    assert rejected.reason == "no message has joints finger; found fingr, shoulder"


def test_without_any_joint_state_both_joints_are_missing(world):
    world.frame(NOW)
    rejected = world.observe(NOW + 50 * MS)
    assert rejected.reason == "no message yet with joints shoulder, finger"


def test_a_position_that_is_not_a_number_is_blamed(world):
    world.all(NOW)
    world.joints("gripper/joint_states", NOW + 1 * MS, finger=float("nan"))
    rejected = world.observe(NOW + 50 * MS)
    assert (rejected.stream, rejected.reason) == ("gripper/joint_states", "joint 'finger': position is nan")


def test_a_continuous_joint_is_seen_within_its_turn_whatever_turn_its_driver_tells(ros):
    world = World(ros, kind="continuous")
    world.all(NOW)
    world.joints("arm/joint_states", NOW + 1 * MS, shoulder=1.5 + 6 * np.pi)
    np.testing.assert_allclose(world.observe(NOW + 50 * MS).state, [1.5, 0.5])


def test_a_position_in_other_units_is_blamed(world):
    world.all(NOW)
    world.joints("gripper/joint_states", NOW + 1 * MS, finger=90.0)
    rejected = world.observe(NOW + 50 * MS)
    said = ("gripper/joint_states", "joint 'finger': position is 90; other units (degrees?)")
    assert (rejected.stream, rejected.reason) == said


def test_who_is_told_of_a_message_finds_it_there(world):
    found = []
    world.on_stored = lambda: found.append(world.observe(NOW + 50 * MS))
    world.all(NOW)
    assert [isinstance(each, Snapshot) for each in found] == [False, False, True]


def test_messages_with_velocities_only_are_passed_over(world):
    world.all(NOW)
    velocities = JointState(name=["shoulder"], velocity=[1.0])
    velocities.header.stamp = to_stamp(NOW + 5 * MS)
    world.publishers["arm/joint_states"].publish(velocities)
    world.joints("arm/joint_states", NOW + 1 * MS, shoulder=1.0)  # comes after it on the same topic
    assert world.observe(NOW + 50 * MS).state.tolist() == [1.0, 0.5]


def test_age_and_skew_of_the_robot_file_hold(world):
    world.all(NOW)
    assert isinstance(world.observe(NOW + 90 * MS), Snapshot)
    assert world.observe(NOW + 91 * MS).stream == "arm/joint_states"  # latency 10 ms + 91 ms > 100 ms
    world.joints("arm/joint_states", NOW + 81 * MS, shoulder=1.0)
    world.joints("gripper/joint_states", NOW + 81 * MS, finger=1.0)
    rejected = world.observe(NOW + 95 * MS)
    assert (rejected.stream, rejected.kind) == ("base_0_rgb", "skew")  # 81 - 10 - (0 - 30) = 101 ms


def test_what_lies_ahead_of_the_tick_does_not_count_yet(world):
    world.all(NOW)
    world.joints("gripper/joint_states", NOW + 61 * MS, finger=3.0)
    assert world.observe(NOW + 50 * MS).state.tolist() == [1.0, 0.5]
    assert world.observe(NOW + 51 * MS).state.tolist() == [1.0, 3.0]  # its latency is 10 ms


def test_a_stream_whose_clock_is_ahead_is_told_so(world):
    world.frame(NOW)
    world.joints("arm/joint_states", NOW, shoulder=1.0)
    world.joints("gripper/joint_states", NOW + 850 * MS, finger=0.5)
    rejected = world.observe(NOW + 50 * MS)
    assert rejected.stream == "gripper/joint_states"
    assert rejected.reason == "no message yet that is old enough: they are up to 0.790 s ahead"  # latency 10 ms
    reports = {report.name: report for report in world.streams.reports("node", NOW + 50 * MS, LIMITS)}
    ahead = "messages on gripper/joint_states are stamped 0.8 s ahead of the clock"
    assert reports["node: gripper/joint_states"].reasons == [ahead]
    world.joints("gripper/joint_states", NOW + 5 * SECOND, finger=0.5)
    assert world.observe(NOW + 50 * MS).kind == "clock"


def test_a_stream_ahead_of_the_clock_is_told_of_for_a_while_after_all_was_forgotten_for_it(world):
    world.all(NOW)
    world.joints("gripper/joint_states", NOW + 5 * SECOND, finger=0.5)
    rejected = world.observe(NOW + 50 * MS)
    world.streams.clear()
    reasons = {report.name: report.reasons for report in world.streams.reports("node", NOW + 50 * MS, LIMITS)}
    assert rejected.reason.startswith("stamped 4.950 s ahead")
    assert reasons.pop("node: gripper/joint_states") == [rejected.reason]
    assert list(reasons.values()) == [[], []]


def test_of_two_drivers_on_one_topic_the_one_ahead_is_told_of_too(world):
    world.frame(NOW)
    world.joints("gripper/joint_states", NOW, finger=0.5)
    world.joints("arm/joint_states", NOW, finger=0.5)
    world.joints("arm/joint_states", NOW + 5 * SECOND, shoulder=1.0)
    rejected = world.observe(NOW + 50 * MS)
    said = lambda: {r.name: r.reasons for r in world.streams.reports("node", NOW + 50 * MS, LIMITS)}  # noqa: E731
    assert (rejected.stream, said()["node: base_0_rgb"]) == ("arm/joint_states (shoulder)", [])
    world.streams.clear()
    assert said()["node: arm/joint_states"] == [rejected.reason]


def test_fast_joint_states_reach_back_to_the_slowest_camera(world):
    world.frame(NOW)
    for k in range(600):  # 2 kHz
        world.joints("arm/joint_states", NOW + k * MS // 2, shoulder=k / 100, finger=0.0)
    snapshot = world.observe(NOW + 50 * MS)  # of 300 ms
    assert snapshot.state[0] == 1.2  # at 60 ms: its latency is 10 ms


def test_a_camera_that_shows_what_was_long_ago_is_seen_with_the_state_of_then(ros):
    world = World(ros, latency=1.5)
    for k in range(32):
        world.frame(NOW + k * 50 * MS, k)
        world.joints("arm/joint_states", NOW + k * 50 * MS, shoulder=k / 100, finger=0.0)
    now = NOW + 1550 * MS
    snapshot = world.observe(now - 1500 * MS, now)
    assert snapshot.frames["base_0_rgb"].stamp_ns == now and snapshot.state[0] == 0.01
    assert world.observe(NOW - 1500 * MS, NOW).kind == "clock"  # ahead of the clock itself


def test_drivers_that_do_not_stamp_are_found_out(world):
    world.all(0)
    rejected = world.observe(NOW)
    assert rejected.stream == "base_0_rgb" and "its stamps are 0; `clock: bag`" in rejected.reason
    reports = world.streams.reports("node", NOW, LIMITS)
    assert all("are 0; `clock: bag`" in report.reasons[-1] for report in reports)
    assert not any("age_share" in report.values for report in reports)


def test_where_the_recordings_count_by_arrival_the_node_does_too(ros):
    world = World(ros, clock="bag")
    world.all(0)  # drivers that do not stamp
    now = world.streams._node.get_clock().now().nanoseconds
    assert isinstance(world.observe(now + 30 * MS), Snapshot)


def test_after_clear_nothing_is_left(world):
    world.all(NOW)
    world.streams.clear()
    assert isinstance(world.observe(NOW + 50 * MS), Rejected)
    world.joints("arm/joint_states", NOW, shoulder=1.0, finger=0.5)
    assert world.observe(NOW + 50 * MS).reason == "no message yet on camera/image"


@pytest.mark.parametrize("transport", ["raw", "compressed"])
def test_frames_come_decoded_and_turned_and_each_is_decoded_once(ros, transport):
    world = World(ros, transport)
    world.all(NOW)
    frames = Frames(world.robot)
    snapshot = world.observe(NOW + 50 * MS)
    image = frames.decode(snapshot.frames)["base_0_rgb"]
    assert image.shape == (4, 6, 3) and (image[:, 3:] == 1).all() and (image[:, :3] == 0).all()
    assert snapshot.frames["base_0_rgb"].stamp_ns == NOW
    assert frames.decode(world.observe(NOW + 60 * MS).frames)["base_0_rgb"] is image
    world.frame(NOW + 10 * MS, value=2)
    assert (frames.decode(world.observe(NOW + 60 * MS).frames)["base_0_rgb"][:, 3:] == 2).all()


def test_a_broken_frame_is_its_cameras_fault(ros):
    world = World(ros, "compressed")
    world.all(NOW)
    world.send("camera", CompressedImage(format="jpeg", data=b"no picture"), NOW + 1 * MS)
    rejected = Frames(world.robot).decode(world.observe(NOW + 50 * MS).frames)
    assert rejected.stream == "base_0_rgb" and "cannot be decoded" in rejected.reason


def test_cameras_are_heard_best_effort_by_default_and_reliably_where_the_robot_file_says(ros):
    robot = parse_robot(ROBOT.replace("transport: TRANSPORT", "reliability: reliable"))
    for described, topic, expected in (
        (parse_robot(ROBOT.replace("TRANSPORT", "raw")), "camera/image", ReliabilityPolicy.BEST_EFFORT),
        (robot, "camera/image", ReliabilityPolicy.RELIABLE),
    ):
        node = ros.node("reader")
        streams = Streams(node, described, lambda _: None)
        info = next(s for s in node.subscriptions if s.topic_name == f"/{topic}")
        assert (info.qos_profile.reliability, info.qos_profile.depth) == (expected, 1)
        states = next(s for s in node.subscriptions if s.topic_name == "/arm/joint_states")
        assert states.qos_profile.depth > 10  # of drivers that share the topic
        streams.close()
        assert all(s.topic_name != f"/{topic}" for s in node.subscriptions)


def test_reports_tell_rate_and_age_and_blame_the_silent(world):
    limits = {"diagnostics.age_warn": 0.8, "diagnostics.age_error": 1.0}
    limits |= {"diagnostics.rate_warn": 5.0, "diagnostics.rate_error": 0.0}
    world.frame(NOW)
    reports = {report.name: report for report in world.streams.reports("node", NOW + 230 * MS, limits)}
    assert reports["node: base_0_rgb"].values["age_s"] == "0.23"  # at the instant that is observed, 30 ms ago
    assert reports["node: base_0_rgb"].level == 2  # 230 ms of 200
    assert reports["node: base_0_rgb"].reasons[1] == "rate_hz is 0 Hz, below 5 Hz"
    assert reports["node: arm/joint_states"].reasons[0].startswith("no message yet on arm/joint_states, ")


def test_the_age_of_a_stream_is_judged_by_its_own_limit_and_its_newest_message(world):
    world.frame(NOW)
    world.joints("arm/joint_states", NOW, shoulder=1.0)
    world.joints("arm/joint_states", NOW + 120 * MS, finger=0.5)
    limits = LIMITS | {"diagnostics.age_warn": 0.8, "diagnostics.age_error": 1.0}
    reports = {report.name: report for report in world.streams.reports("node", NOW + 170 * MS, limits)}
    camera, arm = reports["node: base_0_rgb"], reports["node: arm/joint_states"]
    assert (camera.level, camera.values["age_share"]) == (1, "0.85")  # 140 ms, what is observed then, and 30 of 200
    assert (arm.level, arm.values["age_share"]) == (0, "0.3")  # 140 less 110 ms of 100


def test_a_slow_stream_is_told_once_by_the_worse_of_two_thresholds(world):
    world.frame(NOW)
    limits = LIMITS | {"diagnostics.rate_warn": 10.0, "diagnostics.rate_error": 5.0}
    reports = {report.name: report for report in world.streams.reports("node", NOW + 50 * MS, limits)}
    camera = reports["node: base_0_rgb"]
    assert (camera.level, camera.reasons) == (2, ["rate_hz is 0 Hz, below 5 Hz"])


def test_a_best_effort_camera_reaches_us(ros):
    world = World(ros)
    qos = QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT)
    assert world.publishers["camera"].qos_profile.reliability == qos.reliability
    world.frame(NOW)
    assert world.stored == 1


def test_joint_states_of_other_joints_are_told_instead_of_silence(world):
    publisher = world.publishers["arm/joint_states"]
    said = lambda: {r.name: r.reasons for r in world.streams.reports("node", NOW, LIMITS)}["node: arm/joint_states"]  # noqa: E731
    publisher.publish(JointState(name=["wheel"], position=[1.0]))
    world.ros.spin_until(lambda: "joints wheel came, none of this robot's" in said()[-1])
    publisher.publish(JointState(name=["shoulder", "finger"], position=[1.0]))
    world.ros.spin_until(lambda: "1 positions for 2 names came" in said()[-1])
    world.frame(NOW)
    assert "1 positions for 2 names came" in world.observe(NOW + 30 * MS).reason
