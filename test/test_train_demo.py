"""make train-demo: three programs one after the other, each with options that it knows."""

from __future__ import annotations

import pytest

pytest.importorskip("mujoco")

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


def test_recording_training_and_evaluation_follow_each_other_on_the_same_folders(calls, monkeypatch, capsys):
    words = ["train_demo", "--output", "out", "--episodes", "60", "--steps", "500", "--noise", "pink", "--batch", "16"]
    monkeypatch.setattr("sys.argv", words)
    assert train_demo.main() == 0
    assert [name for name, _ in calls[0]] == ["record", "train", "evaluate"]
    record, trained, evaluated = (words for _, words in calls[0])
    assert record == ["--output", "out/bags", "--episodes", "60"]
    options = parse(trained)
    assert (str(options.bags), options.preset, options.steps, options.batch) == ("out/bags", "nano", 500, 16)
    assert options.noise == "pink" and options.robot.name == "so101_demo.yaml"
    assert evaluated[:4] == ["--bags", "out/bags", "--checkpoint", "out/run/checkpoint"]
    said = capsys.readouterr().out
    assert "took on" in said and "recording 0.0 min" in said and 'DEMO="--checkpoint out/run/checkpoint"' in said


def test_a_stage_that_fails_ends_it_with_its_exit_code(calls):
    said, codes = calls
    codes["train"] = 130
    assert train_demo.run(train_demo.Options()) == 130
    assert [name for name, _ in said] == ["record", "train"]
