"""The main job from one command: simulated SO-101, policy_node and chunk_player over ROS 2, headless.

Starts them, and the visualiser, as processes in a ROS domain of their own, runs episodes, and leaves a summary,
pictures, a film and a recording in the output folder. Exits 0 when the system worked; how well the policy did is
reported, not required.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import rclpy
import tyro
from diagnostic_msgs.msg import DiagnosticArray
from sensor_msgs.msg import CompressedImage, JointState
from std_msgs.msg import String
from tqdm import tqdm
from trajectory_msgs.msg import JointTrajectory
from visualization_msgs.msg import Marker, MarkerArray

from pi0_ros.demo.monitor import DemoFailed, Monitor
from pi0_ros.demo.pictures import Line, Moment, Reel, contact_sheet, film
from pi0_ros.demo.processes import ProcessDied, Processes, end_on_signals
from pi0_ros.demo.recorder import RECORDED_QOS, BagRecorder
from pi0_ros.demo.summary import Episode, rms_jerk, spread, success_rates, versions
from pi0_ros.model.files import write_json
from pi0_ros.msg import ActionChunk, PlayerStatus
from pi0_ros.robot import Robot
from pi0_ros.robot_file import config_folder, load_robot
from pi0_ros.ros.conversions import stamp_ns
from pi0_ros.ros.domain import Domain, NoFreeDomainError
from pi0_ros.wording import told

MARKERS = "/visualiser/markers"
MOVED = 0.05  # rad: an arm whose joints all stay within this has not moved


@dataclass(frozen=True)
class Options:
    """Run the demo: a simulated SO-101 is driven from its cameras by pi0, over ROS 2."""

    episodes: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 10
    """How many episodes to run."""
    seed: int = 0
    """The first episode's seed; each next one adds 1."""
    checkpoint: str = ""
    """Checkpoint folder; empty: the policy that ships with the package, or random weights where there is none."""
    random: bool = False
    """Random weights even if a policy ships."""
    prompt: str = ""
    """The task of every episode, for example "touch the red cube"; empty: drawn from the seed."""
    instruction: str = ""
    """What the policy is told instead of the task (a control: does it listen?); {other} names another colour."""
    rate: float = 5.0
    """Chunks per second, Hz; 0: as fast as the policy can."""
    num_steps: int = 10
    """Denoising steps."""
    recorded_episodes: int = 3
    """How many of the first episodes go into the bag, the film and the contact sheet."""
    policy_parameters: tuple[str, ...] = ()
    """Further parameters of policy_node, as name:=value."""
    player_parameters: tuple[str, ...] = ()
    """Further parameters of chunk_player, as name:=value."""
    output: Path = Path("demo_output")
    """Where results go; an earlier run's are replaced."""


