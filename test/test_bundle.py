"""The checkpoint folder: what goes in comes out, a change is noticed, and it appears whole or not at all."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoint_kit import TINY, TINY05, one_line, random_weights

from pi0_ros.model import flow
from pi0_ros.model.checkpoint import CheckpointError, from_state_dict
from pi0_ros.model.pi0 import Pi0
from pi0_ros.policy.bundle import BundleSettings, folder_of, load_bundle, save_bundle
from pi0_ros.policy.statistics import NormStats, Stats
from pi0_ros.robot_file import load_robot

ROOT = Path(__file__).parents[1]
ROBOT = load_robot(ROOT / "config/six_joint_arm.yaml")
JOINTS = len(ROBOT.joints)
FIELD = Stats([0.0] * JOINTS, [1.0] * JOINTS, [-1.0] * JOINTS, [1.0] * JOINTS)
STATS = NormStats(FIELD, FIELD)
SETTINGS = BundleSettings(TINY, noise_source=flow.Pink(0.5).to_dict(), rtc_max_delay=3, loss_dims=7, trained_steps=1200)


@pytest.fixture
def folder(tmp_path):
    tokenizer = tmp_path / "words"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_text('{"version": "1.0"}')
    (tokenizer / "model.safetensors").write_text("left behind")
    save_bundle(tmp_path / "checkpoint", random_weights(TINY), SETTINGS, ROBOT, STATS, tokenizer)
    return tmp_path / "checkpoint"


def test_what_goes_in_comes_out(folder):
    bundle = load_bundle(folder, verify_weights=True)
    weights = random_weights(TINY)
    loaded = bundle.weights().state_dict()
    assert (bundle.settings, bundle.robot, bundle.stats) == (SETTINGS, ROBOT, STATS)
    assert [p.name for p in bundle.tokenizer.iterdir()] == ["tokenizer.json"]
    assert set(loaded) == set(weights) and all(torch.equal(loaded[k], weights[k]) for k in weights)
    model = bundle.model(torch.bfloat16)
    assert isinstance(model, Pi0) and model.config == TINY and model.action_out_proj.weight.dtype == torch.bfloat16


def test_the_digest_is_that_of_the_manifest_and_names_the_content(folder, tmp_path):
    manifest = json.loads((folder / "manifest.json").read_text())
    canonical = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    digest = load_bundle(folder).digest
    assert digest == hashlib.sha256(canonical.encode()).hexdigest()[:12] and re.fullmatch("[0-9a-f]{12}", digest)
    same = save_bundle(tmp_path / "again", random_weights(TINY), SETTINGS, ROBOT, STATS, folder / "tokenizer")
    other = save_bundle(tmp_path / "other", random_weights(TINY, seed=1), SETTINGS, ROBOT, STATS, folder / "tokenizer")
    assert same == digest != other


def test_a_model_is_saved_as_its_state_dict_is(tmp_path):
    model = Pi0(TINY05)
    settings = BundleSettings(TINY05)
    a = save_bundle(tmp_path / "a", model, settings, ROBOT, STATS)
    b = save_bundle(tmp_path / "b", model.state_dict(), settings, ROBOT, STATS)
    assert a == b and load_bundle(tmp_path / "a").tokenizer is None


def test_weights_can_be_written_in_another_dtype(tmp_path):
    save_bundle(tmp_path / "half", random_weights(TINY), SETTINGS, ROBOT, STATS, dtype=torch.bfloat16)
    checkpoint = load_bundle(tmp_path / "half").weights()
    assert checkpoint.describe() == "pi0_ros pi0 layout, 88 tensors, bfloat16"


def test_published_weights_may_lack_robot_and_statistics(tmp_path):
    save_bundle(tmp_path / "base", random_weights(TINY), BundleSettings(TINY), None, None)
    bundle = load_bundle(tmp_path / "base")
    assert bundle.robot is None and bundle.stats is None and bundle.settings.normalisation == "zscore"


def test_the_defaults_of_pi05_are_openpis():
    settings = BundleSettings(TINY05)
    assert (settings.prompt_format, settings.normalisation) == ("pi05", "quantile")
    assert settings.noise_source == flow.White().to_dict()


# --- atomic writing ---------------------------------------------------------------------------------------------------


class DiskFullError(OSError):
    pass


def test_a_failed_save_leaves_the_old_folder_and_no_rubbish(folder, monkeypatch):
    before = load_bundle(folder, verify_weights=True).digest
    listing = sorted(p.name for p in folder.parent.iterdir())

    def fail(*args, **kwargs):
        raise DiskFullError("no space left on device")

    monkeypatch.setattr("pi0_ros.policy.bundle.write_safetensors", fail)
    with pytest.raises(DiskFullError):
        save_bundle(folder, random_weights(TINY, seed=1), SETTINGS, ROBOT, STATS)
    assert load_bundle(folder, verify_weights=True).digest == before
    assert sorted(p.name for p in folder.parent.iterdir()) == listing


def test_a_rename_that_fails_puts_the_old_folder_back(folder, monkeypatch):
    import os

    before, real, calls = load_bundle(folder).digest, os.rename, []

    def second_fails(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise DiskFullError("interrupted")
        real(source, target)

    monkeypatch.setattr("pi0_ros.policy.bundle.os.rename", second_fails)
    with pytest.raises(DiskFullError):
        save_bundle(folder, random_weights(TINY, seed=1), SETTINGS, ROBOT, STATS)
    assert load_bundle(folder, verify_weights=True).digest == before


def test_the_old_folder_is_kept_where_it_cannot_be_put_back(folder, monkeypatch):
    import os

    before, real, calls = load_bundle(folder).digest, os.rename, []

    def first_alone(source, target):
        calls.append(target)
        if len(calls) > 1:
            raise DiskFullError("interrupted")
        real(source, target)

    monkeypatch.setattr("pi0_ros.policy.bundle.os.rename", first_alone)
    with pytest.raises(DiskFullError):
        save_bundle(folder, random_weights(TINY, seed=1), SETTINGS, ROBOT, STATS)
    assert not folder.exists() and load_bundle(calls[0], verify_weights=True).digest == before


def test_an_existing_checkpoint_is_replaced_and_mapped_weights_of_the_old_one_live_on(folder):
    old = load_bundle(folder).weights().state_dict()
    save_bundle(folder, random_weights(TINY, seed=1), SETTINGS, ROBOT, STATS)
    assert torch.equal(old["state_proj.weight"], random_weights(TINY)["state_proj.weight"])
    new = load_bundle(folder, verify_weights=True).weights().state_dict()
    assert torch.equal(new["state_proj.weight"], random_weights(TINY, seed=1)["state_proj.weight"])


def test_a_folder_that_is_no_checkpoint_is_not_replaced(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/cat.jpg").write_text("cat")
    with pytest.raises(CheckpointError, match="is no checkpoint folder, so it is not replaced"):
        save_bundle(tmp_path / "photos", random_weights(TINY), SETTINGS, ROBOT, STATS)
    assert (tmp_path / "photos/cat.jpg").read_text() == "cat"
    (tmp_path / "photos/config.json").write_text("{}")  # another layout has one too
    save_bundle(tmp_path / "checkpoint", random_weights(TINY), SETTINGS, ROBOT, STATS)
    (tmp_path / "link").symlink_to(tmp_path / "checkpoint")
    (tmp_path / "file").write_text("a letter")
    for name in ("photos", "link", "file"):
        with pytest.raises(CheckpointError, match="is no checkpoint folder, so it is not replaced"):
            save_bundle(tmp_path / name, random_weights(TINY), SETTINGS, ROBOT, STATS)
    assert (tmp_path / "file").read_text() == "a letter" and (tmp_path / "link").is_symlink()
    (tmp_path / "empty").mkdir()
    save_bundle(tmp_path / "empty", random_weights(TINY), SETTINGS, ROBOT, STATS)


# --- what does not fit together ---------------------------------------------------------------------------------------


def test_weights_that_do_not_fit_the_settings_are_not_written(tmp_path):
    with pytest.raises(CheckpointError, match="1 missing: state_proj.bias"):
        weights = random_weights(TINY)
        del weights["state_proj.bias"]
        save_bundle(tmp_path / "x", weights, SETTINGS, ROBOT, STATS)
    assert not (tmp_path / "x").exists()


def test_weights_that_were_opened_for_another_model_are_not_written(tmp_path):
    checkpoint = from_state_dict(random_weights(TINY), config=TINY)
    other = BundleSettings(replace(TINY, action_horizon=5))
    with pytest.raises(CheckpointError, match="is not the one that the weights were opened with"):
        save_bundle(tmp_path / "x", checkpoint, other, ROBOT, STATS)


def test_statistics_and_robot_must_fit_the_settings(tmp_path):
    short = NormStats(Stats([0.0], [1.0]), FIELD)
    with pytest.raises(CheckpointError, match=f"state: statistics of 1 numbers for a robot of {JOINTS} joints"):
        save_bundle(tmp_path / "x", random_weights(TINY), SETTINGS, ROBOT, short)
    plain = Stats([0.0] * JOINTS, [1.0] * JOINTS)
    with pytest.raises(CheckpointError, match="quantile normalisation needs q01 and q99"):
        quantile = replace(SETTINGS, normalisation="quantile")
        save_bundle(tmp_path / "x", random_weights(TINY), quantile, ROBOT, NormStats(plain, plain))
    narrow = replace(TINY, action_dim=2)
    with pytest.raises(CheckpointError, match=f"has {JOINTS} joints, the model 2 action dimensions"):
        save_bundle(tmp_path / "x", random_weights(narrow), BundleSettings(narrow), ROBOT, STATS)
    blind = replace(TINY, cameras=("right_wrist_0_rgb",))
    with pytest.raises(CheckpointError, match="camera base_0_rgb.* has no slot in the model"):
        save_bundle(tmp_path / "x", random_weights(blind), BundleSettings(blind), ROBOT, STATS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt_format": "free"}, "prompt_format must be one of pi0, pi05, lerobot_pi05, found 'free'"),
        ({"prompt_format": "pi05"}, "prompt_format 'pi05' is not for pi0, whose suffix holds the state"),
        ({"adapter": "baxter"}, "adapter must be one of none, aloha"),
        ({"normalisation": "none"}, "normalisation must be one of zscore, quantile"),
        ({"rtc_max_delay": 10}, "rtc_max_delay must be a whole number from 0 to 9, found 10"),
        ({"rtc_max_delay": True}, "rtc_max_delay must be a whole number"),
        ({"loss_dims": 9}, "loss_dims must be a whole number from 1 to 8, found 9"),
        ({"trained_steps": -1}, "trained_steps must be a whole number"),
        ({"noise_source": {"source": "brown"}}, "noise_source: .*'brown'"),
        ({"noise_source": "white"}, "noise_source must be a mapping"),
    ],
)
def test_settings_that_make_no_sense_are_named(change, message):
    with pytest.raises(CheckpointError, match=message) as error:
        replace(SETTINGS, **change)
    one_line(error.value)


# --- damaged and hostile folders --------------------------------------------------------------------------------------


def edit(path, change):
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


@pytest.mark.parametrize("name", ["config.json", "robot.yaml", "norm_stats.json", "tokenizer/tokenizer.json"])
def test_a_small_file_that_changed_is_noticed(folder, name):
    raw = bytearray((folder / name).read_bytes())
    place = raw.rindex(b"1")
    raw[place : place + 1] = b"2"
    (folder / name).write_bytes(raw)
    with pytest.raises(CheckpointError, match=f"{name}: its sha256 is not the manifest's") as error:
        load_bundle(folder)
    one_line(error.value)


def test_weights_that_changed_are_noticed_when_asked(folder):
    raw = bytearray((folder / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (folder / "model.safetensors").write_bytes(raw)
    load_bundle(folder)
    with pytest.raises(CheckpointError, match="model.safetensors: its sha256 is not the manifest's"):
        load_bundle(folder, verify_weights=True)


def test_truncated_weights_are_noticed_always(folder):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-1])
    with pytest.raises(CheckpointError, match="model.safetensors: .* bytes, the manifest says .*truncated"):
        load_bundle(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "robot.yaml", "manifest.json", "config.json"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name}: missing, the|{name}: no such file|has no {name}"):
        load_bundle(folder)


@pytest.mark.parametrize("name", ["../outside.json", "/etc/hostname", "tokenizer/../../outside.json"])
def test_a_manifest_cannot_name_a_file_outside(folder, name):
    (folder.parent / "outside.json").write_text("{}")
    entry = {"sha256": hashlib.sha256(b"{}").hexdigest(), "bytes": 2}
    edit(folder / "manifest.json", lambda data: data["files"].update({name: entry}))
    with pytest.raises(CheckpointError, match="leads outside the folder"):
        load_bundle(folder)


@pytest.mark.parametrize("name", ["robot.yaml", "manifest.json"])
def test_a_link_out_of_the_folder_is_refused(folder, name):
    outside = folder.parent / name
    (folder / name).rename(outside)
    (folder / name).symlink_to(outside)
    with pytest.raises(CheckpointError, match="leads outside the folder"):
        load_bundle(folder)


def test_bytes_after_the_weights_are_noticed_always(folder):
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(CheckpointError, match="model.safetensors: .* bytes, the manifest says .*truncated or changed"):
        load_bundle(folder)


@pytest.mark.parametrize("name", ["robot.yaml", "norm_stats.json"])
def test_a_robot_file_or_statistics_that_the_manifest_does_not_list_are_noticed(folder, name):
    edit(folder / "manifest.json", lambda data: data["files"].pop(name))
    with pytest.raises(CheckpointError, match=f"{name} not in manifest.json"):
        load_bundle(folder)


def test_statistics_that_do_not_fit_the_robot_are_noticed_though_the_manifest_has_them(folder):
    NormStats(Stats([0.0], [1.0]), FIELD).save(folder / "norm_stats.json")
    raw = (folder / "norm_stats.json").read_bytes()
    entry = {"sha256": hashlib.sha256(raw).hexdigest(), "bytes": len(raw)}
    edit(folder / "manifest.json", lambda data: data["files"].update({"norm_stats.json": entry}))
    with pytest.raises(CheckpointError, match=f"state: statistics of 1 numbers for a robot of {JOINTS} joints"):
        load_bundle(folder)


def test_a_file_slipped_in_beside_the_tokenizer_is_noticed(folder):
    (folder / "tokenizer/added_tokens.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer/added_tokens.json not in manifest.json"):
        load_bundle(folder)
    (folder / "tokenizer/added_tokens.json").unlink()
    (folder / "training.log").write_text("other files may lie there")
    load_bundle(folder)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("config.json", lambda d: d.pop("format"), "format is none, this version reads 'pi0_ros/1'"),
        (
            "config.json",
            lambda d: d.update(format="pi0_ros/2"),
            "format is 'pi0_ros/2', this version reads 'pi0_ros/1'",
        ),
        ("config.json", lambda d: d.update(surprise=1), "unknown field surprise"),
        ("config.json", lambda d: d.pop("loss_dims"), "missing field loss_dims"),
        ("config.json", lambda d: d.update(model=3), "model must be a mapping of sizes|model: "),
        ("config.json", lambda d: d["model"].update(action_dim=0), "action_dim must be a whole number"),
        ("config.json", lambda d: d["model"]["vlm"].update(width="wide"), "width must be a whole number"),
        ("manifest.json", lambda d: d.update(format=None), "format is None, this version reads"),
        ("manifest.json", lambda d: d.update(files=[]), "'files' must be a mapping"),
        ("manifest.json", lambda d: d["files"].update(x={"sha256": 1, "bytes": 2}), "'files' must be a mapping"),
        ("manifest.json", lambda d: d["files"].pop("model.safetensors"), "does not list model.safetensors"),
        ("manifest.json", lambda d: d["files"].pop("config.json"), "does not list config.json"),
        ("manifest.json", lambda d: d["files"].update(x={"sha256": "1", "bytes": "2"}), "'files' must be a mapping"),
    ],
)
def test_a_config_or_manifest_of_another_form_is_one_clear_error(folder, file, change, message):
    edit(folder / file, change)
    with pytest.raises(CheckpointError, match=message) as error:
        load_bundle(folder)
    assert file in one_line(error.value)


def test_a_robot_file_with_code_in_it_is_refused(folder):
    text = b"!!python/object/apply:os.system ['true']"
    (folder / "robot.yaml").write_bytes(text)
    entry = {"sha256": hashlib.sha256(text).hexdigest(), "bytes": len(text)}
    edit(folder / "manifest.json", lambda data: data["files"].update({"robot.yaml": entry}))
    with pytest.raises(CheckpointError, match="robot.yaml: not YAML") as error:
        load_bundle(folder)
    one_line(error.value)


def test_a_save_that_was_killed_between_two_renames_says_where_the_old_folder_is(folder):
    folder.rename(folder.with_name(".checkpoint.0123abcd.old"))
    with pytest.raises(CheckpointError, match=r"no such folder; .checkpoint.0123abcd.old beside it"):
        load_bundle(folder)


def test_a_sentencepiece_file_is_a_tokenizer_too(tmp_path):
    (tmp_path / "words.model").write_bytes(b"pieces")
    args = (random_weights(TINY), SETTINGS, ROBOT, STATS)
    save_bundle(tmp_path / "checkpoint", *args, tmp_path / "words.model")
    assert (load_bundle(tmp_path / "checkpoint").tokenizer / "words.model").read_bytes() == b"pieces"
    for wrong, message in ((tmp_path / "absent", "no such tokenizer"), (ROOT / "config", "holds no tokenizer files")):
        with pytest.raises(CheckpointError, match=message):
            save_bundle(tmp_path / "checkpoint", *args, wrong)


def test_a_folder_that_is_no_checkpoint_says_so(tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        load_bundle(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="not a checkpoint folder, it has no config.json"):
        load_bundle(tmp_path)
    save_bundle(tmp_path / "checkpoint", random_weights(TINY), SETTINGS, None, None)
    with pytest.raises(CheckpointError, match="did you mean .*/checkpoint\\?"):
        load_bundle(tmp_path)


def test_weights_of_ours_are_named_by_their_folder_and_no_others(folder, tmp_path):
    (tmp_path / "openpi").mkdir()
    (tmp_path / "openpi/model.safetensors").write_bytes(b"")
    ours, theirs = folder / "model.safetensors", tmp_path / "openpi/model.safetensors"
    assert (folder_of(ours), folder_of(theirs), folder_of(folder)) == (folder, theirs, folder)
