"""Guided real-time chunking: a chunk in-painted towards the one before, for policies that were not trained for it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from pi0_ros.policy.attention import attend
from pi0_ros.policy.spans import split_heads

if TYPE_CHECKING:
    from pi0_ros.policy.sampler import Sampler


@dataclass(frozen=True)
class Guidance:
    """What guided in-painting pulls towards: `previous` [horizon, action_dim] in model space, `weights` [horizon].

    `dims`: how many of the first dimensions are compared; None: all. What the model never learnt to predict must be
    left out: through the network's Jacobian its error would pull at the others.

    With `jacobian` the published method (arXiv 2506.07339): the correction is the vector-Jacobian product through
    the network. Without, the Jacobian is taken for the identity, which costs no backward pass.
    """

    previous: Tensor
    weights: Tensor
    max_weight: float = 10.0
    jacobian: bool = True
    dims: int | None = None

    def beside(self, x: Tensor) -> Guidance:
        """The same on x's device."""
        return replace(self, previous=self.previous.to(x), weights=self.weights.to(x))


def denoise_guided(sampler: Sampler, guidance: Guidance, frozen: bool) -> None:
    """As `Sampler.sample` denoises, each velocity corrected towards the previous chunk (arXiv 2506.07339, eq. 2-4)."""
    if not sampler.config.pi05:
        sampler.run_state()
    previous, weights = guidance.previous, torch.zeros_like(sampler.x)
    weights[:, : guidance.dims] = guidance.weights.view(-1, 1)
    for k, t in enumerate(sampler.times):
        tau = 1.0 - t
        inverse_r2 = (tau**2 + t**2) / t**2
        strength = guidance.max_weight if tau == 0.0 else min(t / tau * inverse_r2, guidance.max_weight)
        if guidance.jacobian:
            with torch.enable_grad():
                x_t = sampler.x.detach().requires_grad_(True)
                v = velocity_differentiable(sampler, x_t, k, frozen)
                clean = x_t - t * v
                error = ((previous - clean) * weights).detach()
                (correction,) = torch.autograd.grad(clean, x_t, error)
            v = v.detach()
        else:
            v = sampler.velocity(sampler.x, k, frozen)
            correction = (previous - (sampler.x - t * v)) * weights
        v = v - strength * correction
        sampler.x.add_(v.mul_(sampler.free) if frozen else v, alpha=-1.0 / sampler.num_steps)


def velocity_differentiable(sampler: Sampler, x_t: Tensor, k: int, frozen: bool) -> Tensor:
    """`Sampler.velocity` through operators that autograd knows, without writing into the cache."""
    at = sampler.prefix_rows + (not sampler.config.pi05)
    rope, mask = sampler.suffix_rope[-len(x_t) :], sampler.mask(at + len(x_t))
    x = sampler.embed_actions(x_t, k, frozen)
    for i, layer in enumerate(sampler.weights.expert):
        norm, gate = sampler.norm(x, k, 2 * i, frozen)
        qkv = split_heads(layer.qkv.differentiable(norm), rope, *sampler.keys.shape[1::2])
        q, key, value = (part.to(norm) for part in qkv)
        keys = torch.cat([sampler.keys[i, :, :at], key.transpose(0, 1)], dim=1)
        values = torch.cat([sampler.values[i, :, :at], value.transpose(0, 1)], dim=1)
        branch = layer.out.differentiable(attend(q, keys, values, mask))
        x = x + (branch if gate is None else branch * gate)
        norm, gate = sampler.norm(x, k, 2 * i + 1, frozen)
        branch = layer.down.differentiable(layer.geglu.differentiable(norm))
        x = x + (branch if gate is None else branch * gate)
    norm, _ = sampler.norm(x, k, -1, frozen)
    return F.linear(norm.float(), *sampler.weights.action_out)
