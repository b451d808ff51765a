"""Inputs that several tests of the model share: openpi's own tensors, and a tiny model of random weights."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from pi0_ros.model.config import GemmaConfig, Pi0Config, VisionConfig
from pi0_ros.model.pi0 import Observation, Pi0, preprocess_observation

DATA = Path(__file__).parent / "data"
PALIGEMMA = "paligemma_with_expert.paligemma."
EMBED_TOKENS = PALIGEMMA + "model.language_model.embed_tokens.weight"

TINY = Pi0Config(
    vision=VisionConfig(width=32, depth=2, mlp_dim=48, num_heads=2, patch_size=14, image_size=28),
    vlm=GemmaConfig(width=48, depth=3, mlp_dim=96, num_heads=4, num_kv_heads=1, head_dim=16),
    expert=GemmaConfig(width=32, depth=3, mlp_dim=64, num_heads=4, num_kv_heads=1, head_dim=16),
    vocab_size=90,
    action_dim=6,
    action_horizon=8,
    max_token_len=10,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def load_case(name: str) -> tuple[Pi0, Observation, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """'pi0' or 'pi05' -> model with openpi's weights, its observation, the other inputs, openpi's outputs."""
    data = json.loads((DATA / f"{name}.json").read_text())
    sizes = {key: data[key] for key in Pi0Config().to_dict() if key in data}
    model = Pi0(Pi0Config.from_dict({**sizes, "max_token_len": data["prompt_len"]}))
    weights = load_file(DATA / f"{name}.weights.safetensors")
    weights[EMBED_TOKENS] = weights.pop(PALIGEMMA + "lm_head.weight")  # tied; the file keeps the head's name
    del weights["paligemma_with_expert.gemma_expert.lm_head.weight"]  # nothing reads it
    model.load_state_dict(weights)
    inputs = load_file(DATA / f"{name}.inputs.safetensors")
    observation = preprocess_observation(
        *(inputs[key] for key in ("images", "image_masks", "tokens", "token_masks", "state"))
    )
    return model, observation, inputs, load_file(DATA / f"{name}.outputs.safetensors")


def random_model(config: Pi0Config, seed: int = 0) -> Pi0:
    """A model of which every parameter matters: what starts at zero gets small numbers."""
    model = Pi0(config, generator(seed))
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(0.0, 0.2, generator=generator(seed + 1))
    return model


def random_observation(config: Pi0Config, seed: int = 0, batch: int = 2) -> Observation:
    """All cameras there, the first prompt full, the second half full."""
    g, size = generator(seed), config.vision.image_size
    lengths = torch.tensor([[config.max_token_len], [config.max_token_len // 2]])[:batch]
    return Observation(
        images=torch.rand((batch, len(config.cameras), 3, size, size), generator=g) * 2 - 1,
        image_masks=torch.ones(batch, len(config.cameras), dtype=torch.bool),
        tokens=torch.randint(1, config.vocab_size, (batch, config.max_token_len), generator=g),
        token_masks=torch.arange(config.max_token_len).expand(batch, -1) < lengths,
        state=torch.randn((batch, config.action_dim), generator=g),
    )


def random_chunk(config: Pi0Config, seed: int, batch: int = 2) -> torch.Tensor:
    return torch.randn((batch, config.action_horizon, config.action_dim), generator=generator(seed))
