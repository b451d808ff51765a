"""The parts of the model that training treats apart, and what of each is trained."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from torch import nn

from pi0_ros.model.pi0 import Pi0

# In the order in which they are reported. `projections` take state, actions and time in and the velocity out.
PARTS = {"vision": "vision tower", "vlm": "VLM", "expert": "action expert", "projections": "projections"}
_PREFIXES = {
    "paligemma_with_expert.paligemma.model.language_model.": "vlm",
    "paligemma_with_expert.paligemma.model.": "vision",  # the tower, and the projector into the VLM
    "paligemma_with_expert.gemma_expert.": "expert",
}


def part_of(name: str) -> str:
    """The part that a parameter belongs to, by its name."""
    return next((part for prefix, part in _PREFIXES.items() if name.startswith(prefix)), "projections")


def freeze(model: Pi0, parts: Iterable[str]) -> None:
    """Keep the weights of these parts as they are."""
    parts = set(parts)
    for name, parameter in model.named_parameters():
        if part_of(name) in parts:
            parameter.requires_grad_(False)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def frozen_digest(model: nn.Module) -> str:
    """Changes with the weights that are not trained, of which it reads the beginnings: 16 hex digits."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            digest.update(name.encode() + parameter.detach().flatten()[:256].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def counts(model: nn.Module) -> dict[str, tuple[int, int]]:
    """part -> (parameters trained, parameters there are)."""
    found = {part: [0, 0] for part in PARTS}
    for name, parameter in model.named_parameters():
        numbers = found[part_of(name)]
        numbers[0] += parameter.numel() * parameter.requires_grad
        numbers[1] += parameter.numel()
    return {part: (numbers[0], numbers[1]) for part, numbers in found.items()}
