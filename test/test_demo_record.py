"""record_demos: the bags it writes, as rosbags and the trainer read them."""

import json

import numpy as np
import pytest
from rosbags.highlevel import AnyReader

from pi0_ros.demo import record as recording
from pi0_ros.demo.controller import Point, TrajectoryController
from pi0_ros.demo.record import Options, Recorder, RecordingError, episode_path, main, record
from pi0_ros.demo.scene import CUBES, JOINTS
from pi0_ros.policy.images import decode_image
from pi0_ros.robot_file import config_folder, load_robot


def options(folder, **more) -> Options:
    return Options(output=folder, **{"episodes": 2, "width": 64, "height": 48, "processes": 1, **more})


def read(path) -> dict[str, list]:
    with AnyReader([path]) as reader:
        found: dict[str, list] = {}
        for connection, time, raw in reader.messages():
            found.setdefault(connection.topic, []).append((time, reader.deserialize(raw, connection.msgtype)))
    return found


def ns(stamp) -> int:
    return stamp.sec * 10**9 + stamp.nanosec


@pytest.fixture(scope="module")
def bags(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demos")
    assert record(options(folder)) == []
    return folder


def test_a_bag_holds_what_the_demo_robot_publishes(bags):
    found = read(episode_path(bags, 0))
    cameras = ["/base_camera/image_raw/compressed", "/wrist_camera/image_raw/compressed"]
    commands = "/joint_trajectory_controller/joint_trajectory"
    assert sorted(found) == sorted(["/episode", "/joint_states", "/prompt", commands, *cameras])
    assert [message.data for _, message in found["/episode"]] == [found["/prompt"][0][1].data, ""]
    for topic, period in (("/joint_states", 20_000_000), (commands, 50_000_000)):
        times = np.array([time for time, _ in found[topic]])
        assert set(np.diff(times)) == {period}
        assert all(ns(message.header.stamp) == time for time, message in found[topic])
    for topic in cameras:
        times = np.array([time for time, _ in found[topic]])
        assert abs(np.diff(times).mean() - 50e6) < 1e6
        assert decode_image(found[topic][0][1]).shape == (48, 64, 3)
    assert found["/joint_states"][0][1].name == list(JOINTS)


def test_the_recorded_commands_are_what_moved_the_arm(bags):
    """A controller fed with the bag's trajectories commands positions that the measured joints follow."""
    found = read(episode_path(bags, 1))
    states = [(time, message.position) for time, message in found["/joint_states"]]
    controller, lag, errors = TrajectoryController(JOINTS, states[0][1]), 60_000_000, []
    commanded = {}
    commands = dict(found["/joint_trajectory_controller/joint_trajectory"])
    for time in range(states[0][0], states[-1][0], 10_000_000):
        if time in commands:
            message = commands[time]
            points = [Point(ns(point.time_from_start), point.positions) for point in message.points]
            controller.accept(message.joint_names, points, ns(message.header.stamp), time)
        commanded[time] = controller.sample(time)[0]
    errors = [np.abs(position - commanded[time - lag]).max() for time, position in states if time - lag in commanded]
    assert len(errors) > 20
    assert np.max(errors) < 0.15 and np.mean(errors) < 0.03
    assert np.ptp([position for _, position in states], axis=0).max() > 0.2


def test_the_same_seed_makes_the_same_bytes_and_whole_episodes_are_kept(bags, tmp_path):
    record(options(tmp_path, episodes=1))
    first = [episode_path(folder, 0) / "episode_00000.mcap" for folder in (bags, tmp_path)]
    assert first[0].read_bytes() == first[1].read_bytes()
    written = first[1].stat().st_mtime_ns
    (tmp_path / ".episode_00001.partial").mkdir()  # left behind by a kill
    record(options(tmp_path, episodes=2))
    assert first[1].stat().st_mtime_ns == written
    assert sorted(path.name for path in tmp_path.iterdir()) == ["episode_00000", "episode_00001", "recording.json"]


def test_the_trainer_reads_the_bags_without_a_problem(bags):
    from pi0_ros.training.bags import Bag, find_bags
    from pi0_ros.training.episodes import cut_episodes
    from pi0_ros.training.recording import read_recording

    robot = load_robot(config_folder() / "so101_demo.yaml")
    found = find_bags(bags)
    assert len(found) == 2
    for files in found:
        with Bag(files) as bag:
            read_back = read_recording(bag, robot)
        assert read_back.problems == []
        (episode,) = cut_episodes(read_back, robot)
        assert episode.usable.mean() > 0.6
        assert episode.actions.shape == episode.state.shape == (len(episode.ticks_ns), 6)
        # An action is where the arm is told to be, state where it is: close, but never the same.
        moving = np.abs(episode.actions - episode.state)[episode.usable]
        assert 1e-3 < moving.mean() < 0.1


def test_a_scene_comes_once_for_every_cube_on_it(tmp_path):
    seen = []
    for cubes in (1, 2, 3):
        recorder = Recorder(options(tmp_path / str(cubes), cubes=cubes))
        for index in range(cubes):
            assert recorder.record(index)
            simulation = recorder._simulation
            there = [name for name, distance in zip(CUBES, simulation.distances(), strict=True) if distance < 0.5]
            seen.append((cubes, simulation.seed, len(there), simulation.target in there, simulation.target))
    seed = options(tmp_path).seed
    assert [row[:4] for row in seen] == [(n, seed, n, True) for n in (1, 2, 2, 3, 3, 3)]
    assert seen[1][4] != seen[2][4] and {row[4] for row in seen[3:]} == set(CUBES)


def test_several_processes_write_the_same_episodes(bags, tmp_path):
    assert record(options(tmp_path, processes=2)) == []
    for index in range(2):
        name = f"episode_{index:05d}"
        assert (bags / name / f"{name}.mcap").read_bytes() == (tmp_path / name / f"{name}.mcap").read_bytes()


def test_a_failed_attempt_leaves_no_bag(tmp_path, monkeypatch):
    monkeypatch.setattr(recording, "demonstrate", lambda *_: False)
    assert record(options(tmp_path)) == [0, 1]
    assert [path.name for path in tmp_path.iterdir()] == ["recording.json"]


def test_what_cannot_be_recorded_is_one_line(bags, tmp_path, capsys):
    with pytest.raises(RecordingError, match="--rate: found 0"):
        record(options(tmp_path / "a", rate=0.0))
    with pytest.raises(RecordingError, match="another --output"):
        record(options(bags, width=80))
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as stop:
        main(["--output", str(tmp_path / "file" / "demos"), "--episodes", "1"])
    assert str(stop.value).startswith("error: ") and "\n" not in str(stop.value)
    assert json.loads((bags / "recording.json").read_text())["width"] == 64
