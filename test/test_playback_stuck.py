"""An arm that does not go where chunks lead it, or was elsewhere while nobody looked, is never made to jump."""

import numpy as np
import pytest
from playback_kit import NAMES, PERIOD, ROBOT, Bench, check_limits

from pi0_ros.ros.judging import SECOND
from pi0_ros.ros.player import APPROACHING, HOLDING, PLAYING, STOPPED
from pi0_ros.ros.rest import Rest
from pi0_ros.ros.stall import Stall

BOTH = pytest.mark.parametrize("streamed", [NAMES, ()], ids=["positions", "trajectories"])
STANDS = "the arm does not follow: joint 'a' stands still; call ~/start to resume"


def closed_loop(bench: Bench, reach: float, ticks: int, stuck=False, seconds=0.5, kept=0) -> None:
    """A policy that plans from where it sees the arm, ten times a second: by `reach` more within `seconds`. The first
    `kept` actions of a chunk are those of the one before."""
    before = None
    for k in range(ticks):
        arm = bench.arm.copy()
        if k % 10 == 0:
            time = np.arange(21) * 0.05
            way = arm[0] + reach * np.minimum(1, time / seconds) * (1 if arm[0] < 0.3 else -1)
            if before is not None:
                way[:kept] = np.interp(time[:kept] + 0.1, time, before)
            before = way
            bench.offer(np.stack([way, arm[1] + 0 * way, 0.5 + 0 * way], axis=1))
        bench.tick()
        if stuck:
            bench.arm = arm


@BOTH
@pytest.mark.parametrize("reach", [0.2, 0.3, 0.45])
def test_an_arm_that_stands_still_under_a_policy_that_plans_from_where_it_sees_it_is_stopped(streamed, reach):
    bench = Bench(streamed)
    bench.tick(2)
    closed_loop(bench, reach, 200)
    assert bench.seen == (PLAYING, "")
    closed_loop(bench, reach, 350, stuck=True)
    assert bench.seen == (STOPPED, STANDS) and bench.player.lost == STANDS
    sent = bench.sends, len(bench.plans)
    closed_loop(bench, reach, 100)  # released
    assert bench.seen == (STOPPED, STANDS) and (bench.sends, len(bench.plans)) == sent


def test_after_that_it_is_gone_on_with_from_where_it_is_however_little_was_missing():
    bench = Bench(streamed=())
    bench.tick(2)
    closed_loop(bench, 0.2, 200, seconds=1.0)
    closed_loop(bench, 0.2, 110, stuck=True, seconds=1.0)
    assert bench.seen == (STOPPED, STANDS)
    arm = bench.arm.copy()
    assert 0.045 < abs(bench.player.commanded[0] - arm[0]) < 0.055  # no more than an arm at rest may give
    bench.player.start()
    for _ in range(2):
        bench.offer(np.tile(arm, (41, 1)))
        bench.tick()
    _, plan = bench.plans[-1]
    np.testing.assert_allclose(plan.positions[0], arm, atol=1e-3)


@BOTH
@pytest.mark.parametrize("reach", [0.12, 0.2, 0.45])
@pytest.mark.parametrize("kept", [3, 6, 10])
def test_so_is_one_whose_chunks_go_back_and_forth_between_what_was_kept_and_where_they_lead(streamed, reach, kept):
    bench = Bench(streamed)
    bench.tick(2)
    closed_loop(bench, reach, 200, kept=kept)
    assert bench.seen == (PLAYING, "")
    closed_loop(bench, reach, 350, stuck=True, kept=kept)
    assert bench.seen == (STOPPED, STANDS)


@pytest.mark.parametrize("reach", [0.2, 0.3])
@pytest.mark.parametrize("hold", [2, 10, 50])
def test_so_is_one_whose_chunks_end_before_the_next_come(reach, hold):
    bench = Bench()
    bench.tick(2)
    for k in range(600):
        if k % (50 + hold) == 0:
            way = reach * np.arange(11) / 10
            bench.offer(np.stack([way, 0 * way, 0.5 + 0 * way], axis=1))
        bench.tick()
        bench.arm = bench.arm * [0, 1, 1]
    assert bench.seen == (STOPPED, STANDS) and (bench.player.holds > 0)


