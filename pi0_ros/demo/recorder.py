"""Writes what happens on the demo's graph into a rosbag2 recording."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy

from pi0_ros.ros.bag import BagFile

RECORDED_QOS = QoSProfile(depth=50, reliability=ReliabilityPolicy.BEST_EFFORT)
LATCHED_QOS = QoSProfile(depth=10, durability=DurabilityPolicy.TRANSIENT_LOCAL, reliability=ReliabilityPolicy.RELIABLE)


class BagRecorder:
    """Subscribes to topics and writes every message until `close`."""

    def __init__(self, node: Node, path: Path, topics: dict[str, tuple[type, bool]]) -> None:
        """`topics`: name -> (message class, latched)."""
        self._node = node
        self._bag = BagFile(path, {topic: kind for topic, (kind, _) in topics.items()})
        self._subscriptions = [self._record(topic, kind, latched) for topic, (kind, latched) in topics.items()]

    def _record(self, topic: str, kind: type, latched: bool) -> Any:
        def write(data: bytes) -> None:
            self._bag.write(topic, self._node.get_clock().now().nanoseconds, data)

        return self._node.create_subscription(kind, topic, write, LATCHED_QOS if latched else RECORDED_QOS, raw=True)

    def close(self) -> None:
        """Stop recording and give the bag its name."""
        for subscription in self._subscriptions:
            self._node.destroy_subscription(subscription)
        self._bag.keep()
