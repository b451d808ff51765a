"""Whether a chunk may be played, before anyone trusts it, and the settings by which it then is. Pure numpy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pi0_ros.ros.limiter import Limits

SECOND = 1_000_000_000  # ns
LEAST_DT, MOST_DT = 0.001, 10.0  # s; another time between two actions is a fault, not a fast or a slow robot


@dataclass(frozen=True)
class Settings:
    """How to judge and play; the node's parameters of the same names say more."""

    rate: float = 100.0
    interpolation: str = "linear"
    handover: str = "blend"
    blend_time: float = 0.3
    ensemble_decay: float = 0.01
    hold_after: float = 0.0
    play_untrained: bool = False
    policy_timeout: float = 1.0
    chunk_max_age: float = 1.0
    chunk_max_ahead: float = 0.05
    limits: str = "clamp"
    velocity_scale: float = 1.0
    acceleration_scale: float = 1.0
    approach_threshold: float = 0.25
    approach_speed: float = 0.2
    following_error: float = 0.5
    window: float = 0.4
    lead: float = 0.02
    resend: float = 0.1
    dry_run: bool = False


@dataclass(frozen=True)
class Offer:
    """A chunk as it came, before anyone trusts it."""

    stamp: int  # ns
    sequence: int
    epoch: int
    joint_names: tuple[str, ...]
    horizon: int
    dt: float
    actions: np.ndarray  # float64 [horizon * joints], row-major
    untrained: bool = False  # made by random weights


def fault_of(offer: Offer, names: tuple[str, ...], limits: Limits, settings: Settings, now: int) -> str | None:
    """Why a chunk is refused at `now` (ns) by a robot of these joints, in one line, or None."""
    if offer.untrained and not (settings.play_untrained or settings.dry_run):
        return "untrained random weights made it (play_untrained allows that, on a simulated arm)"
    if offer.joint_names != names:
        return f"joints {list(offer.joint_names)} are not {list(names)}"
    if not (LEAST_DT <= offer.dt <= MOST_DT):
        return f"dt is {offer.dt} s, must be from {LEAST_DT:g} to {MOST_DT:g}"
    if offer.horizon < 1 or offer.actions.size != offer.horizon * len(offer.joint_names):
        return f"{offer.actions.size} values are not horizon {offer.horizon} times {len(offer.joint_names)} joints"
    finite = np.isfinite(offer.actions)
    if not finite.all():
        step, joint = divmod(int(np.argmin(finite)), len(offer.joint_names))
        return f"action {step} of joint '{offer.joint_names[joint]}' is {offer.actions[np.argmin(finite)]}"
    age = (now - offer.stamp) / SECOND
    if age > settings.chunk_max_age:
        return f"its observation is {age:.3f} s old, at most {settings.chunk_max_age:g} s are allowed"
    if -age > settings.chunk_max_ahead:
        return f"its stamp is {-age:.3f} s in the future, at most {settings.chunk_max_ahead:g} s are allowed"
    if settings.limits == "refuse":
        return _broken_limit(offer, limits)
    return None


def _broken_limit(offer: Offer, limits: Limits) -> str | None:
    """The first limit that the actions themselves break, or None."""
    actions = offer.actions.reshape(offer.horizon, len(offer.joint_names))
    slack = 1.0 + 1e-6
    with np.errstate(over="ignore", invalid="ignore"):  # finite but huge: the difference may not be
        velocity = np.diff(actions, axis=0) / offer.dt
        acceleration = np.diff(velocity, axis=0) / offer.dt
    span = limits.high - limits.low
    outside = np.maximum(limits.low - actions, actions - limits.high) - 1e-6 * span
    for what, excess, values, unit in (
        ("position", outside, actions, ""),
        ("velocity", np.abs(velocity) - slack * limits.velocity, velocity, "/s"),
        ("acceleration", np.abs(acceleration) - slack * limits.acceleration, acceleration, "/s^2"),
    ):
        broken = ~(excess <= 0)  # NaN is broken
        if broken.any():
            step, joint = np.unravel_index(int(np.argmax(broken)), broken.shape)
            name = offer.joint_names[joint]
            return f"{what} of joint '{name}' at action {step} is {values[step, joint]:.4g}{unit}, beyond its limit"
    return None
