"""From streams to ticks: which message belongs to which tick, what is dropped and why, what is trimmed."""

from __future__ import annotations

import bag_kit as kit
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pi0_ros.policy.alignment import Aligned, StreamBuffer, align
from pi0_ros.training.bags import Bag, BagError, find_bags
from pi0_ros.training.episodes import Selection, cut_episodes, observe_at
from pi0_ros.training.recording import read_recording

MS = 1_000_000
WHOLE = Selection(idle=0)


@pytest.fixture
def cut(tmp_path):
    """items -> (recording, episodes) by way of a bag."""

    def run(items, robot=None, selection=WHOLE, **options):
        robot = robot or kit.robot()
        path = kit.write_bag(tmp_path / f"bag{len(list(tmp_path.iterdir()))}", items, **options)
        (files,) = find_bags(path)
        with Bag(files) as bag:
            recording = read_recording(bag, robot)
        return recording, cut_episodes(recording, robot, selection)

    return run


def at(seconds):
    return kit.START + round(seconds * kit.SECOND)


def other(kind, item):
    return [i for i in item if i.topic != kind]


CAMERA = "/cam/image_raw/compressed"


def test_a_message_exactly_at_the_tick_belongs_to_it_and_none_comes_from_the_future(cut):
    _, (episode,) = cut(kit.episode(seconds=1.0))
    assert episode.ticks_ns.tolist() == [at(k / 10) for k in range(10)]
    assert episode.frames["base_0_rgb"].tolist() == [0, 2, 4, 6, 8, 10, 12, 14, 16, 18]
    np.testing.assert_allclose(episode.state[:, 0], np.arange(10) / 10)  # states every 0.02 s, one at each tick
    np.testing.assert_allclose(episode.actions[:, 0], [0.1, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9])
    assert episode.known.all() and episode.usable.all()


def test_a_message_one_nanosecond_late_belongs_to_the_next_tick(cut):
    items = other(CAMERA, kit.episode(seconds=0.5))
    frames = [at(0.0), at(0.1) + 1, at(0.2), at(0.3)]
    items += [kit.compressed(ns, kit.picture(i)) for i, ns in enumerate(frames)]
    _, (episode,) = cut(items)
    assert episode.frames["base_0_rgb"].tolist() == [0, 0, 2, 3, 3]