@pytest.mark.parametrize("sigma", [0.01, 0.02])
@pytest.mark.parametrize(("sag", "contact"), [(0.12, 9.0), (0.2, 9.0), (0.0, 0.18), (0.0, 0.1)])
def test_an_arm_that_holds_a_load_or_presses_while_chunks_waver_goes_on(sag, contact, sigma):
    """A servo that stays behind by what it holds, with friction, or meets something."""
    generator, bench, arm = np.random.default_rng(2), Bench(), 0.0
    bench.tick(2)
    for k in range(2000):
        if k % 10 == 0:
            goal = 0.3 * min(1, k / 200) + generator.normal(0, sigma) + np.zeros(21)
            bench.offer(np.stack([goal, 0 * goal, 0.5 + 0 * goal], axis=1))
        bench.tick()
        error = bench.player.commanded[0] - sag - arm
        arm = min(contact, arm + 0.2 * np.sign(error) * max(0.0, abs(error) - 0.015))
        bench.arm = bench.arm * [0, 1, 1] + [arm, 0, 0]
        assert bench.player.state != STOPPED, (k, bench.seen)


def test_an_arm_that_stands_still_from_the_start_at_0_is_stopped_too():
    bench = Bench()
    bench.tick(2)
    closed_loop(bench, 0.3, 350, stuck=True)
    assert bench.seen == (STOPPED, STANDS)


@BOTH
@pytest.mark.parametrize("error", [0.03, 0.05, 0.08])
@pytest.mark.parametrize("speed", [0.2, 0.4, 1.0])
def test_an_arm_that_waits_at_its_goal_with_a_steady_error_is_not_taken_for_one_that_stands_still(
    streamed, error, speed
):
    """A policy that plans from where it sees the arm begins to go to the goal again with every chunk."""
    bench = Bench(streamed)
    bench.sag = np.array([-error, 0, 0])
    bench.tick(2)
    time = np.arange(21) * 0.05
    for k in range(600):
        if k % 20 == 0:
            way = np.clip(0.5 - bench.arm[0], -speed * time, speed * time)
            bench.offer(np.stack([bench.arm[0] + way, 0 * time, 0.5 + 0 * time], axis=1))
        bench.tick()
        assert bench.player.state in (PLAYING, APPROACHING), bench.seen


def test_joints_that_are_seen_rarely_are_not_taken_for_ones_that_stand_still():
    robot = ROBOT.model_copy(update={"state": ROBOT.state.model_copy(update={"max_age": 3.0})})
    bench = Bench(robot=robot)
    bench.tick(2)
    for k in range(600):
        bench.sensing = k % 150 == 0
        if k % 10 == 0:
            time = np.arange(21) * 0.05
            bench.offer(np.stack([0.2 * np.sin(k / 100 + time), 0 * time, 0.5 + 0 * time], axis=1))
        bench.tick()
        assert bench.player.state != STOPPED, bench.seen


@pytest.mark.parametrize("changes", [{}, {"velocity_scale": 0.05}, {"acceleration_scale": 0.05}], ids=str)
def test_an_arm_that_lags_sags_or_is_slow_is_not_taken_for_one_that_stands_still(changes):
    bench = Bench(**changes)
    bench.sag = np.array([-0.12, 0.0, 0.0])
    bench.tick(2)
    behind = [bench.arm.copy()] * 15  # 0.15 s late
    for k in range(600):
        if k % 10 == 0:
            time = np.arange(21) * 0.05
            still = k > 400  # a policy that waits
            goal = bench.arm[0] + (0.12 + 0 * time if still else 0.12 + 0.3 * time * (1 if k % 200 < 100 else -1))
            bench.offer(np.stack([goal, 0 * time, 0.5 + 0 * time], axis=1))
        bench.tick()
        behind.append(bench.arm.copy())
        bench.arm = behind[-15]
        assert bench.player.state in (PLAYING, APPROACHING, HOLDING), bench.seen


