"""policy_node over real topics: observations in, chunks out; prompt, rate, services, clock, real-time chunking."""

import threading
import time
from unittest.mock import Mock

import numpy as np
import pytest
import rclpy
import torch
from policy_node_kit import HORIZON, LATCHED, Bench, robot
from rclpy.clock import ClockType
from rclpy.parameter import Parameter
from rclpy.time import Time
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import Image
from std_msgs.msg import String
from std_srvs.srv import SetBool, Trigger

from pi0_ros.msg import PlayerStatus
from pi0_ros.policy.policy import ObservationError
from pi0_ros.ros.conversions import SECOND, chunk_actions, stamp_ns, to_stamp
from pi0_ros.ros.judging import Settings
from pi0_ros.ros.policy_node import prompt_fault
from pi0_ros.ros.streams import Snapshot
from pi0_ros.ros.worker import SIGN_OF_LIFE
from pi0_ros.srv import SetPrompt

POLICY = "policy_node: policy"


@pytest.fixture
def bench():
    """Makes a Bench from parameters; closes it after the test."""
    context, made = rclpy.Context(), []
    rclpy.init(context=context)

    def make(**parameters) -> Bench:
        made.append(Bench(context, **parameters))
        return made[-1]

    yield make
    for each in made:
        each.close()
    context.try_shutdown()


def real(chunks):
    """Without the void ones."""
    return [chunk for chunk in chunks if chunk.horizon]


def test_a_chunk_carries_all_that_a_player_needs(bench):
    b = bench(rate=50.0)
    b.start()
    chunk = b.chunks[0]
    assert list(chunk.joint_names) == ["shoulder", "elbow"]
    np.testing.assert_allclose(chunk_actions(chunk)[0], [0.1, 0.2])  # sent as elbow, shoulder
    np.testing.assert_allclose(chunk_actions(chunk)[-1], [0.19, 0.29])
    assert (chunk.horizon, chunk.dt) == (HORIZON, 0.05)
    assert (chunk.prompt, chunk.num_steps, chunk.checkpoint) == ("wave", 3, "stub")
    assert (chunk.prefix_reused, chunk.cameras_encoded, chunk.header.frame_id) == (False, 2, "two_joints")
    assert stamp_ns(chunk.header.stamp) == stamp_ns(chunk.inference_begin) == b.policy.asked[0].stamp
    assert stamp_ns(chunk.inference_begin) < stamp_ns(chunk.inference_end)
    b.until(lambda: len(b.chunks) >= 3, doing=b.send)
    assert b.chunks[0].sequence < b.chunks[1].sequence < b.chunks[2].sequence
    b.node.trigger_deactivate()
    b.until(lambda: not b.chunks[-1].horizon)  # the player holds at once
    assert b.chunks[-1].sequence == b.node._worker.health.chunks  # counted from 0 without a gap


def with_late_camera(latency):
    """The robot, one of whose cameras shows what was so many seconds ago."""
    known = robot()
    late = known.cameras["base_0_rgb"].model_copy(update={"latency": latency})
    return robot(cameras={**known.cameras, "base_0_rgb": late})


@pytest.mark.parametrize("latency", [0.2, 1.5])  # and by more than stamps may be ahead of the clock
def test_a_camera_that_shows_the_past_is_paired_with_the_state_of_then_and_the_chunk_is_meant_for_then(bench, latency):
    b = bench(rate=20.0)
    b.robot = with_late_camera(latency)
    sent: list[tuple[int, float]] = []

    def send():
        for slot in b.cameras:
            b.send_frame(slot)
        sent.append((b.now(), len(sent) * 0.001))
        b.send_joints(stamp=sent[-1][0], shoulder=sent[-1][1], elbow=0.0)

    assert b.node.trigger_configure().name == "SUCCESS"
    assert b.node.trigger_activate().name == "SUCCESS"
    b.until(lambda: len(b.chunks) >= 3, doing=send)
    assert stamp_ns(b.chunks[0].header.stamp) == b.policy.asked[0].stamp
    for chunk in b.chunks:
        instant = stamp_ns(chunk.header.stamp)
        assert stamp_ns(chunk.inference_begin) - instant == round(latency * SECOND)
        newest = max(entry for entry in sent if entry[0] <= instant)
        assert chunk_actions(chunk)[0, 0] == pytest.approx(newest[1])
    assert b.node._worker.health.observation_age.summary(b.now() / SECOND).p50 >= latency


