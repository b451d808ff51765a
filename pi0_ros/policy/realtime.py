"""Real-time chunking: what a new chunk has to agree with, since part of the old one is executed while it is computed.

Where the checkpoint was trained with prefix conditioning, the actions already committed go in clean and stay. Elsewhere
the flow is guided towards the old chunk (arXiv 2506.07339): fully over the committed actions, less and less after them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SCHEDULES = ("exp", "linear", "ones", "zeros")


@dataclass(frozen=True)
class GuidanceSettings:
    """How guided in-painting pulls. The published method by default, with lerobot's largest pull of 10 (the authors'
    code has 5); without `jacobian` it costs no backward pass."""

    schedule: str = "exp"
    max_weight: float = 10.0
    jacobian: bool = True

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ValueError(f"guidance schedule must be one of {', '.join(SCHEDULES)}, found {self.schedule!r}")
        if not self.max_weight > 0:
            raise ValueError(f"guidance max_weight must be above 0, found {self.max_weight}")


def guidance_weights(committed: int, known: int, horizon: int, schedule: str = "exp") -> np.ndarray:
    """Pull of every action, float64 [horizon]: 1 over the `committed` ones, falling over the rest of the `known` ones
    of the old chunk, 0 where nothing is known (arXiv 2506.07339, eq. 5; lerobot: policies/rtc/modeling_rtc.py)."""
    known = min(known, horizon)
    committed = min(committed, known)
    weights = np.zeros(horizon)
    weights[:committed] = 1.0
    if schedule == "ones":
        weights[:known] = 1.0
    elif schedule != "zeros":
        ramp = np.linspace(1.0, 0.0, known - committed + 2)[1:-1]
        weights[committed:known] = ramp * np.expm1(ramp) / np.expm1(1.0) if schedule == "exp" else ramp
    return weights
