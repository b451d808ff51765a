"""The GPU's kernels give the plain sampler's numbers: on a GPU as they are, elsewhere in Triton's interpreter."""

from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sampler_kit import draw_inputs, make_model

from pi0_ros.model.config import GemmaConfig, Pi0Config, VisionConfig
from pi0_ros.model.pi0 import Pi0
from pi0_ros.policy import gpu
from pi0_ros.policy.guided import Guidance
from pi0_ros.policy.sampler import Sampler

pytest.importorskip("triton", reason="Triton comes with torch for CUDA, and with requirements/dev.txt on Linux")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

TINY = Pi0Config(
    vision=VisionConfig(width=32, depth=1, mlp_dim=48, num_heads=2, patch_size=14, image_size=28),
    vlm=GemmaConfig(width=48, depth=2, mlp_dim=80, num_heads=4, num_kv_heads=1, head_dim=16),
    expert=GemmaConfig(width=48, depth=2, mlp_dim=80, num_heads=4, num_kv_heads=1, head_dim=16),
    vocab_size=50,
    action_dim=5,
    action_horizon=6,
    max_token_len=12,
    cameras=("base_0_rgb", "left_wrist_0_rgb"),
)
FAMILIES = {
    "pi0": TINY,
    "pi05": replace(TINY, pi05=True),
    "two kv heads": replace(TINY, vlm=replace(TINY.vlm, num_kv_heads=2), expert=replace(TINY.expert, num_kv_heads=2)),
    "more actions than a tile's rows": replace(
        TINY, action_horizon=65, vlm=replace(TINY.vlm, depth=1), expert=replace(TINY.expert, depth=1)
    ),
    "keys in several splits": replace(TINY, max_token_len=60),
}
TOKENS = np.array([2, 7, 9, 41, 3])
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def kernels(monkeypatch):
    """Makes samplers with kernels where the device is none that they would be used on."""

    def make(model: Pi0, *, proven: bool = True, **options) -> Sampler:
        monkeypatch.setattr("pi0_ros.policy.fused.has_onednn", lambda dtype: False)
        monkeypatch.setattr(gpu, "usable", lambda *_: True)
        if proven:  # the interpreter takes its time
            monkeypatch.setattr("pi0_ros.policy.gpu.proof.fault", lambda sampler: "")
        sampler = Sampler(model, **{"num_steps": 2, **options}, device=DEVICE, graphs=False)
        monkeypatch.undo()
        assert not proven or sampler.steps is not None
        return sampler

    return make


@pytest.mark.parametrize("family", FAMILIES)
def test_chunks_are_those_of_the_plain_sampler(family, kernels):
    config = FAMILIES[family]
    model = make_model(config)
    large = config.action_horizon > 64 or config.max_token_len > 12  # the interpreter takes its time
    steps = {"num_steps": 1 if large else 2}
    plain, fast = Sampler(model, **steps), kernels(model, **steps)
    plain.prompt_multiple = fast.prompt_multiple = config.max_token_len - 2  # padding that nothing may see
    for seed, frozen in ((0, None), (1, torch.full((2, config.action_dim), 0.25)))[large:]:
        images, state, noise = draw_inputs(config, seed)
        frames = {"base_0_rgb": seed, "left_wrist_0_rgb": 0}
        images["left_wrist_0_rgb"] = draw_inputs(config)[0]["left_wrist_0_rgb"]
        want = plain.sample(images, TOKENS, state, noise, frames=frames, frozen=frozen)
        got = fast.sample(images, TOKENS, state, noise, frames=frames, frozen=frozen)
        assert got.cameras_encoded == want.cameras_encoded == (2 if large else 2 - seed)
        assert (got.actions - want.actions).abs().max() < 2e-5
    assert torch.equal(got.actions[:2], frozen)
    again = fast.sample(images, TOKENS, state, noise, frames=frames, frozen=frozen)
    assert again.prefix_reused and torch.equal(again.actions, got.actions)  # the same bits


def test_a_reused_prefix_and_one_camera_of_two_count(kernels):
    model = make_model(TINY)
    camera = {"cameras": ("left_wrist_0_rgb",)}
    plain, fast = Sampler(model, num_steps=2, **camera), kernels(model, **camera)
    images, state, noise = draw_inputs(TINY)
    frames = {"left_wrist_0_rgb": 1}
    for sign in (1, -1):
        want = plain.sample(images, TOKENS, sign * state, noise, frames=frames)
        got = fast.sample(images, TOKENS, sign * state, noise, frames=frames)
        assert got.prefix_reused == (sign == -1)
        assert (got.actions - want.actions).abs().max() < 2e-5


