"""Recordings on disk in every form, whole, odd and broken."""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing

import bag_kit as kit
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from pi0_ros.training.bags import Bag, BagError, find_bags, normal_type
from pi0_ros.training.recording import read_recording

FORMS = [
    *[("mcap", compression) for compression in ("none", "file", "message", "storage")],
    *[("sqlite3", compression) for compression in ("none", "file", "message")],
]


def read(path):
    """(topic, time) of all messages and the notes of the one recording at `path`."""
    (files,) = find_bags(path)
    with Bag(files) as bag:
        return sorted((topic, time) for topic, time, _ in bag.messages(set(bag.topics))), bag.notes


@pytest.fixture(scope="module")
def written():
    return kit.episode(seconds=1.0)


@pytest.mark.parametrize(("storage", "compression"), FORMS)
def test_every_storage_and_compression_reads_alike(tmp_path, written, storage, compression):
    kit.write_bag(tmp_path / "bag", written, storage=storage, compression=compression)
    messages, notes = read(tmp_path / "bag")
    assert messages == sorted((item.topic, item.time) for item in written)
    assert notes == []


@pytest.mark.parametrize(("storage", "compression"), [("mcap", "none"), ("sqlite3", "file"), ("mcap", "message")])
def test_split_files_are_one_recording(tmp_path, written, storage, compression):
    kit.write_split_bag(tmp_path / "bag", written, 3, storage=storage, compression=compression)
    messages, notes = read(tmp_path / "bag")
    assert len(list((tmp_path / "bag").iterdir())) == 4
    assert messages == sorted((item.topic, item.time) for item in written)
    assert notes == []


def test_missing_split_files_cost_only_their_messages(tmp_path, written):
    bag = kit.write_split_bag(tmp_path / "bag", written, 3)
    (bag / "bag_1.mcap").unlink()
    messages, notes = read(bag)
    assert 0 < len(messages) < len(written)
    assert "1 of 3 split files are missing (bag_1.mcap, ...), the rest is read" in notes
    assert f"metadata.yaml counts {len(written)} messages, the files hold {len(messages)}" in notes


def test_a_folder_that_ends_in_bag_is_no_ros_1_bag(tmp_path, written):
    kit.write_bag(tmp_path / "demo.bag", written)
    assert len(read(tmp_path / "demo.bag")[0]) == len(written)
    assert len(read(tmp_path)[0]) == len(written)


def test_a_ros_1_bag_is_refused_with_the_way_out(tmp_path):
    (tmp_path / "old.bag").write_bytes(b"#ROSBAG V2.0\n")
    with pytest.raises(BagError, match=r"old\.bag: a ROS 1 bag; convert it with `rosbags-convert"):
        read(tmp_path)


@pytest.mark.parametrize("name", ["with space", "per%20cent", "hash#1", "what?"])
@pytest.mark.parametrize("storage", ["mcap", "sqlite3"])
def test_folder_names_may_hold_any_character(tmp_path, written, name, storage):
    kit.write_bag(tmp_path / "plain", written, storage=storage).rename(tmp_path / name)
    assert len(read(tmp_path / name)[0]) == len(written)


def test_without_metadata_the_files_are_read(tmp_path, written):
    bag = kit.write_split_bag(tmp_path / "bag", written, 2)
    (bag / "metadata.yaml").unlink()
    messages, notes = read(bag)
    assert len(messages) == len(written)
    assert notes == ["metadata.yaml is missing, the files themselves were read"]


@pytest.mark.parametrize("text", ["", "[1, 2", "just text", "rosbag2_bagfile_information: 3", "\x00"])
def test_useless_metadata_is_noted_and_the_files_are_read(tmp_path, written, text):
    bag = kit.write_bag(tmp_path / "bag", written)
    (bag / "metadata.yaml").write_text(text)
    messages, notes = read(bag)
    assert len(messages) == len(written)
    assert len(notes) == 1 and notes[0].startswith("metadata.yaml cannot be used (")


def test_metadata_that_names_another_file_is_noted(tmp_path, written):
    bag = kit.write_bag(tmp_path / "bag", written)
    (bag / "bag.mcap").rename(bag / "renamed.mcap")
    messages, notes = read(bag)
    assert len(messages) == len(written)
    assert notes == ["metadata.yaml names bag.mcap, which is not there; read renamed.mcap"]


def test_a_recording_without_any_file_is_refused(tmp_path, written):
    bag = kit.write_bag(tmp_path / "bag", written)
    (bag / "bag.mcap").unlink()
    with pytest.raises(BagError, match=r"no storage file there; metadata\.yaml names bag\.mcap"):
        read(bag)


def test_metadata_that_names_no_file_by_name_is_refused_all_the_same(tmp_path):
    (tmp_path / "metadata.yaml").write_text("rosbag2_bagfile_information: {relative_file_paths: [1]}")
    with pytest.raises(BagError, match=r"no storage file there; metadata\.yaml names 1$"):
        read(tmp_path)