def test_the_policy_is_only_ever_touched_by_one_thread_that_is_not_the_executors(bench):
    b = bench(rate=50.0)
    b.start()
    b.until(lambda: len(b.chunks) >= 3, doing=b.send)
    assert len(b.policy.threads) == 1 and threading.get_ident() not in b.policy.threads


def test_frames_are_named_by_their_stamps_and_an_unchanged_one_is_the_same_array(bench):
    b = bench(rate=50.0)
    b.node.trigger_configure(), b.node.trigger_activate()
    stamp = b.now()
    b.send_frame("left_wrist_0_rgb", 7, stamp)

    def moving_base():
        b.send_frame("base_0_rgb")
        b.send_joints()
        b.send_frame("left_wrist_0_rgb", 7, stamp)

    b.until(lambda: len(b.chunks) >= 3, doing=moving_base)
    first, second = b.policy.asked[0], b.policy.asked[-1]
    assert first.frames["left_wrist_0_rgb"] == second.frames["left_wrist_0_rgb"] == stamp
    assert first.images["left_wrist_0_rgb"] is second.images["left_wrist_0_rgb"]
    assert first.frames["base_0_rgb"] < second.frames["base_0_rgb"]
    assert first.images["left_wrist_0_rgb"].shape == (6, 8, 3) and (first.images["left_wrist_0_rgb"] == 7).all()


def test_without_one_camera_nothing_is_published_and_that_camera_is_blamed(bench):
    b = bench(rate=50.0)
    b.node.trigger_configure(), b.node.trigger_activate()

    def no_wrist():
        b.send_frame("base_0_rgb")
        b.send_joints()

    b.until(lambda: "left_wrist_0_rgb: no message yet" in b.messages.get(POLICY, ""), doing=no_wrist)
    assert b.levels[POLICY] == 2 and not b.chunks
    assert b.messages["policy_node: left_wrist_0_rgb"].startswith(
        "no message yet on wrist/image_raw, though it is published"
    )
    assert b.levels["policy_node: base_0_rgb"] == 0


def test_a_stream_that_stops_is_blamed_with_its_age_and_chunks_stop(bench):
    b, log = bench(rate=50.0), []
    b.start()
    b.node._worker._logger = Mock(warning=lambda line, **_: log.append(line))  # /rosout may still be a former node's

    def no_joints():
        b.send_frame("base_0_rgb")
        b.send_frame("left_wrist_0_rgb")

    b.until(lambda: "joint_states: newest message is" in b.node._worker.health.blame, doing=no_joints)
    count = b.node._worker.health.chunks
    b.until(lambda: b.node._worker.health.rejections > 5, doing=no_joints)
    assert b.node._worker.health.chunks == count
    b.until(lambda: any(line.startswith("no observation: joint_states: newest message is") for line in log))


def test_the_prompt_comes_from_robot_file_parameter_topic_and_service_the_newest_wins(bench):
    b = bench(rate=50.0)
    b.start()
    assert b.chunks[-1].prompt == "wave"
    b.node.set_parameters([Parameter("prompt", value="bow")])
    b.until(lambda: b.chunks[-1].prompt == "bow", doing=b.send)
    b.other.create_publisher(String, "prompt", LATCHED).publish(String(data="nod"))
    b.until(lambda: b.chunks[-1].prompt == "nod", doing=b.send)
    assert b.node.get_parameter("prompt").value == "nod"
    assert b.call(SetPrompt, "set_prompt", SetPrompt.Request(prompt="jump")).success
    b.until(lambda: b.chunks[-1].prompt == "jump", doing=b.send)
    assert len({c.epoch for c in b.chunks}) == 1
    assert not b.call(SetPrompt, "set_prompt", SetPrompt.Request(prompt=" ")).success
    assert [prompt_fault("a" * length) for length in (2000, 2001)] == [
        "",
        "the prompt has 2001 characters, at most 2000 are allowed",
    ]
    log = []
    b.node.get_logger = lambda: Mock(warning=lambda line, **_: log.append(line))  # /rosout may still be a former node's
    b.other.create_publisher(String, "prompt", LATCHED).publish(String(data=" "))
    b.until(lambda: "the prompt is empty: ignored, it stays 'jump'" in log, doing=b.send)
    assert b.node.get_parameter("prompt").value == "jump"


