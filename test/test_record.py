"""Recording demonstrations: real topics in, bags out that the trainer takes, and what a person is told."""

import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

rclpy = pytest.importorskip("rclpy", reason="needs ROS 2")
pytest.importorskip("pi0_ros.msg", reason="needs the built messages")

from rclpy.qos import QoSProfile, ReliabilityPolicy, qos_profile_sensor_data  # noqa: E402
from rclpy.serialization import serialize_message  # noqa: E402
from sensor_msgs.msg import Image, JointState  # noqa: E402
from std_msgs.msg import Float64MultiArray, String  # noqa: E402
from std_srvs.srv import Trigger  # noqa: E402
from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint  # noqa: E402

from pi0_ros.robot_file import parse_robot  # noqa: E402
from pi0_ros.ros.bag import BagFile  # noqa: E402
from pi0_ros.ros.recorder import EpisodeRecorder, RecordingError  # noqa: E402
from pi0_ros.training.bags import Bag, find_bags  # noqa: E402
from pi0_ros.training.data import load_units  # noqa: E402

ROBOT = """
name: two
control_rate: 20
cameras: {base_0_rgb: {topic: /base/image_raw}}
joints:
  - {name: a, position: [-1.0, 1.0], velocity: 2.0, acceleration: 10.0}
  - {name: g, kind: gripper, position: [0, 1], velocity: 3.0, acceleration: 20.0, open: 1, closed: 0}
state: {topics: [joint_states]}
actions:
  - {topic: /arm/joint_trajectory, type: JointTrajectory, joints: [a]}
  - {topic: /gripper/commands, type: Float64MultiArray, joints: [g]}
commands:
  - {topic: /arm/joint_trajectory, type: JointTrajectory, joints: [a]}
  - {topic: /gripper/commands, type: Float64MultiArray, joints: [g]}
prompt: {default: wave, topic: /prompt}
"""
LATCHED = QoSProfile(depth=1, durability=rclpy.qos.DurabilityPolicy.TRANSIENT_LOCAL)


class Arm:
    """Publishes a camera, joint states and what the arm is told, all on the move; the gripper is told only once."""

    def __init__(self, node) -> None:
        self.node, self.sent = node, 0
        publish = node.create_publisher
        self.camera = publish(Image, "/base/image_raw", qos_profile_sensor_data)
        self.states = publish(JointState, "/joint_states", 10)
        self.arm = publish(JointTrajectory, "/arm/joint_trajectory", 10)
        self.gripper = publish(Float64MultiArray, "/gripper/commands", 10)
        self.seeing = True
        self._timer = node.create_timer(0.02, self._tick)

    def _tick(self) -> None:
        now, angle = self.node.get_clock().now().to_msg(), float(np.sin(self.sent / 10))
        self.sent += 1
        image = Image(height=6, width=8, encoding="rgb8", step=24, data=bytes([self.sent % 256] * 144))
        state = JointState(name=["a", "g"], position=[0.8 * angle, 1.0])
        command = JointTrajectory(joint_names=["a"], points=[JointTrajectoryPoint(positions=[0.9 * angle])])
        image.header.stamp = state.header.stamp = command.header.stamp = now
        if self.seeing:
            self.camera.publish(image)
        self.states.publish(state)
        self.arm.publish(command)

    def grip(self, position: float) -> None:
        self.gripper.publish(Float64MultiArray(data=[position]))


@pytest.fixture
def arm(ros) -> Arm:
    return Arm(ros.node("arm"))


def recorder_of(ros, folder: Path, text: str = ROBOT) -> EpisodeRecorder:
    node = ros.node("recorder")
    made = EpisodeRecorder(node, parse_robot(text), folder)
    node.create_timer(0.1, made.listen)
    return made


def ready(ros, recorder: EpisodeRecorder) -> None:
    ros.spin_until(lambda: not recorder.lacking(), what="all topics are heard")
    ros.spin_until(lambda: all(stream.heard for stream in recorder.streams.values() if stream.name == "actions[0]"))


def record(ros, recorder: EpisodeRecorder, arm: Arm, ticks: int = 60, prompt: str = "wave") -> None:
    ready(ros, recorder)
    recorder.begin(prompt)
    begun = arm.sent
    ros.spin_until(lambda: arm.sent > begun + ticks)


