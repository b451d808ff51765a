"""transformers' PI0 as an independent oracle: same weights, same inputs, same actions and loss."""

import dataclasses

import pytest
import torch
from model_cases import TINY, random_chunk, random_model, random_observation

from pi0_ros.benchmark.peer import peer_inputs, to_transformers
from pi0_ros.model.flow import interpolate

pytest.importorskip("transformers")


@pytest.mark.parametrize(
    ("kv_heads", "masked"),
    [(1, ()), (1, ((0, 1),)), (1, ((0, 0), (1, 2))), (2, ())],
    ids=["all cameras", "one masked", "ragged", "two kv heads"],
)
def test_transformers_pi0_gives_the_same_actions_and_loss(kv_heads, masked):
    stacks = {name: dataclasses.replace(getattr(TINY, name), num_kv_heads=kv_heads) for name in ("vlm", "expert")}
    config = dataclasses.replace(TINY, **stacks)
    model = random_model(config).eval()
    peer = to_transformers(model)
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
