"""The numbers that a demo run leaves behind."""

from __future__ import annotations

import platform
from collections import defaultdict
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import numpy as np


@dataclass(frozen=True)
class Episode:
    """One finished episode."""

    seed: int
    prompt: str
    instruction: str
    success: bool
    reason: str
    seconds: float
    closest: float  # metres
    moved: float  # radians: the largest excursion of any joint
    jerk: float  # rad/s^3 of the executed motion, see `rms_jerk`


def rms_jerk(stamps: list[int], velocities: list[np.ndarray]) -> float:
    """Root mean square over time and joints of the second difference of measured velocities [n, J], rad/s; stamps [n]
    in ns. Where messages are missing nothing is counted; 0 where nothing is left."""
    if len(stamps) < 3:
        return 0.0
    gaps = np.diff(stamps) / 1e9
    even = np.isclose(gaps[1:], gaps[:-1], rtol=0.01) & (gaps[1:] < 1.5 * np.median(gaps))
    jerk = np.diff(velocities, n=2, axis=0)[even] / gaps[1:][even, None] ** 2
    return float(np.sqrt(np.mean(jerk**2))) if len(jerk) else 0.0


def spread(seconds: list[float]) -> dict[str, float]:
    """p50, p95 and max in milliseconds; empty where nothing was measured."""
    if not seconds:
        return {}
    p50, p95, most = np.percentile(seconds, [50, 95, 100]) * 1e3
    return {"p50": round(float(p50), 2), "p95": round(float(p95), 2), "max": round(float(most), 2)}


def success_rates(episodes: list[Episode]) -> dict[str, dict[str, float]]:
    """Episodes, successes and success rate by prompt."""
    groups: dict[str, list[Episode]] = defaultdict(list)
    for episode in episodes:
        groups[episode.prompt].append(episode)
    return {
        prompt: {
            "episodes": len(group),
            "successes": sum(e.success for e in group),
            "success_rate": round(sum(e.success for e in group) / len(group), 4),
        }
        for prompt, group in sorted(groups.items())
    }


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    found = {"python": platform.python_version()}
    for package in ("torch", "numpy", "mujoco", "rosbags", "ros-kilted-rclpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
