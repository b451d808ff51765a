"""The measurement of hand-overs: its figures by hand, its table, the oracle, and one row from end to end."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pi0_ros.demo.motion import Episode, Trajectory, commanded, motion_of
from pi0_ros.demo.oracle import Oracle
from pi0_ros.demo.realtime import BEGIN, END, Cell, Options, chosen_methods, fill, summarise, table
from pi0_ros.demo.summary import Episode as Outcome
from pi0_ros.msg import PlayerStatus
from pi0_ros.policy.policy import ObservationError, RobotObservation
from pi0_ros.robot import load_robot

ROBOT = load_robot(Path(__file__).parent.parent / "config" / "so101_demo.yaml")
MS = 1_000_000
START = 1_000_000 * MS


def sent(at: int, first: int, positions) -> Trajectory:
    """A trajectory for one joint, 10 ms between points; times in ms."""
    times = START + (first + 10 * np.arange(len(positions))) * MS
    return Trajectory(START + at * MS, times.astype(np.int64), np.array(positions, float)[:, None])


def test_what_was_commanded_changes_over_where_the_next_trajectory_begins():
    grid, path = commanded([sent(0, 20, [0, 1, 2, 3, 4]), sent(20, 40, [2, 7, 8]), sent(90, 100, [9])])
    assert ((grid - START) // MS).tolist() == [20, 30, 40, 50, 60, 70, 80, 90, 100]
    # 0, 1, then the second: 2, 7, 8; from 60 ms to 100 ms on the way to where the third begins
    np.testing.assert_allclose(path[:, 0], [0, 1, 2, 7, 8, 8.25, 8.5, 8.75, 9])


def episode(second) -> Episode:
    """A chunk that moves at 1 rad/s for 0.3 s, and from 0.1 s on another."""
    first = np.arange(31) * 0.01
    made = Episode(START - 500 * MS, START + 600 * MS, [sent(0, 20, first), sent(100, 120, second)])
    made.chunks = [(START - 100 * MS, START - 10 * MS), (START, START + 90 * MS)]
    made.states = [
        (START - 400 * MS, PlayerStatus.HOLDING),
        (START, PlayerStatus.PLAYING),
        (START + 300 * MS, PlayerStatus.HOLDING),
        (START + 350 * MS, PlayerStatus.APPROACHING),
        (START + 450 * MS, PlayerStatus.PLAYING),
    ]
    return made


def test_a_hand_over_that_goes_on_has_no_jump():
    motion = motion_of(episode(0.1 + np.arange(20) * 0.01), dt=0.05)
    assert motion.step == pytest.approx(0.01)
    assert motion.velocity_jumps == [pytest.approx(0.0, abs=1e-9)]
    assert motion.jerk == pytest.approx(0.0, abs=1e-3)
    assert motion.inference == [0.09, 0.09]
    # holding before it ever moved does not count
    assert (motion.held, motion.approached) == (pytest.approx(0.05), pytest.approx(0.1))


def test_a_hand_over_that_turns_round_shows_in_jump_step_and_jerk():
    motion = motion_of(episode(0.1 - np.arange(20) * 0.02), dt=0.05)
    assert motion.velocity_jumps == [pytest.approx(3.0)]  # from 1 to -2 rad/s
    assert motion.step == pytest.approx(0.02)
    flat = motion_of(episode(np.r_[np.full(10, 0.1), 0.1 + np.arange(10) * 0.01]), dt=0.05)
    assert flat.velocity_jumps == [pytest.approx(1.0)]
    # at 0.1 s within it takes up 1 rad/s: acceleration of 100 rad/s^2 for 10 ms, jerk +-1e4 rad/s^3 in 2 of 17 places
    assert flat.jerk == pytest.approx(1e4 * np.sqrt(2 / 17), rel=1e-6)


def cell(**changes) -> Cell:
    values = ("blend", 0.1, 0.123, 8, 7, 2.5, 0.012, 0.4, 0.2, 300, 0.05, 0, [])
    return dataclasses.replace(Cell(*values), **changes)


def test_figures_of_a_row_are_the_worst_or_the_mean_over_its_episodes():
    episodes = [Outcome(i, "p", "p", i > 0, "", 2.0 + i, 0.0, 0.3) for i in range(3)]
    one = motion_of(episode(0.1 - np.arange(20) * 0.02), dt=0.05)
    made = summarise("blend", 0.1, episodes, [one, dataclasses.replace(one, velocity_jumps=[1.0, 2.0], held=0.15)])
    assert (made.successes, made.episodes, made.seconds) == (2, 3, 3.0)
    assert (made.velocity_jump, made.velocity_jump_p50) == (pytest.approx(3.0), pytest.approx(2.0))
    assert made.held == pytest.approx(0.1)


def test_the_table_replaces_the_one_between_the_markers_and_nothing_else(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"# Title\n{BEGIN}\nold\n{END}\nafter\n")
    fill(page, table([cell()], "a policy"))
    lines = page.read_text().splitlines()
    assert lines[0] == "# Title" and lines[-1] == "after" and "old" not in lines
    row = (
        "| blend | 100 ms | 123 ms | 7/8 | 2.5 s | 12.0 mrad | 0.20 rad/s | 0.40 rad/s | 300 rad/s³ | 0.05 s | 0.00 s |"
    )
    assert row in lines
    page.write_text("no markers")
    with pytest.raises(ValueError, match="markers"):
        fill(page, "text")


def test_methods_are_those_that_the_policies_at_hand_can_show():
    assert chosen_methods(Options()) == ["switch", "blend", "ensemble", "guided"]
    assert chosen_methods(Options(oracle=True)) == ["switch", "blend", "ensemble", "kept (oracle)"]
    with pytest.raises(ValueError, match="--methods: guided cannot be measured here"):
        chosen_methods(Options(oracle=True, methods=("guided",)))
    with pytest.raises(ValueError, match="--oracle stands in"):
        chosen_methods(Options(oracle=True, checkpoint="x"))


def test_the_oracle_goes_on_from_what_will_have_been_executed():
    oracle, state = Oracle(ROBOT), np.array([0.2, -1.0, 0.7, 1.3, 0.0, 0.4])
    seen = RobotObservation(0, {}, {}, state, "touch the red cube, scene 3")
    first = oracle.infer(seen).actions
    np.testing.assert_array_equal(first[0], state)
    assert first.shape == (30, 6) and np.abs(first[-1] - state).max() > 0.1
    kept = oracle.infer(seen, executed=first[4:8])
    np.testing.assert_array_equal(kept.actions[:4], first[4:8])
    assert kept.frozen == 4
    before, after = np.diff(kept.actions[2:5], axis=0) / 0.05
    assert np.abs(after - before).max() < 0.6  # rad/s: it keeps its pace
    with pytest.raises(ObservationError, match="scene 17"):
        oracle.infer(dataclasses.replace(seen, prompt="touch the red cube"))


def test_one_row_from_end_to_end(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"{BEGIN}\n{END}\n")
    command = [sys.executable, "-m", "pi0_ros.demo.realtime", "--oracle", "--latencies", "0.05", "--episodes", "1"]
    command += ["--methods", "blend", "--output", str(tmp_path), "--table", str(page)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "realtime.json").read_text())["rows"]
    assert row["method"] == "blend" and row["inference"] >= 0.05 and row["episodes"] == 1
    assert 0 < row["step"] <= 0.0301  # 3 rad/s for 10 ms
    assert "| blend | 50 ms |" in page.read_text()
