"""The expert's layers as one kernel: on a Hopper GPU as it is (see test_gpu_kernels), here with threads as fibers."""

from __future__ import annotations

import ctypes
import shutil
import struct
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sampler_kit import draw_inputs, make_model

from pi0_ros.model.config import GemmaConfig, Pi0Config, VisionConfig
from pi0_ros.policy.gpu.layers import LEAST, MOST, SOURCES, ExpertLayers, Kernel, constants, machine_code
from pi0_ros.policy.sampler import Sampler

EXPERT = GemmaConfig(width=1024, depth=2, mlp_dim=4096, num_heads=8, num_kv_heads=1, head_dim=256)  # gemma_300m's sizes
CONFIG = Pi0Config(
    vision=VisionConfig(width=32, depth=1, mlp_dim=48, num_heads=2, patch_size=14, image_size=28),
    vlm=replace(EXPERT, width=64, mlp_dim=64),
    expert=EXPERT,
    vocab_size=50,
    action_dim=7,
    action_horizon=50,
    max_token_len=120,
    cameras=("base_0_rgb",),
)
TOKENS = np.array([2, 7, 9, 41, 3, 11, 5, 23, 48, 17, 8, 30, 44, 6, 19])
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """Makes launchers of `layers.cu` on this CPU, for pi0 and for pi0.5."""
    compiler = shutil.which("g++")
    if not compiler:
        pytest.skip("needs g++")
    folder = tmp_path_factory.mktemp("layers")
    (folder / "layers.cpp").write_text(f"""
#include "{HERE}/hopper_on_cpu.h"
#include "{SOURCES}/layers.cu"
extern "C" void launch(const void* bytes, size_t size, u32 seed) {{
    static Params p;
    if (size != sizeof p) fail("Params are of another size here than there");
    std::memcpy(&p, bytes, size);
    Grid<Params>::run(layers, p, CLUSTERS * RANKS, RANKS, THREADS, sizeof(Shared), seed);
}}
""")

    def make(adaptive: bool, clusters: int, seed: int) -> Kernel:
        library = folder / f"layers_{int(adaptive)}_{clusters}.so"
        if not library.exists():
            options = ["-std=c++17", "-O2", "-shared", "-fPIC", "-Wno-unknown-pragmas", f"-I{SOURCES}"]
            macros = [f"-D{name}={value}" for name, value in constants(clusters, adaptive).items()]
            subprocess.run([compiler, *options, *macros, "layers.cpp", "-o", library.name], cwd=folder, check=True)
        launch = ctypes.CDLL(str(library)).launch
        return Kernel(clusters, lambda params: launch(params, ctypes.c_size_t(len(params)), seed), tensor_map)

    return make


def tensor_map(tensor, rows: int) -> bytes:
    """What `hopper_on_cpu.h` takes for a CUtensorMap."""
    layers, height, width = tensor.shape
    strides = tensor.stride(2), tensor.stride(1), tensor.stride(0)
    return struct.pack("Q6i3q72x", tensor.data_ptr(), width, height, layers, 64, rows, 1, *strides)


def make_layers(sampler: Sampler, kernel: Kernel) -> ExpertLayers:
    steps = pytest.importorskip("pi0_ros.policy.gpu.steps", reason="needs triton, which requirements/dev.txt has")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps.layers, "kernel_for", lambda *_: kernel)
        layers = steps.DenoisingSteps(
            sampler.config, sampler.weights, sampler.time_bias, sampler.modulation, sampler.num_steps,
            x=sampler.x, free=sampler.free, keys=sampler.keys, values=sampler.values, rope=sampler.suffix_rope,
            seen=sampler.valid, early=False,
        ).layers  # fmt: skip
    for name in ("tokens", "scaled", "squares", "q", "mixed", "gated"):
        layers.buffers[name].fill_(float("nan"))  # what is not written before it is read shows
    return layers


def put(layers: ExpertLayers, sampler: Sampler, x: torch.Tensor, k: int, frozen: bool, lead: int) -> None:
    """Embedded tokens, as the kernel before leaves them."""
    buffers = layers.buffers
    buffers["tokens"][lead:] = x
    y = x.float()
    buffers["squares"][:32, lead : lead + len(x)] = y.view(len(x), 32, 32).square().sum(-1).T
    if sampler.modulation is not None:
        scale = sampler._at_time(sampler.modulation[:, 0], k, frozen)[0].float()
        buffers["scaled"][lead:] = (y * scale).to(torch.bfloat16)


