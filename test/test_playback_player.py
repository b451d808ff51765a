"""The player without ROS: what it commands and why, tick by tick on a made-up clock."""

import numpy as np
import pytest
from playback_kit import NAMES, PERIOD, ROBOT, VELOCITY, Bench, check_limits, check_plans, turning

from pi0_ros.robot import State
from pi0_ros.ros.judging import SECOND, Offer
from pi0_ros.ros.player import APPROACHING, DRY_RUN, HOLDING, PLAYING, STOPPED


def test_follows_a_chunk_by_its_stamps_however_late_it_comes():
    bench = Bench()
    bench.tick(5)
    ramp = np.stack([np.arange(41) * 0.02, np.arange(41) * 0.01, np.full(41, 0.2)], axis=1)  # 0.4 and 0.2 rad/s
    observed = bench.now - round(0.3 * SECOND)
    assert bench.offer(ramp, age=0.3) == ""
    assert bench.player.seconds_left(bench.now) == pytest.approx(1.7)
    bench.tick(60)
    assert bench.seen == (PLAYING, "")
    elapsed = (bench.now - observed) / SECOND
    np.testing.assert_allclose(bench.arm, [0.4 * elapsed, 0.2 * elapsed, 0.2], atol=1e-3)
    # Taken over at the first tick after it came: 0.31 s or 6.2 actions after its stamp.
    assert bench.player.handover_delay == pytest.approx(6.2)
    assert bench.player.seconds_left(bench.now) == pytest.approx(2.0 - elapsed)
    check_limits(bench.trail)


def test_holds_when_the_chunk_runs_out_and_says_so():
    bench = Bench()
    bench.tick(2)
    bench.lively()
    bench.tick(150)
    assert bench.seen == (PLAYING, "")
    bench.tick(60)
    assert bench.seen == (HOLDING, "the chunk ended and no new one came")
    assert bench.player.holds == 1 and bench.player.seconds_left(bench.now) == 0.0
    still = bench.arm.copy()
    bench.tick(50)
    np.testing.assert_array_equal(bench.arm, still)
    check_limits(bench.trail)


def test_the_last_action_may_stand_for_a_while_before_that_counts_as_a_hold():
    bench = Bench(hold_after=1.0)
    bench.tick(2)
    bench.offer(np.tile([0.1, 0.0, 0.5], (21, 1)))  # until 1 s
    bench.tick(199)
    assert bench.seen == (PLAYING, "") and bench.player.holds == 0
    bench.tick(3)
    assert bench.seen == (HOLDING, "the chunk ended and no new one came") and bench.player.holds == 1
    assert bench.offer(np.tile([0.1, 0.0, 0.5], (2, 1)), age=0.5) == ""  # over since 0.45 s
    bench.tick(2)
    assert bench.seen == (PLAYING, "")


def test_a_policy_that_says_that_it_lives_may_let_a_chunk_be_played_to_its_end():
    bench = Bench(policy_timeout=0.5)
    bench.tick(2)
    bench.lively()
    for _ in range(19):
        bench.tick(10)
        assert bench.seen == (PLAYING, "")
        assert bench.offer(np.empty((0, 3)), sequence=0) == ""
    assert "its sequence is not above 0" in bench.offer(np.zeros((41, 3)), sequence=0)
    bench.tick(20)
    assert bench.seen[0] == HOLDING and bench.seen[1].startswith("the chunk ended and no new one came")


def test_a_chunk_whose_actions_are_missing_is_refused_and_no_sign_of_life():
    bench = Bench(policy_timeout=0.5)
    bench.tick(2)
    bench.lively()
    for k in range(6):
        bench.tick(10)
        broken = Offer(bench.now, k + 1, 0, NAMES, 5, 0.05, np.empty(0))
        assert bench.player.offer(broken, bench.now).endswith("0 values are not horizon 5 times 3 joints")
    assert bench.seen[0] == HOLDING and bench.seen[1].startswith("no chunk from the policy for 0.5 s")


def test_a_chunk_without_actions_of_an_older_epoch_says_nothing():
    bench = Bench(policy_timeout=0.5)
    bench.tick(2)
    bench.offer(np.zeros((41, 3)), epoch=4)
    for _ in range(6):
        bench.tick(10)
        assert bench.offer(np.empty((0, 3)), epoch=3) == ""
    assert bench.seen == (HOLDING, "no chunk from the policy for 0.5 s")
    assert "its epoch 3 is older than 4" in bench.offer(np.zeros((41, 3)), epoch=3)


def test_holds_when_the_policy_is_silent_for_too_long():
    bench = Bench(policy_timeout=0.5)
    bench.tick(2)
    bench.lively()
    bench.tick(49)
    assert bench.player.state == PLAYING
    bench.tick(5)
    assert bench.seen == (HOLDING, "no chunk from the policy for 0.5 s")
    bench.tick(60)
    assert bench.player.at_rest and bench.player.holds == 1
    check_limits(bench.trail)


def test_holds_while_joint_states_are_missing_and_goes_on_after():
    bench = Bench()
    bench.tick(2)
    bench.lively()
    bench.tick(30)
    bench.sensing = False
    bench.tick(30)
    assert bench.seen == (HOLDING, "no joint state for more than 0.1 s")
    assert bench.player.at_rest and bench.player.holds == 0
    bench.sensing = True
    bench.tick(50)
    assert bench.seen == (PLAYING, "")
    # It is still the same chunk, taken over a period after its stamp.
    assert bench.player.played == 1 and bench.player.handover_delay == pytest.approx(0.2)
    check_limits(bench.trail)


def test_an_arm_that_sags_far_is_played_to_within_the_following_error():
    bench = Bench()
    bench.sag = np.array([-0.3, 0.0, 0.0])
    bench.tick(2)
    bench.offer(np.zeros((41, 3)))
    for _ in range(190):
        bench.tick()
        assert bench.seen == (PLAYING, "")