def frames_after(ms, period=100):
    """Frames every `period` ms, recorded `ms` after their stamps; joint states and commands come at once."""
    items = other(CAMERA, kit.episode(seconds=1.0))
    for k in range(1000 // period):
        items.append(kit.compressed(at(k * period / 1000), kit.picture(k)))
        items[-1].time += ms * MS
    return items


def test_a_frame_counts_from_when_it_had_come(cut):
    """The robot does not see it sooner. Ticks lie between two arrivals, by half a period."""
    recording, (episode,) = cut(frames_after(30))
    assert recording.cameras["base_0_rgb"].way_ns == 30 * MS
    assert episode.ticks_ns.tolist() == [at(0.08 + k / 10) for k in range(10)]
    assert episode.frames["base_0_rgb"].tolist() == list(range(10))
    _, (episode,) = cut(frames_after(60))  # from 110 ms on: the frame of 100 ms comes at 160
    assert episode.ticks_ns[:2].tolist() == [at(0.11), at(0.21)]
    assert episode.frames["base_0_rgb"][:2].tolist() == [0, 1]


def test_what_is_over_before_its_frames_have_come_is_left_out_with_a_note(cut):
    short = [item for item in frames_after(60, period=50) if item.time < at(0.1)]
    recording, episodes = cut(short)
    assert not episodes
    assert recording.notes[-1] == "episode '': left out, it was over before every camera and joint had come"
    marks = [(0.0, "first"), (0.4, "blink"), (0.47, "last")]
    items = [*frames_after(60, period=50), *(kit.text(at(s), name, "/episode") for s, name in marks)]
    recording, episodes = cut(items, kit.robot(episode_topic="/episode"))
    assert [episode.label for episode in episodes] == ["first", "last"]
    assert "episode 'blink': left out" in recording.notes[-1]


def test_frames_that_are_older_when_they_come_than_the_robot_takes_are_stale(cut):
    camera = {"topic": "/cam/image_raw", "transport": "compressed", "max_age": 0.07}
    _, (episode,) = cut(frames_after(30), kit.robot(cameras={"base_0_rgb": camera}))
    assert episode.dropped == {"base_0_rgb: stale": 10}
    # With ways of more than that none would be left: told of as a warning, and read as if they came at once.
    recording, (episode,) = cut(frames_after(90), kit.robot(cameras={"base_0_rgb": camera}))
    assert recording.cameras["base_0_rgb"].way_ns == 0 and episode.usable.all()
    assert "later than joint states are" in recording.warnings[0]


def test_a_robot_that_looks_back_waits_for_its_frames(cut):
    """With latencies the observation lies in the past, and what has come meanwhile counts."""
    camera = {"topic": "/cam/image_raw", "transport": "compressed", "latency": 0.02}
    robot = kit.robot(cameras={"base_0_rgb": camera}, state={"topics": ["/joint_states"], "latency": 0.05})
    recording, (episode,) = cut(frames_after(30), robot)
    assert recording.cameras["base_0_rgb"].way_ns == 30 * MS
    assert episode.ticks_ns[0] == at(-0.02) and episode.frames["base_0_rgb"][:3].tolist() == [0, 1, 2]
    _, (episode,) = cut(frames_after(40), robot)  # 10 ms more than it waits: from then and half a tick on
    assert episode.ticks_ns[0] == at(-0.02 + 0.01 + 0.05)


def test_when_clocks_differ_only_what_frames_take_longer_than_joint_states_counts(cut):
    items = frames_after(30)
    for item in items:
        item.time += 5 * kit.SECOND  # recorded by another machine's clock
    recording, _ = cut(items)
    assert recording.cameras["base_0_rgb"].way_ns == 30 * MS
    for item in items:
        item.time += (5 * MS - 5 * kit.SECOND) if item.topic == "/joint_states" else -5 * kit.SECOND
    recording, _ = cut(items)  # one clock, and joint states take 5 ms
    assert recording.cameras["base_0_rgb"].way_ns == 30 * MS and not recording.notes
    for item in items:
        item.time += 95 * MS
    recording, _ = cut(items)
    assert recording.cameras["base_0_rgb"].way_ns == 25 * MS
    assert recording.notes[0].startswith("joint states are recorded 0.1 s after their stamps: taken for two clocks")


def test_latency_moves_a_stream_back_in_time(cut):
    camera = {"base_0_rgb": {"topic": "/cam/image_raw", "transport": "compressed", "latency": 0.05}}
    _, (episode,) = cut(kit.episode(seconds=1.0), kit.robot(cameras=camera))
    # frame k was stamped at k * 0.05 but seen 0.05 s before: the frame of tick t is the one stamped t + 0.05
    assert episode.frames["base_0_rgb"].tolist()[:9] == [1, 3, 5, 7, 9, 11, 13, 15, 17]


def test_stale_streams_drop_their_ticks_by_name(cut):
    items = [i for i in kit.episode(seconds=2.0) if i.topic != CAMERA or not at(0.5) < i.time < at(1.2)]
    _, (episode,) = cut(items, kit.robot(max_skew=0.3))
    # last frame before the hole at 0.5 s, at most 0.2 s old: ticks 0.8 to 1.1 have none
    assert episode.dropped == {"base_0_rgb: stale": 4}
    assert np.flatnonzero(~episode.usable).tolist() == [8, 9, 10, 11]


def test_skew_beyond_the_limit_is_its_own_reason(cut):
    items = other(CAMERA, kit.episode(seconds=1.0))
    items += [kit.compressed(at(k / 10) - (60 * MS if k == 5 else 10 * MS), kit.picture(k)) for k in range(11)]
    _, (episode,) = cut(items, kit.robot(max_skew=0.055))
    assert sum(episode.dropped.values()) == 1 and next(iter(episode.dropped)).endswith(": skew")


def test_late_commands_do_not_gate_the_start(cut):
    items = [i for i in kit.episode(seconds=1.0) if i.topic != "/command" or i.time >= at(0.5)]
    _, (episode,) = cut(items)
    assert episode.ticks_ns[0] == at(0.0) and episode.usable.all()
    assert episode.known.tolist() == [False] * 5 + [True] * 5
    np.testing.assert_allclose(episode.actions[:5, 0], 0.6)  # the first point, marked unknown


def test_observations_gate_the_start_and_the_wait_is_reported(cut):
    items = [i for i in kit.episode(seconds=1.0) if i.topic != CAMERA or i.time >= at(0.3)]
    _, (episode,) = cut(items)
    assert episode.ticks_ns[0] == at(0.3) and episode.waited == pytest.approx(0.3)


def test_markers_cut_one_bag_into_episodes(cut):
    items = kit.episode(seconds=6.0)
    marks = [(0.5, "first"), (1.5, ""), (2.0, "second"), (3.0, "third"), (4.0, ""), (5.5, "open end")]
    items += [kit.text(at(s), words, "/episode") for s, words in marks]
    _, episodes = cut(items, kit.robot(episode_topic="/episode"))
    spans = [(e.label, (e.ticks_ns[0] - at(0)) / 1e9, (e.ticks_ns[-1] - at(0)) / 1e9) for e in episodes]
    assert spans == [("first", 0.5, 1.4), ("second", 2.0, 2.9), ("third", 3.0, 3.9), ("open end", 5.5, 5.9)]


def test_a_bag_without_markers_is_one_episode_even_if_the_robot_file_names_a_topic(cut):
    _, episodes = cut(kit.episode(seconds=1.0), kit.robot(episode_topic="/episode"))
    assert len(episodes) == 1


def test_the_prompt_comes_from_command_line_then_topic_then_metadata_then_robot_file(cut):
    items = kit.episode(seconds=1.0)
    spoken = [*items, kit.text(at(0.02), "take it"), kit.text(at(0.5), "drop it")]
    custom = {"prompt": "from metadata"}
    before = [*spoken, kit.text(at(-0.01), "wait")]
    prompts = [
        cut(spoken, selection=Selection(0, "mine"), custom=custom)[1][0].prompts,
        cut(spoken, custom=custom)[1][0].prompts,
        cut(items, custom=custom)[1][0].prompts,
        cut(items)[1][0].prompts,
    ]
    assert prompts[0] == ["mine"] * 10
    assert prompts[1] == ["take it"] * 5 + ["drop it"] * 5
    assert prompts[2] == ["from metadata"] * 10
    assert prompts[3] == ["wave"] * 10
    # only the first one may count from before it was said
    assert cut(before)[1][0].prompts == ["wait"] + ["take it"] * 4 + ["drop it"] * 5


def test_a_prompt_is_of_the_whole_episode_where_it_is_spoken_within_a_second_of_its_mark_not_of_its_first_frame(cut):
    items = [i for i in kit.episode(seconds=3.0) if i.topic != CAMERA or i.time >= at(0.8)]
    _, (episode,) = cut([*items, kit.text(at(1.5), "red")])  # without marks it begins with its first frame
    assert episode.prompts == ["red"] * 22
    items += [kit.text(at(-0.1), "blue"), kit.text(at(0.0), "first", "/episode")]
    for moment, told in ((1.5, ["blue"] * 7 + ["red"] * 15), (1.0, ["red"] * 22)):
        _, (episode,) = cut([*items, kit.text(at(moment), "red")], kit.robot(episode_topic="/episode"))
        assert episode.ticks_ns[0] == at(0.8) and episode.prompts == told


def test_at_any_instant_it_is_told_what_was_known_then_and_nothing_before_the_first_message(cut):
    items = [*kit.episode(seconds=1.0), kit.text(at(0.3), "take it"), kit.text(at(0.4), "")]
    recording, _ = cut(items)
    verdict, state, frames, prompts = observe_at(recording, kit.robot(), np.array([at(-0.5), at(0.2), at(0.5)]))
    assert verdict.ok.tolist() == [False, True, True]
    assert frames["base_0_rgb"].tolist() == [-1, 4, 10]
    np.testing.assert_allclose(state[:, 0], [np.nan, 0.2, 0.5])
    assert prompts == ["wave", "wave", "take it"]  # an empty one is none


def test_idle_start_and_end_are_trimmed_by_default(cut):
    moving = kit.episode(begin=at(2.0), seconds=2.0)
    still = [
        i
        for k in range(20)
        for i in (kit.joint_state(at(k / 10), [0, 0.5, 1]), kit.compressed(at(k / 10), kit.picture(1)))
    ]
    after = [
        i
        for k in range(20)
        for i in (kit.joint_state(at(4 + k / 10), [0.99, 0.5, 0]), kit.compressed(at(4 + k / 10), kit.picture(1)))
    ]
    items = still + moving + after
    _, (whole,) = cut(items)
    _, (episode,) = cut(items, selection=Selection())
    assert whole.usable.sum() == 60
    assert 1.6 <= episode.idle_start <= 2.0 and 1.6 <= episode.idle_end <= 2.0
    assert episode.dropped["idle"] == 60 - episode.usable.sum()
    assert np.flatnonzero(episode.usable)[0] == round(episode.idle_start * 10)


def ticked(states, commands, rate=10):
    """A joint state, a frame and a command at every tick, each from [T, 3] in robot units."""
    items = []
    for k, (state, command) in enumerate(zip(states, commands, strict=True)):
        items += [kit.joint_state(at(k / rate), state), kit.compressed(at(k / rate), kit.picture(k))]
        items.append(kit.trajectory(at(k / rate), [(0.0, command)]))
    return items


def test_a_quarter_of_a_second_is_kept_before_the_first_and_after_the_last_movement(cut):
    places = np.zeros((60, 3))
    places[:, 0] = np.clip(
        (np.arange(60) - 20) / 10, 0, 1
    )  # other than at the begin from tick 21 on, than at the end to 29
    _, (episode,) = cut(ticked(places, places, 20), kit.robot(control_rate=20), Selection())
    assert np.flatnonzero(episode.usable)[[0, -1]].tolist() == [21 - 5, 29 + 5]


@pytest.mark.parametrize("told", ["state", "command"])
@pytest.mark.parametrize(
    ("joint", "by", "moves"), [(0, 0.015, False), (0, 0.025, True), (2, 0.004, False), (2, 0.006, True)]
)
def test_to_move_is_to_go_further_than_a_share_of_the_joints_range_by_state_or_command(cut, told, joint, by, moves):
    rest, moved = np.zeros((30, 3)), np.zeros((30, 3))
    moved[15:, joint] = by  # of 4 rad, or of a gripper's 1
    items = ticked(moved, rest) if told == "state" else ticked(rest, moved)
    _, (episode,) = cut(items, selection=Selection())
    assert episode.usable.any() == moves


def test_a_tick_that_is_dropped_twice_is_counted_once(cut):
    places = np.zeros((60, 3))
    places[40:, 0] = 1.0
    items = [i for i in ticked(places, places) if i.topic != CAMERA or not at(1.0) < i.time < at(2.0)]
    _, (episode,) = cut(items, selection=Selection())
    assert episode.dropped["base_0_rgb: stale"] and episode.dropped["idle"]  # stale while it is idle
    assert sum(episode.dropped.values()) + episode.usable.sum() == 60


def test_an_arm_that_never_moves_is_all_idle(cut):
    items = [
        i
        for k in range(20)
        for i in (kit.joint_state(at(k / 10), [0, 0, 1]), kit.compressed(at(k / 10), kit.picture(1)))
    ]
    items.append(kit.trajectory(at(0), [(0.1, [0, 0, 1])]))
    _, (episode,) = cut(items, selection=Selection())
    assert not episode.usable.any() and episode.dropped == {"idle": 20}


def test_joints_in_any_order_and_on_several_topics_are_merged_by_name(cut):
    items = other("/joint_states", kit.episode(seconds=1.0))
    for k in range(50):
        ns = at(k / 50)
        names, values = (
            [("shoulder", "elbow"), ("elbow", "shoulder")][k % 2],
            [[k / 10, -k / 10], [-k / 10, k / 10]][k % 2],
        )
        items.append(kit.joint_state(ns, values, names))
        items.append(kit.joint_state(ns, [9.0, k / 10], ("other", "grip"), "/hand/joint_states"))
    robot = kit.robot(state={"topics": ["/joint_states", "/hand/joint_states"]})
    recording, (episode,) = cut(items, robot)
    assert len(recording.states) == 2
    np.testing.assert_array_equal(episode.state[3], [1.5, -1.5, 1.5])


def test_two_publishers_on_one_topic_are_two_streams(cut):
    items = other("/joint_states", kit.episode(seconds=1.0))
    for k in range(50):
        items.append(kit.joint_state(at(k / 50), [k / 10, -k / 10], ("shoulder", "elbow")))
        items.append(kit.joint_state(at(k / 50) + MS, [k / 10], ("grip",)))
    _, (episode,) = cut(items)
    np.testing.assert_array_equal(episode.state[2], [1.0, -1.0, 1.0])
    assert episode.usable.all()


def test_joint_states_that_are_newer_elsewhere_need_not_be_fresh(cut):
    robot = kit.robot(state={"topics": ["/joint_states", "/hand"]})
    items = kit.episode(seconds=2.0)
    hand = [kit.joint_state(at(k / 2) - MS, [0.25], ["grip"], "/hand") for k in range(1, 4)]
    recording, (episode,) = cut([*items, *hand], robot)
    assert [stream.name for stream in recording.states] == ["/joint_states", "/hand"]
    assert episode.ticks_ns[0] == at(0)  # the hand is known before its own topic speaks
    assert episode.usable.all() and not episode.dropped
    assert set(episode.state[:, 2]) == {0.0, 1.0}
    alone = [
        kit.joint_state(i.time, i.message.position[:2], kit.JOINTS[:2]) for i in items if i.topic == "/joint_states"
    ]
    _, (episode,) = cut([*other("/joint_states", items), *alone, *hand], robot)
    assert episode.ticks_ns[0] == at(0.5) - MS and episode.dropped["/hand: stale"] > 0


def test_joints_that_come_alone_and_all_together_are_taken_from_the_newest(cut):
    items = other("/joint_states", kit.episode(seconds=2.0))
    for k in range(100):
        few = k % 10  # all of them five times a second, the arm alone in between
        items.append(
            kit.joint_state(at(k / 50), [k / 10, -k / 10, 1.0][: 2 if few else 3], kit.JOINTS[: 2 if few else 3])
        )
    _, (episode,) = cut(items, kit.robot(state={"topics": ["/joint_states"], "max_age": 0.3}, max_skew=0.3))
    assert episode.usable.all()
    np.testing.assert_array_equal(episode.state[:, 0], np.arange(20) * 5 / 10)
    assert episode.state[:, 2].tolist() == [1.0] * 20


def test_joint_states_without_stamps_are_left_out_where_others_have_them(cut):
    items, robot = kit.episode(seconds=1.0), kit.robot(state={"topics": ["/joint_states", "/hand"]})
    hand = [kit.joint_state(at(0.5), [0.25], ["grip"], "/hand")]
    hand[0].message.header = kit.header(0)
    recording, (episode,) = cut([*items, *hand], robot)
    assert "/hand: every header stamp is 0; left out, the other joint states have its joints, too" in recording.notes
    assert episode.usable.all()
    both = kit.joint_state(at(0.5), [0.1, 0.2, 0.3], topic="/hand")
    both.message.header = kit.header(0)
    assert cut([*items, both], robot)[1][0].usable.all()
    arm = [kit.joint_state(i.time, i.message.position[:2], kit.JOINTS[:2]) for i in items if i.topic == "/joint_states"]
    recording, episodes = cut([*other("/joint_states", items), *arm, *hand], robot)
    assert not episodes and recording.problems[0].startswith("/hand: every header stamp is 0; set `clock: bag`")


def test_joint_states_of_a_clock_far_ahead_are_left_out_where_others_have_them(cut):
    robot = kit.robot(state={"topics": ["/joint_states", "/hand"]})
    hand = kit.joint_state(at(0.5), [0.25], ["grip"], "/hand")
    hand.message.header = kit.header(at(120.5))
    recording, (episode,) = cut([*kit.episode(seconds=1.0), hand], robot)
    assert [stream.name for stream in recording.states] == ["/joint_states"]
    assert len(episode.ticks_ns) == 10 and episode.usable.all()


@pytest.mark.parametrize("kind", ["JointState", "Float64MultiArray"])
def test_actions_of_the_other_kinds_hold_from_their_own_tick(cut, kind):
    items = other("/command", kit.episode(seconds=1.0))
    for k in range(10):
        if kind == "JointState":
            items.append(kit.joint_state(at(k / 10), [1.0, k, 0.5], ("grip", "shoulder", "elbow"), "/command"))
        else:
            items.append(kit.floats(at(k / 10), [1.0, k, 0.5]))
    actions = {"topic": "/command", "type": kind, "joints": ["grip", "shoulder", "elbow"]}
    _, (episode,) = cut(items, kit.robot(actions=actions))
    np.testing.assert_array_equal(episode.actions, [[k, 0.5, 1.0] for k in range(10)])


def test_action_latency_may_be_negative(cut):
    items = other("/command", kit.episode(seconds=1.0))
    items += [kit.floats(at(k / 10), [k, 0, 0]) for k in range(10)]
    actions = {"topic": "/command", "type": "Float64MultiArray", "latency": -0.2}
    _, (episode,) = cut(items, kit.robot(actions=actions))
    assert episode.actions[2:, 0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]


def slowed(items, factor, lag=0.0):
    """The same recording written down by a clock that runs `factor` times as fast, `lag` s late."""
    for item in items:
        item.time = kit.START + round((item.time - kit.START) * factor + lag * kit.SECOND) + 5 * kit.SECOND
    return items


def test_header_and_bag_clock_differ_and_the_robot_file_chooses(cut):
    drifting = slowed(kit.episode(seconds=4.0), 1.37)
    recording, (header,) = cut(drifting)
    assert "aligned by header time" in " ".join(recording.notes) and "drift 1.4" in " ".join(recording.notes)
    assert len(header.ticks_ns) == 40 and header.ticks_ns[0] == kit.START
    # commands have no stamp; they find their place by the offset between the clocks
    np.testing.assert_allclose(header.actions[5:35, 0], np.arange(5, 35) / 40, atol=0.005)
    _, (bag,) = cut(drifting, kit.robot(clock="bag"))
    assert len(bag.ticks_ns) == 55 and bag.ticks_ns[0] == kit.START + 5 * kit.SECOND


@pytest.mark.parametrize(("factor", "lag"), [(1.0, 0.0), (1.0, 1000.0), (1.3, 0.0)])  # or drifts, by 0.3 s
def test_a_recorder_whose_clock_is_another_is_nothing_to_be_told(cut, factor, lag):
    recording, (episode,) = cut(slowed(kit.episode(seconds=1.0), factor, lag))
    assert recording.notes == recording.warnings == recording.problems == []
    assert episode.usable.all() and episode.known.all()


def test_a_stream_may_be_late_by_what_others_are_looked_back_for_and_not_by_its_own_latency(cut):
    camera = {"topic": "/cam/image_raw", "transport": "compressed", "latency": 0.3}
    for late, topic in (("/joint_states", "/joint_states"), (CAMERA, "base_0_rgb")):
        items = kit.episode(seconds=1.0)
        for item in items:
            if item.topic == late:
                item.message.header = kit.header(item.time - round(0.4 * kit.SECOND))
        recording, _ = cut(items, kit.robot(cameras={"base_0_rgb": camera}, state={"topics": ["/joint_states"]}))
        assert [line.startswith(topic) for line in recording.warnings] == [True] * (late == CAMERA), recording.warnings


def test_stamped_trajectories_are_timed_from_their_stamp(cut):
    items = other("/command", kit.episode(seconds=1.0))
    items += [kit.trajectory(at(k / 10) - 10 * MS, [(0.1, [k + 1, 0, 0])], stamp=at(k / 10)) for k in range(10)]
    _, (episode,) = cut(items)
    assert episode.actions[1:, 0].tolist() == pytest.approx([1, 2, 3, 4, 5, 6, 7, 8, 9], abs=0.12)


def test_header_stamps_that_jump_back_are_refused(cut):
    items = kit.episode(seconds=2.0)
    for item in items:
        if item.topic == "/joint_states" and item.time > at(1.0):
            item.message.header = kit.header(item.time - 5 * kit.SECOND)
    recording, episodes = cut(items)
    assert episodes == []
    assert any("header stamps jump back by 5.0 s" in problem for problem in recording.problems)


def test_stamps_that_are_a_little_out_of_order_are_put_in_order(cut):
    items = [i for i in kit.episode(seconds=1.0) if i.topic == "/joint_states"]
    items[25].message.header, items[26].message.header = items[26].message.header, items[25].message.header
    items[25].message.position, items[26].message.position = items[26].message.position, items[25].message.position
    recording, (episode,) = cut([*items, *other("/joint_states", kit.episode(seconds=1.0))])
    assert recording.problems == []
    np.testing.assert_allclose(episode.state[:, 0], np.arange(10) / 10)


def test_stamps_of_a_clock_that_counts_from_a_start_are_noted(cut):
    items = kit.episode(seconds=1.0)
    for item in items:
        if item.topic != "/command":
            item.message.header = kit.header(item.time - kit.START + kit.SECOND)
    recording, (episode,) = cut(items)
    noted = [note for note in recording.notes if "header stamps near 0: simulated or monotonic time" in note]
    assert len(noted) == 2 and episode.usable.all()


@pytest.mark.parametrize(("late", "told"), [(-40, "before"), (-20, None), (20, None), (40, "after")])
def test_joint_states_that_are_recorded_soon_after_their_stamps_are_taken_for_one_clock(cut, late, told):
    items = kit.episode(seconds=1.0)
    for item in items:
        if item.topic == "/joint_states":
            item.time += late * MS
    recording, _ = cut(items)
    said = f"joint states are recorded 0.04 s {told} their stamps: taken for two clocks"
    assert [note.startswith(said) for note in recording.notes] == [True] * (told is not None)
    assert recording.states[0].way_ns == 0 and recording.cameras["base_0_rgb"].way_ns == max(0, -late) * MS
    assert cut(items, kit.robot(clock="bag"))[0].notes == []


def test_single_zero_stamps_are_dropped_and_counted(cut):
    items = kit.episode(seconds=1.0)
    items[7].message.header = kit.header(0)
    recording, (episode,) = cut(items)
    assert recording.faults == {("/joint_states", "header stamp 0"): 1}
    assert len(recording.states[0].time_ns) == 49 and len(recording.states[0].positions) == 49
    assert episode.usable.all()
    assert cut(items, kit.robot(clock="bag"))[0].notes == []  # nor are they told of where no stamp counts


def test_duplicate_stamps_are_noted_and_the_last_counts(cut):
    items = kit.episode(seconds=1.0)
    again = kit.joint_state(at(0.5), [0.77, 0.5, 1])
    again.time += 1
    recording, (episode,) = cut([*items, again])
    assert "/joint_states: 1 duplicate header stamps; of equals the last recorded counts" in recording.notes
    assert episode.state[5, 0] == 0.77


def test_image_data_shorter_than_height_times_step_is_not_an_observation(cut):
    items = other(CAMERA, kit.episode(seconds=1.0))
    for k in range(10):
        good = kit.raw(at(k / 10), kit.picture(k))
        if k == 4:
            good.message.data = good.message.data[:-1]
        items.append(good)
    recording, (episode,) = cut(items)
    assert recording.faults == {("/cam/image_raw", "image data shorter than height x step"): 1}
    assert episode.frames["base_0_rgb"].tolist() == [0, 1, 2, 3, 3, 5, 6, 7, 8, 9]
    assert "camera base_0_rgb: /cam/image_raw was read for /cam/image_raw/compressed" in recording.notes


def test_jpeg_cut_short_is_not_an_observation(cut):
    items = other(CAMERA, kit.episode(seconds=1.0))
    for k in range(10):
        frame = kit.compressed(at(k / 10), kit.picture(k), "jpg")
        if k == 4:
            frame.message.data = frame.message.data[:-20]
        items.append(frame)
    recording, (episode,) = cut(items)
    assert recording.faults == {(CAMERA, "JPEG data end too early"): 1}
    assert episode.frames["base_0_rgb"][4] == 3


PROBLEMS = {
    "missing camera": (lambda i: i.topic != CAMERA, {}, "camera base_0_rgb: topic /cam/image_raw/compressed is not in"),
    "missing state": (lambda i: i.topic != "/joint_states", {}, "state: topic /joint_states is not in the recording"),
    "missing actions": (lambda i: i.topic != "/command", {}, "actions: topic /command is not in the recording"),
    "wrong action type": (
        lambda i: True,
        {"actions": {"topic": "/command", "type": "JointState"}},
        "actions: topic /command is a trajectory_msgs/msg/JointTrajectory, expected JointState",
    ),
    "no action source": (lambda i: True, {"actions": None}, "actions: the robot file does not say"),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_what_is_missing_is_named(cut, name):
    keep, changes, expected = PROBLEMS[name]
    recording, episodes = cut([i for i in kit.episode(seconds=0.5) if keep(i)], kit.robot(**changes))
    assert episodes == [] and len(recording.problems) == 1
    assert recording.problems[0].startswith(expected)


def test_wrong_joint_names_are_named_with_those_found(cut):
    items = kit.episode(seconds=0.5)
    for item in items:
        if item.topic == "/joint_states":
            item.message.name = ["j1", "elbow", "grip"]
    recording, _ = cut(items)
    assert recording.problems == ["state: no message names joint shoulder; names found: elbow, grip, j1"]


def test_many_nan_positions_are_a_problem_and_few_are_dropped(cut):
    def with_nan(count):
        items = kit.episode(seconds=4.0)
        for item in [i for i in items if i.topic == "/joint_states"][20 : 20 + count]:
            item.message.position[1] = np.nan
        return cut(items)

    recording, (episode,) = with_nan(1)
    assert recording.problems == [] and np.isfinite(episode.state).all()
    assert "/joint_states: joint 'elbow' is NaN or infinite in 0.5% of the messages" in recording.notes
    recording, _ = with_nan(10)
    assert recording.problems == ["/joint_states: joint 'elbow' is NaN or infinite in 5.0% of the messages"]


@pytest.mark.parametrize("value", [1e300, 4.2e6, -43.0])
def test_a_position_that_cannot_be_is_left_out_and_many_of_them_are_a_problem(cut, value):
    """Limits of -2 and 2: one such number would leave the policy blind on that joint, by its standard deviation."""

    def glitches(count):
        items = kit.episode(seconds=4.0)
        for item in [i for i in items if i.topic == "/joint_states"][20 : 20 + count]:
            item.message.position[1] = value
        return cut(items)

    recording, (episode,) = glitches(1)
    assert recording.problems == [] and np.abs(episode.state).max() < 2
    assert recording.faults["/joint_states", "position absurdly far outside the joint's limits"] == 1
    recording, _ = glitches(10)
    assert recording.problems == [
        f"/joint_states: joint 'elbow' reads {value:.4g}, where its limits are -2 to 2 (a glitch, other units, wrong "
        "limits?), in 5.0% of the messages"
    ]


def test_a_relative_topic_is_found_below_a_namespace(cut):
    items = kit.episode(seconds=0.5)
    for item in items:
        if item.topic == "/joint_states":
            item.topic = "/left/joint_states"
    recording, (episode,) = cut(items, kit.robot(state={"topics": ["joint_states"]}))
    assert "state: /left/joint_states was read for joint_states" in recording.notes and episode.usable.all()


def test_what_was_before_an_episode_says_nothing_about_it(cut):
    items = kit.episode(seconds=3.0)
    items = [i for i in items if i.topic != "/command" or i.time < at(1.0) or i.time >= at(1.4)]
    items = [i for i in items if i.topic != CAMERA or i.time != at(1.0)]
    items.append(kit.text(at(1.0), "second", "/episode"))
    _, (episode,) = cut(items, kit.robot(episode_topic="/episode"))
    assert episode.ticks_ns[0] == at(1.05) and episode.frames["base_0_rgb"][0] == 20  # the first frame after the mark
    assert episode.known[:6].tolist() == [False] * 4 + [True] * 2  # commands of before the mark are not held over


def test_a_pause_between_episodes_is_none_of_their_holes(cut):
    items = [i for i in kit.episode(seconds=6.0) if not at(1.9) < i.time < at(4.0)]
    items += [kit.text(at(s), words, "/episode") for s, words in [(0.5, "one"), (1.9, ""), (4.1, "two")]]
    recording, episodes = cut(items, kit.robot(episode_topic="/episode"))
    assert [episode.label for episode in episodes] == ["one", "two"]
    assert not any("nothing was recorded" in note for note in recording.notes)


def test_an_episode_with_a_silent_stream_is_left_out_and_noted(cut):
    items = [i for i in kit.episode(seconds=4.0) if i.topic != CAMERA or i.time < at(2.0)]
    items += [kit.text(at(s), words, "/episode") for s, words in [(0.5, "one"), (2.5, "two")]]
    recording, episodes = cut(items, kit.robot(episode_topic="/episode"))
    assert [episode.label for episode in episodes] == ["one"]
    assert "episode 'two': left out, no message of base_0_rgb in it" in recording.notes


@pytest.mark.parametrize("stamp", [2**31 * kit.SECOND - kit.SECOND, kit.START + 61 * kit.SECOND])
def test_a_single_wild_stamp_is_dropped_and_counted(cut, stamp):
    items = kit.episode(seconds=1.0)
    items[10].message.header = kit.header(stamp)
    recording, (episode,) = cut(items)
    assert recording.faults == {("/joint_states", "header stamp far from the time of recording"): 1}
    assert len(episode.ticks_ns) == 10 and episode.usable.all()


def test_a_stamp_less_than_a_minute_away_is_a_clock_that_jumped(cut):
    items = kit.episode(seconds=1.0)
    items[10].message.header = kit.header(items[10].time + 59 * kit.SECOND)
    recording, _ = cut(items)
    assert recording.problems[0].startswith("/joint_states: header stamps jump back by 59.0 s")


@pytest.mark.parametrize("camera_hz", [10, 20, 40])
def test_commands_without_a_stamp_do_not_come_early_by_what_a_camera_takes(cut, camera_hz):
    """Frames that are written down 100 ms after their exposure, whether they or the joint states are more."""
    items = [kit.joint_state(at(k / 30), [k / 30, 0, 0]) for k in range(60)]
    for k in range(2 * camera_hz):
        items.append(kit.compressed(at(k / camera_hz), kit.picture(k)))
        items[-1].time += 100 * MS
    items += [kit.floats(at(k / 30), [k / 30, 0, 0]) for k in range(60)]
    recording, (episode,) = cut(items, kit.robot(actions={"topic": "/command", "type": "Float64MultiArray"}))
    told = episode.ticks_ns[2:15] / 1e9 - kit.START / 1e9
    np.testing.assert_allclose(episode.actions[2:15, 0], told, atol=0.034)  # one command's time
    assert recording.notes == []


def commands_of_another_clock(kind, apart, items):
    items = other("/command", items)
    for k in range(10):
        values, stamp = [k, 0, 0], at(k / 10) + round(apart * kit.SECOND)
        if kind == "JointState":
            items.append(kit.joint_state(stamp, values, topic="/command"))
            items[-1].time = at(k / 10)
        else:
            items.append(kit.trajectory(at(k / 10), [(0.0, values)], stamp=stamp))
    return items


@pytest.mark.parametrize("kind", ["JointState", "JointTrajectory"])
@pytest.mark.parametrize("apart", [-120, 120, 5000 - kit.START / kit.SECOND], ids=["behind", "ahead", "since boot"])
def test_commands_of_another_clock_are_refused_with_their_distance(cut, kind, apart):
    items = commands_of_another_clock(kind, apart, kit.episode(seconds=1.0))
    robot = {"actions": {"topic": "/command", "type": kind}}
    recording, episodes = cut(items, kit.robot(**robot))
    assert episodes == []
    assert recording.problems == [
        f"actions (/command): header stamps are {abs(apart):.0f} s away from those of the joint states; "
        "set `clock: bag` in the robot file to align by time of recording"
    ]
    _, (episode,) = cut(items, kit.robot(**robot, clock="bag"))
    assert episode.actions[:, 0].tolist() == list(range(10))


@pytest.mark.parametrize(("apart", "told", "first"), [(-0.4, "behind", 4), (0.4, "ahead of", 0)])
def test_commands_that_are_stamped_a_little_apart_are_told(cut, apart, told, first):
    items = commands_of_another_clock("JointState", apart, kit.episode(seconds=1.0))
    recording, (episode,) = cut(items, kit.robot(actions={"topic": "/command", "type": "JointState"}))
    assert f"actions (/command): header stamps are 0.4 s {told} the time of recording" in recording.notes[0]
    assert episode.actions[[0, 5], 0].tolist() == [first, first + 5 if apart < 0 else 1]


def test_one_absurd_stamp_of_a_command_counts_as_none(cut):
    items = commands_of_another_clock("JointState", 0, kit.episode(seconds=1.0))
    items[-5].message.header = kit.header(2**31 * kit.SECOND - kit.SECOND)
    recording, (episode,) = cut(items, kit.robot(actions={"topic": "/command", "type": "JointState"}))
    assert episode.actions[:, 0].tolist() == list(range(10))
    assert [n for (_, reason), n in recording.faults.items() if "which counts instead" in reason] == [1]


@pytest.mark.parametrize(("ahead", "told"), [(0.1, None), (0.3, "notes"), (5.0, "problems")])
def test_frames_from_the_future_are_told_and_beyond_a_second_refused(cut, ahead, told):
    """As the node refuses them. Late ones are told where they are older than the robot would take them."""
    for sign in (1, -1):
        items = kit.episode(seconds=2.0)
        for item in items:
            if item.topic == CAMERA:
                item.message.header = kit.header(item.time + round(sign * ahead * kit.SECOND))
        recording, _ = cut(items)
        said = {"notes": recording.notes, "problems": recording.problems}
        for where, lines in said.items():
            words = f"header stamps are {ahead} s ahead of those of the joint states"
            assert any(words in line for line in lines) == (where == told and sign > 0), said
        late = f"base_0_rgb (/cam/image_raw/compressed): recorded {ahead:.2g} s after the stamps"
        assert [line.startswith(late) for line in recording.warnings] == [True] * (sign < 0 and ahead > 0.2)


def test_streams_of_two_clocks_are_refused_with_their_distance(cut):
    items = kit.episode(seconds=1.0)
    for item in items:
        if item.topic == CAMERA:
            item.message.header = kit.header(item.time - kit.START + kit.SECOND)
    recording, episodes = cut(items)
    assert episodes == []
    assert recording.problems[0].startswith(
        "base_0_rgb (/cam/image_raw/compressed): header stamps are 1699999999 s away"
    )


def test_times_of_recording_days_apart_are_refused(cut):
    items = kit.episode(seconds=1.0)
    items[49].time += 90 * 3600 * kit.SECOND
    with pytest.raises(BagError, match="stamps span 90 hours; some must be wrong"):
        cut(items, kit.robot(clock="bag"))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), way=st.sampled_from([0, 20, 70]))