def test_a_latched_prompt_is_found_by_a_node_that_starts_later(bench):
    b = bench(rate=50.0)
    b.other.create_publisher(String, "prompt", LATCHED).publish(String(data="was there before"))
    b.start()
    b.until(lambda: b.chunks[-1].prompt == "was there before", doing=b.send)


def test_what_the_player_said_before_the_node_started_is_heard(bench):
    b = bench(rate=50.0)
    b.status.publish(PlayerStatus(state=PlayerStatus.STOPPED))
    b.node.trigger_configure(), b.node.trigger_activate()
    b.until(lambda: b.node._worker.handover.seconds_left(b.now()) is not None)


def test_drop_current_tells_the_player_at_once_and_drops_the_chunk_in_flight(bench):
    b = bench(rate=50.0)
    b.start()
    old, begin = b.chunks[-1].epoch, b.now()
    b.hold()
    answer = b.call(SetPrompt, "set_prompt", SetPrompt.Request(prompt="jump", drop_current=True))
    assert answer.success
    b.until(lambda: b.chunks[-1].epoch > old)  # while the policy is still at work
    void = b.chunks[-1]
    assert (void.horizon, void.prompt, void.checkpoint, void.dt) == (0, "jump", "stub", 0.05)
    assert list(void.joint_names) == ["shoulder", "elbow"] and begin < stamp_ns(void.header.stamp) <= b.now()
    assert b.node._worker.handover._last is None  # nothing of what was voided counts as on its way
    b.policy.go.set()
    b.until(lambda: b.chunks[-1].horizon, doing=b.send)
    assert b.node._worker.health.dropped == 1
    assert {c.prompt for c in real(b.chunks) if c.epoch > old} == {"jump"}
    assert all(a.sequence < z.sequence for a, z in zip(b.chunks, b.chunks[1:], strict=False))


def test_start_stop_pause_work_beside_the_lifecycle(bench):
    b = bench(rate=50.0)
    assert "not active" in b.call(Trigger, "start").message
    b.start()
    health, epoch = b.node._worker.health, b.chunks[-1].epoch
    assert b.call(SetBool, "pause", SetBool.Request(data=True)).success
    published = health.chunks
    b.until(lambda: len(b.chunks) == published, doing=b.send)
    begin = b.now()
    b.until(lambda: b.now() - begin > 0.2 * SECOND, doing=b.send)
    assert health.chunks == published and b.policy.resets == 1
    b.call(SetBool, "pause", SetBool.Request(data=False))
    b.until(lambda: health.chunks > published, doing=b.send)
    assert b.call(Trigger, "stop").success
    b.until(lambda: b.chunks[-1].horizon == 0)  # the player holds at once
    assert b.chunks[-1].epoch == epoch + 1
    b.node.trigger_deactivate()
    b.node.trigger_activate()  # does not undo a stop
    assert "stopped by ~/stop" in b.call(SetBool, "pause", SetBool.Request(data=False)).message  # nor does this
    published, begin = health.chunks, b.now()
    b.until(lambda: b.now() - begin > 0.2 * SECOND, doing=b.send)
    assert health.chunks == published
    assert b.call(Trigger, "start").success
    b.until(lambda: health.chunks > published, doing=b.send)
    assert b.policy.resets == 2


