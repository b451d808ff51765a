"""record_demos: the teacher drives the demo robot, and every episode becomes a rosbag2 recording (mcap).

The messages, topics and rates are those that `ros2 bag record` would find on the demo robot's graph: compressed
images, joint states, trajectories as commanded, the prompt, and the episode's marks. Written in-process, faster than
real time, one bag an episode, on all cores; the same seed gives the same episode.
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import cv2
import numpy as np
import tyro
from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.typesys import Stores, get_typestore
from tqdm import tqdm

from pi0_ros.demo.assets import AssetError, light_meshes
from pi0_ros.demo.scene import CUBES, JOINTS, prompt_for
from pi0_ros.demo.simulation import PERIOD, TIME_LIMIT, Observation, Simulation
from pi0_ros.demo.teacher import Teacher
from pi0_ros.model.files import write_json
from pi0_ros.robot import Robot
from pi0_ros.robot_file import RobotFileError, config_folder, load_robot

STATE_PERIODS = 2  # controller periods between two joint states: 50 Hz
BEGIN_NS = 1_767_225_600 * 10**9  # stamps start here; episodes lie a minute apart
SETTINGS = "recording.json"
JPEG = [cv2.IMWRITE_JPEG_QUALITY, 95]


@dataclass(frozen=True)
class Options:
    """Record demonstrations of the scripted teacher as rosbag2 bags (mcap), one bag an episode."""

    output: Path
    """Folder for the bags; whole episodes that are there already are kept."""
    episodes: int = 200
    """How many episodes the folder shall hold."""
    seed: int = 100_000
    """Seed of the first scene; the next has the next seed. The demo itself uses seeds from 0."""
    width: int = 320
    """Width of the images, pixels."""
    height: int = 240
    """Height of the images, pixels."""
    rate: float = 20.0
    """Images a second from each camera, Hz."""
    cubes: int = 3
    """How many cubes stand on the table. Each scene comes once for every cube on it, so that nothing but the prompt
    tells which one is meant; one cube is for learning to see."""
    processes: Annotated[int, tyro.conf.arg(help_behavior_hint="(0: one a core)")] = 0
    """Worker processes."""


class RecordingError(RuntimeError):
    """What was asked for cannot be recorded; the message is one line with the way out."""


class EpisodeWriter:
    """Writes one episode's messages into a bag, as rosbag2 (version 9) stores them."""

    def __init__(self, writer: Writer, robot: Robot) -> None:
        self._writer, self._robot = writer, robot
        self._store = get_typestore(Stores.ROS2_KILTED)
        self._connections: dict[str, Any] = {}

    def text(self, topic: str, text: str, now: int) -> None:
        """A std_msgs/String."""
        self._write(topic, "std_msgs/msg/String", now, data=text)

    def joint_state(self, positions: np.ndarray, velocities: np.ndarray, now: int) -> None:
        """Positions [6] and velocities [6] as sensor_msgs/JointState."""
        self._write(
            self._robot.state.topics[0], "sensor_msgs/msg/JointState", now, header=self._header(now),
            name=list(JOINTS), position=positions, velocity=velocities, effort=np.zeros(0),
        )  # fmt: skip

    def images(self, observation: Observation) -> None:
        """Every image as sensor_msgs/CompressedImage (jpeg)."""
        for slot, image in observation.images.items():
            jpeg = cv2.imencode(".jpg", image[..., ::-1], JPEG)[1]
            topic = self._robot.present_cameras[slot].topic
            self._write(
                f"{topic}/compressed", "sensor_msgs/msg/CompressedImage", observation.stamp,
                header=self._header(observation.stamp, topic.split("/")[-2]), format="rgb8; jpeg compressed bgr8",
                data=jpeg.reshape(-1),
            )  # fmt: skip

    def command(self, positions: np.ndarray, seconds: float, now: int) -> None:
        """Be at positions [6] in `seconds`, as trajectory_msgs/JointTrajectory."""
        types = self._store.types
        due = types["builtin_interfaces/msg/Duration"](sec=0, nanosec=round(seconds * 1e9))
        point = types["trajectory_msgs/msg/JointTrajectoryPoint"](
            positions=positions, velocities=np.zeros(0), accelerations=np.zeros(0), effort=np.zeros(0),
            time_from_start=due,
        )  # fmt: skip
        self._write(
            self._robot.commands[0].topic, "trajectory_msgs/msg/JointTrajectory", now, header=self._header(now),
            joint_names=list(JOINTS), points=[point],
        )  # fmt: skip

    def _header(self, now: int, frame: str = "") -> Any:
        stamp = self._store.types["builtin_interfaces/msg/Time"](sec=now // 10**9, nanosec=now % 10**9)
        return self._store.types["std_msgs/msg/Header"](stamp=stamp, frame_id=frame)

    def _write(self, topic: str, kind: str, now: int, **fields: Any) -> None:
        if topic not in self._connections:
            self._connections[topic] = self._writer.add_connection(topic, kind, typestore=self._store)
        data = self._store.serialize_cdr(self._store.types[kind](**fields), kind)
        self._writer.write(self._connections[topic], now, data)


def demonstrate(
    simulation: Simulation, robot: Robot, writer: EpisodeWriter, size: tuple[int, int], rate: float
) -> bool:
    """One episode from the simulation's present state into `writer`; returns whether the teacher succeeded."""
    teacher = Teacher(simulation)
    begin = simulation.now
    ticks = round(robot.dt / PERIOD)
    # Cameras run on clocks of their own: their frames fall at another moment of the tick in every episode.
    frame_due = begin + round(np.random.default_rng([simulation.seed, 2]).uniform(0, 1 / rate) * 1e9)
    writer.text(robot.episode_topic, simulation.prompt, begin)
    writer.text(robot.prompt.topic, simulation.prompt, begin)
    period = 0
    while not teacher.done and simulation.now - begin < TIME_LIMIT * 1e9:
        if period % STATE_PERIODS == 0:
            writer.joint_state(simulation.positions, simulation.velocities, simulation.now)
        if simulation.now >= frame_due:
            writer.images(simulation.observe(size=size))
            frame_due += round(1e9 / rate)
        if period % ticks == 0:
            positions = teacher.act()
            simulation.command(positions, robot.dt)
            writer.command(positions, robot.dt, simulation.now)
        simulation.step(PERIOD)
        period += 1
    writer.text(robot.episode_topic, "", simulation.now)
    return simulation.outcome().success


class Recorder:
    """Makes episodes, one after the other, each a bag that takes its name when it is whole."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._robot = load_robot(config_folder() / "so101_demo.yaml")
        self._simulation = Simulation()

    def record(self, index: int) -> bool:
        """Episode `index` of the options; returns whether there is a bag now (a failed attempt leaves none)."""
        options, path = self._options, episode_path(self._options.output, index)
        partial = path.with_name(f".{path.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        self._simulation.now = BEGIN_NS + index * 60 * 10**9
        scene, named = divmod(index, options.cubes)
        seed = options.seed + scene
        cubes = np.random.default_rng([seed, 3]).permutation(CUBES)[: options.cubes]
        self._simulation.reset(seed, prompt_for(cubes[named]), cubes)
        with Writer(partial, version=9, storage_plugin=StoragePlugin.MCAP) as bag:
            writer = EpisodeWriter(bag, self._robot)
            success = demonstrate(self._simulation, self._robot, writer, (options.width, options.height), options.rate)
        if success:
            # rosbag2 names the storage file after its folder, which is the final one.
            rename_storage(partial, path.name)
            partial.rename(path)
        else:
            shutil.rmtree(partial)
        return success


def episode_path(output: Path, index: int) -> Path:
    """The bag of episode `index`."""
    return output / f"episode_{index:05d}"


def rename_storage(bag: Path, name: str) -> None:
    """Let the storage file inside `bag`, and the metadata that name it, follow the folder's new `name`."""
    old = next(bag.glob("*.mcap"))
    old.rename(bag / f"{name}.mcap")
    metadata = bag / "metadata.yaml"
    metadata.write_text(metadata.read_text().replace(old.name, f"{name}.mcap"))


def record(options: Options) -> list[int]:
    """Record what is missing of the episodes that `options` ask for; returns those in which the teacher failed.

    Raises:
        RecordingError: options or folder cannot be used.
        AssetError: the robot's model files cannot be had.
    """
    _check(options)
    light_meshes()  # once, before the workers would all do it
    wanted = [i for i in range(options.episodes) if not episode_path(options.output, i).is_dir()]
    failed = []
    bar = tqdm(total=options.episodes, initial=options.episodes - len(wanted), unit="episode", desc="recording")
    with bar:
        for index, success in _results(options, wanted):
            bar.update()
            if not success:
                failed.append(index)
    return sorted(failed)


def _results(options: Options, wanted: list[int]) -> Iterator[tuple[int, bool]]:
    processes = min(options.processes or len(os.sched_getaffinity(0)), len(wanted))
    if processes <= 1:
        recorder = Recorder(options) if wanted else None
        for index in wanted:
            yield index, recorder.record(index)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, context, initializer=_start_worker, initargs=(options, os.getpid()))
    try:
        futures = {pool.submit(_work, index): index for index in wanted}
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_recorder: Recorder | None = None  # of a worker process


