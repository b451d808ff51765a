"""Robot units to model space and back: transforms in pairs, whose inverse order follows by itself.

    robot units -> grippers to 0..1 (or ALOHA's maps) -> actions relative to state -> normalise -> pad -> model space

Every transform takes and returns {"state": [..., D], "actions": [..., H, D]}, either key may be missing, and changes
nothing in place. `build_transforms` is the only place that puts them in order, for the trainer and for the node.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from pi0_ros.policy import aloha
from pi0_ros.policy.bundle import BundleSettings
from pi0_ros.policy.statistics import NormStats, Stats
from pi0_ros.robot import Robot

Data = dict[str, np.ndarray]
Transform = Callable[[Data], Data]
Pair = tuple[Transform, Transform]

EPSILON = 1e-6  # openpi: transforms.py, Normalize; it matters where a joint hardly moved


@dataclass(frozen=True)
class Group:
    """Transforms into model space and their inverses. A pair that goes in last comes out first (openpi: Group.push)."""

    inputs: tuple[Transform, ...] = ()
    outputs: tuple[Transform, ...] = ()

    def push(self, *pairs: Pair) -> Group:
        inputs, outputs = self.inputs, self.outputs
        for into, out_of in pairs:
            inputs, outputs = (*inputs, into), (out_of, *outputs)
        return Group(inputs, outputs)

    def encode(self, state: np.ndarray, actions: np.ndarray | None = None) -> Data:
        """State [..., J] and actions [..., H, J] in robot units -> model space, float64."""
        data = {"state": np.asarray(state, np.float64)}
        if actions is not None:
            data["actions"] = np.asarray(actions, np.float64)
        for transform in self.inputs:
            data = transform(data)
        return data

    def decode(self, state: np.ndarray, actions: np.ndarray) -> np.ndarray:
        """Actions [..., H, A] in model space -> robot units [..., H, J]. `state` as `encode` gave it, [..., A]."""
        data = {"state": np.asarray(state, np.float64), "actions": np.asarray(actions, np.float64)}
        for transform in self.outputs:
            data = transform(data)
        return data["actions"]


def build_transforms(robot: Robot, stats: NormStats | None, settings: BundleSettings) -> Group:
    """The transforms of a robot and a checkpoint. Without statistics they end before normalisation: the space in which
    statistics are computed.

    Raises:
        StatisticsError: statistics that do not fit the robot. Whether the model does is `misfit`'s question.
    """
    joints, group = len(robot.joints), Group()
    if settings.adapter == "aloha":
        group = group.push((aloha.to_pi, aloha.from_pi))
    elif grippers := tuple((i, j.open, j.closed) for i, j in enumerate(robot.joints) if j.kind == "gripper"):
        group = group.push((GripperToUnit(grippers), GripperFromUnit(grippers)))
    relative = tuple(joint.relative for joint in robot.joints)
    group = group.push((RelativeActions(relative), AbsoluteActions(relative)))
    if stats is None:
        return group
    stats.require(settings.normalisation, joints)
    quantile = settings.normalisation == "quantile"
    return group.push(
        (Normalize(stats, quantile), Unnormalize(stats, quantile)),
        (Pad(settings.model.action_dim), Unpad(joints)),
    )


@dataclass(frozen=True)
class GripperToUnit:
    """Gripper positions in message units to 0 = open .. 1 = closed. grippers: (index, open, closed) of each."""

    grippers: tuple[tuple[int, float, float], ...]

    def __call__(self, data: Data) -> Data:
        data = {key: value.copy() for key, value in data.items()}
        for value in data.values():
            for i, opened, closed in self.grippers:
                value[..., i] = (value[..., i] - opened) / (closed - opened)
        return data


@dataclass(frozen=True)
class GripperFromUnit:
    """The inverse of `GripperToUnit`."""

    grippers: tuple[tuple[int, float, float], ...]

    def __call__(self, data: Data) -> Data:
        data = {key: value.copy() for key, value in data.items()}
        for value in data.values():
            for i, opened, closed in self.grippers:
                value[..., i] = opened + value[..., i] * (closed - opened)
        return data


@dataclass(frozen=True)
class RelativeActions:
    """Actions less the state, where the mask is true; every step less the same state (openpi: DeltaActions)."""

    mask: tuple[bool, ...]

    def __call__(self, data: Data) -> Data:
        return _shift(data, self.mask, -1.0)


@dataclass(frozen=True)
class AbsoluteActions:
    """The inverse of `RelativeActions`."""

    mask: tuple[bool, ...]

    def __call__(self, data: Data) -> Data:
        return _shift(data, self.mask, 1.0)


def _shift(data: Data, mask: Sequence[bool], sign: float) -> Data:
    if "actions" not in data:
        return data
    actions, dims = data["actions"].copy(), len(mask)
    actions[..., :dims] += sign * np.where(mask, data["state"][..., :dims], 0.0)[..., None, :]
    return {**data, "actions": actions}


@dataclass(frozen=True)
class Normalize:
    """(x - mean) / (std + 1e-6), or 1 % .. 99 % quantile to -1 .. 1; nothing is clipped (openpi: Normalize).

    Statistics longer than the data are read as far as the data goes.
    """

    stats: NormStats
    quantile: bool

    def __call__(self, data: Data) -> Data:
        return {key: self._normalize(value, getattr(self.stats, key)) for key, value in data.items()}

    def _normalize(self, x: np.ndarray, stats: Stats) -> np.ndarray:
        dims = x.shape[-1]
        if self.quantile:
            low, high = stats.q01[:dims], stats.q99[:dims]
            return (x - low) / (high - low + EPSILON) * 2.0 - 1.0
        return (x - stats.mean[:dims]) / (stats.std[:dims] + EPSILON)


@dataclass(frozen=True)
class Unnormalize:
    """The inverse of `Normalize`. Dimensions beyond the statistics pass (openpi: Unnormalize)."""

    stats: NormStats
    quantile: bool

    def __call__(self, data: Data) -> Data:
        return {key: self._unnormalize(value, getattr(self.stats, key)) for key, value in data.items()}

    def _unnormalize(self, x: np.ndarray, stats: Stats) -> np.ndarray:
        dims = min(x.shape[-1], len(stats.mean))
        known, beyond = x[..., :dims], x[..., dims:]
        if self.quantile:
            low, high = stats.q01[:dims], stats.q99[:dims]
            return np.concatenate([(known + 1.0) / 2.0 * (high - low + EPSILON) + low, beyond], axis=-1)
        known = known * (stats.std[:dims] + EPSILON) + stats.mean[:dims]
        return np.concatenate([known, beyond * (1.0 + EPSILON)], axis=-1)  # std padded with 1, as openpi does


@dataclass(frozen=True)
class Pad:
    """Zeros up to the model's action dimensions (openpi: PadStatesAndActions)."""

    dim: int

    def __call__(self, data: Data) -> Data:
        return {key: pad_last(value, self.dim) for key, value in data.items()}


