"""What a run begins from: a checkpoint of any layout, or random weights of a preset's size."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from pi0_ros.model.checkpoint import Checkpoint, open_checkpoint
from pi0_ros.model.config import PRESETS
from pi0_ros.model.flow import Cold, NoiseSource, Pink, White, noise_source_from_dict
from pi0_ros.model.pi0 import Pi0
from pi0_ros.policy.bundle import BundleSettings, is_bundle, load_bundle, misfit
from pi0_ros.policy.convert import UnknownNormalisation, foreign_notes, foreign_settings
from pi0_ros.policy.tokenizer import ByteTokenizer
from pi0_ros.robot import Robot
from pi0_ros.training.lora import add_lora
from pi0_ros.training.objective import keep_float32, mute_padding
from pi0_ros.training.options import OptionsError, TrainOptions
from pi0_ros.training.parts import freeze

FROM_SCRATCH = ("nano", "nano05")  # presets that a robot's own recordings can train from random weights


@dataclass(frozen=True)
class Start:
    """Settings of the checkpoint to be, the weights to begin with (None: random), and a tokenizer to travel along."""

    settings: BundleSettings
    checkpoint: Checkpoint | None
    tokenizer: Path | None
    notes: tuple[str, ...]

    def model(self, options: TrainOptions) -> Pi0:
        """The model in float32, with the parts frozen and the updates added that the options ask for."""
        config = self.settings.model
        if self.checkpoint:
            model = self.checkpoint.model(torch.float32, progress=True)
            model.config = config  # the horizon is not in the weights
        else:
            model = Pi0(config, generator=torch.Generator().manual_seed(options.seed))
        if self.settings.loss_dims is not None:
            mute_padding(model, self.settings.loss_dims)
        freeze(model, options.freeze)
        if options.lora:
            add_lora(model, options.lora, options.seed)
        keep_float32(model)
        model.set_gradient_checkpointing(options.gradient_checkpointing)
        if options.compile:
            model.compile_layers()
        return model.train()


def start(options: TrainOptions, robot: Robot) -> Start:
    """The beginning that the options describe.

    Raises:
        CheckpointError: `--init` cannot be read.
        OptionsError: model and robot do not go together.
    """
    notes: list[str] = []
    checkpoint = tokenizer = None
    if options.init:
        settings, checkpoint, tokenizer = _from_checkpoint(options.init, robot, notes)
    else:
        settings = BundleSettings(PRESETS[options.preset])
        if options.preset not in FROM_SCRATCH:
            notes.append(
                f"warning: --preset {options.preset} without --init trains {options.preset} from random weights; "
                "published weights (--init) are what makes that size worth its cost"
            )
    if options.horizon:
        settings = settings.with_model(replace(settings.model, action_horizon=options.horizon))
    _require_fit(options, settings, robot)
    if settings.rtc_max_delay and not options.rtc_max_delay:
        notes.append(
            f"warning: {options.init} was trained for real-time chunking, with a delay of up to "
            f"{settings.rtc_max_delay}; without --rtc-max-delay that is not kept up"
        )
    source = noise_source(options, settings)
    if options.init and source.to_dict() != dict(settings.noise_source):
        notes.append(f"warning: {options.init} was trained with noise source {dict(settings.noise_source)}")
    settings = replace(
        settings,
        noise_source=source.to_dict(),
        rtc_max_delay=options.rtc_max_delay,
        loss_dims=len(robot.joints) if _real(options, settings) else None,
        trained_steps=0,
    )
    tokenizer = options.tokenizer or tokenizer
    if tokenizer is None and settings.model.vocab_size != ByteTokenizer.vocab_size:
        raise OptionsError(
            f"a model of {settings.model.vocab_size} tokens needs the tokenizer it was made for: give --tokenizer, a "
            "folder with its files or a SentencePiece .model"
        )
    return Start(settings, checkpoint, tokenizer, tuple(notes))


def _real(options: TrainOptions, settings: BundleSettings) -> bool:
    if options.loss_dims is None:
        return settings.loss_dims is not None or not options.init
    return options.loss_dims == "real"


def _from_checkpoint(path: Path, robot: Robot, notes: list[str]) -> tuple[BundleSettings, Checkpoint, Path | None]:
    if is_bundle(path):
        bundle = load_bundle(path)
        if bundle.robot is not None and (faults := bundle.robot.contradictions(robot)):
            notes.append(f"{path} was trained for another robot: {'; '.join(faults)}")
        checkpoint, settings, tokenizer = bundle.weights(), bundle.settings, bundle.tokenizer
    else:
        checkpoint = open_checkpoint(path)
        notes += foreign_notes(checkpoint)
        try:
            settings = foreign_settings(checkpoint, str(path))
        except UnknownNormalisation:  # only in what way: the statistics are new in any case
            settings = foreign_settings(checkpoint, str(path), "quantile")
            notes.append(f"{path}: its normalisation is not known here, quantile is used instead")
        folder = path if path.is_dir() else path.parent
        beside = (folder / "tokenizer.json").is_file() or len(list(folder.glob("*.model"))) == 1
        tokenizer = folder if beside else None
    notes[:0] = [f"{path}: {checkpoint.describe()}", *checkpoint.notes]
    notes.append("normalisation statistics are taken from these recordings anew, those of --init are not used")
    return settings, checkpoint, tokenizer


def _require_fit(options: TrainOptions, settings: BundleSettings, robot: Robot) -> None:
    if fault := misfit(settings, robot):
        raise OptionsError(fault)
    delay, horizon = options.rtc_max_delay, settings.model.action_horizon
    if delay >= horizon:
        raise OptionsError(f"--rtc-max-delay {delay} must be below the horizon, {horizon} actions")


def noise_source(options: TrainOptions, settings: BundleSettings) -> NoiseSource:
    """The noise source that the options ask for, by default the checkpoint's."""
    if options.noise == "pink":
        return Pink(options.noise_beta)
    if options.noise == "cold":
        return Cold(options.cold, options.cold_strength)
    if options.noise == "white":
        return White()
    return noise_source_from_dict(dict(settings.noise_source))
