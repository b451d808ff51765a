"""Timing functions against one another on a machine that is never quite quiet."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm


@dataclass(frozen=True)
class Ratio:
    """Median seconds of one function over another's, from runs in turn, and the ratio pair by pair."""

    ours: float
    theirs: float
    ratio: float  # median of the pairs
    low: float
    high: float


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(function: Callable[[], object], device: torch.device) -> float:
    """Seconds that one call takes, the device's work included."""
    synchronise(device)
    begin = time.perf_counter()
    function()
    synchronise(device)
    return time.perf_counter() - begin


def interleave(
    functions: Mapping[str, Callable[[], object]], runs: int, device: torch.device, title: str
) -> dict[str, np.ndarray]:
    """Seconds of `runs` calls of each function, A B C A B C ..., after one call of each that does not count."""
    seconds = {name: np.empty(runs) for name in functions}
    with tqdm(total=runs + 1, desc=title, leave=False) as bar:
        for i in range(-1, runs):
            for name, function in functions.items():
                elapsed = timed(function, device)
                if i >= 0:
                    seconds[name][i] = elapsed
            bar.update()
    return seconds


def ratio(ours: np.ndarray, theirs: np.ndarray) -> Ratio:
    """The ratio of two interleaved series."""
    pairs = ours / theirs
    return Ratio(*(float(x) for x in (np.median(ours), np.median(theirs), np.median(pairs), pairs.min(), pairs.max())))


def percentiles(seconds: np.ndarray) -> dict[str, float]:
    """p50 and p95 in milliseconds."""
    p50, p95 = np.percentile(seconds, [50, 95]) * 1e3
    return {"p50_ms": round(float(p50), 3), "p95_ms": round(float(p95), 3)}