def test_guidance_goes_over_the_same_cache(kernels):
    model = make_model(TINY)
    images, state, noise = draw_inputs(TINY)
    guidance = Guidance(torch.ones(6, 5), torch.linspace(1, 0, 6))
    want = Sampler(model, num_steps=2).sample(images, TOKENS, state, noise, guidance=guidance).actions
    got = kernels(model).sample(images, TOKENS, state, noise, guidance=guidance).actions
    assert (got - want).abs().max() < 1e-4


def test_rows_in_float8_are_within_its_rounding():
    from pi0_ros.policy.gpu.prefix_kernels import add_norm, gated

    x, branch = (torch.randn(3, 48, generator=torch.Generator().manual_seed(i)).to(DEVICE) for i in range(2))
    summed, rows = add_norm(x, branch, 1e-6, float8=True)
    want = F.rms_norm(x + branch, (48,), eps=1e-6)
    assert torch.equal(summed, x + branch)
    assert rows.values.dtype == torch.float8_e4m3fn
    assert rows.values.float().abs().amax(1).min() > 400  # of 448: the whole range is used
    torch.testing.assert_close(rows.scale, want.abs().amax(1, keepdim=True) / 448)
    rounding = 2**-4 if DEVICE == "cuda" else 0.51  # three bits of mantissa; the interpreter loses a carry now and then
    assert ((rows.values.float() * rows.scale - want).abs() <= rounding * want.abs() + 1e-3).all()
    both = torch.cat([x, branch], dim=1)
    want = F.gelu(x, approximate="tanh") * branch
    rows = gated(both, float8=True)
    assert ((rows.values.float() * rows.scale - want).abs() <= rounding * want.abs() + 1e-3 * want.abs().max()).all()


def test_a_float8_product_is_that_of_what_it_was_given():
    from pi0_ros.policy.fused import Linear
    from pi0_ros.policy.gpu.prefix import Float8Linear
    from pi0_ros.policy.gpu.prefix_kernels import Quantised

    if DEVICE == "cuda" and not gpu.has_float8(torch.device("cuda")):
        pytest.skip("this GPU has no float8")
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(32, 48, generator=generator).to(DEVICE)
    weight[5] *= 100  # each row has a scale of its own
    values = torch.randint(-8, 9, (16, 48), generator=generator).float().to(DEVICE)
    linear = Linear(weight, None, torch.float32, 16)
    got = Float8Linear(linear)(Quantised(values.to(torch.float8_e4m3fn), torch.full((16, 1), 0.5).to(DEVICE)))
    want = 0.5 * values @ weight.T
    assert got.dtype == torch.bfloat16
    assert ((got.float() - want).norm(dim=0) < 0.06 * want.norm(dim=0)).all()


def test_float8_where_it_cannot_be_is_refused():
    with pytest.raises(ValueError, match="float8 is for GPUs that have it, .* this is cpu"):
        Sampler(make_model(TINY), dtype=torch.float8_e4m3fn)


@pytest.mark.parametrize("config", [TINY, replace(TINY, pi05=True)], ids=["pi0", "pi05"])
def test_kernels_that_give_torchs_numbers_are_kept(config, kernels, caplog):
    sampler = kernels(make_model(config), proven=False, num_steps=1)
    assert sampler.steps is not None and sampler.prefix_pass is not None and not caplog.records


def _nothing_moves(*_):
    pass


def _not_finite(steps, k, *_):
    steps.x.fill_(torch.nan)


def _no_compiler(*_):
    raise RuntimeError("Failed to find C compiler.\nPlease specify it")