def test_ticks_of_a_bag_see_what_the_live_buffers_would_have_given(tmp_path_factory, seed, way):
    rng = np.random.default_rng(seed)
    robot = kit.robot(
        cameras={
            "base_0_rgb": {"topic": "/cam/image_raw", "transport": "compressed", "latency": 0.03, "max_age": 0.15}
        },
        state={"topics": ["/joint_states"], "max_age": 0.08, "latency": 0.01},
        max_skew=0.12,
    )
    frames = np.sort(rng.choice(2000, 30, replace=False)) * MS + kit.START
    states = np.sort(rng.choice(2000, 60, replace=False)) * MS + kit.START
    items = [kit.compressed(int(ns), kit.picture(1)) for ns in frames]
    for item in items:  # frames are so long on their way
        item.time += way * MS
    items += [kit.joint_state(int(ns), [i / 100, 0, 0]) for i, ns in enumerate(states)]
    items.append(kit.trajectory(kit.START, [(0.1, [1, 0, 0])]))
    (files,) = find_bags(kit.write_bag(tmp_path_factory.mktemp("live") / "bag", items))
    with Bag(files) as bag:
        (episode,) = cut_episodes(read_recording(bag, robot), robot, WHOLE)
    live = [
        StreamBuffer("state", 80 * MS, 10 * MS, span_ns=10**10),
        StreamBuffer("frame", 150 * MS, 30 * MS, span_ns=10**10),
    ]
    coming = [(int(ns), live[0], int(ns), i) for i, ns in enumerate(states)]
    coming += [(int(ns) + way * MS, live[1], int(ns), i) for i, ns in enumerate(frames)]
    coming.sort(key=lambda item: item[0])
    for k, tick in enumerate(episode.ticks_ns):
        while coming and coming[0][0] <= tick + 30 * MS:  # the node looks back by the largest latency
            _, buffer, stamp, i = coming.pop(0)
            buffer.push(stamp, i)
        found = align(live, int(tick), 120 * MS)
        assert episode.usable[k] == isinstance(found, Aligned)
        if episode.usable[k]:
            assert episode.frames["base_0_rgb"][k] == found.samples["frame"].payload
            assert episode.state[k, 0] == found.samples["state"].payload / 100
            assert episode.skew_ns[k] == found.skew_ns


