"""Which joint states the player believes."""

import math

import numpy as np
import pytest
from playback_kit import NAMES, PERIOD, ROBOT, Bench, turning

from pi0_ros.ros.judging import SECOND
from pi0_ros.ros.limiter import robot_limits
from pi0_ros.ros.player import HOLDING, PLAYING
from pi0_ros.ros.proprioception import Proprioception

MS = SECOND // 1000
PLACE = [0.3, 0.2, 0.5]


class Seen:
    """Joint states every 20 ms."""

    def __init__(self, unit=1.0, robot=ROBOT):
        arm, units = np.array([True, True, False]), np.full(3, unit)
        self.seen = Proprioception(robot, robot_limits(robot, 1.0, 1.0), arm, units)
        self.now = 10 * SECOND

    def take(self, positions, names=NAMES, stamp=None, later=20):
        self.now += later * MS
        self.seen.take(names, positions, self.now if stamp is None else stamp, self.now)
        return self.seen.positions.tolist()

    @property
    def fault(self):
        return self.seen.fault(self.now)


@pytest.fixture
def seen():
    seen = Seen()
    for _ in range(5):
        seen.take(PLACE)
    return seen


def test_one_message_in_which_the_arm_leaps_is_not_believed(seen):
    assert seen.take([0.0, 0.0, 0.0]) == PLACE
    assert seen.take(PLACE) == PLACE and seen.fault == ""


def test_of_two_messages_that_leap_to_different_places_neither_is_believed(seen):
    assert seen.take([-0.9, 1.0, 0.5]) == seen.take([0.9, 0.2, 0.5]) == PLACE


def test_where_the_next_message_agrees_the_arm_is_elsewhere(seen):
    assert seen.take([-0.9, 1.0, 0.5]) == PLACE
    assert seen.take([-0.89, 1.0, 0.5]) == [-0.89, 1.0, 0.5] and seen.fault == ""


def test_an_arm_that_goes_as_fast_as_it_may_leaps_not(seen):
    for k in range(1, 30):  # 2 rad/s
        assert seen.take([0.3 - 0.04 * k, 0.2, 0.5])[0] == 0.3 - 0.04 * k


@pytest.mark.parametrize(("unit", "leaps"), [(1.0, False), (0.2, True)], ids=["radians", "metres"])
def test_what_a_linear_joint_may_be_off_by_is_a_fifth_in_metres(unit, leaps):
    seen = Seen(unit)
    seen.take(PLACE)
    assert (seen.take([0.46, 0.2, 0.5]) == PLACE) == leaps  # 0.12 by speed, and 0.05 or 0.01 of noise


def test_a_gripper_may_leap(seen):
    assert seen.take([0.3, 0.2, 1.0]) == [0.3, 0.2, 1.0]


def test_after_a_while_without_joint_states_the_arm_may_be_elsewhere(seen):
    assert seen.take([-0.9, 0.2, 0.5], later=300) == [-0.9, 0.2, 0.5]  # 6 rad/s


@pytest.mark.parametrize("each", [1, 2, 5])
def test_two_publishers_in_turn_are_believed_neither(seen, each):
    for k in range(30):
        seen.take(PLACE)
        if k % each == 0:
            seen.take([0.0, 0.0, 0.0], later=1)
    assert seen.fault == "joint 'a' is told to be at 0.3 and 0 in turn: do two programs publish joint states?"
    for _ in range(60):
        seen.take(PLACE)
    assert seen.fault == ""


def test_arm_and_gripper_of_two_drivers_leap_each_for_itself(seen):
    for _ in range(2):
        seen.take([-0.9], ["a"])
        seen.take([1.5], ["b"])
    assert seen.seen.positions.tolist() == [-0.9, 1.5, 0.5]


def test_an_older_message_does_not_replace_a_newer(seen):
    assert seen.take([0.31, 0.2, 0.5], stamp=seen.now - 100 * MS) == PLACE
    for _ in range(20):  # a bag is played beside the arm
        seen.take([0.9, 0.2, 0.5], stamp=seen.now - 10 * SECOND, later=10)
        assert seen.take(PLACE, later=10) == PLACE and seen.fault == ""


def test_joint_states_are_as_old_as_the_oldest_joints_and_at_time_0_none_has_come_yet():
    other = Seen()
    other.seen.take(NAMES[:2], PLACE[:2], 0, 0)
    assert other.seen.age(0) == math.inf and "no joint state of g for more" in other.seen.fault(0)
    other.seen.take(NAMES[2:], PLACE[2:], 40 * MS, 40 * MS)
    assert other.seen.age(50 * MS) == 0.05 and other.seen.fault(50 * MS) == ""
    other.seen.take(NAMES[:2], PLACE[:2], 20 * MS, 50 * MS)
    assert other.seen.age(50 * MS) == 0.03
    other.seen.forget()
    assert other.seen.age(60 * MS) == math.inf and other.seen.fault(60 * MS) != ""


