"""make train-demo: record the teacher, train a nano pi0 on the bags from scratch, evaluate it open loop.

Seeing, choosing, acting and joining are learned one after the other, each from recordings that need just that. Told all
at once on three cubes, a small network finds its joints a better guide than its cameras, and stops looking. Joining
makes it go on from what the arm will have done when a chunk arrives (real-time chunking).

What is there already in the output folder is kept: episodes that were recorded, and the training from its last state.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from pi0_ros.demo import record
from pi0_ros.robot_file import config_folder
from pi0_ros.training import evaluate, train
from pi0_ros.training.build import cores


@dataclass(frozen=True)
class Stage:
    """One run of the trainer, from where the stage before ended."""

    name: str
    bags: str  # folder below bags/
    steps: int
    options: tuple[str, ...] = ()


# Folder of recordings -> cubes on the table, first seed, episodes.
SCENES = {"one": (1, 300_000, 1400), "two": (2, 200_000, 1600), "three": (3, 100_000, 1800)}
EPISODES = sum(episodes for _, _, episodes in SCENES.values())
STAGES = (
    Stage("seeing", "one", 1200, ("--first-seconds", "0.6")),
    Stage("choosing", "two", 5000, ("--first-seconds", "0.5")),
    Stage("acting", "", 6000, ("--batch", "64", "--accumulate", "2")),
    Stage("joining", "", 1600, ("--learning-rate", "4e-4", "--warmup", "50", "--rtc-max-delay", "10")),
)
TRAINING = ("--horizon", "20", "--draws", "2", "--learning-rate", "1e-3", "--warmup", "100", "--ema", "0.998")
TRAINING += ("--no-augment", "--evaluate-every", "500", "--save-every", "500")


@dataclass(frozen=True)
class Options:
    """Record demonstrations, train a nano pi0 on them from scratch, and evaluate it.

    Options that are not listed here go to train, for example --noise pink or --batch 16.
    """

    output: Path = Path("train_demo_output")
    """Folder for bags, runs and evaluation; the same command goes on where it was interrupted."""
    bags: Path | None = None
    """Where the recordings are or go; None: bags/ in the output folder."""
    episodes: int = EPISODES
    """How many episodes the teacher records, with one, two and three cubes on the table together."""
    steps: tuple[int, int, int, int] = tuple(stage.steps for stage in STAGES)
    """Optimizer steps of each stage; a stage of 0 is left out."""


def run(options: Options, train_options: Sequence[str] = ()) -> int:
    """All of it, one after the other; the exit code of the first part that failed, or 0."""
    if min(options.steps) < 0 or not any(options.steps):
        print(f"error: --steps: none below 0 and one above it, found {options.steps}", file=sys.stderr)
        return 1
    robot, output = config_folder() / "so101_demo.yaml", options.output
    bags = options.bags or output / "bags"
    cache = ("--cache", str(bags / ".pi0_cache"))
    parts: dict[str, Callable[[], int]] = {}
    for name, (cubes, seed, episodes) in SCENES.items():
        words = ["--output", str(bags / name), "--cubes", str(cubes), "--seed", str(seed), "--rate", "10"]
        words += ["--episodes", str(max(1, round(episodes * options.episodes / EPISODES)))]
        parts[f"recording {name}"] = lambda words=words: _record(words)
    before: tuple[str, ...] = ("--preset", "nano")
    for stage, steps in zip(STAGES, options.steps, strict=True):
        if not steps:
            continue
        words = ["--bags", str(bags / stage.bags), "--robot", str(robot), "--output", str(output / stage.name)]
        words += [*before, "--steps", str(steps), *cache, *TRAINING]
        parts[stage.name] = lambda words=(*words, *stage.options, *train_options): train.main(list(words))
        trained = output / stage.name / "checkpoint"
        before = ("--init", str(trained))
    parts["evaluation"] = lambda: evaluate.main(
        ["--bags", str(bags), "--checkpoint", str(trained), *cache, "--output", str(output / "evaluation")]
    )
    took = {}
    for name, part in parts.items():
        print(f"--- {name}")
        began = time.monotonic()
        if code := part():
            return code
        took[name] = time.monotonic() - began
    told = ", ".join(f"{name} {seconds / 60:.1f} min" for name, seconds in took.items())
    print(f"took on {cores()} cores: {told}; together {sum(took.values()) / 60:.1f} min")
    print(f'see it act: make demo DEMO="--checkpoint {trained}"')
    return 0


def _record(words: list[str]) -> int:
    """In a process of its own, so that the simulation's memory is free for training."""
    return subprocess.run([sys.executable, "-m", record.__name__, *words], check=False).returncode


def main() -> int:
    """Command line."""
    options, others = tyro.cli(Options, prog="train_demo", return_unknown_args=True)
    return run(options, others)


if __name__ == "__main__":
    sys.exit(main())
