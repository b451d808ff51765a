"""Samples of the cache to batches in model space, prepared in a thread while the step before is computed."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from pi0_ros.model.pi0 import Observation, drop_padding, preprocess_observation
from pi0_ros.policy.prompt import PromptEncoder
from pi0_ros.policy.transforms import Group
from pi0_ros.training.dataset import Dataset


@dataclass(frozen=True)
class Batch:
    """Observation [B, ...] and actions f32 [B, H, A] in model space."""

    observation: Observation
    actions: torch.Tensor


def collate(dataset: Dataset, indices: np.ndarray, transforms: Group, encoder: PromptEncoder) -> Batch:
    """The samples `indices` as one batch, without cameras and prompt tokens that none of them has."""
    samples = [dataset.sample(int(index)) for index in indices]
    state = np.stack([sample["state"] for sample in samples])
    data = transforms.encode(state, np.stack([sample["actions"] for sample in samples]))
    joints = state.shape[-1]
    encoded = [encoder.encode_padded(sample["prompt"], data["state"][i, :joints]) for i, sample in enumerate(samples)]
    tokens, valid = (np.stack(column) for column in zip(*encoded, strict=True))
    observation = preprocess_observation(
        np.stack([sample["images"] for sample in samples]),
        np.stack([sample["image_masks"] for sample in samples]),
        tokens,
        valid,
        data["state"],
    )
    return Batch(drop_padding(observation), torch.from_numpy(data["actions"]).float())


def prefetch(make: Callable[[int], list[Batch]], begin: int, end: int) -> Iterator[list[Batch]]:
    """`make(step)` for each step from `begin` to `end`, computed up to two ahead of time in a thread.

    What `make` raises is raised here. Closing the iterator ends the thread.
    """
    ready: queue.Queue[list[Batch] | BaseException] = queue.Queue(maxsize=2)
    stop = threading.Event()

    def work() -> None:
        for step in range(begin, end):
            try:
                item: list[Batch] | BaseException = make(step)
            except BaseException as error:  # noqa: BLE001 - raised again where the batch is asked for
                item = error
            while not stop.is_set():
                try:
                    ready.put(item, timeout=0.2)
                    break
                except queue.Full:
                    continue
            if stop.is_set() or isinstance(item, BaseException):
                return

    thread = threading.Thread(target=work, name="batches", daemon=True)
    thread.start()
    try:
        for _ in range(begin, end):
            item = ready.get()
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        thread.join()
