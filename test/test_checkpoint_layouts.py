"""Each layout's files give the numbers that its own implementation computed, and whatever does not fit is named."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoint_kit import LAYOUTS, TINY, TINY05, one_line, random_weights
from safetensors.torch import load_file, save_file

from pi0_ros.model import layouts
from pi0_ros.model.checkpoint import CheckpointError, from_state_dict, open_checkpoint, parameter_shapes
from pi0_ros.model.config import CAMERA_SLOTS, PRESETS, GemmaConfig, Pi0Config, VisionConfig
from pi0_ros.model.infer import infer_config, lerobot_cameras
from pi0_ros.model.pi0 import Observation, Pi0

FILES = {
    "openpi": ("openpi/model.safetensors", "openpi"),
    "lerobot": ("lerobot", "lerobot"),
    "transformers": ("transformers", "transformers"),
    "transformers state dict": ("transformers/state_dict.safetensors", "transformers"),
    "jax": ("jax/params.safetensors", "jax"),
}


@pytest.mark.parametrize("layout", FILES)
def test_each_layout_gives_the_outputs_of_its_own_implementation(layout):
    file, folder = FILES[layout]
    checkpoint = open_checkpoint(LAYOUTS / file, config=TINY)
    model = checkpoint.model()
    inputs, expected = (load_file(LAYOUTS / name) for name in ("inputs.safetensors", f"{folder}/outputs.safetensors"))
    observation = Observation(
        inputs["images"],
        inputs["image_masks"].bool(),
        inputs["tokens"],
        inputs["token_masks"].bool(),
        inputs["state"],
    )
    with torch.no_grad():
        actions = model.sample_actions(observation, noise=inputs["noise"])
        velocity = model.velocity(observation, inputs["noise"], torch.ones(2))
        loss = model.compute_loss(observation, inputs["actions"], noise=inputs["noise"], time=inputs["time"]).mean()
        embeddings = model.embed_images(inputs["images"])
    seen = inputs["image_masks"].bool().repeat_interleave(16, dim=1)
    assert checkpoint.layout == layout
    torch.testing.assert_close(actions, expected["sample_actions"], atol=2e-4, rtol=0)
    torch.testing.assert_close(velocity, expected["v_t1"], atol=2e-4, rtol=0)
    torch.testing.assert_close(loss, expected["loss"][0], atol=2e-6, rtol=0)
    torch.testing.assert_close(embeddings[seen], expected["image_embeds"][seen], atol=1e-5, rtol=0)


def test_a_checkpoint_says_what_it_is():
    checkpoint = open_checkpoint(LAYOUTS / "lerobot", config=TINY)
    assert checkpoint.describe() == "lerobot pi0 layout, 89 tensors, float32"
    assert any("gemma_expert.lm_head" in note for note in checkpoint.notes)


@pytest.mark.parametrize("layout", ["transformers", "transformers state dict"])
def test_transformers_config_tells_all_sizes_but_the_prompt(layout):
    config = open_checkpoint(LAYOUTS / FILES[layout][0]).config
    assert config == replace(TINY, max_token_len=48)


def test_jax_shapes_tell_the_heads_and_the_horizon_is_assumed_aloud():
    checkpoint = open_checkpoint(LAYOUTS / "jax/params.safetensors")
    assert checkpoint.config == replace(TINY, action_horizon=50, max_token_len=48)
    assert any("horizon of 50 actions assumed" in note for note in checkpoint.notes)


def test_unknown_widths_without_a_config_ask_for_one():
    with pytest.raises(
        CheckpointError, match=r"number of attention heads .* width 48 .*`convert` .*--model-config"
    ) as error:
        open_checkpoint(LAYOUTS / "lerobot")
    one_line(error.value)


@pytest.mark.parametrize("preset", ["pi0", "pi05", "nano", "nano05"])
def test_preset_widths_tell_the_heads(preset):
    config = PRESETS[preset]
    shapes = parameter_shapes(config)
    found, _ = infer_config(shapes, config.pi05, {}, {"action_horizon": config.action_horizon}, "config.json")
    assert replace(found, max_token_len=config.max_token_len) == config


def test_heads_that_do_not_divide_the_weights_are_refused():
    with pytest.raises(CheckpointError, match="config.json: 3 heads do not divide queries of 128"):
        infer_config(parameter_shapes(PRESETS["nano"]), False, {"gemma": 3}, {}, "config.json")


LEROBOT05 = {
    "type": "pi05",
    "chunk_size": 10,
    "max_action_dim": 8,
    "tokenizer_max_length": 20,
    "image_resolution": [56, 56],
    "empty_cameras": 1,
    "input_features": {
        "observation.images.right_wrist_0_rgb": {"type": "VISUAL", "shape": [3, 56, 56]},
        "observation.state": {"type": "STATE", "shape": [7]},
        "observation.images.top": {"type": "VISUAL", "shape": [3, 56, 56]},
        "observation.images.empty_camera_0": {"type": "VISUAL", "shape": [3, 56, 56]},
    },
    "output_features": {"action": {"type": "ACTION", "shape": [7]}},
    "normalization_mapping": {"VISUAL": "IDENTITY", "STATE": "QUANTILES", "ACTION": "QUANTILES"},
}
NANO = dict(num_heads=4, num_kv_heads=1, head_dim=32)
PI05 = replace(  # widths of the nano preset, so that a lerobot config tells the rest
    TINY05,
    vision=VisionConfig(width=128, depth=1, mlp_dim=16, num_heads=4, patch_size=14, image_size=56),
    vlm=GemmaConfig(width=128, depth=1, mlp_dim=16, **NANO),
    expert=GemmaConfig(width=32, depth=1, mlp_dim=16, **NANO),
)


@pytest.mark.parametrize("prefix", ["", "model."])
def test_lerobot_pi05_with_its_config_and_with_or_without_the_prefix(tmp_path, prefix):
    weights = random_weights(PI05)
    renamed = {(layouts.HEAD if k == layouts.EMBEDDING else k): v for k, v in weights.items()}
    save_file({prefix + k: v for k, v in renamed.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(LEROBOT05))
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.describe() == f"lerobot pi05 layout, {len(weights)} tensors, float32"
    assert checkpoint.config == replace(
        PI05, cameras=("right_wrist_0_rgb", "base_0_rgb")
    )  # its order, empty one left out
    assert "camera 'top' is slot base_0_rgb" in checkpoint.notes
    assert not any("assumed" in note for note in checkpoint.notes)
    loaded = checkpoint.state_dict()
    assert all(torch.equal(loaded[k], weights[k]) for k in weights)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"type": "pi0"}, "type is 'pi0', but the weights are pi05"),
        ({"max_action_dim": 32}, "max_action_dim is 32, but the weights have 8"),
        ({"image_resolution": [224, 224]}, r"image_resolution is \[224, 224\], but the weights have \[56, 56\]"),
        ({"chunk_size": "ten"}, "'chunk_size' must be a positive whole number, found 'ten'"),
        ({"chunk_size": -1}, "'chunk_size' must be a positive whole number, found -1"),
        ({"min_period": None}, "'min_period' must be a number, found None"),
        ({"min_period": 5.0}, "need 0 < min_period < max_period"),
        ({"input_features": [1]}, "'input_features' must be a mapping"),
        ({"input_features": {"observation.images.top": 3}}, "'input_features' must be a mapping"),
        ({"max_period": True}, "'max_period' must be a number, found True"),
        ({"model": {"action_horizon": 0}}, "config.json: "),
    ],
)
def test_a_config_that_contradicts_the_weights_is_refused(tmp_path, change, message):
    save_file(random_weights(PI05), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({**LEROBOT05, **change}))
    with pytest.raises(CheckpointError, match=message) as error:
        open_checkpoint(tmp_path)
    assert "config.json" in one_line(error.value)


@pytest.mark.parametrize(
    ("names", "slots"),
    [
        (["top", "base_0_rgb"], ("left_wrist_0_rgb", "base_0_rgb")),  # a slot's own camera keeps it
        (["b", "a", "c"], CAMERA_SLOTS),
        (["empty_camera_0"], CAMERA_SLOTS),
    ],
)
def test_every_camera_of_a_lerobot_config_has_a_slot_of_its_own(names, slots):
    features = {f"observation.images.{name}": {"type": "VISUAL"} for name in names}
    found, notes = lerobot_cameras({"input_features": features}, "config.json")
    assert found == slots
    assert notes[0] == {"top": "camera 'top' is slot left_wrist_0_rgb", "b": "camera 'b' is slot base_0_rgb"}.get(
        names[0], "three cameras assumed, config.json names none"
    )


def test_four_cameras_have_no_slots(tmp_path):
    cameras = {f"observation.images.c{i}": {"type": "VISUAL"} for i in range(4)}
    save_file(random_weights(PI05), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({**LEROBOT05, "input_features": cameras}))
    with pytest.raises(CheckpointError, match="4 cameras"):
        open_checkpoint(tmp_path)


def test_lerobot_pi05_drops_and_renames_what_pi0_left_behind():
    weights = random_weights(TINY05)
    old = {k.replace("time_mlp_", "action_time_mlp_"): v for k, v in weights.items()}
    old |= {"state_proj.weight": torch.ones(32, 8), "state_proj.bias": torch.ones(32)}
    old |= {layouts.EXPERT + f"{name}norm.weight": torch.ones(32) for name in ("", "layers.1.input_layer")}
    checkpoint = from_state_dict(old, config=TINY05)
    assert torch.equal(checkpoint.state_dict()["time_mlp_in.weight"], weights["time_mlp_in.weight"])
    (note,) = checkpoint.notes
    assert "state_proj.weight" in note and "layers.1.input_layernorm.weight" in note and "expert.model.norm" in note


def test_every_missing_unexpected_and_misshaped_key_is_in_one_error():
    weights = random_weights(TINY)
    stem = layouts.EXPERT + "layers."
    del weights[stem + "0.mlp.up_proj.weight"], weights[stem + "1.mlp.up_proj.weight"], weights["state_proj.bias"]
    weights["action_out_proj.weight"] = torch.ones(7, 32)
    weights["normalize_inputs.buffer"] = torch.ones(3)
    with pytest.raises(CheckpointError) as error:
        from_state_dict(weights, config=TINY)
    text = one_line(error.value)
    assert f"3 missing: {stem}{{0-1}}.mlp.up_proj.weight, state_proj.bias" in text
    assert "1 unexpected: normalize_inputs.buffer" in text
    assert "1 of another shape: action_out_proj.weight is [7, 32], expected [8, 32]" in text


def test_pi0_weights_are_not_taken_for_pi05():
    with pytest.raises(CheckpointError, match="the config says pi05, but the weights are pi0"):
        from_state_dict(random_weights(TINY), config=TINY05)


def test_openpi_pi05_is_told_from_its_adaptive_norms():
    data = json.loads((LAYOUTS.parent / "pi05.json").read_text())
    sizes = {key: data[key] for key in TINY.to_dict() if key in data}
    config = Pi0Config.from_dict({**sizes, "max_token_len": data["prompt_len"]})
    checkpoint = open_checkpoint(LAYOUTS.parent / "pi05.weights.safetensors", config=config)
    assert checkpoint.describe().startswith("openpi pi05 layout") and checkpoint.config.pi05
    assert torch.equal(checkpoint.state_dict()[layouts.EMBEDDING], checkpoint.source.read(layouts.HEAD, keep=True))


def test_jax_pi05_adaptive_norms_are_transposed_layer_by_layer():
    flat = {
        k: v for k, v in load_file(LAYOUTS / "jax/params.safetensors").items() if not ("llm" in k and "_1/scale" in k)
    }
    flat = {k: v for k, v in flat.items() if not k.startswith(("state_proj", "action_time_mlp"))}
    generator = torch.Generator().manual_seed(0)
    llm = "PaliGemma/llm/"
    for norm, lead in (("layers/pre_attention_norm_1", [2]), ("layers/pre_ffw_norm_1", [2]), ("final_norm_1", [])):
        flat[f"{llm}{norm}/Dense_0/kernel"] = torch.randn(*lead, 32, 96, generator=generator)
        flat[f"{llm}{norm}/Dense_0/bias"] = torch.randn(*lead, 96, generator=generator)
    for name in ("time_mlp_in", "time_mlp_out"):
        flat |= {f"{name}/kernel": torch.randn(32, 32, generator=generator), f"{name}/bias": torch.ones(32)}
    trainer = {f"params/{key}/value": value for key, value in flat.items()}  # as openpi's trainer names them
    checkpoint = from_state_dict(trainer, config=TINY05)
    loaded = checkpoint.state_dict()
    assert checkpoint.describe().startswith("jax pi05 layout")
    norm = layouts.EXPERT + "layers.1.post_attention_layernorm.dense."
    assert torch.equal(loaded[norm + "weight"], flat[llm + "layers/pre_ffw_norm_1/Dense_0/kernel"][1].T)
    assert torch.equal(loaded[norm + "bias"], flat[llm + "layers/pre_ffw_norm_1/Dense_0/bias"][1])
    assert torch.equal(loaded[layouts.EXPERT + "norm.dense.weight"], flat[llm + "final_norm_1/Dense_0/kernel"].T)
    assert torch.equal(loaded["time_mlp_in.weight"], flat["time_mlp_in/kernel"].T)


def test_jax_arrays_that_do_not_fit_are_named():
    flat = load_file(LAYOUTS / "jax/params.safetensors")
    flat["PaliGemma/llm/layers/attn/q_einsum/w"] = torch.ones(2, 8, 48)  # an axis short
    flat["PaliGemma/llm/layers/mlp/router"] = torch.ones(2)
    del flat["state_proj/bias"]
    with pytest.raises(CheckpointError) as error:
        from_state_dict(flat, config=TINY)
    text = one_line(error.value)
    assert "1 missing: state_proj.bias" in text and "1 unexpected: PaliGemma/llm/layers/mlp/router" in text
    assert f"{layouts.VLM}layers.1.self_attn.q_proj.weight cannot be made from" in text


def test_two_keys_for_one_parameter_are_refused():
    weights = random_weights(TINY)
    weights["model.state_proj.bias"] = weights["state_proj.bias"]
    with pytest.raises(CheckpointError, match=r"state_proj.bias and model.state_proj.bias both stand for"):
        from_state_dict(weights, config=TINY)


def test_weights_of_something_else_are_no_known_layout():
    with pytest.raises(CheckpointError, match="no pi0 or pi0.5 weights .* holds 1 keys: conv1.weight"):
        from_state_dict({"conv1.weight": torch.ones(3)})


def test_a_depth_that_no_file_has_is_refused_before_a_model_is_built():
    deep = replace(TINY, vlm=replace(TINY.vlm, depth=10**9), expert=replace(TINY.expert, depth=10**9))
    with pytest.raises(CheckpointError, match="vlm.depth 1000000000, the weights have 2 layers"):
        from_state_dict(random_weights(TINY), config=deep)
    named = random_weights(TINY) | {layouts.VLM + "layers.999999999.self_attn.q_proj.weight": torch.ones(2)}
    with pytest.raises(CheckpointError, match="999999999"):
        from_state_dict(named, config=TINY)


# --- dtypes and memory ------------------------------------------------------------------------------------------------


def test_weights_in_their_own_dtype_are_pages_of_the_file_and_others_are_converted(tmp_path):
    weights = random_weights(TINY, dtype=torch.bfloat16)
    save_file(weights, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path, config=TINY)
    kept, converted = checkpoint.state_dict(), checkpoint.state_dict(torch.float32)
    mapped = [
        line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines() if "model.s" in line
    ]
    ranges = [(int(low, 16), int(high, 16)) for low, high in mapped]
    assert all(any(low <= value.data_ptr() < high for low, high in ranges) for value in kept.values())
    assert all(torch.equal(kept[k], weights[k]) and torch.equal(converted[k], weights[k].float()) for k in weights)
    kept["state_proj.bias"].zero_()  # a private page: the file stays
    assert torch.equal(load_file(tmp_path / "model.safetensors")["state_proj.bias"], weights["state_proj.bias"])


def test_large_tensors_are_converted_in_blocks_to_the_same_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr("pi0_ros.model.checkpoint._BLOCK", 100)
    weights = random_weights(TINY)
    save_file(weights, tmp_path / "model.safetensors")
    converted = open_checkpoint(tmp_path, config=TINY).state_dict(torch.bfloat16)
    assert all(torch.equal(converted[k], weights[k].bfloat16()) for k in weights)


def test_the_model_has_nothing_left_on_the_meta_device(tmp_path):
    save_file(random_weights(TINY05, dtype=torch.bfloat16), tmp_path / "model.safetensors")
    model = open_checkpoint(tmp_path, config=TINY05).model()
    tensors = [*model.parameters(), *model.buffers()]
    assert {t.device.type for t in tensors} == {"cpu"} and {t.dtype for t in tensors} == {torch.bfloat16}
    assert not model.training
    fresh = {name: p.requires_grad for name, p in Pi0(TINY05).named_parameters()}
    assert {name: p.requires_grad for name, p in model.named_parameters()} == fresh  # what training may touch


def test_shards_with_an_index_are_one_checkpoint(tmp_path):
    weights = random_weights(TINY)
    names = list(weights)
    shards = {"a.safetensors": names[:30], "b.safetensors": names[30:]}
    for file, keys in shards.items():
        save_file({k: weights[k] for k in keys}, tmp_path / file)
    index = {"weight_map": {k: file for file, keys in shards.items() for k in keys}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    for path in (tmp_path, tmp_path / "model.safetensors.index.json"):
        loaded = open_checkpoint(path, config=TINY).state_dict()
        assert all(torch.equal(loaded[k], weights[k]) for k in weights)


def test_transformers_shards_and_names_in_memory_are_read_as_it_wrote_them(tmp_path):
    from transformers import PI0Config, PI0ForConditionalGeneration

    model = PI0ForConditionalGeneration(PI0Config.from_pretrained(LAYOUTS / "transformers"))
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    saved = open_checkpoint(tmp_path)
    memory = from_state_dict(model.state_dict(), data=json.loads((tmp_path / "config.json").read_text()))
    assert (saved.layout, memory.layout) == ("transformers", "transformers state dict")
    assert saved.config == memory.config == replace(TINY, max_token_len=48)
    ours, theirs = saved.state_dict(), memory.state_dict()
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)


# --- orbax ------------------------------------------------------------------------------------------------------------


def test_an_orbax_tree_is_the_same_as_the_flattened_parameters():
    """The tree was written by orbax-checkpoint 0.12.8 from the very arrays of layouts/jax."""
    pytest.importorskip("tensorstore", reason="reading orbax needs the optional tensorstore")
    tree, flat = (open_checkpoint(LAYOUTS / p).state_dict() for p in ("orbax", "jax/params.safetensors"))
    assert set(tree) == set(flat) and all(torch.equal(tree[k], flat[k]) for k in flat)
    assert open_checkpoint(LAYOUTS / "orbax/params").layout == "jax"


def test_an_orbax_tree_of_plain_zarr_folders_in_bfloat16(tmp_path):
    tensorstore = pytest.importorskip("tensorstore", reason="reading orbax needs the optional tensorstore")
    flat = load_file(LAYOUTS / "jax/params.safetensors")
    params = tmp_path / "params"
    params.mkdir()
    (params / "_METADATA").write_text("{}")
    for key, value in flat.items():
        name = "params." + key.replace("/", ".") + ".value"
        spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{params / name}/"}}
        store = tensorstore.open(spec, create=True, dtype=tensorstore.bfloat16, shape=list(value.shape)).result()
        store.write(value.numpy().astype(store.dtype.numpy_dtype)).result()
    loaded = open_checkpoint(tmp_path).state_dict()
    exact = open_checkpoint(LAYOUTS / "jax/params.safetensors").state_dict()
    assert all(torch.equal(loaded[k], exact[k].bfloat16()) for k in exact)


def test_a_damaged_orbax_tree_is_one_clear_error(tmp_path):
    pytest.importorskip("tensorstore", reason="reading orbax needs the optional tensorstore")
    shutil.copytree(LAYOUTS / "orbax", tmp_path / "orbax")
    largest = max((tmp_path / "orbax").rglob("*"), key=lambda p: p.stat().st_size if p.is_file() else 0)
    largest.write_bytes(largest.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="cannot be read") as error:
        open_checkpoint(tmp_path / "orbax")
    one_line(error.value)


def test_an_orbax_array_of_a_huge_declared_shape_is_refused_before_it_is_read(tmp_path):
    pytest.importorskip("tensorstore", reason="reading orbax needs the optional tensorstore")
    array = tmp_path / "params" / "params.state_proj.bias.value"
    array.mkdir(parents=True)
    (tmp_path / "params/_METADATA").write_text("{}")
    zarray = {"zarr_format": 2, "shape": [2**40], "chunks": [2**20], "dtype": "<f4", "compressor": None}
    (array / ".zarray").write_text(json.dumps({**zarray, "fill_value": None, "order": "C", "filters": None}))
    with pytest.raises(CheckpointError, match=r"state_proj.bias.value claims the shape \[1099511627776\]") as error:
        open_checkpoint(tmp_path)
    one_line(error.value)


def test_without_tensorstore_an_orbax_tree_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tensorstore", None)
    with pytest.raises(CheckpointError, match="pip install tensorstore"):
        open_checkpoint(LAYOUTS / "orbax")


def test_pickled_weights_are_never_loaded(tmp_path):
    torch.save(random_weights(TINY), tmp_path / "pytorch_model.bin")
    for path in (tmp_path, tmp_path / "pytorch_model.bin"):
        with pytest.raises(CheckpointError, match="pickled weights .*never loaded"):
            open_checkpoint(path)


def test_the_folder_of_a_run_is_told_from_its_checkpoint(tmp_path):
    (tmp_path / "checkpoint").mkdir()
    with pytest.raises(CheckpointError, match=f"no params/; did you mean {tmp_path}/checkpoint\\?"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("files", [[], ["a.safetensors", "b.safetensors"]])
def test_a_folder_without_a_clear_weights_file_is_refused(tmp_path, files):
    for name in files:
        save_file(random_weights(TINY), tmp_path / name)
    with pytest.raises(CheckpointError, match="name the file" if files else "no model.safetensors"):
        open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="no such file or folder"):
        open_checkpoint(Path(tmp_path / "absent"))