@pytest.mark.parametrize(
    ("pi05", "horizon", "keys", "clusters"),
    [(False, 50, 650, 30), (True, 9, 120, 26)],
    ids=["pi0, keys in two passes", "pi05, few actions and keys, fewest clusters"],
)
def test_a_step_is_that_of_the_plain_sampler(pi05, horizon, keys, clusters, emulated, monkeypatch):
    expert = replace(EXPERT, depth=1 if pi05 else 2)
    config = replace(
        CONFIG,
        pi05=pi05,
        action_horizon=horizon,
        max_token_len=keys,
        expert=expert,
        vlm=replace(CONFIG.vlm, depth=expert.depth),
    )
    monkeypatch.setattr("pi0_ros.policy.fused.has_onednn", lambda dtype: False)
    sampler = Sampler(make_model(config), num_steps=2, dtype=torch.bfloat16)
    sampler.prompt_multiple = config.max_token_len  # padding that nothing may see
    images, state, noise = draw_inputs(config)
    frozen = torch.full((2, config.action_dim), 0.25) if pi05 else None
    tokens = np.resize(TOKENS, keys - 50)
    sampler.sample(images, tokens, state, noise, frozen=frozen)  # leaves the prefix, and pi0's state, in the cache
    rows, lead = sampler.prefix_rows, 0 if pi05 else 1
    sampler._load_inputs(noise, state, frozen)

    layers = make_layers(sampler, emulated(pi05, clusters, seed=horizon))
    when = torch.where(sampler.free[:, 0] > 0, torch.tensor(0), 2).to(torch.int32)
    embedded = sampler.embed_actions(sampler.x, 0, pi05)
    want = sampler.velocity(sampler.x, 0, pi05)
    cached = sampler.keys.clone(), sampler.values.clone()
    put(layers, sampler, embedded, 0, pi05, lead)
    if not pi05:
        token = F.linear(sampler.state, *sampler.weights.state).to(torch.bfloat16)
        layers.buffers["tokens"][:1] = token
        layers.buffers["squares"][:32, 0] = token.float().view(32, 32).square().sum(-1)
    sampler.keys[:, :, rows:] = sampler.values[:, :, rows:] = float("nan")
    layers.run(when, 0, config.suffix_len, rows, with_state=not pi05)

    def velocity() -> torch.Tensor:
        norm, _ = sampler.norm(layers.buffers["tokens"][lead:], 0, -1, pi05)
        return F.linear(norm.float(), *sampler.weights.action_out)

    def close(got: torch.Tensor, want: torch.Tensor) -> bool:
        """Whether each row is, by what bfloat16 rounds away."""
        error, size = ((x.float() ** 2).mean(-1).sqrt() for x in (got - want, want))
        return bool((error <= 0.03 * size).all())

    got = velocity()
    assert close(got, want)
    assert all(close(mine, theirs) for mine, theirs in zip((sampler.keys, sampler.values), cached, strict=True))
    assert layers._counter.tolist() == [0, 0]
    if not pi05:  # the steps that follow leave the state token as it is
        put(layers, sampler, embedded, 0, pi05, lead)
        sampler.keys[:, :, rows + 1 :] = sampler.values[:, :, rows + 1 :] = float("nan")
        layers.run(when, 1, config.action_horizon, rows, with_state=False)
        assert torch.equal(velocity(), got)


@pytest.fixture
def compiler():
    pytest.importorskip("cuda.bindings.nvrtc", reason="comes with torch for CUDA, and with requirements/dev.txt")


@pytest.mark.parametrize("clusters", range(LEAST, MOST + 1))
def test_the_kernel_compiles_without_a_word_for_every_number_of_clusters(clusters, compiler, caplog):
    source = (SOURCES / "layers.cu").read_bytes()
    assert machine_code(source, constants(clusters, adaptive=clusters % 2 == 0))[:4] == b"\x7fELF"
    assert not caplog.records
    assert chr(32).encode()[0] == 32  # what the compiler says was not written into Python's only space


def test_what_the_compiler_says_is_told(compiler):
    with pytest.raises(RuntimeError, match='layers.cu does not compile: .*identifier "nothing" is undefined'):
        machine_code(b"__global__ void layers() { nothing(); }", {})


@pytest.mark.gpu
@pytest.mark.parametrize("pi05", [False, True], ids=["pi0", "pi05"])
def test_on_hopper_chunks_are_those_of_the_cpu_and_keep_their_bits(pi05):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("this GPU is not of the Hopper kind")
    config = replace(CONFIG, pi05=pi05, max_token_len=600)
    model = make_model(config)
    exact, sampler = Sampler(model, num_steps=3), Sampler(model, num_steps=3, dtype=torch.bfloat16, device="cuda")
    assert sampler.steps.layers is not None
    for seed in range(3):
        images, state, noise = draw_inputs(config, seed)
        frozen = torch.full((2, config.action_dim), 0.25) if seed == 1 else None
        tokens = np.resize(TOKENS, 5 + 250 * seed)
        want = exact.sample(images, tokens, state, noise, frozen=frozen).actions
        got = [sampler.sample(images, tokens, state, noise, frozen=frozen).actions for _ in range(20)]
        assert (got[0] - want).square().mean() < (0.03 * want.square().mean().sqrt()) ** 2
        assert all(torch.equal(one, got[0]) for one in got)
