"""What a training run can be told, with the defaults of openpi where it has them."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import tyro
import yaml

from pi0_ros.policy.bundle import folder_of


class OptionsError(RuntimeError):  # of a ValueError tyro would make a box of its own
    """Options that do not go together; the message names the option, the value and the way out."""


def require_at_least(options: Any, **least: float) -> None:
    """OptionsError for the first of these options that is below its least value, NaN or infinite; None is no value."""
    for name, allowed in least.items():
        value = getattr(options, name)
        if value is not None and not allowed <= value < math.inf:
            raise OptionsError(f"--{name.replace('_', '-')} must be at least {allowed}, found {value}")


@dataclass(frozen=True)
class TrainOptions:
    """Train a pi0 or pi0.5 policy from recorded bags.

    --config FILE takes options from a YAML file, such as options.yaml of an earlier run; the command line has the last
    word. The same command goes on where it was interrupted.
    """

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
    tokenizer: Path | None = None
    """Folder with a tokenizer's files, or a SentencePiece .model file; None: the checkpoint's; nano reads bytes."""
    horizon: int | None = None
    """Actions of a chunk; None: the preset's or the checkpoint's."""
    steps: int = 30_000
    """Optimizer steps of the whole run."""
    batch: int = 32
    """Samples of one optimizer step, over all processes together."""
    accumulate: int = 1
    """Micro-batches per process and step (gradient accumulation) that a batch is worked through in, to save memory."""
    draws: int = 1
    """Noises and times that each sample of a batch is trained at in one step; the prefix is computed once for all."""
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
    freeze: tuple[Literal["vision", "vlm", "expert"], ...] = ()
    """Parts that keep their weights: vision (tower and projector), vlm (language model), expert (action expert). The
    projections of state, actions and time are always trained."""
    lora: tuple[Literal["vlm", "expert"], ...] = ()
    """Parts that keep their weights and learn a low-rank update of attention and MLP instead, as openpi's: rank 16 for
    the vlm, 32 for the expert. The update is merged into the checkpoint."""
    first_seconds: float = 0.0
    """Samples begin only in the first seconds of each episode, where it is still open what comes; 0: everywhere."""
    augment: bool = True
    """Random crops, rotations and colours of the images."""
    loss_dims: Literal["real", "all"] | None = None
    """The action dimensions that the loss is averaged over. all: every one of the model's, padding included, which is
    how published weights were trained (openpi). real: the robot's own; padding is muted, so that a small model spends
    nothing on it. None: as --init was trained; from random weights, real."""
    noise: Literal["white", "pink", "cold"] | None = None
    """What the flow starts from; recorded in the checkpoint. None: what --init was trained with, else white."""
    noise_beta: float = 1.0
    """Pink noise: power falls as 1 / f^beta along the chunk."""
    cold: Literal["smooth", "downsample", "mask"] = "smooth"
    """Cold start: how the trajectory is degraded."""
    cold_strength: float = 0.8
    """Cold start: how much is lost, above 0 and at most 1."""
    rtc_max_delay: int = 0
    """Prefix conditioning for real-time chunking: each sample keeps 0 to this many first actions clean; 0: none."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""
    compile: bool = False
    """Compile the layers (torch.compile): some 40 s at the start, and each step takes less."""
    shard: bool = False
    """Of several processes each keeps a slice of weights, gradients, optimizer and average (FSDP2), not all of them."""
    held_out: float = 0.05
    """Share of the episodes kept for evaluation."""
    seed: int = 42
    """Of everything random: order, augmentation, noise, time, first weights."""
    prompt: str | None = None
    """The instruction of every episode, instead of the recorded one."""
    idle: float = 0.005
    """Start and end of an episode are trimmed until a joint moves by this share of its range; 0: not at all."""
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
        if self.init:
            object.__setattr__(self, "init", folder_of(self.init))
        require_at_least(
            self, steps=1, batch=1, accumulate=1, draws=1, save_every=1, evaluate_every=1, horizon=1, jobs=1
        )
        require_at_least(self, first_seconds=0, idle=0, warmup=0, weight_decay=0, minutes=0, seed=0, rtc_max_delay=0)
        for name in ("ema", "held_out"):
            self._require(name, 0 <= getattr(self, name) < 1, "must be from 0 to below 1")
        self._require("clip", self.clip > 0, "must be above 0")
        self._require("learning_rate", self.learning_rate is None or self.learning_rate > 0, "must be above 0")
        self._require("final_learning_rate", 0 <= self.final_learning_rate <= 1, "must be from 0 to 1")
        self._require("noise_beta", 0 <= self.noise_beta <= 4, "must be from 0 to 4")
        self._require("cold_strength", 0 < self.cold_strength <= 1, "must be above 0 and at most 1")
        for name, source, kind in (
            ("noise_beta", "pink", "pink noise"),
            ("cold", "cold", "a cold start"),
            ("cold_strength", "cold", "a cold start"),
        ):
            value = getattr(self, name)
            if self.noise != source and value != getattr(type(self), name):
                flag = name.replace("_", "-")
                raise OptionsError(f"--{flag} {value} is of {kind}: give --noise {source}, too")
        if both := set(self.freeze) & set(self.lora):
            raise OptionsError(f"--freeze and --lora both name {', '.join(sorted(both))}: choose one for each part")
        if self.lora and not self.init:
            raise OptionsError("--lora needs --init: a low-rank update of random weights learns nothing")

    def _require(self, name: str, fine: bool, rule: str) -> None:
        if not fine:
            raise OptionsError(f"--{name.replace('_', '-')} {rule}, found {getattr(self, name)}")

    def parts(self, ranks: int = 1) -> int:
        """Pieces that one optimizer step consists of, over all processes. OptionsError if the batch does not divide."""
        parts = ranks * self.accumulate
        if self.batch % parts:
            raise OptionsError(
                f"--batch {self.batch} must be a multiple of processes x --accumulate, {ranks} x {self.accumulate}"
            )
        return parts

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for YAML."""
        return {name: _plain(value) for name, value in dataclasses.asdict(self).items()}

    @property
    def peak(self) -> float:
        """The learning rate after warm-up."""
        return self.learning_rate or (2.5e-5 if self.init else 1e-3)

    @property
    def warmup_steps(self) -> int:
        """Steps of warm-up."""
        return min(self.warmup, self.steps // 10)


# What a resumed run may be told anew; its numbers do not depend on it. Recordings and robot file are compared by
# content, accumulate by the number of pieces.
FREE = {"bags", "robot", "output", "cache", "jobs", "save_every", "evaluate_every", "minutes", "device"}
FREE |= {"accumulate", "shard", "compile"}

RESOLVED = "resolved"  # beside the options in options.yaml: for people to read; a run that goes on resolves anew


def changed_fields(was: str, now: str, most: int = 4) -> str:
    """Which fields differ between two robot files, YAML, with both values; the first few of them."""

    def leaves(value: Any, at: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
        if items is None:
            yield ".".join(at), value
        for key, below in items or ():
            yield from leaves(below, (*at, str(key)))

    before, after = (dict(leaves(yaml.safe_load(text))) for text in (was, now))
    fields = [name for name in dict.fromkeys([*before, *after]) if before.get(name) != after.get(name)]
    more = [f"and {len(fields) - most} more"] if len(fields) > most else []
    return ", ".join([*(f"{name} (was {before.get(name)}, now {after.get(name)})" for name in fields[:most]), *more])


def require_same(saved: dict[str, Any], now: dict[str, Any]) -> None:
    """OptionsError naming every option whose change would give a resumed run other numbers."""
    changed = [name for name in now if name not in FREE and not _same(name, saved.get(name), now[name])]
    if changed:
        told = ", ".join(f"--{n.replace('_', '-')} (was {saved.get(n)}, now {now[n]})" for n in changed)
        checkpoint = Path(now["output"]) / "checkpoint"
        further = changed == ["steps"] and checkpoint.is_dir()
        longer = f" and --init {checkpoint} to go on from its weights" if further else ""
        raise OptionsError(
            f"a run goes on with the options it began with; changed: {told}. Use another --output{longer}"
        )


def _same(name: str, before: Any, now: Any) -> bool:
    both_paths = name in ("init", "tokenizer") and before and now
    return before == now or bool(both_paths and Path(before).resolve() == Path(now).resolve())


def parse(arguments: list[str] | None = None) -> TrainOptions:
    """Options from the command line, over those of a YAML file given with --config.

    Raises:
        OptionsError: the file cannot be read, holds an unknown option or a value that is none of its option, or
            options do not go together. A wrong value on the command line is tyro's to tell, as in every program.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    given = [argument.partition("=")[0] for argument in arguments]
    if "--config" in given:
        at = given.index("--config")
        path = arguments[at].partition("=")[2] or (arguments[at + 1] if at + 1 < len(arguments) else "")
        if not path:
            raise OptionsError("--config needs a YAML file")
        del arguments[at : at + (1 if "=" in arguments[at] else 2)]
        for name, value in _read(Path(path)).items():
            if not {"--" + name.replace("_", "-"), "--no-" + name.replace("_", "-")} & {
                g.replace("_", "-") for g in given
            }:
                arguments += _flag(name, value)
    return tyro.cli(TrainOptions, prog="train", args=arguments)