def test_stop_ends_the_ticks_before_it_voids_and_start_begins_them(bench):
    """The other way round, a tick in between would send a chunk of the new epoch, and the arm go on."""
    b, ticking = bench(rate=50.0), []
    b.start()
    worker = b.node._worker
    bump, worker.bump = worker.bump, lambda: (ticking.append(worker.ticking), bump())
    assert b.call(Trigger, "stop").success
    assert ticking == [False] and not worker.ticking
    b.until(lambda: b.values.get(POLICY, {}).get("running") == "False")
    assert b.call(Trigger, "start").success and worker.ticking


def test_a_pause_outlasts_deactivation_and_start_ends_it(bench):
    b = bench(rate=50.0)
    b.start()
    assert b.call(SetBool, "pause", SetBool.Request(data=True)).success
    b.node.trigger_deactivate(), b.node.trigger_activate()
    assert not b.node._worker.ticking
    assert b.call(Trigger, "start").success
    b.node.trigger_deactivate(), b.node.trigger_activate()
    assert b.node._worker.ticking


def test_after_a_reset_a_frame_of_the_same_stamp_is_looked_at_anew(bench):
    b = bench(rate=50.0)
    b.node.trigger_configure(), b.node.trigger_activate()
    stamp = b.now()

    def show(value):
        for slot in b.cameras:
            pixels = Image(height=6, width=8, encoding="rgb8", step=24, data=bytes([value]) * 144)
            b.node._streams._cameras[slot].push(stamp, pixels)

    show(7)
    b.until(lambda: b.policy.asked, doing=b.send_joints)
    assert b.call(Trigger, "reset").success
    show(9)
    b.until(lambda: (b.policy.asked[-1].images["base_0_rgb"] == 9).all(), doing=b.send_joints)


def test_reset_clears_buffers_and_caches_and_voids_the_chunks(bench):
    b = bench(rate=50.0)
    b.start()
    epoch = b.chunks[-1].epoch
    assert b.call(Trigger, "reset").success
    b.until(lambda: "no message yet" in b.node._worker.health.blame)
    b.until(lambda: b.chunks[-1].epoch > epoch and b.chunks[-1].horizon, doing=b.send)
    assert b.policy.resets == 2


@pytest.mark.parametrize("pause", [False, True], ids=["deactivate", "pause"])
def test_deactivate_and_pause_drop_the_chunk_that_is_being_made(bench, pause):
    b = bench(rate=50.0)
    b.start()
    b.hold()
    published = b.node._worker.health.chunks
    if pause:
        assert b.call(SetBool, "pause", SetBool.Request(data=True)).success
    else:
        b.node.trigger_deactivate()
    b.policy.go.set()
    b.until(lambda: b.node._worker.health.dropped == 1)
    assert b.node._worker.health.chunks == published


def test_free_running_makes_chunks_as_messages_come_and_none_faster(bench):
    b = bench(rate=0.0)
    b.start()
    b.until(lambda: len(b.chunks) >= 10, doing=b.send)
    stamps = [asked.stamp for asked in b.policy.asked]
    assert len(set(stamps)) == len(stamps)
    assert b.node._worker.health.ticks <= 3 * b.frame  # two frames and a state per round


