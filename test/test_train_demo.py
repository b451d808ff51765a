"""make train-demo: programs one after the other, each with options that it knows."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import tyro

pytest.importorskip("mujoco")

from pi0_ros.demo import record as recording
from pi0_ros.demo import train as train_demo
from pi0_ros.training.options import parse


@pytest.fixture
def calls(monkeypatch):
    """The stages' command lines; `codes` says how each ends."""
    said, codes = [], {}

    def stage(name: str):
        return lambda words: said.append((name, words)) or codes.get(name, 0)

    monkeypatch.setattr(train_demo, "_record", stage("record"))
    monkeypatch.setattr(train_demo.train, "main", stage("train"))
    monkeypatch.setattr(train_demo.evaluate, "main", stage("evaluate"))
    return said, codes


def test_each_stage_goes_on_from_the_one_before_with_recordings_of_its_own(calls, monkeypatch, capsys):
    words = [
        "train_demo",
        "--output",
        "out",
        "--episodes",
        "48",
        "--steps",
        "12",
        "50",
        "60",
        "16",
        "--noise",
        "pink",
        "--batch",
        "16",
    ]
    monkeypatch.setattr("sys.argv", words)
    assert train_demo.main() == 0
    assert [name for name, _ in calls[0]] == ["record"] * 3 + ["train"] * 4 + ["evaluate"]
    recorded = [tyro.cli(recording.Options, args=words) for name, words in calls[0] if name == "record"]
    assert [(str(o.output), o.cubes, o.episodes) for o in recorded] == [
        ("out/bags/one", 1, 14), ("out/bags/two", 2, 16), ("out/bags/three", 3, 18)
    ]  # fmt: skip
    seeds = [range(o.seed, o.seed + o.episodes) for o in recorded]
    assert not any(set(a) & set(b) for a, b in itertools.combinations(seeds, 2))
    see, choose, act, join = (parse(words) for name, words in calls[0] if name == "train")
    assert [str(o.bags) for o in (see, choose, act, join)] == ["out/bags/one", "out/bags/two", "out/bags", "out/bags"]
    assert (see.preset, see.init) == ("nano", None)
    starts = ["out/seeing/checkpoint", "out/choosing/checkpoint", "out/acting/checkpoint"]
    assert [str(o.init) for o in (choose, act, join)] == starts
    assert [o.steps for o in (see, choose, act, join)] == [12, 50, 60, 16]
    assert [o.rtc_max_delay for o in (see, choose, act, join)] == [0, 0, 0, 10]
    for o in (see, choose, act, join):
        assert (o.noise, o.batch, o.robot.name, str(o.cache)) == ("pink", 16, "so101_demo.yaml", "out/bags/.pi0_cache")
    assert calls[0][-1][1][:4] == ["--bags", "out/bags", "--checkpoint", "out/joining/checkpoint"]
    said = capsys.readouterr().out
    assert "took on" in said and "recording one 0.0 min" in said
    assert 'DEMO="--checkpoint out/joining/checkpoint"' in said


def test_a_stage_that_fails_ends_it_with_its_exit_code(calls):
    said, codes = calls
    codes["train"] = 130
    assert train_demo.run(train_demo.Options()) == 130
    assert [name for name, _ in said] == ["record"] * 3 + ["train"]


def test_recordings_of_an_earlier_run_serve_another(calls):
    train_demo.run(train_demo.Options(Path("pink"), Path("out/bags"), steps=(1, 2, 3, 0)), ["--noise", "pink"])
    recorded = [tyro.cli(recording.Options, args=words) for name, words in calls[0] if name == "record"]
    trained = [parse(words) for name, words in calls[0] if name == "train"]
    assert [str(o.output) for o in recorded] == ["out/bags/one", "out/bags/two", "out/bags/three"]
    assert {str(o.cache) for o in trained} == {"out/bags/.pi0_cache"}
    assert [str(o.output) for o in trained] == ["pink/seeing", "pink/choosing", "pink/acting"]  # joining is left out
    assert calls[0][-1][1][3] == "pink/acting/checkpoint"
