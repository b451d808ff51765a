"""What the model promises beyond equal numbers: masks, time, randomness, gradients, and no wasted work."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_cases import TINY, generator, random_chunk, random_model, random_observation

from pi0_ros.model.flow import interpolate, sample_time
from pi0_ros.model.gemma import RMSNorm, attend, gated_add, rope_table
from pi0_ros.model.pi0 import (
    Pi0,
    denoising_times,
    drop_padding,
    make_attn_mask,
    preprocess_observation,
    sinusoid,
)

CONFIGS = {"pi0": TINY, "pi05": dataclasses.replace(TINY, pi05=True)}
FAMILIES = pytest.mark.parametrize("family", CONFIGS)
TIME = torch.tensor([0.9, 0.2])


def close(found, expected, atol=1e-5):
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)


def case(family):
    config = CONFIGS[family]
    return random_model(config), random_observation(config), random_chunk(config, 1)


def finish(layer, x, attended, gate, cond):
    x = gated_add(x, layer.self_attn.o_proj(attended), gate)
    y, gate = layer.post_attention_layernorm(x, cond)
    return gated_add(x, layer.mlp(y), gate)


def joint_velocity(model, observation, x_t, time):
    """The textbook form: prefix and suffix in one sequence, one attention per layer under one block mask."""
    prefix, valid = model.embed_prefix(observation)
    suffix, cond = model.embed_suffix(observation.state, x_t, time)
    p, s = prefix.shape[1], suffix.shape[1]
    valid = torch.cat([valid, valid.new_ones(len(valid), s)], dim=1)
    ar = torch.zeros(p + s, dtype=torch.bool)
    ar[p] = True  # the state token, or the first action of pi0.5
    if not model.config.pi05:
        ar[p + 1] = True
    mask = make_attn_mask(valid, ar)
    cos, sin = rope_table(valid.cumsum(dim=1) - 1, model.config.vlm.head_dim)
    ropes = (cos[:, :p], sin[:, :p]), (cos[:, p:], sin[:, p:])
    for vlm, expert in zip(model.vlm.layers, model.expert.layers, strict=True):
        y_prefix, _ = vlm.input_layernorm(prefix)
        y_suffix, gate = expert.input_layernorm(suffix, cond)
        parts = [(vlm, y_prefix, ropes[0]), (expert, y_suffix, ropes[1])]
        q = torch.cat([layer.self_attn.queries(y, rope) for layer, y, rope in parts], dim=2)
        kv = [layer.self_attn.keys_values(y, rope) for layer, y, rope in parts]
        attended = attend(q, *(torch.cat(pair, dim=2) for pair in zip(*kv, strict=True)), mask)
        prefix = finish(vlm, prefix, attended[:, :p], None, None)
        suffix = finish(expert, suffix, attended[:, p:], gate, cond)
    suffix, _ = model.expert.norm(suffix[:, -model.config.action_horizon :], cond)
    return model.action_out_proj(suffix)


@FAMILIES
def test_prefix_then_suffix_equals_one_joint_pass(family):
    model, observation, x_t = case(family)
    observation.image_masks[0, 1] = False
    close(model.velocity(observation, x_t, TIME), joint_velocity(model, observation, x_t, TIME))


@FAMILIES
def test_a_prefix_kept_for_all_steps_gives_the_velocity_of_a_fresh_one(family):
    model, observation, x_t = case(family)
    prefix, valid = model.embed_prefix(observation)
    cache = model.prefix_kv(prefix, valid)
    for t in (1.0, 0.5):
        time = torch.full((2,), t)
        kept = model.suffix_velocity(cache, valid, observation.state, x_t, time)
        close(kept, model.velocity(observation, x_t, time), 0)


def test_attention_mask_written_out():
    valid = torch.tensor([[True, False, True, True, True]])  # image, absent, prompt | state, action
    ar = torch.tensor([False, False, False, True, True])
    assert make_attn_mask(valid, ar)[0].int().tolist() == [
        [1, 0, 1, 0, 0],
        [1, 0, 1, 0, 0],
        [1, 0, 1, 0, 0],
        [1, 0, 1, 1, 0],
        [1, 0, 1, 1, 1],
    ]


@pytest.mark.parametrize("per_row", [False, True], ids=["one mask", "a mask per row"])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_attention_and_its_gradients_are_the_textbook_s_however_threads_share_the_batch(threads, per_row):
    batch, heads, rows, keys, dim = 2, 4, 5, 7, 8
    q = torch.randn(batch, heads, rows, dim, generator=generator(0))
    k, v = torch.randn(2, batch, 1, keys, dim, generator=generator(1))
    mask = torch.rand(batch, rows if per_row else 1, keys, generator=generator(2)) < 0.6
    mask[..., 0] = True

    def textbook(q, k, v):
        scores = (q @ k.mT / dim**0.5).masked_fill(~mask[:, None], -torch.inf)
        return (scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2)

    weights = torch.randn(batch, rows, heads * dim, generator=generator(3))

    def results(function):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        out = function(*inputs)
        return out, *torch.autograd.grad((out * weights).sum(), inputs)

    expected, usual = results(textbook), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = results(lambda *inputs: attend(*inputs, mask))
    finally:
        torch.set_num_threads(usual)
    for one, other in zip(found, expected, strict=True):
        close(one, other)


def test_actions_see_one_another_and_the_state_does_not_see_them():
    model, observation, x_t = case("pi0")
    changed = x_t.clone()
    changed[:, -1] += 1.0
    moved = (model.velocity(observation, changed, TIME) - model.velocity(observation, x_t, TIME)).abs().amax(dim=(0, 2))
    assert (moved > 1e-4).all()  # bidirectional: the last action moves the first one
    suffix_ar = model.suffix_ar(torch.device("cpu"))
    assert suffix_ar.tolist() == [True, True] + [False] * 7
    assert make_attn_mask(torch.ones(1, 9, dtype=torch.bool), suffix_ar)[0, 0].tolist() == [True] + [False] * 8


@FAMILIES
def test_content_of_masked_cameras_and_padded_prompts_has_no_influence(family):
    model, observation, noise = case(family)
    observation.image_masks[0, 1] = False
    images, tokens = observation.images.clone(), observation.tokens.clone()
    images[0, 1], tokens[1, 5:] = 0.3, 7
    other = dataclasses.replace(observation, images=images, tokens=tokens)
    close(model.velocity(observation, noise, TIME), model.velocity(other, noise, TIME), 0)
    close(model.sample_actions(observation, noise=noise), model.sample_actions(other, noise=noise), 0)
    images[0, 0] = 0.3
    moved = model.velocity(dataclasses.replace(other, images=images), noise, TIME)
    assert (moved - model.velocity(observation, noise, TIME))[0].abs().max() > 1e-3


@FAMILIES
def test_a_camera_that_no_sample_has_costs_no_vision_compute_in_sampling(family):
    model, observation, noise = case(family)
    observation.image_masks[:, 0] = False
    expected = model.velocity(observation, noise, TIME)
    encoded = []
    model.siglip.register_forward_hook(lambda module, inputs, output: encoded.append(len(inputs[0])))
    sampled = model.sample_actions(observation, num_steps=3, noise=noise)
    assert encoded == [2 * 2]  # two samples, two cameras, once for three steps
    nan = observation.images.clone()
    nan[:, 0] = torch.nan  # not even read
    close(model.sample_actions(dataclasses.replace(observation, images=nan), num_steps=3, noise=noise), sampled, 0)
    dropped = drop_padding(observation)
    assert dropped.images.shape[1] == 2
    close(model.velocity(dropped, noise, TIME), expected)


def test_padding_that_all_prompts_share_is_dropped_without_changing_the_result():
    model, observation, noise = case("pi0")
    observation.token_masks[:, 6:] = False
    dropped = drop_padding(observation)
    assert dropped.tokens.shape == (2, 6)
    close(model.velocity(dropped, noise, TIME), model.velocity(observation, noise, TIME))


@settings(max_examples=25, deadline=None)
@given(
    cameras=st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=2, max_size=2),
    lengths=st.tuples(st.integers(0, 10), st.integers(0, 10)),
)
def test_dropping_padding_never_changes_the_velocity(cameras, lengths):
    model, observation, x_t = case("pi0")
    valid = torch.arange(10) < torch.tensor(lengths)[:, None]
    observation = dataclasses.replace(observation, image_masks=torch.tensor(cameras), token_masks=valid)
    dropped = drop_padding(observation)
    assert dropped.images.shape[1] == observation.image_masks.any(dim=0).sum()
    assert dropped.tokens.shape[1] == max(1, *lengths)
    with torch.no_grad():
        close(model.velocity(dropped, x_t, TIME), model.velocity(observation, x_t, TIME))


@FAMILIES
def test_rows_without_anything_valid_stay_finite_forward_and_backward(family):
    model, observation, actions = case(family)
    observation.image_masks[0] = False
    observation.token_masks[0] = False  # sample 0 has no prefix at all
    loss = model.compute_loss(observation, actions, noise=random_chunk(TINY, 2), time=TIME)
    loss.mean().backward()
    assert loss.isfinite().all()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name
    observation.image_masks[:] = False
    observation.token_masks[:] = False
    assert model.sample_actions(observation, noise=actions).isfinite().all()


@FAMILIES
def test_one_time_per_action_equals_one_per_sample_where_they_agree(family):
    model, observation, x_t = case(family)
    per_token = TIME[:, None].expand(2, TINY.action_horizon).clone()
    close(model.velocity(observation, x_t, per_token), model.velocity(observation, x_t, TIME), 1e-6)
    actions, noise = random_chunk(TINY, 2), random_chunk(TINY, 3)
    close(
        model.compute_loss(observation, actions, noise=noise, time=per_token),
        model.compute_loss(observation, actions, noise=noise, time=TIME),
    )
    per_token[:, :3] = 0.0  # actions already decided, as trained-in real-time chunking has them
    changed = model.velocity(observation, x_t, per_token) - model.velocity(observation, x_t, TIME)
    assert changed.abs().amax(dim=(0, 2)).min() > 1e-3
    x_t, u_t = interpolate(actions, noise, per_token)
    assert torch.equal(x_t[:, :3], actions[:, :3])
    loss = model.compute_loss(observation, actions, noise=noise, time=per_token)
    close(loss, (model.velocity(observation, x_t, per_token) - u_t).square().mean(dim=-1))


def test_loss_is_per_step_over_all_or_the_first_dimensions():
    model, observation, actions = case("pi0")
    noise = random_chunk(TINY, 2)
    x_t, u_t = interpolate(actions, noise, TIME)
    error = (model.velocity(observation, x_t, TIME) - u_t).square()
    loss = model.compute_loss(observation, actions, noise=noise, time=TIME)
    assert loss.shape == (2, 8)
    close(loss, error.mean(dim=-1))
    close(model.compute_loss(observation, actions, noise=noise, time=TIME, loss_dims=4), error[..., :4].mean(dim=-1))


@FAMILIES
def test_the_same_generator_gives_the_same_bits(family):
    model, observation, _ = case(family)
    first = model.sample_actions(observation, generator=generator(5))
    assert first.shape == (2, 8, 6) and first.dtype == torch.float32
    assert torch.equal(first, model.sample_actions(observation, generator=generator(5)))
    noise = torch.randn(first.shape, generator=generator(5))
    assert torch.equal(first, model.sample_actions(observation, noise=noise))
    assert not torch.equal(first, model.sample_actions(observation, generator=generator(6)))


@pytest.mark.parametrize("family", ["pi0", "pi05"])
def test_several_draws_of_a_sample_share_its_prefix_and_change_nothing(family):
    config = dataclasses.replace(TINY, pi05=family == "pi05")
    model, observation = random_model(config), random_observation(config)
    actions, noise = random_chunk(config, 1), torch.randn(3 * 2, 8, 6, generator=generator(5))
    time = torch.linspace(0.1, 0.9, 6)
    with torch.no_grad():
        together = model.compute_loss(observation, actions, noise=noise, time=time)  # [3 * 2, 8]
        for draw in range(3):
            alone = model.compute_loss(observation, actions, noise=noise[draw::3], time=time[draw::3])
            close(together[draw::3], alone)


@pytest.mark.parametrize("num_steps", [0, -1, 2.5, True, "10", None])
def test_a_bad_number_of_steps_is_refused(num_steps):
    model, observation, noise = case("pi0")
    with pytest.raises(ValueError, match="num_steps must be a whole number of at least 1, found"):
        model.sample_actions(observation, num_steps=num_steps, noise=noise)


def test_noise_of_the_wrong_shape_is_refused():
    model, observation, noise = case("pi0")
    with pytest.raises(ValueError, match=r"noise must have shape \[2, 8, 6\], found \[2, 7, 6\]"):
        model.sample_actions(observation, noise=noise[:, :7])


def test_images_of_another_size_are_refused():
    model, observation, noise = case("pi0")
    other = dataclasses.replace(observation, images=observation.images[..., :14])
    with pytest.raises(ValueError, match="the model takes images of 28x28 pixels, found 28x14"):
        model.sample_actions(other, noise=noise)


def test_denoising_times_start_at_one_and_end_one_step_above_zero():
    assert denoising_times(4) == [1.0, 0.75, 0.5, 0.25]
    assert denoising_times(np.int64(1)) == [1.0]
    for n in (5, 10, 12, 15, 20, 100):
        times = denoising_times(n)
        assert len(times) == n and times[-1] == pytest.approx(1 / n, abs=1e-6)


def test_time_sinusoid_written_out():
    emb = sinusoid(torch.tensor([0.0, 0.001, 0.5]), 4, 4e-3, 4.0)  # periods 4e-3 and 4
    assert emb.dtype == torch.float32
    close(emb[0], torch.tensor([0.0, 0.0, 1.0, 1.0]))
    close(emb[1], torch.tensor([1.0, math.sin(math.pi / 2000), 0.0, math.cos(math.pi / 2000)]))
    close(emb[2], torch.tensor([0.0, math.sin(math.pi / 4), 1.0, math.cos(math.pi / 4)]))


@FAMILIES
def test_all_trainable_parameters_get_gradients_and_the_others_are_never_read(family):
    model, observation, actions = case(family)
    noise = random_chunk(TINY, 2)
    with torch.no_grad():
        for parameter in model.unread_parameters():
            parameter.fill_(torch.nan)
    model.vlm.layers[-1].mlp.register_forward_hook(lambda *_: pytest.fail("computed and thrown away"))
    loss = model.compute_loss(observation, actions, noise=noise, time=TIME)
    loss.mean().backward()
    assert loss.isfinite().all() and model.sample_actions(observation, noise=noise).isfinite().all()
    unread = {id(parameter) for parameter in model.unread_parameters()}
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (id(parameter) not in unread), name
        assert (parameter.grad is not None and parameter.grad.any()) == parameter.requires_grad, name


@FAMILIES
def test_gradient_checkpointing_changes_no_gradient(family):
    gradients = []
    for enabled in (False, True):
        model, observation, actions = case(family)
        model.train()
        if enabled:
            model.set_gradient_checkpointing(True)
        computed = []
        layers = [*model.siglip.encoder["layers"], *model.vlm.layers, *model.expert.layers]
        for layer in layers:
            layer.register_forward_pre_hook(lambda module, *_, computed=computed: computed.append(module))
        model.compute_loss(observation, actions, noise=random_chunk(TINY, 2), time=TIME).mean().backward()
        assert [computed.count(layer) for layer in layers] == [2 if enabled else 1] * len(layers)
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for plain, recomputed in zip(*gradients, strict=True):
        close(plain, recomputed, 1e-6)


@FAMILIES
def test_a_model_trained_on_one_chunk_samples_that_chunk(family):
    config = CONFIGS[family]
    model, observation, chunk = Pi0(config, generator()), random_observation(config), random_chunk(config, 1)
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=3e-3)
    g = generator(7)
    for _ in range(250):
        loss = model.compute_loss(
            observation, chunk, noise=torch.randn(chunk.shape, generator=g), time=sample_time(2, generator=g)
        )
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
    sampled = model.sample_actions(observation, generator=g)
    assert (sampled - chunk).square().mean() < 0.4  # chance would be 2: two independent unit normals


def test_embeddings_kept_in_float32_work_in_a_bfloat16_model():
    model, observation, noise = case("pi0")
    model.to(torch.bfloat16).siglip.embeddings.float()
    assert model.embed_images(observation.images).dtype == torch.bfloat16
    assert model.sample_actions(observation, noise=noise).isfinite().all()


def test_initial_weights_repeat_with_their_generator_and_give_a_usable_start():
    config = CONFIGS["pi05"]
    model = Pi0(config, generator(3))
    for a, b in zip(model.parameters(), Pi0(config, generator(3)).parameters(), strict=True):
        assert torch.equal(a, b)
    prefix, _ = model.embed_prefix(random_observation(config))
    assert 0.5 < prefix.std() < 2.0
    _, gate = model.expert.layers[0].input_layernorm(torch.randn(2, 3, 32), torch.randn(2, 1, 32))
    assert not gate.any()  # each layer of the pi0.5 expert starts as the identity
    assert model.siglip.embeddings["position_embedding"].weight.std().item() == pytest.approx(0.35, rel=0.2)


def test_a_norm_of_almost_nothing_is_held_down_by_its_epsilon():
    norm = RMSNorm(4)  # 1e-3 / sqrt(1e-6 + 1e-6)
    close(norm(torch.full((1, 1, 4), 1e-3))[0], torch.full((1, 1, 4), 0.70711), 1e-4)


def test_preprocessing_scales_bytes_and_leaves_floats():
    images = np.array([0, 51, 255], np.uint8).repeat(4 * 3).reshape(1, 3, 2, 2, 3)
    rest = ([[True] * 3], [[1, 2]], [[True, False]], [[0.5] * 6])
    observation = preprocess_observation(images, *map(np.array, rest))
    assert observation.images.shape == (1, 3, 3, 2, 2)
    close(observation.images[0, :, 0, 0, 0], torch.tensor([-1.0, -0.6, 1.0]))
    assert observation.tokens.dtype == torch.int64 and observation.state.dtype == torch.float32
    assert observation.image_masks.dtype == torch.bool and observation.token_masks.tolist() == [[True, False]]
    again = preprocess_observation(observation.images.permute(0, 1, 3, 4, 2), *map(np.array, rest))
    assert torch.equal(again.images, observation.images)
    with pytest.raises(ValueError, match=r"\[batch, cameras, size, size, 3\], found \[1, 3, 3, 2, 2\]"):
        preprocess_observation(observation.images, *map(np.array, rest))
