"""The demo robot's trajectory controller: joint_trajectory_controller's rules, in numbers."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pi0_ros.demo.controller import CommandError, Point, TrajectoryController

S = 1_000_000_000
NOW = 100 * S
JOINTS = ("a", "b")


def controller(positions=(0.0, 0.0)) -> TrajectoryController:
    return TrajectoryController(JOINTS, np.array(positions))


def at(target: TrajectoryController, seconds: float) -> list[float]:
    return target.sample(NOW + round(seconds * S))[0].tolist()


def accept(target: TrajectoryController, *points, stamp: float = 0.0, now: float = 0.0, joints=JOINTS) -> None:
    """Points as (seconds from start, positions[, velocities]); stamp 0 stays 0, else seconds after NOW."""
    made = [Point(round(time * S), *rest) for time, *rest in points]
    target.accept(joints, made, stamp and NOW + round(stamp * S), NOW + round(now * S))


def test_holds_its_first_positions_before_any_command():
    assert at(controller((0.5, -0.5)), 3) == [0.5, -0.5]


def test_stamp_zero_starts_now_and_moves_in_a_straight_line_from_the_last_command():
    arm = controller((1.0, 0.0))
    accept(arm, (2.0, [3.0, -1.0]))
    assert at(arm, 0) == [1.0, 0.0]
    assert at(arm, 0.5) == [1.5, -0.25]
    assert at(arm, 2.0) == [3.0, -1.0]
    assert at(arm, 9.0) == [3.0, -1.0]


def test_points_are_timed_from_the_stamp_and_a_future_stamp_ramps_to_the_first_point():
    arm = controller()
    accept(arm, (0.0, [1.0, 1.0]), (1.0, [2.0, 3.0]), stamp=2.0)
    assert at(arm, 1.0) == [0.5, 0.5]
    assert at(arm, 2.0) == [1.0, 1.0]
    assert at(arm, 2.5) == [1.5, 2.0]


def test_a_new_trajectory_replaces_the_old_one_at_once_from_where_the_command_is():
    arm = controller()
    accept(arm, (2.0, [2.0, 2.0]))
    accept(arm, (1.0, [0.0, 2.0]), now=1.0)
    assert at(arm, 1.0) == [1.0, 1.0]
    assert at(arm, 1.5) == [0.5, 1.5]
    assert at(arm, 2.0) == [0.0, 2.0]


def test_a_first_point_already_past_is_entered_where_it_is_now_without_a_bridge():
    arm = controller()
    accept(arm, (0.0, [1.0, 0.0]), (1.0, [3.0, 0.0]), stamp=-0.5)
    assert at(arm, 0) == [2.0, 0.0]


def test_segments_with_velocities_are_cubic():
    arm = controller()
    accept(arm, (0.0, [0.0, 0.0], [1.0, 0.0]), (2.0, [1.0, 1.0], [0.0, 0.0]), stamp=0.0)
    # u = 1/2: (p0 + p1) / 2 + (m0 - m1) / 8 with m = velocity * length.
    position, velocity = arm.sample(NOW + S)
    np.testing.assert_allclose(position, [0.5 + 2 / 8, 0.5])
    np.testing.assert_allclose(velocity, [(1.5 * 1.0 - 0.25 * 2.0) / 2.0, 0.75])


def test_a_bridge_to_a_point_with_velocity_begins_with_the_velocity_commanded_now():
    arm = controller()
    accept(arm, (2.0, [2.0, 2.0]))  # 1 rad/s
    accept(arm, (1.0, [2.0, 2.0], [0.0, 0.0]), now=1.0)
    np.testing.assert_allclose(arm.sample(NOW + S)[1], [1.0, 1.0])
    np.testing.assert_allclose(at(arm, 1.5), [1.5 + 1 / 8, 1.5 + 1 / 8])


def test_joints_are_taken_by_name_in_any_order():
    arm = controller()
    accept(arm, (1.0, [1.0, 2.0]), joints=("b", "a"))
    assert at(arm, 1.0) == [2.0, 1.0]


@pytest.mark.parametrize(
    ("points", "more", "message"),
    [
        ([], {}, "empty trajectory"),
        ([(1.0, [1.0, 1.0])], {"joints": ("a", "c")}, r"\['a', 'c'\]"),
        ([(1.0, [1.0])], {"joints": ("a",)}, "joint names"),
        ([(1.0, [1.0, 1.0])], {"stamp": -2.0}, "ended 1.000 s ago"),
        ([(1.0, [1.0, 1.0]), (1.0, [2.0, 2.0])], {}, "increase strictly"),
        ([(-1.0, [1.0, 1.0])], {}, "increase strictly"),
        ([(1.0, [1.0])], {}, "1 values for 2 joints"),
        ([(1.0, [1.0, float("nan")])], {}, "not finite"),
        ([(1.0, [1.0, 1.0], [float("inf"), 0.0])], {}, "not finite"),
        ([(1.0, [1.0, 1.0], [0.1, 0.0])], {}, "at rest"),
        ([(1.0, [1.0, 1.0], [0.0, 0.0], [0.0, 0.0])], {}, "accelerations"),
    ],
)
def test_a_bad_trajectory_is_refused_and_the_old_one_goes_on(points, more, message):
    arm = controller()
    accept(arm, (2.0, [2.0, 2.0]))
    with pytest.raises(CommandError, match=message):
        accept(arm, *points, **more)
    assert at(arm, 1.0) == [1.0, 1.0]


def test_a_trajectory_that_ends_right_now_is_taken():
    arm = controller()
    accept(arm, (1.0, [1.0, 1.0]), stamp=-1.0)
    assert at(arm, 0) == [1.0, 1.0]


def test_a_position_command_counts_at_once_and_ends_the_trajectory():
    arm = controller()
    accept(arm, (2.0, [2.0, 2.0]))
    arm.hold([0.25, 0.5])
    assert at(arm, 1.0) == [0.25, 0.5]
    with pytest.raises(CommandError, match="3 values for 2 joints"):
        arm.hold([1.0, 2.0, 3.0])
    assert at(arm, 1.0) == [0.25, 0.5]


numbers = st.floats(-3, 3)


@given(
    st.lists(st.tuples(st.integers(1, S), numbers, numbers), min_size=1, max_size=6),
    st.integers(-3 * S, 3 * S),
    numbers,
)
def test_without_velocities_the_command_stays_between_the_points(steps, stamp, start):
    arm = controller((start, start))
    times = np.cumsum([step for step, _, _ in steps])
    points = [Point(int(time), (a, b)) for time, (_, a, b) in zip(times, steps, strict=True)]
    try:
        arm.accept(JOINTS, points, NOW + stamp, NOW)
    except CommandError:
        assert NOW + stamp + times[-1] < NOW
    values = np.array([start, *(value for step in steps for value in step[1:])])
    for time in np.linspace(NOW, NOW + 9 * S, 40).astype(np.int64):
        position = arm.sample(int(time))[0]
        assert position.min() >= values.min() - 1e-9 and position.max() <= values.max() + 1e-9
