"""Real-time chunking from end to end but the network: what a chunk begins with is what the player commands."""

import numpy as np
import pytest
import rclpy
from hypothesis import given, settings
from hypothesis import strategies as st
from playback_kit import ACCELERATION, NAMES, PERIOD
from playback_kit import Bench as PlayerBench
from policy_node_kit import Bench as NodeBench
from rclpy.parameter import Parameter
from test_policy import NOW, ROBOT, STATE, STEP, observation, start, tiny

from pi0_ros.msg import PlayerStatus
from pi0_ros.policy.policy import ObservationError
from pi0_ros.policy.realtime import GuidanceSettings, guidance_weights
from pi0_ros.ros.conversions import SECOND, to_stamp
from pi0_ros.ros.handover import Handover, Published

DT = 0.05
HORIZON = 30
# By how much a joint may lag where two chunks meet at an angle: it turns at 0.8 of its acceleration limit, and their
# speeds (0.0027 in an action, to either side) differ by 0.108 / s at most.
LAG = 1e-4 + 0.108**2 / (2 * 0.8 * ACCELERATION)
cycle = st.tuples(
    st.integers(2, 45),  # player periods of 10 ms that inference takes
    st.integers(3, 30),  # periods until the next one begins
    st.sampled_from(["taken", "taken", "taken", "lost", "refused"]),
)


class Rehearsal:
    """A player, what policy_node keeps of it, and chunks that begin as told and then wander off."""

    def __init__(self, seed: int) -> None:
        self.bench = PlayerBench(streamed=NAMES, handover="switch", approach_threshold=10.0)
        self.handover = Handover()
        self.random = np.random.default_rng(seed)
        self.commanded: dict[int, np.ndarray] = {}
        self.said = None

    def tick(self) -> None:
        bench, player = self.bench, self.bench.player
        bench.tick()
        if player.commanded is not None:
            self.commanded[bench.now] = player.commanded.copy()
        if (bench.now // PERIOD) % 10 == 0 or (player.state, player.reason) != self.said:
            self.said = (player.state, player.reason)
            status = PlayerStatus(
                state=player.state,
                sequence=max(player.sequence, 0),
                epoch=player.epoch,
                handover_delay=player.handover_delay,
                chunks_refused=player.refused,
                newest_refused=player.refused_sequence is not None,
                refused_sequence=player.refused_sequence or 0,
            )
            status.header.stamp = to_stamp(bench.now)
            self.handover.heard(status, bench.now)

    def infer(self, took: int, fate: str) -> tuple[int, np.ndarray, int]:
        """(time of action 0, actions [H, 3], how many are kept) of a chunk that arrives `took` periods later."""
        bench, begin = self.bench, self.bench.now
        committed = self.handover.committed(begin, begin, 0, "go")
        kept = committed.executed if committed else np.empty((0, 3))
        origin = kept[-1] if len(kept) else (bench.arm if bench.player.commanded is None else bench.player.commanded)
        way = self.random.uniform(-0.0025, 0.0025, 3) + self.random.uniform(-2e-4, 2e-4, (HORIZON - len(kept), 3))
        actions = np.concatenate([kept, np.clip(origin + np.cumsum(way, axis=0), 0.01, 0.9)])
        for _ in range(took):
            self.tick()
        self.handover.published(Published(bench.sequence + 1, 0, "go", begin, bench.now, actions, DT))
        if fate == "lost":
            bench.sequence += 1
        else:
            sent = np.full_like(actions, np.nan) if fate == "refused" else actions
            bench.offer(sent, age=took * PERIOD / SECOND)
        return begin, actions, len(kept)


@settings(max_examples=40, deadline=None)
@given(st.lists(cycle, min_size=3, max_size=10), st.integers(0, 2**16))
def test_the_kept_actions_of_every_chunk_are_what_the_player_commands_at_their_times(cycles, seed):
    run = Rehearsal(seed)
    run.bench.arm = np.full(3, 0.4)
    for _ in range(3):
        run.tick()
    chunks, arrivals, gone = [], [], -SECOND
    for took, pause, fate in [(5, 25, "taken"), *cycles]:
        # Not judged is what begins while nobody can know that a chunk was lost, or the player still catches up with
        # one that came later than any before, or that was made while that could not be known.
        sure = run.bench.now - gone > 0.2 * SECOND
        begin, actions, kept = run.infer(took, fate)
        arrivals.append(run.bench.now)
        if sure and fate == "taken":
            chunks.append((begin, actions, kept))
        late = took * PERIOD + PERIOD > (kept - 1) * DT * SECOND
        if fate == "lost" or (fate == "taken" and (late or not sure)):
            gone = run.bench.now
        for _ in range(pause):
            run.tick()
    for _ in range(60):
        run.tick()
    assert len(chunks) and chunks[0][2] == 0  # nothing was executed before the first
    for begin, actions, kept in chunks:
        # Until a later chunk is there: that one cuts the corners of this one's path between its own actions.
        after = [arrival for arrival in arrivals if arrival > begin][1:]
        for k in range(kept):
            instant = begin + round(k * DT * SECOND)
            if instant <= min(after, default=instant):
                assert (np.abs(actions[k] - run.commanded[instant]) <= LAG).all()


def test_in_a_steady_run_chunks_after_the_first_keep_the_actions_of_the_delay_and_one_more():
    run = Rehearsal(0)
    run.bench.arm = np.full(3, 0.4)
    run.tick()
    kept = []
    for _ in range(5):
        kept.append(run.infer(12, "taken")[2])  # 0.12 s; taken over at the next tick, 0.13 s: 2.6 actions
        for _ in range(7):
            run.tick()
    assert kept == [0, 4, 4, 4, 4]
    trail = np.array(run.bench.trail[40:])  # after the first, which found the arm at rest
    assert np.abs(np.diff(trail, axis=0)).max() < 8e-4  # 0.054 rad/s at most: chunks meet without a step


# --- what the policy makes of it ------------------------------------------------------------------------------------


def test_committed_actions_are_taken_relative_to_the_state_as_it_is_now():
    policy = tiny(rtc_max_delay=4)
    now = STATE + 0.1
    committed = np.tile(STATE + 0.25, (2, 1))
    frozen, guidance = policy._conditions(now, committed, np.empty((0, 6)))
    assert guidance is None
    expected = policy.transforms.encode(now, committed)["actions"]
    np.testing.assert_allclose(frozen.numpy(), expected, atol=1e-6)
    # 0.15 beyond the new state, in normalised units: quarter of a range of 3.82 is 0.955 (the pan joint).
    np.testing.assert_allclose(frozen[:, 0].numpy(), 0.15 / 0.955, atol=1e-5)
    assert ROBOT.joints[0].relative
    frozen, guidance = policy._conditions(now, committed, np.empty((0, 6)), guided=True)  # asked for, it is guided
    assert frozen is None and guidance.weights[:2].tolist() == [1, 1]
    for count, trained in ((4, True), (5, False)):  # as many as were trained, and one more
        frozen, guidance = policy._conditions(now, np.tile(STATE, (count, 1)), np.empty((0, 6)))
        assert (frozen is not None, guidance is None) == (trained, trained)


def test_guidance_follows_the_chunk_in_execution_and_not_the_one_inferred_last():
    policy = tiny()
    policy.infer(observation(), noise=start(1))  # a chunk that was refused
    committed, following = np.tile(STATE + 0.1, (2, 1)), np.tile(STATE + 0.2, (3, 1))
    _, guidance = policy._conditions(STATE, committed, following)
    targets = guidance.previous[:, 0].numpy() * 0.955
    np.testing.assert_allclose(targets, [0.1, 0.1, 0.2, 0.2, 0.2, 0, 0, 0, 0, 0], atol=1e-6)
    # c = 3/4, 2/4, 1/4 of the way; c * (e^c - 1) / (e - 1); nothing is known of the last five
    np.testing.assert_allclose(guidance.weights.numpy(), [1, 1, 0.487561, 0.188770, 0.041324, 0, 0, 0, 0, 0], atol=1e-5)
    later = observation(seed=1, stamp=NOW + 2 * STEP)
    policy._guidance = GuidanceSettings("ones")
    drawn = policy.infer(later, noise=start(2), executed=committed, following=following).actions
    policy.infer(observation(), noise=start(1))
    alone = policy.infer(later, noise=start(2), executed=committed, following=np.empty((0, 6))).actions
    aside = [np.abs(actions[2:5] - following).mean() for actions in (drawn, alone)]
    assert aside[0] < 0.6 * aside[1]


def test_the_old_chunk_may_be_longer_than_the_new_one():
    np.testing.assert_allclose(guidance_weights(2, 40, 4, "linear"), [1, 1, 2 / 3, 1 / 3])
    assert guidance_weights(2, 2, 4).tolist() == [1, 1, 0, 0]  # nor need it be any longer than what is committed
    policy = tiny()
    _, guidance = policy._conditions(STATE, np.tile(STATE, (2, 1)), np.tile(STATE, (30, 1)))
    assert guidance.previous.shape == (10, 8)


@pytest.mark.parametrize("jacobian", [True, False])
def test_the_guidance_parameters_choose_the_method(jacobian):
    policy = tiny()
    policy._guidance = GuidanceSettings("linear", 3.0, jacobian)
    _, guidance = policy._conditions(STATE, np.tile(STATE, (2, 1)), np.empty((0, 6)))
    assert (guidance.max_weight, guidance.jacobian) == (3.0, jacobian)


def test_guidance_that_would_not_pull_is_refused():
    for weight in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="guidance max_weight must be above 0"):
            GuidanceSettings(max_weight=weight)