def test_following_error_0_switches_that_off():
    bench = Bench(following_error=0.0)
    bench.tick(2)
    closed_loop(bench, 0.3, 50)
    closed_loop(bench, 0.3, 300, stuck=True)
    assert bench.seen == (PLAYING, "")


@pytest.mark.parametrize("pause", [0.3, 10.0])
@pytest.mark.parametrize("moved", [0.0, -0.8])
@pytest.mark.parametrize("max_age", [0.1, 20.0])
def test_after_a_pause_positions_go_on_from_where_the_arm_is(pause, moved, max_age):
    """The process was suspended in mid-motion: what takes positions stood still meanwhile, or others moved it."""
    bench = Bench(robot=ROBOT.model_copy(update={"state": ROBOT.state.model_copy(update={"max_age": max_age})}))
    bench.tick(2)
    time = np.arange(41) * 0.05
    bench.offer(np.stack([np.minimum(1.9 * time, 0.9), 0 * time, 0 * time], axis=1))
    bench.tick(30)
    bench.now += round(pause * SECOND)
    bench.arm = arm = bench.arm + [moved, 0, 0]
    for k in range(60):
        bench.now += PERIOD
        if pause > 2 and k % 10 == 5:  # the chunk is over: nothing is sent before there is another
            bench.offer(np.tile(arm, (41, 1)))
        commands = bench.player.tick(bench.now)  # timers come before subscriptions
        if commands is not None and commands.stream:
            assert abs(bench.player.commanded[0] - arm[0]) < 0.02 + 1e-6
            return
        bench.player.observe(NAMES, arm, bench.now, bench.now)
    pytest.fail("it did not go on")


@BOTH
@pytest.mark.parametrize("moved", [0.1, 0.2, -0.24])
@pytest.mark.parametrize("stopped", [False, True], ids=["unseen", "stopped and unseen"])
def test_an_arm_that_was_moved_while_it_was_not_seen_is_gone_on_with_from_where_it_is(streamed, moved, stopped):
    bench = Bench(streamed, policy_timeout=0.0)
    bench.tick(2)
    bench.lively()
    bench.tick(30)
    if stopped:
        bench.player.stop("stop service")
    bench.sensing = False
    bench.tick(200)
    sent = bench.sends, len(bench.plans)
    arm = bench.arm = bench.player.commanded + [moved, 0, 0]
    if stopped:
        bench.player.start()
    bench.sensing = True
    for _ in range(20):
        bench.arm = arm.copy()
        bench.tick()
    bench.arm = arm.copy()
    bench.offer(np.tile(arm, (41, 1)))
    bench.tick()
    first = bench.trail[-1] if streamed else bench.plans[-1][1].positions[0]
    assert (bench.sends, len(bench.plans)) != sent
    np.testing.assert_allclose(first, arm, atol=1e-3)


@pytest.mark.parametrize("seen", [0.2, 0.9, 1.2])
def test_that_the_arm_was_seen_at_rest_before_does_not_hide_that_it_was_moved_after(seen):
    bench = Bench()
    bench.tick(2)
    bench.lively()
    bench.tick(30)
    bench.player.stop("stop service")
    bench.tick(30 + round(seen * 100))
    bench.sensing = False
    bench.tick(200)
    arm = bench.arm = bench.player.commanded + [0.2, 0, 0]
    bench.player.start()
    bench.sensing, sent = True, bench.sends
    for k in range(150):
        bench.arm = arm.copy()
        if k == 100:
            bench.offer(np.tile(arm, (41, 1)))
        bench.tick()
        if bench.sends > sent:
            break
    np.testing.assert_allclose(bench.player.commanded, arm, atol=1e-3)


