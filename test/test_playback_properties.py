"""Limits hold for whatever chunks, delays, losses, duplicates, orders and clock jumps come."""

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st
from playback_kit import HIGH, LOW, NAMES, VELOCITY, Bench, check_limits, check_plans

from pi0_ros.ros.judging import SECOND

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


@example(  # what was measured last, before joint states stayed away, is not where the arm is
    events=[("chunk", [(0.0, 0.0, 0.0), (1.0, 0.0, 0.0), (0.0, 0.0, 0.0)], 0.0, 0.2, 20), ("blind", 19), ("tick", 60)],
    handover="blend",
    interpolation="linear",
    limits="clamp",
    streamed=NAMES,
    sag=(-0.1875, 0.0, 0.0),
)
@settings(max_examples=150, deadline=None)
@given(
    events=st.lists(event, min_size=4, max_size=25),
    handover=st.sampled_from(["blend", "ensemble", "switch"]),
    interpolation=st.sampled_from(["linear", "cubic"]),
    limits=st.sampled_from(["clamp", "clamp", "clamp", "refuse"]),
    streamed=st.sampled_from([NAMES, ("g",), ()]),
    sag=st.tuples(*[st.one_of(st.just(0.0), st.floats(-0.045, 0.045))] * 3),
)
def test_limits_hold_and_nothing_is_ever_nan_whatever_comes(events, handover, interpolation, limits, streamed, sag):
    bench = Bench(streamed, handover=handover, interpolation=interpolation, limits=limits, approach_speed=0.5)
    bench.arm, bench.sag = np.array([0.1, 0.2, 0.3]), np.array(sag)
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
