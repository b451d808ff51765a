"""Writes small recordings for tests: a robot of two joints and a gripper with one camera, in any rosbag2 form."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import yaml
from rosbags.rosbag2 import CompressionFormat, CompressionMode, StoragePlugin, Writer
from rosbags.typesys import Stores, get_typestore

from pi0_ros.robot import Robot
from pi0_ros.robot_file import parse_robot

STORE = get_typestore(Stores.ROS2_KILTED)
SECOND = 1_000_000_000
START = 1_700_000_000 * SECOND
JOINTS = ("shoulder", "elbow", "grip")

ROBOT = """
name: bench
control_rate: 10
cameras: {base_0_rgb: {topic: /cam/image_raw, transport: compressed}}
joints:
  - {name: shoulder, position: [-2, 2], velocity: 1, acceleration: 1}
  - {name: elbow, position: [-2, 2], velocity: 1, acceleration: 1}
  - {name: grip, kind: gripper, position: [0, 1], velocity: 1, acceleration: 1, open: 1, closed: 0}
state: {topics: [/joint_states]}
actions: {topic: /command, type: JointTrajectory}
commands: [{topic: /command, type: JointTrajectory}]
prompt: {default: wave, topic: /prompt}
"""


def robot(**changes: Any) -> Robot:
    """The bench robot with top-level fields replaced."""
    return parse_robot(yaml.safe_dump(yaml.safe_load(ROBOT) | changes))


@dataclass
class Item:
    """One message to write: topic, message, time of recording in ns."""

    topic: str
    message: Any
    time: int


def message(kind: str, **fields: Any) -> Any:
    """A message by its type's full name."""
    return STORE.types[kind](**fields)


def header(ns: int) -> Any:
    stamp = message("builtin_interfaces/msg/Time", sec=ns // SECOND, nanosec=ns % SECOND)
    return message("std_msgs/msg/Header", stamp=stamp, frame_id="")


def joint_state(
    ns: int, positions: Sequence[float], names: Sequence[str] = JOINTS, topic: str = "/joint_states"
) -> Item:
    empty = np.zeros(0)
    body = {"name": list(names), "position": np.array(positions, np.float64), "velocity": empty, "effort": empty}
    return Item(topic, message("sensor_msgs/msg/JointState", header=header(ns), **body), ns)


def trajectory(ns: int, points: Iterable[tuple[float, Sequence[float]]], stamp: int = 0, names=JOINTS) -> Item:
    """points: (seconds from start, positions)."""
    empty = np.zeros(0)
    built = [
        message(
            "trajectory_msgs/msg/JointTrajectoryPoint",
            positions=np.array(positions, np.float64),
            velocities=empty,
            accelerations=empty,
            effort=empty,
            time_from_start=message(
                "builtin_interfaces/msg/Duration", sec=int(s), nanosec=round((s - int(s)) * SECOND)
            ),
        )
        for s, positions in points
    ]
    kind = "trajectory_msgs/msg/JointTrajectory"
    return Item("/command", message(kind, header=header(stamp), joint_names=list(names), points=built), ns)


def floats(ns: int, values: Sequence[float], topic: str = "/command") -> Item:
    layout = message("std_msgs/msg/MultiArrayLayout", dim=[], data_offset=0)
    return Item(topic, message("std_msgs/msg/Float64MultiArray", layout=layout, data=np.array(values, np.float64)), ns)


def text(ns: int, words: str, topic: str = "/prompt") -> Item:
    return Item(topic, message("std_msgs/msg/String", data=words), ns)


def picture(value: int, width: int = 16, height: int = 12) -> np.ndarray:
    """uint8 [height, width, 3] RGB of one grey, by which a test knows the frame again."""
    return np.full((height, width, 3), value, np.uint8)


def compressed(ns: int, rgb: np.ndarray, form: str = "png", topic: str = "/cam/image_raw/compressed") -> Item:
    data = cv2.imencode(f".{form}", cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR))[1].reshape(-1)
    return Item(topic, message("sensor_msgs/msg/CompressedImage", header=header(ns), format=form, data=data), ns)


def raw(ns: int, rgb: np.ndarray, topic: str = "/cam/image_raw", **changes: Any) -> Item:
    height, width = rgb.shape[:2]
    fields = {"height": height, "width": width, "encoding": "rgb8", "is_bigendian": 0, "step": width * 3}
    fields |= {"data": rgb.reshape(-1)} | changes
    return Item(topic, message("sensor_msgs/msg/Image", header=header(ns), **fields), ns)


def episode(begin: int = START, seconds: float = 3.0, shift: int = 0) -> list[Item]:
    """A demonstration: states 50 Hz, frames 20 Hz of grey 10 + number, a trajectory 10 Hz that leads by 0.1 s.

    The shoulder goes from 0 to 1 at an even pace, the elbow rests, the gripper closes halfway.
    """
    items = []
    for i in range(round(seconds * 50)):
        ns = begin + i * SECOND // 50
        items.append(joint_state(ns, [i / 50 / seconds, 0.5, 1.0 if i < seconds * 25 else 0.0]))
    for i in range(round(seconds * 20)):
        items.append(compressed(begin + i * SECOND // 20, picture(10 + shift + i)))
    for i in range(round(seconds * 10)):
        target = [(i + 1) / 10 / seconds, 0.5, 1.0 if i < seconds * 5 else 0.0]
        items.append(trajectory(begin + i * SECOND // 10, [(0.1, target)]))
    return items


def write_bag(
    path: Path,
    items: Iterable[Item],
    *,
    storage: str = "mcap",
    compression: str = "none",
    custom: dict[str, str] | None = None,
    raw_types: dict[str, str] | None = None,
) -> Path:
    """A recording at `path`. compression: none, file, message or storage. raw_types: topic -> type name as written."""
    writer = Writer(path, version=9, storage_plugin=StoragePlugin[storage.upper()])
    writer.set_compression(CompressionMode[compression.upper()], CompressionFormat.ZSTD)
    for key, value in (custom or {}).items():
        writer.set_custom_data(key, value)
    with writer:
        connections = {}
        for item in sorted(items, key=lambda item: item.time):
            kind = item.message.__msgtype__
            if item.topic not in connections:
                definition, digest = STORE.generate_msgdef(kind, ros_version=2)[0], STORE.hash_rihs01(kind)
                written = (raw_types or {}).get(item.topic, kind)
                connections[item.topic] = writer.add_connection(item.topic, written, msgdef=definition, rihs01=digest)
            writer.write(connections[item.topic], item.time, STORE.serialize_cdr(item.message, kind))
    return path


def write_split_bag(path: Path, items: Iterable[Item], parts: int, **options: Any) -> Path:
    """The same as `parts` files with one metadata.yaml."""
    ordered = sorted(items, key=lambda item: item.time)
    names, metadata = [], {}
    path.mkdir(parents=True)
    for i in range(parts):
        part = write_bag(
            path / f"part{i}", ordered[i * len(ordered) // parts : (i + 1) * len(ordered) // parts], **options
        )
        metadata = yaml.safe_load((part / "metadata.yaml").read_text())
        old = part / metadata["rosbag2_bagfile_information"]["relative_file_paths"][0]
        names.append(f"{path.name}_{i}{''.join(old.suffixes)}")
        old.rename(path / names[-1])
        (part / "metadata.yaml").unlink()
        part.rmdir()
    metadata["rosbag2_bagfile_information"] |= {"relative_file_paths": names, "message_count": len(ordered)}
    (path / "metadata.yaml").write_text(yaml.safe_dump(metadata))
    return path