@BOTH
@pytest.mark.parametrize("wait", [0.5, 10.0])
def test_what_an_emergency_stop_left_short_of_its_command_does_not_jump_there_at_the_next_start(streamed, wait):
    bench = Bench(streamed, policy_timeout=0.0)
    bench.tick(2)
    time = np.arange(41) * 0.05
    bench.offer(np.stack([np.minimum(0.9 * time, 0.9), 0 * time, 0 * time], axis=1))
    bench.tick(50)
    stuck = bench.arm.copy()
    for _ in range(15):
        bench.tick()
        bench.arm = stuck.copy()
    bench.player.stop("stop service")
    for _ in range(round(wait * 100)):
        bench.tick()
        bench.arm = stuck.copy()
    sent = bench.sends
    bench.player.start()
    for _ in range(3):
        bench.tick()
        bench.arm = stuck.copy()
    assert bench.sends == sent
    bench.offer(np.tile(stuck, (41, 1)))
    bench.tick()
    first = bench.trail[-1] if streamed else bench.plans[-1][1].positions[0]
    assert abs(first[0] - stuck[0]) < 1e-3


@BOTH
@pytest.mark.parametrize("dead", [0.0, 0.1])
def test_an_arm_that_lags_does_not_jump_back_when_it_is_stopped_and_started_at_once(streamed, dead):
    """A command that begins where a moving arm is begins behind where it will be."""
    for wait in range(1, 60, 3):
        bench = Bench(streamed)
        bench.arm = arm = np.array([-0.9, 0.0, 0.5])
        bench.tick(2)
        told = [arm] * (round(100 * dead) + 1)
        for k in range(190):
            if k % 10 == 0:  # chunks that go on from where the arm is
                time = np.arange(41) * 0.05
                bench.offer(np.stack([np.minimum(arm[0] + 1.5 * time, 0.95), 0 * time, 0.5 + 0 * time], axis=1))
            if k == 90:
                bench.player.stop("stop service")
            if k == 90 + wait:
                bench.player.start()
            bench.arm = arm
            bench.tick()
            told.append(bench.player.commanded.copy())
            arm = arm + (told[-1 - round(100 * dead)] - arm) * 0.12  # a time constant of 80 ms
        check_limits(bench.trail)


@pytest.mark.parametrize("moved", [0.1, 0.2])
def test_a_gripper_goes_no_further_than_two_chunks_that_agree(moved):
    """It moves within one action, at more than its velocity limit, and the second chunk takes over meanwhile."""
    dt, target = 0.02, 0.7 - moved
    for late in range(44, 53):
        bench = Bench()
        bench.arm = np.array([0.0, 0.0, 0.7])
        bench.tick(2)
        begin = bench.now
        chunk = np.tile([0.0, 0.0, 0.7], (76, 1))
        chunk[25:, 2] = target
        bench.offer(chunk, dt=dt)
        bench.tick(late)
        times = (bench.now - begin) / SECOND + dt * np.arange(76)
        again = chunk.copy()
        again[:, 2] = np.interp(times, dt * np.arange(76), chunk[:, 2])
        bench.offer(again, dt=dt)
        bench.tick(80)
        assert np.array(bench.trail)[:, 2].min() > target - 0.01


@pytest.mark.parametrize("handover", ["blend", "ensemble", "switch"])
def test_a_gripper_that_is_told_to_close_does_not_open_first(handover):
    """A chunk in which it closes from one action to the next, wherever between two of them the hand-over lies."""
    for late in np.arange(0, 0.05, 0.005):
        bench = Bench(handover=handover)
        bench.arm = np.array([0.0, 0.0, 0.8])
        bench.tick(2)
        open_, closed = np.tile([0.0, 0.0, 0.8], (21, 1)), np.tile([0.0, 0.0, 0.0], (21, 1))
        bench.offer(open_)
        bench.tick(40)
        both = open_.copy()
        both[2:] = closed[2:]
        bench.offer(both, age=0.05 + late)
        bench.tick(60)
        assert np.array(bench.trail)[:, 2].max() < 0.8 + 1e-3