@pytest.mark.parametrize(
    ("broken", "step", "reason"),
    [
        ("pi0_ros.policy.gpu.steps.DenoisingSteps.step", _nothing_moves, r"differ from torch's by \d"),
        ("pi0_ros.policy.gpu.steps.DenoisingSteps.step", _not_finite, "differ from torch's by nan"),
        (
            "pi0_ros.policy.gpu.steps.DenoisingSteps.step",
            _no_compiler,
            "RuntimeError: Failed to find C compiler. .the",
        ),
        ("pi0_ros.policy.gpu.prefix.PrefixPass.run", _nothing_moves, r"differ from torch's by \d"),
    ],
    ids=["wrong steps", "steps that are not finite", "no compiler", "wrong prefix"],
)
def test_kernels_that_fail_on_this_device_are_left_for_torchs_operators(broken, step, reason, kernels, caplog):
    model = make_model(TINY)
    images, state, noise = draw_inputs(TINY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(broken, step)
        sampler = kernels(model, proven=False)
    assert sampler.steps is None and sampler.prefix_pass is None
    assert re.search(f"kernels are not used, .*{reason}", caplog.text)
    want = Sampler(model, num_steps=2).sample(images, TOKENS, state, noise).actions
    assert (sampler.sample(images, TOKENS, state, noise).actions - want).abs().max() < 2e-5


def test_a_kernel_for_whole_steps_that_fails_is_left_for_one_for_each_part(kernels, caplog):
    model = make_model(TINY)
    images, state, noise = draw_inputs(TINY)
    tiles = SimpleNamespace(clusters=3)  # what the last kernel of a step asks for
    with pytest.MonkeyPatch.context() as patch:
        whole = SimpleNamespace(kernel=tiles, run=lambda *_, **__: None)
        patch.setattr("pi0_ros.policy.gpu.steps.DenoisingSteps._all_layers", lambda *_: whole)
        sampler = kernels(model, proven=False)
    assert sampler.steps.layers is None and sampler.prefix_pass is not None
    assert re.search(r"whole denoising steps is not used, .*differ from torch's by \d", caplog.text)
    want = Sampler(model, num_steps=2).sample(images, TOKENS, state, noise).actions
    assert (sampler.sample(images, TOKENS, state, noise).actions - want).abs().max() < 2e-5


def test_a_fault_that_takes_the_gpu_along_is_an_error_not_a_slower_policy(kernels):
    whole = SimpleNamespace(kernel=None, run=_no_compiler)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pi0_ros.policy.gpu.proof.gpu_fault", lambda: "CUDA error: unspecified launch failure")
        patch.setattr("pi0_ros.policy.gpu.steps.DenoisingSteps._all_layers", lambda *_: whole)
        with pytest.raises(
            RuntimeError, match="process: CUDA error: unspecified launch failure; PI0_ROS_WHOLE_STEPS=0"
        ):
            kernels(make_model(TINY), proven=False)


def test_a_kernel_for_whole_steps_that_cannot_be_made_is_left_too(kernels, caplog):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pi0_ros.policy.gpu.layers.kernel_for", _no_compiler)
        sampler = kernels(make_model(TINY))
    assert sampler.steps.layers is None
    assert "whole denoising steps is not used, others are: Failed to find C compiler." in caplog.text


def test_float8_whose_kernels_fail_is_refused(kernels, monkeypatch):
    monkeypatch.setattr("pi0_ros.policy.gpu.has_float8", lambda device: True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pi0_ros.policy.gpu.steps.DenoisingSteps.step", _no_compiler)
        with pytest.raises(ValueError, match="float8 cannot be, its kernels fail here: RuntimeError: Failed to find"):
            kernels(make_model(TINY), proven=False, dtype=torch.float8_e4m3fn)


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["pi0", "pi05"])
def test_graphs_of_the_kernels_give_the_cpus_numbers_in_bfloat16(family):
    config = FAMILIES[family]
    model = make_model(config)
    exact = Sampler(model, num_steps=2)
    sampler = Sampler(model, num_steps=2, dtype=torch.bfloat16, device="cuda")
    assert sampler.steps is not None
    sampler.capture(frozen=True)
    captured = set(sampler.graphs._graphs)
    frames = dict.fromkeys(config.cameras, 0)
    for seed in range(4):
        images, state, noise = draw_inputs(config, seed)
        frames = dict.fromkeys(config.cameras, seed)
        frozen = torch.full((2, config.action_dim), 0.25) if seed % 2 else None
        tokens = TOKENS[: 2 + seed]
        want = exact.sample(images, tokens, state, noise, frames=frames, frozen=frozen).actions
        got = sampler.sample(images, tokens, state, noise, frames=frames, frozen=frozen).actions
        assert (got - want).abs().max() < 0.05 * want.abs().max()
        again = sampler.sample(images, tokens, state, noise, frames=frames, frozen=frozen)
        assert again.prefix_reused and torch.equal(again.actions, got)
    assert set(sampler.graphs._graphs) == captured  # nothing was captured in a tick


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cuda" and not gpu.has_float8(torch.device("cuda")), reason="no float8")
def test_float8_is_near_bfloat16():
    config = FAMILIES["pi0"]
    model = make_model(config)
    images, state, noise = draw_inputs(config)
    want = Sampler(model, num_steps=2).sample(images, TOKENS, state, noise).actions
    got = Sampler(model, num_steps=2, dtype=torch.float8_e4m3fn, device="cuda").sample(images, TOKENS, state, noise)
    assert 0 < (got.actions - want).abs().max() < 0.15 * want.abs().max()
