"""`convert`: any layout into our folder, ours into openpi's, and back to the same bits."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoint_kit import LAYOUTS, TINY, TINY05, random_weights
from safetensors.torch import load_file, save_file
from test_statistics import OPENPI, lerobot

from pi0_ros.model import layouts
from pi0_ros.model.checkpoint import CheckpointError, from_state_dict, open_checkpoint
from pi0_ros.policy.bundle import BundleSettings, load_bundle, save_bundle
from pi0_ros.policy.convert import (
    Options,
    check_actions,
    convert,
    foreign_notes,
    foreign_settings,
    foreign_units,
    main,
    write_openpi,
)
from pi0_ros.policy.statistics import NormStats
from pi0_ros.policy.transforms import limit_statistics
from pi0_ros.robot_file import load_robot

ROBOT = Path(__file__).parents[1] / "config/six_joint_arm.yaml"


@pytest.mark.parametrize("config", [TINY, TINY05], ids=["pi0", "pi05"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ours_to_openpi_and_back_is_the_same_to_the_bit(tmp_path, config, dtype):
    weights = random_weights(config, dtype=dtype)
    stats = NormStats.from_dict(OPENPI)
    settings = BundleSettings(config, normalisation="zscore")
    digest = save_bundle(tmp_path / "ours", weights, settings, None, stats)
    convert(Options(tmp_path / "ours", tmp_path / "openpi", to="openpi", asset_id="lab/arm"))
    back = Options(tmp_path / "openpi", tmp_path / "again", normalisation="zscore")
    assert convert(back) == digest  # of weights, config and statistics together
    loaded = load_bundle(tmp_path / "again", verify_weights=True).weights().state_dict()
    assert all(torch.equal(loaded[k], weights[k]) and loaded[k].dtype == dtype for k in weights)


def test_what_openpis_layout_cannot_hold_is_warned_of(tmp_path, capsys):
    settings = BundleSettings(TINY, noise_source={"source": "pink", "beta": 1.0}, rtc_max_delay=3)
    save_bundle(tmp_path / "ours", random_weights(TINY), settings, None, None)
    convert(Options(tmp_path / "ours", tmp_path / "openpi", to="openpi"))
    told = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert [line.partition("no place for ")[2].split()[0] for line in told] == ["noise_source", "rtc_max_delay"]
    convert(Options(tmp_path / "ours" / "model.safetensors", tmp_path / "short", horizon=3))
    assert "rtc_max_delay: 2 instead of 3, by the horizon" in capsys.readouterr().out
    kept = load_bundle(tmp_path / "short").settings
    assert (kept.rtc_max_delay, kept.noise_source["source"]) == (2, "pink")


def test_a_trained_checkpoint_takes_no_robot_file_that_contradicts_its_own(tmp_path):
    robot = load_robot(ROBOT)
    config = replace(TINY, action_dim=max(TINY.action_dim, len(robot.joints)), cameras=tuple(robot.present_cameras))
    settings = BundleSettings(config)
    stats = limit_statistics(robot, settings)
    save_bundle(tmp_path / "ours", random_weights(config), settings, robot, stats)
    grips = [
        j.model_copy(update={"open": j.closed, "closed": j.open}) if j.kind == "gripper" else j for j in robot.joints
    ]
    (tmp_path / "other.yaml").write_text(robot.model_copy(update={"joints": tuple(grips)}).to_yaml())
    with pytest.raises(
        CheckpointError, match=r"trained for another robot than .*other.yaml: joint '.*' open: .* in the"
    ):
        convert(Options(tmp_path / "ours", tmp_path / "new", robot=tmp_path / "other.yaml"))
    assert not (tmp_path / "new").exists()


def test_openpis_layout_is_what_openpi_loads_strictly(tmp_path):
    """The keys and shapes that its own model saved, the tied embedding's name in the metadata included."""
    from safetensors import safe_open

    source = open_checkpoint(LAYOUTS / "openpi/model.safetensors", config=TINY)
    write_openpi(tmp_path / "out", source, NormStats.from_dict(OPENPI), "lab")
    ours, theirs = load_file(tmp_path / "out/model.safetensors"), load_file(LAYOUTS / "openpi/model.safetensors")
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs if k != layouts.EXPERT_HEAD)
    with safe_open(tmp_path / "out/model.safetensors", framework="pt") as reader:
        assert reader.metadata()[layouts.EMBEDDING] == layouts.HEAD
    assert json.loads((tmp_path / "out/assets/lab/norm_stats.json").read_text()) == OPENPI
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["action_dim"], config["action_horizon"], config["precision"]) == (8, 10, "float32")