@pytest.mark.parametrize("rate", [50.0, 0.0])
def test_on_demand_makes_a_chunk_only_when_the_player_runs_short(bench, rate):
    b = bench(rate=rate, on_demand_seconds=0.3)

    def status(left: float):
        last = real(b.chunks)[-1]
        message = PlayerStatus(state=PlayerStatus.PLAYING, seconds_left=left, sequence=last.sequence, epoch=last.epoch)
        message.header.stamp = to_stamp(b.now())
        b.status.publish(message)
        b.send()

    b.start()
    b.until(lambda: len(real(b.chunks)) > 3, doing=b.send)  # without a player there is demand
    b.until(lambda: b.node._worker.handover.seconds_left(b.now()) is not None, doing=lambda: status(9.0))
    count = len(real(b.chunks))
    begin, spoken = b.now(), len(b.chunks)
    b.until(lambda: b.now() - begin > 0.3 * SECOND, doing=lambda: status(9.0))
    assert len(real(b.chunks)) <= count + 1  # at most one that was under way
    b.until(lambda: len(b.chunks) > spoken + 3, doing=lambda: status(9.0))  # but it is seen to live
    assert {chunk.epoch for chunk in b.chunks} == {b.node._worker.epoch}
    # what says so is no newer than the last chunk: the player would stop for it
    sequences = [chunk.sequence for chunk in b.chunks]
    assert sequences == sorted(sequences) and sequences[-1] == real(b.chunks)[-1].sequence
    b.until(
        lambda: b.values.get(POLICY, {}).get("player_seconds_left", "no player") != "no player",
        doing=lambda: status(9.0),
    )
    count = len(real(b.chunks))
    b.until(lambda: len(real(b.chunks)) > count, doing=lambda: status(0.1))


def test_a_policy_that_has_nothing_to_send_speaks_before_the_player_takes_it_for_dead():
    assert Settings().policy_timeout / 5 >= SIGN_OF_LIFE


def test_a_tick_that_comes_while_the_one_before_is_at_work_is_a_deadline_miss(bench):
    b = bench(rate=50.0)
    b.start()
    b.policy.go.clear()
    b.until(lambda: b.node._worker.health.misses > 3, doing=b.send)
    b.until(lambda: float(b.values.get(POLICY, {}).get("misses_share", 0)) > 0, doing=b.send)
    b.policy.go.set()
    b.until(lambda: int(b.values.get(POLICY, {}).get("deadline_misses", 0)) > 3, doing=b.send)


def test_with_a_rate_messages_cause_no_ticks_and_one_that_finds_the_worker_at_rest_is_no_miss(bench):
    b = bench(rate=0.001)  # the first tick comes with the activation, the timer's long after the test
    b.node.trigger_configure(), b.node.trigger_activate()
    worker = b.node._worker
    b.until(lambda: worker.idle)
    b.until(lambda: isinstance(b.node._streams.observe(b.now(), b.now()), Snapshot), doing=b.send)
    b.until(lambda: worker.idle)
    assert worker.health.ticks == 1 and not b.chunks
    worker.tick_due()
    b.until(lambda: b.chunks)
    assert worker.health.misses == 0


def test_a_clock_that_is_exchanged_voids_the_chunks(bench):
    b = bench(rate=50.0)
    b.start()
    old = b.node._worker.epoch
    assert b.node._timer.clock.clock_type == ClockType.STEADY_TIME
    b.node.set_parameters([Parameter("use_sim_time", value=True)])
    assert b.node._worker.epoch > old


def test_a_clock_that_jumps_back_clears_the_buffers_and_drops_the_chunk_in_flight(bench):
    b = bench(rate=50.0, use_sim_time=True)
    clock, sim = b.other.create_publisher(Clock, "/clock", 10), [1000 * SECOND]

    def advance(send: bool = True):
        sim[0] += SECOND // 50
        clock.publish(Clock(clock=to_stamp(sim[0])))
        if send:
            for slot in b.cameras:
                b.send_frame(slot, stamp=sim[0])
            b.send_joints(stamp=sim[0])

    b.until(lambda: b.node._now() > 0, doing=advance)
    assert b.node.trigger_configure().name == b.node.trigger_activate().name == "SUCCESS"
    b.until(lambda: b.chunks, doing=advance)
    assert 1000 * SECOND < stamp_ns(b.chunks[0].header.stamp) <= sim[0]
    assert b.node._timer.clock.clock_type == ClockType.ROS_TIME  # so that ticks stand still with it
    b.policy.go.clear()
    asked, old = len(b.policy.asked), b.chunks[-1].epoch
    b.until(lambda: len(b.policy.asked) > asked, doing=advance)
    sim[0] = 500 * SECOND
    b.until(lambda: b.node._worker.epoch > old, doing=lambda: advance(send=False))
    b.policy.go.set()
    b.until(lambda: b.node._worker.health.dropped == 1, doing=lambda: advance(send=False))
    b.until(lambda: b.chunks[-1].epoch > old and b.chunks[-1].horizon, doing=advance)
    new = [c for c in real(b.chunks) if c.epoch > old]
    assert all(500 * SECOND < stamp_ns(c.header.stamp) < 600 * SECOND for c in new)


