"""Training augmentation of image batches: a small warp for cameras that are not on a wrist, colour for all.

openpi's amounts (models/model.py, preprocess_observation), drawn anew for every sample and camera. Brightness, contrast
and saturation are all linear in the pixel, so together they are one 3 x 3 matrix and an offset for an image; crop and
rotation are one resampling.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import torch
import torch.nn.functional as F

CROP = 0.95  # of each side, resized back
ROTATION = math.radians(5.0)
BRIGHTNESS, CONTRAST, SATURATION = 0.3, 0.4, 0.5


def augment(images: torch.Tensor, cameras: Sequence[str], generator: torch.Generator) -> torch.Tensor:
    """images float [B, N, 3, S, S] in [-1, 1] -> the same, augmented; the input is left alone.

    cameras: the N slots; those with "wrist" in their name keep their geometry, since the hand's own view is what the
    policy steers by. Where a warp looks past the border it sees black (-1). The draws depend on the generator and on
    B and N only.
    """
    if images.dim() != 5 or images.shape[1] != len(cameras) or images.shape[2] != 3:
        raise ValueError(f"expected images [batch, {len(cameras)}, 3, size, size], found {list(images.shape)}")
    draws = torch.rand(*images.shape[:2], 6, generator=generator, device=generator.device)
    draws = (draws * 2.0 - 1.0).to(images.device, images.dtype)  # [B, N, 6] in [-1, 1)
    light = images + 1.0  # 0 is black, 2 is white
    for i, camera in enumerate(cameras):
        if "wrist" not in camera:
            light[:, i] = _warp(light[:, i], draws[:, i, :3])
    return _jitter(light.flatten(0, 1), draws[..., 3:].flatten(0, 1)).sub_(1.0).view_as(images)


def _warp(x: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """Crop somewhere, resize back, rotate about the centre: x [B, 3, S, S], draws [B, 3] (across, down, angle)."""
    size = x.shape[-1]
    across, down, angle = (draws * draws.new_tensor([1.0 - CROP, 1.0 - CROP, ROTATION])).T[..., None, None]
    at = (torch.arange(size, dtype=x.dtype, device=x.device) * 2.0 + 1.0) / size - 1.0  # pixel centres in [-1, 1]
    cos, sin = CROP * angle.cos(), CROP * angle.sin()  # [B, 1, 1]
    column, row = cos * at - sin * at[:, None] + across, sin * at + cos * at[:, None] + down  # where each pixel looks
    grid = torch.stack([column, row], dim=-1)  # [B, S, S, 2]
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _jitter(x: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """x [B, 3, S, S] in [0, 2], draws [B, 3]: brightness, then contrast about the image's mean, then saturation about
    each pixel's grey; clamped at the end (openpi: preprocessing_pytorch.py)."""
    factors = 1.0 + draws * draws.new_tensor([BRIGHTNESS, CONTRAST, SATURATION])
    brightness, contrast, saturation = factors.T[..., None, None]  # each [B, 1, 1]
    grey = torch.full((3, 3), 1.0 / 3.0, dtype=x.dtype, device=x.device)
    matrix = (
        brightness * contrast * (saturation * torch.eye(3, dtype=x.dtype, device=x.device) + (1.0 - saturation) * grey)
    )
    offset = (1.0 - contrast) * brightness * x.mean(dim=(1, 2, 3))[:, None, None]  # grey, so saturation keeps it
    return torch.baddbmm(offset, matrix, x.flatten(2)).clamp_(0.0, 2.0).view_as(x)


def images_per_second(
    cameras: Sequence[str] = ("base_0_rgb",), size: int = 224, batch: int = 16, runs: int = 10
) -> float:
    """How many images a second `augment` does on the CPU with torch's threads, best of `runs` batches."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(batch, len(cameras), 3, size, size, generator=generator) * 2.0 - 1.0
    seconds = []
    for _ in range(runs):
        begin = time.perf_counter()
        augment(images, cameras, generator)
        seconds.append(time.perf_counter() - begin)
    return batch * len(cameras) / min(seconds)
