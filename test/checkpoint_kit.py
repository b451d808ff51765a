"""What the checkpoint tests share: the tiny model of test/data/layouts, and files with one fault each."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path

import torch

from pi0_ros.model.checkpoint import parameter_shapes
from pi0_ros.model.config import GemmaConfig, Pi0Config, VisionConfig

LAYOUTS = Path(__file__).parent / "data" / "layouts"

TINY = Pi0Config(
    vision=VisionConfig(width=32, depth=2, mlp_dim=48, num_heads=2, patch_size=14, image_size=56),
    vlm=GemmaConfig(width=48, depth=2, mlp_dim=96, num_heads=8, num_kv_heads=1, head_dim=8),
    expert=GemmaConfig(width=32, depth=2, mlp_dim=64, num_heads=8, num_kv_heads=1, head_dim=8),
    vocab_size=96,
    action_dim=8,
    action_horizon=10,
    max_token_len=12,
)
TINY05 = replace(TINY, pi05=True, max_token_len=20)


def random_weights(config: Pi0Config, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {k: torch.randn(s, generator=generator).to(dtype) for k, s in parameter_shapes(config).items()}


def raw_safetensors(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    """A file with any header, right or wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def one_line(error: BaseException) -> str:
    """The message, which must be one line."""
    text = str(error)
    assert "\n" not in text and text
    return text
