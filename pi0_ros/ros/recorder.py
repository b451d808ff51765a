"""Episodes of demonstrations as recordings: all topics that the trainer reads by the robot file, one bag an episode.

Bags hold what `ros2 bag record` would write. Added are the prompt, as metadata; where the robot file has an
`episode_topic`, the episode's marks; and at its begin what controllers were told last. They go on with that, and the
trainer must know of it.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path

from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from rclpy.serialization import deserialize_message, serialize_message
from rclpy.subscription import Subscription
from sensor_msgs.msg import CompressedImage, Image, JointState
from std_msgs.msg import Float64MultiArray, String

from pi0_ros.robot import Robot
from pi0_ros.ros.bag import BagFile
from pi0_ros.ros.conversions import SECOND
from pi0_ros.ros.diagnostics import Window
from pi0_ros.ros.graph import misfit, type_name, whereabouts
from pi0_ros.ros.outputs import KINDS
from pi0_ros.ros.player import JUMP_BACK

FRAMES, OTHERS = 50, 1000  # messages that wait while others are written: half a MB a frame, 1 kB of all else
ALIVE = 1.0  # s; a needed stream that is silent for longer is missing
ROOM = 10**9  # bytes; with less on the disk no episode begins
EPISODE = re.compile(r"episode_(\d+)")


class RecordingError(RuntimeError):
    """What was asked for cannot be done now; the message is one line with the reason."""


@dataclass
class Stream:
    """One topic of the robot file."""

    name: str  # what it is there: a camera's slot, a topic of joint states, actions
    topic: str
    kind: type
    needed: bool  # no episode begins without it
    window: Window = field(default_factory=lambda: Window(seconds=2.0))
    heard: float | None = None  # s, monotonic
    told: tuple[int, bytes] | None = None  # when and what controllers were told last, ns
    subscription: Subscription | None = None
    qos: tuple[ReliabilityPolicy, DurabilityPolicy] | None = None


class EpisodeRecorder:
    """Listens to all topics of a robot file, and writes episodes of them into `folder`.

    Topics are recorded under their names in the robot file, whatever they are remapped from.

    Raises:
        RecordingError: the robot file does not say where recorded actions come from; `folder` cannot be written to, or
            another recorder writes to it.
    """

    def __init__(self, node: Node, robot: Robot, folder: Path) -> None:
        if not robot.actions:
            raise RecordingError(f"{robot.name}: the robot file has no `actions`, where recorded actions come from")
        self._node, self._folder = node, folder
        self._bag: BagFile | None = None
        self._begun = self._newest = 0  # ns, of the episode and of its newest message
        self.fault = ""  # why the newest episode was given up
        self._marks = self._name(robot.episode_topic) if robot.episode_topic else ""
        self.streams: dict[str, Stream] = {}
        self._unnamed = list(robot.joint_names)  # joints that no joint state has named yet
        self._names: dict[str, None] = {}  # what they named meanwhile, in their order
        for slot, camera in robot.present_cameras.items():
            kind = CompressedImage if camera.transport == "compressed" else Image
            self._add(slot, camera.subscribed, kind, needed=True)
        for topic in robot.state.topics:
            self._add(topic, topic, JointState, needed=True)
        for name, source in robot.action_sources.items():
            self._add(name, source.topic, KINDS[source.type], needed=False)  # before the first command there is none
        self._lock = self._take_folder()
        # The first bag takes a third of a second to open, in which messages would wait. And a folder that cannot be
        # written to is better known now.
        self._open("opened", {}).discard()

    def _take_folder(self) -> int:
        try:
            self._folder.mkdir(exist_ok=True)
            lock = os.open(self._folder, os.O_RDONLY)
        except FileExistsError:
            what = "a file, not a folder" if self._folder.exists() else "a link to what is not there"
            raise RecordingError(f"{self._folder} is {what}") from None
        except FileNotFoundError:  # a disk that is not mounted, maybe: what is recorded would fill another
            raise RecordingError(f"{self._folder.parent}, for {self._folder.name}, is not there: make it") from None
        except OSError as error:
            raise RecordingError(f"{self._folder} cannot be written to: {error.strerror}") from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise RecordingError(f"another recorder writes to {self._folder}: give a folder of its own") from None
        except OSError:  # a file system without locks
            pass
        return lock

    def _name(self, topic: str) -> str:
        return self._node.resolve_topic_name(topic, only_expand=True)

    def _add(self, name: str, topic: str, kind: type, needed: bool) -> None:
        topic = self._name(topic)
        self.streams.setdefault(topic, Stream(name, topic, kind, needed))

    def listen(self) -> None:
        """Subscribe as the publishers offer it, which may change as they come and go; call it now and then."""
        for stream in self.streams.values():
            offers = self._node.get_publishers_info_by_topic(stream.topic)
            offered = [offer.qos_profile for offer in offers if offer.topic_type == type_name(stream.kind)]
            if not offered:
                continue
            reliable = all(qos.reliability == ReliabilityPolicy.RELIABLE for qos in offered)
            latched = all(qos.durability == DurabilityPolicy.TRANSIENT_LOCAL for qos in offered)
            qos = (
                ReliabilityPolicy.RELIABLE if reliable else ReliabilityPolicy.BEST_EFFORT,
                DurabilityPolicy.TRANSIENT_LOCAL if latched else DurabilityPolicy.VOLATILE,
            )
            if qos != stream.qos:
                self._subscribe(stream, *qos)

    def _subscribe(self, stream: Stream, reliability: ReliabilityPolicy, durability: DurabilityPolicy) -> None:
        if stream.subscription is not None:
            self._node.destroy_subscription(stream.subscription)
        tells = not stream.needed

        def came(data: bytes) -> None:
            now, stream.heard = self._now(), time.monotonic()
            stream.window.add(stream.heard)
            if tells:
                stream.told = now, data
            elif stream.kind is JointState and self._unnamed:
                self._names |= dict.fromkeys(deserialize_message(data, JointState).name)
                self._unnamed = [name for name in self._unnamed if name not in self._names]
            if self._bag is not None and now < self._newest - JUMP_BACK * SECOND:
                self._give_up("the clock jumped back")
            self._newest = now
            self._write(stream.topic, now, data)

        depth = FRAMES if stream.kind in (Image, CompressedImage) else OTHERS
        profile = QoSProfile(depth=depth, reliability=reliability, durability=durability)
        stream.subscription = self._node.create_subscription(stream.kind, stream.topic, came, profile, raw=True)
        stream.qos = reliability, durability

    def _now(self) -> int:
        return self._node.get_clock().now().nanoseconds

    def _write(self, topic: str, now: int, data: bytes) -> None:
        if self._bag is None:
            return
        try:
            self._bag.write(topic, now, data)
        except OSError as error:
            self._give_up(f"{self._folder} cannot be written to: {error.strerror}")

    def _give_up(self, why: str) -> None:
        self.fault = f"{self.episode}: discarded, {why}"
        self.discard()

    def _mark(self, text: str, now: int) -> None:
        """Begin (a text) or end ("") of an episode."""
        if self._marks:
            self._write(self._marks, now, serialize_message(String(data=text)))

    def lacking(self) -> list[str]:
        """Why no episode can begin: what is missing, one line for each stream."""
        now, lacking = time.monotonic(), []
        for stream in self.streams.values():
            if not stream.needed and (wrong := misfit(self._node, stream.topic, stream.kind)):
                lacking.append(f"{stream.name}: no message on {stream.topic}, {wrong}")
            if not stream.needed or (stream.heard is not None and now - stream.heard <= ALIVE):
                continue
            if stream.heard is None:
                what = f"no message on {stream.topic}{whereabouts(self._node, stream.topic, stream.kind)}"
            else:
                there = self._node.get_publishers_info_by_topic(stream.topic)
                gone = "" if there else ", nobody publishes it any more"
                what = f"no message for {now - stream.heard:.1f} s on {stream.topic}{gone}"
            lacking.append(f"{stream.name}: {what}")
        if self._names and self._unnamed:
            missing, found = ", ".join(self._unnamed), ", ".join(self._names)
            lacking.append(f"state: no message names joint {missing}; names found: {found}")
        return lacking

    def rates(self) -> dict[str, float]:
        """Messages a second of each stream, Hz, by its name."""
        now = time.monotonic()
        return {stream.name: stream.window.rate(now) for stream in self.streams.values()}

    # Episodes

    @property
    def episode(self) -> str:
        """Name of the one that is recorded, or ""."""
        return self._bag.path.name if self._bag is not None else ""

    @property
    def seconds(self) -> float:
        """How long it has been."""
        return (self._now() - self._begun) / SECOND if self._bag is not None else 0.0

    def begin(self, prompt: str) -> str:
        """Begin an episode; its name. RecordingError with the reason why not."""
        if self._bag is not None:
            raise RecordingError(f"{self.episode} is being recorded: keep or discard it first")
        if not prompt.strip():
            raise RecordingError("there is no prompt: what is the arm to do?")
        if lacking := self.lacking():
            raise RecordingError("; ".join(lacking))
        if self._folder.is_dir() and (left := shutil.disk_usage(self._folder).free) < ROOM:
            raise RecordingError(
                f"{self._folder} has room for {left / 1e6:.0f} MB only, {ROOM / 1e6:.0f} MB must be free"
            )
        self._bag = bag = self._open(self._next(), {"prompt": prompt})
        self._begun = self._newest = self._now()
        self.fault = ""
        told = []
        for stream in (stream for stream in self.streams.values() if stream.told):
            # A position controller holds what it was told, however long ago; a trajectory runs from when it came.
            at, data = stream.told
            if stream.kind is Float64MultiArray:
                told.append((self._begun, stream.topic, data))
            elif 0 <= self._begun - at < ALIVE * SECOND:
                told.append((at, stream.topic, data))
        self._mark(bag.path.name, min([self._begun, *(at for at, _, _ in told)]))
        for at, topic, data in told:
            self._write(topic, at, data)
        if self._bag is None:
            raise RecordingError(self.fault)
        return bag.path.name

    def _open(self, name: str, custom_data: dict[str, str]) -> BagFile:
        kinds = {stream.topic: stream.kind for stream in self.streams.values()}
        kinds |= {self._marks: String} if self._marks else {}
        try:
            return BagFile(self._folder / name, kinds, custom_data)
        except OSError as error:
            raise RecordingError(f"{self._folder} cannot be written to: {error.strerror}") from None

    def _next(self) -> str:
        taken = [path.name for path in self._folder.iterdir()] if self._folder.is_dir() else []
        newest = max((int(found[1]) for name in taken if (found := EPISODE.fullmatch(name))), default=0)
        return f"episode_{newest + 1:04d}"

    def keep(self) -> Path:
        """End the episode; where it is now. RecordingError: there is none, or it cannot be written."""
        self._mark("", self._now())
        bag = self._taken()
        if bag.path.exists():  # somebody else put one there meanwhile
            bag.path = self._folder / self._next()
        try:
            bag.keep()
        except OSError as error:
            raise RecordingError(f"{bag.path.name} cannot be finished in {self._folder}: {error.strerror}") from None
        return bag.path

    def discard(self) -> str:
        """End the episode and forget it; its name. RecordingError: there is none."""
        bag = self._taken()
        bag.discard()
        return bag.path.name

    def close(self) -> None:
        """Let others write to the folder."""
        os.close(self._lock)

    def _taken(self) -> BagFile:
        bag, self._bag = self._bag, None
        if bag is None:
            raise RecordingError(f"no episode is being recorded{self.fault and f' ({self.fault})'}")
        return bag