def test_a_stop_brakes_as_hard_as_the_robot_file_allows_however_gently_chunks_are_played():
    ticks = {}
    for scale in (1.0, 0.1):
        bench = Bench(acceleration_scale=scale, following_error=0.0)
        bench.tick(2)
        time = np.arange(201) * 0.05
        bench.offer(np.stack([np.minimum(0.4 * time, 0.9), 0 * time, 0 * time], axis=1))
        bench.tick(150)
        assert bench.player.stream.v[0] == pytest.approx(0.4, abs=0.02)
        bench.player.stop("stop service")
        ticks[scale] = next(k for k in range(1000) if bench.player.at_rest or bench.tick())
    assert ticks[0.1] <= ticks[1.0] + 1 < 8


def test_joint_states_that_come_late_by_their_stamps_are_told_from_none():
    bench = Bench()
    for _ in range(30):
        bench.now += PERIOD
        bench.player.observe(NAMES, bench.arm, bench.now - SECOND // 5, bench.now)
        bench.player.tick(bench.now)
    why = "no joint state for more than 0.1 s; they come, stamped 0.2 s before this node's clock"
    assert bench.seen == (HOLDING, why)


def stands_still(unit=1.0, arm=True, until=1.0, skip=(0.0, 0.0), **ways) -> bool:
    """Whether that is said of one joint, of whose ways in s some are other than those of one that stands still."""
    ways = {
        "measured": lambda t: 0.0,
        "commanded": lambda t: 0.1 * t,
        "ahead": lambda t: 0.2,
        "seen": lambda t: t,
    } | ways
    stall = Stall(np.array([arm]), np.array([unit]))
    for k in range(round(until * 100) + 1):
        t, now = k / 100, k * PERIOD  # simulated time begins at 0
        if skip[0] < t < skip[1]:
            continue
        at = np.array([round(ways["seen"](t) * SECOND)])
        measured, commanded, ahead = (unit * np.array([0.5 + ways[w](t)]) for w in ("measured", "commanded", "ahead"))
        if stall.watch(now, measured, at, commanded, ahead) is not None:
            return True
    return False


TO_AND_FRO = {"ahead": lambda t: 0.2 * np.sin(5 * t), "commanded": lambda t: 0.06 * np.sin(5 * t), "until": 2.0}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (TO_AND_FRO, True),
        (TO_AND_FRO | {"unit": 0.2}, True),
        (TO_AND_FRO | {"until": 1.99}, False),  # it may follow in the next second
        (TO_AND_FRO | {"arm": False}, False),
        (TO_AND_FRO | {"commanded": lambda t: 0.049 * np.sin(5 * t)}, False),  # not far enough to be sure
        (TO_AND_FRO | {"commanded": lambda t: 0.06 * np.sin(5 * t) * (t > 1.1)}, False),  # only now
        (TO_AND_FRO | {"commanded": lambda t: 0.06 * np.sin(5 * t) * (t > 1.1), "until": 3.0}, True),
        (TO_AND_FRO | {"commanded": lambda t: 0.06 * np.sin(5 * t) * (t < 0.9)}, False),  # then it waits
        (TO_AND_FRO | {"measured": lambda t: 0.007 * np.sin(5 * t)}, False),
        (TO_AND_FRO | {"measured": lambda t: 0.005 * np.sin(5 * t)}, True),  # what it shakes by
        (TO_AND_FRO | {"measured": lambda t: 0.02 * (t > 1.5)}, False),  # late, but it follows
        (TO_AND_FRO | {"measured": lambda t: 0.008 * t}, False),  # slowly, but it goes on from one second to the next
        (TO_AND_FRO | {"skip": (1.3, 1.45)}, True),
        (TO_AND_FRO | {"skip": (1.3, 1.6)}, False),
        (TO_AND_FRO | {"seen": lambda t: min(t, 1.4)}, False),
        ({}, True),
        ({"unit": 0.2}, True),
        ({"until": 0.99}, False),
        ({"arm": False}, False),  # a gripper
        ({"ahead": lambda t: -0.2, "commanded": lambda t: -0.1 * t}, True),
        ({"ahead": lambda t: 0.2 if t < 0.5 else -0.2}, False),  # to and fro
        ({"commanded": lambda t: 0.1 + 0.02 * t}, False),  # a command that waits
        ({"commanded": lambda t: 0.1 + 0.05 * np.sin(20 * t)}, True),  # and one that goes on and back
        ({"ahead": lambda t: 0.09 if 0.4 < t < 0.5 else 0.2}, False),  # it was at its goal for a moment
        ({"commanded": lambda t: 0.05 * t}, False),  # 0.025 from its command on average
        ({"commanded": lambda t: 0.04 * np.sin(20 * t)}, False),  # 0.026, however far the command went
        ({"commanded": lambda t: 0.09 if t < 1 else 0.04 * np.sin(20 * t), "until": 2.0}, False),  # each second alone
        ({"ahead": lambda t: 0.12}, True),
        ({"commanded": lambda t: 0.055 * np.sin(20 * t)}, True),  # 0.035
        ({"commanded": lambda t: 0.07 * t}, True),
        ({"measured": lambda t: 0.02 * t}, True),
        ({"measured": lambda t: 0.04 * t}, False),  # a quarter of the way that is left
        ({"measured": lambda t: 0.019 * t, "commanded": lambda t: 0.05 + 0.08 * t}, True),
        ({"measured": lambda t: 0.021 * t, "commanded": lambda t: 0.05 + 0.08 * t}, False),  # more than a quarter
        ({"measured": lambda t: 0.03 * t, "commanded": lambda t: 0.3 * t}, True),
        ({"measured": lambda t: 0.04 * t, "commanded": lambda t: 0.3 * t}, False),  # a quarter of what is left, no less
        ({"commanded": lambda t: 0.05 + 0.059 * t}, False),  # friction may hold it back
        ({"commanded": lambda t: 0.2 + 0.04 * np.sin(20 * t)}, False),  # it holds a load, or presses
        ({"commanded": lambda t: 0.16 - 0.07 * t}, True),  # led on again
        ({"seen": lambda t: min(t, 0.4)}, False),
        ({"seen": lambda t: min(t, 0.6)}, True),
        ({"skip": (0.3, 0.45)}, True),
        ({"skip": (0.3, 0.6)}, False),  # a hold does not count
        ({"skip": (0.3, 0.6), "until": 1.3}, True),
        ({"skip": (0.3, 3.4), "until": 4.2}, False),  # after a long one it begins anew
    ],
)
def test_what_is_said_of_a_joint_that_stands_still_while_chunks_move_it(changes, said):
    assert stands_still(**changes) == said


