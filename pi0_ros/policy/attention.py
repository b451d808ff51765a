"""Multi-query attention, for the shapes of sampling: many query rows, one key and value head."""

from __future__ import annotations

from collections.abc import Callable
from math import gcd

import torch
import torch.nn.functional as F
from torch import Tensor

from pi0_ros.policy.processor import has_onednn, is_intel

_SCORES = 400_000  # at a time on a CPU: they stay in its cache, and the allocator gives the same memory every time


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q k^T) v for q [rows, heads, dim], already scaled, over k, v [kv_heads, keys, dim].

    `mask` bool [1, 1, 1, keys] (True: may be seen) or None for all. Returns [rows, heads * dim].
    """
    return bound(q.contiguous(), k, v, mask)()


def bound(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Callable[[], Tensor]:
    """`attend` for tensors that stay where they are, q contiguous: what is there when it is called is attended to."""
    rows, heads, dim = q.shape
    shape = rows, heads * dim
    if q.device.type == "cpu" and mask is None and len(k) == 1 and not torch.is_grad_enabled():
        # the heads share keys and values and no row is masked, so they are just more rows
        if is_intel():
            shares = gcd(rows * heads, torch.get_num_threads())  # as many for each thread, whatever torch's blocks are
            q = q.view(shares, 1, -1, dim)
            k, v = (t.expand(shares, 1, -1, -1) for t in (k, v))
            return lambda: F.scaled_dot_product_attention(q, k, v, scale=1.0).view(shape)
        if has_onednn(q.dtype):
            q, k, v_t = q.view(rows * heads, dim), k[0], v[0].t()
            return lambda: _attend_onednn(q, k, v_t).view(shape)
    if len(k) == 1:
        k, v = (t.expand(heads, -1, -1) for t in (k, v))
    group = heads // len(k)  # spelt out when it is called, since masked GPU kernels take no groups

    def attended() -> Tensor:
        seen = (k, v) if group == 1 else (t.repeat_interleave(group, dim=0) for t in (k, v))
        out = F.scaled_dot_product_attention(q.transpose(0, 1)[None], *(t[None] for t in seen), mask, scale=1.0)
        return out[0].transpose(0, 1).reshape(shape)

    return attended


def _attend_onednn(q: Tensor, k: Tensor, v_t: Tensor) -> Tensor:
    """Two plain products. On AMD's processors torch's own kernel takes 1.2 to 3 times as long, since its products go
    through MKL in small tiles; on Intel's it takes two thirds of this.
    """
    block = max(64, _SCORES // len(k))  # in query rows
    if len(q) > block:
        return torch.cat([_attend_onednn(part, k, v_t) for part in q.split(block)])
    product = torch.ops.mkldnn._linear_pointwise
    scores = product(q, k, None, "none", [], "")
    torch.softmax(scores, dim=-1, out=scores)
    return product(scores, v_t, None, "none", [], "")
