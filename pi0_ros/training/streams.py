"""The randomness of a training step: three independent streams, derived from one seed by splitting keys."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Streams:
    """Fresh generators of one step and rank. What is drawn from one leaves the others as they are."""

    augmentation: torch.Generator
    noise: torch.Generator
    time: torch.Generator


def step_streams(seed: int, step: int, rank: int = 0, device: torch.device | str = "cpu") -> Streams:
    """The streams of a step, the same whenever they are asked for: a resumed run draws what it would have drawn.

    Each seed is numpy's SeedSequence(seed) split by (step, rank, stream), as openpi folds the step into its key and
    splits it in three (openpi: scripts/train.py; models/pi0.py, compute_loss).

    torch's generator on the CPU takes 32 bits of a seed: of four billion pairs of steps one may draw alike.

    Raises:
        ValueError: a negative seed, step or rank.
    """
    if min(seed, step, rank) < 0:
        raise ValueError(f"seed, step and rank must not be negative, found {seed}, {step}, {rank}")

    def stream(key: int) -> torch.Generator:
        words = np.random.SeedSequence(seed, spawn_key=(step, rank, key)).generate_state(1, np.uint64)
        return torch.Generator(device=device).manual_seed(int(words[0]))

    return Streams(augmentation=stream(0), noise=stream(1), time=stream(2))