def test_names_the_joint_whose_state_is_missing():
    bench = Bench()
    bench.sensing = False
    for _ in range(5):
        bench.now += PERIOD
        bench.player.observe(["g", "x", "a"], [0.5, 9.0, 0.1], bench.now, bench.now)
        assert bench.player.tick(bench.now) is None
    assert bench.seen == (HOLDING, "no joint state of b for more than 0.1 s")
    for nonsense in (float("nan"), float("inf"), 50.0, -1e300):  # never what is held
        bench.player.observe(["b"], [nonsense], bench.now, bench.now)
        assert bench.player.tick(bench.now + PERIOD) is None
    bench.player.observe(["b"], [-0.1], bench.now, bench.now)
    bench.player.tick(bench.now + 2 * PERIOD)
    assert bench.player.commanded.tolist() == [0.1, -0.1, 0.5]


def test_joint_states_from_another_clock_are_not_believed():
    bench = Bench()
    bench.player.observe(NAMES, [0, 0, 0], bench.now + 60 * SECOND, bench.now)
    bench.player.tick(bench.now)
    assert "stamped 60 s ahead of this node's clock" in bench.player.reason
    assert bench.player.commanded is None


def test_a_far_first_action_is_approached_at_limited_speed_then_played():
    bench = Bench(approach_speed=0.2)
    bench.tick(2)
    bench.offer(np.tile([0.8, 0.0, 1.0], (61, 1)))
    bench.tick(1)
    state, reason = bench.seen
    assert state == APPROACHING and "joint 'a' is 0.8 from where chunk 0 begins, more than 0.25" in reason
    while bench.player.state == APPROACHING:
        bench.tick()
    speeds = np.abs(np.diff(np.array(bench.trail), axis=0)) / 0.01
    assert (speeds.max(axis=0) <= 0.2 * VELOCITY + 1e-6).all() and speeds[:, 0].max() > 0.39
    assert bench.player.state == PLAYING and bench.arm[0] > 0.7
    bench.tick(35)
    assert bench.arm[0] == pytest.approx(0.8, abs=0.01)
    check_limits(bench.trail)


def test_chunks_that_come_during_an_approach_do_not_hasten_it():
    bench = Bench(approach_speed=0.2)
    bench.tick(2)
    for _ in range(12):
        bench.offer(np.tile([0.8, 0.0, 0.5], (41, 1)))
        bench.tick(10)
        assert bench.player.state == APPROACHING
    assert np.diff(np.array(bench.trail)[:, 0]).max() <= 0.2 * 2.0 * 0.01 + 1e-9
    assert bench.arm[0] > 0.45


def test_after_an_approach_the_same_chunk_is_played_at_full_speed():
    bench = Bench(approach_speed=0.2)
    bench.tick(2)
    way = np.full(61, 0.8)
    way[40:51], way[51:] = np.linspace(0.8, -0.2, 11), -0.2  # within half a second, at 2 rad/s
    bench.offer(np.stack([way, 0 * way, 0 * way], axis=1))
    bench.tick(195)
    assert bench.seen == (PLAYING, "")
    bench.tick(60)
    assert np.abs(np.diff(np.array(bench.trail)[:, 0])).max() / 0.01 > 1.8
    check_limits(bench.trail)


@pytest.mark.parametrize("streamed", [NAMES, (), ("a",)], ids=["positions", "trajectories", "both"])
def test_from_the_approach_to_playing_an_arm_goes_on_at_its_speed(streamed):
    bench = Bench(streamed)
    bench.tick(2)
    bench.offer(np.tile([0.8, 0.0, 0.5], (81, 1)))
    bench.tick()
    while bench.player.state == APPROACHING:
        bench.tick()
    begun = len(bench.trail) - 2
    bench.tick(60)
    speeds = np.diff(np.array(bench.trail)[begun:, 0]) / 0.01
    assert speeds[0] == pytest.approx(0.4) and np.diff(speeds).max() < 0.02
    assert bench.arm[0] == pytest.approx(0.8, abs=1e-4)


def test_an_ensemble_approaches_its_newest_chunk_alone():
    bench = Bench(handover="ensemble")
    bench.tick(2)
    bench.offer(np.zeros((41, 3)))
    bench.tick(30)
    bench.offer(np.tile([0.8, 0.0, 0.0], (41, 1)))
    bench.tick()
    assert bench.player.state == APPROACHING
    while bench.player.state == APPROACHING:
        bench.tick()
    assert bench.seen == (PLAYING, "") and bench.arm[0] > 0.7


def test_an_ensemble_plays_until_its_newest_chunk_ends():
    bench = Bench(handover="ensemble")
    bench.tick(2)
    for _ in range(2):  # until 2 s, and until 3 s
        bench.offer(np.zeros((41, 3)))
        bench.tick(100)
    bench.tick(90)
    assert bench.seen == (PLAYING, "") and bench.player.seconds_left(bench.now) == pytest.approx(0.1)
    bench.tick(20)
    assert bench.seen == (HOLDING, "the chunk ended and no new one came")


def test_a_gripper_that_closes_at_once_is_no_approach():
    bench = Bench()
    bench.tick(2)
    bench.offer(np.tile([0.0, 0.0, 1.0], (41, 1)))
    bench.tick(60)
    assert bench.seen == (PLAYING, "")
    assert bench.arm[2] == pytest.approx(1.0, abs=1e-3)


def test_stop_brakes_within_the_limits_and_only_start_goes_on():
    bench = Bench()
    bench.tick(2)
    bench.lively()
    bench.tick(30)
    moving = bench.trail[-1] - bench.trail[-2]
    assert np.abs(moving[0]) > 0.005
    before = bench.sends
    bench.player.stop("stop service")
    bench.tick(40)
    assert bench.player.at_rest and 8 <= bench.sends - before < 20  # b goes at 0.33 rad/s: each step of it is sent
    sent = bench.sends
    bench.lively()
    bench.tick(30)
    assert bench.seen == (STOPPED, "stop service") and bench.sends == sent
    bench.player.start()
    bench.tick(1)
    assert bench.seen == (HOLDING, "no chunk yet")
    bench.lively()
    bench.tick(5)
    assert bench.player.state in (PLAYING, APPROACHING)
    check_limits(bench.trail)


