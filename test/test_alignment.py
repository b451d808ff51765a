"""Streams meet at a tick: the newest sample at or before it, fresh enough, close enough together."""

import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pi0_ros.policy.alignment import KINDS, Aligned, Rejected, StreamBuffer, StreamTimes, align, align_ticks

MS = 1_000_000
times = st.integers(-50, 50)


def filled(name="a", stamps=(), max_age=100, latency=0, span=1000):
    buffer = StreamBuffer(name, max_age, latency, span)
    for i, stamp in enumerate(stamps):
        buffer.push(stamp, i)
    return buffer


def test_a_sample_exactly_at_the_tick_belongs_to_it():
    buffer = filled(stamps=[10, 20, 30])
    assert buffer.newest_at(20).payload == 1
    assert buffer.newest_at(19).payload == 0
    assert buffer.newest_at(9) is None


def test_latency_moves_a_sample_back_in_time():
    buffer = filled(stamps=[100], latency=30)
    assert buffer.newest_at(69) is None
    assert (buffer.newest_at(70).time_ns, buffer.newest_at(70).stamp_ns) == (70, 100)


def test_of_two_samples_with_one_stamp_the_last_pushed_wins():
    buffer = filled(stamps=[10, 10])
    assert buffer.newest_at(10).payload == 1
    assert len(buffer) == 1


def test_out_of_order_samples_are_put_in_order_and_what_nobody_may_ask_for_any_more_is_dropped():
    buffer = filled(stamps=[30, 10, 40, 20], span=15)
    assert buffer.newest_at(29).payload == 3
    assert buffer.newest_at(19) is None
    assert len(buffer) == 3


def test_stamps_that_do_not_advance_do_not_fill_the_memory():
    buffer = StreamBuffer("a", 1, span_ns=10**9, most=5)
    for second in range(100):  # a driver that fills in nanoseconds only
        for part in range(0, 10**9, 10**8 - second):
            buffer.push(part, second)
    assert len(buffer) == 5


def test_clear_forgets():
    buffer = filled(stamps=[1, 2])
    buffer.clear()
    assert buffer.newest_at(10) is None


def test_a_negative_span_is_refused():
    with pytest.raises(ValueError, match="stream 'a': span_ns must not be negative, found -1"):
        StreamBuffer("a", 1, span_ns=-1)


@given(st.lists(times), times, st.integers(-5, 5), st.integers(0, 60))
def test_within_the_span_newest_at_equals_looking_at_everything(stamps, tick, latency, span):
    buffer = filled(stamps=stamps, latency=latency, span=span)
    kept = {stamp: payload for payload, stamp in enumerate(stamps)}
    past = [stamp for stamp in kept if stamp - latency <= tick]
    if stamps and tick + latency < max(stamps) - span:
        return  # further back than the buffer was made for
    found = buffer.newest_at(tick)
    assert (found and found.payload) == (kept[max(past)] if past else None)


def test_streams_align_with_their_skew():
    aligned = align([filled("a", [95]), filled("b", [80, 120])], 100, max_skew_ns=15)
    assert isinstance(aligned, Aligned)
    assert {name: sample.stamp_ns for name, sample in aligned.samples.items()} == {"a": 95, "b": 80}
    assert aligned.skew_ns == 15


@pytest.mark.parametrize(
    ("buffers", "tick", "skew", "stream", "kind", "reason"),
    [
        ([filled("a", [5]), filled("b")], 10, 100, "b", "missing", "no message yet"),
        ([filled("a", [11])], 10, 100, "a", "missing", "no message yet"),
        ([filled("a", [0], max_age=200 * MS)], 300 * MS, 0, "a", "stale", "0.300 s old, at most 0.200 s is allowed"),
        (
            [filled("a", [9 * MS], max_age=90 * MS), filled("b", [80 * MS], max_age=90 * MS)],
            90 * MS,
            50 * MS,
            "a",
            "skew",
            "0.071 s older than the newest stream, at most 0.050 s is allowed (max_skew)",
        ),
        ([filled("a", [10]), filled("b", [10, 3000 * MS])], 10, 0, "b", "clock", "3.000 s ahead of this node's clock"),
    ],
)
def test_a_rejection_names_the_stream_and_the_reason(buffers, tick, skew, stream, kind, reason):
    rejected = align(buffers, tick, skew, tick)
    assert isinstance(rejected, Rejected)
    assert (rejected.stream, rejected.kind) == (stream, kind)
    assert reason in rejected.reason


