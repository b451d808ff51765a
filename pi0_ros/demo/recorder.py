"""Writes what happens on the ROS graph into a rosbag2 recording (mcap), as `ros2 bag record` would."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from ament_index_python.packages import get_package_share_directory
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.typesys import Stores, get_types_from_msg, get_typestore

from pi0_ros.ros.conversions import type_name

RECORDED_QOS = QoSProfile(depth=50, reliability=ReliabilityPolicy.BEST_EFFORT)
LATCHED_QOS = QoSProfile(depth=10, durability=DurabilityPolicy.TRANSIENT_LOCAL, reliability=ReliabilityPolicy.RELIABLE)


class BagRecorder:
    """Subscribes to topics and writes every message, as serialised on the wire, until `close`.

    The recording grows in a hidden folder beside `path` and moves there when it is whole.
    """

    def __init__(self, node: Node, path: Path, topics: dict[str, tuple[type, bool]]) -> None:
        """`topics`: name -> (message class, latched)."""
        self._node, self._path = node, path
        self._partial = path.parent / ".partial" / path.name  # the file inside takes its name from the folder
        shutil.rmtree(self._partial, ignore_errors=True)
        self._partial.parent.mkdir(parents=True, exist_ok=True)
        self._store = get_typestore(Stores.ROS2_KILTED)
        self._writer = Writer(self._partial, version=9, storage_plugin=StoragePlugin.MCAP)
        self._writer.open()
        self._subscriptions = [self._record(topic, kind, latched) for topic, (kind, latched) in topics.items()]

    def _record(self, topic: str, kind: type, latched: bool) -> Any:
        typename = type_name(kind)
        if typename not in self._store.types:
            package, folder, name = typename.split("/")
            definition = Path(get_package_share_directory(package), folder, f"{name}.msg").read_text()
            self._store.register(get_types_from_msg(definition, typename))
        connection = self._writer.add_connection(topic, typename, typestore=self._store)

        def write(data: bytes) -> None:
            self._writer.write(connection, self._node.get_clock().now().nanoseconds, data)

        return self._node.create_subscription(kind, topic, write, LATCHED_QOS if latched else RECORDED_QOS, raw=True)

    def close(self) -> None:
        """Stop recording and give the bag its name."""
        for subscription in self._subscriptions:
            self._node.destroy_subscription(subscription)
        self._writer.close()
        shutil.rmtree(self._path, ignore_errors=True)
        self._partial.rename(self._path)
        self._partial.parent.rmdir()
