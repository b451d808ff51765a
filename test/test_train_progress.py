"""What a user sees of a run while it works: the bars on the terminal, and the curves in TensorBoard."""

from __future__ import annotations

import io
import re
import time
from contextlib import redirect_stderr
from dataclasses import replace

import bag_kit
import pytest
import train_kit as kit
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pi0_ros.training import cache
from pi0_ros.training.bags import find_bags
from pi0_ros.training.build import build_cache, expected_frames
from pi0_ros.training.optimise import learning_rate

pytestmark = pytest.mark.usefixtures("one_thread")


class Terminal(io.StringIO):
    """Stands in for stderr and keeps all that its line has shown."""

    def isatty(self) -> bool:
        return True

    def shown(self, pattern: str) -> list[str]:
        return re.findall(pattern, self.getvalue())


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return kit.make_data(tmp_path_factory.mktemp("progress"))


def test_the_bar_of_training_tells_loss_rate_and_speed(data, tmp_path):
    run = kit.make_run(data, tmp_path / "out", steps=12, evaluate_every=6)
    with redirect_stderr(Terminal()) as terminal:
        run.run()
    lines = [line.rstrip() for line in re.split(r"[\r\n]", terminal.getvalue()) if line.startswith("train:")]
    assert " 0/12 " in lines[0] and "100%" in lines[-1] and " 12/12 " in lines[-1]
    shown = re.search(r"step/s, loss (\S+) held out (\S+) lr (\S+) (\d+) samples/s\]$", lines[-1])
    assert shown, lines[-1]
    loss, held_out, rate, speed = map(float, shown.groups())
    assert loss == pytest.approx(sum(loss for _, loss in run.progress.losses) / 12, abs=1e-4)
    assert held_out == pytest.approx(run.progress.held_out[0][1], abs=1e-4)
    assert rate == pytest.approx(learning_rate(11, steps=12, warmup=1, peak=1e-3, final=0.1), rel=0.05)
    assert speed > 0


def test_a_run_without_held_out_episodes_shows_none(data, tmp_path):
    run = kit.make_run(data, tmp_path / "out", steps=1, held_out=0)
    with redirect_stderr(Terminal()) as terminal:
        run.run()
    assert terminal.shown(r"loss \d\.\d{4} lr 1\.0e-03 \d+ samples/s") and not terminal.shown("held out")


def test_tensorboard_has_loss_rate_and_speed(data, tmp_path):
    run = kit.make_run(data, tmp_path / "out", steps=12, evaluate_every=6)
    run.run()
    board = EventAccumulator(str(tmp_path / "out" / "tensorboard")).Reload()
    points = {tag: [(e.step, e.value) for e in board.Scalars(tag)] for tag in board.Tags()["scalars"]}
    assert set(points) == {"loss/train", "loss/held_out", "learning_rate", "samples_per_second"}
    losses = [loss for _, loss in run.progress.losses]
    means = [sum(losses[first : first + 10]) / 10 for first in (0, 2)]
    assert points["loss/train"] == [(10, pytest.approx(means[0])), (12, pytest.approx(means[1]))]
    assert points["loss/held_out"] == [(step, pytest.approx(loss)) for step, loss in run.progress.held_out]
    rates = [learning_rate(step, steps=12, warmup=1, peak=1e-3, final=0.1) for step in (9, 11)]
    assert points["learning_rate"] == [(10, pytest.approx(rates[0])), (12, pytest.approx(rates[1]))]
    assert [step for step, _ in points["samples_per_second"]] == [10, 12]
    assert all(value > 0 for _, value in points["samples_per_second"])


# --- the cache --------------------------------------------------------------------------------------------------------


def build(bags, folder, **options):
    return build_cache(find_bags(bags), bag_kit.robot(), 24, folder, **options)


def stop_within(monkeypatch, frames: int, terminal: Terminal, pattern: str) -> None:
    """Decoding stands still after so many frames until the terminal has shown what is asked for."""
    whole, calls = cache.model_frame, []

    def model_frame(*arguments):
        calls.append(arguments)
        deadline = time.monotonic() + 10
        while len(calls) == frames + 1 and not terminal.shown(pattern) and time.monotonic() < deadline:
            time.sleep(0.01)
        return whole(*arguments)

    monkeypatch.setattr(cache, "model_frame", model_frame)