def test_starts_from_where_the_arm_is_when_it_was_moved_meanwhile():
    bench = Bench()
    bench.tick(2)
    bench.lively()
    bench.tick(30)
    bench.player.stop("stop service")
    bench.tick(40)
    bench.arm = np.array([-0.9, 1.5, 0.5])
    bench.player.start()
    for _ in range(2):  # one alone may be a wrong message
        bench.now += PERIOD
        bench.player.observe(NAMES, bench.arm, bench.now, bench.now)
    bench.offer(np.tile([-0.9, 1.5, 0.5], (41, 1)))
    bench.now += PERIOD
    bench.player.tick(bench.now)
    np.testing.assert_allclose(bench.player.commanded[:2], [-0.9, 1.5])
    assert bench.seen == (PLAYING, "")


def test_after_a_start_nothing_is_sent_before_a_chunk_which_then_begins_where_the_arm_is():
    bench = Bench()
    bench.sag = np.array([0.0, 0.0, -0.6])  # the gripper holds something
    bench.offer([[0.0, 0.0, 1.0]] * 21)
    bench.tick(60)
    bench.player.stop("stop service")
    bench.tick(150)
    bench.sensing = False
    bench.now += SECOND
    bench.player.start()
    before = bench.sends
    bench.tick(5)
    assert bench.sends == before and bench.player.blind
    bench.arm = np.array([0.2, -0.1, 0.4])  # moved by another program
    bench.sensing = True
    bench.tick(5)
    assert bench.sends == before and not bench.player.blind
    bench.offer([[0.2, -0.1, 1.0]] * 21)
    bench.tick(5)
    assert bench.sends == before + 5
    np.testing.assert_allclose(bench.trail[-5:], np.tile([0.2, -0.1, 1.0], (5, 1)), atol=1e-6)


def test_before_any_chunk_a_gripper_that_holds_something_is_not_told_where_that_stopped_it():
    bench = Bench()
    bench.arm = np.array([0.1, 0.0, 0.42])
    bench.tick(20)
    assert bench.seen == (HOLDING, "no chunk yet") and bench.sends == 0


def test_a_chunk_that_is_over_before_the_arm_is_seen_is_not_taken_over():
    bench = Bench()
    bench.sensing, bench.arm = False, np.array([0.1, 0.0, 0.42])
    bench.offer(np.tile([0.1, 0.0, 1.0], (11, 1)))
    bench.tick(60)
    bench.sensing = True
    bench.tick(20)
    assert bench.seen == (HOLDING, "no chunk yet") and bench.player.played == bench.player.holds == 0
    assert bench.sends == 0


@pytest.mark.parametrize("streamed", [NAMES, ()], ids=["positions", "trajectories"])
def test_an_arm_that_sags_is_not_let_down_at_every_start(streamed):
    bench = Bench(streamed)
    bench.sag = np.array([-0.05, -0.1, 0.0])
    bench.tick(2)
    for _ in range(4):  # until that it sags is its way
        bench.lively()
        bench.tick(180)
    bench.lively()
    bench.tick(30)
    for _ in range(3):
        bench.player.stop("stop service")
        bench.tick(150)
        bench.player.start()
        bench.tick(5)
    at = bench.trail[-1]
    check_limits(bench.trail)
    bench.offer(np.tile(at, (41, 1)))
    bench.tick(20)
    check_limits(bench.trail)
    if streamed == ():
        check_plans(bench.plans, (0, 1, 2))
    np.testing.assert_allclose(bench.trail[-1], at, atol=1e-6)


@pytest.mark.parametrize("wait", [0, 200], ids=["at once", "once settled"])
@pytest.mark.parametrize("streamed", [NAMES, ()], ids=["positions", "trajectories"])
def test_what_is_moved_while_nothing_ticks_is_held_where_it_is_when_that_begins_again(streamed, wait):
    bench = Bench(streamed)
    bench.sag = np.array([-0.05, 0.0, -0.4])  # the gripper squeezes
    bench.tick(2)
    bench.lively()
    bench.tick(30)
    bench.player.stop("deactivated")
    while not bench.player.at_rest:
        bench.tick()
    bench.tick(wait)
    arm = bench.arm.copy()
    for k in range(300):  # the node is inactive, joint states still come
        bench.now += PERIOD
        if wait or k > 10:
            arm[0] += 0.2 / 300
        bench.player.observe(NAMES, arm, bench.now, bench.now)
    bench.arm, gripper = arm, bench.player.commanded[2]
    bench.player.start()
    bench.now += PERIOD
    bench.player.observe(NAMES, arm, bench.now, bench.now)
    bench.player.tick(bench.now)
    np.testing.assert_allclose(bench.player.commanded, [*arm[:2], gripper])


@pytest.mark.parametrize("lost", [20, 40, 60])
def test_joint_states_that_stay_away_for_a_moment_neither_move_the_arm_nor_open_the_gripper(lost):
    bench = Bench(policy_timeout=0.0)
    bench.sag = np.array([0.0, 0.0, 0.4])  # the gripper squeezes
    bench.tick(2)
    time = np.arange(41) * 0.05
    bench.offer(np.stack([-0.9 + 0.9 * time, 0 * time, 0 * time], axis=1), age=0.9)
    bench.tick(30)
    bench.sensing = False
    bench.tick(lost)
    bench.sensing = True
    bench.tick(20)
    bench.offer(np.tile([*bench.player.commanded[:2], 0.0], (41, 1)))
    bench.tick(30)
    check_limits(bench.trail)
    assert bench.player.commanded[2] == 0


@pytest.mark.parametrize("streamed", [NAMES, ()], ids=["positions", "trajectories"])
@pytest.mark.parametrize("distance", [0.3, 0.8])
def test_an_arm_that_was_moved_while_it_was_not_seen_is_not_taken_back(streamed, distance):
    bench = Bench(streamed, policy_timeout=0.0)
    bench.tick(2)
    bench.lively()
    bench.tick(30)
    bench.sensing = False
    bench.tick(200)  # past the chunk's end
    before, plans = bench.sends, len(bench.plans)
    place = bench.arm + [0.0, distance, 0.0]
    bench.sensing = True
    for _ in range(150):
        bench.arm = place.copy()  # its drives are off
        bench.tick()
        if bench.sends > before or len(bench.plans) > plans:
            break
    assert bench.player.state == HOLDING
    np.testing.assert_allclose(bench.player.commanded[:2], place[:2])
    bench.arm = place.copy()
    bench.offer(np.tile(place, (41, 1)))
    bench.tick(2)
    assert bench.seen == (PLAYING, "")
    np.testing.assert_allclose(bench.player.commanded[:2], place[:2])
    assert all(np.abs(plan.positions[0, :2] - place[:2]).max() < 1e-6 for _, plan in bench.plans[plans:])