def test_a_kept_episode_can_be_trained_on_and_has_its_prompt(ros, arm, tmp_path):
    recorder = recorder_of(ros, tmp_path / "bags")
    arm.grip(0.25)
    ros.spin_until(lambda: recorder.streams["/gripper/commands"].subscription, what="somebody listens")
    arm.grip(0.25)
    ros.spin_until(lambda: recorder.streams["/gripper/commands"].told)
    record(ros, recorder, arm, prompt="lift the cup")
    path = recorder.keep()
    assert path == tmp_path / "bags/episode_0001" and {p.name for p in path.parent.iterdir()} == {"episode_0001"}
    (unit,) = load_units(path, parse_robot(ROBOT), 28, cache=tmp_path / "cache", idle=0, jobs=1)
    assert set(unit.prompts) == {"lift the cup"}
    # Told once, before the episode: the controller holds it, and so it counts from the first tick on.
    assert unit.arrays["known"].all() and (unit.arrays["actions"][:, 1] == 0.25).all()
    assert len(unit.arrays["actions"]) >= 20


def test_an_episode_begins_with_what_the_arm_was_told_a_moment_before_and_with_its_mark(ros, arm, tmp_path):
    recorder = recorder_of(ros, tmp_path, ROBOT + "episode_topic: /episode\n")
    arm.grip(0.25)
    record(ros, recorder, arm, ticks=3)
    path = recorder.keep()
    (files,) = find_bags(path)
    with Bag(files) as bag:
        told = [(topic, stamp) for topic, stamp, _ in bag.messages({"/episode", "/arm/joint_trajectory"})]
    assert [topic for topic, _ in told if topic == "/episode"] == ["/episode"] * 2
    assert told[0][0] == "/episode" and told[-1][0] == "/episode"
    assert told[1][0] == "/arm/joint_trajectory" and told[1][1] - told[0][1] < 5e6


def test_episodes_are_counted_on_from_those_that_are_there(ros, arm, tmp_path):
    (tmp_path / "episode_0041").mkdir()
    (tmp_path / "other").mkdir()
    recorder = recorder_of(ros, tmp_path)
    for name in ("episode_0042", "episode_0043"):
        record(ros, recorder, arm, ticks=3)
        assert recorder.episode == name
        assert recorder.keep().name == name


def test_a_discarded_episode_leaves_nothing_and_its_number(ros, arm, tmp_path):
    recorder = recorder_of(ros, tmp_path / "bags")
    record(ros, recorder, arm, ticks=3)
    assert recorder.discard() == "episode_0001"
    assert not list((tmp_path / "bags").iterdir())
    record(ros, recorder, arm, ticks=3)
    assert recorder.keep().name == "episode_0001"


def test_what_a_killed_recorder_left_is_written_over(ros, arm, tmp_path):
    left = tmp_path / ".partial/episode_0001"
    left.mkdir(parents=True)
    (left / "episode_0001.mcap").write_bytes(b"half")
    recorder = recorder_of(ros, tmp_path)
    record(ros, recorder, arm, ticks=3)
    recorder.keep()
    assert [path.name for path in tmp_path.iterdir()] == ["episode_0001"]
    (files,) = find_bags(tmp_path)
    with Bag(files) as bag:
        assert bag.topics["/joint_states"].count >= 2


def test_nothing_begins_before_every_camera_and_joint_state_is_there(ros, arm, tmp_path):
    recorder = recorder_of(ros, tmp_path)
    arm.seeing = False
    ros.spin_until(lambda: len(recorder.lacking()) == 1, what="joint states are heard")
    with pytest.raises(RecordingError, match="base_0_rgb: no message on /base/image_raw, though it is published"):
        recorder.begin("wave")
    arm.seeing = True
    ready(ros, recorder)
    recorder.begin("wave")
    with pytest.raises(RecordingError, match="episode_0001 is being recorded: keep or discard it first"):
        recorder.begin("wave")
    arm.seeing = False
    ros.spin_until(recorder.lacking, what="a camera that stops is noticed")
    assert "no message for 1." in recorder.lacking()[0]


def test_nothing_begins_before_every_joint_has_been_named(ros, arm, tmp_path):
    recorder = recorder_of(ros, tmp_path, ROBOT.replace("name: a,", "name: axis,").replace("[a]", "[axis]"))
    ros.spin_until(lambda: [line[:6] for line in recorder.lacking()] == ["state:"], what="all topics are heard")
    assert recorder.lacking() == ["state: no message names joint axis; names found: a, g"]
    with pytest.raises(RecordingError, match="state: no message names joint axis; names found: a, g"):
        recorder.begin("wave")
    other = ros.node("other")
    publisher = other.create_publisher(JointState, "/joint_states", 10)
    other.create_timer(0.02, lambda: publisher.publish(JointState(name=["axis"], position=[0.0])))
    ros.spin_until(lambda: not recorder.lacking(), what="a publisher that names it is heard")


