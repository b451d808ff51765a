"""A training step: time, samples a second, the share of the device's rate, and augmentation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from pi0_ros.benchmark.counting import training_flops
from pi0_ros.benchmark.inputs import build_model, draw_noise, draw_observation
from pi0_ros.benchmark.machine import Rates, measure_rates, peak_memory
from pi0_ros.benchmark.timing import interleave, percentiles
from pi0_ros.model.config import Pi0Config
from pi0_ros.model.pi0 import drop_padding
from pi0_ros.training.augment import images_per_second
from pi0_ros.training.optimise import make_optimizer


def measure_training(
    config: Pi0Config,
    dtype: torch.dtype,
    device: torch.device,
    *,
    batch: int = 2,
    prompt: int = 20,
    checkpointing: bool = False,
    compiled: bool = False,
    runs: int = 10,
    seconds: float = math.inf,
    rates: Rates | None = None,
    name: str = "",
) -> dict[str, Any]:
    """Loss and gradients, and the optimizer's update, of batches that are there already. Weights stay float32;
    bfloat16 means autocast, as in the trainer."""
    rates = rates or measure_rates(device, dtype)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    model = build_model(config, device).train()
    model.set_gradient_checkpointing(checkpointing)
    if compiled:
        model.compile_layers()
    optimizer = make_optimizer(model, weight_decay=1e-10)
    observation = drop_padding(draw_observation(config, batch, prompt)[0]).to(device)
    actions, noise = (draw_noise(config, batch, seed).to(device) for seed in (1, 2))
    time = torch.rand(batch, generator=torch.Generator().manual_seed(3)).to(device)

    def gradients() -> None:
        model.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = model.compute_loss(observation, actions, noise=noise, time=time).mean()
        loss.backward()

    def update() -> None:
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0, foreach=True)
        optimizer.step()

    work: dict[str, Callable[[], None]] = {"loss and gradients": gradients, "clip and update": update}
    taken = interleave(work, runs, device, f"training {name}".strip(), seconds)
    taken["whole step"] = taken["loss and gradients"] + taken["clip and update"]
    flops = training_flops(config, batch=batch, cameras=len(config.cameras), prompt=prompt)
    median = {part: float(np.median(values)) for part, values in taken.items()}
    return {
        "config": name,
        "dtype": str(dtype).removeprefix("torch."),
        "device": str(device),
        "batch": batch,
        "prompt": prompt,
        "checkpointing": checkpointing,
        "compiled": compiled,
        "runs": len(taken["whole step"]),
        "matmul_gflops_per_s": round(rates.flops / 1e9, 1),
        "parts": [{"part": part, **percentiles(values)} for part, values in taken.items()],
        "samples_per_s": round(batch / median["whole step"], 2),
        "gflop": round(flops / 1e9, 2),
        "rate_share": round(flops / median["loss and gradients"] / rates.flops, 3),
        "augment_images_per_s": round(images_per_second(config.cameras, config.vision.image_size, batch=8, runs=3), 1),
        "memory": peak_memory(device),
    }