def test_an_arm_that_only_lags_is_not_taken_for_moved():
    bench = Bench(policy_timeout=0.0)
    bench.tick(2)
    time = np.arange(11) * 0.05
    bench.offer(np.stack([-0.9 + 1.8 * time, 0 * time, 0.5 + 0 * time], axis=1), age=0.1)
    late = [np.zeros(3)] * 16
    for k in range(120):
        bench.tick()
        late = [*late[1:], bench.player.commanded.copy()]
        bench.arm = late[0]  # 160 ms behind
        if bench.player.state == HOLDING and bench.player.at_rest and k > 60:
            bench.offer(np.tile(bench.player.commanded, (41, 1)))
    assert bench.player.played > 1
    check_limits(bench.trail)


def test_an_arm_that_lags_is_gone_on_with_at_once_when_a_chunk_comes_just_after_the_last_one_ended():
    bench = Bench()
    bench.tick(2)
    time = np.arange(11) * 0.05
    bench.offer(np.stack([0.9 * time, 0 * time, 0.5 + 0 * time], axis=1))
    late = [np.zeros(3)] * 18
    for _ in range(60):
        bench.tick()
        late = [*late[1:], bench.player.commanded.copy()]
        bench.arm = late[0]
        if bench.player.state == HOLDING and bench.player.at_rest:
            break
    assert bench.player.commanded[0] - bench.arm[0] > 0.08  # it is still on its way
    bench.offer(np.tile(bench.player.commanded, (21, 1)))
    bench.tick()
    assert bench.seen == (PLAYING, "")
    check_limits(bench.trail)


def test_an_arm_that_does_not_follow_is_stopped_until_somebody_starts_it():
    bench = Bench(following_error=0.3)
    bench.tick(2)
    time = np.arange(41) * 0.05
    bench.offer(np.stack([0.9 * np.minimum(time, 1), 0 * time, 0 * time], axis=1))
    stuck = np.array([0.0, 0.0, 0.0])
    for _ in range(80):
        bench.tick()
        bench.arm = stuck.copy()  # an emergency stop
    why = "the arm does not follow: joint 'a' is more than 0.3 from its command; call ~/start to resume"
    assert bench.seen == (STOPPED, why)
    assert bench.player.at_rest and bench.player.commanded[0] < 0.4
    sent = bench.sends
    bench.offer(np.tile([0.1, 0.0, 0.0], (41, 1)))
    bench.tick(1)
    assert bench.seen == (STOPPED, why) and bench.sends == sent
    bench.offer([[np.nan, 0.0, 0.0]] * 2)
    assert "refused chunk" in bench.player.reason
    bench.player.start()
    assert bench.seen == (HOLDING, "no chunk yet") and bench.player.refused_sequence is None
    bench.arm = stuck.copy()
    bench.tick(1)
    assert bench.seen == (HOLDING, "the arm is not yet at rest where it was told") and bench.sends == sent
    for _ in range(100):
        bench.arm = stuck.copy()
        bench.tick()
    bench.offer(np.tile([0.1, 0.0, 0.0], (41, 1)))
    bench.tick(1)
    assert bench.seen == (PLAYING, "")
    assert abs(bench.player.commanded[0]) < 0.01  # from where the arm is


def test_a_stopped_player_does_not_complain_of_joint_states_for_ever():
    bench = Bench()
    bench.player.tick(bench.now)
    assert bench.player.blind
    bench.player.stop("stop service")
    bench.tick(3)
    assert bench.seen == (STOPPED, "stop service") and not bench.player.blind


def test_an_arm_that_was_moved_while_it_was_held_is_not_taken_back():
    bench = Bench(following_error=0.3)
    bench.tick(10)
    bench.offer([[0.0, 0.0, 1.0]] * 21)
    bench.tick(120)
    assert bench.seen == (HOLDING, "the chunk ended and no new one came")
    before = bench.sends
    bench.arm = np.array([0.03, 0.0, 1.0])  # it gives a little: the command goes on
    bench.tick()
    assert bench.sends == before + 1
    for _ in range(5):
        bench.arm = np.array([0.8, 0.0, 0.4])  # by hand, with the controller off
        bench.tick()
    assert bench.player.state == HOLDING and bench.sends == before + 2  # the first such state is not believed yet
    bench.arm = np.array([0.8, 0.0, 0.4])
    bench.offer(np.tile([0.8, 0.0, 0.4], (41, 1)))
    bench.tick()
    assert bench.sends == before + 3
    np.testing.assert_allclose(bench.player.commanded[:2], [0.8, 0.0])


def test_an_arm_that_was_moved_a_little_after_it_had_settled_is_not_taken_back_either():
    bench = Bench()
    bench.sag = np.array([0.1, 0.0, 0.0])
    bench.tick(120)
    before, at = bench.sends, bench.arm
    bench.arm = at + [0.08, 0.0, 0.0]
    bench.tick()
    bench.tick(10)  # let go: it swings back
    assert bench.player.state == HOLDING and bench.sends == before
    bench.sag = np.zeros(3)
    bench.arm = at + [0.08, 0.0, 0.0]
    bench.offer(np.tile(bench.arm, (41, 1)))
    bench.tick()
    assert bench.sends == before + 1
    np.testing.assert_allclose(bench.player.commanded, bench.arm)


def test_what_is_not_seen_is_not_commanded_once_it_is_at_rest():
    bench = Bench()
    bench.tick(2)
    bench.lively()
    bench.tick(20)
    bench.sensing = False
    bench.tick(60)  # brakes
    assert bench.player.blind and bench.player.at_rest
    sent = bench.sends
    bench.tick(100)
    assert bench.sends == sent
    check_limits(bench.trail)