def test_impossible_actions_to_lean_on_are_refused():
    for following in (np.zeros((2, 5)), np.full((2, 6), np.nan)):
        with pytest.raises(ObservationError, match="following actions"):
            tiny().infer(observation(), executed=np.zeros((1, 6)), following=following)


# --- rehearsal of slow hardware ---------------------------------------------------------------------------------------


@pytest.fixture
def bench():
    context = rclpy.Context()
    rclpy.init(context=context)
    bench = NodeBench(context, rate=20.0, extra_latency=0.3)
    yield bench
    bench.close()
    context.try_shutdown()


def test_extra_latency_delays_chunks_and_does_not_keep_the_node_from_ending(bench):
    b = bench
    b.start()
    chunk = b.chunks[-1]
    took = chunk.inference_end.sec - chunk.inference_begin.sec
    took += (chunk.inference_end.nanosec - chunk.inference_begin.nanosec) * 1e-9
    assert took >= 0.3
    b.until(lambda: b.node._worker.health.chunks)
    assert b.node._worker.health.latency["total"].summary(b.now() / SECOND).max >= 0.3  # of all, not the network's
    b.node.set_parameters([Parameter("extra_latency", value=5.0)])
    asked = len(b.policy.asked)
    b.until(lambda: len(b.policy.asked) > asked, doing=b.send)
    assert b.node.trigger_deactivate().name == b.node.trigger_cleanup().name == "SUCCESS"
    assert b.policy.closed == 1
