"""What is measured: sizes, random weights, random observations."""

from __future__ import annotations

from dataclasses import replace

import torch

from pi0_ros.model.config import PRESETS, GemmaConfig, Pi0Config, VisionConfig
from pi0_ros.model.pi0 import Observation, Pi0


class BenchmarkError(ValueError):
    """Something that cannot be measured as it was asked for; the message is one line."""


# The vocabulary's size touches no time of the sampler (a row a token is looked up), but in training the table's dense
# gradient would drown the rest at these widths. 4096 rows keep it small on both sides.
SMALL = Pi0Config(
    vision=VisionConfig(width=128, depth=4, mlp_dim=512, num_heads=4, patch_size=14, image_size=224),
    vlm=GemmaConfig(width=256, depth=6, mlp_dim=1024, num_heads=8, num_kv_heads=1, head_dim=32),
    expert=GemmaConfig(width=128, depth=6, mlp_dim=512, num_heads=8, num_kv_heads=1, head_dim=32),
    vocab_size=4096,
)
MID = replace(
    SMALL,
    vision=VisionConfig(width=768, depth=12, mlp_dim=3072, num_heads=12, patch_size=14, image_size=224),
    vlm=GemmaConfig(width=1024, depth=12, mlp_dim=4096, num_heads=8, num_kv_heads=1, head_dim=128),
    expert=GemmaConfig(width=512, depth=12, mlp_dim=2048, num_heads=8, num_kv_heads=1, head_dim=128),
)
CONFIGS: dict[str, Pi0Config] = {**PRESETS, "small": SMALL, "mid": MID}


def build_model(config: Pi0Config, device: torch.device) -> Pi0:
    """Random float32 weights, made where they are wanted: billions of them take a CPU a minute."""
    with torch.device(device):
        return Pi0(config, generator=torch.Generator(device).manual_seed(0)).eval()


def draw_observation(config: Pi0Config, batch: int = 1, prompt: int = 20) -> tuple[Observation, torch.Tensor]:
    """A random observation with `prompt` valid tokens and all cameras, and its images as uint8 [batch, N, S, S, 3].

    BenchmarkError where the prompt does not fit.
    """
    if not 1 <= prompt <= config.max_token_len:
        raise BenchmarkError(f"--prompt: 1 to {config.max_token_len} tokens fit this model, found {prompt}")
    generator = torch.Generator().manual_seed(0)
    size, cameras = config.vision.image_size, len(config.cameras)
    pixels = torch.randint(0, 256, (batch, cameras, size, size, 3), dtype=torch.uint8, generator=generator)
    tokens = torch.randint(1, config.vocab_size, (batch, config.max_token_len), generator=generator)
    valid = (torch.arange(config.max_token_len) < prompt).expand(batch, -1)
    observation = Observation(
        images=pixels.permute(0, 1, 4, 2, 3).float() / 255 * 2 - 1,
        image_masks=torch.ones(batch, cameras, dtype=torch.bool),
        tokens=tokens * valid,
        token_masks=valid,
        state=torch.randn(batch, config.action_dim, generator=generator),
    )
    return observation, pixels


def draw_noise(config: Pi0Config, batch: int = 1, seed: int = 1) -> torch.Tensor:
    """White noise f32 [batch, H, A]."""
    shape = (batch, config.action_horizon, config.action_dim)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
