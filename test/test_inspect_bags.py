"""inspect_bags as its user meets it: table, JSON, page, exit code and reason."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path

import bag_kit as kit
import cv2
import numpy as np
import pytest

from pi0_ros.training import report
from pi0_ros.training.bags import BagError
from pi0_ros.training.cache import model_frame
from pi0_ros.training.data import load_units
from pi0_ros.training.inspect_bags import main

BAGS = Path(__file__).parent / "data" / "bags"


@pytest.fixture
def inspect(tmp_path, capsys):
    """(folder, robot file text, options) -> exit code, stdout, stderr, JSON or None."""

    def run(bags, text=kit.ROBOT, *options):
        (tmp_path / "robot.yaml").write_text(text)
        target = tmp_path / "report.json"
        arguments = [str(bags), "--robot", str(tmp_path / "robot.yaml"), "--json", str(target), "--jobs", "1", *options]
        code = main(arguments)
        out = capsys.readouterr()
        return code, out.out, out.err, json.loads(target.read_text()) if target.exists() else None

    return run


def still(begin, seconds, values, grey=1):
    items = []
    for k in range(round(seconds * 50)):
        ns = begin + k * kit.SECOND // 50
        items += [kit.joint_state(ns, values), kit.compressed(ns, kit.picture(grey))]
    return items


@pytest.fixture
def bags(tmp_path):
    """Two good demonstrations, one with an idle start and a hole in the camera, and one bag without commands."""
    kit.write_bag(tmp_path / "bags" / "good", kit.episode(seconds=3.0))
    shifted = kit.episode(kit.START + 2 * kit.SECOND, seconds=3.0)
    hole = [i for i in shifted if not (i.topic.startswith("/cam") and 3.0 < (i.time - kit.START) / 1e9 < 4.0)]
    kit.write_bag(tmp_path / "bags" / "idle", still(kit.START, 2.0, [0, 0.5, 1]) + hole)
    kit.write_bag(tmp_path / "bags" / "mute", [i for i in kit.episode(seconds=1.0) if i.topic != "/command"])
    return tmp_path / "bags"


def test_usable_data_gives_zero_and_every_number(inspect, bags):
    code, out, err, data = inspect(bags)
    assert code == 0 and "error" not in err
    summary, (good, idle, mute) = data["summary"], data["bags"]
    assert (summary["bags"], summary["usable_bags"], summary["episodes"]) == (3, 2, 2)
    assert summary["chunk"] == {"horizon": 30, "seconds": 3.0, "control_rate": 10.0}  # of train's preset
    assert good["kept"] == good["ticks"] == 30 and good["dropped"] == {}
    assert good["streams"]["base_0_rgb"]["rate"] == pytest.approx(20)
    assert good["streams"]["/joint_states"]["rate"] == pytest.approx(50)
    assert good["streams"]["actions"]["rate"] == pytest.approx(10)
    assert good["missing"] == [] and mute["missing"] == ["/command"]  # a prompt's topic need not be there
    assert idle["streams"]["base_0_rgb"]["gaps"] == 1
    assert idle["streams"]["base_0_rgb"]["longest_gap"] == pytest.approx(1.0, abs=0.06)
    assert 1.6 <= idle["episodes"][0]["idle_start"] <= 2.0 and idle["dropped"]["idle"] >= 16
    assert sum(n for reason, n in idle["dropped"].items() if reason.startswith("base_0_rgb")) >= 7
    assert "actions: topic /command is not in the recording" in mute["refused"]
    assert summary["prompts"] == {"wave": 2} and summary["idle_threshold"] == 0.005
    assert 0 <= summary["skew_ms"]["p50"] <= summary["skew_ms"]["max"] <= 200


@pytest.mark.parametrize(("clock", "rate"), [("header", 10), ("bag", 5)])
def test_the_rate_of_commands_is_by_their_stamps_where_streams_are(inspect, tmp_path, clock, rate):
    """A simulator at half the speed of the recorder's clock."""
    items = [i for i in kit.episode(seconds=4.0) if i.topic != "/command"]
    times = [kit.START + k * kit.SECOND // 10 for k in range(40)]
    items += [kit.trajectory(ns, [(0.1, [k / 40, 0.5, 1.0])], stamp=ns) for k, ns in enumerate(times)]
    for item in items:
        item.time += item.time - kit.START
    _, _, _, data = inspect(kit.write_bag(tmp_path / "bag", items), kit.ROBOT + f"clock: {clock}\n")
    streams = data["bags"][0]["streams"]
    assert streams["actions"]["rate"] == pytest.approx(rate)
    assert streams["/joint_states"]["rate"] == pytest.approx(5 * rate)


def test_the_table_says_in_words_what_the_numbers_say(inspect, bags):
    _, out, _, _ = inspect(bags)
    assert "2 of 3 recordings usable, 2 episodes" in out
    assert "until a joint moves by 0.50% of its range (--idle)" in out
    assert "chunk: 30 actions at 10 Hz = 3.00 s" in out
    assert "REFUSED: actions: topic /command is not in the recording" in out
    assert "prompt 'wave': 2 episodes" in out
    assert re.search(r"shoulder +state +0\.\d+", out)


def test_joints_have_their_statistics_and_what_is_odd_about_them(inspect, bags):
    _, out, _, data = inspect(bags)
    shoulder, elbow, grip = data["summary"]["joints"]
    values = np.arange(30) / 30
    good = data["bags"][0]
    assert good["kept"] == 30
    assert shoulder["state"]["min"] == 0.0 and shoulder["state"]["max"] == pytest.approx(29 / 30)
    assert shoulder["state"]["mean"] == pytest.approx(values.mean(), abs=0.15)
    assert elbow["state"]["near_constant"] and not shoulder["state"]["near_constant"]
    assert any("hardly changes: state of elbow" in text for text in data["summary"]["warnings"])
    assert grip["gripper"]["polarity"] == "as the robot file says" and grip["gripper"]["start"] == 1.0
    assert shoulder["state"]["outside_limits"] == 0 and shoulder["state"]["nan"] == 0


def test_swapped_gripper_ends_and_wrong_units_are_suspected(inspect, bags):
    text = kit.ROBOT.replace("open: 1, closed: 0", "open: 0, closed: 1").replace(
        "position: [-2, 2]", "position: [-0.2, 0.2]", 1
    )
    _, _, _, data = inspect(bags, text)
    warnings = " ".join(data["summary"]["warnings"])
    assert "gripper grip starts closed; are open and closed swapped in the robot file?" in warnings
    assert re.search(r"state of shoulder: \d+% outside its limits \[-0.2, 0.2\]: other units", warnings)


@pytest.mark.parametrize(
    ("open_", "closed", "guess"),
    [(1.0, 0.0, "as the robot file says"), (2.0, 0.5, "unclear, compare by hand"), (0.0, 1.0, "perhaps swapped")],
)
def test_a_gripper_that_starts_between_its_ends_says_nothing_of_them(inspect, bags, open_, closed, guess):
    """The recordings begin with 1: in the middle of a longer way that would fit either polarity."""
    text = kit.ROBOT.replace("position: [0, 1]", "position: [0, 2]")
    text = text.replace("open: 1, closed: 0", f"open: {open_}, closed: {closed}")
    _, _, _, data = inspect(bags, text)
    (grip,) = [joint["gripper"] for joint in data["summary"]["joints"] if "gripper" in joint]
    assert grip["polarity"] == guess


def test_a_page_for_a_folder_that_is_not_there_is_refused_at_once(bags, tmp_path, capsys):
    (tmp_path / "robot.yaml").write_text(kit.ROBOT)
    assert main([str(bags), "--robot", str(tmp_path / "robot.yaml"), "--html", str(tmp_path / "no" / "x.html")]) == 1
    told = capsys.readouterr()
    assert told.out == "" and told.err.strip().endswith(f"there is no folder {tmp_path / 'no'}")


def test_actions_that_are_the_measured_state_are_warned_of(inspect, bags):
    text = kit.ROBOT.replace(
        "topic: /command, type: JointTrajectory}\ncommands", "topic: /joint_states, type: JointState}\ncommands"
    )
    _, _, _, data = inspect(bags, text)
    assert any("actions are the measured state" in text for text in data["summary"]["warnings"])


@pytest.mark.parametrize(
    ("options", "side", "horizon"),
    [
        ([], 112, 30),
        (["--preset", "pi0"], 224, 50),
        (["--preset", "pi0", "--horizon", "20", "--image-size", "56"], 56, 20),
    ],
)
def test_chunk_and_frames_are_those_of_the_model_to_be_trained(inspect, tmp_path, options, side, horizon):
    kit.write_bag(tmp_path / "bag", kit.episode(seconds=1.0))
    _, _, _, data = inspect(tmp_path / "bag", kit.ROBOT, *options, "--html", str(tmp_path / "page.html"))
    assert data["summary"]["chunk"]["horizon"] == horizon
    pictures = re.findall(r"data:image/png;base64,([^\"]+)", (tmp_path / "page.html").read_text())
    shapes = [cv2.imdecode(np.frombuffer(base64.b64decode(data), np.uint8), 1).shape for data in pictures]
    assert shapes.count((side, side, 3)) == 3


def test_the_page_holds_all_it_shows(inspect, bags, tmp_path):
    code, _, _, _ = inspect(bags, kit.ROBOT, "--html", str(tmp_path / "page.html"), "--image-size", "48")
    page = (tmp_path / "page.html").read_text()
    assert code == 0
    assert not re.search(r'(src|href)="(?!data:)', page)
    images = [
        cv2.imdecode(np.frombuffer(base64.b64decode(data), np.uint8), cv2.IMREAD_COLOR)
        for data in re.findall(r"data:image/png;base64,([^\"]+)", page)
    ]
    frames = [image for image in images if image.shape == (48, 48, 3)]
    assert len(frames) == 6 and len(images) == 6 + 1 + 2  # three of each usable bag; histograms; two curves
    assert frames[0][24, 24].tolist() == [10, 10, 10] and frames[0][0, 0].tolist() == [
        0,
        0,
        0,
    ]  # padded as the model sees
    assert "Refused: actions: topic /command is not in the recording" in page and "longest, s" in page


def test_ticks_before_the_first_command_of_some_joint_are_warned_of(inspect, tmp_path):
    late = [i for i in kit.episode(seconds=2.0) if i.topic != "/command" or i.time >= kit.START + kit.SECOND]
    _, _, _, data = inspect(kit.write_bag(tmp_path / "bag", late))
    assert "at 10 of 20 ticks kept some joint has no known command: no chunk holds them" in data["summary"]["warnings"]


REFUSALS = {
    "no command in its episode": (
        lambda p: kit.write_bag(
            p / "bag",
            [
                *(i for i in kit.episode(seconds=3.0) if i.topic != "/command" or i.time < kit.START + kit.SECOND),
                kit.text(kit.START + 2 * kit.SECOND, "begin", "/episode"),
            ],
        ),
        kit.ROBOT + "episode_topic: /episode\n",
        "no tick with an observation has a command",
    ),
    "nothing there": (lambda p: p / "nowhere", None, "nowhere: no such file or folder"),
    "empty bag": (
        lambda p: kit.write_bag(p / "empty", [kit.text(kit.START, "x", "/other")]),
        None,
        "camera base_0_rgb: topic /cam/image_raw/compressed is not in the recording",
    ),
    "not YAML": (lambda p: p / "bags", "just a sentence: [", "robot.yaml: not YAML at line"),
    "wrong joints": (
        lambda p: kit.write_bag(p / "bag", kit.episode(seconds=1.0)),
        kit.ROBOT.replace("name: elbow", "name: knee"),
        "no message names joint knee; names found: elbow, grip, shoulder",
    ),
    "never moves": (
        lambda p: kit.write_bag(
            p / "bag", [*still(kit.START, 1.0, [0, 0, 1]), kit.trajectory(kit.START, [(0.1, [0, 0, 1])])]
        ),
        None,
        "no usable tick (10 x idle)",
    ),
}


def with_frames(frame):
    """A second of everything, with the message `frame(ns)` for each camera frame."""
    items = [i for i in kit.episode(seconds=1.0) if not i.topic.startswith("/cam")]
    return [*items, *(frame(kit.START + k * kit.SECOND // 10) for k in range(10))]


def no_picture(ns, form="jpeg"):
    item = kit.compressed(ns, kit.picture(0))
    item.message.format, item.message.data = form, np.frombuffer(b"\x00\x00\x00\x01 some video", np.uint8)
    return item


UNREADABLE = {
    "depth": (
        lambda ns: kit.raw(ns, kit.picture(0), encoding="16UC1"),
        "10 x image encoding '16UC1' cannot be read",
    ),
    "compressed depth": (lambda ns: no_picture(ns, "16UC1; compressedDepth png"), "10 x depth, not colour"),
    "video": (no_picture, "no frame of base_0_rgb can be decoded: compressed image of 15 bytes"),
    "short rows": (lambda ns: kit.raw(ns, kit.picture(0), step=16, encoding="rgb8"), "no frame of base_0_rgb can be"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_images_that_cannot_be_decoded_are_refused_as_training_refuses_them(inspect, tmp_path, name):
    frame, expected = UNREADABLE[name]
    bag = kit.write_bag(tmp_path / "bag", with_frames(frame))
    code, _, err, _ = inspect(bag)
    assert code == 1 and expected in err
    with pytest.raises(BagError):
        load_units(bag, kit.robot(), 28, cache=tmp_path / "cache", jobs=1, quiet=True)


def test_a_single_frame_that_cannot_be_decoded_refuses_nothing(inspect, tmp_path):
    bag = with_frames(lambda ns: no_picture(ns) if ns == kit.START else kit.compressed(ns, kit.picture(1)))
    code, _, _, data = inspect(kit.write_bag(tmp_path / "bag", bag))
    assert code == 0 and data["bags"][0]["refused"] is None


def test_one_frame_of_each_camera_is_decoded_to_see_that_it_can_be(inspect, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(report, "model_frame", lambda raw, *rest: seen.append(raw) or model_frame(raw, *rest))
    assert inspect(kit.write_bag(tmp_path / "bag", kit.episode(seconds=2.0)))[0] == 0
    assert len(seen) == 1


@pytest.mark.parametrize(("rate", "fine"), [(4, False), (10, True)])
def test_commands_too_slow_for_the_control_rate_are_refused_as_training_refuses_them(inspect, tmp_path, rate, fine):
    items = [i for i in kit.episode(seconds=4.0) if i.topic != "/command"]
    items += [kit.floats(kit.START + i * kit.SECOND // rate, [i / rate / 4, 0.5, 1]) for i in range(4 * rate)]
    text = kit.ROBOT.replace("JointTrajectory}\ncommands", "Float64MultiArray}\ncommands")
    code, _, err, _ = inspect(kit.write_bag(tmp_path / "bag", items), text)
    assert code == (0 if fine else 1)
    assert fine or "change 4 times a second, but the robot file's control_rate is 10 Hz" in err


@pytest.mark.parametrize("name", REFUSALS)
def test_data_that_cannot_be_trained_on_gives_one_and_the_reason(inspect, tmp_path, name):
    make, text, expected = REFUSALS[name]
    code, _, err, _ = inspect(make(tmp_path), text or kit.ROBOT)
    lines = [line for line in err.splitlines() if line.startswith("error:")]
    assert code == 1 and len(lines) == 1 and expected in lines[0]
    assert "Traceback" not in err


def test_nan_joints_are_refused_by_name(inspect, tmp_path):
    items = kit.episode(seconds=1.0)
    for item in items:
        if item.topic == "/joint_states":
            item.message.position[2] = np.nan
    code, _, err, _ = inspect(kit.write_bag(tmp_path / "bag", items))
    assert code == 1 and "/joint_states: joint 'grip' is NaN or infinite in 100.0% of the messages" in err


def test_few_nan_positions_are_counted_for_their_joint_and_stream(inspect, tmp_path):
    items = kit.episode(seconds=4.0)
    for item in [i for i in items if i.topic == "/joint_states"][20:22]:
        item.message.position[1] = np.nan
    items += [kit.trajectory(items[0].time + k * 10**7, [(0.1, [k / 400, 0.5, 1.0])]) for k in range(400)]
    items[-2].message.points[0].positions[2] = np.nan
    _, out, _, data = inspect(kit.write_bag(tmp_path / "bag", items))
    counts = {joint["name"]: (joint["state"]["nan"], joint["actions"]["nan"]) for joint in data["summary"]["joints"]}
    assert counts == {"shoulder": (0, 0), "elbow": (2, 0), "grip": (0, 1)}
    assert re.search(r"elbow +state .* 2 NaN", out)


def test_found_recordings_are_all_read_and_each_is_refused_for_its_own_reason(inspect):
    code, out, err, data = inspect(BAGS)
    assert code == 1 and len(data["bags"]) == 5
    assert all(bag["refused"] for bag in data["bags"])
    assert "error: none of 5 recordings can be trained on" in err
    assert "12 of 13 split files are missing" in out and "metadata.yaml names rosbag2_2024_11_24" in out


def test_of_many_recordings_the_later_ones_take_a_line_each(inspect, tmp_path):
    for i in range(10):
        kit.write_bag(tmp_path / "many" / f"{i}", kit.episode(seconds=1.0))
    _, out, _, _ = inspect(tmp_path / "many")
    assert f"{tmp_path / 'many' / '9'}: 1.0 s, ticks kept 10 of 10" in out
    assert out.count("actions (/command)") == 8


@pytest.mark.parametrize(
    ("option", "value", "least"),
    [("--image-size", "-5", 1), ("--horizon", "0", 1), ("--idle", "nan", 0), ("--idle", "-1", 0), ("--jobs", "-3", 1)],
)
def test_an_option_that_cannot_be_is_one_line(tmp_path, capsys, option, value, least):
    assert main([str(tmp_path), "--robot", str(tmp_path / "robot.yaml"), option, value]) == 1
    found = capsys.readouterr().err
    assert found == f"error: {option} must be at least {least}, found {float(value) if option == '--idle' else value}\n"


def test_rates_without_a_robot_file_are_those_of_the_topic_whenever_the_recording_began(tmp_path, capsys):
    early = kit.floats(kit.START - 2 * kit.SECOND, [0.5], "/hand")
    bag = kit.write_bag(tmp_path / "one", [early, *kit.episode(seconds=1.0)])
    assert main([str(bag)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{bag}: 3.0 s"
    assert "  /joint_states  sensor_msgs/msg/JointState, 50 messages, 50.0 Hz" in lines
    assert "  /hand  std_msgs/msg/Float64MultiArray, 1 messages" in lines


@pytest.mark.parametrize(("keep", "share"), [(lambda k: k % 3, 33), (lambda k: k % 20, 0), (lambda k: True, 0)])
def test_frames_that_are_missing_between_others_are_counted_and_warned_of(keep, share, tmp_path, inspect):
    frames = [item for item in kit.episode(seconds=3.0) if item.topic.startswith("/cam")]
    lost = {item.time for k, item in enumerate(frames) if not keep(k)}
    items = [i for i in kit.episode(seconds=3.0) if not (i.topic.startswith("/cam") and i.time in lost)]
    kit.write_bag(tmp_path / "bags" / "one", items)
    code, out, err, data = inspect(tmp_path / "bags")
    assert code == 0
    assert data["bags"][0]["streams"]["base_0_rgb"]["lost"] == pytest.approx(share / 100 or 0.02, abs=0.04)
    assert (f", {share} % missing" in out) == (share > 0)
    warning = (
        f"up to {share} % of base_0_rgb's frames are missing between others, unless its rate changes: is the driver"
    )
    assert (warning in out + err) == (share > 0)


def test_a_pause_of_the_recorder_is_no_lost_frame(tmp_path, inspect):
    later = kit.episode(kit.START + 7 * kit.SECOND, seconds=3.0)
    kit.write_bag(tmp_path / "bags" / "one", [*kit.episode(seconds=3.0), *later])
    _, out, _, data = inspect(tmp_path / "bags")
    assert data["bags"][0]["streams"]["base_0_rgb"]["lost"] < 0.02 and "missing" not in out


def test_without_a_robot_file_a_joint_whose_angle_wraps_is_told_to_be_continuous(tmp_path, capsys):
    items = [kit.joint_state(kit.START + k * 10**7, [(3.0 + k / 100) % 6.28 - 3.14, k / 9, 0.0]) for k in range(400)]
    assert main([str(kit.write_bag(tmp_path / "one", items))]) == 0
    out = capsys.readouterr().out
    assert "  shoulder  -3.13 to 3.14, wraps around: kind: continuous\n" in out and out.count("wraps around") == 1


def test_without_a_robot_file_it_tells_what_a_recording_holds(bags, tmp_path, capsys):
    extra = [kit.text(kit.START + k, f"task {k}") for k in range(5)] + [kit.floats(kit.START, [0.5, -1], "/hand")]
    bag = kit.write_bag(tmp_path / "one", [*kit.episode(seconds=1.0), *extra, kit.raw(kit.START, kit.picture(1))])
    assert main([str(bag)]) == 0
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == f"{bag}: 1.0 s"
    assert lines[1:5] == [
        "  /joint_states  sensor_msgs/msg/JointState, 50 messages, 50.0 Hz",
        "      shoulder  0 to 0.98",
        "      elbow     0.5 to 0.5",
        "      grip      0 to 1",
    ]
    assert "      16x12, rgb8" in lines and "      16x12, png" in lines
    assert "      [1]  -1 to -1" in lines and "      'task 2'" in lines and "      and 2 more" in lines
    assert lines[-1].startswith("write a robot file from this")
    assert main([str(bags)]) == 0
    assert "more recordings" in capsys.readouterr().out
    assert main([str(tmp_path / "none")]) == 1
    assert "no such file" in capsys.readouterr().err
    assert main([str(bag), "--json", str(tmp_path / "x.json")]) == 1
    assert "--json needs --robot" in capsys.readouterr().err
