"""What a training run can be told, with the defaults of openpi where it has them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
import yaml


class OptionsError(ValueError):
    """Options that do not go together; the message names the option, the value and the way out."""


@dataclass(frozen=True)
class TrainOptions:
    """Train a pi0 or pi0.5 policy from recorded bags."""

    bags: Path
    """A recording, or a folder of recordings."""
    robot: Path
    """The robot file that the recordings were made with."""
    output: Path
    """Folder of this run: checkpoint/ (what policy_node loads), state/ (to resume from), logs, plots."""
    preset: Literal["nano", "nano05", "pi0", "pi05"] = "nano"
    """Sizes of the model; not used with --init."""
    init: Path | None = None
    """Checkpoint to begin from, in any layout that convert reads; without it weights are random."""
    horizon: int | None = None
    """Actions of a chunk; None: the preset's or the checkpoint's."""
    steps: int = 30_000
    """Optimizer steps of the whole run."""
    batch: int = 32
    """Samples of one optimizer step on one process."""
    accumulate: int = 1
    """Pieces that a batch is worked through in, to save memory; the result is the same."""
    learning_rate: float | None = None
    """Peak; None: 2.5e-5 with --init (openpi), 1e-3 from random weights."""
    final_learning_rate: float = 0.1
    """What the cosine ends at, as a share of the peak."""
    warmup: int = 1000
    """Steps of linear warm-up (at most a tenth of --steps)."""
    weight_decay: float = 1e-10
    """Of AdamW."""
    clip: float = 1.0
    """Largest global norm of the gradient."""
    ema: float = 0.99
    """Decay of the averaged weights, which are what is exported; 0: none."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the arithmetic; weights, averages and the optimizer stay float32."""
    device: str = "auto"
    """torch device: auto, cpu, cuda."""
    augment: bool = True
    """Random crops, rotations and colours of the images."""
    loss_dims: Literal["real", "all"] = "real"
    """Over which action dimensions the loss is averaged: the robot's own, or all of the model's, padding included
    (openpi). The default spends nothing on dimensions that are cut off anyway, and its value means the same for
    every robot."""
    noise: Literal["white", "pink", "cold"] = "white"
    """What the flow starts from; recorded in the checkpoint."""
    noise_beta: float = 1.0
    """Pink noise: power falls as 1 / f^beta along the chunk."""
    cold: Literal["smooth", "downsample", "mask"] = "smooth"
    """Cold start: how the trajectory is degraded."""
    cold_strength: float = 0.8
    """Cold start: from 0, not at all, to 1."""
    rtc_max_delay: int = 0
    """Prefix conditioning for real-time chunking: each sample keeps 0 to this many first actions clean."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""
    held_out: float = 0.05
    """Share of the episodes kept for evaluation."""
    seed: int = 42
    """Of everything random: order, augmentation, noise, time, first weights."""
    prompt: str | None = None
    """The instruction of every episode, instead of the recorded one."""
    cache: Path | None = None
    """Folder for decoded frames; None: .pi0_cache beside the bags."""
    save_every: int = 1000
    """Steps between two saved states."""
    evaluate_every: int = 1000
    """Steps between two looks at the held-out loss."""
    minutes: float = 0.0
    """Stop after this time and export, whatever step was reached; 0: no limit."""
    jobs: int | None = None
    """Processes that decode; None: one a core."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "accumulate", "save_every", "evaluate_every"):
            if getattr(self, name) < 1:
                raise OptionsError(f"--{name.replace('_', '-')} must be at least 1, found {getattr(self, name)}")
        if self.batch % self.accumulate:
            raise OptionsError(f"--batch {self.batch} must be a multiple of --accumulate {self.accumulate}")
        if not 0 <= self.ema < 1:
            raise OptionsError(f"--ema must be from 0 to below 1, found {self.ema}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for YAML."""
        values = dataclasses.asdict(self)
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}

    @property
    def peak(self) -> float:
        """The learning rate after warm-up."""
        return self.learning_rate or (2.5e-5 if self.init else 1e-3)


def parse(arguments: list[str] | None = None) -> TrainOptions:
    """Options from the command line, over those of a YAML file given with --config.

    Raises:
        OptionsError: the file cannot be read or holds an unknown option, or options do not go together.
    """
    import sys

    arguments = list(sys.argv[1:] if arguments is None else arguments)
    defaults: dict[str, Any] = {}
    if "--config" in arguments:
        at = arguments.index("--config")
        if at + 1 >= len(arguments):
            raise OptionsError("--config needs a YAML file")
        defaults = _read(Path(arguments[at + 1]))
        del arguments[at : at + 2]
    for name, value in defaults.items():
        flag = "--" + name.replace("_", "-")
        if value is None or any(a == flag or a.startswith(flag + "=") for a in arguments):
            continue
        if isinstance(value, bool):
            arguments.append(flag if value else "--no-" + flag[2:])
        else:
            arguments += [flag, str(value)]
    return tyro.cli(TrainOptions, prog="train", args=arguments)


def _read(path: Path) -> dict[str, Any]:
    try:
        data = yaml.safe_load(path.read_text())
    except OSError as error:
        raise OptionsError(f"--config {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError):
        raise OptionsError(f"--config {path}: not YAML") from None
    if not isinstance(data, dict):
        raise OptionsError(f"--config {path}: must hold a mapping of options")
    known = [field.name for field in dataclasses.fields(TrainOptions)]
    if unknown := sorted(set(data) - set(known)):
        raise OptionsError(
            f"--config {path}: unknown option {', '.join(map(str, unknown))}, allowed: {', '.join(known)}"
        )
    return data
