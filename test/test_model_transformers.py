"""transformers' PI0 as an independent oracle: same weights, same inputs, same actions and loss."""

import dataclasses

import pytest
import torch
from model_cases import TINY, random_chunk, random_model, random_observation

from pi0_ros.model.config import GemmaConfig, Pi0Config
from pi0_ros.model.flow import interpolate
from pi0_ros.model.pi0 import Observation, Pi0

PALIGEMMA, EXPERT = "paligemma_with_expert.paligemma.model.", "paligemma_with_expert.gemma_expert.model."
EMBEDDED_ACTIONS = ("state_proj.", "action_in_proj.", "action_time_mlp_")


def to_transformers(config: Pi0Config, model: Pi0) -> torch.nn.Module:
    """transformers' PI0 with the weights of `model` (its unread expert embedding stays random)."""
    transformers = pytest.importorskip("transformers")

    def gemma(sizes: GemmaConfig) -> dict:
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
    peer = transformers.PI0ForConditionalGeneration(
        transformers.PI0Config(
            vlm_config={
                "model_type": "paligemma",
                "text_config": gemma(config.vlm),
                "vision_config": vision,
                "projection_dim": config.vlm.width,
                "image_token_id": config.vocab_size,
            },
            dit_config=gemma(config.expert),
            chunk_size=config.action_horizon,
            max_state_dim=config.action_dim,
            max_action_dim=config.action_dim,
        )
    )
    renamed = {}
    for key, value in model.state_dict().items():
        key = key.replace(PALIGEMMA, "model.vlm.").replace(EXPERT, "model.dit.").replace(".vision_model.", ".")
        renamed["embed_action_time." + key if key.startswith(EMBEDDED_ACTIONS) else key] = value
    missing, unexpected = peer.load_state_dict(renamed, strict=False)
    assert missing == ["model.dit.embed_tokens.weight"] and not unexpected
    return peer.eval()


def peer_inputs(config: Pi0Config, observation: Observation) -> dict[str, torch.Tensor]:
    """The same observation as transformers wants it: one placeholder id per image token of a camera that is there."""
    rows, masks = [], []
    length = config.prefix_len
    for present, tokens, valid in zip(
        observation.image_masks, observation.tokens, observation.token_masks, strict=True
    ):
        images = torch.full((int(present.sum()) * config.vision.num_tokens,), config.vocab_size)
        row = torch.cat([images, tokens])
        mask = torch.cat([torch.ones_like(images, dtype=torch.bool), valid])
        rows.append(torch.nn.functional.pad(row, (0, length - len(row))))
        masks.append(torch.nn.functional.pad(mask, (0, length - len(mask))))
    return {
        "input_ids": torch.stack(rows),
        "attention_mask": torch.stack(masks).long(),
        "pixel_values": observation.images,
        "pixel_attention_mask": observation.image_masks,
        "state": observation.state,
    }


@pytest.mark.parametrize(
    ("kv_heads", "masked"),
    [(1, ()), (1, ((0, 1),)), (1, ((0, 0), (1, 2))), (2, ())],
    ids=["all cameras", "one masked", "ragged", "two kv heads"],
)
def test_transformers_pi0_gives_the_same_actions_and_loss(kv_heads, masked):
    stacks = {name: dataclasses.replace(getattr(TINY, name), num_kv_heads=kv_heads) for name in ("vlm", "expert")}
    config = dataclasses.replace(TINY, **stacks)
    model = random_model(config).eval()
    peer = to_transformers(config, model)
    observation = random_observation(config)
    for sample, camera in masked:
        observation.image_masks[sample, camera] = False
    noise, actions, time = random_chunk(config, 1), random_chunk(config, 2), torch.tensor([0.9, 0.2])
    inputs = peer_inputs(config, observation)

    sampled = model.sample_actions(observation, num_steps=10, noise=noise)
    torch.testing.assert_close(sampled, peer.sample_actions(**inputs, noise=noise, num_steps=10), atol=2e-4, rtol=0)

    with torch.no_grad():
        loss = model.compute_loss(observation, actions, noise=noise, time=time).mean()
        peer_loss = peer(**inputs, noise=noise, timestep=time, actions=actions).loss
        x_t, _ = interpolate(actions, noise, time)
        apart = model.velocity(observation, x_t, time) - peer(**inputs, noise=x_t, timestep=time).logits
    assert abs(loss - peer_loss) <= 1e-5 * peer_loss
    assert apart.abs().max() <= 2e-4
