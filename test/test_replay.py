"""A recording played to the real policy_node: the same chunks as from the trainer's reading of it."""

import subprocess
import sys
from collections.abc import Callable

import bag_kit as kit
import numpy as np
import pytest
import yaml
from bag_kit import SECOND, START
from sensor_msgs.msg import CompressedImage, Image, JointState
from std_msgs.msg import String
from test_policy_node_policy import TINY

from pi0_ros.demo import translation
from pi0_ros.demo.replay import Replay, in_order, open_bag
from pi0_ros.demo.translation import compare
from pi0_ros.policy.images import decode_image
from pi0_ros.policy.policy import Policy
from pi0_ros.robot_file import load_robot
from pi0_ros.ros.qos import LATCHED
from pi0_ros.training import evaluate
from pi0_ros.training.bags import Bag, BagError
from pi0_ros.training.data import load_units
from pi0_ros.training.dataset import Dataset
from pi0_ros.training.episodes import cut_episodes
from pi0_ros.training.recording import read_recording

CAMERAS = {
    "base_0_rgb": {"topic": "/cam/image_raw", "transport": "raw", "rotate": 90, "max_age": 0.3},
    "left_wrist_0_rgb": {"topic": "/wrist/image_raw", "transport": "compressed", "max_age": 0.3},
}


def robot(**changes):
    return kit.robot(**{"cameras": CAMERAS, "max_skew": 0.3, **changes})


def scene(i: int, height: int = 40, width: int = 56) -> np.ndarray:
    return np.random.default_rng(i).integers(0, 256, (height, width, 3), dtype=np.uint8)


