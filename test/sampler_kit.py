"""What the samplers' tests share: a model in which every parameter counts, and inputs for a chunk."""

from __future__ import annotations

import torch

from pi0_ros.model.config import Pi0Config
from pi0_ros.model.pi0 import Pi0


def make_model(config: Pi0Config) -> Pi0:
    """Random weights, with no scale, shift or bias at its neutral value, or folding it would go untested."""
    model = Pi0(config, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        generator = torch.Generator().manual_seed(4)
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator) / max(parameter.shape) ** 0.5)
    return model.eval()


def draw_inputs(config: Pi0Config, seed: int = 0) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """Images uint8 [S, S, 3] by slot, state f32 [action_dim], noise f32 [horizon, action_dim]."""
    generator = torch.Generator().manual_seed(seed)
    size = config.vision.image_size
    images = {
        slot: torch.randint(0, 256, (size, size, 3), dtype=torch.uint8, generator=generator) for slot in config.cameras
    }
    state = torch.randn(config.action_dim, generator=generator)
    return images, state, torch.randn(config.action_horizon, config.action_dim, generator=generator)