def test_of_several_joints_that_stand_still_the_one_whose_command_went_furthest_is_named():
    ways, told = np.array([0.0, 0.0, 0.0, 1.0]), np.array([0.08, 0.09, 0.12, 0.3])
    arm = np.array([True, True, False, True])  # the third is a gripper, the last one follows
    stall = Stall(arm, np.ones(4))
    for k in range(101):
        now, way = k * PERIOD, k / 100
        said = stall.watch(now, ways * told * way, np.full(4, now), told * way, ways * told * way + 0.2)
    assert said == 1


def test_a_joint_that_is_seen_rarely_hides_no_other_that_stands_still():
    stall = Stall(np.array([True, False]), np.ones(2))
    for k in range(101):
        now, told = k * PERIOD, np.array([0.001 * k, 0.0])
        said = stall.watch(now, np.zeros(2), np.array([now, 0]), told, np.array([0.2, 0.2]))
    assert said == 0


def test_after_a_stop_the_span_before_it_does_not_count():
    stall, said = Stall(np.array([True]), np.array([1.0])), []
    for k in range(302):
        if k == 101:  # one span is over
            stall.begin_anew()
        swing = np.array([np.sin(k / 20)])
        said.append(stall.watch(k * PERIOD, np.zeros(1), np.array([k * PERIOD]), 0.06 * swing, 0.2 * swing))
    assert said.index(0) == 301  # two spans from then on


def test_an_arm_that_stands_still_is_seen_after_the_clock_was_set_back_too():
    stall, said = Stall(np.array([True]), np.array([1.0])), []
    for tick in [*range(9000, 9050), *range(102)]:  # a simulation that begins anew
        at, commanded = np.array([tick * PERIOD]), np.array([0.001 * (tick % 9000)])
        said.append(stall.watch(tick * PERIOD, np.zeros(1), at, commanded, np.array([0.2])))
    assert said[:140] == [None] * 140 and 0 in said[140:]


