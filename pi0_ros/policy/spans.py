"""Keys and values of [prefix | state | actions], and the tokens that read and write them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pi0_ros.model.config import Pi0Config
from pi0_ros.model.gemma import RMS_EPS
from pi0_ros.policy.attention import bound

_EPS = torch.tensor(RMS_EPS)


@dataclass(frozen=True)
class Memory:
    """What the passes of a sampler write to, allocated once: keys and values [depth, kv_heads, rows, head_dim], and
    what one layer needs of queries, norms and float32 in between."""

    keys: Tensor
    values: Tensor
    queries: Tensor
    normed: Tensor
    wide: Tensor

    @classmethod
    def allocate(cls, config: Pi0Config, prefix_rows: int, dtype: torch.dtype, device: torch.device) -> Memory:
        """For prefixes of up to `prefix_rows` tokens."""
        vlm, rows = config.vlm, prefix_rows + config.suffix_len
        cache = vlm.depth, vlm.num_kv_heads, rows, vlm.head_dim
        turned = rows * (vlm.num_heads + vlm.num_kv_heads) * vlm.head_dim
        normed = rows * max(vlm.width, config.expert.width)
        sizes = cache, cache, (rows * vlm.num_heads * vlm.head_dim,), (normed,)
        tensors = [torch.zeros(size, dtype=dtype, device=device) for size in sizes]
        return cls(*tensors, torch.zeros(max(turned, normed), device=device))


class Span:
    """Tokens that stand in the cache from row `start` on, and attend to what is there up to themselves.

    All of its tensors are views made once, of memory allocated once. In a denoising step of a small model views and
    memory take a CPU as long as the arithmetic, for what was just written is in its cache, and what was just allocated
    is not.

    Args:
        rope: see `tables.rope_table`, for these tokens.
        heads, width: of the queries, and of the tokens.
        mask: bool [1, 1, 1, keys], True: may be seen; None: all may.
    """

    def __init__(
        self, memory: Memory, rope: Tensor, start: int, *, heads: int, width: int, mask: Tensor | None
    ) -> None:
        (depth, kv_heads, _, dim), rows = memory.keys.shape, len(rope)
        end = start + rows

        def view(of: Tensor, *shape: int) -> Tensor:
            return of[: torch.Size(shape).numel()].view(shape)

        self.rope, self.kv_heads, self.head_dim = rope, kv_heads, dim
        self.queries = view(memory.queries, rows, heads, dim)
        self.turned = view(memory.wide, rows, heads + kv_heads, dim)
        self.turned_pairs = _pairs(self.turned)
        self.turned_queries, self.turned_keys = self.turned.split([heads, kv_heads], dim=1)
        self.wide, self.normed = view(memory.wide, rows, width), view(memory.normed, rows, width)
        self.keys = [memory.keys[i, :, start:end].transpose(0, 1) for i in range(depth)]  # [rows, kv_heads, dim] each
        self.values = [memory.values[i, :, start:end].transpose(0, 1) for i in range(depth)]
        self._attend = [
            bound(self.queries, memory.keys[i, :, :end], memory.values[i, :, :end], mask) for i in range(depth)
        ]

    def rms_norm(self, x: Tensor) -> Tensor:
        """x / sqrt(mean(x^2) + eps), [rows, width]; the next norm overwrites it."""
        if x.is_cuda or torch.is_grad_enabled():
            return F.rms_norm(x, (x.shape[-1],), eps=RMS_EPS)
        wide = x if x.dtype == torch.float32 else self.wide.copy_(x)  # on a CPU F.rms_norm is eight operators
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        torch.mul(wide, torch.addcmul(_EPS, norm, norm, value=1 / x.shape[-1]).rsqrt_(), out=self.wide)
        return self.wide if x.dtype == torch.float32 else self.normed.copy_(self.wide)

    def write(self, i: int, qkv: Tensor) -> None:
        """Keys and values of layer i into the cache, and the queries where `qkv` [rows, ...] begins with them."""
        heads, kv_heads = qkv.view(len(self.rope), -1, self.head_dim), self.kv_heads
        if heads.shape[1] == 2 * kv_heads:  # the last layer of the VLM has no queries
            self.turned_keys.copy_(heads[:, :kv_heads])
            self.turned_pairs[:, -kv_heads:].mul_(self.rope)
        else:
            self.turned.copy_(heads[:, :-kv_heads])
            self.turned_pairs.mul_(self.rope)
            self.queries.copy_(self.turned_queries)
        self.keys[i].copy_(self.turned_keys)
        self.values[i].copy_(heads[:, -kv_heads:])

    def attend(self, i: int) -> Tensor:
        """What the queries find in layer i, [rows, heads * head_dim]."""
        return self._attend[i]()


def split_heads(qkv: Tensor, rope: Tensor, kv_heads: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v [rows, heads, head_dim] of a product [rows, ...]; q and k rotated, in float32."""
    heads = qkv.view(len(qkv), -1, head_dim)
    pairs, k_at = _pairs(heads[:, :-kv_heads].float()), heads.shape[1] - 2 * kv_heads
    turned = torch.view_as_real(pairs * rope).flatten(2)
    return turned[:, :k_at], turned[:, k_at:], heads[:, -kv_heads:]


def _pairs(x: Tensor) -> Tensor:
    # [rows, heads, head_dim] as complex numbers: what RoPE turns together stands side by side, see fused.py
    return torch.view_as_complex(x.view(len(x), x.shape[1], -1, 2))
