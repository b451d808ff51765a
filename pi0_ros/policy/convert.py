"""Turn a checkpoint of any known layout into a checkpoint folder, or into openpi's PyTorch layout."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro

from pi0_ros.model.checkpoint import Checkpoint, open_checkpoint, save_openpi
from pi0_ros.model.config import PRESETS, ConfigError, Pi0Config
from pi0_ros.model.files import CheckpointError, read_json, write_json
from pi0_ros.model.infer import config_kind
from pi0_ros.policy.bundle import (
    CONFIG,
    WEIGHTS,
    Bundle,
    BundleSettings,
    folder_of,
    is_bundle,
    load_bundle,
    misfit,
    save_bundle,
    whole_folder,
)
from pi0_ros.policy.statistics import NormStats, find_statistics, load_statistics
from pi0_ros.policy.tokenizer import ByteTokenizer
from pi0_ros.policy.transforms import limit_statistics
from pi0_ros.robot import Robot
from pi0_ros.robot_file import RobotFileError, load_robot
from pi0_ros.wording import told

DTYPES = {"as-stored": None, "bfloat16": torch.bfloat16, "float32": torch.float32}
_LEROBOT_NORMALISATION = {"MEAN_STD": "zscore", "QUANTILES": "quantile"}


@dataclass
class Options:
    """Turn a checkpoint of any known layout into a checkpoint folder of this package, or into openpi's layout.

    Known: openpi's PyTorch and JAX checkpoints, lerobot's pi0 and pi05, transformers' PI0, peft adapters of these, and
    our own. The layout is recognised from the weights.
    """

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """Folder, .safetensors file, or openpi's orbax checkpoint."""
    output: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUTPUT")]
    """The folder to write. A checkpoint folder that stands there is replaced, anything else is an error."""
    to: Literal["pi0_ros", "openpi"] = "pi0_ros"
    """The layout to write."""
    robot: Path | None = None
    """Robot file to put into the folder. Without one it can be trained from, but not run."""
    statistics: Path | None = None
    """norm_stats.json, or a folder with statistics. Default: those found with the weights."""
    asset_id: str | None = None
    """Which of openpi's assets: of several robots' statistics to read, or to write for openpi."""
    tokenizer: Path | None = None
    """Folder with the tokenizer's files, or a SentencePiece .model file, to put into the folder."""
    dtype: Literal["as-stored", "bfloat16", "float32"] = "as-stored"
    """Dtype of the weights to write."""
    model_config: str | None = None
    """The model's sizes where neither the weights nor a config.json tell them: a preset's name, or a JSON file."""
    horizon: int | None = None
    """Actions of a chunk, which is in no weights. Default: what config.json says, else 50; openpi's pi0_droid and
    pi05_libero have 10, pi05_droid 15."""
    base: Path | None = None
    """The checkpoint that a peft adapter folder is an update of."""
    normalisation: Literal["zscore", "quantile"] | None = None
    """How statistics are used. Default: what the source says, else zscore for pi0 and quantile for pi0.5."""
    prompt_format: Literal["pi0", "pi05", "lerobot_pi05"] | None = None
    """How the prompt is written. Default: the source's. openpi's pi05_libero is pi0.5 with pi0's prompt."""
    adapter: Literal["none", "aloha"] | None = None
    """ALOHA's joint flips and gripper curves, for openpi's ALOHA checkpoints. Default: the source's, or none."""


class UnknownNormalisation(CheckpointError):
    """A lerobot checkpoint whose statistics are used in a way that is not known here."""


