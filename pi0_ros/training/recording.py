"""One pass over a bag: every stream that the robot file names, with its stamps, and the message faults by reason.

Images are not decoded here, only looked at (stamp, size, truncation), so memory stays small whatever the bag holds.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from pi0_ros.policy.images import ENCODINGS, is_depth
from pi0_ros.robot import Robot, Turns
from pi0_ros.training.bags import Bag, BagError, decode, header_stamp
from pi0_ros.training.clocks import ClockOffset
from pi0_ros.training.commands import HOLD, CommandRows, Commands
from pi0_ros.training.plausibility import check_commands, check_states
from pi0_ros.training.stamps import command_times, set_times
from pi0_ros.training.topics import absence, find_topic, image_names

IMAGE, COMPRESSED = "sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage"
JOINT_STATE, STRING = "sensor_msgs/msg/JointState", "std_msgs/msg/String"
ACTION_TYPES = {
    "JointState": JOINT_STATE,
    "JointTrajectory": "trajectory_msgs/msg/JointTrajectory",
    "Float64MultiArray": "std_msgs/msg/Float64MultiArray",
}
NAN_SHARE = 0.01  # a larger share of messages with NaN joints is a fault of the robot, not of a start-up


@dataclass
class Stream:
    """Times of the sound messages of one stream in the order of recording.

    `ordinal`: which message of its topic each is, counting all; `header_ns` is 0 where a message has no stamp.
    """

    name: str
    topic: str
    type: str
    bag_ns: np.ndarray
    header_ns: np.ndarray
    ordinal: np.ndarray
    joints: tuple[int, ...] = ()  # state only: model indices
    positions: np.ndarray = field(default_factory=lambda: np.empty((0, 0)))  # state only: float64 [M, len(joints)]
    time_ns: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))  # by the robot file's clock
    way_ns: int = 0  # cameras only: how long after their stamps frames usually come

    def keep(self, sound: np.ndarray) -> None:
        """Forget the messages where bool [M] is False."""
        self.bag_ns, self.header_ns, self.ordinal = self.bag_ns[sound], self.header_ns[sound], self.ordinal[sound]
        if len(self.positions):
            self.positions = self.positions[sound]


@dataclass
class Recording:
    """A bag as the robot file sees it. `problems` are why it cannot be trained on; `faults` counts bad messages."""

    source: str
    cameras: dict[str, Stream] = field(default_factory=dict)
    states: list[Stream] = field(default_factory=list)
    commands: list[Commands] = field(default_factory=list)
    commands_ns: dict[str, np.ndarray] = field(default_factory=dict)  # source -> times, by the robot file's clock
    prompts: list[tuple[int, str]] = field(default_factory=list)
    marks: list[tuple[int, str]] = field(default_factory=list)  # episode begins (text) and ends ("")
    prompt: str = ""  # of the bag's metadata
    topics: dict[str, str | None] = field(default_factory=dict)  # as the robot file names it -> as recorded
    faults: Counter[tuple[str, str]] = field(default_factory=Counter)  # (stream, reason) -> messages
    nan: Counter[tuple[str, str]] = field(default_factory=Counter)  # ("state" or "actions", joint) -> messages
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)  # why a policy trained on it may not work on the robot
    problems: list[str] = field(default_factory=list)

    def reasons(self, topic: str) -> str:
        """Why messages of a topic cannot be used, in brackets; nothing where all can."""
        told = [f"{count} x {reason}" for (where, reason), count in self.faults.items() if where == topic]
        return f" ({'; '.join(told[:3])})" if told else ""

    @property
    def observed(self) -> list[Stream]:
        """State streams and cameras."""
        return [*self.states, *self.cameras.values()]


def read_recording(bag: Bag, robot: Robot) -> Recording:
    """Everything but the pixels. BagError when the bag itself cannot be read."""
    reader = _Reader(bag, robot)
    return reader.read()


class _Rows:
    """Times, and positions where there are any, of many messages: 24 bytes and 8 a joint each, not a Python object."""

    def __init__(self) -> None:
        self.times, self.values = array("q"), array("d")

    def add(self, stamp: int, header: int, ordinal: int, values: np.ndarray | None = None) -> None:
        self.times.extend((stamp, header, ordinal))
        if values is not None:
            self.values.frombytes(values.tobytes())

    def columns(self) -> np.ndarray:
        return np.array(self.times, np.int64).reshape(-1, 3).T  # bag, header, ordinal


class _Reader:
    def __init__(self, bag: Bag, robot: Robot) -> None:
        self.bag, self.robot, self.sources = bag, robot, robot.action_sources
        self.recording = Recording(str(bag.files.path), prompt=bag.files.prompt)
        self.images: dict[str, _Rows] = {}
        self.states: dict[tuple[str, tuple[int, ...]], _Rows] = {}
        self.commands: dict[tuple[str, tuple[int, ...]], CommandRows] = {}  # by source and joints commanded together
        self.texts: dict[str, list[tuple[int, str]]] = {}
        self.handlers: dict[str, list[Any]] = {}
        self.index = {name: i for i, name in enumerate(robot.joint_names)}
        self.turns = Turns(robot.joints)
        # By names in a message, and wanted: model indices, their places in it, least and largest number each may have.
        self.columns: dict[tuple[Any, ...], tuple[tuple[int, ...], list[int], np.ndarray, np.ndarray]] = {}
        self.strangers: dict[str, tuple[str, ...]] = {}  # source -> joints of a command that are none of the robot's
        self.seen_names: dict[tuple[str, str], set[str]] = {}  # of joints, in messages that may speak of them
        self.all_names: dict[tuple[str, str], set[str]] = {}
        self.nan: Counter[tuple[str, str, str]] = Counter()  # (state or actions, topic, joint) -> messages
        self.absurd: Counter[tuple[str, str, str]] = Counter()
        self.example: dict[tuple[str, str, str], float] = {}  # the first of the absurd ones

    def read(self) -> Recording:
        robot, recording = self.robot, self.recording
        cameras = {
            slot: self._find(f"camera {slot}", image_names(camera.topic, camera.transport), (IMAGE, COMPRESSED))
            for slot, camera in robot.present_cameras.items()
        }
        for slot, topic in cameras.items():
            if topic and self.bag.topics[topic].type == COMPRESSED and not topic.endswith("/compressed"):
                recording.warnings.append(
                    f"camera {slot}: {topic} holds CompressedImage, which policy_node hears on {topic}/compressed "
                    "alone: remap the driver's topic to that name"
                )
        states = [self._find("state", [topic], (JOINT_STATE,)) for topic in robot.state.topics]
        actions = {
            name: self._find(name, [source.topic], (ACTION_TYPES[source.type],))
            for name, source in self.sources.items()
        }
        if not actions:
            recording.problems.append("actions: the robot file does not say where recorded actions come from")
        prompt = self._find("prompt", [robot.prompt.topic], (STRING,), needed=False) if robot.prompt.topic else None
        marks = self._find("episodes", [robot.episode_topic], (STRING,), needed=False) if robot.episode_topic else None
        if robot.episode_topic and not marks:
            reason, _ = absence(self.bag.topics, [robot.episode_topic], (STRING,))
            recording.warnings.append(f"episodes: {reason}; the whole recording is taken for one episode")
        if robot.prompt.topic and not prompt and not recording.prompt:
            reason, there = absence(self.bag.topics, [robot.prompt.topic], (STRING,))
            if not there and any(topic.type == STRING and topic.count for topic in self.bag.topics.values()):
                recording.notes.append(f"prompt: {reason}")
        for topic, handler in [
            *((topic, self._on_image) for topic in cameras.values()),
            *((topic, self._on_state) for topic in states),
            *((topic, partial(self._on_action, name)) for name, topic in actions.items()),
            (prompt, self._on_text),
            (marks, self._on_text),
        ]:
            if topic and handler not in self.handlers.setdefault(topic, []):
                self.handlers[topic].append(handler)
        self._pass()
        for slot, topic in cameras.items():
            recording.cameras[slot] = self._stream(slot, topic, self.images.get(topic, _Rows()))
        for topic in states:
            recording.states += self._state_streams(topic)
        recording.notes += self.bag.notes
        self._check_joints(states, [*actions.values()])
        # Joint states are written down at once. A camera's frames are not, and would make all that has no stamp of its
        # own too early by what they take.
        stamped = [stream for stream in recording.states if stream.header_ns.any()]
        offset = ClockOffset([(s.bag_ns, s.header_ns) for s in stamped or recording.cameras.values()])
        set_times(recording, robot, offset)
        check_states(recording, robot)
        self._set_commands(actions, offset)
        check_commands(recording, robot)
        recording.prompts = self._texts(prompt, offset)
        recording.marks = self._texts(marks, offset)
        recording.notes = list(dict.fromkeys(recording.notes))
        recording.warnings = list(dict.fromkeys(recording.warnings))
        recording.problems = list(dict.fromkeys(recording.problems))
        return recording

    def _find(self, what: str, names: list[str], types: tuple[str, ...], needed: bool = True) -> str | None:
        recording, topics = self.recording, self.bag.topics
        topic = find_topic(topics, names, types)
        if topic or needed:
            recording.topics[names[0]] = topic
        if topic and topic != "/" + names[0].lstrip("/"):
            recording.notes.append(f"{what}: {topic} was read for {names[0]}")
        if not topic:
            reason, there = absence(topics, names, types)
            if needed or there:
                (recording.problems if needed else recording.notes).append(f"{what}: {reason}")
        return topic

    # -- the messages ---------------------------------------------------------------------------------------------

    def _pass(self) -> None:
        counts: Counter[str] = Counter()
        for topic, stamp, raw in self.bag.messages(set(self.handlers)):
            ordinal = counts[topic]
            counts[topic] += 1
            for handler in self.handlers[topic]:
                try:
                    handler(topic, stamp, ordinal, raw)
                except BagError as error:
                    self.recording.faults[topic, str(error)] += 1

    def _on_image(self, topic: str, stamp: int, ordinal: int, raw: bytes) -> None:
        header = header_stamp(raw)
        if fault := image_fault(decode(raw, self.bag.topics[topic].type)):
            raise BagError(fault)
        self.images.setdefault(topic, _Rows()).add(stamp, header, ordinal)

    def _on_state(self, topic: str, stamp: int, ordinal: int, raw: bytes) -> None:
        message = decode(raw, JOINT_STATE)
        if found := self._joints("state", topic, message.name, message.position):
            self.states.setdefault((topic, found[0]), _Rows()).add(stamp, _stamp(message), ordinal, found[1])

    def _on_action(self, name: str, topic: str, stamp: int, ordinal: int, raw: bytes) -> None:
        message, source = decode(raw, self.bag.topics[topic].type), self.sources[name]
        header, due = 0, [0]
        if source.type == "JointTrajectory":
            header, names = _stamp(message), message.joint_names
            if not message.points:
                return self._hold(name, stamp, header, ordinal, names or source.joints or self.robot.joint_names)
            due, points = _due(message), [point.positions for point in message.points]
        elif source.type == "JointState":
            header, points, names = _stamp(message), [message.position], message.name
        else:
            points, names = [message.data], source.joints or self.robot.joint_names
            if len(message.data) != len(names):
                raise BagError(f"{len(message.data)} numbers for {len(names)} joints")
        found = [self._joints("actions", topic, names, point, source.joints) for point in points]
        if not found[0]:
            self.strangers.setdefault(name, tuple(names))
        else:
            rows = self.commands.setdefault((name, found[0][0]), CommandRows())
            rows.add(stamp, header, ordinal, np.stack([row for _, row in found]), due)

    def _hold(self, name: str, stamp: int, header: int, ordinal: int, names: Sequence[str]) -> None:
        """An empty trajectory: its joints stop where they are commanded to be by then."""
        only = self.sources[name].joints or names
        joints = tuple(sorted(self.index[joint] for joint in names if joint in self.index and joint in only))
        if joints:
            rows = self.commands.setdefault((name, joints), CommandRows())
            rows.add(stamp, header, ordinal, np.full((1, len(joints)), HOLD))

    def _on_text(self, topic: str, stamp: int, ordinal: int, raw: bytes) -> None:
        self.texts.setdefault(topic, []).append((stamp, decode(raw, STRING).data.strip()))

    def _joints(
        self, what: str, topic: str, names: Iterable[str], positions: Any, only: tuple[str, ...] | None = None
    ) -> tuple[tuple[int, ...], np.ndarray] | None:
        """(model indices, positions) of the robot's joints in a message, None when it has none of them (of `only`)."""
        key, index = tuple(names), self.index
        if (key, only) not in self.columns:
            wanted = (
                i for i, name in enumerate(key) if name in index and name in (only or key) and key.index(name) == i
            )
            at = sorted(wanted, key=lambda i: index[key[i]])
            mine = tuple(index[key[i]] for i in at)
            bounds = np.array([self.robot.joints[joint].conceivable for joint in mine]).reshape(-1, 2).T
            self.columns[key, only] = mine, at, *bounds
            if at != sorted(at):
                self.recording.notes.append(f"{topic}: joints are not in the robot file's order; read by name")
        self.all_names.setdefault((what, topic), set()).update(key)
        self.seen_names.setdefault((what, topic), set()).update(set(key) & set(only or key))
        joints, at, least, most = self.columns[key, only]
        if not joints:
            return None
        if len(positions) < len(key):
            raise BagError(f"{len(positions)} positions for {len(key)} joint names")
        row = np.asarray(positions, np.float64)[at]
        sound = (row >= least) & (row <= most)  # false for NaN
        if not sound.all():
            finite, names = np.isfinite(row), [self.robot.joint_names[joint] for joint in joints]
            for counts, bad in ((self.nan, ~finite), (self.absurd, finite & ~sound)):
                counts.update((what, topic, names[i]) for i in np.flatnonzero(bad))
            for i in np.flatnonzero(finite & ~sound):
                self.example.setdefault((what, topic, names[i]), float(row[i]))
            far = "position absurdly far outside the joint's limits"
            raise BagError(far if finite.all() else "NaN or infinite position")
        return joints, row - self.turns(row, list(joints))

    # -- from rows to streams -------------------------------------------------------------------------------------

    def _stream(self, name: str, topic: str | None, rows: _Rows) -> Stream:
        return Stream(name, topic or "", self.bag.topics[topic].type if topic else "", *rows.columns())

    def _state_streams(self, topic: str | None) -> list[Stream]:
        """One stream for each set of joints on a topic: drivers of arm and gripper often share one."""
        groups = {joints: rows for (where, joints), rows in self.states.items() if where == topic}
        streams = []
        for joints, rows in groups.items():
            names = ", ".join(self.robot.joint_names[joint] for joint in joints)
            stream = self._stream(topic if len(groups) == 1 else f"{topic} ({names})", topic, rows)
            stream.joints, stream.positions = joints, np.array(rows.values).reshape(-1, len(joints))
            streams.append(stream)
        return streams

    def _check_joints(self, states: list[str | None], actions: list[str | None]) -> None:
        recording, names = self.recording, self.robot.joint_names
        for what, topics in (("state", states), ("actions", actions)):
            seen = set().union(*(self.seen_names.get((what, topic), set()) for topic in topics))
            if topics and all(topics) and (missing := [name for name in names if name not in seen]):
                there = set().union(*(self.all_names.get((what, topic), set()) for topic in topics))
                found = ", ".join(sorted(there)[:12]) or "none" + "".join(map(recording.reasons, topics))
                recording.problems.append(f"{what}: no message names joint {', '.join(missing)}; names found: {found}")
            elif what == "state" and topics and all(topics):
                usable = {names[joint] for stream in recording.states for joint in stream.joints}
                if useless := [name for name in names if name not in usable]:
                    recording.problems.append(f"state: no message with joint {', '.join(useless)} can be used")
        for (what, _, name), count in self.nan.items():
            recording.nan[what, name] += count
        for counts, text in (
            (self.nan, "is NaN or infinite"),
            (self.absurd, "reads {:.4g}, where its limits are {:g} to {:g} (a glitch, other units, wrong limits?),"),
        ):
            for (what, topic, name), count in counts.items():
                share = count / max(self.bag.topics[topic].count, 1)
                found = recording.problems if share > NAN_SHARE else recording.notes
                numbers = self.example.get((what, topic, name)), *self.robot.joints[self.index[name]].position
                found.append(f"{topic}: joint {name!r} {text.format(*numbers)} in {share:.1%} of the messages")

    def _set_commands(self, topics: dict[str, str | None], offset: ClockOffset) -> None:
        recording = self.recording
        commanded = {name for name, _ in self.commands}
        for name, topic in topics.items():
            if topic and name not in commanded and not any(p.startswith("actions:") for p in recording.problems):
                other = f" (they are for {', '.join(self.strangers[name][:6])})" if name in self.strangers else ""
                reason = recording.reasons(topic) or other
                recording.problems.append(f"{name}: no command on {topic} can be used{reason}")
        for (name, joints), rows in self.commands.items():
            source = self.sources[name]
            arrivals, stamps, _, _ = rows.columns()
            if self.robot.clock == "bag":
                times = stamps = now = arrivals
            else:
                now = arrivals - offset.at(arrivals)  # arrival by the header clock
                times = stamps = command_times(recording, name, topics[name], stamps, now)
            latency = round(source.latency * 1e9)
            begins = np.minimum(stamps, now) if source.type == "JointTrajectory" else stamps
            recording.commands.append(rows.commands(joints, begins - latency, stamps - latency))
            recording.commands_ns[name] = np.append(recording.commands_ns.get(name, times[:0]), times)

    def _texts(self, topic: str | None, offset: ClockOffset) -> list[tuple[int, str]]:
        rows = self.texts.get(topic, []) if topic else []
        stamps = np.array([row[0] for row in rows], np.int64)
        if self.robot.clock == "header" and len(stamps):
            stamps = stamps - offset.at(stamps)
        return sorted(((int(t), row[1]) for t, row in zip(stamps, rows, strict=True)), key=lambda item: item[0])


