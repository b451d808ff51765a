"""Our sampler and training step against transformers' PI0: same weights, same inputs, interleaved, in one run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from pi0_ros.benchmark.peer import peer_inputs, to_transformers
from pi0_ros.benchmark.timing import interleave, ratio
from pi0_ros.model.config import GemmaConfig, Pi0Config, VisionConfig
from pi0_ros.model.pi0 import Observation, Pi0
from pi0_ros.policy.sampler import Sampler

SMALL = Pi0Config(
    vision=VisionConfig(width=128, depth=4, mlp_dim=512, num_heads=4, patch_size=14, image_size=224),
    vlm=GemmaConfig(width=256, depth=6, mlp_dim=1024, num_heads=8, num_kv_heads=1, head_dim=32),
    expert=GemmaConfig(width=128, depth=6, mlp_dim=512, num_heads=8, num_kv_heads=1, head_dim=32),
    vocab_size=4096,
)
MID = replace(
    SMALL,
    vision=VisionConfig(width=768, depth=12, mlp_dim=3072, num_heads=12, patch_size=14, image_size=224),
    vlm=GemmaConfig(width=1024, depth=12, mlp_dim=4096, num_heads=8, num_kv_heads=1, head_dim=128),
    expert=GemmaConfig(width=512, depth=12, mlp_dim=2048, num_heads=8, num_kv_heads=1, head_dim=128),
)
CONFIGS = {"small": SMALL, "mid": MID, "pi0": Pi0Config()}
MODES = ("chunk", "step", "prefix reused", "one camera new")


def draw_observation(config: Pi0Config, batch: int, prompt: int, seed: int = 0) -> tuple[Observation, torch.Tensor]:
    """A random observation with `prompt` valid tokens, and its images as uint8 [batch, N, S, S, 3]."""
    generator = torch.Generator().manual_seed(seed)
    size, cameras = config.vision.image_size, len(config.cameras)
    pixels = torch.randint(0, 256, (batch, cameras, size, size, 3), dtype=torch.uint8, generator=generator)
    tokens = torch.randint(1, config.vocab_size, (batch, config.max_token_len), generator=generator)
    valid = (torch.arange(config.max_token_len) < prompt).expand(batch, -1)
    observation = Observation(
        images=pixels.permute(0, 1, 4, 2, 3).float() / 255 * 2 - 1,
        image_masks=torch.ones(batch, cameras, dtype=torch.bool),
        tokens=tokens * valid,
        token_masks=valid,
        state=torch.randn(batch, config.action_dim, generator=generator),
    )
    return observation, pixels


def compare_sampling(
    name: str, dtype: torch.dtype, device: torch.device, *, steps: int = 10, prompt: int = 20, runs: int = 9
) -> list[dict[str, Any]]:
    """One row per mode: {config, dtype, mode, ratio, ratio_min, ratio_max, ours_ms, peer_ms, max_abs_diff}.

    Every mode but "step" is held against the peer's whole chunk, since it has no other way to get one.
    """
    config = CONFIGS[name]
    model = Pi0(config, generator=torch.Generator().manual_seed(0)).eval()
    sampler = Sampler(model, num_steps=steps, dtype=dtype, device=device)
    peer = to_transformers(model).to(device)
    sinusoid = peer.embed_action_time.sinusoid_embeds.sinusoid_freq.clone()
    peer = peer.to(dtype)
    peer.embed_action_time.sinusoid_embeds.sinusoid_freq = sinusoid  # rounded frequencies would be another function
    del model
    observation, pixels = draw_observation(config, 1, prompt)
    inputs = {key: value.to(device) for key, value in peer_inputs(config, observation).items()}
    inputs = {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()}
    noise = torch.randn(1, config.action_horizon, config.action_dim, generator=torch.Generator().manual_seed(1))
    images = dict(zip(config.cameras, pixels[0], strict=True))
    tokens = observation.tokens[0, :prompt].numpy()
    frames = dict.fromkeys(config.cameras, 0)

    def sample(new: int) -> torch.Tensor:
        """A chunk with the first `new` cameras' frames new."""
        for slot in config.cameras[:new]:
            frames[slot] += 1
        return sampler.sample(images, tokens, observation.state[0], noise[0], frames=frames).actions

    peer_noise = noise.to(device, dtype)

    def peer_chunk() -> torch.Tensor:
        return peer.sample_actions(**inputs, noise=peer_noise, num_steps=steps)

    peer_step = _peer_step(peer, inputs, peer_noise)
    work: dict[str, Callable[[], Any]] = {
        "peer chunk": peer_chunk,
        "chunk": lambda: sample(3),
        "one camera new": lambda: sample(1),
        "prefix reused": lambda: sample(0),
        "peer step": peer_step,
        "step": lambda: _our_step(sampler, noise[0]),
    }
    sample(3)
    want = peer_chunk()[0].float().cpu()
    differences = {mode: (sample(new)[:] - want).abs().max().item() for mode, new in _NEW_CAMERAS.items()}
    differences["step"] = (_our_step(sampler, noise[0]).cpu() - peer_step()[0].float().cpu()).abs().max().item()
    seconds = interleave(work, runs, device, f"{name} {_label(dtype)}")
    rows = []
    for mode in MODES:
        against = ratio(seconds[mode], seconds["peer step" if mode == "step" else "peer chunk"])
        rows.append(_row(name, dtype, mode, against, differences[mode]))
    return rows