def convert(options: Options) -> str:
    """Do what the options ask for, telling what was recognised; returns the new folder's digest ("" for openpi's).

    Raises:
        CheckpointError, RobotFileError: see `open_checkpoint`, `save_bundle`, `load_statistics`, `load_robot`.
    """
    source = folder_of(options.source)
    if options.output.resolve() == source.resolve():
        raise CheckpointError(f"{options.output}: is the source itself; name another folder")
    own = load_bundle(source, verify_weights=True) if is_bundle(source) else None
    config = _given_config(options.model_config)
    checkpoint = own.weights() if own else open_checkpoint(source, config=config, base=options.base)
    print(checkpoint.describe())
    if options.horizon is not None:
        checkpoint = _with_horizon(checkpoint, options.horizon)
    for note in (*checkpoint.notes, *foreign_notes(checkpoint)):
        print(f"  {note}")
    robot = load_robot(options.robot) if options.robot else (own.robot if own else None)
    if own and own.robot and robot and (faults := own.robot.contradictions(robot)):
        raise CheckpointError(
            f"{source}: trained for another robot than {options.robot}: {'; '.join(faults)}; for that one, convert "
            "what it was made from"
        )
    if robot is not None:
        check_actions(checkpoint, robot, str(source))
    stats = _statistics(options, own)
    print("  statistics: " + ("none found" if stats is None else _describe(stats)))
    if options.to == "openpi":
        for note in beyond_openpi(own.settings) if own else ():
            print(f"  warning: {note}")
        write_openpi(options.output, checkpoint, stats, options.asset_id or "pi0_ros", DTYPES[options.dtype], True)
        print(f"{options.output}: openpi's layout")
        return ""
    if own:
        settings = own.settings.with_model(checkpoint.config)
        if settings.rtc_max_delay < own.settings.rtc_max_delay:
            print(f"  rtc_max_delay: {settings.rtc_max_delay} instead of {own.settings.rtc_max_delay}, by the horizon")
    else:
        settings = foreign_settings(checkpoint, str(source), options.normalisation)
    wanted = {name: getattr(options, name) for name in ("normalisation", "prompt_format", "adapter")}
    settings = dataclasses.replace(settings, **{name: value for name, value in wanted.items() if value is not None})
    if robot is not None and (fault := misfit(settings, robot)):
        raise CheckpointError(fault)
    for note in foreign_units(robot, stats, settings) if robot and stats else ():
        print(f"  warning: {note}")
    tokenizer = options.tokenizer or (own.tokenizer if own else None)
    if tokenizer is None and settings.model.vocab_size != ByteTokenizer.vocab_size:
        print("  no tokenizer: add one with --tokenizer before this checkpoint can run")
    dtype = DTYPES[options.dtype]
    digest = save_bundle(options.output, checkpoint, settings, robot, stats, tokenizer, dtype=dtype, progress=True)
    print(f"{options.output}: checkpoint {digest}")
    return digest


def beyond_openpi(settings: BundleSettings) -> list[str]:
    """What openpi would do otherwise than a policy of ours with these settings: its folders have no place for them."""
    usual = BundleSettings(settings.model)
    told = {
        "noise_source": "it samples from white noise",
        "rtc_max_delay": "it conditions on no prefix of actions",
        "prompt_format": f"it writes prompts as {usual.prompt_format}, unless its config says otherwise",
        "normalisation": f"it takes {usual.normalisation}, unless its config says otherwise",
        "adapter": "its config must say adapt_to_pi",
    }
    return [
        f"openpi's layout has no place for {name} {value}: {consequence}"
        for name, consequence in told.items()
        if (value := getattr(settings, name)) != getattr(usual, name)
    ]


def foreign_settings(checkpoint: Checkpoint, where: str, normalisation: str | None = None) -> BundleSettings:
    """How the weights of another layout are to be used, from its config.json.

    lerobot tells its normalisation and trains the robot's own action dimensions only; the others follow openpi.

    Raises:
        CheckpointError: config.json makes no sense, or asks for what is not here.
    """
    config, data = checkpoint.config, checkpoint.data
    if config_kind(data) != "lerobot":
        return BundleSettings(config, normalisation=normalisation or "")
    mapping, dims = data.get("normalization_mapping") or {}, _action_dims(checkpoint, where)
    try:
        said = {mapping[key] for key in ("STATE", "ACTION") if key in dict(mapping)}
    except (TypeError, ValueError, LookupError):
        raise CheckpointError(f"{where}: config.json: normalization_mapping makes no sense") from None
    if normalisation is None and said:
        if len(said) > 1 or not said <= set(_LEROBOT_NORMALISATION):
            found = ", ".join(sorted(map(str, said)))
            raise UnknownNormalisation(
                f"{where}: normalization_mapping is {found} for state and actions; MEAN_STD or QUANTILES for both is "
                "known here; say --normalisation to use other statistics"
            )
        normalisation = _LEROBOT_NORMALISATION[said.pop()]
    delay = data.get("rtc_training_max_delay") or 0
    if memory := [key for key in ("use_visual_memory", "use_proprioceptive_memory") if data.get(key)]:
        raise CheckpointError(f"{where}: config.json: {', '.join(memory)}: policies with a memory cannot run here")
    return BundleSettings(
        config,
        rtc_max_delay=min(delay, config.action_horizon - 1) if isinstance(delay, int) else delay,
        prompt_format="lerobot_pi05" if _pads_state(checkpoint) else "pi05" if config.pi05 else "pi0",
        normalisation=normalisation or "",
        loss_dims=None if dims == config.action_dim else dims,
    )


