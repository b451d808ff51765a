"""Gemma 1 layers, and the attention that two stacks of them share (openpi: models/gemma.py).

The large stack (VLM) reads the prefix, the small one (action expert) the suffix. Each has norms, projections and MLPs
of its own; they meet only in the attention, where the suffix looks at the prefix's keys and values and at its own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from pi0_ros.model.config import GemmaConfig
from pi0_ros.model.linear import Linear, for_products

RMS_EPS = 1e-6
ROPE_THETA = 10_000.0

Rope = tuple[torch.Tensor, torch.Tensor]  # cos, sin: float32 [B, N, 1, head_dim / 2]
KeysValues = tuple[torch.Tensor, torch.Tensor]  # rotated keys, values: [B, kv heads, N, head_dim]


class RMSNorm(nn.Module):
    """x / rms(x) * (1 + weight), in float32 whatever the parameters are.

    Adaptive (pi0.5): scale, shift and a gate for the residual come from `cond` [B, 1 or N, W] instead of a weight:
    x / rms(x) * (1 + scale) + shift (openpi: models/gemma.py, RMSNorm).
    """

    def __init__(self, width: int, adaptive: bool = False) -> None:
        super().__init__()
        if adaptive:
            self.dense = Linear(width, 3 * width)
        else:
            self.weight = nn.Parameter(torch.zeros(width))
        self.adaptive = adaptive

    def modulation(self, cond: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """cond [B, 1 or N, W] -> scale, shift, gate, each float32 [B, 1 or N, W]."""
        scale, shift, gate = self.dense(cond.to(self.dense.weight.dtype)).float().chunk(3, dim=-1)
        return scale, shift, gate

    def forward(self, x: torch.Tensor, cond: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """x [B, N, W] -> (normalised x, gate or None), both in x's dtype."""
        if not self.adaptive:
            return F.rms_norm(x.float(), x.shape[-1:], 1 + self.weight.float(), RMS_EPS).to(x.dtype), None
        scale, shift, gate = self.modulation(cond)
        y = F.rms_norm(x.float(), x.shape[-1:], None, RMS_EPS) * (1 + scale) + shift
        return y.to(x.dtype), gate.to(x.dtype)


class GemmaAttention(nn.Module):
    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.q_proj = Linear(config.width, config.num_heads * config.head_dim, bias=False)
        self.k_proj = Linear(config.width, config.num_kv_heads * config.head_dim, bias=False)
        self.v_proj = Linear(config.width, config.num_kv_heads * config.head_dim, bias=False)
        self.o_proj = Linear(config.num_heads * config.head_dim, config.width, bias=False)

    def queries(self, y: torch.Tensor, rope: Rope) -> torch.Tensor:
        """y [B, N, W] -> rotated queries [B, heads, N, head_dim]."""
        return rotate(self.q_proj(y).unflatten(-1, (-1, self.head_dim)), rope).transpose(1, 2)

    def keys_values(self, y: torch.Tensor, rope: Rope) -> KeysValues:
        """y [B, N, W] -> rotated keys and values, each [B, kv heads, N, head_dim]."""
        k = rotate(self.k_proj(y).unflatten(-1, (-1, self.head_dim)), rope)
        return k.transpose(1, 2), self.v_proj(y).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class GemmaMLP(nn.Module):
    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.width, config.mlp_dim, bias=False)
        self.up_proj = Linear(config.width, config.mlp_dim, bias=False)
        self.down_proj = Linear(config.mlp_dim, config.width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))


class GemmaLayer(nn.Module):
    def __init__(self, config: GemmaConfig, adaptive: bool = False) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.width, adaptive)
        self.self_attn = GemmaAttention(config)
        self.post_attention_layernorm = RMSNorm(config.width, adaptive)
        self.mlp = GemmaMLP(config)

    def forward(
        self,
        x: torch.Tensor,
        mask: torch.Tensor,
        rope: Rope,
        cond: torch.Tensor | None = None,
        past: KeysValues | None = None,
        keys_only: bool = False,
    ) -> tuple[torch.Tensor, KeysValues]:
        """x [B, N, W] -> x after this layer, and its own rotated keys and its values.

        mask is bool [B, 1 or N, M]: what may be looked at of `past` (keys and values that came before, if any) and of x
        itself, M tokens together. With `keys_only` the work stops at keys and values, and x comes back as it was.
        """
        y, gate = self.input_layernorm(x, cond)
        y = for_products(y)
        own = self.self_attn.keys_values(y, rope)
        if keys_only:
            return x, own
        k, v = own if past is None else (torch.cat(pair, dim=2) for pair in zip(past, own, strict=True))
        attended = attend(self.self_attn.queries(y, rope), k, v, mask)
        x = gated_add(x, self.self_attn.o_proj(attended), gate)
        y, gate = self.post_attention_layernorm(x, cond)
        return gated_add(x, self.mlp(for_products(y)), gate), own


class Gemma(nn.Module):
    """The layers and norms of one stack; `pi0.py` runs them. Only the VLM has an embedding table."""

    def __init__(self, config: GemmaConfig, vocab_size: int | None = None, adaptive: bool = False) -> None:
        super().__init__()
        if vocab_size is not None:
            self.embed_tokens = nn.Embedding(vocab_size, config.width)
        self.layers = nn.ModuleList(GemmaLayer(config, adaptive) for _ in range(config.depth))
        self.norm = RMSNorm(config.width, adaptive)

    @property
    def dtype(self) -> torch.dtype:
        return self.layers[0].self_attn.q_proj.weight.dtype


def gated_add(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
    return x + y if gate is None else x + gate * y


def rope_table(positions: torch.Tensor, head_dim: int) -> Rope:
    """Rotary angles position / 10000^(2i / head_dim) as cos and sin, float32 [B, N, 1, head_dim / 2].

    Computed from the positions, never kept as a buffer: a buffer would be rounded by `model.to(torch.bfloat16)`.
    """
    exponent = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angle = (positions[..., None, None].float()) * (1.0 / ROPE_THETA**exponent)
    return angle.cos(), angle.sin()


def rotate(x: torch.Tensor, rope: Rope) -> torch.Tensor:
    """x [B, N, heads, head_dim]: turn the pairs (x_i, x_{i + head_dim/2}), in float32, back to x's dtype."""
    cos, sin = rope
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """q [B, heads, N, D], k, v [B, kv heads, M, D], mask bool [B, 1 or N, M] (True: may look) -> [B, N, heads * D]."""
    batch, heads, rows, dim = q.shape
    fit = k.shape[1] == 1 and q.device.type == "cpu" and mask.shape[1] == 1 and not torch.compiler.is_compiling()
    if fit and batch % torch.get_num_threads() == 0:
        # Heads that share keys and values are just more rows, which takes up to a quarter less. Torch's backward gives
        # each thread whole heads, so only where all threads have as many; and a mask per row would have to be repeated.
        q = q.transpose(1, 2).reshape(batch, 1, rows * heads, dim)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None]).view(batch, rows, heads * dim)
    group = q.shape[1] // k.shape[1]  # query heads per kv head; spelt out, since masked GPU kernels take no groups
    k, v = (x.unsqueeze(2).expand(-1, -1, group, -1, -1).flatten(1, 2) for x in (k, v))  # a view for one kv head
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None])
    return out.transpose(1, 2).flatten(2)
