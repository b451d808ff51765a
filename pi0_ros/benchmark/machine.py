"""What the numbers were taken on: processor, versions, and the rates that the device itself reaches."""

from __future__ import annotations

import os
import platform
import resource
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pi0_ros.benchmark.inputs import BenchmarkError
from pi0_ros.benchmark.timing import timed
from pi0_ros.model.linear import cpuinfo
from pi0_ros.policy.fused import Linear


@dataclass(frozen=True)
class Rates:
    """What the device reaches at best, measured now."""

    flops: float  # per second, of a large product in the dtype, through the kernels that the sampler uses
    bandwidth: float  # bytes per second, read and written, of a large copy


def set_threads(threads: int) -> None:
    """Threads of torch on the CPU; 0 leaves torch's own number."""
    if threads < 0:
        raise BenchmarkError(f"--threads: 0 (torch's own number) or more, found {threads}")
    if threads:
        torch.set_num_threads(threads)


def describe(device: torch.device) -> dict[str, Any]:
    """Processor or card, threads, load, versions, allocator settings."""
    try:
        import transformers

        peer = transformers.__version__
    except ImportError:
        peer = "not installed"
    facts = {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": peer,
        "malloc": " ".join(f"{k}={v}" for k, v in sorted(os.environ.items()) if "MALLOC" in k) or "glibc's defaults",
    }
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
    return facts


def processor() -> str:
    """The processor's name."""
    for line in cpuinfo().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@torch.no_grad()
def measure_rates(device: torch.device, dtype: torch.dtype, *, size: int | None = None, runs: int = 5) -> Rates:
    """The best of a few large products and copies. `size`: of the square product; the copy reads 64 bytes for each of
    its elements, which is far more than a cache holds."""
    cuda = device.type == "cuda"
    size = size or (8192 if cuda else 2048)
    x = torch.randn(size, size, device=device).to(dtype)
    linear = Linear(torch.randn(size, size, device=device), None, dtype, size, plain=False)
    flops = 2 * size**3 / _best(lambda: linear(x), device, runs)
    source = torch.ones(16 * size * size, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    moved = 2 * source.numel() * source.element_size()
    return Rates(flops, moved / _best(lambda: target.copy_(source), device, runs))


def _best(function, device: torch.device, runs: int) -> float:
    function()
    return float(np.min([timed(function, device) for _ in range(runs)]))


def peak_memory(device: torch.device) -> dict[str, float]:
    """MB: the process's largest resident size so far, and on a GPU the most that torch had allocated."""
    unit = 1 if sys.platform == "darwin" else 1024
    memory = {"peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6}
    if device.type == "cuda":
        memory["peak_cuda_mb"] = torch.cuda.max_memory_allocated(device) / 1e6
    return {name: round(value, 1) for name, value in memory.items()}