class Listener:
    """Stands in for a ROS node: keeps the callbacks of its subscriptions."""

    def __init__(self):
        self.callbacks = {}

    def create_subscription(self, kind, topic, callback, qos):
        self.callbacks[topic] = callback

    def get_clock(self):
        return self

    def now(self):
        return self

    nanoseconds = 0


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_ticks_of_a_bag_see_what_the_node_would_have_of_joint_states_of_every_kind(tmp_path_factory, seed):
    pytest.importorskip("rclpy")
    from pi0_ros.ros.streams import Snapshot, Streams

    rng = np.random.default_rng(seed)
    kinds = [("/joint_states", kit.JOINTS), ("/joint_states", ("elbow", "shoulder")), ("/joint_states", ("grip",)),
             ("/hand", ("grip",)), ("/hand", ("elbow", "grip"))]  # fmt: skip
    counts = [int(rng.choice([few, 3, 30, 100])) for few in (1, 0, 0, 1, 0)]  # something on every topic
    robot = kit.robot(
        cameras={"base_0_rgb": {"topic": "/cam/image_raw", "transport": "compressed", "max_age": 0.3}},
        state={"topics": ["/joint_states", "/hand"], "max_age": 0.15, "latency": 0.02},
        max_skew=0.2,
    )
    stamps = np.split(rng.permutation(2000)[: sum(counts)] * MS + kit.START, np.cumsum(counts)[:-1])
    items = [kit.compressed(kit.START + k * 50 * MS, kit.picture(k)) for k in range(40)]
    for (topic, names), times in zip(kinds, stamps, strict=True):
        items += [kit.joint_state(int(ns), rng.normal(size=len(names)) / 100, names, topic) for ns in times]
    items = sorted(items, key=lambda item: item.time)
    bag = [*items, kit.trajectory(kit.START, [(0.1, [1, 0, 0])])]
    (files,) = find_bags(kit.write_bag(tmp_path_factory.mktemp("node") / "bag", bag))
    with Bag(files) as opened:
        (episode,) = cut_episodes(read_recording(opened, robot), robot, WHOLE)
    node = Listener()
    streams = Streams(node, robot, lambda _: None)
    for k, tick in enumerate(episode.ticks_ns):
        while items and items[0].time <= tick + 20 * MS:
            item = items.pop(0)
            if item.topic in node.callbacks:
                node.callbacks[item.topic](item.message)
        found = streams.observe(int(tick), int(tick))
        assert isinstance(found, Snapshot) == episode.usable[k]
        if isinstance(found, Snapshot):
            np.testing.assert_array_equal(episode.state[k], found.state)
            assert episode.frames["base_0_rgb"][k] == round((found.frames["base_0_rgb"].time_ns - kit.START) / 50 / MS)
            assert episode.skew_ns[k] == round(found.skew * 1e9)