def test_thresholds_count_a_fifth_in_metres():
    linear = ROBOT.joints[0].model_copy(update={"kind": "prismatic"})
    robot = ROBOT.model_copy(update={"joints": (linear, *ROBOT.joints[1:])})
    for distance, state in ((0.06, APPROACHING), (0.04, PLAYING)):
        bench = Bench(robot=robot)
        bench.tick(2)
        bench.offer([[distance, 0.0, 0.0]] * 21)
        bench.tick()
        assert bench.player.state == state
        assert ("begins, more than 0.05" in bench.player.reason) == (state == APPROACHING)


def test_what_untrained_weights_make_is_played_on_a_simulated_arm_only():
    bench = Bench()
    assert "untrained random weights made it" in bench.offer([[0.0, 0.0, 0.0]] * 21, untrained=True)
    for allowed in ("play_untrained", "dry_run"):
        assert Bench(**{allowed: True}).offer([[0.0, 0.0, 0.0]] * 21, untrained=True) == ""


def test_joint_states_from_a_clock_that_is_ahead_are_as_old_as_their_arrival():
    bench = Bench()
    for _ in range(20):
        bench.now += PERIOD
        bench.player.observe(NAMES, [0, 0, 0], bench.now + round(0.4 * SECOND), bench.now)
        bench.player.tick(bench.now)
    assert bench.player.reason == "no chunk yet"
    bench.sensing = False
    bench.tick(12)  # 0.12 s, max_age is 0.1 s
    assert bench.player.reason == "no joint state for more than 0.1 s"


def test_not_started_means_nothing_is_sent():
    bench = Bench(start=False)
    bench.lively()
    assert bench.player.seconds_left(bench.now) == 0.0
    bench.tick(20)
    assert bench.seen == (STOPPED, "not started") and bench.trail == [] and bench.plans == []


@pytest.mark.parametrize("streamed", [NAMES, ()], ids=["positions", "trajectories"])
def test_an_arm_that_a_hand_brings_back_inside_waits_for_the_hand_to_rest(streamed):
    bench = Bench(streamed)
    for k in range(200):
        bench.arm = np.array([max(1.6 - 0.005 * k, 0.9), 0.0, 0.5])
        if k % 10 == 0:
            bench.offer(np.tile(np.clip(bench.arm, -1, 1), (41, 1)))
        told = bench.sends, len(bench.plans)
        bench.tick()
        if (bench.sends, len(bench.plans)) != told:
            break
    assert 140 + 20 <= k < 190  # the hand rests from 140 on
    np.testing.assert_allclose(bench.player.commanded, [0.9, 0.0, 0.5], atol=0.05)


@pytest.mark.parametrize("streamed", [NAMES, ()], ids=["positions", "trajectories"])
def test_so_does_one_that_was_played_to_before_and_the_hand_is_not_held_against(streamed):
    bench = Bench(streamed)
    bench.tick(2)
    bench.offer(np.tile([0.7, 0.0, 0.5], (101, 1)))
    bench.tick(350)
    assert bench.player.state == HOLDING
    for k in range(100):
        bench.arm = np.array([1.3 + 0.002 * k, 0.0, 0.5])
        bench.tick()
        assert bench.player.state == HOLDING
        if k == 0:  # not believed yet
            told = bench.sends, len(bench.plans)
        assert (bench.sends, len(bench.plans)) == told


def test_what_is_said_of_a_joint_stays_while_another_driver_speaks():
    bench = Bench(start=False)
    player, now = bench.player, bench.now
    player.start()
    for k in range(40):
        now += PERIOD
        player.observe(NAMES[:2], [0.1, 68.8], now, now)
        player.observe(NAMES[2:], [0.5], now, now)
        player.tick(now)
        assert k < 2 or "'b' reads 68.8" in player.reason
    player.observe(NAMES[:2], [0.1, 0.2], now, now)
    player.tick(now + PERIOD)
    assert player.reason == "no chunk yet"


def test_a_topic_of_joint_states_on_which_nothing_comes_is_named():
    bench = Bench()
    bench.sensing = False
    bench.tick(2)
    assert bench.seen == (HOLDING, "no joint state yet on joint_states")


def test_joint_states_in_degrees_are_told_with_their_value():
    bench = Bench()
    bench.arm = np.array([0.1, 68.8, 0.5])
    bench.tick(2)
    assert bench.seen == (
        HOLDING,
        "no joint state of b for more than 0.1 s; 'b' reads 68.8, impossible with limits of -0.5 to 2: "
        "other units (degrees?)",
    )
    bench.arm = np.zeros(3)
    bench.tick(2)
    bench.sensing = False
    bench.tick(20)
    assert bench.seen == (HOLDING, "no joint state for more than 0.1 s")  # of what was wrong once, no more


@pytest.mark.parametrize("streamed", [NAMES, ()], ids=["positions", "trajectories"])
def test_an_arm_far_outside_its_limits_is_left_there_and_the_joint_named(streamed):
    """Chunks are clamped to the limits, so even one that says "stay" would drive it back."""
    bench = Bench(streamed)
    bench.arm = np.array([1.5, 0.0, 0.5])
    bench.tick(2)
    bench.offer(np.tile(bench.arm, (41, 1)))
    bench.tick(20)
    why = "joint 'a' is at 1.5, outside its limits -1 to 1: move it back, or correct the robot file"
    assert bench.seen == (HOLDING, why)
    assert bench.sends == 0 and bench.plans == []
    bench.arm = np.array([1.1, 0.0, 0.5])  # by hand; a little outside is a matter of calibration
    bench.offer(np.tile([0.9, 0.0, 0.5], (41, 1)))
    bench.tick(40)
    assert bench.seen == (PLAYING, "") and bench.player.commanded[0] < 1.1


def test_refused_chunks_are_counted_and_the_old_one_plays_on():
    bench = Bench()
    bench.tick(2)
    bench.lively()
    bench.tick(10)
    assert "action 0 of joint 'b' is nan" in bench.offer([[0.0, np.nan, 0.0], [0, 0, 0]])
    bench.tick(1)
    assert bench.seen == (PLAYING, "refused chunk 1: action 0 of joint 'b' is nan")
    assert bench.player.refused_sequence == 1
    assert "its sequence is not above 0" in bench.offer(np.zeros((41, 3)), sequence=0)
    assert "all its actions are past" in bench.offer(np.zeros((4, 3)), age=0.16, sequence=2)
    assert bench.player.refused == 3 and bench.player.played == 1
    bench.lively()
    bench.tick(1)
    assert bench.seen == (PLAYING, "") and bench.player.played == 2 and bench.player.refused_sequence is None


