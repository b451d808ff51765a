"""Recordings whose numbers cannot mean what the robot file says: each mistake is found, and sound ones pass."""

import bag_kit as kit
import numpy as np
import pytest

from pi0_ros.training.bags import Bag, find_bags
from pi0_ros.training.data import load_units
from pi0_ros.training.episodes import cut_episodes
from pi0_ros.training.plausibility import (
    commands_apart,
    judge,
    least_spread,
    limits_fault,
    measured_state,
    rate_fault,
)
from pi0_ros.training.recording import read_recording

ROBOT = kit.robot()
T = 200
SWING = np.sin(np.arange(T) / 15)  # at 10 Hz
ZEROS = np.zeros(T)
KNOWN = np.ones(T, bool)


def told(state, actions, robot=ROBOT):
    """What is said of an episode: columns of shoulder, elbow and grip."""
    return commands_apart([(np.stack(state, axis=1), np.stack(actions, axis=1), KNOWN)], robot)


def later(values, ticks):
    return np.concatenate([np.full(ticks, values[0]), values[:-ticks]])


def test_an_arm_that_follows_its_commands_a_moment_later_passes():
    shoulder, elbow, grip = SWING, 0.5 * np.cos(np.arange(T) / 9), (SWING > 0) * 1.0
    assert told([later(shoulder, 3), later(elbow, 3), later(grip, 3)], [shoulder, elbow, grip]) == []


@pytest.mark.parametrize(("ticks", "said"), [(7, 0), (8, 1), (-5, 1)])
def test_an_arm_follows_within_half_a_second_and_never_goes_ahead(ticks, said):
    """That is 5 ticks; at 2 from there the mean distance is still 0.42, and at 3 0.61, of a spread of 2."""
    quick = np.sin(np.arange(T) / 3)
    state = later(quick, ticks) if ticks > 0 else later(quick[::-1], -ticks)[::-1]
    assert len(told([state, ZEROS, ZEROS], [quick, ZEROS, ZEROS])) == said


@pytest.mark.parametrize(
    ("gaps", "said"), [([2] * 10, True), ([2] * 9, False), ([1] * 10, False), ([1] * 9 + [5] * 11, True)]
)
def test_commands_at_half_the_control_rate_or_less_are_refused(gaps, said):
    assert (rate_fault([np.array(gaps[:4]), np.array(gaps[4:])], ROBOT) is not None) == said


def test_a_joint_is_taken_to_vary_by_a_thousandth_of_its_range_at_least():
    assert [least_spread(joint) for joint in ROBOT.joints] == [0.004, 0.004, 0.001]
    wide = ROBOT.joints[2].model_copy(update={"position": (-4.0, 4.0)})
    assert least_spread(wide) == 0.001  # a gripper goes from 0 to 1 in model space


def test_a_joint_that_rests_a_little_beside_its_command_passes():
    assert told([SWING, ZEROS + 0.01, ZEROS], [SWING, ZEROS, ZEROS]) == []


def test_an_unknown_action_is_no_distance():
    known = np.arange(T) > 150
    actions = np.where(known, SWING, np.nan)
    columns = np.stack([SWING, ZEROS, ZEROS], axis=1), np.stack([actions, ZEROS, ZEROS], axis=1)
    assert commands_apart([(*columns, known)], ROBOT) == []
    assert commands_apart([(*columns, np.zeros(T, bool))], ROBOT) == []


@pytest.mark.parametrize(
    "actions",
    [
        [np.cos(np.arange(T) / 15), SWING, ZEROS],  # in another order
        [np.rad2deg(SWING), ZEROS, ZEROS],
        [np.gradient(SWING), ZEROS, ZEROS],  # velocities
    ],
    ids=["order", "degrees", "velocities"],
)
def test_commands_of_something_else_are_told_with_their_distance(actions):
    found = told([SWING, np.cos(np.arange(T) / 15), ZEROS], [actions[0], np.cos(np.arange(T) / 15), ZEROS])
    (line,) = found
    assert line.startswith("shoulder does not go where it is told: its state is ")
    assert (
        " rad from the action on average" in line
        and "in another order of joints, in other units, or no positions?" in line
    )


def test_a_gripper_may_hold_something():
    closed = (SWING > 0) * 1.0
    assert told([SWING, ZEROS, 0.8 * closed], [SWING, ZEROS, closed]) == []
    (line,) = told([SWING, ZEROS, 0.2 * closed], [SWING, ZEROS, closed])
    assert line.startswith("grip does not go") and "or does it hold something most of the time?" in line


def test_an_angle_that_wraps_in_commands_alone_is_found():
    ramp = np.linspace(2.5, 3.8, T)
    robot = kit.robot(joints=[{"name": n, "position": [-6, 6], "velocity": 2, "acceleration": 5} for n in kit.JOINTS])
    wrapped = (ramp + np.pi) % (2 * np.pi) - np.pi
    (line,) = told([ramp, ZEROS, ZEROS], [wrapped, ZEROS, ZEROS], robot)
    assert line.startswith("actions of shoulder are a turn away from its state in ")


