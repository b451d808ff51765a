"""What a node says about itself on /diagnostics: sliding-window statistics and judged values."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from rclpy.clock import Clock, ClockType
from rclpy.node import Node
from rclpy.qos import QoSProfile


@dataclass(frozen=True)
class Summary:
    """Of the numbers in a window; in the numbers' own unit."""

    count: int
    p50: float
    p95: float
    max: float


class Window:
    """Numbers of the last `seconds`, written by one thread and read by another.

    Times are seconds of any one clock; a time before the newest one (clock set back) forgets everything.
    """

    def __init__(self, seconds: float = 10.0, most: int = 4096) -> None:
        self._seconds = seconds
        self._items: deque[tuple[float, float]] = deque(maxlen=most)
        self._lock = threading.Lock()

    def add(self, now: float, value: float = 1.0) -> None:
        """Take in `value`, seen at time `now`."""
        with self._lock:
            if self._items and now < self._items[-1][0]:
                self._items.clear()
            self._items.append((now, value))

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._items.clear()

    def _recent(self, now: float) -> list[tuple[float, float]]:
        with self._lock:
            return [item for item in self._items if now - self._seconds <= item[0] <= now]

    def values(self, now: float) -> np.ndarray:
        """[n] the values of the last `seconds`, oldest first."""
        return np.array([value for _, value in self._recent(now)])

    def summary(self, now: float) -> Summary | None:
        """p50, p95 and largest of the window, None when it is empty."""
        values = self.values(now)
        if not len(values):
            return None
        p50, p95 = np.percentile(values, [50, 95])
        return Summary(len(values), float(p50), float(p95), float(values.max()))

    def rate(self, now: float) -> float:
        """Hz: intervals since the window's first value over the time since; falls when nothing more arrives."""
        items = self._recent(now)
        elapsed = now - items[0][0] if items else 0.0
        return (len(items) - 1) / elapsed if elapsed > 0 else 0.0


@dataclass
class Report:
    """One DiagnosticStatus in the making: values, and the worst level with its reasons."""

    name: str
    values: dict[str, str] = field(default_factory=dict)
    level: int = 0
    reasons: list[str] = field(default_factory=list)

    def add(self, key: str, value: Any) -> None:
        """Show `value` under `key`; floats with four digits."""
        self.values[key] = f"{value:.4g}" if isinstance(value, float) else str(value)

    def warn(self, reason: str) -> None:
        """At least WARN, because of `reason`."""
        self._raise(1, reason)

    def error(self, reason: str) -> None:
        """At least ERROR, because of `reason`."""
        self._raise(2, reason)

    def _raise(self, level: int, reason: str) -> None:
        self.level = max(self.level, level)
        # The worst comes first: viewers show only the beginning of a message.
        self.reasons.insert(0 if level == 2 else len(self.reasons), reason)

    def judge(self, key: str, value: float, warn: float, error: float, unit: str = "") -> None:
        """Show `value`, and warn or raise an error where it is above a threshold; a threshold of 0 is none."""
        self.add(key, float(value))
        if error and value > error:
            self.error(f"{key} is {value:.4g}{unit}, above {error:g}{unit}")
        elif warn and value > warn:
            self.warn(f"{key} is {value:.4g}{unit}, above {warn:g}{unit}")

    def window(self, key: str, summary: Summary | None, scale: float = 1e3) -> None:
        """Show a window as `key`_p50, _p95 and _max, times `scale` (seconds to ms by default)."""
        if summary is not None:
            for part in ("p50", "p95", "max"):
                self.add(f"{key}_{part}", getattr(summary, part) * scale)

    def message(self, hardware_id: str) -> DiagnosticStatus:
        """The report as a message; its text is the reasons, or "OK"."""
        return DiagnosticStatus(
            level=bytes([self.level]),
            name=self.name,
            message="; ".join(self.reasons) or "OK",
            hardware_id=hardware_id,
            values=[KeyValue(key=key, value=value) for key, value in self.values.items()],
        )


def title(node: Node) -> str:
    """What the names of a node's statuses begin with: "policy_node", in a namespace "left/policy_node"; two arms stay
    apart."""
    return node.get_fully_qualified_name().lstrip("/")


class DiagnosticsPublisher:
    """Publishes what `build` returns on /diagnostics, once per `period` seconds.

    The timer runs on the steady clock: a node that waits for a /clock that never comes must still say so.
    """

    def __init__(self, node: Node, build: Callable[[], list[Report]], hardware_id: str = "", period: float = 1.0):
        self._node, self._build, self.hardware_id, self._period = node, build, hardware_id, period
        self._published = 0.0  # monotonic s
        self._publisher = node.create_publisher(DiagnosticArray, "/diagnostics", QoSProfile(depth=10))
        self._timer = node.create_timer(period, self.publish, clock=Clock(clock_type=ClockType.STEADY_TIME))

    def publish(self) -> None:
        """Publish now, too: for a failure that should not wait for the next second."""
        array = DiagnosticArray(status=[report.message(self.hardware_id) for report in self._build()])
        array.header.stamp = self._node.get_clock().now().to_msg()
        self._published = time.monotonic()
        self._publisher.publish(array)

    def publish_if_due(self) -> None:
        """For a callback that keeps the executor, and with it the timer, waiting."""
        if time.monotonic() - self._published >= self._period:
            self.publish()