def test_the_bar_of_the_cache_goes_on_within_a_recording(tmp_path, monkeypatch):
    bag_kit.write_bag(tmp_path / "bags" / "long", bag_kit.episode(seconds=3.0))  # 60 frames, of which 30 are seen
    monkeypatch.setattr("pi0_ros.training.build.cores", lambda: 1)
    within = r"cache:  50%\|[^|]*\| 0\.5/1 \[[^]]*, 15 frames decoded\]"  # of 2.98 s at 10 Hz
    with redirect_stderr(Terminal()) as terminal:
        stop_within(monkeypatch, 15, terminal, within)
        assert build(tmp_path / "bags", tmp_path / "cache").decoded == 30
    assert terminal.shown(within)
    assert terminal.shown(r"cache: 100%\|[^|]*\| 1/1 \[[^]]*, 30 frames decoded\]")


def test_without_metadata_the_bar_of_the_cache_counts_frames_within_a_recording(tmp_path, monkeypatch):
    bag = bag_kit.write_bag(tmp_path / "bags" / "long", bag_kit.episode(seconds=3.0))
    (bag / "metadata.yaml").unlink()
    monkeypatch.setattr("pi0_ros.training.build.cores", lambda: 1)
    within = r"cache:   0%\|[^|]*\| 0/1 \[[^]]*, 15 frames decoded\]"
    with redirect_stderr(Terminal()) as terminal:
        stop_within(monkeypatch, 15, terminal, within)
        build(tmp_path / "bags", tmp_path / "cache")
    assert terminal.shown(within)


def test_recordings_that_are_there_already_and_bad_ones_count_as_done(tmp_path):
    for i in range(3):
        bag_kit.write_bag(tmp_path / "bags" / f"take{i}", bag_kit.episode(seconds=1.0, shift=50 * i))
    build(tmp_path / "bags" / "take0", tmp_path / "cache")
    (tmp_path / "bags" / "take2" / "take2.mcap").write_bytes(b"nothing")
    with redirect_stderr(Terminal()) as terminal:
        build(tmp_path / "bags", tmp_path / "cache", jobs=2)
    assert terminal.shown(r"cache: 100%\|[^|]*\| 3/3 \[[^]]*, 10 frames decoded\]")


def test_the_cache_shows_no_bar_where_nobody_looks(tmp_path):
    bag_kit.write_bag(tmp_path / "bags" / "take", bag_kit.episode(seconds=1.0))
    with redirect_stderr(io.StringIO()) as log:
        assert build(tmp_path / "bags", tmp_path / "cache").decoded == 10
    assert log.getvalue() == ""


@pytest.mark.parametrize(
    "changes",
    [
        {"duration": None},
        {"duration": {"nanoseconds": "long"}},
        {"duration": {"nanoseconds": float("nan")}},
        {"duration": {"nanoseconds": -1}},
        {"topics_with_message_count": 3},
        {"topics_with_message_count": [3]},
        {"topics_with_message_count": [{"topic_metadata": {"name": ["/cam/image_raw"]}, "message_count": 3}]},
        {"topics_with_message_count": [{"topic_metadata": {"name": "/cam/image_raw"}, "message_count": None}]},
    ],
)
def test_metadata_of_any_kind_may_tell_no_number_of_frames(tmp_path, changes):
    bag_kit.write_bag(tmp_path / "take", bag_kit.episode(seconds=1.0))
    (files,) = find_bags(tmp_path)
    assert expected_frames(replace(files, metadata=files.metadata | changes), bag_kit.robot()) == 0


def test_the_frames_to_expect_are_one_a_tick_if_there_are_as_many(tmp_path):
    bag_kit.write_bag(tmp_path / "take", bag_kit.episode(seconds=3.0))
    (files,) = find_bags(tmp_path)
    assert expected_frames(files, bag_kit.robot()) == pytest.approx(29.8)
    assert expected_frames(files, bag_kit.robot(control_rate=50)) == 60
    two = {"topic": "/cam/image_raw"}, {"topic": "/elsewhere"}
    cameras = dict(zip(("base_0_rgb", "left_wrist_0_rgb"), two, strict=True))
    assert expected_frames(files, bag_kit.robot(cameras=cameras)) == pytest.approx(29.8)
