"""Flow matching: time, interpolation, and the noise sources a flow may start from.

t = 1 is noise and t = 0 the actions: x_t = t * noise + (1 - t) * actions, and the velocity to learn is
u_t = noise - actions (openpi: pi0.py, compute_loss; the paper counts t the other way round).
"""

from __future__ import annotations

import torch


def sample_time(batch: int, *, generator: torch.Generator) -> torch.Tensor:
    """float32 [batch] of t ~ Beta(1.5, 1) * 0.999 + 0.001, so (0.001, 1], denser near noise (openpi: pi0.py).

    Drawn by the inverse of the distribution function, which for Beta(1.5, 1) is u^(1/1.5) exactly.
    """
    u = torch.rand(batch, generator=generator, device=generator.device, dtype=torch.float64)
    return (u ** (1 / 1.5) * 0.999 + 0.001).float()


def interpolate(actions: torch.Tensor, noise: torch.Tensor, time: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """actions, noise [B, H, A], time [B] or [B, H] -> x_t and the velocity u_t, both [B, H, A]."""
    t = time[:, None, None] if time.dim() == 1 else time[:, :, None]
    return t * noise + (1 - t) * actions, noise - actions
