"""A small bag player: what a robot saw and was told, on its topics again, with /clock.

For hosts without rosbag2, where `ros2 bag play BAG --clock 100` does the same. Only what the robot file names as
observation is played (cameras, joint states, prompt, episode marks): commands and chunks would reach the arm. A camera
recorded in another transport than the robot file's is played in the robot file's.
"""

from __future__ import annotations

import heapq
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import cv2
import numpy as np
import rclpy
import tyro
from rclpy.node import Node
from rclpy.qos import QoSProfile, ReliabilityPolicy
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import CompressedImage, Image, JointState
from std_msgs.msg import String
from tqdm import tqdm

from pi0_ros.policy.images import ImageError, decode_image
from pi0_ros.robot import Camera, Robot
from pi0_ros.robot_file import RobotFileError, load_robot
from pi0_ros.ros.conversions import SECOND, image_message, to_stamp
from pi0_ros.ros.qos import LATCHED
from pi0_ros.training.bags import Bag, BagError, BagFiles, decode, find_bags, header_stamp
from pi0_ros.training.recording import COMPRESSED, IMAGE, Recording, read_recording
from pi0_ros.wording import told

STEP = SECOND // 100  # ns of the recording between two words of /clock
WINDOW = 2 * SECOND  # ns by which a recording's messages may be out of order
# Reliable publishers serve best-effort subscriptions too; who latched, latches.
STREAM = QoSProfile(depth=50, reliability=ReliabilityPolicy.RELIABLE)

Message = tuple[str, int, bytes]  # recorded topic, time of recording in ns, CDR bytes


@dataclass(frozen=True)
class Options:
    """Play what a robot saw from a recording, with /clock. The nodes that listen need use_sim_time:=true."""

    bag: Annotated[Path, tyro.conf.Positional]
    """The recording: a rosbag2 folder, or an .mcap or .db3 file."""
    robot: Path
    """The robot file."""
    rate: float = 1.0
    """Recorded seconds a second."""
    loop: bool = False
    """Begin again at the end, until interrupted; the clock jumps back."""
    wait: float = 10.0
    """Seconds to wait for somebody who listens to every camera and joint state."""


@dataclass(frozen=True)
class _Route:
    topic: str  # as the robot file names it
    publisher: Any
    convert: Callable[[bytes], Any]  # CDR bytes -> a message, or CDR bytes; None: damaged


class Replay:
    """The observations of one recording, ready to be published from `node`.

    Raises:
        BagError: a camera or joint state of the robot file is not in the recording.
    """

    def __init__(self, node: Node, bag: Bag, recording: Recording, robot: Robot) -> None:
        self.damaged = 0  # frames that could not be converted, and were left out
        self._bag, self._node = bag, node
        self._clock = node.create_publisher(Clock, "/clock", 10)
        self._routes: dict[str, list[_Route]] = {}  # recorded topic -> where its messages go
        self.prompt_topic = recording.topics.get(robot.prompt.topic)  # as recorded
        for camera in robot.present_cameras.values():
            named = camera.subscribed
            recorded = self._recorded(recording, named)
            kind, convert = _camera_route(camera, bag.topics[recorded].type)
            self._add(recorded, named, kind, STREAM, convert)
        for topic in robot.state.topics:
            self._add(self._recorded(recording, topic), topic, JointState, STREAM)
        self.streams = set(self._routes)  # recorded topics that make up an observation
        for topic in (robot.prompt.topic, robot.episode_topic):
            if topic and recording.topics.get(topic):
                self._add(recording.topics[topic], topic, String, LATCHED)

    @staticmethod
    def _recorded(recording: Recording, topic: str) -> str:
        found = recording.topics.get(topic)
        if found is None:
            reason = next((problem for problem in recording.problems if topic in problem), f"no topic {topic}")
            raise BagError(f"{recording.source}: {reason}")
        return found

    def _add(
        self, recorded: str, topic: str, kind: type, qos: QoSProfile, convert: Callable[[bytes], Any] = bytes
    ) -> None:
        publisher = self._node.create_publisher(kind, topic, qos)
        self._routes.setdefault(recorded, []).append(_Route(topic, publisher, convert))

    def unheard(self) -> list[str]:
        """Topics of cameras and joint states that nobody listens to."""
        routes = [route for topic in self.streams for route in self._routes[topic]]
        return sorted(route.topic for route in routes if not route.publisher.get_subscription_count())

    def steps(self, step: int = STEP) -> Iterator[tuple[int, list[Message]]]:
        """(clock, messages): what to `send` before the clock, in ns of recording time, is to be `announce`d."""
        clock, due = None, []
        for message in in_order(self._bag.messages(set(self._routes))):
            clock = message[1] if clock is None else clock
            while message[1] > clock:
                yield clock, due
                clock, due = clock + step, []
            due.append(message)
        if clock is not None:
            yield clock, due

    def send(self, message: Message) -> None:
        """Publish a recorded message."""
        for route in self._routes[message[0]]:
            converted = route.convert(message[2])
            if converted is None:
                self.damaged += 1
            else:
                route.publisher.publish(converted)

    def announce(self, clock: int) -> None:
        """Say on /clock that it is `clock`, ns."""
        self._clock.publish(Clock(clock=to_stamp(clock)))