def test_a_lerobot_folder_becomes_ours_with_its_statistics_and_settings(tmp_path, capsys):
    source = tmp_path / "source"
    source.mkdir()
    lerobot(source)
    for name in ("config.json", "model.safetensors"):
        (source / name).write_bytes((LAYOUTS / "lerobot" / name).read_bytes())
    (tmp_path / "sizes.json").write_text(json.dumps(TINY.to_dict()))
    digest = convert(Options(source, tmp_path / "out", model_config=str(tmp_path / "sizes.json"), dtype="bfloat16"))
    bundle = load_bundle(tmp_path / "out", verify_weights=True)
    assert bundle.digest == digest and bundle.stats.state.std.tolist() == [1.0, 0.25]
    assert (bundle.settings.prompt_format, bundle.settings.normalisation) == ("pi0", "zscore")
    assert bundle.weights().dtype == torch.bfloat16
    told = capsys.readouterr().out
    assert "lerobot pi0 layout, 89 tensors, float32" in told and f"checkpoint {digest}" in told
    assert "state of 2, actions of 1" in told


def test_pi05_libero_takes_pi0s_prompt_when_told(tmp_path):
    save_file(random_weights(TINY05), tmp_path / "model.safetensors")
    sizes = tmp_path / "sizes.json"
    sizes.write_text(json.dumps(TINY05.to_dict()))
    convert(Options(tmp_path, tmp_path / "out", model_config=str(sizes), prompt_format="pi0"))
    assert load_bundle(tmp_path / "out").settings.prompt_format == "pi0"


def with_actions(robot, **kinds):
    joints = tuple(joint.model_copy(update={"action": kinds.get(joint.name)}) for joint in robot.joints)
    return robot.model_copy(update={"joints": joints})


def test_lerobots_absolute_actions_are_not_added_to_the_state(tmp_path):
    robot = load_robot(ROBOT)
    checkpoint = open_checkpoint(LAYOUTS / "lerobot", config=TINY)
    check_actions(checkpoint, with_actions(robot, **dict.fromkeys(robot.joint_names, "absolute")), "source")
    check_actions(open_checkpoint(LAYOUTS / "openpi/model.safetensors", config=TINY), robot, "source")
    (tmp_path / "sizes.json").write_text(json.dumps(TINY.to_dict()))
    sizes = str(tmp_path / "sizes.json")
    with pytest.raises(CheckpointError, match="; set `action: absolute` for shoulder_pan_joint, .*, wrist_3_joint$"):
        convert(Options(LAYOUTS / "lerobot", tmp_path / "out", robot=ROBOT, model_config=sizes))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("says", "relative"),
    [  # lerobot/processor/relative_action_processor.py: names by place, excluded where they hold a word of the list
        ({}, 7),
        ({"action_feature_names": None, "relative_exclude_joints": ["gripper"]}, 7),
        ({"action_feature_names": [*"abcdef", "Gripper.pos"], "relative_exclude_joints": ["gripper"]}, 6),
        ({"action_feature_names": [*"abcdef", "gripper.pos"]}, 6),
        ({"action_feature_names": [*"abcdef", "gripper.pos"], "relative_exclude_joints": []}, 7),
    ],
)
def test_lerobots_relative_actions_are_compared_joint_by_joint(says, relative):
    robot = load_robot(ROBOT)  # six relative joints and an absolute gripper
    checkpoint = open_checkpoint(LAYOUTS / "lerobot", config=TINY)
    checkpoint = replace(checkpoint, data={**checkpoint.data, "use_relative_actions": True, **says})
    every = with_actions(robot, finger_joint="relative")
    fitting, other = (every, robot) if relative == 7 else (robot, every)
    check_actions(checkpoint, fitting, "source")
    kind = "relative" if relative == 7 else "absolute"
    with pytest.raises(CheckpointError, match=f"source: .*'six_joint_arm'.*; set `action: {kind}` for finger_joint$"):
        check_actions(checkpoint, other, "source")
    with pytest.raises(CheckpointError, match="`action: relative` for elbow_joint"):
        check_actions(checkpoint, with_actions(fitting, elbow_joint="absolute"), "source")