def test_a_camera_whose_driver_is_gone_is_told_from_one_that_is_silent(ros, arm, tmp_path):
    recorder = recorder_of(ros, tmp_path)
    ready(ros, recorder)
    arm.seeing = False
    ros.spin_until(recorder.lacking, what="a camera that stops is noticed")
    assert recorder.lacking()[0].endswith("on /base/image_raw")
    arm.node.destroy_publisher(arm.camera)
    ros.spin_until(lambda: recorder.lacking()[0].endswith("on /base/image_raw, nobody publishes it any more"))


def test_without_prompt_or_episode_the_reason_is_said(ros, arm, tmp_path):
    recorder = recorder_of(ros, tmp_path)
    ready(ros, recorder)
    with pytest.raises(RecordingError, match="there is no prompt"):
        recorder.begin(" ")
    for act in (recorder.keep, recorder.discard):
        with pytest.raises(RecordingError, match="no episode is being recorded"):
            act()


def test_a_robot_file_without_actions_records_nothing_to_learn_from(ros, tmp_path):
    text = ROBOT[: ROBOT.index("actions:")] + ROBOT[ROBOT.index("commands:") :]
    with pytest.raises(RecordingError, match="two: the robot file has no `actions`"):
        recorder_of(ros, tmp_path, text)


def test_a_folder_that_cannot_be_written_to_is_said_before_anything_is_recorded(ros, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RecordingError, match="file is a file, not a folder"):
        recorder_of(ros, tmp_path / "file")
    with pytest.raises(RecordingError, match=f"{tmp_path}/disk, for bags, is not there: make it"):
        recorder_of(ros, tmp_path / "disk/bags")
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    with pytest.raises(RecordingError, match="link is a link to what is not there"):
        recorder_of(ros, tmp_path / "link")


def test_a_disk_that_is_full_when_the_buffer_is_written_leaves_nothing(tmp_path):
    """What is buffered fails once more as the file is closed."""
    bag = BagFile(tmp_path / "episode_0001", {"/joint_states": JointState})
    bag._writer.abort = lambda: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    bag.discard()
    assert not list(tmp_path.iterdir())


def test_metadata_is_of_a_form_that_humbles_rosbag2_reads_too(tmp_path):
    """As its metadata_io.cpp reads it: qualities of service as text, where version 9 has a list."""
    bag = BagFile(tmp_path / "episode_0001", {"/joint_states": JointState}, {"prompt": "wave"})
    bag.write("/joint_states", 1, serialize_message(JointState(name=["a"])))
    bag.keep()
    info = yaml.safe_load((tmp_path / "episode_0001/metadata.yaml").read_text())["rosbag2_bagfile_information"]
    (topic,) = info["topics_with_message_count"]
    assert info["version"] == 8 and isinstance(topic["topic_metadata"]["offered_qos_profiles"], str)
    assert info["custom_data"] == {"prompt": "wave"} and info["message_count"] == topic["message_count"] == 1


def test_two_recorders_do_not_write_to_one_folder(ros, tmp_path):
    first = recorder_of(ros, tmp_path)
    with pytest.raises(RecordingError, match="another recorder writes to .*: give a folder of its own"):
        recorder_of(ros, tmp_path)
    first.close()
    recorder_of(ros, tmp_path).close()


def test_an_episode_that_came_to_be_there_meanwhile_stays(ros, arm, tmp_path):
    recorder = recorder_of(ros, tmp_path)
    record(ros, recorder, arm, ticks=3)
    (tmp_path / "episode_0001").mkdir()
    (tmp_path / "episode_0001/theirs").touch()
    assert recorder.keep().name == "episode_0002"
    assert [path.name for path in (tmp_path / "episode_0001").iterdir()] == ["theirs"]
    assert [files.path.name for files in find_bags(tmp_path)] == ["episode_0002"]


def test_without_room_on_the_disk_nothing_begins(ros, arm, tmp_path, monkeypatch):
    recorder = recorder_of(ros, tmp_path)
    ready(ros, recorder)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=3 * 10**8))
    with pytest.raises(RecordingError, match="has room for 300 MB only, 1000 MB must be free"):
        recorder.begin("wave")


def test_a_clock_that_jumps_back_ends_the_episode_with_the_reason(ros, arm, tmp_path):
    recorder = recorder_of(ros, tmp_path)
    record(ros, recorder, arm, ticks=3)
    now = recorder._now
    recorder._now = lambda: now() - 10**9
    ros.spin_until(lambda: recorder.fault)
    assert recorder.fault == "episode_0001: discarded, the clock jumped back"
    with pytest.raises(RecordingError, match=r"no episode is being recorded \(episode_0001: discarded, the clock"):
        recorder.keep()
    recorder.begin("wave")
    assert recorder.episode == "episode_0001" and not recorder.fault