def test_an_older_epoch_is_void_and_a_newer_one_drops_the_chunk_at_once():
    bench = Bench()
    bench.tick(2)
    bench.lively()
    bench.tick(20)
    bench.player.announce_epoch(1)
    bench.tick(1)
    assert bench.seen == (HOLDING, "the policy voided its chunks") and bench.player.holds == 1
    assert "its epoch 0 is older than 1" in bench.offer(np.zeros((41, 3)), epoch=0)
    bench.tick(40)
    assert bench.offer(np.tile(bench.arm, (41, 1)), epoch=1, sequence=0) == ""
    bench.tick(1)
    assert bench.seen == (PLAYING, "") and bench.player.epoch == 1
    check_limits(bench.trail)


def test_an_old_chunk_on_its_way_is_void_after_a_long_silence_too():
    bench = Bench(policy_timeout=0.0)
    bench.tick(2)
    bench.offer(np.zeros((11, 3)), epoch=4)
    bench.tick(300)
    bench.player.announce_epoch(5)
    assert "its epoch 4 is older than 5" in bench.offer(np.zeros((41, 3)), epoch=4)


def test_a_chunk_that_was_accepted_and_void_before_the_next_tick_is_not_taken_over():
    bench = Bench()
    bench.tick(2)
    bench.offer(np.tile([0.1, 0.0, 0.0], (41, 1)))
    bench.player.announce_epoch(1)
    bench.tick(5)
    assert bench.seen == (HOLDING, "the policy voided its chunks") and bench.player.played == 0
    bench.offer(np.tile([0.1, 0.0, 0.0], (41, 1)), epoch=1)
    bench.player.stop("stop service")
    bench.player.start()
    bench.tick(5)
    assert bench.seen == (HOLDING, "no chunk yet") and bench.player.played == 0 and bench.sends == 0


def test_a_chunk_without_actions_voids_older_epochs():
    bench = Bench()
    bench.tick(2)
    bench.lively()
    bench.tick(20)
    assert bench.offer(np.zeros((0, 3)), epoch=4) == ""
    bench.tick(1)
    assert bench.player.state == HOLDING and bench.player.refused == 0
    assert "older than 4" in bench.offer(np.zeros((41, 3)), epoch=3)


def test_a_policy_that_restarted_counts_from_zero_again():
    bench = Bench(policy_timeout=1.5)
    bench.tick(2)
    bench.offer(np.zeros((11, 3)), epoch=3, sequence=70)
    bench.tick(100)
    assert "older than 3" in bench.offer(np.zeros((11, 3)), epoch=0, sequence=0)
    bench.tick(60)
    assert bench.offer(np.zeros((11, 3)), epoch=0, sequence=0) == ""


def test_a_clock_that_jumps_back_drops_the_chunk_and_holds():
    bench = Bench()
    bench.tick(2)
    bench.lively()
    bench.tick(30)
    bench.now -= 8 * SECOND
    bench.tick(1)
    assert bench.seen == (HOLDING, "the clock jumped back")
    bench.tick(40)
    assert bench.player.at_rest
    bench.offer(np.tile(bench.arm, (41, 1)), epoch=1)
    bench.tick(3)
    assert bench.seen == (PLAYING, "")
    check_limits(bench.trail)


@pytest.mark.parametrize(
    ("back", "seen"), [(0.1, (PLAYING, "")), (0.11, (HOLDING, "the clock jumped back"))], ids=["adjusted", "jumped"]
)
def test_while_a_clock_that_was_set_back_a_little_catches_up_nothing_is_sent(back, seen):
    bench = Bench()
    bench.tick(2)
    bench.lively()
    bench.tick(30)
    sent = bench.sends
    bench.now -= round(back * SECOND) + PERIOD
    bench.tick(1)
    assert bench.seen == seen
    if seen[0] == PLAYING:
        bench.tick(10)
        assert bench.sends == sent
        bench.tick(1)
        assert bench.sends == sent + 1
    bench.tick(40)
    check_limits(bench.trail)


def test_a_chunk_that_is_the_first_to_come_after_the_clock_jumped_back_is_played():
    bench = Bench()
    bench.tick(2)
    bench.offer(np.zeros((41, 3)))
    bench.tick(30)
    bench.now -= 8 * SECOND
    bench.offer(np.zeros((41, 3)), epoch=1)
    bench.tick(1)
    assert bench.seen == (PLAYING, "") and bench.player.epoch == 1


def test_an_arm_that_is_not_seen_either_when_the_clock_jumps_back_comes_to_rest():
    bench = Bench()
    bench.tick(2)
    bench.lively()
    bench.tick(30)
    bench.sensing = False
    bench.now -= 8 * SECOND
    bench.tick(60)
    assert bench.player.at_rest
    check_limits(bench.trail)


def test_a_policy_that_restarts_after_the_clock_jumped_back_counts_from_zero_again():
    bench = Bench(policy_timeout=1.5)
    bench.tick(2)
    bench.offer(np.zeros((41, 3)), epoch=3, sequence=70)
    bench.tick(30)
    bench.now -= 8 * SECOND
    bench.tick(140)
    assert "older than 3" in bench.offer(np.zeros((11, 3)), epoch=0, sequence=0)
    bench.tick(20)
    assert bench.offer(np.zeros((11, 3)), epoch=0, sequence=0) == ""


def test_after_a_simulators_reset_the_arm_is_held_where_it_is_then():
    bench = Bench()
    bench.tick(2)
    time = np.arange(41) * 0.05
    bench.offer(np.stack([0.9 * np.minimum(time, 1), 0 * time, 0 * time], axis=1))
    bench.tick(90)
    bench.now -= 8 * SECOND
    home = np.array([-0.3, 0.0, 0.0])
    bench.arm = home.copy()
    bench.tick(1)
    assert bench.seen == (HOLDING, "the clock jumped back")
    for _ in range(150):
        bench.arm = home.copy()
        bench.tick()
    assert bench.player.state == HOLDING
    np.testing.assert_allclose(bench.player.commanded, home)


