"""The player without ROS: what it commands and why, tick by tick on a made-up clock."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pi0_ros.robot import Robot
from pi0_ros.ros.playback import SECOND, Offer
from pi0_ros.ros.player import APPROACHING, DRY_RUN, HOLDING, PLAYING, STOPPED, Player, Settings

PERIOD = SECOND // 100
ROBOT = Robot.model_validate(
    {
        "name": "two",
        "control_rate": 20,
        "cameras": {"base_0_rgb": {"topic": "/c"}},
        "joints": [
            {"name": "a", "position": [-1.0, 1.0], "velocity": 2.0, "acceleration": 10.0},
            {"name": "b", "position": [-0.5, 2.0], "velocity": 1.0, "acceleration": 4.0},
            {
                "name": "g",
                "kind": "gripper",
                "position": [0, 1],
                "velocity": 3,
                "acceleration": 20,
                "open": 1,
                "closed": 0,
            },
        ],
        "state": {"max_age": 0.1},
        "commands": [
            {"topic": "/arm", "type": "JointTrajectory", "joints": ["a", "b"]},
            {"topic": "/gripper", "type": "Float64MultiArray", "joints": ["g"]},
        ],
    }
)
NAMES = ROBOT.joint_names
VELOCITY = np.array([2.0, 1.0, 3.0])
ACCELERATION = np.array([10.0, 4.0, 20.0])
LOW, HIGH = np.array([-1.0, -0.5, 0.0]), np.array([1.0, 2.0, 1.0])


class Bench:
    """A player, a clock and an arm that does as it is told."""

    def __init__(self, streamed=NAMES, start=True, **changes) -> None:
        self.player = Player(ROBOT, Settings(**changes), streamed)
        self.now = 10 * SECOND
        self.arm = np.zeros(3)
        self.sensing = True
        self.sequence = -1
        self.trail = []  # positions at every tick that had a command
        self.plans = []  # (now, Plan)
        self.sends = 0
        if start:
            self.player.start()

    def offer(self, actions, age=0.0, dt=0.05, sequence=None, epoch=0, names=NAMES) -> str:
        values = np.asarray(actions, dtype=np.float64)
        self.sequence = self.sequence + 1 if sequence is None else sequence
        return self.player.offer(
            Offer(self.now - round(age * SECOND), self.sequence, epoch, names, len(values), dt, values.ravel()),
            self.now,
        )

    def tick(self, ticks=1, period=PERIOD) -> None:
        for _ in range(ticks):
            self.now += period
            if self.sensing:
                self.player.observe(NAMES, self.arm, self.now, self.now)
            commands = self.player.tick(self.now)
            if commands is None:
                continue
            self.trail.append(self.player.commanded.copy())
            self.sends += commands.stream
            self.arm = self.player.commanded.copy()
            if commands.plan is not None:
                self.plans.append((self.now, commands.plan))

    def lively(self) -> None:
        """A chunk that moves everything to and fro for 2 s."""
        time = np.arange(41) * 0.05
        self.offer(np.stack([0.3 * np.sin(3 * time), 0.2 * np.sin(2 * time), 0.5 + 0 * time], axis=1))

    @property
    def seen(self) -> tuple[int, str]:
        return self.player.state, self.player.reason


def check_limits(trail, period=0.01) -> None:
    """Positions [n, 3], one each period."""
    trail = np.array(trail).reshape(-1, 3)
    assert np.isfinite(trail).all()
    assert (trail >= LOW - 1e-9).all() and (trail <= HIGH + 1e-9).all()
    velocity = np.diff(trail, axis=0) / period
    assert (np.abs(velocity) <= VELOCITY * (1 + 1e-6)).all()
    assert (np.abs(np.diff(velocity, axis=0)) <= ACCELERATION * period * (1 + 1e-6) + 1e-9).all()


def check_plans(plans, joints=(0, 1)) -> None:
    """Each trajectory keeps the limits, begins ahead of now and on the way of the one before, and ends at rest."""
    joints = list(joints)
    velocity, acceleration = VELOCITY[joints], ACCELERATION[joints]
    before = None
    for now, plan in plans:
        steps = np.diff(plan.times)
        assert (steps == PERIOD).all()
        assert plan.times[0] - now >= PERIOD
        assert not plan.velocities[-1].any()
        assert np.isfinite(plan.positions).all()
        assert (plan.positions >= LOW[joints] - 1e-9).all() and (plan.positions <= HIGH[joints] + 1e-9).all()
        assert (np.abs(plan.velocities) <= velocity * (1 + 1e-6)).all()
        assert (np.abs(np.diff(plan.velocities, axis=0)) <= acceleration * 0.01 * (1 + 1e-6) + 1e-9).all()
        mean = (plan.velocities[1:] + plan.velocities[:-1]) * 0.005
        np.testing.assert_allclose(np.diff(plan.positions, axis=0), mean, atol=1e-9)
        if before is not None:
            row = min(int((plan.times[0] - before.times[0]) // PERIOD), len(before.times) - 1)
            np.testing.assert_allclose(plan.positions[0], before.positions[row], atol=1e-9)
            np.testing.assert_allclose(plan.velocities[0], before.velocities[row], atol=1e-9)
        before = plan


def test_follows_a_chunk_by_its_stamps_however_late_it_comes():
    bench = Bench()
    bench.tick(5)
    ramp = np.stack([np.arange(41) * 0.02, np.arange(41) * 0.01, np.full(41, 0.2)], axis=1)  # 0.4 and 0.2 rad/s
    observed = bench.now - round(0.3 * SECOND)
    assert bench.offer(ramp, age=0.3) == ""
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
    check_limits(bench.trail)


def test_names_the_joint_whose_state_is_missing():
    bench = Bench()
    bench.sensing = False
    for _ in range(5):
        bench.now += PERIOD
        bench.player.observe(["g", "x", "a"], [0.5, 9.0, 0.1], bench.now, bench.now)
        assert bench.player.tick(bench.now) is None
    assert bench.seen == (HOLDING, "no joint state of b for more than 0.1 s")
    bench.player.observe(["b"], [float("nan")], bench.now, bench.now)
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
    bench.offer(np.tile([0.8, 0.0, 1.0], (41, 1)))
    bench.tick(1)
    state, reason = bench.seen
    assert state == APPROACHING and "joint 'a' is 0.8 from where chunk 0 begins, more than 0.25" in reason
    while bench.player.state == APPROACHING:
        bench.tick()
    speeds = np.abs(np.diff(np.array(bench.trail), axis=0)) / 0.01
    assert (speeds.max(axis=0) <= 0.2 * VELOCITY + 1e-6).all() and speeds[:, 0].max() > 0.39
    assert bench.player.state == PLAYING and bench.arm[0] > 0.7
    bench.tick(25)
    assert bench.arm[0] == pytest.approx(0.8, abs=0.01)
    check_limits(bench.trail)


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
    bench.player.stop("stop service")
    bench.tick(40)
    assert bench.player.at_rest
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
    bench.arm = np.array([-0.9, 1.5, 0.0])
    bench.player.start()
    bench.player.observe(NAMES, bench.arm, bench.now, bench.now)
    bench.offer(np.tile([-0.9, 1.5, 0.0], (41, 1)))
    bench.now += PERIOD
    bench.player.tick(bench.now)
    np.testing.assert_allclose(bench.player.commanded, [-0.9, 1.5, 0.0])
    assert bench.seen == (PLAYING, "")


def test_an_arm_that_does_not_follow_is_not_left_behind():
    bench = Bench(following_error=0.3)
    bench.tick(2)
    time = np.arange(41) * 0.05
    bench.offer(np.stack([0.9 * np.minimum(time, 1), 0 * time, 0 * time], axis=1))
    stuck = np.array([0.0, 0.0, 0.0])
    for _ in range(80):
        bench.tick()
        bench.arm = stuck.copy()  # an emergency stop
    assert bench.seen == (HOLDING, "the arm does not follow: joint 'a' is more than 0.3 from its command")
    assert bench.player.at_rest and bench.player.commanded[0] < 0.4
    bench.offer(np.tile([0.1, 0.0, 0.0], (41, 1)))
    bench.tick(1)
    assert bench.seen == (PLAYING, "")
    assert abs(bench.player.commanded[0]) < 0.01  # from where the arm is


def test_not_started_means_nothing_is_sent():
    bench = Bench(start=False)
    bench.lively()
    bench.tick(20)
    assert bench.seen == (STOPPED, "not started") and bench.trail == [] and bench.plans == []


def test_refused_chunks_are_counted_and_the_old_one_plays_on():
    bench = Bench()
    bench.tick(2)
    bench.lively()
    bench.tick(10)
    assert "action 0 of joint 'b' is nan" in bench.offer([[0.0, np.nan, 0.0], [0, 0, 0]])
    bench.tick(1)
    assert bench.seen == (PLAYING, "refused chunk 1: action 0 of joint 'b' is nan")
    assert "its sequence is not above 0" in bench.offer(np.zeros((41, 3)), sequence=0)
    assert "all its actions are past" in bench.offer(np.zeros((4, 3)), age=0.5, sequence=2)
    assert bench.player.refused == 3 and bench.player.played == 1
    bench.lively()
    bench.tick(1)
    assert bench.seen == (PLAYING, "") and bench.player.played == 2


def test_an_older_epoch_is_void_and_a_newer_one_drops_the_chunk_at_once():
    bench = Bench()
    bench.tick(2)
    bench.lively()
    bench.tick(20)
    bench.player.announce_epoch(1)
    bench.tick(1)
    assert bench.seen == (HOLDING, "the policy dropped it") and bench.player.holds == 1
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


def test_a_stop_sends_one_braking_trajectory():
    bench = Bench(streamed=["g"])
    bench.tick(2)
    bench.lively()
    bench.tick(40)
    bench.player.stop("stop service")
    before = len(bench.plans)
    bench.tick(60)
    assert len(bench.plans) == before + 1
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


row = st.tuples(st.floats(-1.2, 1.2), st.floats(-0.7, 2.2), st.floats(-0.2, 1.2))
wild = st.one_of(st.floats(-1.5, 2.5), st.floats(allow_nan=True, allow_infinity=True))
motion = st.tuples(
    st.just("chunk"),
    st.lists(row, min_size=3, max_size=12),
    st.floats(0.0, 0.4),  # age: the delay with which it comes
    st.sampled_from([0.05, 0.2, 0.4]),
    st.integers(1, 40),  # ticks until the next event
)
event = st.one_of(
    motion,
    motion,
    motion,
    st.tuples(st.just("tick"), st.integers(1, 60)),
    st.tuples(
        st.just("chunk"),
        st.lists(st.tuples(*[wild] * 3), min_size=1, max_size=4),
        st.floats(-0.2, 1.5),
        st.one_of(st.just(0.05), st.floats(allow_nan=True, allow_infinity=True)),
        st.integers(0, 5),
    ),
    st.tuples(st.just("repeat"), st.integers(0, 5)),  # an old chunk again: a duplicate, or out of order
    st.tuples(st.just("jump"), st.floats(-5.0, 5.0)),
    st.tuples(st.just("blind"), st.integers(1, 40)),
    st.tuples(st.just("epoch"), st.booleans()),
    st.tuples(st.just("pause"), st.integers(0, 40)),
)


@settings(max_examples=150, deadline=None)
@given(
    events=st.lists(event, min_size=4, max_size=25),
    handover=st.sampled_from(["blend", "ensemble", "switch"]),
    interpolation=st.sampled_from(["linear", "cubic"]),
    limits=st.sampled_from(["clamp", "clamp", "clamp", "refuse"]),
    streamed=st.sampled_from([NAMES, ("g",), ()]),
)
def test_limits_hold_and_nothing_is_ever_nan_whatever_comes(events, handover, interpolation, limits, streamed):
    bench = Bench(streamed, handover=handover, interpolation=interpolation, limits=limits, approach_speed=0.5)
    bench.arm = np.array([0.1, 0.2, 0.3])
    bench.tick(2)
    made, epoch = [], 0
    for kind, *values in events:
        if kind == "tick":
            bench.tick(values[0])
        elif kind == "chunk":
            actions, age, dt, ticks = values
            bench.offer(actions, age, dt, epoch=epoch)
            made.append((bench.now, bench.sequence, actions, dt, epoch))
            bench.tick(ticks)
        elif kind == "repeat" and made:
            at, sequence, actions, dt, old = made[-1 - values[0] % len(made)]
            newest = bench.sequence
            bench.offer(actions, (bench.now - at) / SECOND, dt, sequence, old)
            bench.sequence = newest
        elif kind == "jump":
            bench.now = max(0, bench.now + round(values[0] * SECOND))
        elif kind == "blind":
            bench.sensing = False
            bench.tick(values[0])
            bench.sensing = True
        elif kind == "epoch":
            epoch += 1
            if values[0]:
                bench.player.announce_epoch(epoch)
        elif kind == "pause":
            bench.player.stop("stop service")
            bench.tick(values[0])
            bench.player.start()
    bench.tick(60)
    trail = np.array(bench.trail)
    assert np.isfinite(trail).all()
    if not any(kind == "jump" and values[0] > 0 for kind, *values in events):
        check_limits(trail)
    else:  # a late tick makes up for at most five periods
        assert (trail >= LOW - 1e-9).all() and (trail <= HIGH + 1e-9).all()
        if streamed == NAMES:
            assert (np.abs(np.diff(trail, axis=0)) <= VELOCITY * 0.05 * (1 + 1e-6)).all()
    if streamed != NAMES:
        joints = (0, 1) if streamed else (0, 1, 2)
        if not any(kind == "jump" for kind, *_ in events):
            check_plans(bench.plans, joints)
        for plan in bench.plans:
            check_plans([plan], joints)
