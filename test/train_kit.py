"""What the tests of the trainer share: three tiny recordings, a tiny model to start from, and runs on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bag_kit
import torch

from pi0_ros.model.config import GemmaConfig, Pi0Config, VisionConfig
from pi0_ros.model.pi0 import Pi0
from pi0_ros.policy.bundle import BundleSettings, save_bundle
from pi0_ros.training.options import parse
from pi0_ros.training.train import Run

TINY = Pi0Config(
    vision=VisionConfig(width=16, depth=1, mlp_dim=24, num_heads=2, patch_size=14, image_size=28),
    vlm=GemmaConfig(width=24, depth=2, mlp_dim=32, num_heads=2, num_kv_heads=1, head_dim=8),
    expert=GemmaConfig(width=16, depth=2, mlp_dim=24, num_heads=2, num_kv_heads=1, head_dim=8),
    vocab_size=260,
    action_dim=8,
    action_horizon=5,
    max_token_len=12,
)


def make_data(folder: Path) -> Path:
    """Three recordings of two seconds, a robot file, and a checkpoint of random weights to start from."""
    for i, prompt in enumerate(("wave", "wave", "point")):
        begin = bag_kit.START + i * 10 * bag_kit.SECOND
        items = [*bag_kit.episode(begin, seconds=2.0, shift=40 * i), bag_kit.text(begin, prompt)]
        bag_kit.write_bag(folder / "bags" / f"episode_{i}", items)
    (folder / "robot.yaml").write_text(bag_kit.robot().to_yaml())
    save_bundle(folder / "start", random_start(), BundleSettings(TINY), None, None)
    return folder


def random_start(config: Pi0Config = TINY, seed: int = 0) -> Pi0:
    return Pi0(config, generator=torch.Generator().manual_seed(seed))


def arguments(data: Path, output: Path, **options: Any) -> list[str]:
    """A short run's command line; `options` replace or add to it."""
    chosen: dict[str, Any] = {
        "bags": data / "bags",
        "robot": data / "robot.yaml",
        "output": output,
        "init": data / "start",
        "steps": 6,
        "batch": 4,
        "learning_rate": 1e-3,
        "held_out": 0.3,
        "jobs": 1,
        "device": "cpu",
    } | options
    words = []
    for name, value in chosen.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            words.append(flag if value else "--no-" + flag[2:])
        elif isinstance(value, tuple):
            words += [flag, *value]
        elif value is not None:
            words += [flag, str(value)]
    return words


def make_run(data: Path, output: Path, **options: Any) -> Run:
    return Run(parse(arguments(data, output, **options)))


def weights(run: Run) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