def _pads_state(checkpoint: Checkpoint) -> bool:
    """Whether lerobot wrote zeros behind the robot's own joints into pi0.5's prompt, as up to 0.4.4. A config.json of
    0.5.0 looks the same, later ones say whether actions are relative."""
    return checkpoint.config.pi05 and "use_relative_actions" not in checkpoint.data


def foreign_notes(checkpoint: Checkpoint) -> list[str]:
    """What a checkpoint of lerobot or transformers saw in training and will not see here."""
    if checkpoint.layout == "transformers":
        return [
            "transformers' own processor resizes images bicubically, pads them with grey at bottom and right, and "
            "cleans no prompts; here it is done as in openpi, which made the published weights"
        ]
    if checkpoint.layout != "lerobot":
        return []
    notes = [
        "bars beside images are at -3 in lerobot (up to 0.4.4), here at -1; square images have none",
        "lerobot shrinks images without antialiasing, here they come out smoother, as in openpi",
    ]
    if not checkpoint.config.pi05:
        notes.append('lerobot cleans no prompts of pi0, here outer white space goes and "_" becomes a space')
    elif _pads_state(checkpoint):
        notes.append(
            "zeros stand behind the state in prompts, as lerobot up to 0.4.4 wrote them; weights that lerobot 0.5.0 "
            "trained, or openpi, want --prompt-format pi05 of `convert`"
        )
    return notes


def check_actions(checkpoint: Checkpoint, robot: Robot, where: str) -> None:
    """CheckpointError where the robot file would take a lerobot policy's actions for something else: they are absolute
    positions unless its config.json says use_relative_actions. openpi's checkpoints say nothing about it."""
    if checkpoint.layout != "lerobot":
        return
    dims = _action_dims(checkpoint, where)
    if dims not in (len(robot.joints), checkpoint.config.action_dim):
        raise CheckpointError(
            f"{where}: lerobot trained it on {dims} actions, but {robot.name!r} has {len(robot.joints)} joints; the "
            "robot file must have the joints that it was trained on, in their order"
        )
    trained = _relative_dims(checkpoint.data, len(robot.joints), where)
    other = [(joint.name, to) for joint, to in zip(robot.joints, trained, strict=True) if joint.relative != to]
    if other:
        ways = [
            f"`action: {kind}` for {', '.join(name for name, to in other if to == relative)}"
            for kind, relative in (("relative", True), ("absolute", False))
            if any(to == relative for _, to in other)
        ]
        raise CheckpointError(
            f"{where}: lerobot and {robot.name!r} differ in which actions are added to the state; "
            f"set {' and '.join(ways)}"
        )


def _action_dims(checkpoint: Checkpoint, where: str) -> Any:
    features = checkpoint.data.get("output_features") or {}
    try:
        return features["action"]["shape"][0] if "action" in dict(features) else checkpoint.config.action_dim
    except (TypeError, ValueError, LookupError):
        raise CheckpointError(f"{where}: config.json: output_features make no sense") from None


def _relative_dims(data: Mapping[str, Any], joints: int, where: str) -> list[bool]:
    """Which action dimensions lerobot made relative: all, but for those whose name holds a word of the excluded ones;
    names that it did not know exclude nothing (lerobot: processor/relative_action_processor.py)."""
    if not data.get("use_relative_actions"):
        return [False] * joints
    given = {"action_feature_names": data.get("action_feature_names") or []}
    given["relative_exclude_joints"] = data.get("relative_exclude_joints", ["gripper"]) or []
    for key, value in given.items():
        if not isinstance(value, list):
            raise CheckpointError(f"{where}: config.json: {key} must be a list of names, found {value!r:.80}")
    names, excluded = ([str(name).lower() for name in value] for value in given.values())
    relative = [not any(word and word in name for word in excluded) for name in names[:joints]]
    return relative + [True] * (joints - len(relative))


