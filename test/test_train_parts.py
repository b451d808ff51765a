"""Freezing by part, low-rank updates, and the memory that is forecast."""

from __future__ import annotations

import pytest
import torch
import train_kit as kit
from model_cases import TINY, random_chunk, random_model, random_observation

from pi0_ros.model.config import PRESETS
from pi0_ros.model.pi0 import Pi0
from pi0_ros.policy.bundle import load_bundle
from pi0_ros.training.lora import add_lora, merged, targets
from pi0_ros.training.memory import activation_bytes, forecast, report
from pi0_ros.training.parts import counts, freeze, part_of, trained
from pi0_ros.training.train import main

EVERYTHING = {"vision", "vlm", "expert", "projections"}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return kit.make_data(tmp_path_factory.mktemp("parts"))


def test_every_parameter_belongs_to_the_part_its_name_says():
    vlm = "paligemma_with_expert.paligemma.model."
    assert part_of(vlm + "vision_tower.vision_model.post_layernorm.weight") == "vision"
    assert part_of(vlm + "multi_modal_projector.linear.weight") == "vision"
    assert part_of(vlm + "language_model.embed_tokens.weight") == "vlm"
    assert part_of("paligemma_with_expert.gemma_expert.model.layers.0.mlp.up_proj.weight") == "expert"
    assert part_of("state_proj.weight") == "projections"
    found = counts(Pi0(TINY))
    assert sum(total for _, total in found.values()) == sum(p.numel() for p in Pi0(TINY).parameters())
    assert found["vlm"][0] < found["vlm"][1]  # the last layer's unread half is never trained


def test_frozen_parts_keep_their_weights_to_the_bit_and_the_others_learn(data, tmp_path):
    run = kit.make_run(data, tmp_path / "out", freeze=("vision", "vlm"))
    before = kit.weights(run)
    run.run()
    changed = {part_of(name) for name, value in kit.weights(run).items() if not torch.equal(value, before[name])}
    assert changed == {"expert", "projections"}


def test_a_low_rank_update_has_openpis_ranks_and_none_where_nothing_reads_it():
    model = Pi0(TINY)
    names = targets(model, {"vlm", "expert"})
    vlm, expert = "paligemma_with_expert.paligemma.model.language_model.", "paligemma_with_expert.gemma_expert.model."
    assert len([name for name in names if name.startswith(expert)]) == 3 * 7
    assert [name for name in names if name.startswith(vlm + "layers.2.")] == [
        vlm + "layers.2.self_attn.k_proj",
        vlm + "layers.2.self_attn.v_proj",
    ]
    assert len(names) == 3 * 7 + 2 * 7 + 2
    add_lora(model, ["vlm", "expert"])
    modules = dict(model.named_modules())
    for name in names:
        rank = 16 if name.startswith(vlm) else 32
        assert modules[name].lora_A["default"].weight.shape[0] == rank
        assert modules[name].scaling["default"] == 1.0
    live = trained(model)
    assert all(".lora_" in name or part_of(name) in ("vision", "projections") for name in live)


@pytest.mark.parametrize("parts", [["expert"], ["vlm", "expert"]])
def test_the_merged_weights_do_what_the_updated_model_does(parts):
    model, observation, noise = random_model(TINY), random_observation(TINY), random_chunk(TINY, 1)
    time = torch.tensor([0.3, 0.7])
    before = model.velocity(observation, noise, time)
    add_lora(model, parts)
    torch.testing.assert_close(model.velocity(observation, noise, time), before, atol=0, rtol=0)  # nothing yet
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.normal_(0.0, 0.1, generator=torch.Generator().manual_seed(len(name)))
    updated = model.velocity(observation, noise, time)
    assert (updated - before).abs().max() > 0.1
    plain = Pi0(TINY)
    plain.load_state_dict(merged(model, model.state_dict()))  # strict: openpi's names and no other
    torch.testing.assert_close(plain.velocity(observation, noise, time), updated, atol=1e-5, rtol=1e-5)