def image_fault(message: Any) -> str | None:
    """What makes an image message useless, seen without decoding it."""
    data = message.data
    if hasattr(message, "format"):
        if is_depth(message.format):
            return "depth, not colour"
        head = bytes(data[:4])
        if head[:2] == b"\xff\xd8" and bytes(data[-65536:]).rfind(b"\xff\xd9") < 0:
            return "JPEG data end too early"
        if head == b"\x89PNG" and bytes(data[-64:]).rfind(b"IEND") < 0:
            return "PNG data end too early"
        return None if len(data) else "empty image"
    if not message.height or not message.width:
        return "empty image"
    if len(data) < message.height * message.step:
        return "image data shorter than height x step"
    if message.encoding not in ENCODINGS:
        encodings = "rgb8, bgr8, mono8, yuv422 and the like, or JPEG on .../compressed"
        return f"image encoding {message.encoding!r} cannot be read; the driver must publish {encodings}"
    return None


def _due(trajectory: Any) -> list[int]:
    """When its points are due, in ns after its own time."""
    if any(len(point.positions) != len(trajectory.joint_names) for point in trajectory.points):
        raise BagError("a trajectory point without a position for every joint")
    due = [point.time_from_start.sec * 1_000_000_000 + point.time_from_start.nanosec for point in trajectory.points]
    if any(b <= a for a, b in zip(due, due[1:], strict=False)):
        raise BagError("time_from_start does not increase")
    return due


def _stamp(message: Any) -> int:
    stamp = message.header.stamp
    return stamp.sec * 1_000_000_000 + stamp.nanosec