class Demo:
    """One run. `album` gathers what the pictures are made of."""

    def __init__(self, options: Options, config: Path) -> None:
        self.options = options
        self.robot_file = config / "so101_demo.yaml"
        self.robot: Robot = load_robot(self.robot_file)
        shipped = config / "demo_policy"
        self.checkpoint = options.checkpoint
        if not self.checkpoint and not options.random and (shipped / "config.json").exists():
            self.checkpoint = str(shipped)
        self.album: list[Reel] = []
        self._images: dict[str, bytes] = {}
        self._joints: dict[str, float] = {}
        self._lines: dict[str, Line] = {}  # marker namespace -> what it shows now
        self._began = 0.0
        self._filming = False
        self.ages: list[float] = []
        self.monitor: Monitor | None = None

    def start(self, processes: Processes) -> None:
        """Start the nodes."""
        robot_file = ("-p", f"robot_file:={self.robot_file}")
        processes.start("demo_robot", "pi0_ros.demo.robot_node")
        processes.start(
            "policy_node",
            "pi0_ros.ros.policy_node",
            *("--ros-args", *robot_file, "-p", "autostart:=true", "-p", f"checkpoint:='{self.checkpoint}'"),
            *("-p", f"rate:={float(self.options.rate)}", "-p", f"num_steps:={self.options.num_steps}"),
            *(part for pair in self.options.policy_parameters for part in ("-p", pair)),
        )
        processes.start(
            "chunk_player",
            "pi0_ros.ros.chunk_player",
            *("--ros-args", *robot_file, "-p", "autostart:=true", "-p", "play_untrained:=true"),
            *(part for pair in self.options.player_parameters for part in ("-p", pair)),
        )
        processes.start("visualiser", "pi0_ros.ros.visualiser", "--ros-args", *robot_file)

    def run(self, processes: Processes) -> list[Episode]:
        """All episodes; raises DemoFailed or ProcessDied when the system does not work."""
        options = self.options
        self.monitor = monitor = Monitor(self.robot.prompt.topic, processes.check, self._heard_chunk)
        with ExitStack() as stack:
            stack.callback(monitor.destroy_node)
            monitor.until(lambda: monitor.seen.player is not None, 60, "chunk_player to speak")
            recorder = BagRecorder(monitor, options.output / "bag", self._recorded_topics())
            recording = ExitStack()
            stack.enter_context(recording)
            recording.callback(recorder.close)
            self._film(recording)
            monitor.stop_player()
            monitor.until(lambda: monitor.seen.chunks > 0, 60, "an action chunk from policy_node")
            if self._filming:
                monitor.until(lambda: self._lines, 20, "the visualiser to show an action chunk")
            episodes: list[Episode] = []
            with tqdm(total=options.episodes, desc="episodes", unit="episode") as bar:
                for i in range(options.episodes):
                    if i == options.recorded_episodes:
                        recording.close()  # nobody looks at the compressed images any more: none are made
                        self._filming = False
                    episodes.append(self._episode(options.seed + i))
                    bar.set_postfix(successes=sum(e.success for e in episodes))
                    bar.update()
            monitor.stop_player()
            # the last words of the nodes, for the counters
            before = monitor.seen.diagnostics
            monitor.seen.diagnostics = {}
            monitor.until(lambda: "policy_node: policy" in monitor.seen.diagnostics, 10, "diagnostics of policy_node")
            monitor.seen.diagnostics = {**before, **monitor.seen.diagnostics}
        if max(e.moved for e in episodes) < MOVED:
            raise DemoFailed(f"the arm never moved: no joint went farther than {MOVED} rad in any episode")
        return episodes

    def _episode(self, seed: int) -> Episode:
        monitor, options, chunks = self.monitor, self.options, self.monitor.seen.chunks
        instruction = options.instruction
        if "{other}" in instruction:
            instruction = instruction.replace("{other}", _other_colour(seed, options.prompt))
        task = monitor.begin_episode(seed, options.prompt, instruction)
        self._began = time.monotonic()
        if self._filming:
            self._images.clear()
            self.album.append(Reel(f"seed {seed}, {instruction or task}", []))
        monitor.until(lambda: monitor.seen.chunks > chunks, 10, "an action chunk from policy_node")
        deadline = time.monotonic() + 60
        while not (outcome := monitor.outcome()).done:
            pause = time.monotonic() + 0.1
            monitor.until(lambda until=pause: time.monotonic() > until, 5, "time to pass")
            if time.monotonic() > deadline:
                raise DemoFailed(f"the episode of seed {seed} does not end: {outcome.reason}")
        if self._filming:
            self.album[-1].ending = outcome.reason
        seen = monitor.seen
        moved = 0.0 if seen.lowest is None else float((seen.highest - seen.lowest).max())
        return Episode(
            seed, outcome.prompt, instruction or task, outcome.success, outcome.reason, outcome.seconds,
            outcome.closest, moved, round(rms_jerk(seen.stamps, seen.velocities), 2),
        )  # fmt: skip

    # What is recorded and filmed

    def _recorded_topics(self) -> dict[str, tuple[type, bool]]:
        robot, topics = self.robot, {}
        for camera in robot.present_cameras.values():
            topics[f"{camera.topic}/compressed"] = (CompressedImage, False)
        topics |= {topic: (JointState, False) for topic in robot.state.topics}
        topics |= {command.topic: (JointTrajectory, False) for command in robot.commands}
        topics |= {
            robot.prompt.topic: (String, True),
            robot.episode_topic: (String, True),
            "/action_chunk": (ActionChunk, False),
            "/chunk_player/status": (PlayerStatus, True),
            "/diagnostics": (DiagnosticArray, False),
            MARKERS: (MarkerArray, False),
        }
        return topics

    def _film(self, stack: ExitStack) -> None:
        monitor, self._filming = self.monitor, True
        base = next(iter(self.robot.present_cameras))
        for slot, camera in self.robot.present_cameras.items():

            def seen(message: CompressedImage, slot: str = slot) -> None:
                self._images[slot] = bytes(message.data)
                if slot == base:
                    self._snap()

            subscription = monitor.create_subscription(
                CompressedImage, f"{camera.topic}/compressed", seen, RECORDED_QOS
            )
            stack.callback(monitor.destroy_subscription, subscription)

        def joints(message: JointState) -> None:
            self._joints.update(zip(message.name, message.position, strict=False))

        heard = ((JointState, self.robot.state.topics[0], joints), (MarkerArray, MARKERS, self._draw))
        for kind, topic, callback in heard:
            subscription = monitor.create_subscription(kind, topic, callback, RECORDED_QOS)
            stack.callback(monitor.destroy_subscription, subscription)

    def _snap(self) -> None:
        names, slots = self.robot.joint_names, self.robot.present_cameras
        if not self.album or self.album[-1].ending or not all(slot in self._images for slot in slots):
            return
        if all(name in self._joints for name in names):
            joints = np.array([self._joints[name] for name in names])
            moment = Moment(time.monotonic() - self._began, dict(self._images), joints, tuple(self._lines.values()))
            self.album[-1].moments.append(moment)

    def _draw(self, array: MarkerArray) -> None:
        for marker in array.markers:
            if marker.type == Marker.LINE_STRIP and marker.action == Marker.ADD:
                points = np.array([(p.x, p.y, p.z) for p in marker.points])
                self._lines[marker.ns] = Line(points, np.array([(c.r, c.g, c.b, c.a) for c in marker.colors]))
            else:
                self._lines.pop(marker.ns, None)

    def _age(self, chunk: ActionChunk) -> float:
        now = self.monitor.get_clock().now().nanoseconds
        return (now - stamp_ns(chunk.header.stamp)) / 1e9

    def _heard_chunk(self, chunk: ActionChunk) -> None:
        if chunk.horizon:
            self.ages.append(self._age(chunk))

    def summary(self, episodes: list[Episode]) -> dict[str, object]:
        """Everything of summary.json."""
        seen = self.monitor.seen
        node = seen.diagnostics.get("policy_node: policy", {})
        return {
            "episodes": len(episodes),
            "successes": sum(e.success for e in episodes),
            "success_rate": round(sum(e.success for e in episodes) / len(episodes), 4),
            "per_prompt": success_rates(episodes),
            "ticks": int(node.get("ticks", 0)),
            "chunks_published": seen.chunks,
            "chunks_played": int(seen.player.chunks_played),
            "chunks_refused": int(seen.player.chunks_refused),
            "prefix_reused": seen.prefix_reused,
            "chunks_continued": seen.continued,
            "holds": int(seen.player.holds),
            "deadline_misses": int(node.get("deadline_misses", 0)),
            "tick_latency_ms": spread(seen.tick_latency),
            "observation_age_ms": spread(self.ages),
            "jerk_p50": float(np.median([e.jerk for e in episodes])),
            "checkpoint": self.checkpoint or "random",
            "digest": seen.checkpoint,
            "versions": versions(),
            "runs": [vars(e) for e in episodes],
        }