def test_loose_files_are_recordings_of_their_own(tmp_path, written):
    for name in ("a", "b"):
        kit.write_bag(tmp_path / "x" / name, written)
        (tmp_path / "x" / name / f"{name}.mcap").rename(tmp_path / f"{name}.mcap")
    shutil.rmtree(tmp_path / "x")
    assert [bag.path.name for bag in find_bags(tmp_path)] == ["a.mcap", "b.mcap"]
    assert len(read(tmp_path / "a.mcap")[0]) == len(written)


def test_a_folder_without_recordings_says_so(tmp_path):
    with pytest.raises(BagError, match="no recording found"):
        find_bags(tmp_path)
    with pytest.raises(BagError, match="no such file or folder"):
        find_bags(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(BagError, match="not a recording"):
        find_bags(tmp_path / "notes.txt")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The bytes of one small recording in each form."""
    folder = tmp_path_factory.mktemp("small")
    items = kit.episode(seconds=0.2)
    contents = {}
    for storage, compression in FORMS:
        bag = kit.write_bag(folder / f"{storage}-{compression}", items, storage=storage, compression=compression)
        (file,) = (path for path in bag.iterdir() if path.name != "metadata.yaml")
        contents[file.name] = file.read_bytes()
    return contents


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damaged_files_are_refused_in_one_line_or_read(small, tmp_path_factory, data):
    name = data.draw(st.sampled_from(sorted(small)))
    content = bytearray(small[name])
    if data.draw(st.booleans(), "cut"):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        for _ in range(data.draw(st.integers(1, 8))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("damaged") / name
    path.write_bytes(content)
    try:
        (files,) = find_bags(path)
        with Bag(files) as bag:
            read_recording(bag, kit.robot())
    except BagError as error:
        assert str(path) in str(error) and "\n" not in str(error)


def test_a_topic_without_a_type_is_damage(tmp_path, small):
    name = "bag.db3" if "bag.db3" in small else next(name for name in small if name.endswith(".db3"))
    path = tmp_path / name
    path.write_bytes(small[name])
    with sqlite3.connect(path) as file:
        file.execute("PRAGMA writable_schema = 1")
        file.execute(
            "UPDATE sqlite_master SET sql = replace(sql, 'type TEXT NOT NULL', 'type TEXT') WHERE name = 'topics'"
        )
    with sqlite3.connect(path) as file:
        file.execute("UPDATE topics SET type = NULL WHERE id = 1")
    with pytest.raises(BagError, match="truncated or damaged"), Bag(find_bags(path)[0]):
        pass


def test_a_channel_that_cannot_be_parsed_leaves_the_others_readable(tmp_path, written):
    odd = kit.text(kit.START, "x", "/odd")
    bag = kit.write_bag(tmp_path / "bag", [*written, odd], raw_types={"/odd": "some.proto.Message"})
    content = (bag / "bag.mcap").read_bytes()
    mark = b"some.proto.Message\x07\x00\x00\x00ros2msg"
    assert content.count(mark) >= 1
    content = content.replace(mark, b"some.proto.Message\x07\x00\x00\x00\xff\xfebinry")
    (bag / "bag.mcap").write_bytes(content)
    messages, _ = read(bag)
    assert {topic for topic, _ in messages} >= {"/joint_states", "/command", "/cam/image_raw/compressed"}


def test_a_needed_topic_that_is_not_encoded_as_cdr_is_named_with_its_encoding(tmp_path, written):
    bag = kit.write_bag(tmp_path / "bag", [*written, kit.text(kit.START, "wave")])
    content = (bag / "bag.mcap").read_bytes()
    for topic in (b"/cam/image_raw/compressed", b"/prompt"):
        assert content.count(topic + b"\x03\x00\x00\x00cdr")
        content = content.replace(topic + b"\x03\x00\x00\x00cdr", topic + b"\x03\x00\x00\x00jsn")
    (bag / "bag.mcap").write_bytes(content)
    (files,) = find_bags(bag)
    with Bag(files) as opened:
        recording = read_recording(opened, kit.robot())
    reason = "topic /cam/image_raw/compressed is encoded as 'jsn', expected cdr"
    assert recording.problems == [f"camera base_0_rgb: {reason}"]
    assert "prompt: topic /prompt is encoded as 'jsn', expected cdr" in recording.notes


def test_an_mcap_file_of_another_system_is_told_from_a_broken_one(tmp_path, written):
    bag = kit.write_bag(tmp_path / "bag", written)
    content = (bag / "bag.mcap").read_bytes()
    (bag / "bag.mcap").write_bytes(content.replace(b"ros2", b"ros9", 1))
    with pytest.raises(BagError, match=r"bag\.mcap: an mcap file, but not of ROS 2"):
        read(bag)
    (bag / "bag.mcap").write_bytes(content[:-30])
    with pytest.raises(
        BagError, match=r"truncated or damaged \(.*\); `mcap recover` or `ros2 bag reindex` may mend it"
    ):
        read(bag)


def test_messages_that_cannot_be_parsed_are_counted_not_fatal(tmp_path, written):
    broken = kit.joint_state(kit.START + 5, [0.0, 0.0, 0.0])
    bag = kit.write_bag(tmp_path / "bag", [*written, broken], storage="sqlite3")
    with sqlite3.connect(bag / "bag.db3") as database:
        database.execute("UPDATE messages SET data = x'0001000041' WHERE timestamp = ?", (kit.START + 5,))
    (files,) = find_bags(bag)
    with Bag(files) as opened:
        recording = read_recording(opened, kit.robot())
    assert recording.problems == []
    ((where, reason), count) = recording.faults.popitem()
    assert (where, count) == ("/joint_states", 1) and reason.startswith("not a sensor_msgs/msg/JointState")


def test_messages_that_a_killed_recorder_never_merged_are_noted(tmp_path, written):
    bag = kit.write_bag(tmp_path / "bag", written, storage="sqlite3")
    killed = tmp_path / "killed"
    with closing(sqlite3.connect(bag / "bag.db3")) as database:
        assert database.execute("PRAGMA journal_mode=WAL").fetchone() == ("wal",)
        database.execute("PRAGMA wal_autocheckpoint=0")
        database.execute("INSERT INTO messages (topic_id, timestamp, data) SELECT topic_id, 1, data FROM messages")
        database.commit()
        shutil.copytree(bag, killed)  # as the disk is when the recorder gets no chance to close
    assert (killed / "bag.db3-wal").stat().st_size > 0
    messages, notes = read(killed)
    assert messages == sorted((item.topic, item.time) for item in written)
    assert notes == ["bag.db3-wal holds messages that were never merged: the recorder was killed; not read"]
    assert read(bag)[1] == [f"metadata.yaml counts {len(written)} messages, the files hold {2 * len(written)}"]


def test_types_written_in_the_old_way_are_read(tmp_path, written):
    names = {"/joint_states": "sensor_msgs/JointState", "/cam/image_raw/compressed": "sensor_msgs/CompressedImage"}
    bag = kit.write_bag(tmp_path / "bag", written, raw_types=names)
    (files,) = find_bags(bag)
    with Bag(files) as opened:
        recording = read_recording(opened, kit.robot())
    assert recording.problems == [] and len(recording.states[0].time_ns) == 50
    assert "/joint_states: type written 'sensor_msgs/JointState', read as sensor_msgs/msg/JointState" in recording.notes
    assert normal_type("sensor_msgs/msg/Image") == "sensor_msgs/msg/Image"


def test_the_digest_follows_the_content_and_not_the_place(tmp_path, written):
    first = kit.write_bag(tmp_path / "a" / "bag", written)
    shutil.copytree(first, tmp_path / "b" / "bag")
    other = kit.write_bag(tmp_path / "c" / "bag", written[:-1])
    digests = [find_bags(path)[0].digest() for path in (first, tmp_path / "b" / "bag", other)]
    assert digests[0] == digests[1] != digests[2]
    assert len(digests[0]) == 16


def test_custom_data_of_the_metadata_is_known(tmp_path, written):
    bag = kit.write_bag(tmp_path / "bag", written, custom={"prompt": "stack the cups"})
    assert find_bags(bag)[0].custom_data == {"prompt": "stack the cups"}
    assert find_bags(bag)[0].prompt == "stack the cups"
    text = yaml.safe_load((bag / "metadata.yaml").read_text())
    text["rosbag2_bagfile_information"]["custom_data"] = None
    (bag / "metadata.yaml").write_text(yaml.safe_dump(text))
    assert find_bags(bag)[0].custom_data == {}
    assert find_bags(bag)[0].prompt == ""


@pytest.mark.parametrize(
    ("custom", "prompt"),
    [
        ({"episode_index": "3", "task": "pick up the cube"}, "pick up the cube"),
        ({"lerobot.operator_prompt": "fold the towel"}, "fold the towel"),
        ({"task": "kitchen", "prompt": "open the drawer"}, "open the drawer"),
        ({"prompt": " ", "task": "open the drawer\n"}, "open the drawer"),
    ],
)
def test_the_instruction_is_known_by_the_names_that_recorders_give_it(custom, prompt, tmp_path, written):
    assert find_bags(kit.write_bag(tmp_path / "bag", written, custom=custom))[0].prompt == prompt


def test_numbered_files_with_a_pause_between_them_are_recordings_of_their_own(tmp_path):
    for k in range(3):
        bag = kit.write_bag(tmp_path / f"bag{k}", kit.episode(begin=kit.START + k * 100 * kit.SECOND))
        next(bag.glob("*.mcap")).rename(tmp_path / f"episode_{k}.mcap")
        shutil.rmtree(bag)
    found = find_bags(tmp_path)
    assert [bag.path.name for bag in found] == ["episode_0.mcap", "episode_1.mcap", "episode_2.mcap"]
    (tmp_path / "episode_1.mcap").unlink()  # a hole, as far as anyone can tell
    (whole,) = find_bags(tmp_path)
    assert [file.name for file in whole.files] == ["episode_0.mcap", "episode_2.mcap"]
