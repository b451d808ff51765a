"""How long the stages of a chunk take."""

from __future__ import annotations

import time

import torch


class Stages:
    """Seconds between marks; on a GPU by events, read once at the end, so that no stage waits for the host."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._names: list[str] = []
        self._marks = [self._now()]

    def _now(self):
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def mark(self, name: str) -> None:
        self._names.append(name)
        self._marks.append(self._now())

    def seconds(self) -> dict[str, float]:
        if self._cuda:
            self._marks[-1].synchronize()
        spans = list(zip(self._marks[:-1], self._marks[1:], strict=True))
        return {
            name: a.elapsed_time(b) / 1e3 if self._cuda else b - a
            for name, (a, b) in zip(self._names, spans, strict=True)
        }
