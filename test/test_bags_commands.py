"""What was commanded at an instant: numbers by hand. And how much room hours of commands take."""

from __future__ import annotations

import tracemalloc

import bag_kit as kit
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pi0_ros.training.bags import Bag, find_bags
from pi0_ros.training.commands import CommandRows, commanded
from pi0_ros.training.recording import read_recording


def command(begin, due, positions, joints=(0,)):
    rows = CommandRows()
    rows.add(0, 0, 0, np.array(positions, float), due)
    return rows.commands(joints, np.array([begin]), np.array([0]))


def column(commands, ticks, joints=1):
    values, known = commanded(commands, np.array(ticks, np.int64), joints)
    return values[:, 0].tolist(), known[:, 0].tolist()


def test_a_position_holds_until_the_next_and_belongs_to_its_own_tick():
    values, known = column([command(10, [10], [1.0]), command(20, [20], [2.0])], [9, 10, 19, 20, 99])
    assert values == [1.0, 1.0, 1.0, 2.0, 2.0]
    assert known == [False, True, True, True, True]


def test_a_trajectory_goes_through_its_points_and_holds_the_last():
    values, _ = column([command(0, [10, 20], [1.0, 3.0])], [0, 5, 10, 15, 20, 100])
    assert values == [1.0, 1.0, 1.0, 2.0, 3.0, 3.0]  # nothing before it: its first point stands


def test_a_new_trajectory_starts_from_where_the_old_one_stands():
    old, new = command(0, [0, 10], [0.0, 10.0]), command(5, [15], [25.0])
    values, _ = column([old, new], [0, 4, 5, 10, 15, 20])
    assert values == [0.0, 4.0, 5.0, 15.0, 25.0, 25.0]


def test_a_streamed_trajectory_gives_the_target_of_its_own_time():
    """One message a tick, each due a tick later: the target of tick k is what the message of tick k - 1 asked for."""
    stream = [command(100 * k, [100 * k + 100], [float(k + 1)]) for k in range(5)]
    values, _ = column(stream, [0, 100, 200, 250, 300, 500])
    assert values == [1.0, 1.0, 2.0, 2.5, 3.0, 5.0]


def test_points_that_are_past_on_arrival_are_entered_without_a_bridge():
    late = command(10, [0, 20], [0.0, 2.0])
    values, _ = column([command(0, [0], [9.0]), late], [9, 10, 15, 20])
    assert values == [9.0, 1.0, 1.5, 2.0]


def test_a_command_to_stay_holds_positions_too_and_before_any_other_says_nothing():
    stay = command(10, [10], [np.nan])
    assert column([command(0, [0], [1.0]), stay, command(20, [20], [2.0])], [0, 10, 15, 20])[0] == [1.0, 1.0, 1.0, 2.0]
    values, known = column([stay], [0, 20])
    assert np.isnan(values).all() and known == [False, False]


def test_commands_within_a_span_are_those_of_its_ends_too():
    both = [command(begin, [begin], [1.0]).within(10, 20).begin_ns.tolist() for begin in (9, 10, 20, 21)]
    assert both == [[], [10], [20], []]


@pytest.mark.parametrize("apart", [0, 1])
def test_a_joint_that_is_also_commanded_alone_goes_by_its_newest_command(apart):
    arm, again = (command(begin, [begin], [[1.0, 2.0]], joints=(0, 1)) for begin in (0, 30))
    alone = command(20, [20], [7.0], joints=(apart,))
    values, known = commanded([arm, again, alone], np.array([0, 20, 30]), 2)
    assert values[:, apart].tolist() == [1.0 + apart, 7.0, 1.0 + apart]
    assert values[:, 1 - apart].tolist() == [2.0 - apart] * 3 and known.all()


def test_joints_commanded_apart_keep_their_own_targets():
    arm = command(0, [0], [[1.0, 2.0]], joints=(0, 1))
    hand = command(10, [10], [5.0], joints=(2,))
    elbow = command(20, [20], [7.0], joints=(1,))
    values, known = commanded([arm, hand, elbow], np.array([0, 10, 20]), 4)
    np.testing.assert_array_equal(values[:, :3], [[1, 2, 5], [1, 2, 5], [1, 7, 5]])
    assert known[:, 2].tolist() == [False, True, True]
    assert np.isnan(values[:, 3]).all() and not known[:, 3].any()


@given(st.lists(st.tuples(st.integers(0, 50), st.floats(-5, 5)), min_size=1, max_size=20), st.lists(st.integers(0, 60)))
def test_held_positions_equal_a_plain_search(commands, ticks):
    built = [command(begin, [begin], [value]) for begin, value in commands]
    ticks = sorted(ticks)
    values, known = column(built, ticks)
    ordered = sorted(commands, key=lambda item: item[0])
    for tick, value, sure in zip(ticks, values, known, strict=True):
        before = [v for begin, v in ordered if begin <= tick]
        assert sure == bool(before)
        assert value == (before[-1] if before else ordered[0][1])


def most_bytes(folder, count, kind):
    """What reading a recording of `count` commands takes at most, beyond the recording itself."""
    items = [kit.joint_state(kit.START, [0, 0, 0]), kit.compressed(kit.START, kit.picture(0))]
    for i in range(count):
        ns, positions = kit.START + i * 10**6, [i / count, 0, 0]
        items.append(kit.floats(ns, positions) if kind[0] == "F" else kit.trajectory(ns, [(0.001, positions)]))
    robot = kit.robot(actions={"topic": "/command", "type": kind})
    (files,) = find_bags(kit.write_bag(folder / f"{count}", items))
    del items
    with Bag(files) as bag:
        tracemalloc.start()
        recording = read_recording(bag, robot)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert sum(len(commands.begin_ns) for commands in recording.commands) == count
    return most


@pytest.mark.parametrize("kind", ["Float64MultiArray", "JointTrajectory"])
def test_a_million_commands_fit(tmp_path, kind):
    few, many = (most_bytes(tmp_path, count, kind) for count in (500, 2500))
    assert (many - few) / 2000 < 700  # bytes a command; a Python object for each number would take thousands