def test_a_system_clock_that_is_set_back_a_little_makes_no_old_frame_new(bench, monkeypatch):
    """Less than the stamps would betray: once the clock has reached them again, they would seem fresh."""
    b = bench(rate=50.0)
    cameras = {slot: camera.model_copy(update={"max_age": 0.3}) for slot, camera in b.robot.present_cameras.items()}
    b.robot = robot(cameras={**b.robot.cameras, **cameras})
    back, real_clock = [0], b.node.get_clock()

    class SetBack:
        def now(self):
            return Time(nanoseconds=real_clock.now().nanoseconds - back[0], clock_type=ClockType.SYSTEM_TIME)

    monkeypatch.setattr(b.node, "get_clock", SetBack)
    b.start()
    old = b.chunks[-1].epoch
    back[0], b.offset = SECOND // 2, -SECOND // 2
    frozen = b.now()  # cameras stand still, and only joint states go on
    b.until(lambda: b.node._worker.epoch > old, doing=b.send_joints)
    asked = len(b.policy.asked)
    b.until(lambda: b.now() > frozen + SECOND, doing=b.send_joints)
    assert len(b.policy.asked) == asked
    b.until(lambda: b.chunks[-1].epoch > old and b.chunks[-1].horizon, doing=b.send)
    assert min(b.policy.asked[-1].frames.values()) > frozen - SECOND // 2


def test_a_camera_whose_clock_is_ahead_is_blamed_and_voids_the_chunks_once(bench):
    b = bench(rate=50.0)
    b.start()
    epoch = b.node._worker.epoch

    def ahead():
        b.send_joints()
        b.send_frame("base_0_rgb")
        b.send_frame("left_wrist_0_rgb", stamp=b.now() + 5000 * SECOND)

    health = b.node._worker.health
    words = ("left_wrist_0_rgb: stamped 5000.", "left_wrist_0_rgb: stamped 4999.9")
    b.until(lambda: any(each in health.blame for each in words), doing=ahead)
    count = health.rejections
    b.until(lambda: health.rejections > count + 5, doing=ahead)
    assert b.node._worker.epoch == epoch + 1
    b.until(lambda: not health.blame, doing=b.send)


def test_epochs_go_on_after_cleanup_and_after_a_restart(bench):
    begin = int(time.time())  # epochs are of the wall clock: a node of before began with less
    b = bench(rate=50.0)
    b.start()
    before = b.chunks[-1].epoch
    assert before > begin
    assert b.node.trigger_deactivate().name == b.node.trigger_cleanup().name == "SUCCESS"
    b.chunks.clear()
    b.start()
    assert b.chunks[-1].epoch > before


def test_before_the_first_clock_message_the_clock_is_blamed(bench):
    b = bench(rate=0.0, use_sim_time=True)
    assert b.node.trigger_configure().name == b.node.trigger_activate().name == "SUCCESS"
    b.until(lambda: "/clock" in b.node._worker.health.blame, doing=b.send)
    assert not b.chunks


def plays(b, delay, **joints):
    """Sensors, and a player that plays the last chunk and took it over `delay` actions late."""
    last = real(b.chunks)[-1]
    message = PlayerStatus(
        state=PlayerStatus.PLAYING, handover_delay=delay, sequence=last.sequence, epoch=last.epoch, seconds_left=0.4
    )
    message.header.stamp = to_stamp(b.now())
    b.status.publish(message)
    b.send(**joints)


def test_no_more_actions_are_kept_than_the_checkpoint_was_trained_to_continue(bench):
    b = bench(rate=20.0)
    b.start()
    b.policy.settings.rtc_max_delay = 2
    b.until(lambda: b.chunks[-1].frozen == 2, doing=lambda: plays(b, 2.4))
    assert {chunk.frozen for chunk in real(b.chunks)} <= {0, 2}