def test_dry_run_judges_and_samples_from_where_the_arm_is():
    bench = Bench(dry_run=True)
    bench.tick(2)
    bench.lively()
    bench.tick(20)
    assert bench.seen == (DRY_RUN, "")
    bench.arm = np.array([0.1, 0.1, 0.1])
    bench.player.observe(NAMES, bench.arm, bench.now, bench.now)
    bench.offer(np.tile([0.9, 0.1, 0.1], (41, 1)))
    bench.player.tick(bench.now + PERIOD)
    state, reason = bench.seen
    assert state == DRY_RUN and "joint 'a' is 0.8 from where" in reason


def test_a_dry_run_goes_on_though_the_arm_does_not_follow():
    bench = Bench(dry_run=True)
    bench.tick(2)
    time = np.arange(41) * 0.05
    bench.offer(np.stack([0.9 * np.minimum(time, 1), 0 * time, 0 * time], axis=1))
    for k in range(230):
        bench.tick()
        bench.arm = np.zeros(3)
        assert bench.seen == (DRY_RUN, "" if k < 200 else "the chunk ended and no new one came")
    bench.offer(np.zeros((41, 3)))
    bench.tick()
    assert bench.seen == (DRY_RUN, "")


def test_trajectories_join_each_other_and_end_at_rest():
    bench = Bench(streamed=["g"], resend=0.1, window=0.3)
    bench.tick(2)
    bench.lively()
    bench.tick(70)
    bench.lively()
    bench.tick(30)
    assert len(bench.plans) >= 10
    check_plans(bench.plans)
    check_limits(bench.trail)
    # Nobody plans any more: what was sent last ends at rest within window, lead and braking.
    assert bench.plans[-1][1].times[-1] - bench.now <= (0.3 + 0.03 + 1.0 / 4.0 + 0.02) * SECOND


def test_a_trajectory_is_where_the_chunk_is_at_its_own_times():
    bench = Bench(streamed=(), window=0.4)
    bench.tick(5)
    observed = bench.now - round(0.3 * SECOND)
    bench.offer(np.stack([np.arange(41) * 0.02, np.zeros(41), np.zeros(41)], axis=1), age=0.3)  # 0.4 rad/s
    bench.tick(60)
    _, plan = bench.plans[-1]
    np.testing.assert_allclose(plan.positions[:41, 0], 0.4 * (plan.times[:41] - observed) / SECOND, atol=1e-3)
    assert bench.player.commanded[0] == pytest.approx(0.4 * (bench.now - observed) / SECOND, abs=1e-3)
    assert not bench.player.at_rest