def _flag(name: str, value: Any) -> list[str]:
    flag = "--" + name.replace("_", "-")
    if value is None:
        return []
    if isinstance(value, bool):
        return [flag if value else "--no-" + flag[2:]]
    if isinstance(value, list):
        return [flag, *map(str, value)] if value else []
    return [f"{flag}={value}"]


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path) else value


def _read(path: Path) -> dict[str, Any]:
    try:
        data = yaml.safe_load(path.read_text())
    except OSError as error:
        raise OptionsError(f"--config {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError):
        raise OptionsError(f"--config {path}: not YAML") from None
    if not isinstance(data, dict):
        raise OptionsError(f"--config {path}: must hold a mapping of options, found {str(data)[:60]!r}")
    data.pop(RESOLVED, None)
    known = [field.name for field in dataclasses.fields(TrainOptions)]
    if unknown := sorted(set(data) - set(known)):
        raise OptionsError(
            f"--config {path}: unknown option {', '.join(map(str, unknown))}, allowed: {', '.join(known)}"
        )
    types = get_type_hints(TrainOptions)
    for name, value in data.items():
        if value is not None and (rule := _broken_rule(value, types[name])):
            raise OptionsError(f"--config {path}: {name} must be {rule}, found {value!r}")
    return data


def _broken_rule(value: Any, kind: Any) -> str:
    """What a value of an option of this type must be, if this one is not; else ""."""
    if get_origin(kind) in (Union, UnionType):
        (kind,) = (k for k in get_args(kind) if k is not NoneType)  # no option has more than one type and None
    if get_origin(kind) is tuple:
        rules = [_broken_rule(one, get_args(kind)[0]) for one in (value if isinstance(value, list) else [value])]
        return next((f"one or more of {rule.removeprefix('one of ')}" for rule in rules if rule), "")
    if get_origin(kind) is Literal:
        return "" if value in get_args(kind) else f"one of {', '.join(get_args(kind))}"
    if kind is bool:
        return "" if isinstance(value, bool) else "true or false"
    try:
        if isinstance(value, bool) or not isinstance(value, (str, int, float)):
            raise ValueError
        kind(str(value))
    except ValueError:
        return {int: "a whole number", float: "a number", str: "text", Path: "a path"}[kind]
    return ""