def open_bag(path: Path) -> BagFiles:
    """The one recording at `path`. BagError when there is none, or several."""
    found = find_bags(path)
    if len(found) > 1:
        raise BagError(f"{path}: holds {len(found)} recordings, name one of them, for example {found[0].path}")
    return found[0]


def in_order(messages: Iterable[Message]) -> Iterator[Message]:
    """By time of recording, as far as `WINDOW` sets them right, and with equal times as they come."""
    heap: list[tuple[int, int, Message]] = []
    newest = 0
    for number, message in enumerate(messages):
        heapq.heappush(heap, (message[1], number, message))
        newest = max(newest, message[1])
        while heap[0][0] < newest - WINDOW:
            yield heapq.heappop(heap)[2]
    while heap:
        yield heapq.heappop(heap)[2]


def _camera_route(camera: Camera, recorded: str) -> tuple[type, Callable[[bytes], Any]]:
    """The message class that the robot file's transport asks for, and how a recorded message becomes one."""
    if camera.transport == "compressed":
        return CompressedImage, bytes if recorded == COMPRESSED else partial(_converted, IMAGE, _png)
    return Image, bytes if recorded == IMAGE else partial(_converted, COMPRESSED, image_message)


def _converted(kind: str, make: Callable[[np.ndarray], Any], raw: bytes) -> Any:
    try:
        message = make(decode_image(decode(raw, kind)))
    except (ImageError, BagError):
        return None
    message.header.stamp = to_stamp(header_stamp(raw))
    return message


def _png(rgb: np.ndarray) -> CompressedImage:
    data = cv2.imencode(".png", cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR))[1]  # without loss: the same pixels
    return CompressedImage(format="png", data=data.tobytes())


def play(replay: Replay, seconds: float, rate: float, loop: bool) -> None:
    """Publish at `rate`; `seconds` is the recording's length, for the bar."""
    step = round(
        STEP * max(1.0, rate)
    )  # the clock follows messages by a step: never less than 10 ms for them to arrive
    while True:
        origin = None
        with tqdm(
            total=round(seconds, 1), desc="replay", unit="s", bar_format="{l_bar}{bar}| {n:.1f}/{total} s"
        ) as bar:
            for clock, messages in replay.steps(step):
                for message in messages:
                    replay.send(message)
                origin = origin or (time.monotonic(), clock)
                time.sleep(max(0.0, origin[0] + (clock - origin[1]) / SECOND / rate - time.monotonic()))
                replay.announce(clock)
                bar.update((clock - origin[1]) / SECOND - bar.n)
        if not loop or origin is None:
            return


def run(options: Options) -> None:
    """Play; raises BagError, RobotFileError or ValueError for what cannot be played."""
    if not 0 < options.rate <= 1000:
        raise ValueError(f"--rate must be above 0 and at most 1000, found {options.rate:g}")
    robot = load_robot(options.robot)
    with Bag(open_bag(options.bag)) as bag:
        recording = read_recording(bag, robot)
        node = rclpy.create_node("bag_replay")
        try:
            replay = Replay(node, bag, recording, robot)
            deadline = time.monotonic() + options.wait
            while (unheard := replay.unheard()) and time.monotonic() < deadline:
                time.sleep(0.05)
            if unheard:
                print(f"nobody listens to {', '.join(unheard)}; played all the same", file=sys.stderr)
            play(replay, bag.seconds, options.rate, options.loop)
            if replay.damaged:
                print(f"{replay.damaged} damaged frames were left out", file=sys.stderr)
        finally:
            node.destroy_node()


def main() -> int:
    """The program; 1 and one line for what cannot be played, 130 on Ctrl-C."""
    options = tyro.cli(Options, prog="replay")
    rclpy.init(args=[], signal_handler_options=rclpy.signals.SignalHandlerOptions.NO)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        run(options)
    except KeyboardInterrupt:
        return 130
    except (BagError, RobotFileError, ValueError, OSError) as error:
        print(f"error: {told(error)}", file=sys.stderr)
        return 1
    finally:
        rclpy.try_shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
