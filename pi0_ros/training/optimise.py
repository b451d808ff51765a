"""Learning rate, optimizer and averaged weights."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import nn

from pi0_ros.training.parts import trained
from pi0_ros.training.sharding import local


def learning_rate(step: int, *, steps: int, warmup: int, peak: float, final: float) -> float:
    """The rate of optimizer step `step`, counted from 0: linear from peak / (warmup + 1), then a cosine from the end
    of the warm-up to `final` * peak at `steps` (openpi: training/optimizer.py, CosineDecaySchedule)."""
    if step < warmup:
        first = peak / (warmup + 1)
        return first + (peak - first) * step / warmup
    done = min(1.0, (step - warmup) / max(1, steps - warmup))
    return peak * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * done)))


def make_optimizer(model: nn.Module, weight_decay: float) -> torch.optim.AdamW:
    """AdamW over the trained parameters, with openpi's betas and epsilon."""
    parameters = list(trained(model).values())
    return torch.optim.AdamW(parameters, lr=0.0, betas=(0.9, 0.95), eps=1e-8, weight_decay=weight_decay, fused=True)


class Average:
    """Exponential moving average of the trained parameters: d * old + (1 - d) * new after every step.

    With decay 0 there is none, and the live weights stand for it.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self._live = trained(model)
        self.weights = {name: p.detach().clone() for name, p in self._live.items()} if decay else {}

    @torch.no_grad()
    def update(self) -> None:
        """Take the present weights in."""
        if self.decay:
            average = [local(weight) for weight in self.weights.values()]
            torch._foreach_lerp_(average, [local(self._live[name]) for name in self.weights], 1.0 - self.decay)

    def swapped(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A model's state dict with the averaged weights in place of the live ones."""
        return {**state, **self.weights}

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """The model itself has the averaged weights for the time of the block."""
        live = {name: self._live[name].detach().clone() for name in self.weights}
        try:
            self._set(self.weights)
            yield
        finally:
            self._set(live)

    @torch.no_grad()
    def _set(self, values: dict[str, torch.Tensor]) -> None:
        for name, value in values.items():
            local(self._live[name]).copy_(local(value))
