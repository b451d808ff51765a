"""Training samples from the cache: random access, a split by episode, a shuffle that needs no memory, statistics."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from pi0_ros.policy.bundle import BundleSettings
from pi0_ros.policy.statistics import NormStats, Stats
from pi0_ros.policy.transforms import build_transforms
from pi0_ros.robot import CAMERA_SLOTS, Robot
from pi0_ros.training.cache import Unit
from pi0_ros.training.plausibility import least_spread

CHUNK_ROWS = 4096  # samples of the statistics that are worked on at once
NORMAL_98 = 2.33  # standard deviations of a normal distribution within which 98 % lie
MOST_ROWS = 4_000_000  # actions that quantiles are taken of; of a larger set, every so many-th sample


class Dataset:
    """Samples (observation at a tick, action chunk from that tick) of the episodes of cached bags.

    A sample begins at every usable tick from which on every action of the chunk is known. Action k of the chunk is what
    was commanded for k ticks later; past the end of the episode the last action is repeated (as openpi and lerobot do)
    and `action_mask` False.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        horizon: int,
        *,
        episodes: Sequence[tuple[int, int]] | None = None,
        cameras: Sequence[str] = CAMERA_SLOTS,
        first: int | None = None,
    ) -> None:
        """`episodes`: (unit, episode) pairs to take, as `split` gives them; None for all. `first`: only as
        many samples of each episode, from its beginning; None for all."""
        self.units, self.horizon, self.cameras = list(units), horizon, tuple(cameras)
        self.episodes = list(all_episodes(units) if episodes is None else episodes)
        begins = [_begins(self.units[unit], episode, horizon) for unit, episode in self.episodes]
        if first is not None:
            begins = [ticks[ticks < ticks[:1] + first] for ticks in begins]
        self._offsets = np.concatenate([[0], np.cumsum([len(ticks) for ticks in begins], dtype=np.int64)])
        self._tick = np.concatenate(begins) if begins else np.empty(0, np.int64)

    def __len__(self) -> int:
        return len(self._tick)

    def sample(self, index: int) -> dict[str, Any]:
        """Sample `index` of `len(self)`.

        images: uint8 [N, S, S, 3], N cameras in the order given, black where the robot has none; image_masks: bool [N];
        state: float64 [J]; actions: float64 [H, J], absolute; action_mask: bool [H]; prompt: str. Robot units.
        """
        unit, tick, rows, mask = self._chunk(index)
        arrays, size = unit.arrays, unit.index["image_size"]
        images = np.zeros((len(self.cameras), size, size, 3), np.uint8)
        masks = np.zeros(len(self.cameras), bool)
        for column, slot in enumerate(unit.slots):
            if slot in self.cameras:
                at = self.cameras.index(slot)
                images[at], masks[at] = unit.frames[slot][arrays["rows"][tick, column]], True
        return {
            "images": images,
            "image_masks": masks,
            "state": np.array(arrays["state"][tick]),
            "actions": arrays["actions"][rows],
            "action_mask": mask,
            "prompt": unit.prompts[arrays["prompt"][tick]],
        }

    def where(self, index: int) -> tuple[int, int, int]:
        """(unit, episode of the unit, tick within the episode) of a sample."""
        unit, episode = self.episodes[self._place(index)]
        return unit, episode, int(self._tick[index]) - self.units[unit].episodes[episode]["begin"]

    def prompts(self) -> set[str]:
        """Those of all samples."""
        found = set()
        for place, (number, _) in enumerate(self.episodes):
            unit, ticks = self.units[number], self._tick[self._offsets[place] : self._offsets[place + 1]]
            found |= {unit.prompts[i] for i in np.unique(unit.arrays["prompt"][ticks])}
        return found

    def _place(self, index: int) -> int:
        return int(np.searchsorted(self._offsets, index, side="right")) - 1

    def _chunk(self, index: int) -> tuple[Unit, int, np.ndarray, np.ndarray]:
        number, episode = self.episodes[self._place(index)]
        unit, tick = self.units[number], int(self._tick[index])
        rows, inside = self._rows(unit, episode, self._tick[index : index + 1])
        return unit, tick, rows[0], inside[0]

    def _rows(self, unit: Unit, episode: int, ticks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The ticks of the chunks that begin at `ticks` of an episode, and whether they lie in it: [B, H] both."""
        rows, end = ticks[:, None] + np.arange(self.horizon), unit.episodes[episode]["end"]
        return np.minimum(rows, end - 1), rows < end

    def chunks(self, stride: int = 1) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Every stride-th sample without images, in blocks: state [B, J], actions [B, H, J], action_mask [B, H]."""
        for place, (number, episode) in enumerate(self.episodes):
            unit = self.units[number]
            arrays = unit.arrays
            ticks = self._tick[self._offsets[place] : self._offsets[place + 1]][::stride]
            for first in range(0, len(ticks), CHUNK_ROWS):
                at = ticks[first : first + CHUNK_ROWS]
                rows, inside = self._rows(unit, episode, at)
                yield arrays["state"][at], arrays["actions"][rows], inside


def _begins(unit: Unit, episode: int, horizon: int = 1) -> np.ndarray:
    """int64, the ticks of an episode at which a sample may begin: none from which it would reach an unknown action."""
    begin, end = unit.episodes[episode]["begin"], unit.episodes[episode]["end"]
    unknown = np.concatenate([[0], np.cumsum(~unit.arrays["known"][begin:end])])  # of the ticks before each
    ticks = np.arange(end - begin)
    whole = unknown[np.minimum(ticks + horizon, end - begin)] == unknown[ticks]
    return begin + np.flatnonzero(unit.arrays["usable"][begin:end] & whole)


def all_episodes(units: Sequence[Unit]) -> list[tuple[int, int]]:
    """(unit, episode) of every episode."""
    return [(i, k) for i, unit in enumerate(units) for k in range(len(unit.episodes))]


def split(
    units: Sequence[Unit], held_out: float, seed: int = 0, horizon: int = 1
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Episodes to train on and episodes to hold out, both as (unit, episode), by a hash of bag, episode and seed.

    Copies of a recording stay on one side. At least one episode is held out when `held_out` > 0 and two differ; the
    same bags and seed give the same split, whatever folder they lie in. Episodes without a sample are in neither.
    """
    same: dict[str, list[tuple[int, int]]] = {}  # by content
    for i, k in all_episodes(units):
        if len(_begins(units[i], k, horizon)):
            same.setdefault(_hash(seed, units[i].index["digest"], k), []).append((i, k))
    count = 0 if held_out <= 0 or len(same) < 2 else min(max(round(held_out * len(same)), 1), len(same) - 1)
    keys = sorted(same)
    train, held = (sorted(pair for key in side for pair in same[key]) for side in (keys[count:], keys[:count]))
    return train, held


def _hash(*parts: object) -> str:
    return hashlib.sha256("/".join(map(str, parts)).encode()).hexdigest()


def batch_indices(samples: int, step: int, batch: int, *, seed: int, rank: int = 0, ranks: int = 1) -> np.ndarray:
    """Which samples rank `rank` trains on at optimizer step `step`: int64 [batch]. Needs no state to resume.

    All ranks together walk through one endless row of permutations, one an epoch, each from (seed, epoch): rank r takes
    the r-th block of the step's ranks * batch places. So one process with a batch of 64 sees what two with 32 see.
    """
    if samples < 1:
        raise ValueError("there are no samples to draw from")
    places = np.arange(batch, dtype=np.int64) + (step * ranks + rank) * batch
    epochs, at = np.divmod(places, samples)
    drawn = np.empty(batch, np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        drawn[here] = _permutation(samples, seed, int(epoch))[at[here]]
    return drawn


@lru_cache(maxsize=4)
def _permutation(samples: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng(np.random.SeedSequence([seed, epoch])).permutation(samples)


def statistics(dataset: Dataset, robot: Robot, settings: BundleSettings) -> NormStats:
    """Mean, std and exact 1 % and 99 % quantiles of states and of actions, in the space that is normalised.

    Over every sample, and of its actions over every step of the chunk that is not padding (openpi:
    scripts/compute_norm_stats.py, which counts the padding and bins the quantiles). A joint that rested counts as
    spread by `least_spread`.
    """
    if not len(dataset):
        raise ValueError("there are no samples to take statistics of")
    group = build_transforms(robot, None, settings)
    states, actions = [], []
    for state, chunk, mask in dataset.chunks(stride=1 + len(dataset) * dataset.horizon // MOST_ROWS):
        data = group.encode(state, chunk)
        states.append(data["state"])
        actions.append(data["actions"][mask])
    least = np.array([least_spread(joint) for joint in robot.joints])
    return NormStats(_stats(np.concatenate(states), least), _stats(np.concatenate(actions), least))


def _stats(rows: np.ndarray, least: np.ndarray) -> Stats:
    q01, q99 = np.quantile(rows, [0.01, 0.99], axis=0)
    wider = np.maximum(0.0, NORMAL_98 * least - (q99 - q01) / 2)
    return Stats(rows.mean(axis=0), np.maximum(rows.std(axis=0), least), q01 - wider, q99 + wider)
