"""LoRA weights are merged where their scale is known: the merged layer computes what base and update compute apart."""

from __future__ import annotations

import json

import pytest
import torch
from checkpoint_kit import LAYOUTS, TINY, one_line, random_weights
from safetensors.torch import load_file, save_file

from pi0_ros.model import layouts
from pi0_ros.model.checkpoint import CheckpointError, from_state_dict, open_checkpoint
from pi0_ros.model.config import PRESETS

Q = layouts.EXPERT + "layers.1.self_attn.q_proj.weight"


def jax_with_lora(rank=4):
    """openpi's shapes: A has the rank in place of the last axis, B in place of the one before (openpi: lora.py)."""
    flat = load_file(LAYOUTS / "jax/params.safetensors")
    generator = torch.Generator().manual_seed(1)
    for key in list(flat):
        if "llm/layers/attn" in key or "llm/layers/mlp" in key:
            stem = key.removesuffix("w") if key.endswith("/w") else key + "_"
            *lead, rows, columns = flat[key].shape
            flat[stem + "lora_a"] = 0.1 * torch.randn(*lead, rows, rank, generator=generator)
            flat[stem + "lora_b"] = 0.1 * torch.randn(*lead, rank, columns, generator=generator)
    return flat


def test_openpi_lora_gives_what_its_einsums_give():
    flat = jax_with_lora()
    checkpoint = from_state_dict(flat, config=TINY)
    merged = checkpoint.state_dict()
    layer, x = 1, torch.randn(5, 32, generator=torch.Generator().manual_seed(2))
    attn, mlp = "PaliGemma/llm/layers/attn/", "PaliGemma/llm/layers/mlp_1/"

    def part(key):
        return flat[key][layer]

    stem = layouts.EXPERT + f"layers.{layer}."
    # q: per head, BTD,NDH->BTNH, and the same for A and B
    q = torch.einsum("td,ndh->tnh", x, part(attn + "q_einsum_1/w"))
    low = torch.einsum("td,ndl->tnl", x, part(attn + "q_einsum_1/lora_a"))
    q = q + torch.einsum("tnl,nlh->tnh", low, part(attn + "q_einsum_1/lora_b"))
    torch.testing.assert_close(x @ merged[stem + "self_attn.q_proj.weight"].T, q.flatten(1), atol=1e-5, rtol=1e-5)
    # k and v
    kv = torch.einsum("sd,ckdh->cskh", x, part(attn + "kv_einsum_1/w"))
    low = torch.einsum("sd,ckdl->cskl", x, part(attn + "kv_einsum_1/lora_a"))
    kv = kv + torch.einsum("cskl,cklh->cskh", low, part(attn + "kv_einsum_1/lora_b"))
    for i, name in enumerate("kv"):
        weight = merged[stem + f"self_attn.{name}_proj.weight"]
        torch.testing.assert_close(x @ weight.T, kv[i].flatten(1), atol=1e-5, rtol=1e-5)
    # attn_vec: both A and B are summed over heads
    heads = torch.randn(5, 8, 8, generator=torch.Generator().manual_seed(3))
    out = torch.einsum("tnh,nhd->td", heads, part(attn + "attn_vec_einsum_1/w"))
    low = torch.einsum("tnh,nhl->tl", heads, part(attn + "attn_vec_einsum_1/lora_a"))
    out = out + torch.einsum("tl,nld->td", low, part(attn + "attn_vec_einsum_1/lora_b"))
    weight = merged[stem + "self_attn.o_proj.weight"]
    torch.testing.assert_close(heads.flatten(1) @ weight.T, out, atol=1e-5, rtol=1e-5)
    # the MLP
    for i, name in enumerate(("gate_proj", "up_proj")):
        y = x @ part(mlp + "gating_einsum")[i]
        y = y + x @ part(mlp + "gating_einsum_lora_a")[i] @ part(mlp + "gating_einsum_lora_b")[i]
        torch.testing.assert_close(x @ merged[stem + f"mlp.{name}.weight"].T, y, atol=1e-5, rtol=1e-5)
    wide = torch.randn(5, 64, generator=torch.Generator().manual_seed(4))
    y = wide @ part(mlp + "linear") + wide @ part(mlp + "linear_lora_a") @ part(mlp + "linear_lora_b")
    torch.testing.assert_close(wide @ merged[stem + "mlp.down_proj.weight"].T, y, atol=1e-5, rtol=1e-5)
    assert any("LoRA updates merged with openpi's alpha / rank of 1" in note for note in checkpoint.notes)


def test_half_a_lora_pair_is_refused():
    flat = jax_with_lora()
    del flat["PaliGemma/llm/layers/attn/q_einsum/lora_b"]
    with pytest.raises(CheckpointError, match="only one of .*q_einsum/lora_a"):
        from_state_dict(flat, config=TINY)


