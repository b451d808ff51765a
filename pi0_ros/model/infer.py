"""The model's sizes, from the shapes of its parameters and from what a config.json says besides.

Shapes tell everything but the number of attention heads (JAX's do), the horizon, the prompt's length and the cameras.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pi0_ros.model.config import (
    CAMERA_SLOTS,
    PRESETS,
    ConfigError,
    GemmaConfig,
    Pi0Config,
    VisionConfig,
)
from pi0_ros.model.files import CheckpointError
from pi0_ros.model.layouts import EMBEDDING, EXPERT, VISION, VLM

FORMAT = "pi0_ros/1"

Shapes = Mapping[str, tuple[int, ...]]


def config_kind(data: Mapping[str, Any]) -> str:
    """Who wrote this config.json: pi0_ros, lerobot, transformers, openpi, or unknown."""
    if "format" in data:
        return "pi0_ros"
    if data.get("type") in ("pi0", "pi05"):
        return "lerobot"
    if data.get("model_type") == "pi0":
        return "transformers"
    return "openpi" if "action_horizon" in data else "unknown"


def infer_config(
    shapes: Shapes, pi05: bool, heads: Mapping[str, int], data: Mapping[str, Any], source: str
) -> tuple[Pi0Config, list[str]]:
    """-> the config, and a note for everything that had to be assumed.

    Args:
        shapes: of the parameters, by our names; what is missing there is taken from the preset and reported later.
        pi05: whether the keys are pi0.5's.
        heads: 'gemma' and 'vision' head counts, where the layout's shapes show them.
        data: config.json, {} where there is none; `source` names it in errors.

    Raises:
        CheckpointError: the head count cannot be told, config.json contradicts the weights or makes no sense.
    """
    if isinstance(data.get("model"), Mapping):  # ours, and the copy that we leave in openpi's config.json
        try:
            return Pi0Config.from_dict(data["model"]), []
        except ConfigError as error:
            raise CheckpointError(f"{source}: {error}") from None
    kind, preset, config = config_kind(data), PRESETS["pi05" if pi05 else "pi0"], _Reader(data, source)
    if kind == "lerobot" and (data["type"] == "pi05") != pi05:
        held = "pi05 (adaptive norms)" if pi05 else "pi0 (no adaptive norms)"
        raise CheckpointError(f"{source}: type is {data['type']!r}, but the weights are {held}")
    stated = dict(heads)
    if kind == "transformers":
        vlm, tower = config.section("dit_config"), config.section("vlm_config").section("vision_config")
        for name, section, default in (("gemma", vlm, preset.vlm), ("vision", tower, preset.vision)):
            stated[name] = stated.get(name) or section.integer("num_attention_heads", default.num_heads)
    notes: list[str] = []
    horizon_key = "chunk_size" if kind in ("lerobot", "transformers") else "action_horizon"
    if horizon_key not in data:
        notes.append(f"horizon of {preset.action_horizon} actions assumed, no config.json says it")
    cameras = preset.cameras
    if kind == "lerobot":
        cameras, camera_notes = lerobot_cameras(data, source)
        notes += camera_notes
    try:
        vlm, expert = _gemma_stacks(shapes, stated.get("gemma"), preset, source)
        result = Pi0Config(
            vision=_vision_tower(shapes, stated.get("vision"), preset.vision, source),
            vlm=vlm,
            expert=expert,
            vocab_size=_size(shapes, EMBEDDING, 0, preset.vocab_size),
            action_dim=_size(shapes, "action_in_proj.weight", 1, preset.action_dim),
            action_horizon=config.integer(horizon_key, preset.action_horizon),
            max_token_len=config.integer("tokenizer_max_length", preset.max_token_len),
            cameras=cameras,
            pi05=pi05,
            min_period=config.number("min_period", preset.min_period),
            max_period=config.number("max_period", preset.max_period),
        )
    except ConfigError as error:
        raise CheckpointError(f"{source}: {error}") from None
    _check_lerobot_sizes(data, kind, result, source)
    return result, notes


def _size(shapes: Shapes, name: str, axis: int, default: int) -> int:
    shape = shapes.get(name, ())
    return shape[axis] if axis < len(shape) else default


def _vision_tower(shapes: Shapes, heads: int | None, default: VisionConfig, source: str) -> VisionConfig:
    positions = _size(shapes, VISION + "embeddings.position_embedding.weight", 0, default.num_tokens)
    patch = _size(shapes, VISION + "embeddings.patch_embedding.weight", 2, default.patch_size)
    width = _size(shapes, VISION + "embeddings.patch_embedding.bias", 0, default.width)
    heads = heads or next((p.vision.num_heads for p in PRESETS.values() if p.vision.width == width), None)
    return VisionConfig(
        width=width,
        depth=depth(shapes, VISION + "encoder.layers.") or default.depth,
        mlp_dim=_size(shapes, VISION + "encoder.layers.0.mlp.fc1.bias", 0, default.mlp_dim),
        num_heads=_known(heads, "vision", width, source),
        patch_size=patch,
        image_size=patch * math.isqrt(positions),
    )


def _gemma_stacks(shapes: Shapes, heads: int | None, preset: Pi0Config, source: str) -> tuple[GemmaConfig, GemmaConfig]:
    """VLM and action expert; their attention is one, so they share its sizes."""
    queries, keys = (
        _size(shapes, f"{VLM}layers.0.self_attn.{name}_proj.weight", 0, count * preset.vlm.head_dim)
        for name, count in (("q", preset.vlm.num_heads), ("k", preset.vlm.num_kv_heads))
    )
    width = _size(shapes, VLM + "layers.0.mlp.gate_proj.weight", 1, preset.vlm.width)
    heads = _known(heads or _preset_gemma_heads(width, queries, keys), "language", width, source)
    if queries % heads or keys % (queries // heads):
        raise CheckpointError(f"{source}: {heads} heads do not divide queries of {queries} and keys of {keys}")

    def stack(root: str, default: GemmaConfig) -> GemmaConfig:
        return GemmaConfig(
            width=_size(shapes, root + "layers.0.mlp.gate_proj.weight", 1, default.width),
            depth=depth(shapes, root + "layers.") or default.depth,
            mlp_dim=_size(shapes, root + "layers.0.mlp.gate_proj.weight", 0, default.mlp_dim),
            num_heads=heads,
            num_kv_heads=keys // (queries // heads),
            head_dim=queries // heads,
        )

    return stack(VLM, preset.vlm), stack(EXPERT, preset.expert)


def _known(heads: int | None, tower: str, width: int, source: str) -> int:
    if not heads:
        raise CheckpointError(
            f"{source}: the number of attention heads of a {tower} tower of width {width} is in no shape and no "
            "preset; `convert` takes the model's sizes (--model-config JSON_FILE)"
        )
    return heads


def depth(shapes: Shapes, stem: str) -> int:
    """How many different layers stand under `stem`; bounded by the number of keys, whatever their names claim."""
    return len({name[len(stem) :].split(".", 1)[0] for name in shapes if name.startswith(stem)})


def lerobot_cameras(data: Mapping[str, Any], source: str) -> tuple[tuple[str, ...], list[str]]:
    """The cameras of a lerobot config.json in its own order, which is the order of the image tokens.

    A camera that is called as one of our slots keeps the name; others take the free slots in order, with a note.
    `empty_camera_*` are always masked, which changes nothing, so they are left out.
    """
    features = data.get("input_features") or {}
    if not isinstance(features, Mapping) or not all(isinstance(f, Mapping) for f in features.values()):
        raise CheckpointError(f"{source}: 'input_features' must be a mapping of mappings")
    names = [str(key).removeprefix("observation.images.") for key, f in features.items() if f.get("type") == "VISUAL"]
    names = [name for name in names if not name.startswith("empty_camera_")]
    if not names:
        return CAMERA_SLOTS, ["three cameras assumed, config.json names none"]
    free = [slot for slot in CAMERA_SLOTS if slot not in names]
    if len(names) > len(CAMERA_SLOTS):
        raise CheckpointError(f"{source}: {len(names)} cameras ({', '.join(names)}); there are slots for three")
    slots, notes = [], []
    for name in names:
        slots.append(name if name in CAMERA_SLOTS else free.pop(0))
        if slots[-1] != name:
            notes.append(f"camera {name!r} is slot {slots[-1]}")
    return tuple(slots), notes


def _preset_gemma_heads(width: int, queries: int, keys: int) -> int | None:
    for preset in PRESETS.values():
        vlm = preset.vlm
        sizes = (vlm.width, vlm.num_heads * vlm.head_dim, vlm.num_kv_heads * vlm.head_dim)
        if sizes == (width, queries, keys):
            return vlm.num_heads
    return None


def _check_lerobot_sizes(data: Mapping[str, Any], kind: str, config: Pi0Config, source: str) -> None:
    stated = {"max_action_dim": config.action_dim, "action_dim": config.action_dim}
    for name, found in stated.items():
        if kind != "unknown" and name in data and data[name] != found:
            raise CheckpointError(f"{source}: {name} is {data[name]!r}, but the weights have {found}")
    image = data.get("image_resolution")
    size = config.vision.image_size
    if kind == "lerobot" and image is not None and image != [size, size]:
        raise CheckpointError(f"{source}: image_resolution is {image!r}, but the weights have {[size, size]}")


class _Reader:
    """A JSON mapping whose values are asked for with a type."""

    def __init__(self, data: Mapping[str, Any], source: str) -> None:
        self.data, self.source = data, source

    def section(self, name: str) -> _Reader:
        value = self.data.get(name, {})
        if not isinstance(value, Mapping):
            raise CheckpointError(f"{self.source}: {name!r} must be a mapping, found {value!r:.80}")
        return _Reader(value, f"{self.source}: {name}")

    def integer(self, name: str, default: int) -> int:
        value = self.data.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
            raise CheckpointError(f"{self.source}: {name!r} must be a positive whole number, found {value!r:.80}")
        return value

    def number(self, name: str, default: float) -> float:
        value = self.data.get(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise CheckpointError(f"{self.source}: {name!r} must be a number, found {value!r:.80}")
        return float(value)
