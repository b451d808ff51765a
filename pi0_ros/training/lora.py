"""Low-rank updates (LoRA, arXiv 2106.09685) by peft: put in before training, merged when a checkpoint is written."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from pi0_ros.model.pi0 import Pi0
from pi0_ros.training.parts import freeze, part_of

RANKS = {"vlm": 16, "expert": 32}  # alpha is the same (openpi: models/gemma.py, gemma_2b_lora and gemma_300m_lora)
_TARGET = re.compile(r"\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)$")
_ADAPTER = "default"


def targets(model: Pi0, parts: Iterable[str]) -> list[str]:
    """Names of the linear layers of attention and MLP in these parts, without those that no output depends on."""
    unread = {id(parameter) for parameter in model.unread_parameters()}
    return [
        name
        for name, module in model.named_modules()
        if _TARGET.search(name) and part_of(f"{name}.") in parts and id(module.weight) not in unread
    ]


def add_lora(model: Pi0, parts: Iterable[str], seed: int = 0) -> None:
    """Freeze the parts and give their linear layers an update that is zero at first; `seed` draws its other factor.

    Embeddings and norms of these parts stay as they are (openpi: models/pi0_config.py, get_freeze_filter).
    """
    from peft import LoraConfig, inject_adapter_in_model  # takes seconds to import

    parts = set(parts)
    wanted = targets(model, parts)
    freeze(model, parts)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    ranks = {re.escape(name): RANKS[part_of(f"{name}.")] for name in wanted}
    config = LoraConfig(r=1, lora_alpha=1, target_modules=wanted, rank_pattern=ranks, alpha_pattern=ranks)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model, _ADAPTER)
    for name, parameter in model.named_parameters():  # peft froze what is not its own
        parameter.requires_grad_(".lora_" in name or before[name.replace(".base_layer.", ".")])


@torch.no_grad()
def merged(model: nn.Module, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict of the model with its updates added and openpi's names again: what the model would be without peft.

    `state` holds the same names as the model's own state dict, with values of any moment (live or averaged).
    """
    plain = {name: tensor for name, tensor in state.items() if ".base_layer." not in name and ".lora_" not in name}
    for name, module in model.named_modules():
        if f"{name}.base_layer.weight" in state:
            a, b = (state[f"{name}.{factor}.{_ADAPTER}.weight"].float() for factor in ("lora_A", "lora_B"))
            base = state[f"{name}.base_layer.weight"]
            plain[f"{name}.weight"] = (base.float() + module.scaling[_ADAPTER] * (b @ a)).to(base.dtype)
    return plain