def test_a_remapped_topic_is_recorded_under_its_name_in_the_robot_file(ros, arm, tmp_path):
    node = ros.node("recorder", cli_args=["--ros-args", "-r", "/js:=/joint_states"])
    recorder = EpisodeRecorder(node, parse_robot(ROBOT.replace("[joint_states]", "[/js]")), tmp_path)
    node.create_timer(0.1, recorder.listen)
    record(ros, recorder, arm, ticks=3)
    (files,) = find_bags(recorder.keep())
    with Bag(files) as bag:
        assert bag.topics["/js"].count >= 2


def test_a_topic_of_another_type_is_not_taken_for_the_camera(ros, arm, tmp_path):
    recorder = recorder_of(ros, tmp_path, ROBOT.replace("{topic: /base/image_raw}", "{topic: /joint_states}"))
    ros.spin_until(lambda: recorder.streams["/joint_states"].subscription is None and recorder.lacking())
    wrong = "it is published as sensor_msgs/msg/JointState, not sensor_msgs/msg/Image"
    assert f"base_0_rgb: no message on /joint_states, {wrong}" in recorder.lacking()


def test_actions_of_another_type_than_the_robot_file_says_are_known_before_an_episode(ros, arm, tmp_path):
    text = ROBOT.replace("/gripper/commands, type: Float64MultiArray", "/gripper/commands, type: JointTrajectory")
    recorder = recorder_of(ros, tmp_path, text)
    ros.spin_until(lambda: len(recorder.lacking()) == 1, what="all else is heard")
    wrong = "it is published as std_msgs/msg/Float64MultiArray, not trajectory_msgs/msg/JointTrajectory"
    assert recorder.lacking() == [f"actions[1]: no message on /gripper/commands, {wrong}"]


def test_a_publisher_that_comes_back_with_another_quality_of_service_is_heard(ros, tmp_path):
    recorder = recorder_of(ros, tmp_path)
    node, stream = ros.node("driver"), recorder.streams["/joint_states"]
    for reliability in (ReliabilityPolicy.RELIABLE, ReliabilityPolicy.BEST_EFFORT):
        publisher = node.create_publisher(JointState, "/joint_states", QoSProfile(depth=5, reliability=reliability))
        ros.spin_until(lambda want=reliability: stream.qos and stream.qos[0] == want, what=f"{reliability} is noticed")
        stream.heard = None
        ros.spin_until(lambda p=publisher: p.publish(JointState()) or stream.heard, what=f"{reliability} is heard")
        node.destroy_publisher(publisher)


def test_a_full_disk_ends_the_episode_with_the_reason(ros, arm, tmp_path, monkeypatch):
    recorder = recorder_of(ros, tmp_path / "bags")
    record(ros, recorder, arm, ticks=3)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(recorder._bag, "write", full)
    ros.spin_until(lambda: recorder.fault)
    assert recorder.fault.endswith("bags cannot be written to: No space left on device")
    assert recorder.episode == "" and not list((tmp_path / "bags").iterdir())


class Program:
    """`record` in a terminal of its own, or without one."""

    def __init__(self, folder: Path, *more: str, terminal: bool = True) -> None:
        (folder / "robot.yaml").write_text(ROBOT)
        self.said, self.folder = "", folder / "bags"
        arguments = ["--robot", str(folder / "robot.yaml"), "--output", str(self.folder), *more]
        ours, theirs = pty.openpty()
        environment = os.environ | {"TMPDIR": str(folder)}
        self.process = subprocess.Popen(
            ["setsid", "--ctty", sys.executable, "-m", "pi0_ros.ros.record", *arguments],
            stdin=theirs, stdout=theirs, stderr=theirs, env=environment,
        ) if terminal else subprocess.Popen(
            [sys.executable, "-m", "pi0_ros.ros.record", *arguments],
            stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs, env=environment,
        )  # fmt: skip
        os.close(theirs)
        self._terminal = ours

    def read(self) -> str:
        while select.select([self._terminal], [], [], 0)[0]:
            try:
                self.said += os.read(self._terminal, 65536).decode(errors="replace")
            except OSError:  # it ended
                break
        return self.said

    def type(self, line: str) -> None:
        os.write(self._terminal, f"{line}\n".encode())

    def says(self, text: str):
        return lambda: text in self.read()

    def end(self) -> int:
        code = self.process.wait(60)
        self.read()
        return code

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._terminal)