def _other_colour(seed: int, prompt: str) -> str:
    from pi0_ros.demo.scene import CUBES, build_model, draw_layout, named_cube

    task = named_cube(prompt or draw_layout(seed, build_model()).prompt)
    others = [cube for cube in CUBES if cube != task]
    return others[seed % len(others)]


def _table(summary: dict) -> str:
    latency, age = summary["tick_latency_ms"], summary["observation_age_ms"]
    rows = [
        ("checkpoint", "random weights: no trained policy, the arm moves without aim"
         if summary["checkpoint"] == "random" else f"{summary['checkpoint']} ({summary['digest']})"),
        ("episodes", f"{summary['successes']} of {summary['episodes']} succeeded ({summary['success_rate']:.0%})"),
        *((f"  {prompt}", f"{r['successes']} of {r['episodes']}") for prompt, r in summary["per_prompt"].items()),
        ("chunks", f"{summary['chunks_published']} published, {summary['chunks_played']} played, "
         f"{summary['chunks_refused']} refused, {summary['prefix_reused']} from a reused prefix, "
         f"{summary['chunks_continued']} that go on from the one before"),
        ("ticks", f"{summary['ticks']}, {summary['deadline_misses']} deadlines missed, {summary['holds']} holds"),
        ("tick latency", f"p50 {latency['p50']:.0f} ms, p95 {latency['p95']:.0f} ms, max {latency['max']:.0f} ms"),
        ("observation age", f"p50 {age['p50']:.0f} ms, p95 {age['p95']:.0f} ms, max {age['max']:.0f} ms at arrival"),
        ("executed jerk", f"{summary['jerk_p50']:.0f} rad/s³ RMS, median of the episodes"),
    ]  # fmt: skip
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)


