"""What of a recording belongs together: prompts to their episode, commands to one side of a hole."""

from __future__ import annotations

import re

import bag_kit as kit
import numpy as np
import pytest
import yaml

from pi0_ros.training.bags import Bag, find_bags
from pi0_ros.training.data import load_units
from pi0_ros.training.dataset import Dataset
from pi0_ros.training.episodes import Selection, cut_episodes
from pi0_ros.training.recording import read_recording

JOINTS = yaml.safe_load(kit.ROBOT)["joints"]


def at(seconds):
    return kit.START + round(seconds * kit.SECOND)


def cut(path, items, **changes):
    """The episodes of a bag with these messages."""
    robot = kit.robot(**changes)
    (files,) = find_bags(kit.write_bag(path / "bag", items))
    with Bag(files) as bag:
        return cut_episodes(read_recording(bag, robot), robot, Selection(idle=0))


def marked(*texts):
    """Six seconds in two episodes, 0.5 to 2.4 s and 3 to 5 s, and prompts: (seconds, words)."""
    marks = [(0.5, "one"), (2.4, ""), (3.0, "two"), (5.0, "")]
    spoken = [kit.text(at(seconds), words) for seconds, words in texts]
    return [*kit.episode(seconds=6.0), *(kit.text(at(s), words, "/episode") for s, words in marks), *spoken]


def test_a_prompt_a_moment_after_its_mark_is_that_of_the_whole_episode(tmp_path):
    one, two = cut(tmp_path, marked((0.5, "red"), (3.05, "blue")), episode_topic="/episode")
    assert (set(one.prompts), set(two.prompts)) == ({"red"}, {"blue"})


def test_a_prompt_that_changes_within_an_episode_counts_from_then_on(tmp_path):
    _, two = cut(tmp_path, marked((0.5, "red"), (4.5, "blue")), episode_topic="/episode")
    assert two.prompts == ["red"] * 15 + ["blue"] * 5
    _, two = cut(tmp_path / "again", marked((3.05, "red"), (4.5, "blue")), episode_topic="/episode")
    assert two.prompts == ["red"] * 15 + ["blue"] * 5


def test_a_prompt_of_a_later_episode_is_not_that_of_one_without(tmp_path):
    one, two = cut(tmp_path, marked((3.1, "blue")), episode_topic="/episode")
    assert (set(one.prompts), set(two.prompts)) == ({"wave"}, {"blue"})


def test_a_prompt_long_after_the_start_of_a_recording_counts_from_then_on(tmp_path):
    """Who sets the next task before the recorder stops must not rename what was shown."""
    (episode,) = cut(tmp_path, [*kit.episode(seconds=3.0), kit.text(at(2.8), "next task")])
    assert episode.prompts == ["wave"] * 28 + ["next task"] * 2
    (episode,) = cut(tmp_path / "again", [*kit.episode(seconds=3.0), kit.text(at(0.4), "this task")])
    assert set(episode.prompts) == {"this task"}


def test_the_prompt_of_a_short_episode_is_its_own(tmp_path):
    """Under a second, each with its prompt just before its mark: the next one's is not meant."""
    marks = [(0.5, "e1"), (1.2, ""), (1.4, "e2"), (2.1, ""), (2.4, "e3"), (4.0, "")]
    texts = [(0.45, "red"), (1.35, "blue"), (2.3, "green")]
    items = [*kit.episode(seconds=6.0), *(kit.text(at(s), words, "/episode") for s, words in marks)]
    episodes = cut(tmp_path, [*items, *(kit.text(at(s), words) for s, words in texts)], episode_topic="/episode")
    assert [set(episode.prompts) for episode in episodes] == [{"red"}, {"blue"}, {"green"}]


def test_a_slow_recording_has_no_holes_between_its_own_periods(tmp_path):
    items = []
    for i in range(100):  # 5 Hz, a little early and late, as old as the cameras' max_age
        time = kit.START + round((0.2 * i + (0.003 if i % 2 else -0.003)) * kit.SECOND)
        items += [kit.joint_state(time, [i / 100, 0.1, 0.2]), kit.compressed(time, kit.picture(i))]
        items.append(kit.trajectory(time + 1_000_000, [(0.0, [i / 100, 0.1, 0.2])]))
    (episode,) = cut(tmp_path, items, control_rate=5)
    assert episode.known[2:-2].all()


