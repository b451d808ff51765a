"""The benchmark: its counts are true, its comparisons notice disagreement, and it measures what it says."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from model_cases import TINY
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from pi0_ros.benchmark import cli, counting, machine, peers
from pi0_ros.benchmark.inputs import CONFIGS, build_model, draw_noise, draw_observation
from pi0_ros.benchmark.machine import Rates, measure_rates
from pi0_ros.benchmark.sampling import Feed, measure_sampler, tensor_bytes
from pi0_ros.benchmark.timing import LEAST_RUNS, interleave, percentiles, ratio
from pi0_ros.benchmark.training import measure_training
from pi0_ros.model.config import GemmaConfig, Pi0Config, VisionConfig
from pi0_ros.policy import processor
from pi0_ros.policy.sampler import Sampler

CPU = torch.device("cpu")
TINY05 = dataclasses.replace(TINY, pi05=True)
TWO_KV = dataclasses.replace(
    TINY, **{name: dataclasses.replace(getattr(TINY, name), num_kv_heads=2) for name in ("vlm", "expert")}
)


def counted(function) -> int:
    """FLOPs by torch's own counter, told of the operators that it does not know."""

    def product(x, *_, out_shape, **__):
        return 2 * math.prod(out_shape) * x[-1]

    def attention(q, k, v, *_, **__):
        return sdpa_flop_count(q, k, v)

    known = {
        torch.ops.mkldnn._linear_pointwise: product,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention,
    }
    with FlopCounterMode(display=False, custom_mapping=known) as counter, torch.no_grad():
        function()
    return counter.get_total_flops()


def test_flops_and_bytes_of_one_layer_are_those_counted_by_hand():
    config = Pi0Config(
        vision=VisionConfig(width=4, depth=1, mlp_dim=8, num_heads=1, patch_size=2, image_size=4),  # 4 tokens
        vlm=GemmaConfig(width=6, depth=1, mlp_dim=10, num_heads=2, num_kv_heads=1, head_dim=4),
        expert=GemmaConfig(width=4, depth=1, mlp_dim=6, num_heads=2, num_kv_heads=1, head_dim=4),
        action_dim=3,
        action_horizon=2,
    )
    vision = counting.vision_work(config, cameras=1, itemsize=2)
    # patch 12x4, qkv 4x12, out 4x4, fc1 4x8, fc2 8x4, head 4x6 on 4 rows; scores and values 4x4x4 each
    assert vision.flops == 2 * 4 * (48 + 48 + 16 + 32 + 32 + 24) + 2 * 2 * 4 * 4 * 4
    assert vision.weights == 4 * (48 + 16) + 2 * (48 + 16 + 32 + 32 + 12 + 4 + 8 + 4 + 24 + 6)
    assert vision.data == 4 * 12 + 2 * 4 * 6

    prefix = counting.prefix_work(config, rows=5, itemsize=2)  # the only layer is the last: keys and values, 6x8
    assert (prefix.flops, prefix.weights, prefix.data) == (2 * 5 * 48, 2 * 48, 2 * 5 * (6 + 8))

    step = counting.step_work(config, prefix=5, itemsize=2)  # 2 rows look at 5 + 1 + 2 keys
    layer = 4 * 16 + 8 * 4 + 3 * 4 * 6  # qkv, out, gate and up and down
    assert step.flops == 2 * 2 * (3 * 4 + 4 * 4 + layer + 4 * 3) + 2 * 2 * 2 * 8 * 8
    assert step.weights == 4 * (12 + 4 + 16 + 4 + 12 + 3) + 2 * layer
    assert step.data == 2 * 8 * (8 + 2) + 4 * 2 * 2 * 3

    state = counting.state_work(config, prefix=5, itemsize=2)
    assert (state.flops, state.weights, state.data) == (2 * (12 + 64), 4 * 16 + 2 * 64, 2 * 8)


@pytest.mark.parametrize("config", [TINY, TINY05, TWO_KV], ids=["pi0", "pi05", "two kv heads"])
@pytest.mark.parametrize("new", [3, 1, 0])
def test_flops_of_a_chunk_are_those_that_torch_counts(config, new):
    feed = Feed(Sampler(build_model(config, CPU), num_steps=4), prompt=7)
    feed.chunk(3)
    work = counting.sampling_work(config, cameras=3, encoded=new, prompt=7, steps=4, itemsize=4)
    assert counted(lambda: feed.chunk(new)) == work["total"].flops
    assert counted(feed.step) == work["one step"].flops