@dataclass(frozen=True)
class Unpad:
    """The first `dim` dimensions."""

    dim: int

    def __call__(self, data: Data) -> Data:
        return {key: value[..., : self.dim] for key, value in data.items()}


def pad_last(x: np.ndarray, dim: int) -> np.ndarray:
    """x [..., D] with zeros up to [..., dim]; longer ones stay."""
    missing = max(dim - x.shape[-1], 0)
    return np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)])


def limit_statistics(robot: Robot, settings: BundleSettings) -> NormStats:
    """Statistics that the joints' limits suggest: their middle and a quarter of their range, the limits as quantiles;
    for relative actions around zero, with half the range to either side."""
    space = build_transforms(robot, None, settings)
    ends = np.array(
        [space.encode(np.array(end))["state"] for end in zip(*(j.position for j in robot.joints), strict=True)]
    )
    low, high = ends.min(axis=0), ends.max(axis=0)  # a gripper's lower end may be the closed one
    relative = np.array([joint.relative for joint in robot.joints])
    middle = np.where(relative, 0.0, (low + high) / 2)
    quarter = (high - low) / 4
    return NormStats(
        state=Stats((low + high) / 2, quarter, low, high),
        actions=Stats(middle, quarter, middle - 2 * quarter, middle + 2 * quarter),
    )
