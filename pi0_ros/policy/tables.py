"""What a sampler computes once for its schedule and its positions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pi0_ros.model.config import Pi0Config
from pi0_ros.model.gemma import ROPE_THETA
from pi0_ros.model.pi0 import sinusoid
from pi0_ros.policy.fused import Fused


def time_tables(
    weights: Fused, config: Pi0Config, times: Sequence[float], dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """What depends on time alone, for every time of the schedule and, as the last entry, t = 0.

    pi0: the time half of the action-time MLP's first layer, f32 [steps + 1, width].
    pi0.5: action_in_proj's bias in the same shape, and scale + 1, shift and gate of every adaptive norm,
    [steps + 1, 2 * depth + 1, 3, 1, width].
    """
    table = weights.time
    t = torch.tensor([*times, 0.0], dtype=torch.float32, device=weights.action_in.device)
    embedding = sinusoid(t, config.expert.width, config.min_period, config.max_period)  # [steps + 1, width]
    if not config.pi05:
        return F.linear(embedding, table["mlp_in.weight"], table["mlp_in.bias"]), None
    condition = F.silu(F.linear(embedding, table["time_mlp_in.weight"], table["time_mlp_in.bias"]))
    condition = F.silu(F.linear(condition, table["time_mlp_out.weight"], table["time_mlp_out.bias"]))
    modulation = torch.einsum("tc,noc->tno", condition, table["modulation.weight"]) + table["modulation.bias"]
    modulation = modulation.unflatten(-1, (3, 1, -1))
    modulation[:, :, 0] += 1
    return table["action_in.bias"].expand(len(t), -1), modulation.to(dtype)


def rope_table(rows: int, head_dim: int, device: torch.device) -> Tensor:
    """e^(i * position * frequency), complex64 [rows, 1, head_dim / 2]; frequencies as in Gemma, in float32."""
    frequency = 1.0 / ROPE_THETA ** (torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim)
    angle = torch.arange(rows, dtype=torch.float32, device=device)[:, None] * frequency
    return torch.polar(torch.ones_like(angle), angle)[:, None]
