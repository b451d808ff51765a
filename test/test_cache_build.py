"""The cache: the node's own pixels, whole or not there, and one bad bag costs only itself."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import bag_kit as kit
import numpy as np
import pytest

from pi0_ros.policy.images import decode_image, orient, resize_with_pad
from pi0_ros.training import cache
from pi0_ros.training.bags import find_bags
from pi0_ros.training.build import build_cache, run_all
from pi0_ros.training.cache import CacheError, open_unit, unit_key
from pi0_ros.training.episodes import Selection

SIZE = 24


def build(bags, folder, robot=None, size=SIZE, jobs=1, **options):
    return build_cache(find_bags(bags), robot or kit.robot(), size, folder, jobs=jobs, progress=False, **options)


@pytest.fixture
def bags(tmp_path):
    for i in range(3):
        kit.write_bag(tmp_path / "bags" / f"take{i}", kit.episode(seconds=1.0, shift=50 * i))
    return tmp_path / "bags"


def test_frames_are_those_that_the_node_would_show_the_model(tmp_path):
    rng = np.random.default_rng(0)
    items = [i for i in kit.episode(seconds=1.0) if not i.topic.startswith("/cam")]
    frames = [rng.integers(0, 255, (30, 40, 3), np.uint8) for _ in range(20)]
    items += [kit.compressed(kit.START + i * kit.SECOND // 20, frame, "jpg") for i, frame in enumerate(frames)]
    kit.write_bag(tmp_path / "bag", items)
    camera = {"topic": "/cam/image_raw", "transport": "compressed", "rotate": 90, "flip": "horizontal"}
    robot = kit.robot(cameras={"base_0_rgb": camera})
    (unit,) = build(tmp_path / "bag", tmp_path / "cache", robot).units
    message = items[-20 + 6].message  # frame 6 is the one of tick 3
    expected = resize_with_pad(orient(decode_image(message), robot.present_cameras["base_0_rgb"]), SIZE)
    row = unit.arrays["rows"][3, 0]
    np.testing.assert_array_equal(unit.frames["base_0_rgb"][row], expected)


def test_a_frame_that_no_tick_sees_is_not_kept_and_a_shared_one_is_kept_once(bags, tmp_path):
    (unit, *_) = build(bags, tmp_path / "cache").units
    assert unit.frames["base_0_rgb"].shape == (10, SIZE, SIZE, 3)  # 20 frames at 20 Hz, ticks at 10 Hz
    assert unit.frames["base_0_rgb"][:, SIZE // 2, SIZE // 2, 0].tolist() == list(range(10, 30, 2))
    (slow, *_) = build(bags, tmp_path / "cache", kit.robot(control_rate=40)).units
    assert slow.frames["base_0_rgb"].shape[0] == 20 and len(slow.arrays["rows"]) == 40
    assert slow.arrays["rows"][:6, 0].tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("encoding", ["bgr8", "mono8", "bgra8", "yuv422", "yuv422_yuy2", "bayer_rggb8"])
def test_raw_encodings_reach_the_cache(tmp_path, encoding):
    items = [i for i in kit.episode(seconds=0.5) if not i.topic.startswith("/cam")]
    channels = {"bgr8": 3, "bgra8": 4, "mono8": 1, "bayer_rggb8": 1}.get(encoding, 2)
    for k in range(10):
        data = np.full(12 * 16 * channels, 128, np.uint8)
        fields = {"encoding": encoding, "step": 16 * channels, "data": data}
        items.append(kit.raw(kit.START + k * kit.SECOND // 20, kit.picture(0), **fields))
    kit.write_bag(tmp_path / "bag", items)
    (unit,) = build(tmp_path / "bag", tmp_path / "cache").units
    assert abs(unit.frames["base_0_rgb"][0, 12, 12].astype(int) - 128).max() <= 2


def test_a_warm_cache_decodes_nothing(bags, tmp_path):
    first, second = build(bags, tmp_path / "cache"), build(bags, tmp_path / "cache")
    assert (first.decoded, second.decoded) == (30, 0)
    assert [u.folder for u in first.units] == [u.folder for u in second.units]


def test_processes_give_the_same_as_one(bags, tmp_path):
    one, two = build(bags, tmp_path / "one"), build(bags, tmp_path / "two", jobs=2)
    assert two.decoded == 30
    for a, b in zip(one.units, two.units, strict=True):
        assert a.index == b.index
        np.testing.assert_array_equal(a.frames["base_0_rgb"], b.frames["base_0_rgb"])


def test_threads_give_the_same_as_none(bags, tmp_path):
    files = find_bags(bags)[0]
    units = [cache.build_unit(files, kit.robot(), SIZE, Selection(), tmp_path / f"{n}", n)[0] for n in (1, 4)]
    np.testing.assert_array_equal(units[0].frames["base_0_rgb"], units[1].frames["base_0_rgb"])


def test_the_key_follows_what_the_content_depends_on(bags, monkeypatch):
    (files, other, _) = find_bags(bags)
    robot, selection = kit.robot(), Selection()
    key = unit_key(files, robot, SIZE, selection)
    joints = [j.model_dump() | {"velocity": 9.0, "acceleration": 9.0} for j in robot.joints]
    assert key == unit_key(files, kit.robot(name="renamed", joints=joints, urdf="x.urdf"), SIZE, selection)
    camera = {"topic": "/cam/image_raw", "transport": "compressed", "reliability": "reliable"}
    assert key == unit_key(files, kit.robot(cameras={"base_0_rgb": camera}), SIZE, selection)
    sources = [{"topic": topic, "type": "JointTrajectory"} for topic in ("/command", "/hand")]
    assert key == unit_key(files, kit.robot(actions=sources[:1]), SIZE, selection)  # one source, however it is written
    changed = [
        unit_key(files, kit.robot(actions=sources), SIZE, selection),
        unit_key(other, robot, SIZE, selection),
        unit_key(files, robot, SIZE + 8, selection),
        unit_key(files, robot, SIZE, Selection(prompt="x")),
        unit_key(files, robot, SIZE, Selection(idle=0.1)),
        unit_key(files, kit.robot(control_rate=20), SIZE, selection),
        unit_key(files, kit.robot(clock="bag"), SIZE, selection),
        unit_key(files, kit.robot(max_skew=0.3), SIZE, selection),
        unit_key(files, kit.robot(state={"topics": ["/joint_states"], "max_age": 0.3}), SIZE, selection),
        unit_key(files, kit.robot(episode_topic="/episode"), SIZE, selection),
        unit_key(files, kit.robot(prompt={"default": "another", "topic": "/prompt"}), SIZE, selection),
        unit_key(
            replace(files, metadata={"custom_data": {"prompt": "another"}}), robot, SIZE, selection
        ),  # not in the digest
        *(
            unit_key(files, kit.robot(cameras={"base_0_rgb": camera | change}), SIZE, selection)
            for camera in ({"topic": "/cam/image_raw"},)
            for change in ({}, {"flip": "vertical"}, {"rotate": 90}, {"max_age": 0.3}, {"latency": 0.1})
        ),
    ]
    # States and actions are columns in the order of the joints, idle is by their range, angles are by their turn.
    (a, b, c), wider = joints, {"position": [-1.0, 2.0]}
    for changed_joints in (
        [b, a, c],
        [a | wider, b, c],
        [a | {"kind": "continuous"}, b, c],
        [a | {"name": "other"}, b, c],
    ):
        changed.append(unit_key(files, kit.robot(joints=changed_joints), SIZE, selection))
    monkeypatch.setattr(cache, "FORMAT", cache.FORMAT + 1)
    changed.append(unit_key(files, robot, SIZE, selection))
    assert len({key, *changed}) == 1 + len(changed)


def test_broken_and_unsuitable_bags_cost_only_themselves(bags, tmp_path):
    (bags / "take1" / "take1.mcap").write_bytes((bags / "take1" / "take1.mcap").read_bytes()[:-100])
    kit.write_bag(bags / "take3", [i for i in kit.episode(seconds=1.0) if i.topic != "/command"])
    result = build(bags, tmp_path / "cache")
    assert len(result.units) == 2
    reasons = {Path(bag).name: reason for bag, reason in result.skipped.items()}
    assert set(reasons) == {"take1", "take3"}
    assert "take1.mcap: truncated or damaged" in reasons["take1"]
    assert "actions: topic /command is not in the recording" in reasons["take3"]


def test_a_bag_whose_commands_came_after_all_it_saw_is_left_out(tmp_path):
    items = [i for i in kit.episode(seconds=1.0) if i.topic != "/command"]
    kit.write_bag(tmp_path / "bag", [*items, kit.trajectory(kit.START + 2 * kit.SECOND, [(0.1, [1, 0.5, 1])])])
    (reason,) = build(tmp_path / "bag", tmp_path / "cache").skipped.values()
    assert reason.endswith("no tick with an observation has a command")


def test_a_frame_that_cannot_be_decoded_costs_only_its_ticks(tmp_path):
    items = kit.episode(seconds=1.0)
    bad = next(i for i in items if i.topic.startswith("/cam") and i.time == kit.START + kit.SECOND // 2)
    bad.message.data = np.frombuffer(b"\xff\xd8 no jpeg at all \xff\xd9", np.uint8)
    kit.write_bag(tmp_path / "bag", items)
    (unit,) = build(tmp_path / "bag", tmp_path / "cache").units
    assert np.flatnonzero(~unit.arrays["usable"]).tolist() == [5]
    assert unit.arrays["rows"][5, 0] == -1
    ((reason, count),) = unit.index["dropped"].items()
    assert count == 1 and reason.startswith("base_0_rgb: compressed image of")


def test_a_full_disk_is_one_line_and_nothing_half_written_stays(bags, tmp_path, monkeypatch):
    done = build(bags / "take0", tmp_path / "cache")
    monkeypatch.setattr(cache, "_frames_file", lambda path: open("/dev/full", "wb", buffering=0))  # noqa: SIM115
    with pytest.raises(CacheError, match="cannot be written: No space left on device; make room") as error:
        build(bags, tmp_path / "cache")
    assert "\n" not in str(error.value)
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [done.units[0].folder.name]
    monkeypatch.undo()
    assert build(bags, tmp_path / "cache").decoded == 20


def test_a_folder_that_cannot_be_made_is_one_line(bags, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match="the cache cannot be written"):
        build(bags, tmp_path / "file" / "cache")


KILLED = """
import sys
sys.path[:0] = [{root!r}, {test!r}]
from pathlib import Path
import bag_kit as kit
from pi0_ros.training import cache
from pi0_ros.training.bags import find_bags
from pi0_ros.training.build import build_cache

