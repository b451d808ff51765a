"""The vision tower: SigLIP So400m/14 without its pooling head (openpi: models/siglip.py)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from pi0_ros.model.config import VisionConfig
from pi0_ros.model.linear import Linear, for_products

LAYER_NORM_EPS = 1e-6


class SiglipAttention(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.q_proj = Linear(config.width, config.width)
        self.k_proj = Linear(config.width, config.width)
        self.v_proj = Linear(config.width, config.width)
        self.out_proj = Linear(config.width, config.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [B, T, W] -> [B, T, W]
        x = for_products(x)
        q, k, v = (
            projection(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [B, heads, T, W / heads]
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class SiglipMLP(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.fc1 = Linear(config.width, config.mlp_dim)
        self.fc2 = Linear(config.mlp_dim, config.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class SiglipLayer(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)
        self.self_attn = SiglipAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)
        self.mlp = SiglipMLP(config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Siglip(nn.Module):
    """Images [B, 3, S, S] in [-1, 1] -> patch tokens [B, T, W], row by row, T = (S / patch)^2."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.embeddings = nn.ModuleDict(
            {
                "patch_embedding": nn.Conv2d(3, config.width, config.patch_size, stride=config.patch_size),
                "position_embedding": nn.Embedding(config.num_tokens, config.width),
            }
        )
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(SiglipLayer(config) for _ in range(config.depth))})
        self.post_layernorm = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        patch, position = self.embeddings["patch_embedding"], self.embeddings["position_embedding"]
        x = patch(images.to(patch.weight.dtype)).flatten(2).transpose(1, 2)  # [B, T, W]
        x = (x + position.weight).to(self.post_layernorm.weight.dtype)  # embeddings may be kept in float32
        recompute = self.gradient_checkpointing and self.training
        for layer in self.encoder["layers"]:
            x = checkpoint(layer, x, use_reentrant=False) if recompute else layer(x)
        return self.post_layernorm(x)
