"""The limiter: limits hold at every step, targets are reached, still and moving."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pi0_ros.robot_file import load_robot
from pi0_ros.ros.limiter import Limiter, Limits, robot_limits

STEP = 0.01
SLACK = 1e-9


def one(low=-1.0, high=1.0, velocity=2.0, acceleration=10.0) -> Limits:
    return Limits(*(np.array([float(x)]) for x in (low, high, velocity, acceleration, acceleration)))


def follow(limiter: Limiter, q: float, target, steps: int, speed: float = 1.0) -> np.ndarray:
    """[steps, 2] positions and velocities; target(k) is where to be after step k."""
    position, velocity, states = np.array([q]), np.array([0.0]), []
    for k in range(1, steps + 1):
        slope = (target(k + 1e-3) - target(k - 1e-3)) / 2e-3 / limiter.dt
        position, velocity = limiter.step(position, velocity, np.array([target(k)]), np.array([slope]), speed)
        states.append((position[0], velocity[0]))
    return np.array(states)


def test_reaches_a_step_without_overshoot_in_nearly_the_shortest_time():
    states = follow(Limiter(one(), STEP), -0.8, lambda k: 0.7, 300)
    assert states[:, 0].max() <= 0.7 + 1e-6
    # 1.5 rad at 2 rad/s and 10 rad/s^2 takes 0.95 s at best.
    arrived = np.argmax(states[:, 0] > 0.699) * STEP
    assert 0.94 <= arrived <= 1.1
    assert abs(states[-1, 0] - 0.7) < 1e-6 and abs(states[-1, 1]) < 1e-6


def test_follows_a_slow_sine_closely():
    limiter = Limiter(one(), STEP)
    target = lambda k: 0.5 * np.sin(2.0 * k * STEP)  # noqa: E731  at most 1 rad/s and 2 rad/s^2
    states = follow(limiter, 0.0, target, 400)
    wanted = np.array([target(k) for k in range(1, 401)])
    assert np.abs(states[50:, 0] - wanted[50:]).max() < 1e-3


def test_goes_to_the_limit_and_stops_there():
    states = follow(Limiter(one(), STEP), 0.0, lambda k: 50.0 * k, 200)
    assert states[:, 0].max() <= 1.0
    assert states[-1, 0] == pytest.approx(1.0, abs=1e-6)
    assert states[-1, 1] == pytest.approx(0.0, abs=1e-4)


def test_a_motion_and_its_mirror_image_are_the_same():
    targets = [0.9, -0.4, 5.0, 5.0, 0.2, -3.0, -3.0, 0.5]
    limiter = Limiter(one(), STEP)
    there = follow(limiter, 0.0, lambda k: targets[int(k) // 50 % 8], 400)
    back = follow(limiter, 0.0, lambda k: -targets[int(k) // 50 % 8], 400)
    np.testing.assert_allclose(there, -back, atol=1e-12)
    assert there[:, 0].max() == pytest.approx(1.0, abs=1e-6) and there[:, 0].min() == pytest.approx(-1.0, abs=1e-6)


@pytest.mark.parametrize("side", [1.0, -1.0])
def test_speed_cap_holds_in_approach(side):
    states = side * follow(Limiter(one(), STEP), -side, lambda k: side, 800, speed=0.2)
    assert states[:, 1].max() == pytest.approx(0.4)
    assert states[-1, 0] == pytest.approx(1.0, abs=1e-6)


def test_a_limit_is_approached_as_gently_as_the_rest_however_hard_a_stop_may_be():
    gentle = Limits(*(np.array([x]) for x in (-1.0, 1.0, 2.0, 1.0, 10.0)))
    states = follow(Limiter(gentle, STEP), 0.0, lambda k: 0.02 * k, 400)  # a target that runs over the limit
    assert np.abs(np.diff(states[:, 1], prepend=0.0)).max() <= 1.0 * STEP + 1e-9
    assert states[:, 0].max() <= 1.0 and states[-1, 0] == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("side", [1.0, -1.0])
def test_a_target_that_is_behind_is_gone_back_to_however_fast_it_comes(side):
    q, v = Limiter(one(), STEP).step(np.array([0.5 * side]), np.zeros(1), np.zeros(1), np.array([50.0 * side]))
    assert v[0] == pytest.approx(-0.1 * side) and q[0] == pytest.approx(0.4995 * side)


def test_a_joint_outside_its_limits_only_moves_back_in():
    states = follow(Limiter(one(), STEP), 1.2, lambda k: 5.0, 200)
    assert (np.diff(states[:, 0]) <= 0).all()
    assert states[-1, 0] == pytest.approx(1.0, abs=1e-6)


def test_braking_takes_the_shortest_way():
    limiter = Limiter(one(), STEP)
    q, v = np.array([0.0]), np.array([1.0])
    for _ in range(10):
        assert v[0] > 0
        q, v = limiter.brake(q, v)
    assert v[0] == pytest.approx(0.0, abs=1e-12)
    assert q[0] == pytest.approx(1.0**2 / (2 * 10.0))


def test_scales_shrink_the_robot_files_limits():
    robot = load_robot(Path(__file__).parents[1] / "config" / "so101_demo.yaml")
    limits = robot_limits(robot, 0.5, 0.25)
    assert limits.velocity.tolist() == [1.5] * 6
    assert limits.acceleration.tolist() == [5.0] * 6
    assert limits.braking.tolist() == [20.0] * 6  # a stop is as hard as the robot file allows
    assert limits.low[1] == -1.74 and limits.high[5] == 1.745


def test_a_group_of_joints_keeps_its_own_limits_in_its_own_order():
    limits = Limits(*(np.arange(3.0) + 10.0 * k for k in range(5))).of(np.array([2, 0]))
    rows = limits.low, limits.high, limits.velocity, limits.acceleration, limits.braking
    assert [row.tolist() for row in rows] == [[2, 0], [12, 10], [22, 20], [32, 30], [42, 40]]


command = st.tuples(
    st.sampled_from(["step", "brake"]),
    st.floats(-1e300, 1e300),
    st.floats(-1e300, 1e300),
    st.floats(0.01, 1.0),
    st.integers(1, 15),
)
near = st.tuples(
    st.sampled_from(["step", "brake"]), st.floats(-2, 2), st.floats(-5, 5), st.floats(0.01, 1.0), st.integers(1, 15)
)


@settings(max_examples=300, deadline=None)
@given(
    commands=st.lists(command | near, min_size=1, max_size=30),
    start=st.floats(-1, 1),
    span=st.floats(1e-4, 6.0),
    velocity=st.floats(0.01, 10.0),
    acceleration=st.floats(0.1, 100.0),
    step=st.sampled_from([0.002, 0.01, 0.05]),
)
def test_limits_hold_for_any_targets(commands, start, span, velocity, acceleration, step):
    limits = one(-span / 2, span / 2, velocity, acceleration)
    limiter = Limiter(limits, step)
    q, v = np.array([start * span / 2]), np.array([0.0])
    for kind, target, slope, speed, repeat in commands:
        for _ in range(repeat):
            if kind == "step":
                after, w = limiter.step(q, v, np.array([target]), np.array([slope]), speed)
            else:
                after, w = limiter.brake(q, v)
            assert np.isfinite(after).all() and np.isfinite(w).all()
            assert limits.low[0] <= after[0] <= limits.high[0]
            assert abs(w[0]) <= velocity * (1 + SLACK)
            assert abs(w[0] - v[0]) <= acceleration * step * (1 + SLACK) + 1e-12
            # The position is the integral of the velocity: the clip on position is for rounding only.
            assert after[0] == pytest.approx(q[0] + (v[0] + w[0]) * step / 2, abs=1e-12 + 1e-9 * span)
            # Turning points between the grid points lie within the limits too.
            if v[0] * w[0] < 0:
                peak = q[0] + np.sign(v[0]) * v[0] ** 2 / (2 * abs(w[0] - v[0]) / step)
                assert limits.low[0] - SLACK <= peak <= limits.high[0] + SLACK
            q, v = after, w
    for _ in range(int(np.ceil(abs(v[0]) / (acceleration * step))) + 1):
        q, v = limiter.brake(q, v)
    assert abs(v[0]) <= 1e-9