def test_the_limits_themselves_are_allowed():
    buffers = [filled("a", [0], max_age=100), filled("b", [40], max_age=100)]
    assert isinstance(align(buffers, 100, max_skew_ns=40), Aligned)
    assert isinstance(align([filled("a", [0, 1000 * MS], max_age=1)], 0, 0, 0), Aligned)  # exactly one second ahead


def test_a_tick_in_the_past_can_be_asked_without_suspecting_the_clock():
    buffers = [filled("a", [10, 5000 * MS])]
    assert align(buffers, 10, 0, 10).kind == "clock"
    assert align(buffers, 10, 0).samples["a"].payload == 0


streams = st.lists(
    st.tuples(st.lists(times, max_size=12), st.integers(0, 40), st.integers(-5, 5)), min_size=1, max_size=3
)


@given(streams, st.lists(times, min_size=1, max_size=8), st.integers(0, 40))
def test_the_recorded_form_and_the_live_form_agree(streams, ticks, skew):
    buffers = [filled(str(i), stamps, age, latency) for i, (stamps, age, latency) in enumerate(streams)]
    recorded = [
        StreamTimes(str(i), np.array(stamps, np.int64), age, latency)
        for i, (stamps, age, latency) in enumerate(streams)
    ]
    result = align_ticks(recorded, np.array(ticks), skew)
    lost = {}
    for t, tick in enumerate(ticks):
        for buffer in buffers:
            newest = buffer.newest_at(tick)
            assert result.indices[buffer.name][t] == (-1 if newest is None else newest.payload)
        live = align(buffers, tick, skew)
        if isinstance(live, Rejected):
            lost[live.stream, live.kind] = lost.get((live.stream, live.kind), 0) + 1
            assert (str(result.culprit[t]), KINDS[result.fault[t]]) == (live.stream, live.kind)
        else:
            assert result.ok[t]
            assert result.culprit[t] == -1
            assert result.skew_ns[t] == live.skew_ns
    assert result.dropped() == lost


@given(streams, st.lists(times, min_size=1, max_size=8), st.integers(0, 40), st.data())
def test_a_recorded_stream_that_is_not_used_at_a_tick_is_as_if_it_were_not_there(streams, ticks, skew, data):
    recorded = [
        StreamTimes(str(i), np.array(stamps, np.int64), age, latency)
        for i, (stamps, age, latency) in enumerate(streams)
    ]
    draw = st.lists(st.booleans(), min_size=len(ticks), max_size=len(ticks)).map(np.array)
    used = {stream.name: data.draw(draw) for stream in recorded[1:]}
    result = align_ticks(recorded, np.array(ticks), skew, used)
    for t, tick in enumerate(ticks):
        here = [stream for stream in recorded if used.get(stream.name, np.ones(len(ticks), bool))[t]]
        alone = align_ticks(here, np.array([tick]), skew)
        assert (result.fault[t], result.skew_ns[t]) == (alone.fault[0], alone.skew_ns[0])
        culprit = -1 if alone.ok[0] else int(here[alone.culprit[0]].name)
        assert result.culprit[t] == culprit


def test_of_many_recorded_samples_with_one_stamp_the_last_recorded_wins():
    stamps = np.random.default_rng(0).integers(0, 10, 2000)
    result = align_ticks([StreamTimes("a", stamps, 100)], np.arange(10), 0)
    assert result.indices["a"].tolist() == [np.flatnonzero(stamps == tick)[-1] for tick in range(10)]


def test_a_reader_never_sees_a_sample_half_written():
    buffer = StreamBuffer("a", 10**9, span_ns=4)
    buffer.push(0, 0)
    stop = threading.Event()

    def write():
        for stamp in range(1, 20000):
            buffer.push(stamp, stamp)
        stop.set()

    writer = threading.Thread(target=write)
    writer.start()
    seen = []
    while not stop.is_set():
        seen.append(buffer.newest_at(10**6))
    writer.join()
    assert all(sample.stamp_ns == sample.payload for sample in seen)
    assert buffer.newest_at(10**6).payload == 19999