HOLE = (1.0, 3.0)  # seconds of which nothing was recorded


def in_hole(item):
    return at(HOLE[0]) < item.time < at(HOLE[1])


def test_no_chunk_reaches_into_a_stretch_of_which_nothing_was_recorded(tmp_path):
    """Nobody knows what was commanded in it: the last command before, held, is no demonstration."""
    bag = kit.write_split_bag(tmp_path / "bag", kit.episode(seconds=6.0), 6)
    (bag / "bag_2.mcap").unlink()  # the third second
    (unit,) = load_units(bag, kit.robot(), 28, cache=tmp_path / "cache", idle=0, jobs=1)
    dataset = Dataset([unit], horizon=5)
    ticks = [dataset.where(i)[2] for i in range(len(dataset))]
    assert len(unit.episodes) == 1 and ticks == [*range(16), *range(30, 60)]
    before = dataset.sample(ticks.index(15))
    np.testing.assert_allclose(before["actions"][:, 0] * 60, [15, 16, 17, 18, 19])
    masks = [dataset.sample(i)["action_mask"].all() for i in range(len(dataset))]
    assert masks == [True] * 42 + [False] * 4  # at the end of the episode the last action is held
    assert len(Dataset([unit], horizon=21)) == 30
    after = dataset.sample(ticks.index(30))
    np.testing.assert_allclose(after["actions"][:, 0] * 60, [31, 31, 32, 33, 34])  # the first leads by a tick
    assert after["action_mask"].all()
    blocks = [np.concatenate(parts) for parts in zip(*dataset.chunks(), strict=True)]
    for i in range(len(dataset)):
        np.testing.assert_array_equal(dataset.sample(i)["actions"], blocks[1][i])
        np.testing.assert_array_equal(dataset.sample(i)["action_mask"], blocks[2][i])


def test_a_hole_is_noted_with_its_length(tmp_path):
    items = [item for item in kit.episode(seconds=6.0) if not in_hole(item)]
    (files,) = find_bags(kit.write_bag(tmp_path / "bag", items))
    with Bag(files) as bag:
        recording = read_recording(bag, kit.robot())
        cut_episodes(recording, kit.robot())
    assert "nothing was recorded for 2.0 s: no chunk reaches into that" in recording.notes


def test_of_several_holes_the_longest_is_told(tmp_path):
    items = [item for item in kit.episode(seconds=6.0) if not in_hole(item) and not at(4.0) < item.time < at(4.6)]
    (files,) = find_bags(kit.write_bag(tmp_path / "bag", items))
    with Bag(files) as bag:
        recording = read_recording(bag, kit.robot())
        cut_episodes(recording, kit.robot())
    assert "nothing was recorded for 2.0 s, and 1 times for less: no chunk reaches into that" in recording.notes


@pytest.mark.parametrize(
    ("max_age", "pause", "hole"), [(0.2, 0.3, False), (0.2, 0.32, True), (0.5, 0.5, False), (0.5, 0.52, True)]
)
def test_a_hole_is_longer_than_three_ticks_and_than_any_stream_may_be_old(tmp_path, max_age, pause, hole):
    items = [item for item in kit.episode(seconds=3.0) if not at(1.0) < item.time < at(1.0 + pause)]
    camera = {"topic": "/cam/image_raw", "transport": "compressed", "max_age": max_age}
    (episode,) = cut(tmp_path, items, cameras={"base_0_rgb": camera})
    assert episode.known.all() != hole


def test_a_command_from_before_anything_was_seen_holds(tmp_path):
    items = [item for item in kit.episode(seconds=1.0) if item.topic != "/command"]
    (episode,) = cut(tmp_path, [*items, kit.trajectory(at(-5.0), [(0.0, [0.1, 0.2, 0.3])])])
    assert episode.known.all() and episode.actions[-1].tolist() == [0.1, 0.2, 0.3]


