"""How hand-overs fare when inference is slow: the demo at several latencies and with each way to join chunks.

Everything is measured from the messages of the run: the trajectories that went to the controller, the player's status,
the chunks, the outcome of the episodes. Leaves bench_output/realtime.json and the table in docs/realtime.md.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import rclpy
import tyro
from tqdm import tqdm

from pi0_ros.demo import run as demo
from pi0_ros.demo.monitor import DemoFailed
from pi0_ros.demo.motion import Motion, measure
from pi0_ros.demo.processes import ProcessDied, Processes, end_on_signals
from pi0_ros.demo.summary import Episode, versions
from pi0_ros.model.files import write_json, write_text
from pi0_ros.policy.bundle import load_bundle
from pi0_ros.robot_file import config_folder
from pi0_ros.ros.domain import Domain, NoFreeDomainError
from pi0_ros.wording import told

BEGIN, END = "<!-- realtime: begin -->", "<!-- realtime: end -->"
# name -> handover of chunk_player, realtime_chunking of policy_node
METHODS = {
    "switch": ("switch", "never"),
    "blend": ("blend", "never"),
    "ensemble": ("ensemble", "never"),
    "guided": ("blend", "guided"),
    "trained-in": ("blend", "auto"),
}


@dataclass(frozen=True)
class Options:
    """Measure hand-overs in the demo with inference slowed on purpose."""

    latencies: tuple[float, ...] = (0.05, 0.1, 0.2, 0.4)
    """Seconds added to every inference."""
    episodes: int = 5
    """Episodes for each latency and method."""
    seed: int = 0
    """The first episode's seed."""
    rate: float = 5.0
    """Chunks per second asked for, Hz."""
    checkpoint: str = ""
    """Checkpoint folder; empty: the policy that ships."""
    methods: tuple[str, ...] = ()
    """Only these."""
    output: Path = Path("bench_output")
    """Where realtime.json and the recordings go."""
    table: Path = Path("docs/realtime.md")
    """The file whose table is replaced."""


@dataclass(frozen=True)
class Cell:
    """One method at one latency, over all episodes."""

    method: str
    latency: float  # s, added
    inference: float  # s, median from observation to chunk
    episodes: int
    successes: int
    seconds: float  # median of the episodes' lengths
    step: float  # rad, largest step of the commanded position between two control periods
    velocity_jump: float  # rad/s, largest change of the commanded velocity within one action of a hand-over
    velocity_jump_p50: float  # the same, median over the hand-overs
    jerk: float  # rad/s^3, root mean square
    held: float  # s an episode, after it had begun to move
    approached: float  # s an episode
    outcomes: list[str]  # of the episodes, in order


class Rehearsal(demo.Demo):
    """The demo with a recording of everything but images, and no film."""

    def _film(self, stack: ExitStack) -> None:
        pass

    def _recorded_topics(self) -> dict[str, tuple[type, bool]]:
        seen = {f"{camera.topic}/compressed" for camera in self.robot.present_cameras.values()} | {demo.MARKERS}
        return {topic: kind for topic, kind in super()._recorded_topics().items() if topic not in seen}


def run_cell(options: Options, method: str, latency: float, environment: dict[str, str]) -> Cell:
    """One method at one latency. Raises DemoFailed or ProcessDied."""
    handover, keep = METHODS[method]
    name = re.sub(r"[^a-z]+", "_", method).strip("_")
    run_options = demo.Options(
        episodes=options.episodes,
        seed=options.seed,
        checkpoint=options.checkpoint,
        rate=options.rate,
        recorded_episodes=options.episodes + 1,
        policy_parameters=(f"extra_latency:={float(latency)}", f"realtime_chunking:={keep}"),
        player_parameters=(f"handover:={handover}",),
        output=options.output / "realtime" / f"{name}_{round(1000 * latency)}ms",
    )
    shutil.rmtree(run_options.output, ignore_errors=True)
    run_options.output.mkdir(parents=True)
    rehearsal = Rehearsal(run_options, config_folder())
    with Processes(run_options.output / "logs", environment) as processes:
        rehearsal.start(processes)
        episodes = rehearsal.run(processes)
    motions = measure(run_options.output / "bag", rehearsal.robot)[-len(episodes) :]  # the first began before the demo
    return summarise(method, latency, episodes, [motion for motion in motions if motion is not None])


