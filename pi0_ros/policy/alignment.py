"""Which sample of every stream belongs to an instant: one rule, for the live node and for recorded bags.

    time of a sample = its stamp - the stream's latency
    sample at a tick = the newest whose time is at or before the tick and that has come by then; nothing from the future
    fresh            = the tick is no more than the stream's max_age behind that
    together         = oldest and newest chosen sample are no more than max_skew apart

`StreamBuffer` and `align` serve the node, which asks about the present; `align_ticks` serves the trainer, which has
whole streams as arrays and asks about every tick at once. Both are `bisect_right - 1`, and a test holds them together.
All times are integer nanoseconds.
"""

from __future__ import annotations

import threading
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

FAR_NS = 2**62  # further than any stamp
CLOCK_RESET_NS = 1_000_000_000  # a stamp this far ahead of the clock is not early: the clock was set back
Kind = Literal["missing", "stale", "skew", "clock"]
KINDS: tuple[Kind, ...] = ("missing", "stale", "skew", "clock")


@dataclass(frozen=True)
class Sample:
    """One message of a stream. `time_ns` is `stamp_ns` less the stream's latency."""

    time_ns: int
    stamp_ns: int
    payload: Any


class StreamBuffer:
    """The samples of one stream of the last `span_ns`, and the one before, ordered by stamp in whatever order they
    come: what a tick may ask for that looks back no further than that. Never more than `most`: stamps may be wrong.

    Callback threads push while a worker reads: every method holds the buffer's own lock for its short time and calls
    nothing of anyone else's under it, so locks never nest. Looking up is O(log n); so is pushing, but for the shift of
    a short list.
    """

    def __init__(self, name: str, max_age_ns: int, latency_ns: int = 0, span_ns: int = 10**9, most: int = 2048):
        if span_ns < 0:
            raise ValueError(f"stream {name!r}: span_ns must not be negative, found {span_ns}")
        self.name, self.max_age_ns, self.latency_ns = name, int(max_age_ns), int(latency_ns)
        self.span_ns, self.most = span_ns, most
        self._lock = threading.Lock()
        self._stamps: list[int] = []
        self._payloads: list[Any] = []

    def push(self, stamp_ns: int, payload: Any) -> None:
        """Keep a sample; one with the stamp of another replaces it. What nobody may ask for any more is forgotten."""
        stamp_ns = int(stamp_ns)
        with self._lock:
            at = bisect_left(self._stamps, stamp_ns)
            if at < len(self._stamps) and self._stamps[at] == stamp_ns:
                self._payloads[at] = payload
                return
            self._stamps.insert(at, stamp_ns)
            self._payloads.insert(at, payload)
            first = bisect_right(self._stamps, self._stamps[-1] - self.span_ns) - 1
            first = max(first, len(self._stamps) - self.most)
            if first > 0:
                del self._stamps[:first], self._payloads[:first]

    def newest_at(self, tick_ns: int) -> Sample | None:
        """The newest sample at or before the tick, however old, or None."""
        with self._lock:
            return self._newest_at(tick_ns)

    def look(self, tick_ns: int) -> tuple[Sample | None, int | None]:
        """`newest_at(tick_ns)` and the largest stamp held, both of one moment."""
        with self._lock:
            return self._newest_at(tick_ns), (self._stamps[-1] if self._stamps else None)

    def clear(self) -> None:
        """Forget everything, as after a clock reset."""
        with self._lock:
            self._stamps.clear()
            self._payloads.clear()

    def __len__(self) -> int:
        with self._lock:
            return len(self._stamps)

    def _newest_at(self, tick_ns: int) -> Sample | None:
        at = bisect_right(self._stamps, tick_ns + self.latency_ns) - 1
        if at < 0:
            return None
        stamp = self._stamps[at]
        return Sample(stamp - self.latency_ns, stamp, self._payloads[at])


@dataclass(frozen=True)
class Aligned:
    """One sample of every stream that belongs to the tick."""

    tick_ns: int
    samples: dict[str, Sample]

    @property
    def skew_ns(self) -> int:
        """Time between the oldest and the newest sample."""
        times = [sample.time_ns for sample in self.samples.values()]
        return max(times) - min(times)


@dataclass(frozen=True)
class Rejected:
    """Why there is no observation at a tick: the first stream at fault, in the order given, and one line of reason.

    kind "clock" means that the stream is ahead of the clock by more than a reset can leave unexplained: `clear()` all
    buffers and begin anew.
    """

    stream: str
    reason: str
    kind: Kind


