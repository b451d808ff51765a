"""Sizes: presets, dict round trip, and errors that say what is wrong."""

import dataclasses
import json

import pytest
import torch

from pi0_ros.model.config import PRESETS, ConfigError, GemmaConfig, Pi0Config, VisionConfig
from pi0_ros.model.pi0 import Pi0
from pi0_ros.robot import CAMERA_SLOTS


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_survive_json(preset):
    config = PRESETS[preset]
    assert Pi0Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_cameras_are_the_robot_files_slots():
    assert Pi0Config().cameras == CAMERA_SLOTS


@pytest.mark.parametrize(
    ("preset", "parameters"),
    [
        # openpi's own counts, less the expert's language head [257152, 1024], which nothing reads
        ("pi0", 3_501_372_176 - 257_152 * 1024),
        ("pi05", 3_616_757_520 - 257_152 * 1024),
        ("nano", 1_944_096),
        ("nano05", 2_269_344),
    ],
)
def test_parameter_counts(preset, parameters):
    with torch.device("meta"):
        model = Pi0(PRESETS[preset])
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def test_prefix_and_suffix_lengths():
    assert (PRESETS["pi0"].prefix_len, PRESETS["pi0"].suffix_len) == (816, 51)
    assert (PRESETS["pi05"].prefix_len, PRESETS["pi05"].suffix_len) == (968, 50)


def test_missing_fields_take_the_defaults():
    assert Pi0Config.from_dict({"action_horizon": 10}) == dataclasses.replace(Pi0Config(), action_horizon=10)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"horizon": 50}, "unknown model field.* horizon, allowed: .*action_horizon"),
        ({"vision": {"size": 3}}, "unknown vision field.* size"),
        ({"vision": 3}, "vision must be a mapping of sizes, found 3"),
        ({"vlm": {"width": 64}}, "vlm: .*missing.*depth"),
        ({"action_dim": 0}, "action_dim must be a whole number of at least 1, found 0"),
        ({"action_dim": "32"}, "found '32'"),
        ({"vision": {"image_size": 225}}, "image_size 225 must be a multiple of patch_size 14"),
        ({"vision": {"num_heads": 5}}, "width 1152 must be a multiple of vision.num_heads 5"),
        ({"cameras": ["a", "a"]}, "cameras must be different names"),
        ({"cameras": "base"}, "cameras must be"),
        ({"min_period": 5}, "0 < min_period < max_period"),
        ({"pi05": "no"}, "pi05 must be true or false, found 'no'"),
        ({"min_period": "a"}, "min_period must be a number, found 'a'"),
    ],
)
def test_a_bad_config_is_one_clear_error(data, message):
    with pytest.raises(ConfigError, match=message):
        Pi0Config.from_dict(data)


def test_stacks_that_cannot_share_an_attention_are_refused():
    small = GemmaConfig(width=64, depth=2, mlp_dim=64, num_heads=4, num_kv_heads=1, head_dim=16)
    with pytest.raises(ConfigError, match="share their attention, but head_dim is 16 and 32"):
        Pi0Config(vision=VisionConfig(), vlm=small, expert=dataclasses.replace(small, head_dim=32))
    with pytest.raises(ConfigError, match="num_heads 4 must be a multiple of num_kv_heads 3"):
        dataclasses.replace(small, num_kv_heads=3)