class AtRest:
    """A joint of the arm and a gripper, commanded to 0, that may settle 0.25 from there."""

    def __init__(self, unit=1.0):
        self.rest, self._unit = Rest(np.array([True, False]), np.full(2, 0.25 * unit), np.full(2, unit)), unit

    def lags(self, seconds, arm):
        self.rest.lags(round(seconds * SECOND), self._unit * np.array([arm, 0.0]), np.zeros(2))

    def moved(self, seconds, arm, gripper=0.0):
        self.rest.watch(round(seconds * SECOND), self._unit * np.array([arm, gripper]), np.zeros(2))
        return self.rest.moved

    def off(self, arm):
        return self.rest.off(self._unit * np.array([arm, 9.0]), np.zeros(2))

    def far(self, arm):
        return self.rest.far(self._unit * np.array([arm, 9.0]), np.zeros(2))


@pytest.mark.parametrize("unit", [1.0, 0.2])
def test_until_it_settled_an_arm_comes_no_further_from_its_command_than_under_way(unit):
    at_rest = AtRest(unit)
    at_rest.lags(0.0, -0.1)
    assert not at_rest.moved(0.1, -0.14) and not at_rest.moved(0.2, 0.1)
    assert at_rest.moved(0.3, -0.16) and at_rest.moved(0.4, -0.1)  # and so it stays
    at_rest.rest.begin_anew()
    assert not at_rest.moved(0.5, -0.1)


@pytest.mark.parametrize("unit", [1.0, 0.2])
@pytest.mark.parametrize(("there", "moved"), [(0.16, False), (0.24, False), (0.14, True), (0.26, True)])
def test_once_it_settled_an_arm_stays_where_that_was(unit, there, moved):
    at_rest = AtRest(unit)
    at_rest.lags(0.0, 0.2)
    assert not at_rest.moved(0.0, 0.0) and not at_rest.moved(1.0, 0.1)  # on its way for a second
    assert not at_rest.moved(1.01, 0.2)
    assert at_rest.moved(1.02, there) == moved


def test_a_gripper_that_is_opened_is_no_moved_arm_but_has_not_stayed():
    at_rest = AtRest()
    assert not at_rest.moved(0.0, 0.0, 0.1) and at_rest.rest.stayed.tolist() == [True, True]
    at_rest.moved(1.01, 0.0, 0.1)
    assert not at_rest.moved(1.02, 0.0, 0.14) and at_rest.rest.stayed.tolist() == [True, True]
    assert not at_rest.moved(1.03, 0.0, 0.16) and at_rest.rest.stayed.tolist() == [True, False]


@pytest.mark.parametrize("unit", [1.0, 0.2])
@pytest.mark.parametrize(("pace", "stands"), [(0.0, 0.21), (0.02, 0.21), (0.03, 1.01)])
def test_an_arm_is_on_its_way_until_it_stood_still_for_a_moment(unit, pace, stands):
    at_rest = AtRest(unit)
    for k in range(120):
        at_rest.moved(k / 100, pace * k / 100)
        assert at_rest.rest.on_its_way == (k / 100 < stands)


@pytest.mark.parametrize("unit", [1.0, 0.2])
def test_what_an_arm_lagged_by_for_seconds_is_its_way_and_no_more(unit):
    at_rest = AtRest(unit)
    assert at_rest.off(0.051) and not at_rest.off(0.049)
    for k in range(501):  # 5 s: 63 % of it
        at_rest.lags(k / 100, -0.1)
    assert not at_rest.off(0.11) and at_rest.off(0.115) and at_rest.off(-0.115)
    at_rest.lags(105.0, 0.3)  # one message after a pause counts as a tenth of a second
    assert not at_rest.off(0.117) and at_rest.off(0.119)
    assert at_rest.far(-0.251) and not at_rest.far(0.249)