def test_sound_numbers_are_neither_refused_nor_warned_of_and_what_is_odd_about_others_is_said():
    sound = np.stack([SWING, 0.5 * np.cos(np.arange(T) / 9), (SWING > 0) * 1.0], axis=1)
    judged = lambda state, actions: judge(state, actions, [(sound, actions, KNOWN)], ROBOT)  # noqa: E731
    assert judged(sound, sound) == (None, [])
    for outside, said in ((10, 0), (11, 1)):  # of 200: more than a twentieth
        state = sound.copy()
        state[:outside, 0] = 2.01
        fault, warnings = judged(state, sound)
        assert fault is None and [w.startswith("state of shoulder: ") for w in warnings] == [True] * said
    still = sound * [1, 0, 1]
    fault, (warning,) = judged(still, sound)
    assert fault is None and warning.startswith("hardly changes: state of elbow (std 0); ")
    fault, _ = judged(sound, np.repeat(sound[::2], 2, axis=0))
    assert fault.startswith("actions on /command change 5 times a second")


def test_recordings_most_of_whose_positions_are_outside_the_limits_are_refused():
    assert limits_fault([("state", "elbow", (-2, 2), 0.4)]) is None
    fault = limits_fault([("state", "elbow", (-2, 2), 0.4), ("actions", "elbow", (-2, 2), 0.7)])
    assert fault.startswith("actions of elbow: 70% outside its limits") and "must be in radians or metres" in fault


def test_the_measured_state_as_actions_is_told_with_its_joints():
    source = {"topic": "joint_states", "type": "JointState", "joints": ["grip"]}
    rest = {"topic": "command", "type": "JointTrajectory", "joints": ["shoulder", "elbow"]}
    (line,) = measured_state(kit.robot(actions=[source, rest]))
    assert line.startswith("actions of grip are the measured state (joint_states)")
    assert measured_state(ROBOT) == []
    assert measured_state(kit.robot(actions=[source | {"latency": 0.1}, rest])) == []  # it looks ahead


def read(tmp_path, items, **changes):
    (files,) = find_bags(kit.write_bag(tmp_path / "bag", items))
    with Bag(files) as bag:
        return read_recording(bag, kit.robot(**changes))


def test_a_sound_recording_has_neither_problem_nor_warning(tmp_path):
    recording = read(tmp_path, kit.episode())
    assert recording.problems == recording.warnings == []


