"""Sizes of the model: one frozen dataclass, and the presets pi0, pi05 and their nano forms."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# The order of image tokens in the prefix. Positions are rotary, so the order matters.
CAMERA_SLOTS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")


class ConfigError(ValueError):
    """Sizes that do not fit together; the message names the field, the value and what is allowed."""


def _require_positive(section: Any, name: str) -> None:
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name}.{field.name} must be a whole number of at least 1, found {value!r}")


@dataclass(frozen=True)
class VisionConfig:
    """A SigLIP tower. Defaults are So400m/14 at 224 pixels: 16 x 16 = 256 tokens a camera."""

    width: int = 1152
    depth: int = 27
    mlp_dim: int = 4304
    num_heads: int = 16
    patch_size: int = 14
    image_size: int = 224

    def __post_init__(self) -> None:
        _require_positive(self, "vision")
        if self.width % self.num_heads:
            raise ConfigError(f"vision.width {self.width} must be a multiple of vision.num_heads {self.num_heads}")
        if self.image_size % self.patch_size:
            raise ConfigError(f"vision.image_size {self.image_size} must be a multiple of patch_size {self.patch_size}")

    @property
    def num_tokens(self) -> int:
        """Tokens that one camera puts into the prefix."""
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True)
class GemmaConfig:
    """A Gemma stack. Heads x head_dim is the attention's inner width and need not equal `width`."""

    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int

    def __post_init__(self) -> None:
        _require_positive(self, "gemma")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(f"num_heads {self.num_heads} must be a multiple of num_kv_heads {self.num_kv_heads}")
        if self.head_dim % 2:
            raise ConfigError(f"head_dim {self.head_dim} must be even, rotary embedding turns pairs")


GEMMA_2B = GemmaConfig(width=2048, depth=18, mlp_dim=16384, num_heads=8, num_kv_heads=1, head_dim=256)
GEMMA_300M = GemmaConfig(width=1024, depth=18, mlp_dim=4096, num_heads=8, num_kv_heads=1, head_dim=256)


@dataclass(frozen=True)
class Pi0Config:
    """Every size of the model. `pi05` turns on adaptive norms and takes the state token away."""

    vision: VisionConfig = VisionConfig()
    vlm: GemmaConfig = GEMMA_2B
    expert: GemmaConfig = GEMMA_300M
    vocab_size: int = 257152
    action_dim: int = 32
    action_horizon: int = 50
    max_token_len: int = 48
    cameras: tuple[str, ...] = CAMERA_SLOTS
    pi05: bool = False
    min_period: float = 4e-3  # of the time sinusoid
    max_period: float = 4.0

    def __post_init__(self) -> None:
        for name in ("vocab_size", "action_dim", "action_horizon", "max_token_len"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} must be a whole number of at least 1, found {value!r}")
        for name in ("depth", "num_heads", "num_kv_heads", "head_dim"):  # the two stacks share every attention
            vlm, expert = getattr(self.vlm, name), getattr(self.expert, name)
            if vlm != expert:
                raise ConfigError(f"vlm and expert share their attention, but {name} is {vlm} and {expert}")
        if self.expert.width % 2:
            raise ConfigError(f"expert.width {self.expert.width} must be even, the time sinusoid has sines and cosines")
        if not isinstance(self.pi05, bool):
            raise ConfigError(f"pi05 must be true or false, found {self.pi05!r}")
        for name in ("min_period", "max_period"):
            if not isinstance(getattr(self, name), (int, float)):
                raise ConfigError(f"{name} must be a number, found {getattr(self, name)!r}")
        if not isinstance(self.cameras, tuple) or not self.cameras or len(set(self.cameras)) < len(self.cameras):
            raise ConfigError(f"cameras must be different names, at least one, found {self.cameras!r}")
        if not 0 < self.min_period < self.max_period:
            raise ConfigError(f"need 0 < min_period < max_period, found {self.min_period} and {self.max_period}")

    @property
    def prefix_len(self) -> int:
        """Image tokens and prompt tokens: 816 in pi0, 968 in pi0.5."""
        return len(self.cameras) * self.vision.num_tokens + self.max_token_len

    @property
    def suffix_len(self) -> int:
        """State token (pi0 only) and action tokens: 51 in pi0, 50 in pi0.5."""
        return self.action_horizon + (not self.pi05)

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers, ready for JSON."""
        return {**dataclasses.asdict(self), "cameras": list(self.cameras)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Pi0Config:
        """The inverse of `to_dict`. Missing fields take their defaults; an unknown or mistyped one is a ConfigError."""
        sections = {"vision": VisionConfig, "vlm": GemmaConfig, "expert": GemmaConfig}
        values = {key: _build(sections[key], value, key) if key in sections else value for key, value in data.items()}
        if isinstance(values.get("cameras"), list):
            values["cameras"] = tuple(values["cameras"])
        return _build(cls, values, "model")


def _build(cls: type, data: Any, name: str) -> Any:
    if not isinstance(data, Mapping):
        raise ConfigError(f"{name} must be a mapping of sizes, found {data!r}")
    known = {field.name for field in dataclasses.fields(cls)}
    if unknown := sorted(set(data) - known):
        raise ConfigError(
            f"unknown {name} field(s) {', '.join(map(str, unknown))}, allowed: {', '.join(sorted(known))}"
        )
    try:
        return cls(**data)
    except TypeError as error:  # a missing size, or one of the wrong type
        raise ConfigError(f"{name}: {error}") from None


_NANO_VISION = VisionConfig(width=128, depth=2, mlp_dim=512, num_heads=4, patch_size=28, image_size=112)
_NANO_GEMMA = GemmaConfig(width=128, depth=3, mlp_dim=384, num_heads=4, num_kv_heads=1, head_dim=32)
_NANO = Pi0Config(
    vision=_NANO_VISION, vlm=_NANO_GEMMA, expert=_NANO_GEMMA, vocab_size=260, action_horizon=30, max_token_len=48
)

PRESETS: dict[str, Pi0Config] = {
    "pi0": Pi0Config(),
    "pi05": Pi0Config(max_token_len=200, pi05=True),
    "nano": _NANO,  # trained from scratch on a CPU: byte-level tokens, 16 tokens a camera
    "nano05": dataclasses.replace(_NANO, max_token_len=96, pi05=True),  # a byte a character, and the state is in it
}