@pytest.mark.parametrize("config", [TINY, TINY05], ids=["pi0", "pi05"])
def test_flops_of_a_training_step_are_three_times_the_forward_pass_that_torch_counts(config):
    model = build_model(config, CPU).train()
    observation, _ = draw_observation(config, batch=2, prompt=config.max_token_len)
    noise = draw_noise(config, batch=2)
    forward = counted(lambda: model.compute_loss(observation, noise, noise=noise, time=torch.rand(2)))
    whole = counting.training_flops(config, batch=2, cameras=3, prompt=config.max_token_len)
    assert whole == 3 * forward


def test_bytes_of_weights_are_those_of_the_samplers_tensors(monkeypatch):
    monkeypatch.setattr("pi0_ros.policy.fused.has_onednn", lambda dtype: False)  # whose packed copies stand beside
    weights = Sampler(build_model(TINY, CPU), dtype=torch.bfloat16).weights
    vision = counting.vision_work(TINY, cameras=1, itemsize=2).weights
    prefix = counting.prefix_work(TINY, rows=1, itemsize=2).weights
    step = counting.step_work(TINY, prefix=1, itemsize=2).weights
    assert vision == tensor_bytes([weights.vision])
    assert prefix == tensor_bytes(weights.vlm)
    small = tensor_bytes([weights.action_in, weights.action_mlp_out, weights.action_out])
    assert step == tensor_bytes(weights.expert) + small + 4 * TINY.expert.width  # and one row of the time table


def test_functions_are_called_in_turn_and_the_first_round_does_not_count():
    calls = []
    taken = interleave({name: lambda name=name: calls.append(name) for name in "ab"}, 4, CPU, "")
    assert calls == list("ab" * 5)
    assert {name: len(values) for name, values in taken.items()} == {"a": 4, "b": 4}


def test_a_budget_of_time_that_is_over_leaves_the_least_number_of_rounds():
    taken = interleave({"a": lambda: None}, 1000, CPU, "", seconds=0.0)
    assert len(taken["a"]) == LEAST_RUNS


def test_a_ratio_is_the_median_of_the_pairs_with_its_spread():
    found = ratio(np.array([1.0, 2.0, 9.0]), np.array([2.0, 2.0, 3.0]))
    assert (found.ratio, found.low, found.high) == (1.0, 0.5, 3.0)
    assert (found.ours, found.theirs) == (2.0, 2.0)


def test_percentiles_are_in_milliseconds():
    assert percentiles(np.linspace(0.0, 0.1, 101)) == {"p50_ms": 50.0, "p95_ms": 95.0}


def test_float32_outputs_may_differ_by_a_ten_thousandth():
    x = torch.ones(2, 2)
    assert peers.disagreement(x + 9e-5, x, x, torch.float32)[1] == ""
    assert "differ by 2.0" in peers.disagreement(x + 2e-4, x, x, torch.float32)[1]
    assert "differ by nan" in peers.disagreement(x * torch.nan, x, x, torch.float32)[1]