def _start_worker(options: Options, parent: int) -> None:
    global _recorder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no worker outlives its parent
        if os.getppid() != parent:
            os._exit(1)
    _recorder = Recorder(options)


def _work(index: int) -> bool:
    return _recorder.record(index)


def _check(options: Options) -> None:
    for name, low, high in (("episodes", 1, 10**5), ("seed", 0, 2**40), ("width", 16, 1920), ("height", 16, 1080),
                            ("rate", 1, 50), ("cubes", 1, 3), ("processes", 0, 512)):  # fmt: skip
        value = getattr(options, name)
        if not low <= value <= high:
            raise RecordingError(f"--{name}: found {value:g}, must be from {low} to {high}")
    settings = {name: getattr(options, name) for name in ("seed", "width", "height", "rate", "cubes")}
    path = options.output / SETTINGS
    if path.is_file():
        before = json.loads(path.read_text())
        if before != settings:
            raise RecordingError(f"{options.output} holds episodes recorded with {before}, asked for {settings}: "
                                 "use the same options or another --output")  # fmt: skip
    elif options.output.is_dir() and any(options.output.glob("episode_*")):
        raise RecordingError(f"{options.output} holds episodes but no {SETTINGS}: use another --output")
    else:
        options.output.mkdir(parents=True, exist_ok=True)
        write_json(path, settings)


def main(args: list[str] | None = None) -> None:
    """Command line."""
    options = tyro.cli(Options, args=args, prog="record_demos")
    try:
        failed = record(options)
    except (RecordingError, AssetError, RobotFileError, OSError) as error:
        sys.exit(f"error: {error}")
    except BrokenProcessPool:
        sys.exit("error: a worker process died (out of memory?): run the same command again, with fewer --processes")
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    print(f"{sum(1 for _ in options.output.glob('episode_*'))} episodes in {options.output}")
    if failed:
        print(f"left out, because the teacher failed: episodes {', '.join(map(str, failed))}")


if __name__ == "__main__":
    main()