def test_what_was_told_before_a_hole_is_not_known_after_it(tmp_path):
    """The hand was told once, before the hole: whether it was told something else in it, nobody knows."""
    items = [i for i in kit.episode(seconds=6.0) if i.topic != "/command" and not in_hole(i)]
    for k in [*range(11), *range(30, 60)]:
        arm = kit.trajectory(at(k / 10), [(0.0, [k / 10, k / 10])], names=("shoulder", "elbow"))
        items += [arm, *([kit.trajectory(at(k / 10), [(0.0, [0.5])], names=("grip",))] if k in (0, 40) else [])]
    (episode,) = cut(tmp_path, items)
    assert np.flatnonzero(episode.known).tolist() == [*range(11), *range(40, 60)]
    assert np.isfinite(episode.actions[episode.known]).all()


def test_commands_that_go_on_while_nothing_is_seen_stay_known(tmp_path):
    items = [i for i in kit.episode(seconds=6.0) if i.topic == "/command" or not in_hole(i)]
    (episode,) = cut(tmp_path, items)
    assert episode.known.all() and not episode.usable[15:30].any()


def test_a_command_holds_for_as_long_as_the_arm_is_seen(tmp_path):
    items = [i for i in kit.episode(seconds=6.0) if i.topic != "/command" or not in_hole(i)]
    (episode,) = cut(tmp_path, items)
    assert episode.known.all() and episode.usable.all()


def test_a_joint_that_was_only_named_in_messages_without_use_is_a_problem(tmp_path):
    items = [item for item in kit.episode(seconds=3.0) if item.topic != "/joint_states"]
    items.append(kit.joint_state(kit.START, [0.1, 0.2, float("nan")]))
    times = range(kit.START + 1, kit.START + 3 * kit.SECOND, kit.SECOND // 50)
    items += [kit.joint_state(time, [0.1, 0.2], list(kit.JOINTS)[:2]) for time in times]
    (file,) = find_bags(kit.write_bag(tmp_path / "bag", items))
    with Bag(file) as bag:
        problems = read_recording(bag, kit.robot()).problems
    assert f"state: no message with joint {kit.JOINTS[2]} can be used" in problems


def test_commands_for_other_joints_are_told_with_their_names(tmp_path):
    items = [item for item in kit.episode(seconds=1.0) if item.topic != "/command"]
    items += [kit.trajectory(at(k / 10), [(0.0, [0.1, 0.2])], names=("left_a", "left_b")) for k in range(10)]
    sources = [
        {"topic": "/command", "type": "JointTrajectory", "joints": ["shoulder", "elbow"]},
        {"topic": "/hand", "type": "Float64MultiArray", "joints": ["grip"]},
    ]
    (files,) = find_bags(kit.write_bag(tmp_path / "bag", items))
    with Bag(files) as bag:
        problems = read_recording(bag, kit.robot(actions=sources)).problems
    assert "actions[0]: no command on /command can be used (they are for left_a, left_b)" in problems


def test_late_frames_and_positions_outside_the_limits_are_warned_of_before_training(tmp_path, capsys):
    items = kit.episode(seconds=4.0)
    for item in items:
        if item.topic == "/cam/image_raw/compressed":
            item.message.header = kit.header(item.time - round(0.5 * kit.SECOND))
    joints = [joint | {"position": [-0.2, 0.7]} if joint["name"] == "shoulder" else joint for joint in JOINTS]
    robot = kit.robot(joints=joints)
    load_units(kit.write_bag(tmp_path / "bag", items), robot, 28, cache=tmp_path / "cache", idle=0, jobs=1)
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith("warning: base_0_rgb (/cam/image_raw/compressed): recorded 0.5 s after the stamps, later")
    assert told[0].endswith("(1 recordings)")
    assert re.match(r"warning: state of shoulder: \d+% outside its limits \[-0.2, 0.7\]: other units", told[1])
    load_units(kit.write_bag(tmp_path / "same", items), robot, 28, cache=tmp_path / "cache", jobs=1, quiet=True)
    assert capsys.readouterr().out == ""