def test_bfloat16_outputs_may_be_as_far_from_float32_as_rounding_explains():
    reference = torch.ones(2, 2)
    theirs = reference + 0.02
    assert peers.disagreement(reference - 0.03, theirs, reference, torch.bfloat16)[1] == ""
    assert (
        "differ from the float32 result" in peers.disagreement(reference - 0.05, theirs, reference, torch.bfloat16)[1]
    )
    # a peer that is itself far off explains nothing
    assert peers.disagreement(reference + 0.5, reference + 0.5, reference, torch.bfloat16)[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_and_the_sampler_agree_in_every_mode(dtype):
    pytest.importorskip("transformers")
    rows = peers.compare_sampling("tiny", dtype, CPU, config=TINY, steps=3, prompt=7, runs=3)
    assert [row["mode"] for row in rows] == ["chunk", "step", "prefix reused", "one camera new"]
    assert peers.faults(rows) == []
    for row in rows:
        assert row["dtype"] == str(dtype).removeprefix("torch.") and row["runs"] == 3
        assert row["ratio_min"] <= row["ratio"] <= row["ratio_max"] and row["ours_ms"] > 0 and row["peer_ms"] > 0
        assert row["max_abs_diff"] <= 2 * row["allowed"]


def test_transformers_and_the_model_agree_on_loss_and_gradients():
    pytest.importorskip("transformers")
    (row,) = peers.compare_training("tiny", CPU, config=TINY, prompt=7, runs=3)
    assert row["mode"] == "training step" and row["fault"] == "" and 0 < row["max_abs_diff"] <= 1e-4


def test_a_peer_that_disagrees_ends_with_exit_code_1_and_the_modes_named(monkeypatch, capsys):
    pytest.importorskip("transformers")
    made = peers.to_transformers

    def other(model):
        peer = made(model)
        with torch.no_grad():
            peer.action_out_proj.bias.add_(2e-3)
        return peer

    monkeypatch.setattr(peers, "to_transformers", other)
    monkeypatch.setitem(CONFIGS, "nano", TINY)
    assert cli.main(["peers", "--preset", "nano", "--runs", "3", "--prompt", "7", "--device", "cpu"]) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert [line.split(":")[1] for line in lines] == [
        f" nano float32, {mode}" for mode in ("chunk", "step", "prefix reused", "one camera new")
    ]


def test_float32_is_not_rounded_to_tf32_on_either_side(monkeypatch):
    pytest.importorskip("transformers")
    for compare in (
        lambda: peers.compare_sampling("tiny", torch.float32, CPU, config=TINY, steps=1, prompt=7, runs=1),
        lambda: peers.compare_training("tiny", CPU, config=TINY, prompt=7, runs=1),
    ):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
        compare()
        assert not torch.backends.cudnn.allow_tf32


def test_a_sampler_that_overlooks_a_new_frame_is_found_out(monkeypatch):
    pytest.importorskip("transformers")

    class Overlooking(Feed):
        def chunk(self, new):
            return super().chunk(0 if new == 1 else new)

    monkeypatch.setattr(peers, "Feed", Overlooking)
    wrong = peers.faults(peers.compare_sampling("tiny", torch.float32, CPU, config=TINY, prompt=7, runs=3))
    assert [line.partition(":")[0] for line in wrong] == ["tiny float32, one camera new"]


def test_the_sampler_is_measured_stage_by_stage():
    result = measure_sampler(
        TINY, torch.float32, CPU, cameras=2, prompt=7, steps=2, runs=3, rates=Rates(1e9, 1e9), name="tiny"
    )
    assert [(row["case"], row["stage"]) for row in result["stages"]] == [
        *(("everything new", stage) for stage in ("vision", "prefix", "denoise", "total")),
        *(("one camera new", stage) for stage in ("vision", "prefix", "denoise", "total")),
        *(("prefix reused", stage) for stage in ("denoise", "total")),
        ("one step", "denoise"),
    ]
    whole = result["stages"][3]
    work = counting.sampling_work(TINY, cameras=2, encoded=2, prompt=7, steps=2, itemsize=4)["total"]
    assert whole["gflop"] == round(work.flops / 1e9, 3) and whole["mb"] == round(work.bytes / 1e6, 2)
    assert whole["rate_share"] == pytest.approx(work.flops / (whole["p50_ms"] * 1e-3) / 1e9, rel=0.02, abs=1e-3)
    assert result["memory"]["peak_rss_mb"] > result["memory"]["weights_mb"] > 0


def test_a_training_step_is_measured_in_its_parts():
    result = measure_training(TINY, torch.float32, CPU, prompt=7, runs=3, rates=Rates(1e9, 1e9))
    assert [row["part"] for row in result["parts"]] == ["loss and gradients", "clip and update", "whole step"]
    assert result["samples_per_s"] > 0 and result["augment_images_per_s"] > 0 and result["rate_share"] > 0


def test_rates_of_the_device_are_measured():
    rates = measure_rates(CPU, torch.float32, size=64, runs=2)
    assert 1e6 < rates.flops < 1e16 and 1e6 < rates.bandwidth < 1e14


@pytest.mark.parametrize(
    ("flags", "found"), [("avx2 avx512f avx512_bf16", True), ("avx2 avx512f", False), ("amx_bf16", True)]
)
def test_bfloat16_is_for_processors_that_have_it(flags, found, tmp_path, monkeypatch):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"model name\t: A Processor\nflags\t\t: {flags}\n")
    monkeypatch.setattr("pi0_ros.model.linear.Path", lambda _: cpuinfo)
    assert processor.has_bfloat16(CPU) is found
    assert machine.processor() == "A Processor"


