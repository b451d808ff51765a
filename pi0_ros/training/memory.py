"""What a choice of options will need of memory, before anything is computed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from pi0_ros.model.config import GemmaConfig, Pi0Config
from pi0_ros.training.parts import PARTS, counts, trained

GB = 1e9


@dataclass(frozen=True)
class Forecast:
    """Bytes on each device."""

    weights: int
    gradients: int
    optimizer: int
    average: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.average + self.activations


def forecast(
    model: nn.Module,
    config: Pi0Config,
    *,
    piece: int,
    cameras: int,
    dtype: torch.dtype = torch.float32,
    gradient_checkpointing: bool = False,
    draws: int = 1,
    average: bool = True,
    processes: int = 1,
) -> Forecast:
    """Weights, gradients, AdamW's two moments and the average are float32 and counted; activations are estimated.

    piece: samples that go through the model at once; cameras: how many the robot has; draws: noises and times of each
    sample; processes: that all but the activations are spread over.
    """
    total = sum(parameter.numel() for parameter in model.parameters())
    learning = sum(parameter.numel() for parameter in trained(model).values())
    activations = activation_bytes(
        config,
        cameras,
        {part for part, (live, _) in counts(model).items() if live},
        2 if dtype == torch.bfloat16 else 4,
        gradient_checkpointing,
        draws,
    )
    # Under autocast the weights of one forward pass are kept in bfloat16 as well.
    copies = 2 * total if dtype == torch.bfloat16 else 0
    kept = (4 * total + copies, 4 * learning, 8 * learning, 4 * learning * average)
    return Forecast(*(number // processes for number in kept), piece * activations)


def activation_bytes(
    config: Pi0Config, cameras: int, live: set[str], size: int, recompute: bool, draws: int = 1
) -> int:
    """What the backward pass of one sample needs to remember, an estimate by the shapes of what each operation saves.

    live: the parts that are trained. Nothing is remembered of a part that needs no gradient and has none below it.
    size: bytes of a number in the products; norms and residuals are float32.
    draws: how often the suffix runs over one prefix.
    """
    vision, vlm, expert = config.vision, config.vlm, config.expert
    patches = cameras * vision.num_tokens
    prefix, suffix = patches + config.max_token_len, config.suffix_len
    # residual in, norm out, twice; then in the products: norm outs, q, k, v, attention out; fc1, gelu
    tower = 4 * 4 * vision.width + size * (6 * vision.width + 2 * vision.mlp_dim)
    stacks = []
    if "vision" in live:
        stacks.append((vision.depth, patches, tower, 4 * vision.width))
    if {"vision", "vlm"} & live:
        stacks.append((vlm.depth, prefix, _gemma(vlm, size), 4 * vlm.width))
    inner = _gemma(expert, size) + _joint(expert, prefix, suffix, size)
    stacks.append((expert.depth, draws * suffix, inner, 4 * expert.width))
    if recompute:  # the input of every layer, and all of the one that is computed again
        kept = sum(depth * tokens * edge for depth, tokens, _, edge in stacks)
        keys_values = draws * vlm.depth * prefix * 2 * vlm.num_kv_heads * vlm.head_dim * size
        return kept + keys_values + max(tokens * inner for _, tokens, inner, _ in stacks)
    return sum(depth * tokens * inner for depth, tokens, inner, _ in stacks)


def _gemma(config: GemmaConfig, size: int) -> int:
    """Bytes a token and layer: two norms with their residuals; q, k, v before and after rotation, attention out;
    gate, up, gelu, product."""
    heads, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return 4 * 4 * config.width + size * (2 * config.width + 3 * heads + 4 * kv + 4 * config.mlp_dim)


def _joint(config: GemmaConfig, prefix: int, suffix: int, size: int) -> int:
    """Bytes a suffix token and layer for the keys and values of prefix and suffix together."""
    return size * 2 * config.num_kv_heads * config.head_dim * (prefix + suffix) // suffix


def report(model: nn.Module, needed: Forecast, available: int | None, device: str) -> str:
    """What is trained and what it will take, as text for a person."""
    lines = ["parameters trained:"]
    found = counts(model)
    for part, (live, total) in found.items():
        lines.append(f"  {PARTS[part]:15}{live / 1e6:10.2f} M of {total / 1e6:.2f} M")
    live, total = (sum(pair[i] for pair in found.values()) for i in (0, 1))
    lines.append(f"  {'together':15}{live / 1e6:10.2f} M of {total / 1e6:.2f} M")
    lines.append("memory forecast, GB:")
    for name in ("weights", "gradients", "optimizer", "average", "activations", "total"):
        estimate = " (estimate)" if name == "activations" else ""
        lines.append(f"  {name:15}{getattr(needed, name) / GB:10.2f}{estimate}")
    if available is not None:
        lines.append(f"  {'free on ' + device:15}{available / GB:10.2f}")
        if needed.total > available:
            lines.append(
                "warning: this will probably not fit; --gradient-checkpointing, a larger --accumulate, --lora, "
                "--freeze, --ema 0 and --dtype bfloat16 need less"
            )
    return "\n".join(lines)


def available_memory(device: torch.device) -> int | None:
    """Bytes free on a device, on the CPU with what this process has already; None where that cannot be told."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "cpu":
        import psutil

        return psutil.virtual_memory().available + psutil.Process().memory_info().rss
    return None