def peft_weights(rank=4):
    generator = torch.Generator().manual_seed(5)
    stem = "base_model.model.model." + Q.removesuffix(".weight")
    return {
        stem + ".lora_A.weight": torch.randn(rank, 32, generator=generator),
        stem + ".lora_B.weight": torch.randn(64, rank, generator=generator),
        "base_model.model.model.state_proj.bias": torch.full((32,), 7.0),  # peft's modules_to_save
    }


def adapter(folder, config):
    folder.mkdir()
    save_file(peft_weights(), folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(("rslora", "scale"), [(False, 2.0), (True, 4.0)])  # alpha 8: 8 / 4 and 8 / sqrt(4)
def test_a_peft_adapter_is_merged_into_its_base(tmp_path, rslora, scale):
    base = random_weights(TINY)
    (tmp_path / "base").mkdir()
    save_file({"model." + k: v for k, v in base.items()}, tmp_path / "base/model.safetensors")
    folder = adapter(tmp_path / "adapter", {"r": 4, "lora_alpha": 8, "use_rslora": rslora})
    loaded = open_checkpoint(folder, base=tmp_path / "base", config=TINY).state_dict()
    a, b = (v for k, v in peft_weights().items() if ".lora_" in k)
    torch.testing.assert_close(loaded[Q], base[Q] + scale * b @ a)
    assert loaded["state_proj.bias"].tolist() == [7.0] * 32
    rest = set(base) - {Q, "state_proj.bias"}
    assert all(torch.equal(loaded[k], base[k]) for k in rest)


def test_an_adapters_own_config_stands_before_its_bases(tmp_path, monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", TINY)  # whose width tells the number of heads

    def config(chunk, cameras):
        features = {f"observation.images.{name}": {"type": "VISUAL"} for name in cameras}
        return json.dumps({"type": "pi0", "chunk_size": chunk, "tokenizer_max_length": 12, "input_features": features})

    (tmp_path / "base").mkdir()
    save_file({"model." + k: v for k, v in random_weights(TINY).items()}, tmp_path / "base/model.safetensors")
    (tmp_path / "base/config.json").write_text(config(50, TINY.cameras))
    folder = adapter(tmp_path / "adapter", {"r": 4, "lora_alpha": 8})
    assert open_checkpoint(folder, base=tmp_path / "base").config.action_horizon == 50
    (folder / "config.json").write_text(config(10, ("left_wrist_0_rgb", "base_0_rgb")))
    tuned = open_checkpoint(folder, base=tmp_path / "base")
    assert tuned.config.action_horizon == 10 and tuned.config.cameras == ("left_wrist_0_rgb", "base_0_rgb")
    assert tuned.data["chunk_size"] == 10 and tuned.layout == "lerobot"


def test_an_adapter_alone_asks_for_its_base(tmp_path):
    with pytest.raises(
        CheckpointError, match="LoRA adapter without its base model; `convert` merges the two .--base BASE"
    ):
        open_checkpoint(adapter(tmp_path / "adapter", {"r": 4, "lora_alpha": 8}))


def test_peft_layers_inside_a_whole_model_are_merged_with_the_config_beside_them(tmp_path):
    weights = random_weights(TINY)
    stem = Q.removesuffix(".weight")
    a, b = (v for k, v in peft_weights().items() if ".lora_" in k)
    base = weights.pop(Q)
    weights |= {
        stem + ".base_layer.weight": base,
        stem + ".lora_A.default.weight": a,
        stem + ".lora_B.default.weight": b,
    }
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="1 LoRA updates .*no adapter_config.json") as error:
        open_checkpoint(tmp_path, config=TINY)
    one_line(error.value)
    (tmp_path / "adapter_config.json").write_text('{"r": 4, "lora_alpha": 4}')
    torch.testing.assert_close(open_checkpoint(tmp_path, config=TINY).state_dict()[Q], base + b @ a)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"r": 0, "lora_alpha": 8}, "'r' must be a positive number, found 0"),
        ({"r": 4}, "'lora_alpha' must be a positive number, found None"),
        ({"r": 8, "lora_alpha": 8}, "says r = 8, other ranks in .*lora_A"),
        ({"r": 4, "lora_alpha": 8, "use_dora": True}, "use_dora is not understood"),
        ({"r": 4, "lora_alpha": 8, "rank_pattern": {"q_proj": 8}}, "rank_pattern is not understood"),
    ],
)
def test_an_adapter_config_that_makes_no_sense_is_refused(tmp_path, config, message):
    (tmp_path / "base").mkdir()
    save_file(random_weights(TINY), tmp_path / "base/model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(adapter(tmp_path / "adapter", config), base=tmp_path / "base", config=TINY)


def test_an_update_of_the_wrong_size_is_named():
    flat = jax_with_lora()
    flat["PaliGemma/llm/layers/attn/q_einsum/lora_b"] = torch.ones(2, 8, 3, 8)
    with pytest.raises(CheckpointError, match=r"q_proj.weight cannot be made from .*lora_b \[2, 8, 3, 8\]"):
        from_state_dict(flat, config=TINY)