def items(seconds: float = 2.0, begin: int = START) -> list[kit.Item]:
    """Both cameras in the other transport than the robot file's, at odd moments; a prompt that changes; a hole."""
    made = []
    for i in range(round(seconds * 50)):
        made.append(kit.joint_state(begin + i * SECOND // 50, [np.sin(i / 20), 0.01 * i, 0.5]))
    for i in range(round(seconds * 15)):
        stamp = begin + i * SECOND // 15
        made.append(kit.compressed(stamp, scene(i), "jpg"))
        made.append(kit.raw(stamp + 7_300_000, scene(1000 + i), "/wrist/image_raw"))
    for i in range(round(seconds * 10)):
        made.append(kit.trajectory(begin + i * SECOND // 10, [(0.1, [0.1, 0.2, 0.3])]))
    made += [kit.text(begin, "wave"), kit.text(begin + round(0.55 * seconds * SECOND), "touch the red cube")]
    gone = range(begin + round(0.3 * seconds * SECOND), begin + round(0.5 * seconds * SECOND))
    return [item for item in made if item.topic != "/cam/image_raw/compressed" or item.time not in gone]


def tiny(machine):
    return lambda: Policy.random(machine, TINY, seed=3, device="cpu", num_steps=2)


@pytest.fixture(scope="module")
def bag(tmp_path_factory):
    return kit.write_bag(tmp_path_factory.mktemp("replay") / "drive", items())


def test_one_translation_from_a_recording_to_chunks(bag):
    machine = robot()
    verdict = compare(bag, machine, tiny(machine), seed=11, rate=10.0)
    assert verdict.chunks >= 14  # of 20 ticks, less those in the hole and before the first wrist image
    np.testing.assert_allclose(verdict.difference, 0.0, atol=1e-5)
    assert (verdict.unusable, verdict.prompts) == (0, 0)
    assert verdict.same


def test_the_other_side_of_the_check_is_what_evaluate_computes(bag, tmp_path):
    machine = robot()
    policy = tiny(machine)()
    units = load_units(bag, machine, policy.config.vision.image_size, cache=tmp_path, jobs=1)
    dataset = Dataset(units, policy.config.action_horizon)
    evaluated = evaluate.compare(policy, dataset, chunks=5, seeds=1)
    with Bag(open_bag(bag)) as opened:
        recording = read_recording(opened, machine)
        (episode,) = cut_episodes(recording, machine)
        for chunk, (_, _, tick) in zip(evaluated.predicted[:, 0], evaluated.where, strict=True):
            index = next(i for i in range(len(dataset)) if dataset.where(i)[2] == tick)  # which seeds its noise
            stamps = episode.ticks_ns[tick : tick + 1]
            ((actions, _),) = translation.offline(opened, recording, machine, policy, stamps, seed=index)
            np.testing.assert_allclose(actions, chunk, atol=1e-6)


def test_cameras_that_show_the_past_are_read_alike_on_both_sides(bag):
    late = {**CAMERAS, "base_0_rgb": {**CAMERAS["base_0_rgb"], "latency": 0.12}}
    machine = robot(cameras=late)
    verdict = compare(bag, machine, tiny(machine), seed=11, rate=10.0, seconds=0.6)
    assert verdict.same and verdict.chunks >= 3


def test_bag_time_is_the_same_on_both_sides_too(bag):
    machine = robot(clock="bag")
    assert compare(bag, machine, tiny(machine), seed=11, rate=10.0, seconds=0.6).same


def on_their_way(ms: Callable[[int], int]) -> list[kit.Item]:
    """As `items`, frame i of the wrist recorded `ms(i)` after its stamp."""
    made = items(seconds=1.0)
    for i, item in enumerate(item for item in made if item.topic == "/wrist/image_raw"):
        item.time += ms(i) * 1_000_000
    return made


def test_frames_that_are_on_their_way_for_long_are_read_alike_on_both_sides(tmp_path):
    late = kit.write_bag(tmp_path / "late", on_their_way(lambda i: 40))
    for machine in (robot(), robot(clock="bag")):
        verdict = compare(late, machine, tiny(machine), seed=11, rate=10.0)
        assert verdict.same and verdict.unusual == 0 and verdict.chunks > 5


def test_what_came_later_than_usual_is_counted_and_not_compared(tmp_path):
    machine = robot()
    bag = kit.write_bag(tmp_path / "odd", on_their_way(lambda i: 60 if i % 3 == 1 else 5))
    verdict = compare(bag, machine, tiny(machine), seed=11, rate=10.0)
    assert verdict.same and verdict.unusual > 0 and verdict.chunks > 0


def test_a_difference_between_trainer_and_node_is_found(bag, monkeypatch):
    machine = robot()
    policy = tiny(machine)
    observe_at = translation.observe_at

    def a_frame_late(recording, robot, ticks):
        verdict, state, frames, prompts = observe_at(recording, robot, ticks)
        return verdict, state, {slot: np.maximum(at - 1, 0) for slot, at in frames.items()}, prompts

    monkeypatch.setattr(translation, "observe_at", a_frame_late)
    verdict = compare(bag, machine, policy, seed=11, rate=5.0, seconds=0.5)
    assert verdict.chunks and not verdict.same


def test_what_the_check_needs_is_said(bag):
    with pytest.raises(translation.CheckFailed, match="give --robot, --checkpoint, or both"):
        translation.run(translation.Options(bag))


def test_what_was_seen_is_played_in_order_as_the_robot_file_names_it(ros, bag):
    machine, node = robot(), ros.node("player")
    heard: list[tuple[str, object]] = []
    listener = ros.node("listener")
    for kind, topic, qos in (
        (Image, "/cam/image_raw", 100),
        (CompressedImage, "/wrist/image_raw/compressed", 100),
        (JointState, "/joint_states", 100),
        (String, "/prompt", LATCHED),
    ):
        listener.create_subscription(kind, topic, lambda message, topic=topic: heard.append((topic, message)), qos)
    with Bag(open_bag(bag)) as opened:
        replay = Replay(node, opened, read_recording(opened, machine), machine)
        assert replay.unheard() == [] or ros.spin_until(lambda: not replay.unheard())
        clocks = []
        for clock, messages in replay.steps():
            clocks.append(clock)
            assert all(clock - SECOND // 100 < message[1] <= clock for message in messages)
            for message in messages:
                replay.send(message)
            if clock >= START + SECOND // 5:
                break
    assert clocks == [START + k * SECOND // 100 for k in range(21)]
    # 0.2 s: 11 joint states, 4 base images (0 to 0.2 s), 3 wrist images
    ros.spin_until(lambda: [t for t, _ in heard].count("/joint_states") == 11 and len(heard) >= 19, what=str(heard))
    base = [message for topic, message in heard if topic == "/cam/image_raw"]
    wrist = [message for topic, message in heard if topic == "/wrist/image_raw/compressed"]
    assert [len(base), len(wrist)] == [4, 3]
    assert base[1].encoding == "rgb8" and base[1].header.stamp.nanosec == SECOND // 15
    assert np.abs(decode_image(base[1]).astype(int) - scene(1)).mean() < 60  # jpeg of noise
    np.testing.assert_array_equal(decode_image(wrist[2]), scene(1002))  # png: the very pixels
    assert [message.data for topic, message in heard if topic == "/prompt"] == ["wave"]


def test_messages_recorded_out_of_order_are_played_in_order():
    times = [3, 1, 2, 5 * SECOND, 4 * SECOND, 9 * SECOND]
    assert [m[1] for m in in_order([("a", t, b"") for t in times])] == sorted(times)


def test_a_camera_that_was_not_recorded_is_named(ros, bag):
    cameras = {**CAMERAS, "right_wrist_0_rgb": {"topic": "/third/image_raw"}}
    machine = robot(cameras=cameras)
    with Bag(open_bag(bag)) as opened, pytest.raises(BagError, match="/third/image_raw"):
        Replay(ros.node("player"), opened, read_recording(opened, machine), machine)


def test_the_program_loops_with_a_clock_that_jumps_back_and_ends_on_sigint(ros, bag, tmp_path):
    from rosgraph_msgs.msg import Clock

    file = tmp_path / "robot.yaml"
    file.write_text(yaml.safe_dump({**yaml.safe_load(kit.ROBOT), "cameras": CAMERAS}))
    assert load_robot(file).name == "bench"
    clocks = []
    node = ros.node("listener")
    node.create_subscription(Clock, "/clock", lambda m: clocks.append(m.clock.sec * SECOND + m.clock.nanosec), 100)
    command = [sys.executable, "-m", "pi0_ros.demo.replay", str(bag), "--robot", str(file)]
    command += ["--rate", "4", "--loop", "--wait", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        ros.spin_until(lambda: any(b < a for a, b in zip(clocks, clocks[1:], strict=False)), 60, "a second round")
        process.send_signal(2)
        errors = process.communicate(timeout=20)[1]
    assert process.returncode == 130
    assert "nobody listens to" in errors and "Traceback" not in errors


def test_what_cannot_be_played_is_one_line(tmp_path):
    file = tmp_path / "robot.yaml"
    file.write_text(kit.ROBOT)
    command = [sys.executable, "-m", "pi0_ros.demo.replay", str(tmp_path / "nowhere"), "--robot", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.strip() == f"error: {tmp_path}/nowhere: no such file or folder"