def foreign_units(robot: Robot, stats: NormStats, settings: BundleSettings) -> list[str]:
    """What speaks for statistics in other units than the robot file's: a mean state further outside a joint's limits
    than half their width, such as degrees, percent, or a gripper that is not 0 (open) to 1 (closed)."""
    stats.require(settings.normalisation, len(robot.joints))
    limits = limit_statistics(robot, settings).state
    means = stats.state.mean[: len(robot.joints)]
    away = np.abs(means - limits.mean) > limits.q99 - limits.q01
    return [
        f"state of {robot.joints[i].name}: mean {means[i]:.4g} in the statistics, limits {limits.q01[i]:.4g} to "
        f"{limits.q99[i]:.4g} in the robot file: other units? actions would be wrong"
        for i in np.flatnonzero(away)
    ]


def write_openpi(
    folder: Path,
    checkpoint: Checkpoint,
    stats: NormStats | None,
    asset_id: str = "pi0_ros",
    dtype: torch.dtype | None = None,
    progress: bool = False,
) -> None:
    """A folder as openpi's own JAX-to-PyTorch conversion leaves it: model.safetensors, config.json, assets/.

    Raises:
        CheckpointError: the folder exists and is not empty, or the asset's name leads out of it.
    """
    folder = Path(folder).absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder}: exists and is not empty; name another")
    if Path(asset_id).is_absolute() or ".." in Path(asset_id).parts:
        raise CheckpointError(f"asset id {asset_id!r} leads out of the folder")
    config = checkpoint.config
    known = {PRESETS["pi0"].vlm: "gemma_2b", PRESETS["pi0"].expert: "gemma_300m"}
    data: dict[str, Any] = {
        "action_dim": config.action_dim,
        "action_horizon": config.action_horizon,
        "paligemma_variant": known.get(config.vlm),
        "action_expert_variant": known.get(config.expert),
        "precision": str(dtype or checkpoint.dtype).removeprefix("torch."),
        "model": config.to_dict(),  # ours: all sizes, so that the way back needs no guess
    }
    with whole_folder(folder) as temporary:
        save_openpi(checkpoint, temporary / WEIGHTS, dtype, progress)
        write_json(temporary / CONFIG, data)
        if stats is not None:
            asset = temporary / "assets" / asset_id
            asset.mkdir(parents=True)
            stats.save(asset / "norm_stats.json")


def _with_horizon(checkpoint: Checkpoint, horizon: int) -> Checkpoint:
    try:
        config = dataclasses.replace(checkpoint.config, action_horizon=horizon)
    except ConfigError as error:
        raise CheckpointError(f"--horizon: {error}") from None
    notes = tuple(note for note in checkpoint.notes if not note.startswith("horizon of "))  # no longer assumed
    return dataclasses.replace(checkpoint, config=config, notes=notes)


def _statistics(options: Options, own: Bundle | None) -> NormStats | None:
    if options.statistics:
        return load_statistics(options.statistics, options.asset_id)
    if own:
        return own.stats
    return find_statistics(options.source if options.source.is_dir() else options.source.parent, options.asset_id)


def _describe(stats: NormStats) -> str:
    quantiles = "no quantiles" if stats.state.q01 is None or stats.actions.q01 is None else "quantiles"
    constant = stats.constant()
    flat = f"; (almost) never changed in the data: {', '.join(constant)}" if constant else ""
    return f"state of {len(stats.state)}, actions of {len(stats.actions)}, {quantiles}{flat}"


def _given_config(name: str | None) -> Pi0Config | None:
    if name is None:
        return None
    if name in PRESETS:
        return PRESETS[name]
    if not Path(name).is_file():
        raise CheckpointError(f"model config {name!r} is no file and no preset ({', '.join(PRESETS)})")
    data = read_json(Path(name))
    try:
        return Pi0Config.from_dict(data.get("model", data))
    except ConfigError as error:
        raise CheckpointError(f"{name}: {error}") from None


def main() -> None:
    """`convert SOURCE OUTPUT [options]`."""
    options = tyro.cli(Options, prog="convert")
    try:
        convert(options)
    except (CheckpointError, RobotFileError, OSError) as error:
        print(f"error: {told(error)}", file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
