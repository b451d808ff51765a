"""What a chunk means at a time, and which chunks are refused."""

import math
from dataclasses import replace

import numpy as np
import pytest

from pi0_ros.ros.judging import Offer, Settings, fault_of
from pi0_ros.ros.limiter import Limits
from pi0_ros.ros.playback import Playback, TimedActions

S = 1_000_000_000
WIDE = Limits(np.full(1, -10.0), np.full(1, 10.0), np.full(1, 2.0), np.full(1, 10.0), np.full(1, 10.0))
SETTINGS = Settings(chunk_max_age=1.0, chunk_max_ahead=0.05)


def offer(actions, stamp=0.0, dt=0.1, **changes) -> Offer:
    values = np.asarray(actions, dtype=np.float64)
    made = Offer(round(stamp * S), 0, 0, ("a",), len(values), dt, values.ravel())
    return replace(made, **changes)


def chunk(actions, stamp=0.0, dt=0.1, interpolation="linear") -> TimedActions:
    return TimedActions(offer(actions, stamp, dt), WIDE, interpolation)


def at(motion, seconds) -> tuple[float, float]:
    position, velocity = motion.at(round(seconds * S))
    return float(position[0]), float(velocity[0])


def test_an_action_is_reached_at_its_own_time():
    motion = chunk([0.0, 1.0, 3.0], stamp=5.0)
    assert at(motion, 5.1) == pytest.approx((1.0, 20.0))
    assert at(motion, 5.05) == pytest.approx((0.5, 10.0))
    assert [motion.past(round(t * S)) for t in (4.9, 5.05, 5.25)] == pytest.approx([0.0, 0.5, 2.5])


def test_outside_its_time_a_chunk_stands_still():
    motion = chunk([1.0, 2.0], stamp=5.0)
    assert at(motion, 4.0) == (1.0, 0.0)
    assert at(motion, 9.0) == (2.0, 0.0)
    assert at(chunk([1.0]), 0.0) == (1.0, 0.0)


def test_cubic_passes_through_the_actions_without_a_step_in_velocity():
    actions = [0.0, 1.0, 0.5, 2.0, 2.0]
    motion = chunk(actions, interpolation="cubic")
    for k, action in enumerate(actions):
        assert at(motion, 0.1 * k)[0] == pytest.approx(action)
    for k in range(1, 4):
        assert at(motion, 0.1 * k - 1e-8)[1] == pytest.approx(at(motion, 0.1 * k)[1], abs=1e-4)
    slopes = [10.0, 2.5, 5.0, 7.5, 0.0]  # central differences; at the ends the one step that there is
    assert [at(motion, t)[1] for t in (0.0, 0.1, 0.2, 0.3, 0.4 - 1e-8)] == pytest.approx(slopes, abs=1e-4)
    # The velocity is the derivative of the position.
    slope = (at(motion, 0.2301)[0] - at(motion, 0.2299)[0]) / 2e-4
    assert at(motion, 0.23)[1] == pytest.approx(slope, rel=1e-4)


def test_actions_beyond_the_limits_are_clamped_even_when_huge():
    motion = chunk([1e308, -1e308])
    assert at(motion, 0.0)[0] == 10.0 and at(motion, 0.1)[0] == -10.0


def test_blend_begins_at_the_old_motion_and_ends_at_the_new_chunk():
    playback = Playback(WIDE.velocity, "blend", blend_time=0.2, decay=0.0)
    playback.push(chunk(np.linspace(0, 2, 21)), 0)  # 1 rad/s
    before = playback.at(round(0.5 * S))
    playback.push(chunk(np.full(21, 0.7)), round(0.5 * S))
    playback.join(round(0.5 * S), *before)
    assert at(playback, 0.5) == pytest.approx((0.5, 1.0))
    times = np.linspace(0.5, 0.8, 301)
    positions = np.array([at(playback, t)[0] for t in times])
    assert np.abs(np.diff(positions)).max() < 2.5e-3
    assert at(playback, 0.7) == pytest.approx((0.7, 0.0))
    slope = (at(playback, 0.6001)[0] - at(playback, 0.5999)[0]) / 2e-4
    assert at(playback, 0.6)[1] == pytest.approx(slope, rel=1e-4)


def test_a_blend_that_is_blended_over_has_no_step():
    playback = Playback(WIDE.velocity, "blend", blend_time=0.3, decay=0.0)
    playback.push(chunk(np.zeros(21)), 0)
    for k, value in enumerate((0.1, -0.1, 0.2), start=1):  # every 0.1 s
        moment = round(0.1 * k * S)
        before = playback.at(moment)
        playback.push(chunk(np.full(21, value)), moment)
        playback.join(moment, *before)
        assert at(playback, 0.1 * k) == pytest.approx((float(before[0][0]), float(before[1][0])))
    assert at(playback, 0.6) == pytest.approx((0.2, 0.0))


def test_a_chunk_with_the_same_actions_as_the_old_one_changes_nothing():
    # Real-time chunking: what was frozen from the previous chunk joins it without a seam.
    path = np.linspace(0, 2, 21)
    playback = Playback(WIDE.velocity, "blend", blend_time=0.2, decay=0.0)
    playback.push(chunk(path), 0)
    expected = [at(playback, t)[0] for t in (0.5, 0.55, 0.6)]
    moment = round(0.5 * S)
    before = playback.at(moment)
    playback.push(chunk(path[5:], stamp=0.5), moment)
    playback.join(moment, *before)
    assert [at(playback, t)[0] for t in (0.5, 0.55, 0.6)] == pytest.approx(expected)