def test_a_trajectory_begins_ahead_by_the_lead_and_reaches_as_far_as_the_window():
    bench = Bench(streamed=(), window=0.4, lead=0.1)
    bench.tick(2)
    bench.offer(np.zeros((41, 3)))
    bench.tick(30)
    assert len(bench.plans) > 1
    for now, plan in bench.plans:
        assert plan.times[0] - now == 0.1 * SECOND and np.ptp(plan.times) == 0.4 * SECOND
    assert set(np.diff([now for now, _ in bench.plans])) == {SECOND // 10}  # and is sent again


def test_a_trajectory_follows_a_chunk_to_its_end_and_brakes_there():
    """Also where the arm is not yet where the chunk ends: a player that died would not hold it there."""
    bench = Bench(streamed=(), window=1.0)
    bench.tick(2)
    bench.offer(np.tile([0.8, 0.0, 0.0], (7, 1)))  # 0.3 s, in which it is approached at 0.4 rad/s
    end = bench.now + round(0.3 * SECOND)
    bench.tick(25)
    (_, plan), *_ = bench.plans[::-1]
    speeds = plan.velocities[:, 0]
    assert speeds[plan.times <= end][-1] == pytest.approx(0.4)
    assert plan.times[np.argmax(speeds == 0.0)] - end <= 0.06 * SECOND


@pytest.mark.parametrize("again", [False, True], ids=["stop", "stop and start at once"])
def test_a_stop_sends_one_braking_trajectory(again):
    bench = Bench(streamed=["g"])
    bench.tick(2)
    bench.lively()
    bench.tick(40)
    bench.player.stop("stop service")
    if again:
        bench.player.start()
    before = len(bench.plans)
    bench.tick(60)
    assert len(bench.plans) == before + 1 and bench.player.at_rest
    check_plans(bench.plans)
    check_limits(bench.trail)


def test_a_late_tick_is_a_pause_not_a_jump():
    bench = Bench()
    bench.tick(2)
    bench.lively()
    bench.tick(30)
    before = bench.arm.copy()
    bench.player.observe(NAMES, bench.arm, bench.now + SECOND // 2, bench.now + SECOND // 2)
    bench.now += SECOND // 2
    bench.player.tick(bench.now)
    assert (np.abs(bench.player.commanded - before) <= VELOCITY * 0.05 + 1e-9).all()


def test_a_tick_that_is_late_but_no_pause_makes_up_for_five_periods():
    bench = Bench()
    bench.tick(2)
    ramp = 0.9 * np.minimum(np.arange(41) * 0.05, 1.0)
    bench.offer(np.stack([ramp, 0 * ramp, 0 * ramp], axis=1))
    bench.tick(50)
    before = bench.arm.copy()
    bench.tick(period=12 * PERIOD)
    assert bench.seen == (PLAYING, "")
    assert 0.04 < bench.arm[0] - before[0] < 0.07  # and not 0.11, all of 0.12 s at once
    bench.tick(90)
    assert bench.arm[0] == pytest.approx(0.9, abs=1e-3)


@pytest.mark.parametrize(("periods", "state"), [(5, PLAYING), (6, HOLDING)])
def test_a_slow_control_loop_that_is_a_few_periods_late_has_not_paused(periods, state):
    bench = Bench(rate=20.0, robot=ROBOT.model_copy(update={"state": State(max_age=1.0)}))
    bench.tick(2, period=5 * PERIOD)
    bench.offer(np.zeros((41, 3)))
    bench.tick(10, period=5 * PERIOD)
    bench.now += 5 * PERIOD * periods
    bench.player.tick(bench.now)  # before the joint states of meanwhile
    assert bench.player.state == state


@pytest.mark.parametrize(("late", "state"), [(0.3, PLAYING), (0.5, HOLDING)])
def test_a_late_tick_is_no_pause_of_an_arm_on_trajectories_until_its_trajectory_has_ended(late, state):
    bench = Bench(streamed=(), window=0.4, robot=ROBOT.model_copy(update={"state": State(max_age=1.0)}))
    bench.tick(2)
    bench.offer(np.zeros((41, 3)))
    bench.tick(30)
    bench.now += round(late * SECOND)
    bench.player.tick(bench.now)  # before the joint states of meanwhile
    assert bench.player.state == state


def test_a_pause_neither_wakes_a_stopped_player_nor_harms_one_that_saw_nothing_yet():
    bench = Bench(start=False)
    bench.sensing = False
    for told in ("not started", "stop service"):
        bench.tick(2)
        bench.now += SECOND
        bench.tick(2)
        assert bench.seen == (STOPPED, told)
        bench.sensing = True
        bench.player.start()
        bench.tick(2)
        bench.player.stop("stop service")


def test_an_arm_that_sags_at_a_hold_is_gone_on_with_without_a_following_error_too():
    bench = Bench(following_error=0.0)
    bench.sag = np.array([-0.1, 0.0, 0.0])
    bench.tick(2)
    bench.offer(np.zeros((21, 3)))
    bench.tick(250)
    assert bench.player.state == HOLDING
    bench.offer(np.zeros((21, 3)))
    bench.tick(2)
    assert bench.seen == (PLAYING, "")


@pytest.mark.parametrize("handover", ["blend", "ensemble"])
def test_handover_between_disagreeing_chunks_is_smoother_than_a_switch(handover):
    largest = {}
    for kind in (handover, "switch"):
        bench = Bench(handover=kind)
        bench.tick(2)
        bench.offer(np.zeros((41, 3)))
        bench.tick(30)
        bench.offer(np.tile([0.02, 0.0, 0.0], (41, 1)))
        bench.tick(50)
        assert bench.arm[0] > 0.009
        largest[kind] = np.abs(np.diff(np.array(bench.trail)[:, 0], n=2)).max() / 0.01**2
    assert largest["switch"] == pytest.approx(10.0, rel=0.1)  # the limit
    assert largest[handover] < 6.0


@pytest.mark.parametrize("handover", ["blend", "ensemble"])
def test_a_first_chunk_a_little_away_is_faded_into(handover):
    bench = Bench(handover=handover)
    bench.tick(2)
    bench.offer(np.tile([0.02, 0.0, 0.0], (41, 1)))
    bench.tick(50)
    assert bench.arm[0] == pytest.approx(0.02, abs=1e-4)
    assert np.abs(np.diff(np.array(bench.trail)[:, 0], n=2)).max() / 0.01**2 < 6.0


@pytest.mark.parametrize(("epoch", "place"), [(0, 0.2 * np.exp(-0.01) / (1 + np.exp(-0.01))), (1, 0.2)])
def test_an_ensemble_is_of_the_chunks_of_one_epoch(epoch, place):
    bench = Bench(handover="ensemble")
    bench.tick(2)
    bench.offer(np.zeros((41, 3)))
    bench.tick(30)
    bench.offer(np.tile([0.2, 0.0, 0.0], (41, 1)), epoch=epoch)
    bench.tick(60)
    assert bench.seen == (PLAYING, "") and bench.arm[0] == pytest.approx(place, abs=1e-4)


@pytest.mark.parametrize("wraps", [True, False], ids=["a driver that wraps at pi", "a driver that counts turns"])
def test_a_continuous_joint_is_told_in_the_turn_in_which_its_driver_is(wraps):
    b = Bench(robot=turning([2.0, 4.0]))
    raw, told = np.array([2.9 if wraps else 2.9 - 4 * np.pi, 0.0, 0.0]), []
    b.sensing = False
    way = 2.9 + 0.5 * np.sin(np.linspace(0, np.pi, 61)) ** 2  # across pi, and back
    b.offer(np.stack([way, 0 * way, 0 * way], axis=1))
    for _ in range(300):
        b.player.observe(NAMES, raw, b.now + PERIOD, b.now + PERIOD)
        b.tick()
        if b.player.commanded is None:
            continue
        told.append(b.player.commanded + b.player.turns)
        assert abs(told[-1][0] - raw[0]) < 0.1  # never a turn away
        raw = told[-1].copy()
        if wraps:
            raw[0] = (raw[0] + np.pi) % (2 * np.pi) - np.pi
    told = np.array(told)[:, 0]
    assert b.player.state == PLAYING and b.player.refused == 0
    if wraps:
        assert told.max() > 3.1 and told.min() < -2.88  # it was on both sides
    else:
        assert abs(told.max() - (3.4 - 4 * np.pi)) < 0.01
    seen = np.array(b.trail)[:, 0]
    assert abs(seen.max() - 3.4) < 0.01 and seen.min() > 2.89


@pytest.mark.parametrize(
    ("told", "turns"), [(2.9, 0.0), (3.2, 0.0), (3.2 + 2 * np.pi, 2 * np.pi), (3.2 - 4 * np.pi, -4 * np.pi)]
)
def test_an_arm_that_overshoots_to_half_a_turn_from_its_limits_middle_is_told_no_other_turn(told, turns):
    b = Bench(robot=turning([-2.8, 2.8]))
    b.player.commanded = np.array([2.8, 0.0, 0.0])
    b.player.observe(NAMES, [told, 0.0, 0.0], b.now, b.now)
    np.testing.assert_allclose(b.player.turns, [turns, 0.0, 0.0])


@pytest.mark.parametrize(("place", "holds"), [(2.9, False), (2.95, True), (3.25, True), (-2.95, True)])
def test_an_arm_with_a_continuous_joint_that_was_pushed_out_of_its_limits_is_not_played_to(place, holds):
    b = Bench(robot=turning([-2.8, 2.8]))
    b.arm = np.array([place, 0.0, 0.0])
    b.offer(np.stack([np.linspace(2.7, 2.0, 41), np.zeros(41), np.zeros(41)], axis=1))
    b.tick(20)
    state, reason = b.seen
    assert (state == HOLDING) == holds
    assert ("outside its limits -2.8 to 2.8: move it back" in reason) == holds
