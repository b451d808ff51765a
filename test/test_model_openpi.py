"""Float32 parity with openpi's own PyTorch code, on tensors that it computed (one camera masked, prompts padded)."""

import pytest
import torch
from model_cases import load_case

from pi0_ros.model.flow import interpolate
from pi0_ros.model.pi0 import denoising_times

FAMILIES = pytest.mark.parametrize("family", ["pi0", "pi05"])
TIMES = {"t1": 1.0, "t03": 0.3}


def close(found, expected, atol):
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)


@FAMILIES
def test_embeddings_and_prefix_layout(family):
    model, observation, _, expected = load_case(family)
    close(model.embed_images(observation.images[:, :1]), expected["image_embeds_cam0"], 1e-5)
    close(model.embed_language(observation.tokens), expected["lang_embeds"], 1e-5)
    prefix, valid = model.embed_prefix(observation)
    assert prefix.shape == (2, model.config.prefix_len, 64)
    assert torch.equal(valid, expected["prefix_mask"])
    assert torch.equal(valid.cumsum(dim=1) - 1, expected["prefix_positions"])


@FAMILIES
def test_keys_and_values_of_the_first_and_last_layer(family):
    model, observation, _, expected = load_case(family)
    prefix, valid = model.embed_prefix(observation)
    cache = model.prefix_kv(prefix, valid)
    for name, (k, v) in {"first": cache[0], "last": cache[-1]}.items():
        for kind, found in {"k": k, "v": v}.items():
            apart = (found - expected[f"prefix_{kind}_{name}"]).abs()
            assert apart.amax(dim=(1, 3))[valid].max() <= 2e-5, (kind, name)  # padding's rows are nobody's business


@FAMILIES
def test_suffix_embeddings(family):
    model, observation, _, expected = load_case(family)
    for name, t in TIMES.items():
        time = torch.full((2,), t)
        tokens, cond = model.embed_suffix(observation.state, expected[f"x_t_{name}"], time)
        close(model.embed_time(time)[:, 0], expected[f"time_emb_{name}"], 1e-6)
        close(tokens, expected[f"suffix_embeds_{name}"], 1e-5)
        if family == "pi05":
            close(cond[:, 0], expected[f"cond_{name}"], 1e-5)


@FAMILIES
def test_velocities(family):
    model, observation, inputs, expected = load_case(family)
    for name, t in TIMES.items():
        time = torch.full((2,), t)
        x_t, _ = interpolate(inputs["actions"], inputs["noise"], time)
        close(x_t, expected[f"x_t_{name}"], 1e-6)
        close(model.velocity(observation, x_t, time), expected[f"v_t_{name}"], 2e-5)


@FAMILIES
@pytest.mark.parametrize("num_steps", [10, 4])
def test_sampled_actions_and_their_times(family, num_steps):
    model, observation, inputs, expected = load_case(family)
    assert denoising_times(num_steps) == expected[f"sample_times_{num_steps}"].tolist()
    close(
        model.sample_actions(observation, num_steps, noise=inputs["noise"]),
        expected[f"sample_actions_{num_steps}"],
        2e-5,
    )


@FAMILIES
def test_loss_and_gradients(family):
    model, observation, inputs, expected = load_case(family)
    noise, time = inputs["noise"], inputs["time"]
    x_t, u_t = interpolate(inputs["actions"], noise, time)
    unreduced = (model.velocity(observation, x_t, time) - u_t).square()
    close(unreduced, expected["loss"], 1e-5 * expected["loss"].max().item())

    loss = model.compute_loss(observation, inputs["actions"], noise=noise, time=time)
    close(loss, expected["loss"].mean(dim=-1), 1e-5 * expected["loss"].max().item())
    loss.mean().backward()
    gradients = {key[5:]: value for key, value in expected.items() if key.startswith("grad.")}
    assert len(gradients) >= 11
    for key, gradient in gradients.items():
        close(model.get_parameter(key).grad, gradient, 1e-5)


@FAMILIES
def test_bfloat16_stays_within_its_rounding(family):
    """bfloat16 keeps 8 bits: a rounding is wrong by up to 2^-9 = 0.2 % of the value. From pixels to velocity a value
    meets about a hundred of them (every weight, norm, projection, attention and MLP of the five layers), and
    independent errors add up like a random walk: 10 * 0.2 % = 2 %. Attention's exponent may double that, so 4 % of the
    typical size. Seen here: 1 to 2.7 %, and 1.1 % for the actions, since x_t itself is summed in float32. Were the
    rotary angles or the time sinusoid rounded too, it would be 25 % and more."""
    model, observation, inputs, expected = load_case(family)
    model.to(torch.bfloat16)
    assert not list(model.buffers())  # nothing but parameters can be rounded

    def error(found, wanted):
        return ((found.float() - wanted).square().mean() / wanted.square().mean()).sqrt().item()

    prefix, valid = model.embed_prefix(observation)
    assert prefix.dtype == torch.bfloat16
    assert error(model.embed_images(observation.images[:, :1]), expected["image_embeds_cam0"]) <= 0.04
    for name, (k, v) in {"first": (cache := model.prefix_kv(prefix, valid))[0], "last": cache[-1]}.items():
        assert error(k.transpose(1, 2)[valid], expected[f"prefix_k_{name}"].transpose(1, 2)[valid]) <= 0.04
        assert error(v.transpose(1, 2)[valid], expected[f"prefix_v_{name}"].transpose(1, 2)[valid]) <= 0.04
    for name, t in TIMES.items():
        time = torch.full((2,), t)
        close(model.embed_time(time)[:, 0], expected[f"time_emb_{name}"], 1e-6)
        velocity = model.velocity(observation, expected[f"x_t_{name}"], time)
        assert velocity.dtype == torch.float32 and error(velocity, expected[f"v_t_{name}"]) <= 0.04
    sampled = model.sample_actions(observation, noise=inputs["noise"])
    assert sampled.dtype == torch.float32 and error(sampled, expected["sample_actions_10"]) <= 0.02
