"""make train-demo: programs one after the other, each with options that it knows."""

from __future__ import annotations

import itertools

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
    words = ["train_demo", "--output", "out", "--episodes", "48", "--steps", "122", "--noise", "pink", "--batch", "16"]
    monkeypatch.setattr("sys.argv", words)
    assert train_demo.main() == 0
    assert [name for name, _ in calls[0]] == ["record"] * 3 + ["train"] * 3 + ["evaluate"]
    recorded = [tyro.cli(recording.Options, args=words) for name, words in calls[0] if name == "record"]
    assert [(str(o.output), o.cubes, o.episodes) for o in recorded] == [
        ("out/bags/one", 1, 14), ("out/bags/two", 2, 16), ("out/bags/three", 3, 18)
    ]  # fmt: skip
    seeds = [range(o.seed, o.seed + o.episodes) for o in recorded]
    assert not any(set(a) & set(b) for a, b in itertools.combinations(seeds, 2))
    see, choose, act = (parse(words) for name, words in calls[0] if name == "train")
    assert [str(o.bags) for o in (see, choose, act)] == ["out/bags/one", "out/bags/two", "out/bags"]
    assert (see.preset, see.init) == ("nano", None)
    assert (str(choose.init), str(act.init)) == ("out/seeing/checkpoint", "out/choosing/checkpoint")
    assert [o.steps for o in (see, choose, act)] == [12, 50, 60]
    for o in (see, choose, act):
        assert (o.noise, o.batch, o.robot.name, str(o.cache)) == ("pink", 16, "so101_demo.yaml", "out/bags/.pi0_cache")
    assert calls[0][-1][1][:4] == ["--bags", "out/bags", "--checkpoint", "out/acting/checkpoint"]
    said = capsys.readouterr().out
    assert "took on" in said and "recording one 0.0 min" in said and 'DEMO="--checkpoint out/acting/checkpoint"' in said


def test_a_stage_that_fails_ends_it_with_its_exit_code(calls):
    said, codes = calls
    codes["train"] = 130
    assert train_demo.run(train_demo.Options()) == 130
    assert [name for name, _ in said] == ["record"] * 3 + ["train"]