_NEW_CAMERAS = {"chunk": 3, "one camera new": 1, "prefix reused": 0}


@torch.no_grad()
def _our_step(sampler: Sampler, noise: torch.Tensor) -> torch.Tensor:
    return sampler._velocity(noise.to(sampler.device), 0, False)


def _peer_step(peer: Any, inputs: dict[str, torch.Tensor], noise: torch.Tensor) -> Callable[[], torch.Tensor]:
    mask = inputs["attention_mask"]
    with torch.no_grad():
        embeds = peer.model.embed_prefix(inputs["input_ids"], inputs["pixel_values"], inputs["pixel_attention_mask"])
        cache = peer.model.vlm(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=mask.cumsum(-1) - 1,
            token_type_ids=torch.zeros_like(embeds)[:, :, 0],
            use_cache=True,
        ).past_key_values
    length, time = cache.get_seq_length(), torch.ones(1, device=noise.device)

    @torch.no_grad()
    def step() -> torch.Tensor:
        out = peer(
            state=inputs["state"],
            noise=noise,
            timestep=time,
            pixel_attention_mask=inputs["pixel_attention_mask"],
            attention_mask=mask,
            past_key_values=cache,
        )
        cache.crop(length - cache.get_seq_length())
        return out.logits

    return step


def compare_training(
    name: str, device: torch.device, *, batch: int = 2, prompt: int = 20, runs: int = 9
) -> list[dict[str, Any]]:
    """The row of a training step in float32: loss and all gradients of a batch."""
    config = CONFIGS[name]
    model = Pi0(config, generator=torch.Generator().manual_seed(0)).to(device)
    peer = to_transformers(model).to(device).train()
    observation, _ = draw_observation(config, batch, prompt)
    inputs = {key: value.to(device) for key, value in peer_inputs(config, observation).items()}
    observation = observation.to(device)
    generator = torch.Generator().manual_seed(1)
    shape = (batch, config.action_horizon, config.action_dim)
    actions, noise = (torch.randn(shape, generator=generator).to(device) for _ in range(2))
    time = torch.rand(batch, generator=generator).to(device)

    def ours() -> torch.Tensor:
        model.zero_grad(set_to_none=True)
        loss = model.compute_loss(observation, actions, noise=noise, time=time).mean()
        loss.backward()
        return loss.detach()

    def theirs() -> torch.Tensor:
        peer.zero_grad(set_to_none=True)
        loss = peer(**inputs, noise=noise, timestep=time, actions=actions).loss
        loss.backward()
        return loss.detach()

    difference = (ours() - theirs()).abs().item()
    seconds = interleave({"theirs": theirs, "ours": ours}, runs, device, f"{name} training step")
    return [_row(name, torch.float32, "training step", ratio(seconds["ours"], seconds["theirs"]), difference)]


def _row(name: str, dtype: torch.dtype, mode: str, against: Any, difference: float) -> dict[str, Any]:
    return {
        "config": name,
        "dtype": _label(dtype),
        "mode": mode,
        "ratio": round(against.ratio, 3),
        "ratio_min": round(against.low, 3),
        "ratio_max": round(against.high, 3),
        "ours_ms": round(against.ours * 1e3, 2),
        "peer_ms": round(against.theirs * 1e3, 2),
        "max_abs_diff": float(f"{difference:.2e}"),
    }


def _label(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