write, calls = cache._sync, []

def sync(stream):
    write(stream)
    calls.append(stream)
    if len(calls) == {calls}:
        print("here", flush=True)
        sys.stdin.read()

cache._sync = sync
build_cache(find_bags({bags!r}), kit.robot(), 24, Path({folder!r}), jobs=1, progress=False)
"""


def test_after_a_kill_the_whole_bags_are_kept_and_the_rest_is_built(bags, tmp_path):
    folder, test = tmp_path / "cache", Path(__file__).parent
    # a bag syncs 8 files: in the second bag, with frames written and the index not yet
    script = KILLED.format(root=str(test.parent), test=str(test), bags=str(bags), folder=str(folder), calls=8 + 3)
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"here\n"
        os.kill(process.pid, signal.SIGKILL)
    names = [path.name for path in folder.iterdir()]
    assert len(names) == 2 and sum(".partial-" in name for name in names) == 1
    result = build(bags, folder)
    assert result.decoded == 20 and len(result.units) == 3
    assert not list(folder.glob("*.partial-*"))
    fresh = build(bags, tmp_path / "fresh")
    for a, b in zip(result.units, fresh.units, strict=True):
        np.testing.assert_array_equal(a.frames["base_0_rgb"], b.frames["base_0_rgb"])


def test_a_cache_that_was_cut_short_by_hand_is_named(bags, tmp_path):
    (unit, *_) = build(bags, tmp_path / "cache").units
    with (unit.folder / "base_0_rgb.u8").open("r+b") as stream:
        stream.truncate(100)
    with pytest.raises(CacheError, match=r"damaged cache .*; remove the folder and start again"):
        open_unit(unit.folder)
    shutil.rmtree(unit.folder)
    assert build(bags, tmp_path / "cache").decoded == 10


def test_the_index_tells_where_everything_came_from(bags, tmp_path):
    (unit, *_) = build(bags, tmp_path / "cache").units
    index = json.loads((unit.folder / "index.json").read_text())
    assert index["source"] == str(bags / "take0") and index["digest"] == find_bags(bags)[0].digest()
    assert index["episodes"] == [{"label": "", "begin": 0, "end": 10}]
    assert index["joints"] == ["shoulder", "elbow", "grip"] and index["prompts"] == ["wave"]


def test_a_worker_that_is_killed_is_one_line():
    with pytest.raises(CacheError, match="a worker process was killed"):
        run_all(os._exit, [(1,), (1,)], 2, lambda _: None)


WORKERS = """
import os, sys, time
sys.path.insert(0, {root!r})
from pi0_ros.training.build import run_all

def work(seconds):
    os.write(1, b"%d\\n" % os.getpid())  # in one piece: both write at the same time
    time.sleep(seconds)

if __name__ == "__main__":
    run_all(work, [(300,), (300,)], 2, print)
"""


def test_a_killed_parent_leaves_no_worker_behind(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(WORKERS.format(root=str(Path(__file__).parent.parent)))
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE) as process:
        workers = [int(process.stdout.readline()) for _ in range(2)]
        process.kill()
        deadline = time.monotonic() + 30
        while any(alive(pid) for pid in workers) and time.monotonic() < deadline:
            time.sleep(0.05)
    assert not any(alive(pid) for pid in workers)


def alive(pid):
    status = Path(f"/proc/{pid}/stat")
    try:
        return status.read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
