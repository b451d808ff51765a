"""The hot path on an NVIDIA GPU: Triton kernels around what cuBLAS and cuDNN do, buffers allocated once.

Triton comes with torch for CUDA, so no module of this room may be imported before `usable` said yes.
"""

from __future__ import annotations

import importlib.util

import torch

from pi0_ros.model.config import Pi0Config


def usable(config: Pi0Config, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels are for this: an NVIDIA GPU from Ampere on, bfloat16, sizes that tiles can be cut for."""
    sizes = (config.expert.width, config.expert.mlp_dim, config.vlm.width, config.vlm.mlp_dim)
    fits = config.expert.head_dim in (16, 32, 64, 128, 256) and config.action_dim <= 128
    return fits and not any(size % 16 for size in sizes) and dtype == torch.bfloat16 and _from(device, (8, 0))


def has_float8(device: torch.device) -> bool:
    """Whether the device multiplies float8 by itself, and there is Triton to make it."""
    return _from(device, (8, 9))


def launches_early(device: torch.device) -> bool:
    """Whether a kernel can be launched while the one before ends (programmatic dependent launch)."""
    return _from(device, (9, 0))


def _from(device: torch.device, capability: tuple[int, int]) -> bool:
    """Whether this is an NVIDIA GPU of this capability or a later one, and there is Triton."""
    if device.type != "cuda" or torch.version.hip or not importlib.util.find_spec("triton"):
        return False
    return torch.cuda.get_device_capability(device) >= capability