@pytest.mark.parametrize(("mode", "taught"), [("never", 2), ("auto", 0)])
def test_nothing_is_kept_where_real_time_chunking_is_off_or_was_not_taught(bench, mode, taught):
    b = bench(rate=20.0, realtime_chunking=mode)
    b.start()
    b.policy.settings.rtc_max_delay = taught
    asked = len(b.policy.asked)
    b.until(
        lambda: b.node._worker.handover.delay() == 3 and len(b.policy.asked) > asked + 3, doing=lambda: plays(b, 2.4)
    )
    assert set(b.policy.executed) == set(b.policy.following) == {None}


def test_what_is_kept_ends_at_the_position_limits_as_what_the_player_executes_does(bench):
    b = bench(rate=20.0, realtime_chunking="guided")
    b.start()
    kept = lambda: [rows[:, 0].max() for rows in b.policy.executed if rows is not None]  # noqa: E731
    b.until(lambda: max(kept(), default=0) > 1.9, doing=lambda: plays(b, 2.4, shoulder=1.995, elbow=0.0))
    assert max(kept()) == 2.0
    assert max(chunk_actions(chunk)[:, 0].max() for chunk in real(b.chunks)) > 2.0


@pytest.mark.parametrize("latency", [0.0, 0.2])
def test_real_time_chunking_hands_over_what_will_have_been_executed(bench, latency):
    b = bench(rate=20.0, realtime_chunking="guided")
    b.robot = with_late_camera(latency)

    def status():
        plays(b, 2.4)

    b.start()
    b.until(lambda: b.chunks[-1].frozen == 4, doing=status)  # 2.4 actions: on the way to the fourth
    k = max(i for i, executed in enumerate(b.policy.executed) if executed is not None)
    executed, asked = b.policy.executed[k], b.policy.asked[k]
    # Every chunk is state + 0.01 a step, so what runs 50 ms * s after its observation is state + 0.01 * s.
    before = (asked.stamp - b.policy.asked[k - 1].stamp) / SECOND / 0.05
    np.testing.assert_allclose(executed[:, 0], 0.1 + 0.01 * (before + np.arange(4)), atol=1e-9)
    assert b.call(SetPrompt, "set_prompt", SetPrompt.Request(prompt="jump")).success
    b.until(lambda: b.chunks[-1].prompt == "jump", doing=status)
    first = next(i for i, asked in enumerate(b.policy.asked) if asked.prompt == "jump")
    assert b.policy.executed[first] is not None  # the arm goes on until the chunk is there, whatever it was told
    assert len(b.policy.following[first]) == 0


def test_an_exception_in_inference_stops_the_node_visibly_and_leaves_it_controllable(bench):
    b = bench(rate=50.0)
    b.start()
    b.policy.error = ValueError("the network is upset\nvery")
    b.until(lambda: b.node.lifecycle == "inactive", doing=b.send)
    b.until(lambda: b.levels.get(POLICY) == 2, doing=b.send)
    assert b.messages[POLICY].startswith("inference failed: ValueError: the network is upset")
    b.until(lambda: b.chunks[-1].horizon == 0)  # what the player has is void: it holds now, not when its chunk ends
    count = b.node._worker.health.chunks
    b.policy.error = None
    assert b.node.trigger_activate().name == "SUCCESS"
    b.until(lambda: b.node._worker.health.chunks > count, doing=b.send)
    assert not b.node._worker.health.fault


def test_a_thread_that_does_not_end_is_told_of(bench):
    b = bench(rate=50.0)
    b.start()
    b.hold()
    assert not b.node._worker.close(0.01)
    b.policy.go.set()
    assert b.node._worker.close() and b.policy.closed == 1