@pytest.mark.parametrize(("vendor", "found"), [("GenuineIntel", True), ("AuthenticAMD", False)])
def test_intels_processors_are_known_by_their_vendor(vendor, found, tmp_path, monkeypatch):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\nvendor_id\t: {vendor}\n")
    monkeypatch.setattr("pi0_ros.model.linear.Path", lambda _: cpuinfo)
    assert processor.is_intel.__wrapped__() is found


def test_the_command_writes_what_it_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(CONFIGS, "nano", TINY)
    monkeypatch.setattr("pi0_ros.benchmark.sampling.measure_rates", lambda *_: Rates(1e9, 1e9))
    arguments = ["--runs", "3", "--prompt", "5", "--cameras", "1", "--horizon", "4", "--device", "cpu"]
    assert cli.main(["sampler", *arguments, "--json", str(tmp_path / "sampler.json")]) == 0
    result = json.loads((tmp_path / "sampler.json").read_text())["result"]
    assert (result["cameras"], result["prompt"], result["horizon"], result["runs"]) == (1, 5, 4, 3)
    assert "| prefix reused  | denoise |" in capsys.readouterr().out


def test_sizes_come_from_a_file_too(tmp_path, monkeypatch):
    monkeypatch.setattr("pi0_ros.benchmark.sampling.measure_rates", lambda *_: Rates(1e9, 1e9))
    (tmp_path / "my_sizes.json").write_text(json.dumps({"model": TINY.to_dict()}))
    command = ["sampler", "--config", str(tmp_path / "my_sizes.json"), "--prompt", "5", "--runs", "1"]
    assert cli.main([*command, "--device", "cpu", "--json", str(tmp_path / "out.json")]) == 0
    result = json.loads((tmp_path / "out.json").read_text())["result"]
    assert (result["config"], result["horizon"]) == ("my_sizes", TINY.action_horizon)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["sampler", "--device", "toaster"], "device must be auto, cpu, cuda or cuda:N, found 'toaster'"),
        (["sampler", "--device", "cpu", "--prompt", "49"], "--prompt: 1 to 48 tokens fit this model, found 49"),
        (["sampler", "--device", "cpu", "--cameras", "4"], "--cameras: 1 to 3 for this model, found 4"),
        (["sampler", "--device", "cpu", "--runs", "0"], "--runs: 1 or more, found 0"),
        (["sampler", "--threads", "-1"], "--threads: 0 (torch's own number) or more, found -1"),
        (["sampler", "--config", "no_such.json"], "no_such.json"),
        (["peers", "--device", "cpu", "--preset", "nano05"], "transformers has no pi0.5"),
    ],
)
def test_what_cannot_be_measured_is_one_line(arguments, reason, monkeypatch, capsys):
    monkeypatch.setattr("pi0_ros.benchmark.sampling.measure_rates", lambda *_: Rates(1e9, 1e9))
    assert cli.main(arguments) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("error: ") and reason in lines[0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_gpu_that_is_not_there_is_said(capsys):
    assert cli.main(["sampler", "--device", "cuda"]) == 1
    assert "device 'cuda' was asked for, torch sees 0 GPUs" in capsys.readouterr().err


@pytest.mark.gpu
def test_sampler_training_and_peers_are_measured_on_a_gpu():
    device = torch.device("cuda")
    result = measure_sampler(TINY, torch.bfloat16, device, prompt=7, runs=3)
    assert result["memory"]["peak_cuda_mb"] > 0 and all(row["p50_ms"] > 0 for row in result["stages"])
    assert measure_training(TINY, torch.bfloat16, device, prompt=7, runs=3)["samples_per_s"] > 0
    assert peers.faults(peers.compare_sampling("tiny", torch.float32, device, config=TINY, prompt=7, runs=3)) == []
    assert peers.faults(peers.compare_training("tiny", device, config=TINY, prompt=7, runs=3)) == []
