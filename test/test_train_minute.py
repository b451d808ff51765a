"""A small policy, trained within a minute on demonstrations that the test records, has learnt how the arm moves."""

from __future__ import annotations

import pytest
import torch

from pi0_ros.model.config import GemmaConfig, Pi0Config, VisionConfig
from pi0_ros.model.pi0 import Pi0
from pi0_ros.policy.bundle import BundleSettings, save_bundle
from pi0_ros.robot_file import config_folder
from pi0_ros.training.evaluate import Options as EvaluateOptions
from pi0_ros.training.evaluate import evaluate
from pi0_ros.training.train import main

_GEMMA = GemmaConfig(width=48, depth=2, mlp_dim=96, num_heads=4, num_kv_heads=1, head_dim=16)
SMALL = Pi0Config(
    vision=VisionConfig(width=32, depth=1, mlp_dim=64, num_heads=2, patch_size=14, image_size=56),
    vlm=_GEMMA,
    expert=_GEMMA,
    vocab_size=260,
    action_dim=8,
    action_horizon=16,
)


def test_a_policy_trained_on_fresh_recordings_beats_both_baselines_on_episodes_it_has_not_seen(tmp_path):
    """Asked for: a quarter less error than holding still or repeating the last action. Seen: 47 % less."""
    pytest.importorskip("mujoco")
    from pi0_ros.demo.record import Options as RecordOptions
    from pi0_ros.demo.record import record

    record(RecordOptions(tmp_path / "bags", episodes=20, seed=5000, width=80, height=60, processes=1))
    start = Pi0(SMALL, generator=torch.Generator().manual_seed(0))
    save_bundle(tmp_path / "start", start, BundleSettings(SMALL), None, None)
    robot = config_folder() / "so101_demo.yaml"
    words = f"""--bags {tmp_path / "bags"} --robot {robot} --output {tmp_path / "run"} --init {tmp_path / "start"}
        --steps 500 --batch 32 --learning-rate 3e-3 --ema 0.97 --held-out 0.25 --loss-dims real --no-augment
        --device cpu --jobs 1"""
    assert main(words.split()) == 0
    chosen = {"chunks": 30, "seeds": 2, "device": "cpu", "jobs": 1}
    result = evaluate(EvaluateOptions(tmp_path / "bags", tmp_path / "run" / "checkpoint", tmp_path / "out", **chosen))
    assert result["episodes"] == 5
    error = {name: values["share_of_range"] for name, values in result["error"].items()}
    assert error["policy"] < 0.75 * error["hold"]
    assert error["policy"] < 0.75 * error["repeat"]
