"""Load weights of real size and say what it takes: resident memory against bytes of weights, and seconds.

Writes random bfloat16 weights of the whole pi0 (or pi05), sharded and with an index as published ones are (7 GB) into a
temporary folder, loads them in a fresh process, touches every page, and removes the folder. Not part of the tests.

    python scripts/load_real_size.py [--preset pi05] [--folder /data/tmp]
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from tqdm import tqdm

from pi0_ros.model import layouts
from pi0_ros.model.checkpoint import open_checkpoint, parameter_shapes
from pi0_ros.model.config import PRESETS
from pi0_ros.model.files import write_json, write_safetensors

SHARD_BYTES = 2 * 10**9
LIMIT = 1.15  # peak resident memory over the weights' bytes


@dataclass
class Options:
    """Measure what loading a checkpoint of real size takes."""

    preset: str = "pi0"
    """Sizes: pi0, pi05, nano or nano05."""
    folder: Path | None = None
    """Where the temporary folder goes (default: the system's). Needs the weights' size in free space."""
    stored: Literal["bfloat16", "float32"] = "bfloat16"
    """Dtype to write."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Dtype to load into: the written one is memory-mapped, another is converted."""
    load: Path | None = None
    """Load this folder and print the measurement as JSON; what the script starts itself for."""


def write_shards(preset: str, folder: Path, dtype: torch.dtype) -> None:
    """Random weights in openpi's layout under `folder`."""
    config = PRESETS[preset]
    shapes = {layouts.HEAD if k == layouts.EMBEDDING else k: v for k, v in parameter_shapes(config).items()}
    shapes[layouts.EXPERT_HEAD] = (config.vocab_size, config.expert.width)
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for key, shape in shapes.items():
        size = dtype.itemsize * math.prod(shape)
        if filled and filled + size > SHARD_BYTES:
            shards.append({})
            filled = 0
        shards[-1][key] = shape
        filled += size
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2**22, generator=generator).mul_(0.02).to(dtype)  # repeated: writing is not the point

    def tensors(keys: dict[str, tuple[int, ...]]):
        for key, shape in tqdm(keys.items(), "writing", leave=False):
            size = math.prod(shape)
            yield key, noise.repeat(size // len(noise) + 1)[:size].reshape(shape)

    weight_map = {}
    for i, shard in enumerate(shards):
        name = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / name, {k: (s, dtype) for k, s in shard.items()}, tensors(shard))
        weight_map |= dict.fromkeys(shard, name)
    write_json(folder / "model.safetensors.index.json", {"weight_map": weight_map})


def peak_resident() -> int:
    """Bytes, of this process since it began (getrusage would count what it was forked from)."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))


def measure(folder: Path, dtype: str) -> dict[str, float]:
    """Load in this process: bytes, seconds, and resident memory beyond what Python and torch had before."""
    before = peak_resident()
    start = time.perf_counter()
    checkpoint = open_checkpoint(folder)
    opened = time.perf_counter()
    model = checkpoint.model(getattr(torch, dtype))
    built = time.perf_counter()
    total = sum(float(p.detach().view(-1)[::1024].float().sum()) for p in model.parameters())  # every page once
    touched = time.perf_counter()
    peak = peak_resident()
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    return {
        "layout": checkpoint.describe(),
        "weights": size,
        "before": before,
        "peak": peak,
        "open_s": opened - start,
        "model_s": built - opened,
        "touch_s": touched - built,
        "checksum": total,
    }


def main() -> None:
    """Write, load in a fresh process, print, remove; exit 1 above the limit."""
    options = tyro.cli(Options)
    if options.load is not None:
        print(json.dumps(measure(options.load, options.dtype)))
        return
    config = PRESETS[options.preset]
    numbers = sum(map(math.prod, parameter_shapes(config).values())) + config.vocab_size * config.expert.width
    stored = getattr(torch, options.stored)
    needed = stored.itemsize * numbers
    folder = Path(tempfile.mkdtemp(prefix="pi0_real_size_", dir=options.folder))
    try:
        free = shutil.disk_usage(folder).free
        if free < 1.2 * needed:
            raise SystemExit(
                f"error: {folder}: {free / 1e9:.1f} GB free, {1.2 * needed / 1e9:.1f} GB needed; see --folder"
            )
        write_shards(options.preset, folder, stored)
        command = [sys.executable, __file__, "--load", str(folder), "--dtype", options.dtype]
        run = subprocess.run(command, check=True, capture_output=True, text=True)
    finally:
        shutil.rmtree(folder)
    result = json.loads(run.stdout.splitlines()[-1])
    ratio = result["peak"] / result["weights"]
    print(result["layout"])
    print(f"weights {result['weights'] / 1e9:.2f} GB in {options.dtype}, stored as {options.stored}")
    print(
        f"peak resident {result['peak'] / 1e9:.2f} GB = {ratio:.3f} x ({result['before'] / 1e9:.2f} GB before loading)"
    )
    print(f"open {result['open_s']:.1f} s, model {result['model_s']:.1f} s, every page read {result['touch_s']:.1f} s")
    if ratio > LIMIT and options.preset in ("pi0", "pi05"):
        raise SystemExit(f"error: peak resident memory is {ratio:.3f} x the weights, the limit is {LIMIT}")


if __name__ == "__main__":
    main()
