"""Flow matching: time, interpolation, and the noise sources that a flow may start from.

t = 1 is the start (noise) and t = 0 the actions: x_t = t * noise + (1 - t) * actions, and the velocity to learn is
u_t = noise - actions (openpi: pi0.py, compute_loss; the pi0 paper counts t the other way round).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

DEGRADATIONS = ("smooth", "downsample", "mask")


class NoiseSourceError(ValueError):
    """A noise source that is unknown, mis-set, or not the one a checkpoint was trained with."""


def sample_time(batch: int, *, generator: torch.Generator) -> torch.Tensor:
    """t ~ Beta(1.5, 1) * 0.999 + 0.001, float32 [batch] on the generator's device: denser near noise, never 0
    (openpi: pi0.py, compute_loss).

    Drawn through the inverse of the distribution function, which for Beta(1.5, 1) is u^(1/1.5) exactly: torch's own
    Beta takes no generator.
    """
    u = torch.rand(batch, generator=generator, device=generator.device, dtype=torch.float64)
    return (u ** (1 / 1.5) * 0.999 + 0.001).float()


def interpolate(actions: torch.Tensor, noise: torch.Tensor, time: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """actions, noise [B, H, A], time [B] or [B, H] -> x_t and the velocity u_t, both [B, H, A]."""
    t = time[:, None, None] if time.dim() == 1 else time[:, :, None]
    return t * noise + (1 - t) * actions, noise - actions


# --- noise sources: where the flow starts -----------------------------------------------------------------------------
#
# source.start(shape, generator=..., trajectory=...) -> float32 [B, H, A]. White and pink draw from the generator, on
# its device, and ignore the trajectory; cold reads the trajectory and draws nothing.


@dataclass(frozen=True)
class White:
    """Independent standard normal numbers: what every published checkpoint was trained with."""

    name: ClassVar[str] = "white"

    def start(
        self, shape: tuple[int, int, int], *, generator: torch.Generator | None, trajectory: torch.Tensor | None = None
    ) -> torch.Tensor:
        device = None if generator is None else generator.device
        return torch.randn(shape, generator=generator, device=device)

    def to_dict(self) -> dict[str, Any]:
        return {"source": self.name}


@dataclass(frozen=True)
class Pink:
    """Gaussian with power 1/f^beta along the horizon, unit variance at every step, independent across dimensions.

    beta 0 is white, 1 pink, 2 close to a random walk. The spectrum is that of Timmer and König 1995, which the
    `colorednoise` package follows; the draw here has exactly the covariance of that process.
    """

    beta: float = 1.0
    name: ClassVar[str] = "pink"

    def __post_init__(self) -> None:
        if not isinstance(self.beta, (int, float)) or not 0 <= self.beta <= 4:
            raise NoiseSourceError(f"pink noise: beta must be between 0 and 4, found {self.beta!r}")

    def start(
        self, shape: tuple[int, int, int], *, generator: torch.Generator | None, trajectory: torch.Tensor | None = None
    ) -> torch.Tensor:
        white = White().start(shape, generator=generator)
        return pink_factor(float(self.beta), shape[1]).to(white.device) @ white

    def to_dict(self) -> dict[str, Any]:
        return {"source": self.name, "beta": float(self.beta)}


@dataclass(frozen=True)
class Cold:
    """No noise: a deterministic degradation of a trajectory (Bansal et al. 2022, "Cold Diffusion").

    In training the trajectory is the true chunk, in sampling what is left of the previous one, its last action
    held, or the current state held; always in the model's own units. `strength` in (0, 1] says how much is lost:
    smooth      a Gaussian window with a standard deviation of strength * H / 2 steps;
    downsample  every k-th action is kept and held, k from 1 to H;
    mask        the last strength * H actions become 0, which is the mean action; the first one always stays.
    """

    kind: str = "smooth"
    strength: float = 0.5
    name: ClassVar[str] = "cold"

    def __post_init__(self) -> None:
        if self.kind not in DEGRADATIONS:
            raise NoiseSourceError(f"cold start: kind must be one of {', '.join(DEGRADATIONS)}, found {self.kind!r}")
        if not isinstance(self.strength, (int, float)) or not 0 < self.strength <= 1:
            raise NoiseSourceError(f"cold start: strength must be above 0 and at most 1, found {self.strength!r}")

    def start(
        self, shape: tuple[int, int, int], *, generator: torch.Generator | None = None, trajectory: torch.Tensor | None
    ) -> torch.Tensor:
        if trajectory is None or tuple(trajectory.shape) != tuple(shape):
            found = None if trajectory is None else list(trajectory.shape)
            raise NoiseSourceError(f"a cold start needs a trajectory of shape {list(shape)} to degrade, found {found}")
        matrix = degradation(self.kind, float(self.strength), shape[1])
        return matrix.to(trajectory.device) @ trajectory.float()

    def to_dict(self) -> dict[str, Any]:
        return {"source": self.name, "kind": self.kind, "strength": float(self.strength)}


NoiseSource = White | Pink | Cold


@functools.lru_cache(maxsize=16)
def pink_factor(beta: float, horizon: int) -> torch.Tensor:
    """L [H, H] with L @ L.T = covariance of H steps of stationary 1/f^beta noise; ones on the covariance's diagonal.

    The spectrum has the frequencies k / (2H), k = 1 ... H, and the mean, which gets the power of the lowest one. The
    period of 2H keeps the last step of a chunk from leaning on its first.
    """
    k = torch.arange(horizon + 1, dtype=torch.float64)
    power = k.clamp(min=1) ** -beta
    power[1:-1] *= 2  # positive and negative frequencies; the mean and the highest one stand alone
    lag = torch.arange(horizon, dtype=torch.float64)
    correlation = (power * torch.cos(math.pi / horizon * lag[:, None] * k)).sum(dim=1) / power.sum()
    index = torch.arange(horizon)
    return torch.linalg.cholesky(correlation[(index[:, None] - index).abs()]).float()


@functools.lru_cache(maxsize=16)
def degradation(kind: str, strength: float, horizon: int) -> torch.Tensor:
    """The degradation as a matrix [H, H] over time: start = matrix @ trajectory."""
    index = torch.arange(horizon)
    if kind == "smooth":
        distance = (index[:, None] - index).double() / (strength * horizon / 2)
        window = torch.exp(-0.5 * distance.square())
        return (window / window.sum(dim=1, keepdim=True)).float()
    if kind == "downsample":
        k = 1 + round(strength * (horizon - 1))
        return (index[None, :] == (index // k * k)[:, None]).float()
    kept = max(1, horizon - round(strength * horizon))
    return torch.diag((index < kept).float())


def noise_source_from_dict(data: Mapping[str, Any]) -> NoiseSource:
    """The inverse of `to_dict`, for example {"source": "pink", "beta": 1.0}. NoiseSourceError for anything else."""
    sources = {cls.name: cls for cls in (White, Pink, Cold)}
    found = data.get("source") if isinstance(data, Mapping) else None
    if not isinstance(found, str) or found not in sources:
        raise NoiseSourceError(f"noise source must be one of {', '.join(sources)}, found {data!r}")
    cls, settings = sources[found], {key: value for key, value in data.items() if key != "source"}
    allowed = [field.name for field in dataclasses.fields(cls)]
    if unknown := sorted(set(settings) - set(allowed)):
        raise NoiseSourceError(f"noise source {found}: unknown {', '.join(unknown)}, allowed: {allowed or 'nothing'}")
    return cls(**settings)


def require_same_source(recorded: NoiseSource, wanted: NoiseSource | None, force: bool = False) -> NoiseSource:
    """The source to sample with: the recorded one, unless another is wanted and forced. NoiseSourceError otherwise."""
    if wanted is None or wanted == recorded:
        return recorded
    if not force:
        raise NoiseSourceError(
            f"the checkpoint was trained with noise source {recorded.to_dict()}, asked for {wanted.to_dict()}: "
            "actions would be wrong; leave the source out, or force it"
        )
    return wanted