def summarise(method: str, latency: float, episodes: list[Episode], motions: list[Motion]) -> Cell:
    """The figures of one cell."""
    if not motions:
        raise DemoFailed(f"{method} at {latency:g} s: nothing was commanded in any episode")
    jumps = [jump for motion in motions for jump in motion.velocity_jumps]
    return Cell(
        method=method,
        latency=latency,
        inference=float(np.median([seconds for motion in motions for seconds in motion.inference])),
        episodes=len(episodes),
        successes=sum(episode.success for episode in episodes),
        seconds=float(np.median([episode.seconds for episode in episodes])),
        step=max(motion.step for motion in motions),
        velocity_jump=max(jumps, default=0.0),
        velocity_jump_p50=float(np.median(jumps)) if jumps else 0.0,
        jerk=float(np.sqrt(np.mean([motion.jerk**2 for motion in motions]))),
        held=float(np.mean([motion.held for motion in motions])),
        approached=float(np.mean([motion.approached for motion in motions])),
        outcomes=[episode.reason for episode in episodes],
    )


def chosen_methods(options: Options, checkpoint: Path) -> list[str]:
    """What can be measured with the policy at hand. ValueError for what cannot."""
    if unknown := [method for method in options.methods if method not in METHODS]:
        raise ValueError(f"--methods: found {', '.join(unknown)}, allowed: {', '.join(METHODS)}")
    trained = load_bundle(checkpoint).settings.rtc_max_delay > 0
    if "trained-in" in options.methods and not trained:
        raise ValueError(f"--methods trained-in: {checkpoint} was not trained with --rtc-max-delay")
    asked = options.methods or tuple(method for method in METHODS if trained or method != "trained-in")
    return [method for method in METHODS if method in asked]


def table(cells: list[Cell], policy: str) -> str:
    """The cells in Markdown."""
    names = "method, latency added, inference p50, success, time p50, largest step, velocity jump p50, max, RMS jerk"
    columns = [*names.split(", "), "held", "approached"]
    rows = [
        (
            c.method,
            f"{1000 * c.latency:.0f} ms",
            f"{1000 * c.inference:.0f} ms",
            f"{c.successes}/{c.episodes}",
            f"{c.seconds:.1f} s",
            f"{1000 * c.step:.1f} mrad",
            f"{c.velocity_jump_p50:.2f} rad/s",
            f"{c.velocity_jump:.2f} rad/s",
            f"{c.jerk:.0f} rad/s³",
            f"{c.held:.2f} s",
            f"{c.approached:.2f} s",
        )
        for c in cells
    ]
    rule = ["---"] + ["---:"] * (len(columns) - 1)
    lines = [f"| {' | '.join(row)} |" for row in (columns, rule, *rows)]
    return "\n".join([f"Policy: {policy}.", "", *lines])


def fill(path: Path, text: str) -> None:
    """Replace what stands between the markers of `path`. ValueError where they are missing."""
    page = path.read_text(encoding="utf-8")
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{path}: the markers {BEGIN} and {END} are not there")
    write_text(path, f"{before}{BEGIN}\n{text}\n{END}{after}")


def run(options: Options) -> None:
    """Measure all cells; what is there is written after each."""
    if options.episodes < 1 or not options.latencies or min(options.latencies) < 0 or max(options.latencies) > 5:
        raise ValueError("--episodes must be at least 1, --latencies from 0 to 5 s")
    checkpoint = Path(options.checkpoint) if options.checkpoint else config_folder() / "demo_policy"
    methods = chosen_methods(options, checkpoint)
    fill_later = options.table.exists()
    policy = f"{options.checkpoint or 'the one that ships'}; {options.episodes} episodes a row, "
    policy += f"{options.rate:g} chunks a second asked for"
    cells: list[Cell] = []
    with ExitStack() as stack:
        domain = stack.enter_context(Domain())
        os.environ.update(domain.environment())
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        rclpy.init(args=[], signal_handler_options=rclpy.signals.SignalHandlerOptions.NO)
        stack.callback(rclpy.try_shutdown)
        todo = [(method, latency) for method in methods for latency in options.latencies]
        for method, latency in tqdm(todo, desc="rows", unit="row"):
            cells.append(run_cell(options, method, latency, environment))
            data: dict[str, Any] = {"policy": policy, "seed": options.seed, "versions": versions()}
            data["rows"] = [dataclasses.asdict(cell) for cell in cells]
            write_json(options.output / "realtime.json", data)
    text = table(cells, policy)
    print(text)
    if fill_later:
        fill(options.table, text)


def main() -> int:
    """The program; 1 and one line when it could not measure, 130 on Ctrl-C."""
    end_on_signals()
    try:
        run(tyro.cli(Options, prog="realtime"))
    except KeyboardInterrupt:
        return 130
    except (DemoFailed, ProcessDied, NoFreeDomainError, ValueError, OSError) as error:
        print(f"error: {told(error)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
