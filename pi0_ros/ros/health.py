"""How policy_node is doing: counters and windows that the worker writes and the diagnostics read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from pi0_ros.ros.conversions import SECOND
from pi0_ros.ros.diagnostics import Report, Window
from pi0_ros.ros.parameters import Spec
from pi0_ros.wording import first_line

STAGES = ("decode", "preprocess", "vision", "prefix", "denoise", "publish", "total")

THRESHOLDS = (
    Spec("diagnostics.latency_warn", 0.3, "WARN above this p95 from tick to published chunk, s; 0: never", 0, 3600),
    Spec("diagnostics.latency_error", 1.0, "ERROR above this p95 from tick to published chunk, s; 0: never", 0, 3600),
    Spec("diagnostics.rejected_warn", 0.05, "WARN above this share of ticks without valid observation; 0: never", 0, 1),
    Spec(
        "diagnostics.rejected_error", 0.5, "ERROR above this share of ticks without valid observation; 0: never", 0, 1
    ),
    Spec("diagnostics.misses_warn", 0.1, "WARN above this share of ticks that came too late; 0: never", 0, 1),
    Spec("diagnostics.misses_error", 0.5, "ERROR above this share of ticks that came too late; 0: never", 0, 1),
    Spec("diagnostics.rate_warn", 0.0, "WARN where a stream comes less often, Hz", 0, 10000),
    Spec("diagnostics.rate_error", 0.0, "ERROR where a stream comes less often, Hz", 0, 10000),
    Spec("diagnostics.age_warn", 0.8, "WARN above this share of a stream's maximum age; 0: never", 0, 1000),
    Spec("diagnostics.age_error", 1.0, "ERROR above this share of a stream's maximum age; 0: never", 0, 1000),
    Spec("diagnostics.skew_warn", 0.8, "WARN above this share of the maximum skew; 0: never", 0, 1000),
    Spec("diagnostics.skew_error", 1.0, "ERROR above this share of the maximum skew; 0: never", 0, 1000),
    Spec("diagnostics.gpu_warn", 0.95, "WARN above this share of GPU memory in use; 0: never", 0, 1),
    Spec("diagnostics.gpu_error", 0.0, "ERROR above this share of GPU memory in use; 0: never", 0, 1),
)


@dataclass
class Health:
    """Written by the worker thread, read by the executor's; single values, or windows with their own lock."""

    latency: dict[str, Window] = field(default_factory=lambda: {stage: Window() for stage in STAGES})
    observation_age: Window = field(default_factory=Window)  # s, from observation to published chunk
    skew: Window = field(default_factory=Window)
    rejected: Window = field(default_factory=Window)  # 1 for a tick without a valid observation, else 0
    missed: Window = field(default_factory=Window)  # 1 for a tick that came while the one before was at work, else 0
    reused: Window = field(default_factory=Window)  # 1 for a chunk from the cached prefix, else 0
    ticks: int = 0
    chunks: int = 0
    dropped: int = 0  # chunks thrown away: made in an older epoch, or after stop
    rejections: int = 0
    misses: int = 0
    prefix_reused: int = 0
    blame: str = ""  # the last rejection, empty after a valid observation
    fault: str = ""  # why the worker stopped

    def clear_windows(self) -> None:
        """The clock was set back."""
        windows = (self.observation_age, self.skew, self.rejected, self.missed, self.reused)
        for window in (*self.latency.values(), *windows):
            window.clear()

    def reject(self, now: int, reason: str) -> None:
        """A tick without a valid observation."""
        self.blame = reason
        self.rejections += 1
        self.rejected.add(now / SECOND, 1.0)

    def accept(self, now: int, skew: float) -> None:
        """A tick with a valid observation, whose streams are `skew` seconds apart."""
        self.blame = ""
        self.rejected.add(now / SECOND, 0.0)
        self.skew.add(now / SECOND, skew)

    def publish(self, now: int, observed: int, latency: dict[str, float], prefix_reused: bool) -> None:
        """A published chunk; latency in seconds by stage."""
        seconds = now / SECOND
        self.chunks += 1
        self.prefix_reused += prefix_reused
        self.reused.add(seconds, float(prefix_reused))
        self.observation_age.add(seconds, (now - observed) / SECOND)
        for stage in STAGES:
            if stage in latency:
                self.latency[stage].add(seconds, latency[stage])

    def report(self, name: str, now: int, limits: dict[str, Any], max_skew: float) -> Report:
        """Everything but the streams."""
        report, seconds = Report(name), now / SECOND
        if self.fault:
            report.error(self.fault)
        for key in ("ticks", "chunks", "dropped", "rejections", "prefix_reused"):
            report.add(key, getattr(self, key))
        report.add("deadline_misses", self.misses)
        report.add("chunk_rate_hz", self.reused.rate(seconds))
        for stage in STAGES:
            report.window(f"latency_{stage}_ms", self.latency[stage].summary(seconds))
        report.window("observation_age_ms", self.observation_age.summary(seconds))
        report.window("skew_ms", self.skew.summary(seconds))

        def limit(key: str) -> tuple[float, float]:
            return limits[f"diagnostics.{key}_warn"], limits[f"diagnostics.{key}_error"]

        if total := self.latency["total"].summary(seconds):
            report.judge("latency_p95_s", total.p95, *limit("latency"), " s")
        if skew := self.skew.summary(seconds):
            report.judge("skew_share", skew.p95 / max_skew, *limit("skew"))
        for key, window in (("rejected", self.rejected), ("misses", self.missed)):
            if len(values := window.values(seconds)):
                report.judge(f"{key}_share", float(values.mean()), *limit(key))
        if len(reused := self.reused.values(seconds)):
            report.add("prefix_reuse_share", float(reused.mean()))
        if self.blame:
            report.add("blame", self.blame)
            if report.level:
                report.reasons.insert(0, self.blame)
        return report


def gpu_memory(report: Report, warn: float, error: float) -> None:
    """Memory of the GPU, if this process has one."""
    if not torch.cuda.is_initialized():
        return
    device = max(range(torch.cuda.device_count()), key=torch.cuda.memory_allocated)  # the one that the policy is on
    try:
        free, total = torch.cuda.mem_get_info(device)
    except RuntimeError as fault:  # after a fault of the GPU every call fails; the node has to go on to say so
        report.error(f"the GPU does not answer: {first_line(fault)}")
        return
    report.add("gpu_memory_policy_mb", torch.cuda.memory_allocated(device) / 2**20)
    report.add("gpu_memory_total_mb", total / 2**20)
    report.judge("gpu_memory_share", 1 - free / total, warn, error)
