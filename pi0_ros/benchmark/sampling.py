"""The sampler stage by stage: time, work done and the share of what the device can do, memory."""

from __future__ import annotations

import math
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pi0_ros.benchmark.counting import Work, sampling_work
from pi0_ros.benchmark.inputs import BenchmarkError, build_model, draw_noise, draw_observation
from pi0_ros.benchmark.machine import Rates, measure_rates, peak_memory
from pi0_ros.benchmark.timing import interleave, percentiles
from pi0_ros.model.config import Pi0Config
from pi0_ros.policy.sampler import Sample, Sampler

SCENARIOS = ("everything new", "one camera new", "prefix reused")
STAGES = ("vision", "prefix", "denoise", "total")


class Feed:
    """One observation, given to a sampler again and again, with some of its frames called new."""

    def __init__(self, sampler: Sampler, prompt: int) -> None:
        config = sampler.config
        observation, pixels = draw_observation(config, prompt=prompt)
        images = dict(zip(config.cameras, pixels[0], strict=True))
        self.sampler = sampler
        self.images = {slot: images[slot] for slot in sampler.cameras}
        self.tokens = observation.tokens[0, :prompt].numpy()
        self.state, self.noise = observation.state[0], draw_noise(config)[0]
        self.frames = dict.fromkeys(sampler.cameras, 0)

    def chunk(self, new: int) -> Sample:
        """A chunk for which the frames of the first `new` cameras are new ones."""
        for slot in self.sampler.cameras[:new]:
            self.frames[slot] += 1
        return self.sampler.sample(self.images, self.tokens, self.state, self.noise, frames=self.frames)

    @torch.no_grad()
    def step(self) -> Tensor:
        """One denoising step from the noise, over the prefix and state of the last chunk: x f32 [horizon, A].

        The first of a chunk: on a GPU pi0's state token, which no other step has, comes with it.
        """
        sampler = self.sampler
        sampler.x.copy_(self.noise, non_blocking=True)
        sampler.graphs.run(("one step", len(self.tokens)), lambda: sampler.step(0))
        return sampler.x


def measure_sampler(
    config: Pi0Config,
    dtype: torch.dtype,
    device: torch.device,
    *,
    cameras: int = 3,
    prompt: int = 20,
    steps: int = 10,
    runs: int = 30,
    seconds: float = math.inf,
    rates: Rates | None = None,
    name: str = "",
) -> dict[str, Any]:
    """Per scenario and stage: p50 and p95, FLOPs and bytes and what share of the device's rates they come to; memory.

    `rates` are measured where they are not given. BenchmarkError for more cameras than the model has.
    """
    if not 1 <= cameras <= len(config.cameras):
        raise BenchmarkError(f"--cameras: 1 to {len(config.cameras)} for this model, found {cameras}")
    plain = torch.bfloat16 if dtype == torch.float8_e4m3fn else dtype  # what float8 is held against, too
    rates = rates or measure_rates(device, plain)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    sampler = Sampler(
        build_model(config, device), cameras=config.cameras[:cameras], num_steps=steps, dtype=dtype, device=device
    )
    feed = Feed(sampler, prompt)
    feed.chunk(cameras)
    latencies: dict[str, list[dict[str, float]]] = {scenario: [] for scenario in SCENARIOS}
    new = dict(zip(SCENARIOS, (cameras, 1, 0), strict=True))
    work = {s: lambda s=s: latencies[s].append(feed.chunk(new[s]).latency) for s in SCENARIOS}
    taken = interleave({**work, "one step": feed.step}, runs, device, f"sampler {name}".strip(), seconds)
    rows = []
    for scenario in SCENARIOS:
        counted = sampling_work(
            config, cameras=cameras, encoded=new[scenario], prompt=prompt, steps=steps, itemsize=plain.itemsize
        )
        stages = {stage: np.array([run[stage] for run in latencies[scenario][1:]]) for stage in STAGES[:-1]}
        for stage, values in {**stages, "total": taken[scenario]}.items():
            if counted[stage].flops:
                rows.append({"case": scenario, "stage": stage, **_row(values, counted[stage], rates)})
    rows.append({"case": "one step", "stage": "denoise", **_row(taken["one step"], counted["one step"], rates)})
    return {
        "config": name,
        "dtype": str(dtype).removeprefix("torch."),
        "device": str(device),
        "cameras": cameras,
        "prompt": prompt,
        "steps": steps,
        "horizon": config.action_horizon,
        "runs": len(taken["one step"]),
        "matmul_gflops_per_s": round(rates.flops / 1e9, 1),
        "copy_gb_per_s": round(rates.bandwidth / 1e9, 1),
        "stages": rows,
        "memory": {**sampler_memory(sampler), **peak_memory(device)},
    }


def _row(seconds: np.ndarray, work: Work, rates: Rates) -> dict[str, float]:
    median = float(np.median(seconds))
    return {
        **percentiles(seconds),
        "gflop": round(work.flops / 1e9, 3),
        "rate_share": round(work.flops / median / rates.flops, 3),
        "mb": round(work.bytes / 1e6, 2),
        "bandwidth_share": round(work.bytes / median / rates.bandwidth, 3),
    }


def sampler_memory(sampler: Sampler) -> dict[str, float]:
    """MB of the rearranged weights (the table of token embeddings included) and of the buffers."""
    owners = [owner for owner in (sampler, sampler.memory, sampler.steps) if owner is not None]
    tensors = [value for owner in owners for value in vars(owner).values() if isinstance(value, Tensor)]
    buffers = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    sizes = {"weights_mb": tensor_bytes(sampler.weights), "buffers_mb": sum(buffers.values())}
    return {name: round(size / 1e6, 2) for name, size in sizes.items()}


def tensor_bytes(value: Any) -> int:
    """Bytes of every tensor in a nest of dataclasses, plain objects, lists, tuples and dicts."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(map(tensor_bytes, value.values()))
    if isinstance(value, (list, tuple)):
        return sum(map(tensor_bytes, value))
    if is_dataclass(value):
        return sum(tensor_bytes(getattr(value, field.name)) for field in fields(value))
    return tensor_bytes(vars(value)) if hasattr(value, "__dict__") else 0
