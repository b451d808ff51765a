"""make train-demo: record the teacher, train a nano pi0 on the bags from scratch, evaluate it open loop.

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
from pi0_ros.robot import config_folder
from pi0_ros.training import evaluate, train
from pi0_ros.training.build import cores


@dataclass(frozen=True)
class Options:
    """Record demonstrations, train a nano pi0 on them from scratch, and evaluate it.

    Options that are not listed here go to train, for example --noise pink or --rtc-max-delay 5.
    """

    output: Path = Path("train_demo_output")
    """Folder for bags, run and evaluation; the same command goes on where it was interrupted."""
    episodes: int = 200
    """How many episodes the teacher records."""
    steps: int = 20_000
    """Optimizer steps."""
    minutes: float = 0.0
    """Stop training after this time, whatever step was reached; 0: no limit."""


def run(options: Options, train_options: Sequence[str] = ()) -> int:
    """All three, one after the other; the exit code of the first that failed, or 0."""
    robot, output = config_folder() / "so101_demo.yaml", options.output
    bags, trained = output / "bags", output / "run"
    stages: dict[str, Callable[[], int]] = {
        "recording": lambda: _record(["--output", str(bags), "--episodes", str(options.episodes)]),
        "training": lambda: train.main(
            ["--bags", str(bags), "--robot", str(robot), "--output", str(trained), "--preset", "nano"]
            + ["--steps", str(options.steps), "--minutes", str(options.minutes), *train_options]
        ),
        "evaluation": lambda: evaluate.main(
            ["--bags", str(bags), "--checkpoint", str(trained / "checkpoint"), "--output", str(output / "evaluation")]
        ),
    }
    took = {}
    for name, stage in stages.items():
        print(f"--- {name}")
        began = time.monotonic()
        if code := stage():
            return code
        took[name] = time.monotonic() - began
    told = ", ".join(f"{name} {seconds / 60:.1f} min" for name, seconds in took.items())
    print(f"took on {cores()} cores: {told}; together {sum(took.values()) / 60:.1f} min")
    print(f'see it act: make demo DEMO="--checkpoint {trained / "checkpoint"}"')
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
