"""What the sensors said last: one subscription and one buffer per stream, and the observation at an instant.

The callbacks only store messages; decoding happens where the observation is taken up (the worker thread), and
only for frames that were not decoded before. Two threads share `Streams`: each buffer has its own lock, the table of
joint state buffers is under `_lock`.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from rclpy.node import Node
from rclpy.qos import QoSProfile, ReliabilityPolicy
from rclpy.subscription import Subscription
from sensor_msgs.msg import CompressedImage, Image, JointState

from pi0_ros.policy.alignment import Rejected, Sample, StreamBuffer, align
from pi0_ros.policy.images import ImageError, decode_image, orient
from pi0_ros.robot import Robot, Turns
from pi0_ros.ros.conversions import SECOND, stamp_ns
from pi0_ros.ros.diagnostics import Report, Window
from pi0_ros.ros.graph import whereabouts
from pi0_ros.ros.proprioception import useless

FASTEST_CAMERA, FASTEST_STATE = 120.0, 2000.0  # Hz; no more is kept, should stamps not advance as time does
UNSTAMPED = "`clock: bag` in the robot file goes by the time of arrival instead"
TOLD = 2.0  # s for which diagnostics tell of stamps that were ahead of the clock
CLOCK_PERIOD = 0.25  # s; under simulated time the clock may lag behind stamps by one period of /clock
RELIABILITY = {"best_effort": ReliabilityPolicy.BEST_EFFORT, "reliable": ReliabilityPolicy.RELIABLE}


@dataclass(frozen=True)
class Snapshot:
    """The messages that make up the observation at one instant."""

    frames: dict[str, Sample]  # slot -> sample of an Image or CompressedImage
    state: np.ndarray  # float64 [J] robot units, model order
    skew: float  # seconds between the oldest and the newest stream


class Streams:
    """Subscriptions and buffers for the streams of a robot file.

    Args:
        node: gets the subscriptions.
        on_message: called after each stored message with the node's clock (ns), in the executor's thread.
    """

    def __init__(self, node: Node, robot: Robot, on_message: Callable[[int], None]) -> None:
        self._node, self._robot, self._on_message = node, robot, on_message
        self._lock, self._turns = threading.Lock(), Turns(robot.joints)
        self._cameras: dict[str, StreamBuffer] = {}
        # One buffer for each topic and set of our joints on it: drivers of arm and gripper often share a topic.
        self._states: dict[tuple[str, frozenset[str]], StreamBuffer] = {}
        self._subscriptions: list[Subscription] = []
        self._topics: dict[str, str] = {}
        self._kinds: dict[str, type] = {}
        # Whose stamps were ahead of the clock, so that nothing of any stream was kept, and when that was (monotonic).
        self._ahead: tuple[Rejected, float] | None = None
        self.windows: dict[str, Window] = {}
        self._useless: dict[str, str] = {}  # topic -> what came on it instead of joint states of this robot
        # Ticks look back by the largest latency.
        self._span = round((robot.latency + CLOCK_PERIOD) * SECOND)
        frames, self._most_states = (
            math.ceil(rate * self._span / SECOND) + 1 for rate in (FASTEST_CAMERA, FASTEST_STATE)
        )
        for slot, camera in robot.present_cameras.items():
            self._cameras[slot] = StreamBuffer(
                slot, round(camera.max_age * SECOND), round(camera.latency * SECOND), self._span, frames
            )
            kind = CompressedImage if camera.transport == "compressed" else Image
            qos = QoSProfile(depth=1, reliability=RELIABILITY[camera.reliability])
            self._listen(kind, camera.subscribed, qos, slot, partial(self._camera, slot))
        for topic in robot.state.topics:
            qos = QoSProfile(depth=50, reliability=ReliabilityPolicy.BEST_EFFORT)
            self._listen(JointState, topic, qos, topic, self._joints(topic))

    def _listen(
        self, kind: type, topic: str, qos: QoSProfile, name: str, buffer_of: Callable[[Any], StreamBuffer | None]
    ) -> None:
        window, arrival = Window(), self._robot.clock == "bag"  # a recording's own time is that of arrival
        self.windows[name], self._topics[name], self._kinds[name] = window, topic, kind

        def callback(message: Any) -> None:
            now = self._node.get_clock().now().nanoseconds
            buffer = buffer_of(message)
            if buffer is None:
                return
            buffer.push(now if arrival else stamp_ns(message.header.stamp), message)
            window.add(now / SECOND)
            self._on_message(now)

        self._subscriptions.append(self._node.create_subscription(kind, topic, callback, qos))

    def _camera(self, slot: str, message: Any) -> StreamBuffer:
        return self._cameras[slot]

    def _joints(self, topic: str) -> Callable[[JointState], StreamBuffer | None]:
        state, ours = self._robot.state, frozenset(self._robot.joint_names)

        def buffer_of(message: JointState) -> StreamBuffer | None:
            if why := useless(message.name, message.position, ours):  # of other joints, or velocities only
                self._useless[topic] = why
                return None
            names = ours.intersection(message.name)
            with self._lock:
                if (topic, names) not in self._states:
                    alone = all(known != topic for known, _ in self._states)
                    name = topic if alone else f"{topic} ({', '.join(sorted(names))})"
                    ages = round(state.max_age * SECOND), round(state.latency * SECOND)
                    self._states[topic, names] = StreamBuffer(name, *ages, self._span, self._most_states)
                return self._states[topic, names]

        return buffer_of

    def observe(self, tick_ns: int, now_ns: int) -> Snapshot | Rejected:
        """The newest messages at the tick, or the stream to blame; `now_ns` is what the clock says."""
        with self._lock:
            states = [(names, buffer) for (_, names), buffer in self._states.items()]
        held = [(buffer.newest_at(tick_ns), names, buffer) for names, buffer in states]
        held.sort(key=lambda entry: entry[0].time_ns if entry[0] else -math.inf, reverse=True)
        source: dict[str, StreamBuffer] = {}  # joint -> the newest buffer that has it
        for joint in self._robot.joint_names:
            buffer = next((buffer for _, names, buffer in held if joint in names), None)
            if buffer is not None:
                source[joint] = buffer
        used = {buffer.name: buffer for buffer in (*self._cameras.values(), *source.values())}
        aligned = align(used.values(), tick_ns, round(self._robot.max_skew * SECOND), now_ns)
        if isinstance(aligned, Rejected):
            if aligned.kind == "clock":
                self._ahead = aligned, time.monotonic()
            if not len(used[aligned.stream]) and aligned.stream in self._topics:
                return Rejected(aligned.stream, f"no message yet on {self._topics[aligned.stream]}", "missing")
            sample = used[aligned.stream].newest_at(tick_ns)
            if aligned.kind == "stale" and sample is not None and sample.stamp_ns == 0:
                return Rejected(aligned.stream, f"its stamps are 0; {UNSTAMPED}", "stale")
            return aligned
        if missing := [joint for joint in self._robot.joint_names if joint not in source]:
            topics, joints = ", ".join(self._robot.state.topics), ", ".join(missing)
            if not held:
                instead = "".join(f"; {why}" for why in list(self._useless.values()))
                return Rejected(topics, f"no message yet with joints {joints}{instead}", "missing")
            seen = sorted({name for sample, _, _ in held if sample for name in sample.payload.name})
            return Rejected(topics, f"no message has joints {joints}; found {', '.join(seen)}", "missing")
        state = np.empty(len(self._robot.joint_names))
        for i, joint in enumerate(self._robot.joint_names):
            message = aligned.samples[source[joint].name].payload
            state[i] = message.position[message.name.index(joint)]
            least, most = self._robot.joints[i].conceivable
            if not least <= state[i] <= most:  # false for NaN
                units = "; other units (degrees?)" if np.isfinite(state[i]) else ""
                return Rejected(source[joint].name, f"joint {joint!r}: position is {state[i]:.4g}{units}", "missing")
        state -= self._turns(state)
        return Snapshot({slot: aligned.samples[slot] for slot in self._cameras}, state, aligned.skew_ns / SECOND)

    def reports(self, node: str, now: int, limits: dict[str, Any]) -> list[Report]:
        """One diagnostic status for each stream: rate, age at the instant that is observed now, and whether that is too
        old."""
        tick = now - round(self._robot.latency * SECOND)
        with self._lock:
            states = list(self._states.items())
        buffers = {slot: [buffer] for slot, buffer in self._cameras.items()}
        buffers |= {topic: [b for (known, _), b in states if known == topic] for topic in self._robot.state.topics}
        reports, ahead = [], self._ahead
        apart = ahead[0] if ahead is not None and time.monotonic() - ahead[1] < TOLD else None
        for name, window in self.windows.items():
            report = Report(f"{node}: {name}")
            report.add("topic", self._topics[name])
            rate = window.rate(now / SECOND)
            report.add("rate_hz", rate)
            for level, tell in (("error", report.error), ("warn", report.warn)):
                if rate < (least := limits[f"diagnostics.rate_{level}"]):
                    tell(f"rate_hz is {rate:.4g} Hz, below {least:g} Hz")
                    break
            looks = [buffer.look(tick) for buffer in buffers[name]]
            samples = [sample for sample, _ in looks if sample is not None]
            if samples and not any(sample.stamp_ns for sample in samples):
                report.error(f"stamps on {self._topics[name]} are 0; {UNSTAMPED}")
            elif samples:
                age = (tick - max(sample.time_ns for sample in samples)) / SECOND
                report.add("age_s", age)
                share = age / self._max_age(name)
                report.judge("age_share", share, limits["diagnostics.age_warn"], limits["diagnostics.age_error"])
            elif lasts := [last for _, last in looks if last is not None]:
                early = (max(lasts) - now) / SECOND
                report.error(f"messages on {self._topics[name]} are stamped {early:.3g} s ahead of the clock")
            elif apart is None:
                topic = self._topics[name]
                instead = f"; {why}" if (why := self._useless.get(topic)) else ""
                report.error(f"no message yet on {topic}{instead or whereabouts(self._node, topic, self._kinds[name])}")
            elif apart.stream.partition(" (")[0] == name:  # of joint states the joints may be told, too
                report.error(apart.reason)
            reports.append(report)
        return reports

    def _max_age(self, name: str) -> float:
        camera = self._robot.cameras.get(name)
        return camera.max_age if camera else self._robot.state.max_age

    def clear(self) -> None:
        """Forget every message: the clock was set back, or the scene was changed."""
        with self._lock:
            self._states.clear()
        for buffer in self._cameras.values():
            buffer.clear()
        for window in self.windows.values():
            window.clear()

    def close(self) -> None:
        """Give the subscriptions back."""
        for subscription in self._subscriptions:
            self._node.destroy_subscription(subscription)
        self._subscriptions.clear()
        self.clear()


class Frames:
    """Decoded camera frames; each frame is decoded once. Belongs to one thread."""

    def __init__(self, robot: Robot) -> None:
        self._cameras = robot.present_cameras
        self._decoded: dict[str, tuple[int, np.ndarray]] = {}

    def decode(self, frames: dict[str, Sample]) -> dict[str, np.ndarray] | Rejected:
        """slot -> uint8 [H, W, 3] RGB as the robot file turns it, or the camera whose frame cannot be decoded."""
        for slot, sample in frames.items():
            if slot in self._decoded and self._decoded[slot][0] == sample.stamp_ns:
                continue
            try:
                image = orient(decode_image(sample.payload), self._cameras[slot])
            except ImageError as error:
                return Rejected(slot, f"frame cannot be decoded: {error}", "missing")
            self._decoded[slot] = (sample.stamp_ns, image)
        return {slot: self._decoded[slot][1] for slot in frames}

    def clear(self) -> None:
        """Forget the frames: after a reset the same stamp may mean other pixels."""
        self._decoded.clear()