def test_switch_takes_the_new_chunk_at_once():
    playback = Playback(WIDE.velocity, "switch", blend_time=0.2, decay=0.0)
    playback.push(chunk(np.zeros(21)), 0)
    playback.push(chunk(np.ones(21)), round(0.5 * S))
    playback.join(round(0.5 * S), np.zeros(1), np.zeros(1))
    assert at(playback, 0.5) == (1.0, 0.0)


def test_ensemble_weights_chunks_exponentially_oldest_first():
    playback = Playback(WIDE.velocity, "ensemble", blend_time=0.1, decay=0.5)
    for k, value in enumerate((1.0, 2.0, 4.0)):
        playback.push(chunk(0.1 * value * np.arange(41)), round(0.3 * k * S))  # `value` rad/s
    w = [math.exp(-0.5 * i) for i in range(3)]
    expected = (w[0] * 1.0 + w[1] * 2.0 + w[2] * 4.0) / sum(w)
    assert at(playback, 1.5) == pytest.approx((1.5 * expected, expected))


def test_ensemble_stands_where_the_newest_chunk_ends_once_all_are_over():
    playback = Playback(WIDE.velocity, "ensemble", blend_time=0.1, decay=0.01)
    playback.push(chunk(np.full(11, 1.0)), 0)  # until 1.0 s
    playback.push(chunk(np.full(11, 2.0), stamp=0.5), round(0.5 * S))  # until 1.5 s
    assert at(playback, 1.5) == at(playback, 9.0) == (2.0, 0.0)


def test_ensemble_has_no_step_where_chunks_come_and_go():
    playback = Playback(WIDE.velocity, "ensemble", blend_time=0.1, decay=0.01)
    playback.push(chunk(np.full(11, 1.0)), 0)  # until 1.0 s
    first = [at(playback, t)[0] for t in np.arange(0.0, 0.5, 1e-3)]
    playback.push(chunk(np.full(11, 2.0), stamp=0.5), round(0.5 * S))  # until 1.5 s
    rest = [at(playback, t)[0] for t in np.arange(0.5, 1.5, 1e-3)]
    positions = np.array(first + rest)
    assert np.abs(np.diff(positions)).max() < 0.02
    assert positions[0] == 1.0 and positions[-1] == 2.0
    # Three quarters grown, and once it has grown a chunk weighs no more.
    assert positions[[575, 615, 700]] == pytest.approx([1.4261, 1.4975, 1.4975], abs=1e-3)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"joint_names": ("b",)}, "joints ['b'] are not ['a']"),
        ({"joint_names": ("a", "b")}, "joints ['a', 'b'] are not ['a']"),
        ({"horizon": 3}, "2 values are not horizon 3 times 1 joints"),
        ({"horizon": 0}, "2 values are not horizon 0 times 1 joints"),
        ({"horizon": 0, "actions": np.zeros(0)}, "0 values are not horizon 0 times 1 joints"),
        ({"dt": 0.0}, "dt is 0.0 s"),
        ({"dt": -0.1}, "dt is -0.1 s"),
        ({"dt": 0.0009}, "dt is 0.0009 s, must be from 0.001 to 10"),
        ({"dt": 10.1}, "dt is 10.1 s, must be from 0.001 to 10"),
        ({"dt": math.nan}, "dt is nan s"),
        ({"dt": math.inf}, "dt is inf s"),
        ({"actions": np.array([0.0, math.nan])}, "action 1 of joint 'a' is nan"),
        ({"actions": np.array([-math.inf, 0.0])}, "action 0 of joint 'a' is -inf"),
        ({"stamp": -2 * S}, "its observation is 2.000 s old, at most 1 s"),
        ({"stamp": S}, "its stamp is 1.000 s in the future, at most 0.05 s"),
    ],
)
def test_a_bad_chunk_is_refused_with_the_reason(change, words):
    good = offer([0.0, 0.1])
    assert fault_of(good, ("a",), WIDE, SETTINGS, 0) is None
    assert words in fault_of(replace(good, **change), ("a",), WIDE, SETTINGS, 0)


@pytest.mark.parametrize(
    "change",
    [{"stamp": -S}, {"stamp": S // 20}, {"dt": 0.001}, {"dt": 10.0}, {"actions": np.zeros(1), "horizon": 1}],
    ids=["oldest", "furthest ahead", "shortest dt", "longest dt", "one action"],
)
def test_a_chunk_just_within_what_is_allowed_is_played(change):
    assert fault_of(replace(offer([0.0, 0.1]), **change), ("a",), WIDE, SETTINGS, 0) is None


@pytest.mark.parametrize(
    ("actions", "words"),
    [
        ([0.0, 10.01], "position of joint 'a' at action 1 is 10.01, beyond"),
        ([0.0, -10.01], "position of joint 'a' at action 1 is -10.01, beyond"),
        ([0.0, 0.201], "velocity of joint 'a' at action 0 is 2.01/s, beyond"),
        ([0.0, -0.201], "velocity of joint 'a' at action 0 is -2.01/s, beyond"),
        ([0.0, 0.0501, 0.0], "acceleration of joint 'a' at action 0 is -10.02/s^2, beyond"),
        ([0.0, -0.0501, 0.0], "acceleration of joint 'a' at action 0 is 10.02/s^2, beyond"),
        ([1e308, -1e308], "position of joint 'a' at action 0"),
        ([0.0, 0.05, 0.1], None),
        ([10.0, 10.0], None),  # the limits themselves
        ([-10.0, -10.0], None),
        ([0.0, 0.2, 0.4], None),
        ([0.0, 0.1, 0.1], None),
    ],
)
def test_limits_refuse_judges_the_actions_themselves(actions, words):
    fault = fault_of(offer(actions), ("a",), WIDE, replace(SETTINGS, limits="refuse"), 0)
    assert fault is None if words is None else words in fault