def test_an_observation_that_the_policy_cannot_take_is_a_rejection_and_no_fault(bench):
    b = bench(rate=50.0)
    b.start()
    b.policy.error = ObservationError("camera 'base_0_rgb': no pixels")
    b.until(lambda: b.node._worker.health.rejections > 1, doing=b.send)
    assert b.node._worker.health.blame == "no observation: observation: camera 'base_0_rgb': no pixels"
    b.policy.error, count = None, b.node._worker.health.chunks
    b.until(lambda: b.node._worker.health.chunks > count, doing=b.send)
    assert b.node.lifecycle == "active" and not b.node._worker.health.fault


def test_a_gpu_that_a_fault_took_along_is_told_with_the_way_out(bench, monkeypatch):
    def lost(device=None):
        raise RuntimeError("CUDA error: unspecified launch failure\nSearch for it")

    b = bench(rate=50.0)
    b.start()
    for name, answer in {
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "memory_allocated": lambda _: 0,
    }.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lost)
    b.policy.error = RuntimeError("CUDA error: unspecified launch failure")
    b.until(lambda: b.levels.get(POLICY) == 2, doing=b.send)
    assert "inference failed: RuntimeError: CUDA error: unspecified launch failure; " in b.messages[POLICY]
    assert "the GPU is lost to this process (CUDA error: unspecified launch failure)" in b.messages[POLICY]


def test_actions_that_are_not_finite_are_never_published(bench):
    b = bench(rate=50.0)
    b.start()
    infer, published = b.policy.infer, b.node._worker.health.chunks

    def spoiled(observation, **options):
        chunk = infer(observation, **options)
        chunk.actions[3, 1] = np.nan
        return chunk

    b.policy.infer = spoiled
    b.until(lambda: "not finite" in b.node._worker.health.fault, doing=b.send)
    b.until(lambda: len(b.chunks) >= b.node._worker.health.chunks)
    assert all(np.isfinite(c.actions).all() for c in b.chunks) and b.node._worker.health.chunks >= published


def test_diagnostics_tell_rates_ages_latencies_and_what_runs(bench):
    b, begin = bench(rate=50.0), time.monotonic()
    b.start()
    b.until(lambda: int(b.values.get(POLICY, {}).get("chunks", 0)) > 20, doing=b.send)
    values = b.values[POLICY]
    for stage in ("decode", "vision", "prefix", "denoise", "publish", "total"):
        for part in ("p50", "p95", "max"):
            assert float(values[f"latency_{stage}_ms_{part}"]) > 0
    assert float(values["latency_vision_ms_p50"]) == pytest.approx(1.0)
    lived = (time.monotonic() - begin) * 1e3  # ms; every stage is within it
    assert all(float(value) < lived for key, value in values.items() if key.startswith("latency_"))
    assert (values["prompt"], values["checkpoint"], values["state"]) == ("wave", "stub", "active")
    assert int(values["ticks"]) >= int(values["chunks"])
    assert values["player_seconds_left"] == "no player"
    for key in ("skew_ms_max", "observation_age_ms_p95", "deadline_misses", "prefix_reused", "prefix_reuse_share"):
        assert float(values[key]) >= 0
    for stream in ("base_0_rgb", "left_wrist_0_rgb", "joint_states"):
        assert float(b.values[f"policy_node: {stream}"]["rate_hz"]) > 5
        assert float(b.values[f"policy_node: {stream}"]["age_s"]) < 30


def test_thresholds_are_parameters(bench):
    b = bench(rate=50.0, diagnostics__latency_warn=1e-9)
    b.start()
    b.until(lambda: "latency_p95_s" in b.messages.get(POLICY, ""), doing=b.send)
    assert b.levels[POLICY] == 1
    b.node.set_parameters([Parameter("diagnostics.latency_error", value=1e-9)])
    b.until(lambda: b.levels[POLICY] == 2, doing=b.send)


def test_the_rate_can_change_while_the_node_runs(bench):
    b = bench(rate=1.0)
    b.start()
    assert b.node.set_parameters([Parameter("rate", value=100)])[0].successful
    count = len(b.chunks)
    b.until(lambda: len(b.chunks) > count + 10, doing=b.send)