@pytest.mark.parametrize(
    ("says", "word"),
    [
        ({"action_feature_names": 7}, "action_feature_names"),
        ({"relative_exclude_joints": "gripper"}, "relative_exclude_joints"),
    ],
)
def test_names_of_relative_actions_that_are_none_are_refused(says, word):
    checkpoint = open_checkpoint(LAYOUTS / "lerobot", config=TINY)
    checkpoint = replace(checkpoint, data={**checkpoint.data, "use_relative_actions": True, **says})
    with pytest.raises(CheckpointError, match=f"source: config.json: {word} must be a list of names, found"):
        check_actions(checkpoint, load_robot(ROBOT), "source")


def test_a_lerobot_policy_of_another_number_of_joints_is_refused():
    robot = load_robot(ROBOT)
    absolute = with_actions(robot, **dict.fromkeys(robot.joint_names, "absolute"))
    checkpoint = open_checkpoint(LAYOUTS / "lerobot", config=TINY)
    for dims in (7, 8):  # those of the arm, or the model's, padding included
        check_actions(replace(checkpoint, data={"output_features": {"action": {"shape": [dims]}}}), absolute, "source")
    with pytest.raises(
        CheckpointError, match="source: lerobot trained it on 6 actions, but 'six_joint_arm' has 7 joints"
    ):
        check_actions(replace(checkpoint, data={"output_features": {"action": {"shape": [6]}}}), absolute, "source")


def test_what_lerobot_does_otherwise_is_told(tmp_path, capsys):
    (tmp_path / "sizes.json").write_text(json.dumps(TINY.to_dict()))
    sizes = str(tmp_path / "sizes.json")
    convert(Options(LAYOUTS / "lerobot", tmp_path / "out", model_config=sizes))
    told = capsys.readouterr().out
    assert "bars beside images are at -3 in lerobot" in told and "cleans no prompts" in told
    convert(Options(LAYOUTS / "openpi/model.safetensors", tmp_path / "other", model_config=sizes))
    assert "in lerobot" not in capsys.readouterr().out


def test_the_horizon_that_no_weights_hold_can_be_given(tmp_path, capsys):
    source = LAYOUTS / "jax/params.safetensors"
    convert(Options(source, tmp_path / "assumed"))
    assert load_bundle(tmp_path / "assumed").settings.model.action_horizon == 50
    assert "horizon of 50 actions assumed" in capsys.readouterr().out
    convert(Options(source, tmp_path / "given", horizon=15))
    assert load_bundle(tmp_path / "given").settings.model.action_horizon == 15
    assert "assumed" not in capsys.readouterr().out
    convert(Options(tmp_path / "given", tmp_path / "shorter", horizon=10))
    assert load_bundle(tmp_path / "shorter").weights().config.action_horizon == 10
    with pytest.raises(
        CheckpointError, match="--horizon: action_horizon must be a whole number of at least 1, found 0"
    ):
        convert(Options(source, tmp_path / "none", horizon=0))


def test_statistics_in_other_units_than_the_robots_are_pointed_out(tmp_path, capsys):
    robot, settings = load_robot(ROBOT), BundleSettings(TINY)
    sound = limit_statistics(robot, settings)
    assert foreign_units(robot, sound, settings) == []
    mean = sound.state.mean.copy()
    mean[1] = 90.0  # degrees
    odd = replace(sound, state=replace(sound.state, mean=mean))
    (warning,) = foreign_units(robot, odd, settings)
    assert warning.startswith(f"state of {robot.joint_names[1]}: mean 90 in the statistics, limits ")
    save_bundle(tmp_path / "source", random_weights(TINY), settings, None, odd)
    convert(Options(tmp_path / "source", tmp_path / "out", robot=ROBOT))
    assert f"warning: {warning}" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match="aloha adapter is for two arms of six joints and a gripper; .* has 7"):
        convert(Options(tmp_path / "source", tmp_path / "aloha", robot=ROBOT, adapter="aloha"))
    assert not (tmp_path / "aloha").exists()


LEROBOT = {"type": "pi05", "output_features": {"action": {"shape": [7]}}}


