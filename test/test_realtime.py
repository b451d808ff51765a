"""The measurement of hand-overs: its figures by hand, its table, and one row from end to end."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_policy import TINY

from pi0_ros.demo.motion import Episode, Trajectory, commanded, motion_of
from pi0_ros.demo.realtime import BEGIN, END, Cell, Options, chosen_methods, fill, summarise, table
from pi0_ros.demo.summary import Episode as Outcome
from pi0_ros.demo.summary import rms_jerk
from pi0_ros.model.pi0 import Pi0
from pi0_ros.msg import PlayerStatus
from pi0_ros.policy.bundle import BundleSettings, save_bundle
from pi0_ros.policy.transforms import limit_statistics
from pi0_ros.robot_file import load_robot

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
    episodes = [Outcome(i, "p", "p", i > 0, "", 2.0 + i, 0.0, 0.3, 9.0) for i in range(3)]
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


def test_methods_are_those_that_the_policy_at_hand_can_show(tmp_path):
    model = Pi0(TINY, generator=torch.Generator().manual_seed(0))
    for name, delay in (("plain", 0), ("trained", 3)):
        settings = BundleSettings(TINY, rtc_max_delay=delay)
        save_bundle(tmp_path / name, model, settings, ROBOT, limit_statistics(ROBOT, settings))
    plain, trained = tmp_path / "plain", tmp_path / "trained"
    assert chosen_methods(Options(), plain) == ["switch", "blend", "ensemble", "guided"]
    assert chosen_methods(Options(), trained) == ["switch", "blend", "ensemble", "guided", "trained-in"]
    assert chosen_methods(Options(methods=("guided", "switch")), trained) == ["switch", "guided"]
    with pytest.raises(ValueError, match="plain was not trained with --rtc-max-delay"):
        chosen_methods(Options(methods=("trained-in",)), plain)
    with pytest.raises(ValueError, match="found kept, allowed: switch, "):
        chosen_methods(Options(methods=("kept",)), plain)


def test_executed_jerk_is_the_second_difference_of_measured_speed():
    speeds = [np.array([v, 0.0]) for v in (0.0, 0.0, 0.01, 0.03, 0.05)]  # rad/s, at 50 Hz
    stamps = [20 * MS * i for i in range(5)]
    # 0, 0.01, 0.02, 0.02: differences 0.01, 0.01, 0 over (0.02 s)^2, in one of two joints
    assert rms_jerk(stamps, speeds) == pytest.approx(25 * np.sqrt(2 / 6))
    lost = stamps[:2] + [stamp + 20 * MS for stamp in stamps[2:]]
    assert rms_jerk(lost, speeds) == pytest.approx(0.0, abs=1e-9)  # what spans the gap is left out
    assert rms_jerk(stamps[:2], speeds[:2]) == 0.0


def test_one_row_from_end_to_end(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"{BEGIN}\n{END}\n")
    command = [sys.executable, "-m", "pi0_ros.demo.realtime", "--latencies", "0.05", "--episodes", "1"]
    command += ["--methods", "blend", "--output", str(tmp_path), "--table", str(page)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "realtime.json").read_text())["rows"]
    assert row["method"] == "blend" and row["inference"] >= 0.05 and row["episodes"] == 1
    assert 0 < row["step"] <= 0.0301  # 3 rad/s for 10 ms
    assert "| blend | 50 ms |" in page.read_text()