def align(
    buffers: Iterable[StreamBuffer], tick_ns: int, max_skew_ns: int, now_ns: int | None = None
) -> Aligned | Rejected:
    """The observation at `tick_ns`. `now_ns` is what the clock says, for which no stamp may be far ahead of it."""
    looks = [(buffer, *buffer.look(tick_ns)) for buffer in buffers]
    if now_ns is not None:
        for buffer, _, last in looks:
            if last is not None and last - now_ns > CLOCK_RESET_NS:
                ahead = f"stamped {_s(last - now_ns)} ahead of this node's clock"
                return Rejected(
                    buffer.name, f"{ahead}: by a clock that is ahead (chrony, PTP), or this one was set back", "clock"
                )
    samples = {}
    for buffer, sample, last in looks:
        if sample is None and last is not None:
            ahead = _s(last - tick_ns - buffer.latency_ns)
            return Rejected(buffer.name, f"no message yet that is old enough: they are up to {ahead} ahead", "missing")
        if sample is None:
            return Rejected(buffer.name, "no message yet", "missing")
        age = tick_ns - sample.time_ns
        if age > buffer.max_age_ns:
            reason = f"newest message is {_s(age)} old, at most {_s(buffer.max_age_ns)} is allowed"
            return Rejected(buffer.name, reason, "stale")
        samples[buffer.name] = sample
    aligned = Aligned(tick_ns, samples)
    if samples and aligned.skew_ns > max_skew_ns:
        oldest = min(samples, key=lambda name: samples[name].time_ns)
        reason = f"{_s(aligned.skew_ns)} older than the newest stream, at most {_s(max_skew_ns)} is allowed (max_skew)"
        return Rejected(oldest, reason, "skew")
    return aligned


@dataclass(frozen=True)
class StreamTimes:
    """A whole recorded stream: stamps in the order of recording (they need not be sorted), int64 [M]."""

    name: str
    stamps_ns: np.ndarray
    max_age_ns: int
    latency_ns: int = 0
    held_ns: int = 0  # a sample has come only so long after its time


@dataclass(frozen=True)
class AlignedTicks:
    """The verdict on every tick.

    indices: stream -> int64 [T], which message of the stream belongs to the tick, -1 where there is none yet.
    fault: int8 [T], -1 for an aligned tick, else an index into KINDS.
    culprit: int64 [T], the stream at fault as an index into the streams given, -1 for an aligned tick.
    skew_ns: int64 [T] between oldest and newest chosen sample; 0 where one is missing.
    """

    indices: dict[str, np.ndarray]
    fault: np.ndarray
    culprit: np.ndarray
    skew_ns: np.ndarray

    @property
    def ok(self) -> np.ndarray:
        """bool [T], True where there is an observation."""
        return self.fault < 0

    def dropped(self) -> dict[tuple[str, Kind], int]:
        """(stream, kind) -> how many ticks were lost to it."""
        names = list(self.indices)
        pairs, counts = np.unique(np.stack([self.culprit, self.fault])[:, ~self.ok], axis=1, return_counts=True)
        return {(names[c], KINDS[k]): int(n) for (c, k), n in zip(pairs.T, counts, strict=True)}


def newest_indices(times_ns: np.ndarray, ticks_ns: np.ndarray) -> np.ndarray:
    """For every tick the last index of sorted `times_ns` at or before it, -1 where there is none: int64 [T]."""
    return np.searchsorted(times_ns, ticks_ns, side="right").astype(np.int64) - 1


def align_ticks(
    streams: Sequence[StreamTimes],
    ticks_ns: np.ndarray,
    max_skew_ns: int,
    used: Mapping[str, np.ndarray] | None = None,
) -> AlignedTicks:
    """`align` at every tick, int64 [T], over whole streams, without the check for clock resets.

    `used`: stream -> bool [T], whether `align` would be given it at that tick; everywhere where nothing is said.
    """
    ticks = np.asarray(ticks_ns, dtype=np.int64)
    fault, culprit = np.full(len(ticks), -1, np.int8), np.full(len(ticks), -1, np.int64)
    chosen = np.empty((len(streams), len(ticks)), np.int64)
    asked = np.ones((len(streams), len(ticks)), bool)
    indices = {}
    for i, stream in enumerate(streams):
        stamps = np.asarray(stream.stamps_ns, dtype=np.int64)
        order = np.argsort(stamps, kind="stable")  # stable: of equal stamps the last recorded stays last, and wins
        times = stamps[order] - stream.latency_ns
        at = newest_indices(times, ticks - stream.held_ns)
        asked[i] = (used or {}).get(stream.name, True)
        missing = (at < 0) & asked[i]
        indices[stream.name] = np.where(at < 0, -1, order[at] if len(order) else -1)
        chosen[i] = times[at] if len(times) else 0
        stale = (at >= 0) & asked[i] & (ticks - chosen[i] > stream.max_age_ns)
        for bad, kind in ((missing, "missing"), (stale, "stale")):
            first = bad & (fault < 0)
            fault[first], culprit[first] = KINDS.index(kind), i
    skew = np.zeros(len(ticks), np.int64)
    if len(streams):
        there = np.array(list(indices.values())) >= 0
        complete = (there | ~asked).all(axis=0) & asked.any(axis=0)
        oldest, newest = (np.where(asked, chosen, limit) for limit in (FAR_NS, -FAR_NS))
        skew = np.where(complete, newest.max(axis=0) - oldest.min(axis=0), 0)
        apart = (skew > max_skew_ns) & (fault < 0)
        fault[apart], culprit[apart] = KINDS.index("skew"), oldest.argmin(axis=0)[apart]
    return AlignedTicks(indices, fault, culprit, skew)


def _s(nanoseconds: int) -> str:
    return f"{nanoseconds / 1e9:.3f} s"