def settings_of(data, normalisation=None):
    checkpoint = from_state_dict(random_weights(TINY05), config=TINY05)
    return foreign_settings(replace(checkpoint, data={**LEROBOT, **data}), "source", normalisation)


def test_lerobot_settings_follow_its_config():
    settings = settings_of({"normalization_mapping": {"STATE": "MEAN_STD", "ACTION": "MEAN_STD"}})
    assert (settings.prompt_format, settings.normalisation, settings.loss_dims) == ("lerobot_pi05", "zscore", 7)


@pytest.mark.parametrize("relative", [True, False])
def test_prompts_of_later_lerobots_hold_the_robots_own_joints_only(relative):
    assert settings_of({"use_relative_actions": relative}).prompt_format == "pi05"


def test_what_lerobot_trained_for_real_time_chunking_can_do_it_here():
    assert settings_of({"rtc_training_max_delay": 3}).rtc_max_delay == 3
    assert settings_of({"rtc_training_max_delay": 300}).rtc_max_delay == TINY05.action_horizon - 1  # by --horizon


@pytest.mark.parametrize("memory", ["use_visual_memory", "use_proprioceptive_memory"])
def test_a_lerobot_policy_with_a_memory_is_refused(memory):
    assert settings_of({memory: False}).loss_dims == 7
    with pytest.raises(CheckpointError, match=f"{memory}: policies with a memory cannot run here"):
        settings_of({memory: True})


def test_what_a_checkpoint_of_others_saw_otherwise_is_told():
    def told(layout, config=TINY05, **data):
        checkpoint = replace(from_state_dict(random_weights(config), config=config), layout=layout, data=data)
        return " ".join(foreign_notes(checkpoint))

    assert "--prompt-format pi05" in told("lerobot", type="pi05")
    assert "--prompt-format" not in told("lerobot", type="pi05", use_relative_actions=False)
    assert "cleans no prompts of pi0" in told("lerobot", TINY)
    assert "bicubically" in told("transformers", TINY) and told("openpi", TINY) == ""


def test_a_normalisation_that_is_not_known_here_is_refused_unless_one_is_named():
    mapping = {"normalization_mapping": {"STATE": "MIN_MAX", "ACTION": "QUANTILES"}}
    with pytest.raises(CheckpointError, match="normalization_mapping is MIN_MAX, QUANTILES .*--normalisation"):
        settings_of(mapping)
    assert settings_of(mapping, "quantile").normalisation == "quantile"


@pytest.mark.parametrize("data", [{"normalization_mapping": [1]}, {"output_features": {"action": {"shape": []}}}])
def test_a_lerobot_config_that_makes_no_sense_is_one_clear_error(data):
    with pytest.raises(CheckpointError, match="config.json"):
        settings_of(data)


def test_the_source_is_not_overwritten_and_neither_is_a_full_folder(tmp_path):
    save_bundle(tmp_path / "ours", random_weights(TINY), BundleSettings(TINY), None, None)
    with pytest.raises(CheckpointError, match="is the source itself"):
        convert(Options(tmp_path / "ours", tmp_path / "ours"))
    with pytest.raises(CheckpointError, match="is not empty"):
        convert(Options(tmp_path / "ours", tmp_path, to="openpi"))
    with pytest.raises(CheckpointError, match="leads out of the folder"):
        convert(Options(tmp_path / "ours", tmp_path / "new", to="openpi", asset_id="../x"))


def test_the_command_line_tells_what_it_did_or_one_line_of_error(tmp_path, monkeypatch, capsys):
    run = ["convert", str(LAYOUTS / "jax/params.safetensors"), str(tmp_path / "out"), "--robot", str(ROBOT)]
    monkeypatch.setattr(sys, "argv", run)
    main()
    assert "jax pi0 layout, 50 tensors" in capsys.readouterr().out
    assert load_bundle(tmp_path / "out").robot.name
    save_file({"conv1.weight": torch.ones(3)}, tmp_path / "other.safetensors")
    for source in (tmp_path / "absent", tmp_path / "other.safetensors"):
        monkeypatch.setattr(sys, "argv", ["convert", str(source), str(tmp_path / "out2")])
        with pytest.raises(SystemExit) as exit_:
            main()
        error = capsys.readouterr().err
        assert exit_.value.code == 1 and error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "out2").exists()
