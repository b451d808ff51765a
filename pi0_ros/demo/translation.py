"""One translation, checked: a recording played through policy_node gives the chunks that the trainer's reading gives.

policy_node runs in this process on the recording's clock, every chunk from the noise of one seed. Then each chunk is
computed again from the recording as the trainer reads it: the same alignment as for training samples, at the chunk's
own stamp. What differs between the two is a difference between training and the robot.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import rclpy
import torch
import tyro
from rclpy.executors import SingleThreadedExecutor
from rclpy.parameter import Parameter
from tqdm import tqdm

from pi0_ros.demo.replay import Message, Replay, open_bag
from pi0_ros.model.files import CheckpointError
from pi0_ros.msg import ActionChunk
from pi0_ros.policy.alignment import newest_indices
from pi0_ros.policy.policy import Policy, PolicyError, RobotObservation
from pi0_ros.policy.tokenizer import TokenizerError
from pi0_ros.robot import Robot
from pi0_ros.robot_file import RobotFileError, load_robot
from pi0_ros.ros.conversions import SECOND, chunk_actions, stamp_ns
from pi0_ros.ros.domain import Domain, NoFreeDomainError
from pi0_ros.ros.policy_node import PolicyNode
from pi0_ros.ros.qos import NEWEST
from pi0_ros.training.bags import Bag, BagError, decode
from pi0_ros.training.cache import image_messages, model_frame
from pi0_ros.training.episodes import observe_at, sorted_streams
from pi0_ros.training.recording import JOINT_STATE, STRING, Recording, read_recording
from pi0_ros.wording import told

SAME = 1e-3  # largest difference, as a share of a joint's range, that is rounding and not another input
PATIENCE = 10.0  # seconds for a message to reach the node


@dataclass(frozen=True)
class Options:
    """Play a recording through policy_node and compare its chunks with what the trainer makes of the recording."""

    bag: Annotated[Path, tyro.conf.Positional]
    """The recording: a rosbag2 folder, or an .mcap or .db3 file."""
    checkpoint: str = ""
    """Checkpoint folder; empty: random weights, which tell as well whether the inputs are the same."""
    robot: Path | None = None
    """The robot file; empty: the checkpoint's."""
    rate: float = 5.0
    """Chunks per recorded second, Hz."""
    seconds: float = 30.0
    """How much of the recording to play."""
    device: str = "auto"
    """torch device: auto, cpu, cuda."""


class CheckFailed(RuntimeError):  # noqa: N818
    """The two could not be compared; the message says why."""


@dataclass(frozen=True)
class Verdict:
    """What the comparison found."""

    chunks: int  # that were compared
    difference: np.ndarray  # [J], the largest of any action, robot units
    ranges: np.ndarray  # [J], of the joints
    unusable: int  # chunks of the node at instants that the trainer would drop
    prompts: int  # chunks made for another prompt than the trainer would read
    unusual: int  # chunks not compared: a message came sooner or later than usual, and the node had another one

    @property
    def same(self) -> bool:
        """Whether the node and the trainer saw the same, where that could be told."""
        return bool(self.chunks) and not (self.unusable or self.prompts or (self.difference > SAME * self.ranges).any())


class _Watched(PolicyNode):
    stored = 0  # messages that reached a buffer

    def _message_stored(self, now: int) -> None:
        self.stored += 1
        super()._message_stored(now)

    @property
    def ticked(self) -> bool:
        """Whether the tick that the present time calls for is over."""
        return not self._timer.is_ready() and self._worker.idle


def live(
    bag: Bag, recording: Recording, robot: Robot, load: Callable[..., Policy], *, seed: int, rate: float, seconds: float
) -> list[ActionChunk]:
    """The chunks that policy_node publishes while the first `seconds` of the recording pass, one noise for all.

    The clock waits for messages and inference: what comes out does not depend on how fast the machine is.
    """
    context, chunks = rclpy.Context(), []
    context.init()
    overrides = {"use_sim_time": True, "rate": rate, "seed": seed, "autostart": True}
    node = _Watched(
        lambda parameters: load(),
        context=context,
        parameter_overrides=[Parameter(name, value=value) for name, value in overrides.items()],
    )
    player = rclpy.create_node("bag_replay", context=context)
    executor = SingleThreadedExecutor(context=context)
    try:
        executor.add_node(node)
        executor.add_node(player)
        keep = lambda chunk: chunk.horizon and chunks.append(chunk)  # noqa: E731 - one without says what is void
        player.create_subscription(ActionChunk, "action_chunk", keep, NEWEST)
        replay, wait = Replay(player, bag, recording, robot), _Waiting(executor)
        try:
            node.autostart()
        except RuntimeError as error:
            raise CheckFailed(str(error)) from None
        wait(lambda: not replay.unheard(), "policy_node to listen to every camera and joint state")
        _step_through(bag, robot, replay, node, wait, seconds)
        published = node._worker.health.chunks
        wait(lambda: len(chunks) >= published, "the chunks to arrive")
        return chunks
    finally:
        executor.shutdown()
        node.destroy_node()
        player.destroy_node()
        context.try_shutdown()