def test_a_second_publisher_of_joint_states_is_warned_of(tmp_path):
    zeros = [kit.joint_state(kit.START + k * kit.SECOND // 10 + 5, [0.0, 0.0, 0.0]) for k in range(30)]
    recording = read(tmp_path, [*kit.episode(), *zeros])
    (line,) = [line for line in recording.warnings if "elbow" in line]  # it rests at 0.5
    assert "moves faster than 10 times its velocity limit" in line and "from 0" in line and "0.5" in line


def test_an_angle_that_wraps_around_is_a_problem(tmp_path):
    items = kit.episode()
    for k, item in enumerate(i for i in items if i.topic == "/joint_states"):
        item.message.position[0] = (2.5 + k / 100 + np.pi) % (2 * np.pi) - np.pi
    joints = [{"name": n, "position": [-6, 6], "velocity": 2, "acceleration": 5} for n in kit.JOINTS]
    (problem,) = read(tmp_path, items, joints=joints).problems
    assert problem.startswith("/joint_states: joint 'shoulder' jumps by a turn from one message to the next, 1 times")


def test_commands_of_a_continuous_joint_that_go_past_half_a_turn_are_a_problem(tmp_path):
    items = kit.episode()
    for k, item in enumerate(i for i in items if i.topic == "/command"):
        for point in item.message.points:
            point.positions[0] = 2.6 + k / 30
    joints = [{"name": n, "position": [-6, 6], "velocity": 2, "acceleration": 5} for n in kit.JOINTS]
    joints[0] |= {"kind": "continuous", "position": [-2.8, 2.8]}
    (problem,) = read(tmp_path, items, joints=joints).problems
    assert problem.startswith(
        "commands: joint 'shoulder' jumps by a turn from one message to the next, 1 times: it goes"
    )


@pytest.mark.parametrize(
    ("limits", "fault"), [([0.4, 6.1], ""), ([-2.8, 2.9], "it goes across 3.19 rad, half a turn from the middle")]
)
def test_an_angle_of_a_continuous_joint_wraps_nowhere_but_half_a_turn_from_its_limits_middle(tmp_path, limits, fault):
    items = kit.episode()
    for k, item in enumerate(i for i in items if i.topic == "/joint_states"):
        item.message.position[0] = (2.5 + k / 100 + np.pi) % (2 * np.pi) - np.pi
    for item in (i for i in items if i.topic == "/command"):
        for point in item.message.points:
            point.positions[0] = -3.0
    joints = [{"name": n, "position": [-6, 6], "velocity": 2, "acceleration": 5} for n in kit.JOINTS]
    joints[0] |= {"kind": "continuous", "position": limits}
    recording = read(tmp_path, items, joints=joints)
    if fault:
        assert fault in recording.problems[0]
        return
    assert recording.problems == []
    (stream,) = recording.states
    np.testing.assert_allclose(np.diff(stream.positions[:, 0]), 0.01)
    np.testing.assert_allclose(recording.commands[0].positions[:, 0], 2 * np.pi - 3.0)


@pytest.mark.parametrize("place", [-0.9, 1.9])
def test_two_topics_that_contradict_one_another_about_a_joint_are_a_problem(tmp_path, place):
    other = [kit.joint_state(kit.START + k * kit.SECOND // 50, [place, 0.6, 0.5], topic="/other") for k in range(150)]
    recording = read(tmp_path, [*kit.episode(), *other], state={"topics": ["joint_states", "other"], "max_age": 0.2})
    assert any("joint 'shoulder' is told by /joint_states and /other, which are" in p for p in recording.problems)
    assert not any("elbow" in problem for problem in recording.problems)  # 0.5 and 0.6 is a matter of calibration


def test_an_empty_trajectory_holds_where_the_cancelled_one_stands(tmp_path):
    items = [item for item in kit.episode(seconds=4.0) if item.topic != "/command"]
    items.append(kit.trajectory(kit.START, [(0.1, [0.0, 0.5, 1.0]), (4.0, [1.0, 0.5, 1.0])]))
    items.append(kit.trajectory(kit.START + kit.SECOND, []))
    (files,) = find_bags(kit.write_bag(tmp_path / "bag", items))
    with Bag(files) as bag:
        (episode,) = cut_episodes(read_recording(bag, ROBOT), ROBOT)
    seconds = (episode.ticks_ns - kit.START) / kit.SECOND
    np.testing.assert_allclose(episode.actions[seconds > 1.05, 0], 0.9 / 3.9, atol=0.03)
    assert episode.actions[seconds < 0.95, 0].max() < 0.9 / 3.9
    assert episode.known[seconds > 0.1].all()


def test_holding_before_anything_was_commanded_is_not_known(tmp_path):
    items = [item for item in kit.episode() if item.topic != "/command"]
    items.append(kit.trajectory(kit.START + kit.SECOND // 2, []))
    items.append(kit.trajectory(kit.START + kit.SECOND, [(0.1, [0.5, 0.5, 1.0])]))
    (files,) = find_bags(kit.write_bag(tmp_path / "bag", items))
    with Bag(files) as bag:
        (episode,) = cut_episodes(read_recording(bag, ROBOT), ROBOT)
    seconds = (episode.ticks_ns - kit.START) / kit.SECOND
    assert not episode.known[seconds < 0.95].any() and episode.known[seconds > 1.05].all()


def test_depth_in_a_plain_png_is_no_picture(tmp_path):
    items = [item for item in kit.episode() if "cam" not in item.topic]
    for k in range(60):
        frame = kit.compressed(kit.START + k * kit.SECOND // 20, kit.picture(9))
        frame.message.format = "16UC1; png compressed"
        items.append(frame)
    (problem,) = read(tmp_path, items).problems
    assert "depth, not colour" in problem


def test_an_episode_topic_that_is_not_recorded_is_warned_of(tmp_path):
    (line,) = read(tmp_path, kit.episode(), episode_topic="episodes").warnings
    assert line.startswith("episodes: topic episodes is not in the recording") and "taken for one episode" in line


def test_a_prompt_under_another_name_is_noted(tmp_path):
    recording = read(tmp_path, [*kit.episode(), kit.text(kit.START, "pour", "/task_instruction")])
    assert any(note.startswith("prompt: ") and "/task_instruction" in note for note in recording.notes)


def test_of_a_joint_named_twice_the_first_counts_as_on_the_robot(tmp_path):
    items = kit.episode()
    for item in items:
        if item.topic == "/joint_states":
            item.message.name.append("elbow")
            item.message.position = np.append(item.message.position, -1.5)
    recording = read(tmp_path, items)
    assert (recording.states[0].positions[:, 1] == 0.5).all()


def test_what_is_wrong_is_printed_before_training(tmp_path, capsys):
    items = kit.episode(seconds=4.0)
    for item in items:
        if item.topic == "/command":
            item.message.points[0].positions[:2] = item.message.points[0].positions[1::-1]
    load_units(kit.write_bag(tmp_path / "bag", items), ROBOT, 28, cache=tmp_path / "cache", jobs=1)
    out = capsys.readouterr().out
    assert "warning: elbow does not go where it is told" in out  # it rests, and is told to swing


def test_two_topics_that_tell_of_a_joint_one_after_the_other_contradict_nothing(tmp_path):
    other = [
        kit.joint_state(kit.START + 3 * kit.SECOND + k * kit.SECOND // 50, [-0.9, 0.5, 0.5], topic="/other")
        for k in range(50)
    ]
    recording = read(tmp_path, [*kit.episode(), *other], state={"topics": ["joint_states", "other"], "max_age": 0.2})
    assert not any("is told by" in problem for problem in recording.problems)
