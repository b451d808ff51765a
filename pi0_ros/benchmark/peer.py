"""transformers' PI0 with our weights and our inputs: the oracle of the tests and the peer of the benchmark."""

from __future__ import annotations

from typing import Any

import torch

from pi0_ros.benchmark.inputs import BenchmarkError
from pi0_ros.model.config import GemmaConfig, Pi0Config
from pi0_ros.model.pi0 import Observation, Pi0

_PALIGEMMA, _EXPERT = "paligemma_with_expert.paligemma.model.", "paligemma_with_expert.gemma_expert.model."
_EMBED_ACTION_TIME = ("state_proj.", "action_in_proj.", "action_time_mlp_")


def to_transformers(model: Pi0) -> torch.nn.Module:
    """transformers' `PI0ForConditionalGeneration` with the weights of `model`, on its device, in float32.

    BenchmarkError where transformers is missing, or for pi0.5, which it does not have.
    """
    config = model.config
    if config.pi05:
        raise BenchmarkError("transformers has no pi0.5 to compare with, choose a pi0 model")
    try:
        import transformers
    except ImportError:
        raise BenchmarkError("transformers is not installed, so there is no peer: pip install transformers") from None
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": config.vision.width,
        "intermediate_size": config.vision.mlp_dim,
        "num_hidden_layers": config.vision.depth,
        "num_attention_heads": config.vision.num_heads,
        "patch_size": config.vision.patch_size,
        "image_size": config.vision.image_size,
        "vision_use_head": False,
    }
    settings = transformers.PI0Config(
        vlm_config={
            "model_type": "paligemma",
            "text_config": _gemma(config, config.vlm),
            "vision_config": vision,
            "projection_dim": config.vlm.width,
            "image_token_id": config.vocab_size,
        },
        dit_config=_gemma(config, config.expert),
        chunk_size=config.action_horizon,
        max_state_dim=config.action_dim,
        max_action_dim=config.action_dim,
    )
    with model.device:  # drawing its first weights, all replaced, takes a CPU minutes at the published sizes
        peer = transformers.PI0ForConditionalGeneration(settings)
    renamed = {peer_name(key): value for key, value in model.state_dict().items()}
    missing, unexpected = peer.load_state_dict(renamed, strict=False)
    if missing != ["model.dit.embed_tokens.weight"] or unexpected:  # the expert's embedding is never read
        raise RuntimeError(f"transformers' PI0 names its weights otherwise: missing {missing}, unexpected {unexpected}")
    return peer.eval()


def peer_name(key: str) -> str:
    """What transformers calls a parameter of ours."""
    name = key.replace(_PALIGEMMA, "model.vlm.").replace(_EXPERT, "model.dit.").replace(".vision_model.", ".")
    return "embed_action_time." + name if name.startswith(_EMBED_ACTION_TIME) else name


def _gemma(config: Pi0Config, sizes: GemmaConfig) -> dict[str, Any]:
    return {
        "model_type": "gemma",
        "hidden_size": sizes.width,
        "num_hidden_layers": sizes.depth,
        "intermediate_size": sizes.mlp_dim,
        "num_attention_heads": sizes.num_heads,
        "num_key_value_heads": sizes.num_kv_heads,
        "head_dim": sizes.head_dim,
        "vocab_size": config.vocab_size,
    }


def peer_inputs(config: Pi0Config, observation: Observation) -> dict[str, torch.Tensor]:
    """The observation as transformers wants it: one placeholder id per image token of a camera that is there."""
    rows, masks = [], []
    for present, tokens, valid in zip(
        observation.image_masks, observation.tokens, observation.token_masks, strict=True
    ):
        images = tokens.new_full((int(present.sum()) * config.vision.num_tokens,), config.vocab_size)
        row = torch.cat([images, tokens])
        mask = torch.cat([torch.ones_like(images, dtype=torch.bool), valid])
        pad = config.prefix_len - len(row)
        rows.append(torch.nn.functional.pad(row, (0, pad)))
        masks.append(torch.nn.functional.pad(mask, (0, pad)))
    return {
        "input_ids": torch.stack(rows),
        "attention_mask": torch.stack(masks).long(),
        "pixel_values": observation.images,
        "pixel_attention_mask": observation.image_masks,
        "state": observation.state,
    }