@pytest.mark.parametrize(("position", "believed"), [(4.5, True), (4.51, False), (-3.0, True), (-3.01, False)])
def test_a_position_is_possible_within_the_width_of_the_limits_around_them(position, believed):
    assert (Seen().take([position], ["b"])[1] == position) == believed  # limits of -0.5 to 2


def test_what_came_instead_is_told():
    other = Seen()
    assert other.fault == "no joint state yet on joint_states"
    other.take([1.0], ["wheel"])
    assert other.fault == "no joint state for more than 0.1 s; joints wheel came, none of this robot's"
    other.take([1.0, 2.0])
    assert other.fault == "no joint state for more than 0.1 s; 2 positions for 3 names came"


def test_that_they_come_late_is_told_after_a_wrong_value_too():
    other = Seen()
    other.take([0.3, 68.8, 0.5])
    assert "'b' reads 68.8, impossible" in other.fault
    for _ in range(20):
        other.take(PLACE, stamp=other.now - 200 * MS)
    assert other.fault == "no joint state for more than 0.1 s; they come, stamped 0.22 s before this node's clock"


@pytest.mark.parametrize("streamed", [NAMES, ("g",), ()])
def test_a_wrong_message_as_a_hold_ends_moves_nothing(streamed):
    bench = Bench(streamed)
    bench.arm = np.array(PLACE)
    bench.tick(2)
    bench.offer(np.tile(PLACE, (21, 1)))
    bench.tick(250)
    assert bench.player.state == HOLDING
    bench.now += PERIOD
    bench.player.observe(NAMES, [0.0, 0.0, 0.0], bench.now, bench.now)
    bench.offer(np.tile(PLACE, (21, 1)))
    bench.tick(20)
    assert bench.seen == (PLAYING, "")
    np.testing.assert_allclose(bench.trail, np.tile(PLACE, (len(bench.trail), 1)), atol=1e-9)
    for _, plan in bench.plans:
        np.testing.assert_allclose(
            plan.positions, np.tile(PLACE, (len(plan.positions), 1))[:, : plan.positions.shape[1]]
        )


@pytest.mark.parametrize("moved", [0.2, 0.4])
@pytest.mark.parametrize("seen_first", [True, False], ids=["states first", "ticks first"])
def test_after_a_pause_a_trajectory_begins_where_the_arm_is(moved, seen_first):
    bench = Bench(streamed=())
    bench.tick(2)
    bench.lively()
    bench.tick(60)
    bench.now += 2 * SECOND
    bench.arm = arm = bench.player.commanded + [moved, 0, 0]
    bench.plans.clear()
    if seen_first:
        for _ in range(5):
            bench.now += MS
            bench.player.observe(NAMES, arm, bench.now, bench.now)
    for _ in range(80):
        bench.now += PERIOD
        bench.offer(np.tile(arm, (41, 1)))
        commands = bench.player.tick(bench.now)
        if commands is not None and commands.plan is not None:
            np.testing.assert_allclose(commands.plan.positions[:, 0], arm[0], atol=1e-6)
            bench.plans.append(commands.plan)
        bench.player.observe(NAMES, arm, bench.now, bench.now)
    assert bench.plans and bench.seen == (PLAYING, "")


@pytest.fixture
def around():
    return Seen(robot=turning([0.4, 5.8]))


@pytest.mark.parametrize(("least", "most", "limits"), [(-3.141, 3.142, [0.4, 5.8]), (0.0, 6.283, [-2.0, 2.0])])
def test_a_driver_that_tells_angles_within_a_turn_is_believed_at_its_ends(least, most, limits):
    around = Seen(robot=turning(limits))
    for k in range(100):  # noise, at 50 Hz
        told = most if k % 2 else least
        around.take([told, 0.2, 0.5])
        assert around.seen.told[0] == told and around.fault == ""
        np.testing.assert_allclose(
            around.seen.positions[0], sum(limits) / 2 + (0.0 if limits[0] < 0 else 0.04), atol=0.05
        )


@pytest.mark.parametrize("place", [2.0, 0.05, -0.05, 3.05, 6.2])
def test_one_message_that_is_a_turn_off_is_not_believed(around, place):
    around.take([place, 0.2, 0.5])
    for wrong in (place + 2 * np.pi, place - 2 * np.pi, place - 4 * np.pi, 5 + 1e6 * np.pi, np.inf):
        around.take([wrong, 0.2, 0.5])
        assert around.seen.told[0] == place
        for _ in range(60):
            around.take([place, 0.2, 0.5])
    assert around.fault == ""


def test_two_publishers_who_differ_by_turns_are_believed_neither(around):
    for _ in range(30):
        around.take([2.0, 0.2, 0.5])
        around.take([2.0 + 2 * np.pi, 0.2, 0.5], later=1)
    assert around.fault == "joint 'a' is told to be at 2 and 8.28 in turn: do two programs publish joint states?"