def test_a_run_with_low_rank_updates_resumes_and_exports_plain_names(data, tmp_path):
    options = {"lora": ("vlm", "expert"), "freeze": ("vision",), "ema": 0.5, "steps": 4}
    whole = kit.make_run(data, tmp_path / "whole", **options)
    whole.run()
    start, end = (load_bundle(path).model().state_dict() for path in (data / "start", tmp_path / "whole/checkpoint"))
    assert start.keys() == end.keys()
    changed = {name for name in start if not torch.equal(start[name], end[name])}
    assert not [name for name in changed if "norm" in name or "embed" in name or "vision_tower" in name]
    assert any("gemma_expert" in name for name in changed) and any("language_model" in name for name in changed)

    stopped = kit.make_run(data, tmp_path / "stopped", **options, save_every=2, minutes=1e-9)
    stopped.run()
    assert stopped.step == 1
    resumed = kit.make_run(data, tmp_path / "stopped", **options)
    resumed.run()
    assert resumed.progress.losses == whole.progress.losses
    assert load_bundle(tmp_path / "stopped/checkpoint").digest == load_bundle(tmp_path / "whole/checkpoint").digest
    state = next((tmp_path / "stopped" / "state").glob("step_00000004")) / "state.pt"
    assert set(torch.load(state, weights_only=True)["weights"]) == set(trained(resumed.model))


def test_the_forecast_counts_what_float32_training_keeps():
    model = Pi0(TINY)
    freeze(model, ["vlm"])
    total = sum(p.numel() for p in model.parameters())
    live = sum(p.numel() for p in trained(model).values())
    needed = forecast(model, TINY, piece=4, cameras=1)
    assert (needed.weights, needed.gradients, needed.optimizer, needed.average) == (
        4 * total,
        4 * live,
        8 * live,
        4 * live,
    )
    assert forecast(model, TINY, piece=4, cameras=1, average=False).average == 0
    assert forecast(model, TINY, piece=4, cameras=1, dtype=torch.bfloat16).weights == 6 * total
    assert needed.activations == 4 * forecast(model, TINY, piece=1, cameras=1).activations


def remembered(model: Pi0, draws: int = 1, autocast: bool = False) -> int:
    """Bytes that one sample's forward pass keeps for the backward pass, copies of weights left out."""
    observation, actions = random_observation(model.config, batch=1), random_chunk(model.config, 1, batch=1)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    shapes = {shape for p in model.parameters() for shape in (p.shape, p.shape[::-1]) if p.dim() == 2}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights and tensor.shape not in shapes:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(observation, actions, noise=actions.expand(draws, -1, -1), time=torch.full((draws,), 0.5))
    assert loss.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("frozen", [(), ("vision",), ("vision", "vlm")])
def test_the_forecast_of_activations_is_near_what_is_remembered(frozen):
    config = PRESETS["nano"]
    model = random_model(config).train()
    freeze(model, frozen)
    live = EVERYTHING - set(frozen)
    assert 0.7 < activation_bytes(config, 3, live, 4, recompute=False) / remembered(model) < 1.5
    assert 0.7 < activation_bytes(config, 3, live, 4, recompute=False, draws=4) / remembered(model, draws=4) < 1.5
    assert 0.7 < activation_bytes(config, 3, live, 2, recompute=False) / remembered(model, autocast=True) < 1.5


def test_less_is_forecast_where_less_is_kept():
    full = activation_bytes(PRESETS["pi0"], 3, EVERYTHING, 2, recompute=False)
    assert activation_bytes(PRESETS["pi0"], 3, EVERYTHING, 2, recompute=True) < full / 4
    assert activation_bytes(PRESETS["pi0"], 3, {"expert"}, 2, recompute=False) < full / 10
    assert activation_bytes(PRESETS["pi0"], 2, EVERYTHING, 2, recompute=False) < full


def test_the_report_names_the_parts_and_says_when_it_will_not_fit(data, tmp_path, capsys):
    model = Pi0(TINY)
    needed = forecast(model, TINY, piece=4, cameras=1)
    assert "warning" not in report(model, needed, needed.total + 1, "cpu")
    tight = report(model, needed, needed.total - 1, "cpu")
    assert "will probably not fit" in tight and "--lora" in tight
    for name in ("vision tower", "VLM", "action expert", "projections"):
        assert name in tight
    assert main(kit.arguments(data, tmp_path / "out", steps=1)) == 0
    said = capsys.readouterr()
    assert "memory forecast, GB:" in said.out


def test_freezing_everything_but_projections_trains_those(data, tmp_path):
    run = kit.make_run(data, tmp_path / "out", freeze=("vision", "vlm", "expert"), steps=1)
    assert {part_of(name) for name in trained(run.model)} == {"projections"}
    run.run()