def run(options: Options) -> None:
    """Run the demo; raises DemoFailed, ProcessDied or RobotFileError when the system does not work."""
    if options.episodes < 1:
        raise DemoFailed(f"--episodes must be at least 1, found {options.episodes}")
    if options.checkpoint and not Path(options.checkpoint).is_dir():
        raise DemoFailed(f"--checkpoint: no such folder: {options.checkpoint}")
    options.output.mkdir(parents=True, exist_ok=True)
    for name in ("summary.json", "contact_sheet.png", "rollout.mp4"):
        (options.output / name).unlink(missing_ok=True)
    shutil.rmtree(options.output / "bag", ignore_errors=True)
    demo = Demo(options, config_folder())
    if not demo.checkpoint:
        print("No trained checkpoint: random weights. The system runs as it would, but the arm moves without aim.")
    with ExitStack() as stack:
        domain = stack.enter_context(Domain())
        os.environ.update(domain.environment())
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        processes = stack.enter_context(Processes(options.output / "logs", environment))
        demo.start(processes)
        rclpy.init(args=[], signal_handler_options=rclpy.signals.SignalHandlerOptions.NO)
        stack.callback(rclpy.try_shutdown)
        episodes = demo.run(processes)
    summary = demo.summary(episodes)
    reels = [reel for reel in demo.album if reel.moments]
    if reels:
        contact_sheet(reels, options.output / "contact_sheet.png")
        film(reels, options.output / "rollout.mp4", rate=_frame_rate(reels))
    write_json(options.output / "summary.json", summary)
    print(_table(summary))
    print(f"\n{options.output}/: summary.json, contact_sheet.png, rollout.mp4, bag/, logs/")


def _frame_rate(reels: list[Reel]) -> float:
    spans = [(len(r.moments) - 1) / (r.moments[-1].seconds - r.moments[0].seconds) for r in reels if len(r.moments) > 1]
    return round(float(np.median(spans)), 2) if spans else 10.0


def main() -> int:
    """The program; 1 and one line when the system did not work, 130 on Ctrl-C."""
    end_on_signals()
    options = tyro.cli(Options, prog="demo")
    try:
        run(options)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    except (DemoFailed, ProcessDied, NoFreeDomainError, ValueError, OSError) as error:
        print(f"error: {told(error)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
