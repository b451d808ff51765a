"""Timing functions against one another on a machine that is never quite quiet."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

LEAST_RUNS = 1


@dataclass(frozen=True)
class Ratio:
    """Median seconds of one function and of another, and the ratio of their runs pair by pair."""

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
    """Seconds that one call takes, the device's work included: by CUDA events on a GPU, by the clock elsewhere."""
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        synchronise(device)
        begin.record()
        function()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def interleave(
    functions: Mapping[str, Callable[[], object]],
    runs: int,
    device: torch.device,
    title: str,
    seconds: float = math.inf,
) -> dict[str, np.ndarray]:
    """Seconds of `runs` calls of each function, A B C A B C ..., after one call of each that does not count.

    Rounds end early once `seconds` are over, though never before `LEAST_RUNS`.
    """
    taken: dict[str, list[float]] = {name: [] for name in functions}
    deadline = time.monotonic() + seconds
    with tqdm(total=runs + 1, desc=title, leave=False) as bar:
        for round_ in range(-1, runs):
            if round_ >= LEAST_RUNS and time.monotonic() > deadline:
                break
            for name, function in functions.items():
                elapsed = timed(function, device)
                if round_ >= 0:
                    taken[name].append(elapsed)
            bar.update()
    return {name: np.array(values) for name, values in taken.items()}


def ratio(ours: np.ndarray, theirs: np.ndarray) -> Ratio:
    """The ratio of two interleaved series."""
    pairs = ours / theirs
    return Ratio(*(float(x) for x in (np.median(ours), np.median(theirs), np.median(pairs), pairs.min(), pairs.max())))


def percentiles(seconds: np.ndarray) -> dict[str, float]:
    """p50 and p95 in milliseconds."""
    p50, p95 = np.percentile(seconds, [50, 95]) * 1e3
    return {"p50_ms": round(float(p50), 3), "p95_ms": round(float(p95), 3)}