def _step_through(bag: Bag, robot: Robot, replay: Replay, node: _Watched, wait: _Waiting, seconds: float) -> None:
    origin, sent = None, 0
    with tqdm(total=round(min(seconds, bag.seconds), 1), desc="replay", unit="s") as bar:
        for clock, messages in replay.steps():
            origin = origin or clock
            if clock - origin > seconds * SECOND:
                break
            for message in messages:
                told = message[0] == replay.prompt_topic
                if told:  # a prompt has no stamp: it counts for the ticks after it came
                    wait(lambda: node._worker.idle, "policy_node to finish")
                replay.send(message)
                if told and (text := decode(message[2], STRING).data):
                    wait(lambda text=text: node._worker.prompt == text, f"prompt {text!r} to arrive")
                sent += message[0] in replay.streams and _counts(bag, robot, message)
                # One by one: the node keeps the newest frame that waits, and two may fall into one step.
                wait(lambda due=sent - replay.damaged: node.stored >= due, "recorded messages to arrive")
            replay.announce(clock)
            wait(lambda clock=clock: node.get_clock().now().nanoseconds == clock, "/clock to arrive")
            wait(lambda: node.ticked, "policy_node to finish")
            bar.update(round((clock - origin) / SECOND - bar.n, 2))


class _Waiting:
    """Spins an executor until a condition holds."""

    def __init__(self, executor: SingleThreadedExecutor) -> None:
        self._executor = executor

    def __call__(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + PATIENCE
        self._executor.spin_once(timeout_sec=0.0)
        while not condition():
            self._executor.spin_once(timeout_sec=0.002)
            if time.monotonic() > deadline:
                raise CheckFailed(f"{what}: not within {PATIENCE:g} s")


def _counts(bag: Bag, robot: Robot, message: Message) -> bool:
    """Whether the node stores this message: joint states of other joints it leaves aside."""
    topic, _, raw = message
    if bag.topics[topic].type != JOINT_STATE:
        return True
    state = decode(raw, JOINT_STATE)
    return bool(set(state.name) & set(robot.joint_names)) and len(state.position) >= len(state.name)


def offline(
    bag: Bag, recording: Recording, robot: Robot, policy: Policy, stamps: np.ndarray, seed: int
) -> list[tuple[np.ndarray | None, str]]:
    """(actions float64 [H, J], prompt) of every instant by the trainer's reading; None where it has no observation."""
    verdict, state, frames, prompts = observe_at(recording, robot, stamps)
    needed = {slot: set(at[verdict.ok].tolist()) for slot, at in frames.items()}
    size, cameras = policy.config.vision.image_size, robot.present_cameras
    images: dict[tuple[str, int], Any] = {
        (slot, ordinal): model_frame(raw, kind, cameras[slot], size)
        for slot, ordinal, kind, raw in image_messages(bag, recording, needed)
    }
    results: list[tuple[np.ndarray | None, str]] = []
    for i, stamp in enumerate(tqdm(stamps.tolist(), desc="offline", unit="chunk")):
        seen = {slot: images.get((slot, int(at[i]))) for slot, at in frames.items()}
        if not verdict.ok[i] or any(not isinstance(image, np.ndarray) for image in seen.values()):
            results.append((None, prompts[i]))
            continue
        policy.reset()
        observation = RobotObservation(stamp, seen, dict.fromkeys(seen, i), state[i], prompts[i])
        chunk = policy.infer(observation, generator=torch.Generator().manual_seed(seed))
        results.append((chunk.actions, prompts[i]))
    return results


def not_as_usual(recording: Recording, robot: Robot, stamps: np.ndarray) -> np.ndarray:
    """bool [n]: whether, at an instant, some stream's newest message had come sooner or later than they usually do, so
    that the node had another one than the trainer takes. By the recording's clock; `stamps` as chunks have them, int64
    [n] ns."""
    other, written = np.zeros(len(stamps), bool), {stream.name: stream.bag_ns for stream in recording.observed}
    now = stamps + round(robot.latency * SECOND)
    for stream in sorted_streams(recording, robot):
        came, usual = written[stream.name][stream.order], stream.newest(stamps)
        for i, at in enumerate(newest_indices(stream.times, stamps).tolist()):
            while at >= 0 and came[at] > now[i]:
                at -= 1
            other[i] |= at != usual[i]
    return other


def compare(
    path: Path,
    robot: Robot,
    load: Callable[[], Policy],
    *,
    seed: int = 0,
    rate: float = 5.0,
    seconds: float = 30.0,
) -> Verdict:
    """Both ways, held against each other. Raises BagError, PolicyError, CheckFailed."""
    with Bag(open_bag(path)) as bag:
        recording = read_recording(bag, robot)
        if not all(len(stream.time_ns) for stream in recording.observed):
            raise BagError(f"{recording.source}: {'; '.join(recording.problems)}")
        chunks = live(bag, recording, robot, load, seed=seed, rate=rate, seconds=seconds)
        if not chunks:
            raise CheckFailed("policy_node made no chunk: is some stream missing, or too old by the robot file?")
        stamps = np.array([stamp_ns(chunk.header.stamp) for chunk in chunks], np.int64)
        policy = load()
        expected = offline(bag, recording, robot, policy, stamps, seed)
        policy.close()
    other = not_as_usual(recording, robot, stamps)
    pairs = [
        (chunk_actions(chunk), actions)
        for chunk, (actions, prompt), missed in zip(chunks, expected, other, strict=True)
        if actions is not None and prompt == chunk.prompt and not missed
    ]
    difference = np.max([np.abs(a - b).max(axis=0) for a, b in pairs] or [np.zeros(len(robot.joints))], axis=0)
    return Verdict(
        chunks=len(pairs),
        difference=difference,
        ranges=np.array([joint.position[1] - joint.position[0] for joint in robot.joints]),
        unusable=sum(actions is None for actions, _ in expected),
        prompts=sum(prompt != chunk.prompt for chunk, (_, prompt) in zip(chunks, expected, strict=True)),
        unusual=int(other.sum()),
    )


def run(options: Options) -> bool:
    """Compare and print; whether both are the same."""
    robot = load_robot(options.robot) if options.robot else None

    def load() -> Policy:
        if options.checkpoint:
            return Policy.load(options.checkpoint, robot=robot, device=options.device)
        return Policy.random(robot, device=options.device)

    if robot is None:
        if not options.checkpoint:
            raise CheckFailed("give --robot, --checkpoint, or both")
        robot = load_robot(options.checkpoint)
    with Domain() as domain:  # a robot that runs beside it hears nothing of this
        os.environ.update(domain.environment())
        verdict = compare(options.bag, robot, load, rate=options.rate, seconds=options.seconds)
    width = max(len(name) for name in robot.joint_names)
    print(f"{verdict.chunks} chunks compared; largest difference of any action, by joint:")
    for name, difference, span in zip(robot.joint_names, verdict.difference, verdict.ranges, strict=True):
        print(f"  {name:<{width}}  {difference:.2e}  ({difference / span:.1e} of its range)")
    if verdict.unusual:
        print(
            f"{verdict.unusual} chunks not compared: a message came sooner or later than they usually do, so that the "
            "node had one more or less than the trainer reckons with"
        )
    if verdict.unusable:
        print(f"{verdict.unusable} chunks at instants that the trainer drops")
    if verdict.prompts:
        print(f"{verdict.prompts} chunks for another prompt than the trainer reads")
    if not verdict.chunks:
        print("NOTHING COULD BE COMPARED")
        return False
    print("the node and the trainer see the same" if verdict.same else "THE NODE AND THE TRAINER DIFFER")
    return verdict.same


def main() -> int:
    """The program; 0 when both are the same, 1 when not or when it cannot be told, 130 on Ctrl-C."""
    options = tyro.cli(Options, prog="translation")
    try:
        return 0 if run(options) else 1
    except KeyboardInterrupt:
        return 130
    except (
        *(BagError, RobotFileError, PolicyError, CheckpointError, TokenizerError),
        *(CheckFailed, NoFreeDomainError, OSError),
    ) as error:
        print(f"error: {told(error)}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