@pytest.fixture
def program(tmp_path):
    made = []
    yield lambda *more, **how: made.append(Program(tmp_path, *more, **how)) or made[-1]
    for each in made:
        each.close()


def wait(ros, arm: Arm, ticks: int) -> None:
    begun = arm.sent
    ros.spin_until(lambda: arm.sent > begun + ticks)


def test_keys_begin_keep_and_discard_and_the_episode_is_looked_at(ros, arm, program):
    recording = program()
    ros.spin_until(recording.says("ready: base_0_rgb"), 60)
    arm.grip(0.5)
    recording.type("p lift the cup")
    ros.spin_until(recording.says("prompt: 'lift the cup'"))
    recording.type("")
    ros.spin_until(recording.says("episode_0001: recording 'lift the cup'"))
    wait(ros, arm, 60)
    recording.type("")
    ros.spin_until(recording.says("episode_0001: kept"))
    recording.type("x")
    ros.spin_until(recording.says("'x' is none of these. Enter: begin"))
    recording.type("")
    ros.spin_until(recording.says("episode_0002: recording"))
    recording.type("d")
    ros.spin_until(recording.says("episode_0002: discarded"))
    recording.type("d")
    ros.spin_until(recording.says("not possible: no episode is being recorded"))
    ros.spin_until(recording.says("ticks can be used"), 60)
    recording.type("q")
    assert recording.end() == 0, recording.said
    assert [path.name for path in recording.folder.iterdir()] == ["episode_0001"]


def test_services_do_the_same_and_ctrl_c_keeps_what_is_being_recorded(ros, arm, program):
    recording, node = program("--prompt", "lift the cup", terminal=False), ros.node("pedal")
    call = {name: node.create_client(Trigger, f"recorder/{name}") for name in ("start", "keep", "discard")}
    ros.spin_until(recording.says("ready: base_0_rgb"), 60)
    answer = ros.call(call["keep"], Trigger.Request())
    assert (answer.success, answer.message) == (False, "no episode is being recorded")
    for name, said in (("start", "recording"), ("discard", "discarded"), ("start", "recording")):
        answer = ros.call(call[name], Trigger.Request())
        assert answer.success and answer.message.startswith(f"episode_0001: {said}"), answer
    wait(ros, arm, 30)
    recording.process.send_signal(signal.SIGINT)
    deadline = time.monotonic() + 60
    while recording.process.poll() is None and time.monotonic() < deadline:
        ros.executor.spin_once(timeout_sec=0.05)
        recording.read()
    assert recording.end() == 0 and "Traceback" not in recording.said, recording.said
    assert "episode_0001: kept" in recording.said
    # The gripper was told nothing at all, so there is nothing to learn: said at once, not after fifty episodes.
    assert "episode_0001: CANNOT BE USED" in recording.said
    assert [path.name for path in recording.folder.iterdir()] == ["episode_0001"]


def test_the_prompt_topic_sets_the_prompt_of_the_next_episode(ros, arm, program):
    said = ros.node("person").create_publisher(String, "/prompt", LATCHED)
    said.publish(String(data="fold the towel"))
    recording = program()
    ros.spin_until(recording.says("prompt: 'fold the towel'"), 60)
    ros.spin_until(recording.says("ready: base_0_rgb"), 60)
    recording.type("")
    ros.spin_until(recording.says("episode_0001: recording 'fold the towel'"))


def test_what_is_missing_is_said_with_where_to_look(ros, program):
    recording = program()
    ros.spin_until(recording.says("missing: base_0_rgb: no message on /base/image_raw, nobody publishes it"), 60)
    recording.type("")
    ros.spin_until(recording.says("not possible: base_0_rgb: no message"))


def test_what_is_missing_for_another_reason_is_said_anew(ros, program):
    driver = ros.node("driver")
    silent = driver.create_publisher(Image, "/base/image_raw", 1)
    recording = program()
    ros.spin_until(recording.says("missing: base_0_rgb: no message on /base/image_raw, though it is published"), 60)
    driver.destroy_publisher(silent)
    ros.spin_until(recording.says("missing: base_0_rgb: no message on /base/image_raw, nobody publishes it"), 60)


def test_a_robot_file_that_cannot_be_used_is_one_line(tmp_path):
    command = [sys.executable, "-m", "pi0_ros.ros.record", "--robot", str(tmp_path / "no.yaml"), "--output", "x"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: {tmp_path}/no.yaml: cannot be read")
