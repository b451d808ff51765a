"""The optimised sampler gives the numbers of the plain model, whatever it reuses."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sampler_kit import draw_inputs, make_model

from pi0_ros.model.config import GemmaConfig, Pi0Config, VisionConfig
from pi0_ros.model.pi0 import Observation, Pi0
from pi0_ros.policy import guided as guided_module
from pi0_ros.policy.guided import Guidance, denoise_guided, velocity_differentiable
from pi0_ros.policy.images import resize_with_pad
from pi0_ros.policy.sampler import Sampler

TINY = Pi0Config(
    vision=VisionConfig(width=32, depth=2, mlp_dim=48, num_heads=2, patch_size=14, image_size=56),
    vlm=GemmaConfig(width=48, depth=3, mlp_dim=96, num_heads=4, num_kv_heads=1, head_dim=16),
    expert=GemmaConfig(width=32, depth=3, mlp_dim=64, num_heads=4, num_kv_heads=1, head_dim=16),
    vocab_size=50,
    action_dim=8,
    action_horizon=6,
    max_token_len=12,
)
TOKENS = torch.tensor([2, 7, 9, 41, 3])
FAMILIES = {
    "pi0": TINY,
    "pi05": replace(TINY, pi05=True),
    "two kv heads": replace(TINY, vlm=replace(TINY.vlm, num_kv_heads=2), expert=replace(TINY.expert, num_kv_heads=2)),
}


@pytest.fixture(params=FAMILIES)
def model(request) -> Pi0:
    return make_model(FAMILIES[request.param])


def draw(seed: int = 0):
    return draw_inputs(TINY, seed)


def expected(model: Pi0, images, state, noise, tokens=TOKENS, steps=10, masked=()) -> torch.Tensor:
    """What the plain model samples, prompt padded and absent cameras masked."""
    length = model.config.max_token_len
    stacked = torch.stack([images[slot] for slot in model.config.cameras]).permute(0, 3, 1, 2)
    observation = Observation(
        images=(stacked.float() / 255 * 2 - 1)[None],
        image_masks=torch.tensor([[slot not in masked for slot in model.config.cameras]]),
        tokens=torch.nn.functional.pad(tokens, (0, length - len(tokens)))[None],
        token_masks=(torch.arange(length) < len(tokens))[None],
        state=state[None],
    )
    return model.sample_actions(observation, num_steps=steps, noise=noise[None])[0]


@pytest.mark.parametrize("steps", [1, 4, 10])
def test_a_chunk_is_the_plain_models(model, steps):
    images, state, noise = draw()
    sample = Sampler(model, num_steps=steps).sample(images, TOKENS, state, noise)
    assert (sample.actions - expected(model, images, state, noise, steps=steps)).abs().max() < 2e-5
    assert not sample.prefix_reused and sample.cameras_encoded == 3


def test_a_robot_with_fewer_cameras_gets_what_masking_them_gives(model):
    images, state, noise = draw()
    sampler = Sampler(model, cameras=("base_0_rgb", "right_wrist_0_rgb"))
    given = {slot: images[slot] for slot in sampler.cameras}
    want = expected(model, images, state, noise, masked=("left_wrist_0_rgb",))
    assert (sampler.sample(given, TOKENS, state, noise).actions - want).abs().max() < 2e-5
    assert sampler.prefix_rows == 2 * 16 + 5  # nor is the prompt padded where no graph wants it so


def test_nothing_new_reuses_the_prefix_and_a_new_state_still_counts(model):
    images, state, noise = draw()
    sampler, frames = Sampler(model), dict.fromkeys(TINY.cameras, 1)
    sampler.sample(images, TOKENS, state, noise, frames=frames)
    sampler._run_prefix = lambda: pytest.fail("the prefix was computed again")
    again = sampler.sample(images, TOKENS, -state, noise, frames=frames)
    assert again.prefix_reused and again.cameras_encoded == 0
    assert (again.actions - expected(model, images, -state, noise)).abs().max() < 2e-5


def test_one_new_frame_is_the_only_one_encoded(model):
    images, state, noise = draw()
    sampler = Sampler(model)
    sampler.sample(images, TOKENS, state, noise, frames=dict.fromkeys(TINY.cameras, 1))
    images["left_wrist_0_rgb"] = 255 - images["left_wrist_0_rgb"]
    frames = {"base_0_rgb": 1, "left_wrist_0_rgb": 2, "right_wrist_0_rgb": 1}
    sample = sampler.sample(images, TOKENS, state, noise, frames=frames)
    assert sample.cameras_encoded == 1 and not sample.prefix_reused
    assert (sample.actions - expected(model, images, state, noise)).abs().max() < 2e-5
    assert sampler.sample(images, TOKENS, state, noise).cameras_encoded == 3  # frames that nobody names are all new


@pytest.mark.parametrize("tokens", [TOKENS[:2], torch.arange(1, 13)])
def test_a_new_prompt_of_another_length_takes_effect(model, tokens):
    images, state, noise = draw()
    sampler, frames = Sampler(model), dict.fromkeys(TINY.cameras, 1)
    sampler.sample(images, TOKENS, state, noise, frames=frames)
    sample = sampler.sample(images, tokens, state, noise, frames=frames)
    assert sample.cameras_encoded == 0 and not sample.prefix_reused
    assert (sample.actions - expected(model, images, state, noise, tokens=tokens)).abs().max() < 2e-5


def test_the_same_noise_gives_the_same_bits(model):
    images, state, noise = draw()
    first = Sampler(model).sample(images, TOKENS, state, noise)
    sampler = Sampler(model)
    other, _, _ = draw(seed=1)
    sampler.sample(other, TOKENS[:3], state, noise)
    assert torch.equal(sampler.sample(images, TOKENS, state, noise).actions, first.actions)


def test_padding_the_prompt_for_fixed_shapes_changes_nothing(model):
    images, state, noise = draw()
    sampler = Sampler(model)
    sampler.prompt_multiple = 8
    sample = sampler.sample(images, TOKENS, state, noise)
    assert (sample.actions - expected(model, images, state, noise)).abs().max() < 2e-5


def test_frozen_actions_stay_and_the_rest_follows_the_per_token_time_model(model):
    images, state, noise = draw()
    frozen = torch.full((2, TINY.action_dim), 0.25)
    sampler = Sampler(model, num_steps=4)
    free = sampler.sample(images, TOKENS, state, noise).actions
    sample = sampler.sample(images, TOKENS, state, noise, frozen=frozen)
    assert torch.equal(sample.actions[:2], frozen)

    length = model.config.max_token_len
    stacked = torch.stack([images[slot] for slot in TINY.cameras]).permute(0, 3, 1, 2)
    observation = Observation(
        images=(stacked.float() / 255 * 2 - 1)[None],
        image_masks=torch.ones(1, 3, dtype=torch.bool),
        tokens=torch.nn.functional.pad(TOKENS, (0, length - len(TOKENS)))[None],
        token_masks=(torch.arange(length) < len(TOKENS))[None],
        state=state[None],
    )
    x = noise.clone()
    x[:2] = frozen
    with torch.no_grad():
        for t in (1.0, 0.75, 0.5, 0.25):
            time = torch.full((1, TINY.action_horizon), t)
            time[:, :2] = 0.0
            v = model.velocity(observation, x[None], time)[0]
            x[2:] -= v[2:] / 4
    assert (sample.actions - x).abs().max() < 2e-5
    assert torch.equal(sampler.sample(images, TOKENS, state, noise).actions, free)


def test_a_chunk_with_frozen_actions_replays_another_graph_than_one_without(model):
    images, state, noise = draw()
    sampler, keys = Sampler(model), []
    sampler.graphs = SimpleNamespace(enabled=True, run=lambda key, function: (keys.append(key), function()))
    for frozen in (None, noise[:1]):
        sampler.sample(images, TOKENS, state, noise, frames=dict.fromkeys(TINY.cameras, 1), frozen=frozen)
    whole, kept = (key for key in keys if key[0] == "denoise")
    assert whole != kept


def test_guidance_with_no_weight_changes_nothing(model):
    images, state, noise = draw()
    sampler = Sampler(model)
    guidance = Guidance(torch.ones(TINY.action_horizon, TINY.action_dim), torch.zeros(TINY.action_horizon))
    for multiple in (1, 8):  # without and with padding of the prompt
        sampler.reset()
        sampler.prompt_multiple = multiple
        guided = sampler.sample(images, TOKENS, state, noise, guidance=guidance).actions
        assert (guided - expected(model, images, state, noise)).abs().max() < 2e-5


@pytest.mark.parametrize("jacobian", [True, False])
def test_guidance_written_out(jacobian, monkeypatch):
    """A velocity of 2 x: the action that it leads to is (1 - 2 t) x, and so is the Jacobian 1 - 2 t."""
    monkeypatch.setattr(guided_module, "velocity_differentiable", lambda sampler, x, k, frozen: 2 * x)
    sampler = SimpleNamespace(
        config=TINY, run_state=lambda: None, velocity=lambda x, k, frozen: 2 * x, x=torch.ones(2, 3),
        times=(1.0, 0.75, 0.5, 0.25), num_steps=4,
    )  # fmt: skip
    guidance = Guidance(torch.full((2, 3), 0.8), torch.tensor([1.0, 0.5]), 2.5, jacobian, dims=2)
    denoise_guided(sampler, guidance, False)
    expected = torch.ones(2, 3)
    weights = torch.tensor([[1.0, 1.0, 0.0], [0.5, 0.5, 0.0]])
    # t / (1 - t) * (t^2 + (1 - t)^2) / t^2 is without end, 10 / 3, 2 and 10 / 3; 2.5 is the most
    for t, strength in ((1.0, 2.5), (0.75, 2.5), (0.5, 2.0), (0.25, 2.5)):
        slope = 1 - 2 * t
        correction = (0.8 - slope * expected) * weights * (slope if jacobian else 1)
        expected = expected - (2 * expected - strength * correction) / 4
    torch.testing.assert_close(sampler.x, expected, atol=1e-6, rtol=0)


def test_frozen_actions_stay_whatever_guidance_pulls_at_the_others(model):
    images, state, noise = draw()
    frozen, weights = torch.full((2, TINY.action_dim), 0.25), torch.ones(TINY.action_horizon)
    for jacobian in (True, False):
        guidance = Guidance(noise + 1.0, weights, jacobian=jacobian)
        sample = Sampler(model).sample(images, TOKENS, state, noise, frozen=frozen, guidance=guidance)
        assert torch.equal(sample.actions[:2], frozen)


@pytest.mark.parametrize("jacobian", [True, False])
def test_guidance_pulls_the_weighted_actions_to_the_previous_chunk(model, jacobian):
    images, state, noise = draw()
    sampler = Sampler(model)
    free = sampler.sample(images, TOKENS, state, noise).actions
    previous, weights = free + 0.5, torch.tensor([1.0, 1.0, 0.5, 0.0, 0.0, 0.0])
    guided = sampler.sample(
        images, TOKENS, state, noise, guidance=Guidance(previous, weights, jacobian=jacobian)
    ).actions
    assert (guided[:2] - previous[:2]).abs().mean() < 0.3 * (free[:2] - previous[:2]).abs().mean()


def test_the_guidance_gradient_is_the_true_vector_jacobian_product(model):
    images, state, noise = draw()
    sampler = Sampler(model, num_steps=4)
    sampler.sample(images, TOKENS, state, noise)
    x = noise.double().float().requires_grad_(True)
    with torch.enable_grad():
        v = velocity_differentiable(sampler, x, 2, False)
    with torch.no_grad():
        assert (v - sampler.velocity(x, 2, False)).abs().max() < 2e-5
    direction, cotangent = torch.randn_like(x), torch.randn_like(v)
    (gradient,) = torch.autograd.grad(v, x, cotangent)
    with torch.no_grad():
        plus, minus = (sampler.velocity(x + sign * 1e-2 * direction, 2, False) for sign in (1, -1))
    numeric = ((plus - minus) / 2e-2 * cotangent).sum()
    assert abs((gradient * direction).sum() - numeric) < 0.02 * abs(numeric) + 0.02


def test_bfloat16_stays_within_what_rounding_explains(model):
    images, state, noise = draw()
    sample = Sampler(model, dtype=torch.bfloat16).sample(images, TOKENS, state, noise)
    want = expected(model, images, state, noise)
    # 8 bits of mantissa: 0.4 % a rounding, a handful of them in a row at each of a few layers
    assert (sample.actions - want).abs().max() < 0.05 * want.abs().max()


def test_a_prompt_that_does_not_fit_is_refused_with_its_length(model):
    images, state, noise = draw()
    for length in (0, 13):
        with pytest.raises(ValueError, match=f"1 to 12 tokens are allowed, found {length}"):
            Sampler(model).sample(images, torch.ones(length), state, noise)


def test_nothing_of_a_refused_chunk_is_reused(model):
    images, state, noise = draw()
    sampler, frames = Sampler(model), dict.fromkeys(TINY.cameras, 1)
    sampler.sample(images, TOKENS, state, noise, frames=frames)
    other, _, _ = draw(seed=1)
    frames = dict.fromkeys(TINY.cameras, 2)
    with pytest.raises(ValueError, match="found 13"):
        sampler.sample(other, torch.ones(13), state, noise, frames=frames)
    sample = sampler.sample(other, TOKENS, state, noise, frames=frames)
    assert not sample.prefix_reused and sample.cameras_encoded == 3
    assert (sample.actions - expected(model, other, state, noise)).abs().max() < 2e-5


def test_an_unknown_camera_is_refused(model):
    with pytest.raises(ValueError, match="overhead"):
        Sampler(model, cameras=("overhead",))


def test_what_the_time_tables_were_made_of_is_not_kept(model):
    assert not Sampler(model).weights.time


def test_without_onednn_the_numbers_are_the_same(model, monkeypatch):
    def absent(*_):
        raise AssertionError("oneDNN was used")

    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr("pi0_ros.policy.attention._attend_onednn", absent)
    monkeypatch.setattr("pi0_ros.policy.fused.is_intel", lambda: False)
    images, state, noise = draw()
    sampler = Sampler(model)
    assert sampler.weights.vlm[0].qkv.packed is None
    actions = sampler.sample(images, TOKENS, state, noise).actions
    assert (actions - expected(model, images, state, noise)).abs().max() < 2e-5


@pytest.mark.parametrize(
    ("intel", "small"), [(False, 1e9), (True, 1e9), (True, 0)], ids=["AMD", "Intel", "Intel, a large model"]
)
def test_whoever_made_the_processor_the_numbers_are_the_same(intel, small, model, monkeypatch):
    monkeypatch.setattr("pi0_ros.policy.fused.SMALL_PRODUCT", small)
    for room in ("fused", "attention"):
        monkeypatch.setattr(f"pi0_ros.policy.{room}.is_intel", lambda: intel)
    images, state, noise = draw()
    sampler = Sampler(model)
    packed = [layer.qkv.packed is not None for layer in sampler.weights.expert]
    assert packed == [(not intel or not small) and torch.backends.mkldnn.is_available()] * len(packed)
    actions = sampler.sample(images, TOKENS, state, noise).actions
    assert (actions - expected(model, images, state, noise)).abs().max() < 2e-5
    with torch.no_grad():
        apart = velocity_differentiable(sampler, noise, 2, False) - sampler.velocity(noise, 2, False)
    assert apart.abs().max() < 2e-5
    # What nothing reads is not kept, and of the rest one copy: guidance alone wants another, of the expert's.
    siglip, vlm = model.siglip, [p for p in model.vlm.layers.parameters() if p.requires_grad]
    assert numbers(sampler.weights.vision) <= sum(
        p.numel() for p in (*siglip.parameters(), *model.projector.parameters())
    )
    assert numbers(sampler.weights.vlm) <= sum(p.numel() for p in vlm)


def numbers(held) -> int:
    """How many the tensors have that an object, a list or a mapping holds."""
    if isinstance(held, torch.Tensor):
        return held.numel()
    if isinstance(held, (list, tuple)):
        return sum(map(numbers, held))
    return sum(map(numbers, vars(held).values())) if hasattr(held, "__dict__") else 0


def test_frames_of_another_size_are_resized_on_the_device(model):
    images, state, noise = draw()
    size = TINY.vision.image_size
    generator = torch.Generator().manual_seed(1)
    large = {s: torch.randint(0, 256, (2 * size, 3 * size, 3), dtype=torch.uint8, generator=generator) for s in images}
    sampler = Sampler(model)
    sampler.sample(images, TOKENS, state, noise)
    actions = sampler.sample(large, TOKENS, state, noise).actions
    for pixels, image in zip(sampler.pixels, large.values(), strict=True):
        assert np.abs(pixels.numpy().astype(int) - resize_with_pad(image.numpy(), size)).max() <= 1
    seen = dict(zip(TINY.cameras, sampler.pixels, strict=True))
    assert (actions - expected(model, seen, state, noise)).abs().max() < 2e-5


def test_a_gpu_other_than_the_first_is_made_the_current_one(model, monkeypatch):
    """Otherwise a graph would be captured on the first one, where nothing happens, and replay nothing."""

    class Chosen(Exception):
        pass

    def choose(device):
        raise Chosen(device)

    images, state, noise = draw()
    sampler = Sampler(model)
    sampler.device = torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "set_device", choose)
    with pytest.raises(Chosen, match="cuda:1"):
        sampler.sample(images, TOKENS, state, noise)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_graphs_give_what_the_cpu_gives(model):
    images, state, noise = draw()
    sampler, frames = Sampler(model, device="cuda"), dict.fromkeys(TINY.cameras, 1)
    for seed in range(3):  # the first call captures, the others replay
        images, state, noise = draw(seed)
        frames["base_0_rgb"] = seed
        frames["left_wrist_0_rgb"] = frames["right_wrist_0_rgb"] = seed
        got = sampler.sample(images, TOKENS[: 3 + seed % 2], state, noise, frames=frames)  # through pinned memory
        want = expected(model, images, state, noise, tokens=TOKENS[: 3 + seed % 2])
        assert (got.actions - want).abs().max() < 1e-4
        reused = sampler.sample(images, TOKENS[: 3 + seed % 2], -state, noise, frames=frames)
        assert reused.prefix_reused
        want = expected(model, images, -state, noise, tokens=TOKENS[: 3 + seed % 2])
        assert (reused.actions - want).abs().max() < 1e-4
